"""File locks that die with their process: one for each run, one for each device. Never `lockf`, whose lock a second
handle in the same process would free."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainer.refusal import Refusal

if sys.platform == "win32":  # weaker there: no shared probe, said in docs/platforms
    import msvcrt

    def _lock(fd: int, exclusive: bool) -> bool:
        try:
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
else:
    import fcntl

    def _lock(fd: int, exclusive: bool) -> bool:
        try:
            fcntl.flock(fd, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


class FileLock:
    """An exclusive lock on `path`, with a small JSON note in the file about who holds it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd: int | None = None

    def acquire(self, note: dict[str, Any], retry_s: float = 1.0) -> bool:
        """Take the lock or return False after `retry_s`; a reader's short probe is why a retry is needed."""
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        deadline = time.monotonic() + retry_s
        while not _lock(fd, exclusive=True):
            if time.monotonic() > deadline:
                os.close(fd)
                return False
            time.sleep(0.02)
        self._fd = fd
        try:
            os.ftruncate(fd, 0)
            os.pwrite(fd, json.dumps(note).encode(), 0)
        except OSError:
            pass  # a full disk: the lock holds all the same, only its note is missing
        return True

    def release(self) -> None:
        """Free the lock; harmless when it is not held."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


@contextmanager
def changing(path: Path, what: str) -> Iterator[None]:
    """Holds the lock beside the file `path` while it is changed; `what` names it at the start of the refusal's sentence."""
    lock = FileLock(path.with_suffix(".lock"))
    if not lock.acquire({"for": what}, retry_s=5.0):
        raise Refusal(f"{what} is being changed by another program. Try again in a moment.")
    try:
        yield
    finally:
        lock.release()


def is_held(path: Path) -> bool:
    """Whether some live process holds the lock on `path`."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        return not _lock(fd, exclusive=False)
    finally:
        os.close(fd)


def holder(path: Path) -> dict[str, Any] | None:
    """The note of the live holder, or None when the lock is free."""
    if not is_held(path):
        return None
    try:
        return json.loads(path.read_bytes() or b"{}")
    except (OSError, ValueError):
        return {}


def last_note(path: Path) -> dict[str, Any]:
    """The note of whoever holds the lock or held it last; empty where there is none."""
    try:
        note = json.loads(path.read_bytes() or b"{}")
    except (OSError, ValueError):
        return {}
    return note if isinstance(note, dict) else {}


def device_lock_path(device: str) -> Path:
    """Where the lock of a device lives: the user's runtime directory, so every workspace and program meets there.

    `device` is "cpu" or "gpu-" followed by the device's UUID.
    """
    uid = os.getuid() if hasattr(os, "getuid") else os.environ.get("USERNAME", "user")
    # a system service has no XDG_RUNTIME_DIR, a login has: both must come to the same folder
    runtime = os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{uid}"
    root = Path(runtime) if os.path.isdir(runtime) else Path(tempfile.gettempdir())
    folder = root / f"signalbox-{uid}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder / f"{device}.lock"
