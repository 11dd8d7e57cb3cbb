"""The webhook's two routes: how the last message went, and Send test. The owner's alone; the address is never in an answer.

Read by `assets/train_notify.js`. Called by `ui/server.py`.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from trainer.config import get
from trainer.notify import Result, last_result, sample_message
from trainer.refusal import Refusal
from ui.form_state import form_state
from ui.guard import Caller, caller_of, guarded
from ui.replies import json_reply
from ui.site import Site

KEY = "notify.webhook_url"


def routes(site: Site) -> list[Route]:
    """The routes of this module; every one names the action that its caller must be allowed."""

    async def last(request: Request) -> Response:
        """`GET api/notify`: {"last": {"at", "host", "kind", "ok", "text"} or null}."""
        return json_reply({"last": _told(await run_in_threadpool(last_result, site.workspace.root))})

    async def test(request: Request) -> Response:
        """`POST api/notify/test`: sends one message to the webhook of the caller's form, once; answers how it went."""
        return json_reply({"last": _told(await run_in_threadpool(_test, site, caller_of(request)))})

    return [
        Route("/api/notify", guarded("webhook", last)),
        Route("/api/notify/test", guarded("webhook", test), methods=["POST"]),
    ]


def _test(site: Site, caller: Caller) -> Result:
    state = form_state(site.workspace, site.config_path, site.drafts.read(caller.session))
    if KEY in state.problems:
        raise Refusal(state.problems[KEY], KEY)
    url = get(state.config, KEY) if state.config is not None else ""
    if not url:
        raise Refusal("There is no webhook yet. Put its address into the field first.", KEY)
    return site.engine.notifier.send_now(url, sample_message())


def _told(result: Result | None) -> dict[str, Any] | None:
    return asdict(result) if result is not None else None
