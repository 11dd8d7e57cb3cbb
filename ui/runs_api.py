"""The routes of finished things: the list of runs, one run's settings, checkpoints, rows and notes, and its deletion.

Read by `assets/runs.js` and by the tabs under the live board. Rows of ended runs are read once and kept.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from trainer import checkpoint, locks, metrics
from trainer.events import wire
from trainer.fields import PATH_FIELDS, fields
from trainer.files import read_json, write_json
from trainer.notify import forget_webhook
from trainer.refusal import Refusal
from trainer.run import RunDir, status
from trainer.run_delete import delete_run, disk_bytes, name_to_type
from trainer.workspace import Workspace
from ui.guard import Caller, caller_of, guarded
from ui.queue_api import queue_state
from ui.replies import find_run, json_body, json_reply, no_run
from ui.run_rows import rows_of_step, text_of_row
from ui.site import Site

NAME_CHARACTERS = 80
WHY_CHARACTERS = 500
"""Longest name and purpose that the page stores."""


class RunsApi:
    """Answers the Runs page and the tabs of one run."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._lock = threading.Lock()
        self._rows: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def routes(self) -> list[Route]:
        """The routes, each with the action its caller must be allowed."""
        run = "/api/runs/{run_id}"
        return [
            Route("/api/runs", guarded("see", self.list)),
            Route(run + "/settings", guarded("see", self.settings)),
            Route(run + "/checkpoints", guarded("see", self.checkpoints)),
            Route(run + "/verify", guarded("check", self.verify), methods=["POST"]),
            Route(run + "/promote", guarded("promote", self.promote), methods=["POST"]),
            Route("/api/current/roll-back", guarded("roll_back", self.roll_back), methods=["POST"]),
            Route(run + "/rows", guarded("see_rows", self.rows)),
            Route(run + "/row", guarded("see_rows", self.row)),
            Route(run + "/notes", guarded("note", self.notes), methods=["POST"]),
            Route(run + "/delete", guarded("delete", self.delete), methods=["POST"]),
        ]

    async def list(self, request: Request) -> Response:
        """`GET api/runs?h=H`: one object a run, newest first; without them when `H` says that they are known."""
        caller = caller_of(request)
        rows = await run_in_threadpool(lambda: [self._row(run) for run in self._site.workspace.list_runs()])
        may = {action: caller.may(action) for action in ("delete", "resume", "note", "queue")}
        answer = {"runs": rows, "may": may, "queue": await run_in_threadpool(queue_state, self._site)}
        mark = hashlib.blake2s(json.dumps(answer).encode(), digest_size=6).hexdigest()
        known = request.query_params.get("h") == mark
        return json_reply({"h": mark} if known else {"h": mark} | answer)

    def _row(self, run: RunDir) -> dict[str, Any]:
        held = locks.is_held(run.lock)
        stamp = (
            held,
            *(path.stat().st_mtime_ns if path.exists() else 0 for path in (run.events, run.metrics, run.notes)),
        )
        with self._lock:
            kept = self._rows.get(run.run_id)
        if kept is not None and kept[0] == stamp:
            return kept[1]
        row = _describe(run)
        with self._lock:
            self._rows[run.run_id] = stamp, row
        return row

    async def settings(self, request: Request) -> Response:
        """`GET api/runs/ID/settings`: what the run was started with, by group, in the form's words."""
        run = find_run(self._site.workspace, request)
        if run is None:
            return no_run(request)
        return json_reply(await run_in_threadpool(_settings, run, caller_of(request)))

    async def checkpoints(self, request: Request) -> Response:
        """`GET api/runs/ID/checkpoints`: those on disk with a manifest, newest first."""
        run = find_run(self._site.workspace, request)
        if run is None:
            return no_run(request)
        return json_reply(await run_in_threadpool(_checkpoints, self._site.workspace, run, caller_of(request)))

    async def verify(self, request: Request) -> Response:
        """`POST api/runs/ID/verify {"step": N}`: reads every byte of it; no `problems` when it is whole."""
        run = find_run(self._site.workspace, request)
        if run is None:
            return no_run(request)
        step = (await json_body(request)).get("step")
        folder = dict(checkpoint.listed(run.checkpoints)).get(step) if type(step) is int else None
        if folder is None:
            raise Refusal("There is no checkpoint of that step.")
        return json_reply({"problems": await run_in_threadpool(checkpoint.verify, folder)})

    async def rows(self, request: Request) -> Response:
        """`GET api/runs/ID/rows?step=N`: the rows of that step with their own loss, see `ui.run_rows`."""
        run = find_run(self._site.workspace, request)
        if run is None:
            return no_run(request)
        step = _whole(request, "step")
        return json_reply(await run_in_threadpool(rows_of_step, self._site.workspace, run, step))

    async def row(self, request: Request) -> Response:
        """`GET api/runs/ID/row?row=N`: the text of one row as it is trained."""
        run = find_run(self._site.workspace, request)
        if run is None:
            return no_run(request)
        row = _whole(request, "row")
        return json_reply(await run_in_threadpool(text_of_row, self._site.workspace, self._site.worker, run, row))

    async def notes(self, request: Request) -> Response:
        """`POST api/runs/ID/notes {"name"?, "why"?, "seen"?}`: seen = numbers of alerts somebody has looked at."""
        run = find_run(self._site.workspace, request)
        if run is None:
            return no_run(request)
        change = await json_body(request)
        return json_reply(await run_in_threadpool(self._note, run, change))

    def _note(self, run: RunDir, change: dict[str, Any]) -> dict[str, Any]:
        with self._lock:  # two tabs that note at once must not undo each other
            notes = run.read_notes()
            for key, limit in (("name", NAME_CHARACTERS), ("why", WHY_CHARACTERS)):
                if key in change:
                    text = change[key]
                    if not isinstance(text, str) or len(text) > limit:
                        raise Refusal(f"The {key} must be text of at most {limit} characters.")
                    notes[key] = " ".join(text.split())
            if "seen" in change:
                numbers = change["seen"]
                if not isinstance(numbers, list) or len(numbers) > 1000 or not all(type(n) is int for n in numbers):
                    raise Refusal("seen must be a list of at most 1,000 event numbers.")
                notes["seen"] = sorted({*notes.get("seen", []), *numbers})
            write_json(run.notes, notes)
        return notes

    def _delete(self, run: RunDir, typed: str) -> int:
        current = self._site.workspace.current
        with current.standing(run.run_id):
            if current.is_of(run.run_id):
                raise Refusal("This run holds the current model. Make another one current first; nothing was deleted.")
            return delete_run(run, typed)

    async def promote(self, request: Request) -> Response:
        """`POST api/runs/ID/promote {"step": N}`: makes that checkpoint the current model, once every byte was read."""
        run = find_run(self._site.workspace, request)
        if run is None:
            return no_run(request)
        step = (await json_body(request)).get("step")
        if type(step) is not int:
            raise Refusal("Name the step.")
        by = caller_of(request).role
        await run_in_threadpool(self._site.workspace.current.promote, run, step, by)
        return json_reply({"ok": True})

    async def roll_back(self, request: Request) -> Response:
        """`POST api/current/roll-back`: the model that was current before is it again."""
        back = await run_in_threadpool(self._site.workspace.current.roll_back)
        return json_reply({"run_id": back.run_id, "step": back.step})

    async def delete(self, request: Request) -> Response:
        """`POST api/runs/ID/delete {"name": typed}`: the owner alone; 400 with the reason when refused."""
        run = find_run(self._site.workspace, request)
        if run is None:
            return no_run(request)
        typed = (await json_body(request)).get("name")
        if not isinstance(typed, str):
            raise Refusal("Type the run's name to delete it.")
        freed_bytes = await run_in_threadpool(self._delete, run, typed)
        await run_in_threadpool(self._site.workspace.queue.remove, run.run_id)
        await run_in_threadpool(forget_webhook, self._site.workspace.root, run.run_id)
        with self._lock:
            self._rows.pop(run.run_id, None)
        return json_reply({"freed_bytes": freed_bytes})


def _whole(request: Request, name: str) -> int:
    """A whole number out of the address; Refusal for anything else."""
    text = request.query_params.get(name, "")
    if not re.fullmatch(r"[0-9]{1,12}", text):
        raise Refusal(f"{name} must be a whole number.")
    return int(text)


def _describe(run: RunDir) -> dict[str, Any]:
    """One line of the table; a run whose files cannot be read is listed with the reason, never left out."""
    try:
        now, snapshot = status(run), run.snapshot()
    except ValueError as error:
        return {
            "run_id": run.run_id,
            "state": "failed",
            "name": run.run_id,
            "cause": f"Cannot be read: {error}",
            "allowed": [],
        }
    records = metrics.read_records(run.metrics)
    data = snapshot.get("data", {}).get("files", [])
    return wire(
        {
            "run_id": run.run_id,
            "state": now.state,
            "cause": now.cause,
            "name": now.name,
            "to_type": name_to_type(run),
            "why": now.why,
            "model": now.model_display_name,
            "data": [file["name"] for file in data],
            "profile": now.profile,
            "method": now.method,
            "rank": snapshot.get("config", {}).get("lora", {}).get("r"),
            "step": now.current_step,
            "total": now.total_steps,
            "loss": now.loss,
            "best": now.best_held_out,
            "best_step": now.best_step,
            "peak_gib": now.peak_gib,
            "seconds": float(records["elapsed_s"][-1]) if len(records) else None,
            "began": now.started_at or snapshot.get("created"),
            "ended": now.ended_at,
            "saved_step": now.last_checkpoint_step,
            "bytes": disk_bytes(run.path),
            "allowed": list(now.allowed),
        }
    )


def _settings(run: RunDir, caller: Caller) -> dict[str, Any]:
    snapshot = run.snapshot()
    config = snapshot.get("config", {})
    groups: dict[str, list[dict[str, Any]]] = {}
    for field in fields():
        value = config
        for part in field.key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is None and field.default is not None:
            continue
        is_path = field.key in PATH_FIELDS or field.kind == "files"
        shown = _without_folders(value) if is_path and not caller.may("paths") else value
        changed = value != field.default
        row = {
            "key": field.key,
            "title": field.title,
            "value": wire(shown),
            "unit": field.unit,
            "changed": changed,
        }
        groups.setdefault(field.group, []).append(row)
    facts = {key: value for key, value in snapshot.items() if isinstance(value, (str, int, float, bool))}
    if not caller.may("paths"):
        facts.pop("workspace", None)
    versions = snapshot.get("versions", {})
    return {
        "groups": groups,
        "facts": wire(facts),
        "versions": versions if isinstance(versions, dict) else {},
    }


def _without_folders(value: Any) -> Any:
    """Paths without the folders they lie in: where things are on this machine is the owner's business."""
    if isinstance(value, str) and ("/" in value or "\\" in value) and "\n" not in value:
        return value.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1]
    if isinstance(value, list):
        return [_without_folders(item) for item in value]
    if isinstance(value, dict):
        return {key: _without_folders(item) for key, item in value.items()}
    return value


def _checkpoints(workspace: Workspace, run: RunDir, caller: Caller) -> dict[str, Any]:
    now, history = status(run), workspace.current.history()
    current = history[0].step if history and history[0].run_id == run.run_id else None
    found: list[dict[str, Any]] = []
    for step, folder in checkpoint.listed(run.checkpoints):
        row: dict[str, Any] = {"folder": folder.name, "step": step, "whole": False}
        try:
            files = read_json(folder / checkpoint.MANIFEST)["files"].values()
            row |= {"bytes": sum(int(file["bytes"]) for file in files), "whole": True}
            row["written"] = (folder / checkpoint.MANIFEST).stat().st_mtime
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass  # cut off while it was written: listed as incomplete
        row["names"] = [
            word
            for word, at in (("best", now.best_step), ("last", now.last_checkpoint_step), ("current", current))
            if at == step
        ]
        found.append(row | ({"path": str(folder)} if caller.may("paths") else {}))
    before = {"name": history[1].run_id, "step": history[1].step} if current is not None and len(history) > 1 else None
    may = {"verify": caller.may("check"), "promote": caller.may("promote"), "roll_back": caller.may("roll_back")}
    return {"checkpoints": found, "method": now.method, "may": may, "before": before}
