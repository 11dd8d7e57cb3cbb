"""What the Data page asks for: the list of datasets with their reports, an upload, one row as the model sees it.

Foreign bytes are stored here and read by the worker only. Called by `ui/server.py` and `ui/pages/data.py`.
"""

from __future__ import annotations

import datetime
import os
import secrets
import shutil
import time
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

import profiles
from trainer.data.mapping import saved_columns
from trainer.files import make_private_dir
from trainer.jobs import JobHandle
from trainer.refusal import Refusal
from trainer.schema import HyperparamSettings
from trainer.workspace import DATA_SUFFIXES, DatasetInfo
from ui import data_versions
from ui.guard import MAX_UPLOAD_BYTES, UPLOAD_PATH, guarded
from ui.numbers import count, disk
from ui.replies import json_reply
from ui.report import data_view
from ui.shelf import Check, Item, Shelf, text_of
from ui.site import Site

SUFFIXES = DATA_SUFFIXES
SAID = ".jsonl, .json, .csv, .tsv, .parquet or .txt, packed by gzip or not"
CHECK_LIMIT_S = 3600.0
ROW_LIMIT_S = 30.0
TOKENS_SHOWN = 4000
SPARE_BYTES = 500 * 10**6
CHUNK_BYTES = 2**20
LEFT_OVER_S = 24 * 3600


def data_shelf(site: Site) -> Shelf:
    """The datasets of the workspace and of its data roots."""

    def items() -> list[Item]:
        return [_item(info) for info in site.workspace.datasets()]

    def check(item: Item, options: dict[str, Any]) -> Check:
        request = check_request(site, options)
        tokens = tokens_request(item, request) if options.get("exact") is True and request.get("model_path") else None

        def work(handle: JobHandle) -> dict[str, Any]:
            if tokens is not None:  # every row as training would have it: the doctor finds its lengths there
                site.worker.call(
                    "tokenise", timeout_s=CHECK_LIMIT_S, on_progress=handle.progress, cancelled=handle.cancelled,
                    request=tokens, root=str(site.workspace.tokens),
                )  # fmt: skip
            report = site.worker.call(
                "check_data", timeout_s=CHECK_LIMIT_S, on_progress=handle.progress, cancelled=handle.cancelled,
                path=str(item.path), **request,
            )  # fmt: skip
            site.workspace.note_rows(item.id, report["rows"])
            return report

        return work

    return Shelf(site, "data", items, check, data_view)


def _item(info: DatasetInfo) -> Item:
    stat = info.path.stat()
    cells = (count(info.rows), disk(info.bytes))
    stamp = [stat.st_size, stat.st_mtime_ns, *saved_columns(info.path)]  # another mapping makes other rows
    return Item(info.id, info.name, info.path, cells, stamp)


def check_request(site: Site, options: dict[str, Any]) -> dict[str, Any]:
    """The doctor's options out of a request: with a model it also measures lengths in that model's tokens."""
    model, held_out = text_of(options, "model"), text_of(options, "held_out")
    compared: dict[str, Any] = {}
    if held_out:
        other = site.workspace.dataset(held_out)  # by its id alone: a path out of a request opens nothing
        if other is None:
            raise Refusal("That data to compare with is no longer there. Reload the page.")
        compared["held_out"] = str(other.path)
    if not model:
        return compared
    longest = options.get("max_length", HyperparamSettings().max_length)
    if not isinstance(longest, int) or isinstance(longest, bool) or not 8 <= longest <= 1_048_576:
        raise Refusal("The maximum length must be a whole number from 8 to 1,048,576.", "hyperparams.max_length")
    return {
        "model_path": str(site.workspace.find_model(model)), "max_length": longest, "caches": str(site.workspace.tokens),
        **compared, **_profile(site, options),
    }  # fmt: skip


def tokens_request(item: Item, request: dict[str, Any]) -> dict[str, Any]:
    """What the token cache of one file is asked for with, so that it is the one that the doctor's `request` looks for."""
    keys = ("model_path", "profile", "profiles_root", "system_prompt", "date", "max_length")
    return {"files": [str(item.path)], "too_long": "cut", **{key: request[key] for key in keys}}


def _profile(site: Site, options: dict[str, Any]) -> dict[str, Any]:
    name = text_of(options, "profile") or None
    if name is not None and name not in profiles.names(site.workspace.profiles):
        raise Refusal("There is no profile of that name.", "profile.name")
    date = datetime.date.today().isoformat()
    return {"profile": name, "profiles_root": str(site.workspace.profiles), "system_prompt": "", "date": date}


def row_of(site: Site, item: Item, query: dict[str, Any]) -> dict[str, Any]:
    """Row `row` (from 1) of a dataset as tokens of a model under a profile; a problem of the row is in "problem"."""
    number = text_of(query, "row", 12)
    row = int(number) if number.isdigit() and int(number) > 0 else 1
    view = site.worker.call(
        "view_row", timeout_s=ROW_LIMIT_S, path=str(item.path), row=row - 1, too_long="cut",
        model_path=str(site.workspace.find_model(text_of(query, "model"))),
        max_length=HyperparamSettings().max_length, **_profile(site, query),
    )  # fmt: skip
    return {
        "row": row,
        "rows": view["rows"],
        "line": view["line"],
        "tokens": [[token["text"], token["kind"]] for token in view["tokens"][:TOKENS_SHOWN]],
        "counts": view["counts"],
        "note": view["note"],
        "problem": view["problem"]["message"] if view["problem"] else "",
        "before": view["before"],
        "after": view["after"],
    }


async def receive(site: Site, request: Request) -> DatasetInfo:
    """Store the body of an upload as a dataset; a broken or refused one leaves nothing behind."""
    name = request.query_params.get("name", "")[:300]
    declared = request.headers.get("content-length", "")
    _check_upload(site, name, int(declared) if declared.isdigit() else 0)
    folder = make_private_dir(site.workspace.uploads)
    await run_in_threadpool(_sweep, folder)
    partial = folder / f"{secrets.token_hex(8)}.part"
    try:
        await _store(request, partial)
        return await run_in_threadpool(site.workspace.add_dataset, partial, name)
    finally:
        partial.unlink(missing_ok=True)


def _check_upload(site: Site, name: str, size: int) -> None:
    if not name.lower().endswith(SUFFIXES):
        raise Refusal(
            "Data comes as JSON Lines, JSON, CSV, TSV or Parquet, or as a plain text in a .txt file; all but Parquet may be "
            f"packed by gzip. The name ends in {', '.join(SUFFIXES[:7])} or in .gz behind one of them. Nothing was stored."
        )
    if not size:
        raise Refusal("The file is empty. Nothing was stored.")
    free = shutil.disk_usage(site.workspace.root).free
    if free < 2 * size + SPARE_BYTES:  # the upload and its stored copy lie side by side for a moment
        raise Refusal(
            f"Storing {disk(size)} needs {disk(2 * size + SPARE_BYTES)} of free disk for a moment; {disk(free)} is "
            "free. "
            "Nothing was stored. Free some, or put the file into a folder and name that with --data-root."
        )


async def _store(request: Request, partial: Path) -> None:
    """Write the body to `partial`; a client that leaves raises ClientDisconnect, a body over its limit ends here."""
    with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        waiting: list[bytes] = []
        async for chunk in request.stream():
            waiting.append(chunk)
            if sum(map(len, waiting)) >= CHUNK_BYTES or not chunk:
                await run_in_threadpool(file.write, b"".join(waiting))
                waiting.clear()
        file.write(b"".join(waiting))


def _sweep(folder: Path) -> None:
    """Remove what uploads of a server that was killed left behind."""
    for path in folder.glob("*.part"):
        if time.time() - path.stat().st_mtime > LEFT_OVER_S:
            path.unlink(missing_ok=True)


def routes(site: Site) -> list[Route]:
    """The shelf's routes, the upload and the row."""
    shelf = data_shelf(site)

    async def uploading(request: Request) -> Response:
        try:
            info = await receive(site, request)
        except ClientDisconnect:
            return json_reply({"error": "The upload broke off. Nothing was stored."}, 400)
        item = _item(info)
        await run_in_threadpool(shelf.start, item, {})
        return json_reply({"id": item.id, "name": item.name}, 201)

    async def row(request: Request) -> Response:
        item = await run_in_threadpool(shelf.item, request.path_params["id"])
        try:
            return json_reply(await run_in_threadpool(row_of, site, item, dict(request.query_params)))
        except Refusal as refusal:  # a model that cannot show it is an answer here, not a failed request
            return json_reply({"problem": refusal.message, "rows": None})

    async def choices(request: Request) -> Response:
        models = [path.name for path in site.workspace.models()]
        datasets = [{"id": info.id, "name": info.name} for info in await run_in_threadpool(site.workspace.datasets)]
        return json_reply({"models": models, "profiles": profiles.names(site.workspace.profiles), "datasets": datasets})

    return [
        Route(UPLOAD_PATH, guarded("upload", uploading), methods=["POST"]),
        Route("/api/data-choices", guarded("see", choices)),
        Route("/api/data/{id}/row", guarded("see_rows", row)),
        *data_versions.routes(site, shelf),
        *shelf.routes(),
    ]


def limits() -> dict[str, Any]:
    """What the page must know of uploads beforehand."""
    return {"bytes": MAX_UPLOAD_BYTES, "text": disk(MAX_UPLOAD_BYTES), "suffixes": [*SUFFIXES[:7], ".gz"], "said": SAID}
