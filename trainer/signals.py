"""What was asked of a live run: a thread reads control/ ten times a second and answers at once, whatever the trainer does."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
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
    hurry: threading.Event = field(default_factory=threading.Event)
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
        """Whether to leave even a step half done: asked for, or the process has to end before the step would."""
        return self.wish.end == "stop-now" or self.hurry.is_set()


HURRY_S = 4.0
"""So long after a signal the step under way may take; then it is dropped, and the step before it is saved."""
GIVE_UP_S = 8.5
"""So long after a signal a run may take in all; then the process ends, and the last good checkpoint stands."""


class Deadline:
    """Holds an end that a signal asked for to its time, on a thread of its own: hurry, then `give_up()`.

    `told` may be called by a signal handler; it takes no lock that the main thread could hold.
    """

    def __init__(self, signals: Signals, give_up: Callable[[], None]) -> None:
        self._signals, self._give_up = signals, give_up
        self._told_s: float | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="deadline", daemon=True)
        self._thread.start()

    def told(self, by: str) -> None:
        """The process was told to end, by a signal."""
        self._signals.ask("stop", by)
        self._told_s = self._told_s or time.monotonic()

    @property
    def was_told(self) -> bool:
        """Whether a signal came."""
        return self._told_s is not None

    def close(self) -> None:
        """The run is through: nothing is to be hurried any more."""
        self._ended.set()
        self._thread.join()

    def _loop(self) -> None:
        while not self._ended.wait(0.1):
            passed_s = time.monotonic() - self._told_s if self._told_s is not None else 0.0
            if passed_s > HURRY_S:
                self._signals.hurry.set()
            if passed_s > GIVE_UP_S:
                self._give_up()
                return


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
                self._look()
            except OSError:  # a full disk or a removed folder: the next look may work, and stop must go on working
                continue

    def _look(self) -> None:
        for order in control.take(self._folder):
            self._answer(order)

    def _answer(self, order: control.Order) -> None:
        if order.command in ("stop", "pause", "stop-now"):
            if self._signals.ask(order.command, order.by):  # type: ignore[arg-type]
                kind = "pausing" if order.command == "pause" else "stopping"
                self._events.append(kind, by=order.by, now=order.command == "stop-now")
        elif order.command == "checkpoint":
            self._signals.saved_by = order.by
            self._signals.save_asked.set()
            self._events.append("log", text=f"Checkpoint asked by {order.by}: saved after this step.")
