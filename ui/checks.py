"""Checks of models and data for the gate: each is done once for the same files and settings, as a job.

Owns `cache/checks/KEY.json` of the workspace, which says which job holds the result; so results survive a restart
and all tabs share them. Called by `ui/facts.py` only.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trainer.files import make_private_dir, read_json, write_json
from trainer.jobs import JobHandle
from trainer.refusal import Refusal
from ui.site import Site

STALE_CLAIM_S = 10.0
RETRY_AFTER_S = 60.0


@dataclass(frozen=True)
class Check:
    """How one check stands: state "running", "done" or "failed"; progress 0 to 1 or None; the result or the reason.

    `judged` are the settings it was made with. `is_fault`: the check itself broke, so that nothing is known of what
    it looked at. `error_field`: the setting that a refusal is about. `last`: while this one runs, the last finished
    one of the same subject.
    """

    state: str
    progress: float | None = None
    result: Any = None
    error: str = ""
    is_fault: bool = False
    error_field: str = ""
    judged: dict[str, Any] = field(default_factory=dict)
    last: Check | None = None


@dataclass(frozen=True)
class Question:
    """What is asked: `subject` names what is looked at, `about` everything the answer depends on."""

    kind: str
    subject: str
    about: dict[str, Any]
    judged: dict[str, Any]


def check(site: Site, question: Question, work: Callable[[JobHandle], Any]) -> Check:
    """The answer to a question, or how far it is; starts the work when nobody has. Never waits.

    `work` runs as a job. A check that failed is tried again after a minute.
    """
    folder = make_private_dir(site.workspace.root / "cache" / "checks")
    path = folder / f"{_mark(question.kind, question.about)}.json"
    latest = folder / f"last-{_mark(question.kind, question.subject)}.json"
    known = _read(site, path)
    if known is None:
        if _claim(path):  # of two tabs that ask at once, one starts it
            job = site.jobs.start(question.kind, work)
            write_json(path, {"job": job, "started": time.time(), "judged": question.judged})
        known = Check("running")
    if known.state == "done" and _pointer(latest) != path.name:
        write_json(latest, {"check": path.name})
    if known.state == "running" and (name := _pointer(latest)):
        last = _read(site, folder / name)
        return replace(known, last=last if last and last.state == "done" else None)
    return known


def _mark(*parts: Any) -> str:
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _pointer(path: Path) -> str:
    try:
        return str(read_json(path)["check"])
    except (OSError, ValueError, KeyError):
        return ""


def _read(site: Site, path: Path) -> Check | None:
    """What is known already; None when the check must be started (again)."""
    try:
        note = read_json(path)
    except FileNotFoundError:
        return None
    except ValueError:  # claimed by another thread that has not written its job yet, or died before
        return Check("running") if time.time() - path.stat().st_mtime < STALE_CLAIM_S else _drop(path)
    try:
        job = site.jobs.read(note["job"])
    except Refusal:  # somebody cleared the jobs away
        return _drop(path)
    if job["state"] == "done":
        return Check("done", result=job["result"], judged=note["judged"])
    if job["state"] == "running":
        done, total = job["progress"] or (0, 0)
        return Check("running", progress=done / total if total else None)
    if time.time() - note["started"] > RETRY_AFTER_S or job["state"] != "failed":
        return _drop(path)
    return Check("failed", error=job["error"], is_fault=job["detail"] is not None, error_field=job["field"] or "")


def _drop(path: Path) -> None:
    path.unlink(missing_ok=True)


def _claim(path: Path) -> bool:
    """Whether this thread is the one that starts the check."""
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    except FileExistsError:
        return False
    return True


def stamp(path: Path) -> list[Any]:
    """What changes when a file does, or any file of a folder: names, sizes and times, without reading them."""
    if path.is_dir():
        return sorted([p.name, *stamp(p)] for p in path.iterdir() if p.is_file())
    try:
        stat = path.stat()
    except OSError:
        return []
    return [stat.st_size, stat.st_mtime_ns]
