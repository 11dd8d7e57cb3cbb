"""The curve of a run while it is trained: steps whose values are still on the device, and the records that come of them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import torch

from trainer import clock
from trainer.loop.ready import Progress, Surroundings
from trainer.loop.step import StepRecord
from trainer.metrics import MetricsWriter, read_metrics

RECENT_STEPS = 50
LEAST_STEPS = 20
"""A spike is measured against the median of the recent steps, once there are so many."""


class Curve:
    """Writes the record of each step when its values have arrived, and marks what is odd in it. Owns the open files."""

    def __init__(self, around: Surroundings, progress: Progress, loss_spike: float) -> None:
        self._around, self._progress, self._loss_spike = around, progress, loss_spike
        self.metrics = MetricsWriter(around.run.metrics, around.run.rows, around.life)
        self._waiting: deque[StepRecord] = deque()
        # what a spike is measured against: with the steps of earlier lives, so that a resume marks what it would have
        past = read_metrics(around.run.metrics)
        self._recent: deque[float] = deque(past["loss"][past["step"] <= progress.step].tolist(), maxlen=RECENT_STEPS)
        self.last_arrival = time.perf_counter()
        self.diverged: tuple[StepRecord, list[float]] | None = None  # the first bad step and its rows' loss sums
        self._skip_said = False
        self._gap_said = False

    def close(self) -> None:
        """Close the files."""
        self.metrics.close()

    def expect(self, record: StepRecord) -> None:
        """Take in a step that was computed; its values may still be on their way."""
        self._waiting.append(record)

    def nothing(self, step: int) -> None:
        """Note a step that has no row to train."""
        with suppress(OSError):  # a full disk: the step may show what an earlier life recorded for it
            self.metrics.nothing(step, clock.now(), self._progress.elapsed_s)

    def arrivals(self, leave: int) -> None:
        """Write the metrics of steps whose values have arrived; wait while more than `leave` are still on their way."""
        while self._waiting and (len(self._waiting) > leave or self._waiting[0].marks.passed()):
            self._write(self._waiting.popleft())

    def aside(self, phase: str, work: Callable[[], Any]) -> Any:
        """Do something that is not a step; its time is not counted to the next step."""
        self._around.events.append("phase", name=phase)
        result = work()
        self._around.events.append("phase", name="train")
        self.last_arrival = time.perf_counter()
        return result

    def _write(self, record: StepRecord) -> None:
        loss, norm, bad, sums = record.arrive()
        now = time.perf_counter()
        seconds, self.last_arrival = now - self.last_arrival, now
        self._progress.elapsed_s += seconds
        self._record(record, loss, norm, sums, seconds)
        if bad and self.diverged is None:
            self.diverged = record, sums
        elif not np.isfinite(norm) and not self._skip_said:
            self._skip_said = True
            self._around.say(
                f"The gradient of step {record.step} did not fit into fp16: the step was skipped and the loss scale halved, "
                "as fp16 does now and then. Said once."
            )
        self._mark_spike(record.step, loss)

    def _record(self, record: StepRecord, loss: float, norm: float, sums: list[float], seconds: float) -> None:
        forward_backward_s, optimizer_s = record.marks.seconds()
        memory = self._around.telemetry.latest
        values = {
            "step": record.step,
            "t": clock.now(),
            "elapsed_s": self._progress.elapsed_s,
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": record.rate,
            "labels": record.labels,
            "tokens": record.tokens,
            "rows": len(record.rows),
            "seconds": seconds,
            "data_s": record.data_s,
            "forward_backward_s": forward_backward_s,
            "optimizer_s": optimizer_s,
            "allocated_gib": memory["allocated_gib"],
            "reserved_gib": memory["reserved_gib"],
            "process_gib": memory["process_gib"],
            "device_gib": memory["device_gib"],
            "peak_gib": self._peak_gib(),
        }
        try:
            self.metrics.step(values, list(zip(record.rows, sums, record.labels_of_row, strict=True)))
            self._gap_said = False
        except OSError as error:  # a full disk leaves a gap in the curve; the training goes on
            if not self._gap_said:
                self._gap_said = True
                self._around.say(
                    f"Step {record.step} could not be recorded: {error.strerror or error}. Training goes on."
                )

    def _peak_gib(self) -> float:
        if self._around.device.startswith("cuda"):
            return torch.cuda.max_memory_allocated() / 1024**3
        return self._around.telemetry.peak_process_gib

    def _mark_spike(self, step: int, loss: float) -> None:
        if self._loss_spike and len(self._recent) >= LEAST_STEPS:
            median = float(np.median(self._recent))
            if loss > self._loss_spike * median:
                text = (
                    f"Loss {loss:.3f} at step {step}: {loss / median:.1f} times the median of the last {RECENT_STEPS}."
                )
                self._around.events.append("alert", code="spike", step=step, text=text)
        self._recent.append(loss)
