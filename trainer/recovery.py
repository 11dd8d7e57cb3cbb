"""Runs that nobody trains any more though they have not ended: why, whether they go on by themselves, and leaving them.

A server that comes up calls `recover`; the page and the command line call `settle`. What is written here is written under
the run's own lock, so that no trainer can take the run up meanwhile. Torch-free.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer import checkpoint, locks
from trainer.ends import End, boot_id
from trainer.events import EventLog, all_events
from trainer.files import read_json
from trainer.refusal import Refusal
from trainer.run import RunDir, Status, status
from trainer.states import LIFECYCLE, Settling, allowed, derive

MOST_RESUMES = 3
"""A run goes on by itself at most this often in a row, whatever its settings say."""
SHUTDOWN = "shutdown of the machine or service"
"""Who stopped a run that ended on SIGTERM; after a restart of the machine such a run may go on by itself."""


@dataclass(frozen=True)
class Past:
    """What a run's events say of its last life."""

    last: dict[str, Any]  # the last lifecycle event; empty for a run that never began
    explained: bool  # a cause was written since the last life began


def past_of(run: RunDir) -> Past:
    """Read the run's events."""
    last: dict[str, Any] = {}
    explained = False
    for event in all_events(run.events):
        kind = event["kind"]
        if kind in LIFECYCLE:
            last = event
        if kind in ("started", "resumed"):
            explained = False
        elif kind == "cut_off":
            explained = True
    return Past(last, explained)


def recover(runs: list[RunDir], ends: list[End], resume: Callable[[RunDir], None]) -> list[RunDir]:
    """Say of each run that was cut off why, and let the newest that may go on do so; returns those newly explained.

    One device, one run: the others stay as they are. A run that cannot go on gets an alert with the reason. Whatever
    cannot be written is left for the next start.
    """
    cut, waiting = [], []
    for run in runs:
        try:
            now = status(run)
            if now.state == "interrupted" and _explain(run, ends):
                cut.append(run)
            if _may_go_on(run, now):
                waiting.append((now.last_sign or 0.0, run.run_id, run))
        except (OSError, ValueError):  # a run whose files cannot be read or written must not keep the others waiting
            continue
    if waiting:
        newest = max(waiting)[2]
        try:
            resume(newest)
        except Refusal as refusal:
            _alert(newest, f"This run could not go on by itself: {refusal.message}")
    return cut


def _may_go_on(run: RunDir, now: Status) -> bool:
    """Whether the run's settings let it go on by itself after the way it ended."""
    limit = min(now.resumes_allowed, MOST_RESUMES)
    if limit == 0 or now.state not in ("interrupted", "failed", "stopped") or now.resumed_itself >= limit:
        return False
    past = past_of(run)
    by_restart = now.state == "failed" and bool(past.last.get("restart"))
    by_shutdown = now.state == "stopped" and past.last.get("boot", boot_id()) != boot_id()
    return (now.state == "interrupted" or by_restart or by_shutdown) and _processes(run) == 1


def _processes(run: RunDir) -> int:
    """How many processes trained the run: one of torchrun's cannot be taken up by a server alone."""
    for _, folder in checkpoint.listed(run.checkpoints):
        try:
            return int(read_json(folder / checkpoint.STATE)["facts"].get("processes", 1))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return 1


def cause_of(note: dict[str, Any], ends: list[End]) -> str:
    """Why the process that held a run's lock ended, from its note there and the ends that are known; "" for unknown."""
    boot = note.get("boot", "")
    for end in reversed(ends):
        if end.pid == note.get("pid") and end.boot == boot:
            return end.sentence
    return "the machine was restarted or lost its power" if boot and boot != boot_id() else ""


def _explain(run: RunDir, ends: list[End]) -> bool:
    """Write why the run was cut off, once for each life; False where that was done before."""
    note = locks.last_note(run.lock)
    with _taken(run, "explain"):
        past = past_of(run)
        if past.explained or derive(False, past.last.get("kind")) != "interrupted":
            return False
        _write(run, "cut_off", cause=cause_of(note, ends))
    return True


def settle(run: RunDir, command: Settling, by: str) -> None:
    """Leave a run that was cut off, or end a paused one: it is stopped at its last good step. Refusal in other states.

    Nothing is deleted; a stopped run can still be resumed.
    """
    with _taken(run, command):
        past = past_of(run)
        state = derive(False, past.last.get("kind"))
        if command not in allowed(state):
            raise Refusal(f"This run is {state}: there is nothing to {command}. Nothing was changed.")
        saved = next((step for step, folder in checkpoint.listed(run.checkpoints) if _is_sealed(folder)), None)
        _write(run, "stopped", step=saved or 0, by=by, saved_step=saved, command=command)


def _is_sealed(folder: Path) -> bool:
    return (folder / checkpoint.MANIFEST).is_file()


def _alert(run: RunDir, text: str) -> None:
    try:
        with _taken(run, "explain"):
            _write(run, "alert", code="resume", text=text)
    except (Refusal, OSError):
        pass  # somebody trains it now, or the disk is full: the state says so


@contextmanager
def _taken(run: RunDir, kind: str) -> Iterator[None]:
    """The run's lock, for a moment; its note says that this is no trainer, and keeps who the last one was."""
    note = locks.last_note(run.lock)
    lock = locks.FileLock(run.lock)
    if not lock.acquire({**note, "kind": kind}, retry_s=0.3):
        raise Refusal("This run is being trained, so it can be stopped, but not left. Nothing was changed.")
    try:
        yield
    finally:
        lock.release()


def _write(run: RunDir, kind: str, **fields: Any) -> None:
    try:
        log = EventLog(run.events)
    except OSError as error:
        raise Refusal(f"The run's folder cannot be written: {error.strerror or error}. Nothing was changed.") from None
    try:
        log.append(kind, **fields)
    except OSError as error:
        raise Refusal(f"The run's folder cannot be written: {error.strerror or error}. Nothing was changed.") from None
    finally:
        log.close()


def trainer_note() -> dict[str, Any]:
    """What a trainer writes into its run's lock, so that a later server can find how it ended."""
    return {"kind": "train", "pid": os.getpid(), "boot": boot_id(), "since": time.time()}
