"""Long work that is no run: downloads, checks, conversions. One folder each, readable by every tab and after a restart.

`jobs/ID/job.json` is written by the thread that works, `jobs/ID/cancel` dropped by whoever cancels, `jobs/ID/lock`
held while the thread lives: a job that says "running" without its lock was interrupted. Called by the page.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.files import child, fsync_dir, make_private_dir, read_json, write_json
from trainer.locks import FileLock, is_held
from trainer.refusal import Refusal

WRITE_EVERY_S = 0.5
RECENT = 50

Work = Callable[["JobHandle"], Any]


class JobHandle:
    """What the work is given: where to say how far it is, and whether it should leave."""

    def __init__(self, folder: Path, record: dict[str, Any]) -> None:
        self.id = folder.name
        self._folder = folder
        self._record = record
        self._written = 0.0
        self.write(force=True)

    def progress(self, done: float, total: float, text: str = "") -> None:
        """Say how far the work is; written at most twice a second."""
        self._record |= {"progress": [done, total], "text": text}
        self.write(force=False)

    def cancelled(self) -> bool:
        """Whether somebody asked this job to leave; work that is in pieces looks between them."""
        return (self._folder / "cancel").exists()

    def write(self, force: bool, **changes: Any) -> None:
        """Put the record on disk with `changes`, unless it was written a moment ago."""
        self._record |= changes
        now = time.monotonic()
        if force or now - self._written >= WRITE_EVERY_S:
            self._written = now
            write_json(self._folder / "job.json", self._record | {"updated": time.time()})


class Jobs:
    """All jobs in the folder `root`; keeps nothing in memory, so any process or tab may ask."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def start(self, kind: str, work: Work) -> str:
        """Run `work(handle)` on a thread and return the job's id at once.

        What it returns must be JSON and becomes "result"; a Refusal becomes "error", anything else it raises too,
        with the text for a report in "detail".
        """
        make_private_dir(self.root)
        job_id = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}"
        folder = self.root / job_id
        folder.mkdir(mode=0o700)
        lock = FileLock(folder / "lock")
        lock.acquire({"pid": os.getpid()})
        record = {
            "id": job_id, "kind": kind, "state": "running", "progress": None, "text": "", "result": None,
            "error": None, "field": None, "detail": None, "started": time.time(), "ended": None,
        }  # fmt: skip
        handle = JobHandle(folder, record)
        fsync_dir(self.root)
        threading.Thread(target=_run, args=(handle, work, lock), name=f"job-{kind}", daemon=True).start()
        return job_id

    def read(self, job_id: str) -> dict[str, Any]:
        """The record: id, kind, state (running, done, failed, cancelled, interrupted), progress [done, total] or None,
        text, result, error, field, detail, started, ended and updated in seconds since 1970. Raises Refusal."""
        folder = child(self.root, job_id)
        held = is_held(folder / "lock")  # before the record: a job that ends in between is then read as ended
        try:
            record = read_json(folder / "job.json")
        except (OSError, ValueError):
            raise Refusal(f"There is no job {job_id}.") from None
        if record["state"] == "running" and not held:
            error = "The server ended while this was going on. Nothing half-done is used. Start it again."
            return record | {"state": "interrupted", "error": error}
        return record

    def cancel(self, job_id: str) -> None:
        """Ask a job to leave; harmless when it has ended. Raises Refusal for an unknown one."""
        if self.read(job_id)["state"] == "running":
            (child(self.root, job_id) / "cancel").touch()

    def recent(self, kind: str | None = None) -> list[dict[str, Any]]:
        """The newest jobs first, at most 50, of one kind or of all."""
        if not self.root.is_dir():
            return []
        found: list[dict[str, Any]] = []
        for folder in sorted(self.root.iterdir(), reverse=True):
            if len(found) >= RECENT:
                break
            try:
                record = self.read(folder.name)
            except Refusal:
                continue  # a folder that is being made, or none of ours
            if kind is None or record["kind"] == kind:
                found.append(record)
        return found


def _run(handle: JobHandle, work: Work, lock: FileLock) -> None:
    try:
        try:
            result = work(handle)
            handle.write(True, state="done", result=result, ended=time.time())
        except Refusal as refusal:
            state = "cancelled" if handle.cancelled() else "failed"
            detail = getattr(refusal, "detail", None)
            handle.write(
                True, state=state, result=None, error=refusal.message, field=refusal.field, detail=detail,
                ended=time.time(),
            )  # fmt: skip
        except Exception as error:  # the edge of the thread: nobody else would hear of it
            said = f"This ended unexpectedly: {type(error).__name__}. Nothing half-done is used."
            detail = traceback.format_exc()
            handle.write(True, state="failed", result=None, error=said, detail=detail, ended=time.time())
    finally:
        lock.release()
