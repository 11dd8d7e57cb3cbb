"""What the Models page asks for about downloads: begin, cancel, how it stands, and what was begun and not finished.

One download at a time, as a job that every tab reads. The work is `trainer.hub`'s. Called by `ui/server.py`.
"""

from __future__ import annotations

import threading
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from trainer import hub
from trainer.disk_need import file_size
from trainer.hub_names import ModelId
from trainer.jobs import JobHandle
from trainer.refusal import Refusal
from ui.guard import guarded
from ui.replies import json_reply
from ui.shelf import json_object, text_of
from ui.site import Site

DOWNLOAD = "download"


def start_download(site: Site, model: ModelId) -> None:
    """Begin or go on with a download; joins one of the same model, Refusal while another one is on its way."""
    running = _newest(site)
    if running is not None and running["state"] == "running":
        if running.get("model") == str(model):
            return
        raise Refusal(f"{running.get('model', 'Another model')} is being downloaded. Wait for it, or cancel it first.")

    def work(handle: JobHandle) -> dict[str, Any]:
        handle.write(True, model=str(model), text=f"Asking for {model}.")

        def tell(done: int, total: int) -> None:
            handle.progress(done, total, f"{model}: {file_size(done)} of {file_size(total)}")

        folder = hub.download(site.workspace.models_dir, model, on_progress=tell, cancelled=handle.cancelled)
        return {"folder": folder.name}

    site.jobs.start(DOWNLOAD, work)


def _newest(site: Site) -> dict[str, Any] | None:
    # by their start: ids of jobs of one second are in no order
    return max(site.jobs.recent(DOWNLOAD), key=lambda job: job["started"], default=None)


def standing(site: Site) -> dict[str, Any]:
    """How the newest download stands, and those that could be resumed; sizes are in bytes, and in words for the page."""
    job = _newest(site) or {"id": "", "state": "none", "progress": None, "text": "", "error": None, "result": None}
    done, total = job["progress"] or (0, 0)
    left = [
        {
            "id": str(entry.model),
            "text": f"{file_size(entry.done_bytes)}"
            + (f" of {file_size(entry.total_bytes)}" if entry.total_bytes is not None else "")
            + " have arrived",
        }
        for entry in hub.unfinished(site.workspace.models_dir)
    ]
    return {
        "job": job["id"], "state": job["state"], "model": job.get("model", ""), "done": done, "total": total,
        "text": job["text"], "error": job["error"], "folder": (job["result"] or {}).get("folder"), "left": left,
    }  # fmt: skip


def routes(site: Site) -> list[Route]:
    """`GET api/hub`, and POSTs `download`, `cancel`, `discard` below it."""
    turn = threading.Lock()

    def begin(model: ModelId) -> None:
        with turn:
            start_download(site, model)

    def leave() -> None:
        job = _newest(site)
        if job is not None:
            site.jobs.cancel(job["id"])

    async def reading(request: Request) -> Response:
        return json_reply(await run_in_threadpool(standing, site))

    async def downloading(request: Request) -> Response:
        model = ModelId.parse(text_of(await json_object(request), "id", 300))
        await run_in_threadpool(begin, model)
        return json_reply({"ok": True}, 202)

    async def cancelling(request: Request) -> Response:
        await run_in_threadpool(leave)
        return json_reply({"ok": True}, 202)

    async def discarding(request: Request) -> Response:
        model = ModelId.parse(text_of(await json_object(request), "id", 300))
        await run_in_threadpool(hub.discard, site.workspace.models_dir, model)
        return json_reply({"ok": True})

    return [
        Route("/api/hub", guarded("see", reading)),
        Route("/api/hub/download", guarded("download", downloading), methods=["POST"]),
        Route("/api/hub/cancel", guarded("download", cancelling), methods=["POST"]),
        Route("/api/hub/discard", guarded("delete", discarding), methods=["POST"]),
    ]
