"""What was asked of a live run: a thread reads control/ ten times a second and answers at once, whatever the trainer does."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from trainer import control
from trainer.events import EventLog

End = Literal["stop", "pause", "stop-now"]


@dataclass
class Wish:
    """The end that was asked for, and by whom."""

    end: End | None = None
    by: str = ""


@dataclass
class Signals:
    """Flags the training thread looks at. `interrupt()` is for phases that should end soon; training itself ends at a step."""

    wish: Wish = field(default_factory=Wish)
    save_asked: threading.Event = field(default_factory=threading.Event)
    saved_by: str = ""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def ask(self, end: End, by: str) -> bool:
        """Ask for an end; a stronger wish (stop-now) replaces a weaker one. Returns whether anything changed."""
        order = {None: 0, "pause": 1, "stop": 1, "stop-now": 2}
        with self._lock:
            if order[end] <= order[self.wish.end]:
                return False
            self.wish = Wish(end, by)
            return True

    def interrupt(self) -> bool:
        """Whether to leave a phase that can be left (loading, tokenising, held-out, samples)."""
        return self.wish.end is not None

    def now(self) -> bool:
        """Whether to leave even a step half done."""
        return self.wish.end == "stop-now"


class ControlWatch:
    """Reads the run's control folder and acknowledges each command as an event, within a tenth of a second."""

    def __init__(self, folder: Path, events: EventLog, signals: Signals) -> None:
        self._folder, self._events, self._signals = folder, events, signals
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="control", daemon=True)

    def start(self) -> None:
        """Begin reading, with what was dropped since the run's lock was taken."""
        self._thread.start()

    def stop(self) -> None:
        """End reading."""
        self._ended.set()
        self._thread.join()

    def _loop(self) -> None:
        while not self._ended.wait(0.1):
            try:
                for order in control.take(self._folder):
                    self._answer(order)
            except OSError:  # a full disk or a removed folder: the next look may work, and stop must go on working
                continue

    def _answer(self, order: control.Order) -> None:
        if order.command in ("stop", "pause", "stop-now"):
            if self._signals.ask(order.command, order.by):  # type: ignore[arg-type]
                kind = "pausing" if order.command == "pause" else "stopping"
                self._events.append(kind, by=order.by, now=order.command == "stop-now")
        elif order.command == "checkpoint":
            self._signals.saved_by = order.by
            self._signals.save_asked.set()
            self._events.append("log", text=f"Checkpoint asked by {order.by}: saved after this step.")
