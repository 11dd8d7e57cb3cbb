"""The lease of a device: whoever computes on it holds its lock, in this process or any other, and says who it is."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer import clock, locks
from trainer.refusal import Refusal
from trainer.run import RunDir, status


class Busy(Refusal):
    """The device is in use; the message names the holder, since when, and where it is known how long it still takes."""


@dataclass(frozen=True)
class Holder:
    """Who has the device: what for, since when, for which run."""

    kind: str
    owner: str
    since: float
    run_id: str
    name: str
    run_path: str = ""  # where the run is, in whichever workspace; never shown

    @property
    def sentence(self) -> str:
        """ "The run support-chats (started by lab-2) has the device since 14:02 (about 2 h left)." """
        what = {"train": "The run", "smoke": "The smoke test of", "try": "Trying"}.get(self.kind, self.kind)
        clock = time.strftime("%H:%M", time.localtime(self.since))
        left = self._left()
        return f"{what} {self.name or self.run_id} (started by {self.owner}) has the device since {clock}{left}."

    def _left(self) -> str:
        """How long it still takes, from the pace of the run; "" where that is not known."""
        try:
            left_s = status(RunDir(Path(self.run_path))).eta_s if self.run_path else None
        except (OSError, ValueError):  # no run directory any more, or not yet
            return ""
        if left_s is None:
            return ""
        minutes = max(1, round(left_s / 60))
        return f" (about {minutes} min left)" if minutes < 90 else f" (about {round(minutes / 60):,} h left)"


def acquire(
    device: str, *, kind: str, owner: str, run_id: str, name: str, run_path: Path | None = None
) -> locks.FileLock:
    """Take the device ("cpu" or "gpu-UUID"); raises Busy with the holder's name. `run_path`: where the run is, or will be."""
    lock = locks.FileLock(locks.device_lock_path(device))
    note = {
        "kind": kind,
        "owner": owner,
        "since": clock.now(),
        "run_id": run_id,
        "name": name,
        "run_path": str(run_path or ""),
        "pid": os.getpid(),
    }
    if not lock.acquire(note):
        found = holder(device)
        raise Busy(found.sentence if found else "Another program has the device. Try again in a moment.")
    return lock


def holder(device: str) -> Holder | None:
    """Who holds the device now, None when it is free."""
    note: dict[str, Any] | None = locks.holder(locks.device_lock_path(device))
    if note is None:
        return None
    return Holder(
        str(note.get("kind", "train")),
        str(note.get("owner", "another program")),
        float(note.get("since", clock.now())),
        str(note.get("run_id", "")),
        str(note.get("name", "")),
        str(note.get("run_path", "")),
    )
