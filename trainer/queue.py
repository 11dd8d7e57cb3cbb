"""The queue of a workspace: which runs are to be trained next, in queue.json; the engine of its server takes the first.

An entry is a run directory: one that was never started, or one to go on with. Kept by every change in one atomic rename
under a file lock, so that a page, a command line and a server that restarts see the same. Torch-free.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from trainer.files import read_json, write_json
from trainer.locks import changing
from trainer.refusal import Refusal

MOST = 200


@dataclass(frozen=True)
class Waiting:
    """One entry: the run, who put it there, and when (seconds since 1970)."""

    run_id: str
    by: str
    added: float


@dataclass(frozen=True)
class Waitings:
    """The whole queue as it is now: entries in order, who holds it back ("" when it goes on by itself), and the paused run
    for whose sake it does ("" where somebody held it by hand)."""

    entries: tuple[Waiting, ...] = ()
    held_by: str = ""
    held_for: str = ""

    def place(self, run_id: str) -> int | None:
        """Where a run stands, 0 for the next; None when it does not wait."""
        return next((at for at, entry in enumerate(self.entries) if entry.run_id == run_id), None)


class Queue:
    """Reads and changes `path` (queue.json); safe to use from any thread and process."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> Waitings:
        """The queue now. A file that cannot be read is refused in words, never taken for an empty queue."""
        try:
            raw = read_json(self.path)
            entries = tuple(
                Waiting(str(entry["run_id"]), str(entry["by"]), float(entry["added"])) for entry in raw["entries"]
            )
            return Waitings(entries, str(raw["held_by"]), str(raw.get("held_for", "")))
        except FileNotFoundError:
            return Waitings()
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise Refusal(
                f"{self.path.name} of the workspace cannot be read ({getattr(error, 'strerror', None) or error}). "
                "Move it away to start the queue anew."
            ) from None

    def add(self, run_id: str, by: str) -> int:
        """Put a run at the end; returns its place from 1. Refusal when it waits already, or the queue is full."""
        with self._change() as (now, entries):
            if now.place(run_id) is not None:
                raise Refusal("This run is in the queue already.")
            if len(entries) >= MOST:
                raise Refusal(f"The queue holds {MOST} runs, which is all it takes. Remove one first.")
            entries.append(Waiting(run_id, by, time.time()))
            return len(entries)

    def move(self, run_id: str, place: int) -> None:
        """Put a run at `place` (0: next), the others keeping their order; Refusal when it does not wait."""
        with self._change() as (now, entries):
            at = now.place(run_id)
            if at is None:
                raise Refusal("This run is no longer in the queue.")
            entries.insert(max(0, min(place, len(entries) - 1)), entries.pop(at))

    def remove(self, run_id: str) -> bool:
        """Take a run out; False when it did not wait."""
        with self._change() as (now, entries):
            at = now.place(run_id)
            if at is not None:
                entries.pop(at)
            return at is not None

    def hold(self, by: str, paused_run: str = "") -> None:
        """Start nothing by itself until `release`; `by` says who wished it, `paused_run` for which run's sake."""
        with changing(self.path, "The queue"):
            now = self.read()
            if not (paused_run and now.held_by):  # a hold by hand outlives the pause of a run
                self._write(Waitings(now.entries, by or "somebody", paused_run))

    def release(self, resumed_run: str | None = None) -> None:
        """Go on by itself; with `resumed_run` only where the queue was held for the pause of that run."""
        with changing(self.path, "The queue"):
            now = self.read()
            if now.held_by and resumed_run in (None, now.held_for):
                self._write(Waitings(now.entries))

    @contextlib.contextmanager
    def _change(self) -> Iterator[tuple[Waitings, list[Waiting]]]:
        with changing(self.path, "The queue"):
            now = self.read()
            entries = list(now.entries)
            yield now, entries
            if tuple(entries) != now.entries:
                self._write(replace(now, entries=tuple(entries)))

    def _write(self, waitings: Waitings) -> None:
        content = asdict(waitings)
        try:
            write_json(self.path, content)
        except OSError as error:
            raise Refusal(f"The queue cannot be written: {error.strerror or error}. Nothing was changed.") from None
