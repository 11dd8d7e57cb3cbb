"""What the Data page does to a dataset besides checking it: column mapping with preview, repaired copies, deletion.

The work on foreign bytes is the worker's; the repaired copy is made by a job. Called by `ui/data_api.py`.
"""

from __future__ import annotations

import secrets
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from trainer.data.mapping import Mapping
from trainer.datasets import (
    add_repaired,
    delete_dataset,
    manifest_of,
    rejects_of,
    save_columns,
    used_by,
    versions,
)
from trainer.files import make_private_dir
from trainer.jobs import JobHandle
from trainer.refusal import Refusal
from trainer.workspace import DatasetInfo
from ui.guard import caller_of, guarded
from ui.replies import json_reply
from ui.shelf import Shelf, json_object, text_of
from ui.site import Site

REPAIR_LIMIT_S = 3600.0
PREVIEW_LIMIT_S = 30.0
RUNS_NAMED = 5
COLUMNS_ALLOWED = 8
BASE = "/api/data/{id}"


def dataset(site: Site, item_id: str) -> DatasetInfo:
    """The dataset with this id; raises Refusal when it is gone."""
    info = site.workspace.dataset(item_id)
    if info is None:
        raise Refusal("That is no longer there. Reload the page.")
    return info


def about(site: Site, info: DatasetInfo) -> dict[str, Any]:
    """Where a dataset comes from, what was made of it, and which runs used it."""
    manifest = manifest_of(info)
    parent = site.workspace.dataset(str(manifest.get("repaired_from") or ""))
    uses = used_by(site.workspace, info)
    return {
        "name": info.name,
        "own": info.folder is not None,
        "columns": manifest.get("columns") or [],
        "summary": (manifest.get("repair") or {}).get("summary", ""),
        "examples": (manifest.get("repair") or {}).get("examples", []),
        "rejects": rejects_of(info) is not None,
        "parent": None if parent is None else {"id": parent.id, "name": parent.name},
        "versions": [{"id": each.id, "name": each.name} for each in versions(site.workspace, info)],
        "runs": len(uses),
        "run_names": [use.name for use in uses[:RUNS_NAMED]],
    }


def columns_of(options: dict[str, Any]) -> list[str]:
    """A column mapping out of a request; raises Refusal for what is none."""
    given = options.get("columns") or []
    if not isinstance(given, list) or len(given) > COLUMNS_ALLOWED or not all(isinstance(text, str) for text in given):
        raise Refusal("That is no column mapping.")
    mapping = Mapping.parse([text[:300] for text in given])
    return mapping.texts() if mapping is not None else []


def repair_work(site: Site, info: DatasetInfo) -> Any:
    """The job that makes a repaired copy and takes it in; its result is the new dataset's id, name and summary."""

    def work(handle: JobHandle) -> dict[str, Any]:
        folder = make_private_dir(site.workspace.uploads)
        name = f"{secrets.token_hex(8)}.part"
        copy, rejects = folder / name, folder / f"{name.removesuffix('.part')}-rejects.jsonl"
        try:
            result = site.worker.call(
                "repair_data", timeout_s=REPAIR_LIMIT_S, on_progress=handle.progress, cancelled=handle.cancelled,
                path=str(info.path), out=str(copy),
            )  # fmt: skip
            kept = {key: value for key, value in result.items() if key != "rejects"}
            made = add_repaired(site.workspace, info, copy, rejects, kept)
        finally:
            copy.unlink(missing_ok=True)
            rejects.unlink(missing_ok=True)
        return {"id": made.id, "name": made.name, "summary": kept["summary"]}

    return work


def routes(site: Site, shelf: Shelf) -> list[Route]:
    """Routes under api/data/ID: about, preview, columns, repair, rejects, delete; and api/data-jobs/JOB."""
    return [*_column_routes(site, shelf), *_repair_routes(site, shelf), *_keeping_routes(site)]


def _column_routes(site: Site, shelf: Shelf) -> list[Route]:
    async def previewing(request: Request) -> Response:
        info = await run_in_threadpool(dataset, site, request.path_params["id"])
        body = await json_object(request)
        try:
            columns = columns_of(body)
            answer = await run_in_threadpool(
                site.worker.call, "preview_columns", timeout_s=PREVIEW_LIMIT_S, path=str(info.path), columns=columns
            )
        except Refusal as refusal:  # half a mapping is what a person makes first: an answer, not a failed request
            answer = {"rows": [], "said": refusal.message}
        return json_reply(answer)

    async def saving(request: Request) -> Response:
        info = await run_in_threadpool(dataset, site, request.path_params["id"])
        columns = await run_in_threadpool(save_columns, info, columns_of(await json_object(request)))
        item = await run_in_threadpool(shelf.item, info.id)
        await run_in_threadpool(shelf.start, item, {})
        return json_reply({"columns": columns})

    return [
        Route(f"{BASE}/preview", guarded("check", previewing), methods=["POST"]),
        Route(f"{BASE}/columns", guarded("upload", saving), methods=["POST"]),
    ]


def _repair_routes(site: Site, shelf: Shelf) -> list[Route]:
    async def repairing(request: Request) -> Response:
        info = await run_in_threadpool(dataset, site, request.path_params["id"])
        job = await run_in_threadpool(site.jobs.start, "repair-data", repair_work(site, info))
        return json_reply({"job": job}, 202)

    async def job(request: Request) -> Response:
        found = await run_in_threadpool(site.jobs.read, request.path_params["job"])
        if found["kind"] != "repair-data":
            raise Refusal("There is no job of that name.")
        if found["state"] == "done":
            await run_in_threadpool(_check_new, found["result"]["id"])
        return json_reply({key: found[key] for key in ("state", "progress", "result", "error")})

    def _check_new(item_id: str) -> None:
        item = shelf.item(item_id)
        if shelf.standing(item).state == "not-run":
            shelf.start(item, {})

    return [
        Route(f"{BASE}/repair", guarded("upload", repairing), methods=["POST"]),
        Route("/api/data-jobs/{job}", guarded("see_rows", job)),
    ]


def _keeping_routes(site: Site) -> list[Route]:
    async def telling(request: Request) -> Response:
        info = await run_in_threadpool(dataset, site, request.path_params["id"])
        answer = await run_in_threadpool(about, site, info)
        return json_reply(answer | {"may_delete": caller_of(request).may("delete") and answer["own"]})

    async def rejects(request: Request) -> Response:
        info = await run_in_threadpool(dataset, site, request.path_params["id"])
        path = await run_in_threadpool(rejects_of, info)
        if path is None:
            raise Refusal("There are no left-out rows kept with this data.")
        name = f"{info.name.rpartition('.')[0]}-left-out.jsonl"
        return FileResponse(
            path, media_type="application/x-ndjson", filename=name, headers={"cache-control": "no-store"}
        )

    async def deleting(request: Request) -> Response:
        info = await run_in_threadpool(dataset, site, request.path_params["id"])
        typed = text_of(await json_object(request), "name", 200)
        uses = await run_in_threadpool(delete_dataset, site.workspace, info, typed)
        return json_reply({"deleted": info.name, "runs": len(uses)})

    return [
        Route(f"{BASE}/about", guarded("see_rows", telling)),
        Route(f"{BASE}/rejects", guarded("see_rows", rejects)),
        Route(f"{BASE}/delete", guarded("delete", deleting), methods=["POST"]),
    ]
