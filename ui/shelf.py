"""A list of things with a report on each: the part that the Data page and the Models page share.

Owns `cache/reports/` of the workspace: which job holds the newest report on which thing, and for which state of its
files. Checks run as jobs in the limited worker; pages poll the routes made here and never wait.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from trainer.files import make_private_dir, read_json, write_json
from trainer.jobs import JobHandle
from trainer.refusal import Refusal
from ui.guard import guarded
from ui.replies import json_reply
from ui.site import Site

View = Callable[[dict[str, Any]], dict[str, Any]]
Check = Callable[[JobHandle], dict[str, Any]]


@dataclass(frozen=True)
class Item:
    """One thing on the list. `cells` are the columns after the name; `stamp` changes when its files do."""

    id: str
    name: str
    path: Path
    cells: tuple[str, ...]
    stamp: list[Any]


@dataclass(frozen=True)
class Standing:
    """How an item stands: not checked, being checked, or with a report (`view` as in ui.report).

    A check in two parts has a `view` of the first while the second goes on; `doing` says what that is.
    """

    state: Literal["not-run", "running", "done", "failed"]
    job: str = ""
    progress: float | None = None
    view: dict[str, Any] | None = None
    error: str = ""
    doing: str = ""

    def line(self) -> dict[str, str]:
        """Sign and word for the list."""
        if self.state == "running":
            share = "" if self.progress is None else f" {int(self.progress * 100)} %"
            return {"sign": "preparing", "word": self.doing or f"checking{share}"}
        if self.state == "done" and self.view is not None:
            return {"sign": self.view["status"], "word": self.view["word"]}
        return (
            {"sign": "problem", "word": "check failed"}
            if self.state == "failed"
            else {"sign": "not-run", "word": "not checked"}
        )


class Shelf:
    """The items of one kind, their checks and their reports; `kind` is also the name in the addresses."""

    def __init__(
        self,
        site: Site,
        kind: str,
        items: Callable[[], list[Item]],
        check: Callable[[Item, dict[str, Any]], Check],
        view: View,
    ) -> None:
        self._site, self._kind, self._items, self._check, self._view = site, kind, items, check, view
        self._folder = site.workspace.root / "cache" / "reports"
        self._turn = threading.Lock()

    def item(self, item_id: str) -> Item:
        """The item with this id; raises Refusal when it is gone."""
        found = next((item for item in self._items() if item.id == item_id), None)
        if found is None:
            raise Refusal("That is no longer there. Reload the page.")
        return found

    def start(self, item: Item, options: dict[str, Any]) -> str:
        """Check `item` as a job, unless it is being checked; returns the job's id."""
        with self._turn:
            standing = self.standing(item)
            if standing.state == "running":
                return standing.job
            job = self._site.jobs.start(f"check-{self._kind}", self._check(item, options))
            make_private_dir(self._folder)
            write_json(self._note(item), {"job": job, "stamp": item.stamp})
            return job

    def cancel(self, item: Item) -> None:
        """Leave the check of `item`; harmless when there is none."""
        standing = self.standing(item)
        if standing.state == "running":
            self._site.jobs.cancel(standing.job)

    def standing(self, item: Item) -> Standing:
        """How `item` stands now; a report on files that have changed since counts as none."""
        try:
            note = read_json(self._note(item))
            job = self._site.jobs.read(note["job"])
        except (OSError, ValueError, KeyError, Refusal):
            return Standing("not-run")
        if job["state"] == "running":
            done, total = job["progress"] or (0, 0)
            first = self._view(job["result"]) if job["result"] else None
            share = done / total if total else None
            return Standing("running", note["job"], share, first, doing=job["text"] if first else "")
        if note["stamp"] != item.stamp or job["state"] == "cancelled":
            return Standing("not-run")
        if job["state"] == "done":
            return Standing("done", note["job"], view=self._view(job["result"]))
        return Standing("failed", note["job"], error=job["error"] or "The check did not come to its end.")

    def _note(self, item: Item) -> Path:
        return self._folder / f"{self._kind}-{item.id}.json"

    def _list(self) -> dict[str, Any]:
        rows = []
        for item in self._items():
            standing = self.standing(item)
            cells = list(item.cells)
            if standing.view is not None and "counted" in standing.view:  # a file of a data root has no note of its own
                cells[0] = standing.view["counted"]
            rows.append({"id": item.id, "name": item.name, "cells": cells, **standing.line(), "job": standing.job})
        return {"items": rows}

    def _read(self, item_id: str) -> dict[str, Any]:
        item = self.item(item_id)
        standing = self.standing(item)
        return {
            "id": item.id, "name": item.name, "path": str(item.path), "state": standing.state,
            "progress": standing.progress, "view": standing.view, "error": standing.error, **standing.line(),
        }  # fmt: skip

    def routes(self) -> list[Route]:
        """`GET api/KIND`, `GET api/KIND/ID`, `POST api/KIND/ID/check` and `…/cancel`."""

        async def listing(request: Request) -> Response:
            return json_reply(await run_in_threadpool(self._list))

        async def reading(request: Request) -> Response:
            return json_reply(await run_in_threadpool(self._read, request.path_params["id"]))

        async def checking(request: Request) -> Response:
            options = await json_object(request)
            item = await run_in_threadpool(self.item, request.path_params["id"])
            return json_reply({"job": await run_in_threadpool(self.start, item, options)}, 202)

        async def cancelling(request: Request) -> Response:
            item = await run_in_threadpool(self.item, request.path_params["id"])
            await run_in_threadpool(self.cancel, item)
            return json_reply({"ok": True}, 202)

        base = f"/api/{self._kind}"
        return [
            Route(base, guarded("see", listing)),
            Route(base + "/{id}", guarded("see_rows", reading)),
            Route(base + "/{id}/check", guarded("check", checking), methods=["POST"]),
            Route(base + "/{id}/cancel", guarded("check", cancelling), methods=["POST"]),
        ]


async def json_object(request: Request) -> dict[str, Any]:
    """The JSON object in the body of a request, {} for an empty one; raises Refusal for anything else."""
    try:
        value = await request.json() if await request.body() else {}
    except (ValueError, RecursionError):
        raise Refusal("That request is not JSON.") from None
    if not isinstance(value, dict):
        raise Refusal("That request is not a JSON object.")
    return value


def text_of(options: dict[str, Any], name: str, longest: int = 4096) -> str:
    """A text out of a request, "" where it is missing; raises Refusal for another type or a very long one."""
    value = options.get(name) or ""
    if not isinstance(value, str) or len(value) > longest:
        raise Refusal(f"'{name}' is not a usable text.")
    return value
