"""Step times and peak memory of one arm, taken the same way whoever trains."""

from __future__ import annotations

import threading
import time
from typing import Any

import psutil
import torch

GIB = 1024**3
EVERY_S = 0.02


class Clock:
    """Notes the end of each step. The device is waited for at the end of the warm-up and of the last step alone.

    A wait in every step would slow down trainers that have none; so single step times on a GPU are the host's view,
    and the sum of the timed steps is exact.
    """

    def __init__(self, device: str, warmup_steps: int, steps: int) -> None:
        self._cuda = device.startswith("cuda")
        self._waits = (warmup_steps, steps)
        self._first = warmup_steps
        self.ends: list[float] = []
        self._cpu: list[float] = []

    def step_ended(self) -> None:
        """Call right after a step's update."""
        if self._cuda and len(self.ends) + 1 in self._waits:
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())
        self._cpu.append(time.process_time())

    @property
    def cpu_s(self) -> float:
        """Processor seconds of the timed steps, all threads: what other programs of a shared machine disturb less."""
        return self._cpu[-1] - self._cpu[self._first - 1]

    @property
    def step_s(self) -> list[float]:
        """Seconds of each step after the warm-up."""
        timed = self.ends[self._first - 1 :]
        return [end - start for start, end in zip(timed, timed[1:], strict=False)]


class Peak:
    """Peak memory from `start` to `stop`: the allocator's on a GPU; on a CPU the process's growth, looked at every 20 ms."""

    def __init__(self, device: str) -> None:
        self._cuda = device.startswith("cuda")
        self._process = psutil.Process()
        self._before = self._process.memory_info().rss
        self._peak = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peak", daemon=True)

    def start(self) -> None:
        """Begin; what was used before the model was loaded is the zero of a CPU's growth."""
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            self._thread.start()

    def stop(self) -> dict[str, Any]:
        """{"peak_gib", "reserved_gib"}; reserved is None on a CPU."""
        if self._cuda:
            return {
                "peak_gib": torch.cuda.max_memory_allocated() / GIB,
                "reserved_gib": torch.cuda.max_memory_reserved() / GIB,
            }
        self._ended.set()
        self._thread.join()
        return {"peak_gib": (self._peak - self._before) / GIB, "reserved_gib": None}

    def _watch(self) -> None:
        while not self._ended.wait(EVERY_S):
            self._peak = max(self._peak, self._process.memory_info().rss)
