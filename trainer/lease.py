"""The lease of a device: whoever computes on it holds its lock, in this process or any other, and says who it is."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any

from trainer import clock, locks
from trainer.refusal import Refusal


class Busy(Refusal):
    """The device is in use; the message names the holder and since when."""


@dataclass(frozen=True)
class Holder:
    """Who has the device: what for, since when, for which run."""

    kind: str
    owner: str
    since: float
    run_id: str
    name: str

    @property
    def sentence(self) -> str:
        """ "The run support-chats (started by lab-2) has the device since 14:02." """
        what = {"train": "The run", "smoke": "The smoke test of", "try": "Trying"}.get(self.kind, self.kind)
        clock = time.strftime("%H:%M", time.localtime(self.since))
        return f"{what} {self.name or self.run_id} (started by {self.owner}) has the device since {clock}."


def acquire(device: str, *, kind: str, owner: str, run_id: str, name: str) -> locks.FileLock:
    """Take the device ("cpu" or "gpu-UUID"); raises Busy with the holder's name."""
    lock = locks.FileLock(locks.device_lock_path(device))
    note = {
        "kind": kind,
        "owner": owner,
        "since": clock.now(),
        "run_id": run_id,
        "name": name,
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
    )
