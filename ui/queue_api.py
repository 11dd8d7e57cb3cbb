"""The queue on the page: add a run, move it, take it out, hold the queue back or let it go on.

The list itself travels with `api/runs`, so that a tab asks once for both. Called by `ui/server.py` and `assets/queue.js`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from trainer.refusal import Refusal
from ui.guard import Caller, caller_of, guarded
from ui.replies import json_body, json_reply
from ui.site import Site


def routes(site: Site) -> list[Route]:
    """The routes of this module, each with the action its caller must be allowed."""

    async def change(request: Request) -> Response:
        """`POST api/queue {"act": "add" | "move" | "remove" | "hold" | "go", "run_id"?, "place"?}`."""
        body = await json_body(request)
        act = ACTS.get(str(body.get("act")))
        if act is None:
            raise Refusal(f"That is nothing the queue can do. Known: {', '.join(ACTS)}.")
        await run_in_threadpool(act, site, caller_of(request), body)
        return json_reply(await run_in_threadpool(queue_state, site))

    return [Route("/api/queue", guarded("queue", change), methods=["POST"])]


def queue_state(site: Site) -> dict[str, Any]:
    """{"order": run ids, next first, "held_by": "" or who holds it back, "fault": "" or why it cannot be read}."""
    try:
        now = site.workspace.queue.read()
    except Refusal as refusal:
        return {"order": [], "held_by": "", "fault": refusal.message}
    return {"order": [entry.run_id for entry in now.entries], "held_by": now.held_by, "fault": ""}


def _run_id(body: dict[str, Any]) -> str:
    run_id = body.get("run_id")
    if not isinstance(run_id, str):
        raise Refusal("Name the run.")
    return run_id


def _add(site: Site, caller: Caller, body: dict[str, Any]) -> None:
    site.engine.enqueue(_run_id(body), caller.role)


def _move(site: Site, caller: Caller, body: dict[str, Any]) -> None:
    place = body.get("place")
    if type(place) is not int:
        raise Refusal("The place must be a whole number.")
    site.workspace.queue.move(_run_id(body), place)


def _remove(site: Site, caller: Caller, body: dict[str, Any]) -> None:
    site.workspace.queue.remove(_run_id(body))


def _hold(site: Site, caller: Caller, body: dict[str, Any]) -> None:
    site.workspace.queue.hold(caller.role)


def _go(site: Site, caller: Caller, body: dict[str, Any]) -> None:
    site.workspace.queue.release()


ACTS: dict[str, Callable[[Site, Caller, dict[str, Any]], None]] = {
    "add": _add,
    "move": _move,
    "remove": _remove,
    "hold": _hold,
    "go": _go,
}
