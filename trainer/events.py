"""events.jsonl: the rare things of a run, one JSON object a line, numbered. One process writes, anyone reads by cursor."""

from __future__ import annotations

import json
import math
import os
import threading
from pathlib import Path
from typing import Any

from trainer import clock
from trainer.files import fsync_dir, write_whole

DURABLE = frozenset(
    {"started", "resumed", "paused", "stopped", "finished", "failed", "diverged", "checkpoint", "rewind", "bad_row"}
)


def wire(value: Any) -> Any:
    """Non-finite floats as the strings "nan", "inf", "-inf": JSON has no word for them and null would hide them."""
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    if isinstance(value, dict):
        return {key: wire(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [wire(item) for item in value]
    return value


class EventLog:
    """The one writer of an events file; its methods may be called from several threads of the trainer's process."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._torn = False
        new = not path.exists()
        self._file = open(path, "a+b", buffering=0)
        os.chmod(path, 0o600)
        if new:
            fsync_dir(path.parent)
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):  # the tail of a writer that was killed in the middle of a line
            self._file.truncate(whole)
        self._next = _last_number(content[:whole]) + 1

    def append(self, kind: str, **fields: Any) -> int:
        """Add one event and return its number; lifecycle and checkpoint events are on the disk when this returns.

        Raises OSError for those; any other event is dropped where the disk is full, and 0 is returned.
        """
        with self._lock:
            number = self._next
            record = {"n": number, "t": round(clock.now(), 3), "kind": kind, **wire(fields)}
            line = json.dumps(record, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n"
            content = line.encode("utf-8", "backslashreplace")
            try:
                # after a piece that could not be cut off, a line of its own
                write_whole(self._file.fileno(), b"\n" + content if self._torn else content)
                self._torn = False
            except OSError:
                self._torn = not self._ends_whole()
                if kind in DURABLE:
                    raise
                return 0  # a full disk costs a line of the log, not the run
            self._next += 1
            fd = self._file.fileno()
        if kind in DURABLE:
            os.fsync(fd)  # outside the lock: a slow disk must not hold up the answer to a stop
        return number

    def _ends_whole(self) -> bool:
        """Whether the file ends with a whole line; where the disk does not even tell, the next line starts afresh."""
        try:
            size = os.fstat(self._file.fileno()).st_size
            return size == 0 or os.pread(self._file.fileno(), 1, size - 1) == b"\n"
        except OSError:
            return False

    def close(self) -> None:
        """Close the file; later appends raise ValueError."""
        self._file.close()


def _last_number(content: bytes) -> int:
    """The highest number given so far. Lines that power loss filled with zeros count too, so that no number comes twice."""
    lines = content.splitlines()
    for line in reversed(lines):
        try:
            number = json.loads(line)["n"]
        except (ValueError, TypeError, KeyError):
            continue
        if type(number) is int:
            return max(number, len(lines))
    return len(lines)


def all_events(path: Path) -> list[dict[str, Any]]:
    """Every whole event of the file, however long it is."""
    events, cursor = read_events(path)
    while True:
        more, further = read_events(path, cursor)
        if further == cursor:
            return events
        events, cursor = events + more, further


def read_events(path: Path, since: int = 0, limit_bytes: int = 4 << 20) -> tuple[list[dict[str, Any]], int]:
    """Whole events from byte `since` on and the cursor for the next call.

    A torn last line waits for its rest; a line that is not JSON is passed over. `since` beyond the end reads nothing.
    """
    try:
        with open(path, "rb") as file:
            file.seek(since)
            content = file.read(limit_bytes)
    except FileNotFoundError:
        return [], 0
    whole = content.rfind(b"\n") + 1
    if whole == 0 and len(content) == limit_bytes:  # one line longer than the limit: read on to its end
        return read_events(path, since, 4 * limit_bytes)
    events = []
    for line in content[:whole].splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and "kind" in event:
            events.append(event)
    return events, since + whole
