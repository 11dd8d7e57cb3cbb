"""telemetry.bin: memory, utilisation, heat and power once a second, written beside the training thread, never in it."""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil

from trainer import clock
from trainer.machine import GIB, Nvml
from trainer.metrics import RecordFile

COLUMNS = (
    "t",
    "allocated_gib",
    "reserved_gib",
    "process_gib",
    "device_gib",
    "limit_gib",
    "utilisation",
    "temperature_c",
    "power_w",
)
RECORD = np.dtype([(name, "<f8") for name in COLUMNS])
NOT_MEASURED = float("nan")


class Telemetry:
    """Samples once a second into `path` until `stop`.

    `allocator()` gives (allocated, reserved) in GiB of the device's allocator; None on a CPU, where process memory counts.
    `gpu_index` is the device in NVML's numbering.
    """

    def __init__(
        self,
        path: Path,
        allocator: Callable[[], tuple[float, float]] | None,
        gpu_index: int | None,
        every_s: float = 1.0,
    ) -> None:
        self._path = path
        self._file: RecordFile | None = None
        self._allocator = allocator
        self._gpu_index = gpu_index
        self._nvml = Nvml() if gpu_index is not None else None
        self._process = psutil.Process()
        self._total_gib = psutil.virtual_memory().total / GIB
        self._every_s = every_s
        self._stop = threading.Event()
        self.latest: dict[str, float] = dict.fromkeys(COLUMNS, NOT_MEASURED)
        self.peak_process_gib = NOT_MEASURED
        self._thread = threading.Thread(target=self._loop, name="telemetry", daemon=True)

    def start(self) -> None:
        """Take the first sample at once and go on once a second, all of it on the thread: a driver may hang."""
        self._thread.start()

    def stop(self) -> None:
        """Take a last sample and end; waits at most 2 s, since a driver call may hang."""
        self._stop.set()
        self._thread.join(2.0)
        if not self._thread.is_alive():
            self._sample()
            if self._file is not None:
                self._file.close()

    def _loop(self) -> None:
        self._sample()
        while not self._stop.wait(self._every_s):
            self._sample()

    def _sample(self) -> None:
        values = dict.fromkeys(COLUMNS, NOT_MEASURED)
        values["t"] = clock.now()
        try:
            values["process_gib"] = self._process.memory_info().rss / GIB
        except (OSError, psutil.Error):  # no descriptor is left to look with: not measured
            pass
        if self._allocator is not None:
            values["allocated_gib"], values["reserved_gib"] = self._allocator()
        if self._nvml is not None and self._gpu_index is not None:
            reading = self._nvml.reading(self._gpu_index)
            values.update({name: float(value) for name, value in reading.items() if value is not None})
        else:
            values["limit_gib"] = self._total_gib
        self.peak_process_gib = float(np.fmax(self.peak_process_gib, values["process_gib"]))
        self.latest = values
        try:
            if self._file is None:
                self._file = RecordFile(self._path, RECORD.itemsize)
            self._file.append(struct.pack(f"<{len(COLUMNS)}d", *(values[name] for name in COLUMNS)))
        except OSError:
            return  # a full disk: the curve gets a gap, the training goes on
