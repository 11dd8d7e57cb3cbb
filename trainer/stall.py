"""The watch over a run that makes no step any more: a thread that sees the metrics file grow, or not.

It never touches the training; what it finds becomes an alert, and a message where the run has a webhook.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
import psutil

from trainer.events import EventLog
from trainer.metrics import RECORD, read_records
from trainer.notify import Message, stalled_message
from trainer.run import RunDir, Status, StatusReader
from trainer.telemetry import Telemetry

LEAST_S = 300.0
"""No run stands still before this time has passed without a step, however fast its steps are."""
TIMES = 10
"""Otherwise it stands still when this many of its usual steps would have fitted in."""
ASIDE_S = 1800.0
"""Held-out checks, samples and saves may take this long: they are no steps, but they are work."""
LOOK_S = 5.0
RECENT_STEPS = 50


def limit_s(phase: str | None, median_step_s: float) -> float:
    """How long `phase` may go on without a step before somebody is told; infinite while a run is being prepared."""
    if phase == "train":
        return max(TIMES * median_step_s, LEAST_S)
    return max(TIMES * median_step_s, ASIDE_S) if phase in ("eval", "sample", "save") else float("inf")


class StallWatch:
    """Watches one life of a run until `stop`; `tell` gets a message when it stands still."""

    def __init__(
        self,
        run: RunDir,
        events: EventLog,
        telemetry: Telemetry,
        tell: Callable[[Message], None],
        look_s: float = LOOK_S,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._events, self._telemetry, self._tell = events, telemetry, tell
        self._run, self._path = run, run.metrics
        # made at the first look, where a disk that does not answer costs no more than that look
        self._reader: StatusReader | None = None
        self._look_s, self._clock_s = look_s, clock_s
        self._count = 0
        self._since_s = clock_s()
        self._stalled = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="stall", daemon=True)

    def start(self) -> None:
        """Begin watching."""
        self._thread.start()

    def stop(self) -> None:
        """End watching; a look in progress is not waited for longer than a second."""
        self._ended.set()
        self._thread.join(1.0)

    def look(self) -> None:
        """Compare now with the last step; say once that the run stands still, and once that it goes on."""
        count, now_s = self._records(), self._clock_s()
        if self._reader is None:
            self._reader, self._count = StatusReader(self._run), count
        if count != self._count:
            if self._stalled:
                text = f"It goes on, after {_minutes(now_s - self._since_s)} without a step."
                self._events.append("log", text=text)
            self._count, self._since_s, self._stalled = count, now_s, False
            return
        status = self._reader.read()
        if status.state != "running":
            self._since_s = now_s
        quiet_s = now_s - self._since_s
        if self._stalled or quiet_s < limit_s(status.phase, self._median_step_s()):
            return
        self._stalled = True
        text = f"No step for {_minutes(quiet_s)}, in phase {status.phase}, after step {status.current_step:,}. {self._facts()}"
        self._events.append("alert", code="stalled", step=status.current_step, text=text)
        self._tell(stalled_message(status, f"{text} Safe: {_safe(status)}."))

    def _loop(self) -> None:
        while not self._ended.wait(self._look_s):
            try:
                self.look()
            except (OSError, ValueError):  # files that cannot be read just now, or events closed under our hands
                continue

    def _records(self) -> int:
        return self._path.stat().st_size // RECORD.itemsize if self._path.exists() else 0

    def _median_step_s(self) -> float:
        recent = read_records(self._path, max(0, self._count - RECENT_STEPS))
        seconds = recent["seconds"][recent["step"] > 0]
        return float(np.median(seconds)) if len(seconds) else 0.0

    def _facts(self) -> str:
        """What the machine does meanwhile: a GPU at 0 % hangs, one at 100 % only takes long."""
        latest = self._telemetry.latest
        parts = []
        if np.isfinite(latest["utilisation"]):
            parts.append(f"GPU at {latest['utilisation']:.0f} %, {latest['temperature_c']:.0f} °C")
        if np.isfinite(latest["device_gib"]):
            parts.append(f"{latest['device_gib']:.1f} of {latest['limit_gib']:.1f} GiB in use")
        free_gib = psutil.virtual_memory().available / 1024**3
        return ", ".join([*parts, f"load {psutil.getloadavg()[0]:.1f}", f"{free_gib:.1f} GiB of memory free"]) + "."


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def _safe(status: Status) -> str:
    return f"step {status.last_checkpoint_step:,}" if status.last_checkpoint_step is not None else "nothing yet"
