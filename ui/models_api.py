"""What the Models page asks for: the model folders with their reports, and the starter model.

Called by `ui/server.py` and `ui/pages/models.py`; both verdicts are made in the worker.
"""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from trainer.jobs import JobHandle
from trainer.models.full_report import full_report
from trainer.worker import Cancelled
from ui.guard import guarded
from ui.numbers import disk
from ui.replies import json_reply
from ui.report import model_view
from ui.shelf import Check, Item, Shelf
from ui.site import Site

STARTER_LIMIT_S = 600.0
STARTER = "starter"


def models_shelf(site: Site) -> Shelf:
    """The model folders of the workspace and of its model roots."""
    turn = threading.Lock()

    def items() -> list[Item]:
        return [_item(site, path) for path in site.workspace.models()]

    def check(item: Item, options: dict[str, Any]) -> Check:
        deep = options.get("deep") is True

        def work(handle: JobHandle) -> dict[str, Any]:
            def ask(op: str, **args: Any) -> Any:
                if op != "check_shapes":
                    return site.worker.call(op, **args)
                # one at a time: each holds a child for seconds that previews and data checks need too
                while not turn.acquire(timeout=0.2):
                    if handle.cancelled():
                        raise Cancelled("Left before it began.")
                try:
                    return site.worker.call(op, **args)
                finally:
                    turn.release()

            return full_report(
                ask, item.path, deep=deep, layouts=site.workspace.layouts,
                on_headers=lambda report: handle.write(True, result=report, text="checking shapes"),
                on_progress=handle.progress, cancelled=handle.cancelled,
            )  # fmt: skip

        return work

    return Shelf(site, "models", items, check, model_view)


def _item(site: Site, path: Path) -> Item:
    mark = hashlib.sha256(os.fsencode(path)).hexdigest()[:16]
    files = sorted((entry.name, entry.stat().st_size, entry.stat().st_mtime_ns) for entry in _files(path))
    where = "workspace" if path.parent == site.workspace.models_dir else str(path.parent)
    cells = (disk(sum(size for _, size, _ in files)), where)
    return Item(mark, path.name, path, cells, [list(file) for file in files])


def _files(folder: Path) -> list[os.DirEntry[str]]:
    try:
        return [entry for entry in os.scandir(folder) if entry.is_file()]
    except OSError:
        return []


def start_starter(site: Site) -> None:
    """Make the starter model and data as a job, unless that is going on."""
    if starter_state(site)["state"] == "running":
        return

    def work(handle: JobHandle) -> Any:
        return site.worker.call(
            "starter", timeout_s=STARTER_LIMIT_S, on_progress=handle.progress, cancelled=handle.cancelled,
            models_root=str(site.workspace.models_dir), datasets_root=str(site.workspace.datasets_dir),
        )  # fmt: skip

    site.jobs.start(STARTER, work)


def starter_state(site: Site) -> dict[str, Any]:
    """How the newest making of the starter model stands: {"state", "error"}; "none" when there was none."""
    found = site.jobs.recent(STARTER)[:1]
    return {"state": found[0]["state"], "error": found[0]["error"]} if found else {"state": "none", "error": None}


def routes(site: Site) -> list[Route]:
    """The shelf's routes and those of the starter model."""
    shelf = models_shelf(site)

    async def starting(request: Request) -> Response:
        await run_in_threadpool(start_starter, site)
        return json_reply({"ok": True}, 202)

    async def state(request: Request) -> Response:
        return json_reply(await run_in_threadpool(starter_state, site))

    return [
        Route("/api/models/starter", guarded("see", state)),
        Route("/api/models/starter", guarded("check", starting), methods=["POST"]),
        *shelf.routes(),
    ]
