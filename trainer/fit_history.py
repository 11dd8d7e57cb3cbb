"""What real runs and smoke tests really took of memory, kept in the workspace, and what the next forecast learns from it.

Owns `fit_history.jsonl`: one line a measurement, appended. Torch-free; written by `trainer.session` and `trainer.smoke`,
read by the page.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from trainer.files import write_whole

FILE = "fit_history.jsonl"
LOOKED_AT = 200
"""The newest lines of a model and device that a forecast is calibrated by."""
PRIOR_SPREAD = 0.3
"""How far the share that depends on settings may be off before anything was measured (one standard deviation)."""
MEASURED_SPREAD = 0.03
"""How much the peak of one and the same run differs from time to time, of the whole."""
LEAST = {1: 0.10, 2: 0.08, 3: 0.07}
"""The smallest error stated after so many measurements; beyond three, LEAST_OF_MANY."""
LEAST_OF_MANY = 0.06


@dataclass(frozen=True)
class Measured:
    """One measured peak beside its forecast, GiB. `fixed` follows from the weights alone; `moving` from the settings.

    `model` is the folder's fingerprint, `device` the machine's name of the device; `at` is in seconds since 1970.
    """

    kind: str  # "run" or "smoke"
    id: str
    at: float
    model: str
    device: str
    measured_gib: float
    fixed_gib: float
    moving_gib: float

    @property
    def forecast_gib(self) -> float:
        """What was forecast without any history."""
        return self.fixed_gib + self.moving_gib


@dataclass(frozen=True)
class Calibration:
    """What history says: the factor on the share that depends on the settings, the error stated, and where it is from."""

    ratio: float = 1.0
    spread: float | None = None  # None: nothing was measured, the forecast's own error holds
    count: int = 0
    newest: Measured | None = None

    @property
    def words(self) -> str:
        """ "calibrated by the smoke test of 14:02", "calibrated by 3 runs, the last of 14:02"; empty without history."""
        if self.newest is None:
            return ""
        then, today = time.localtime(self.newest.at), time.localtime()
        clock = time.strftime("%H:%M" if then[:3] == today[:3] else "%-d %b, %H:%M", then)
        what = "smoke test" if self.newest.kind == "smoke" else "run"
        if self.count == 1:
            return f"calibrated by the {what} of {clock}"
        return f"calibrated by {self.count} measurements, the last the {what} of {clock}"


def append(root: Path, measured: Measured) -> None:
    """Add one measurement to the workspace's history; a disk that is full costs the line and nothing else."""
    line = (json.dumps(asdict(measured), allow_nan=False) + "\n").encode()
    try:
        fd = os.open(root / FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    except OSError:
        return
    try:
        write_whole(fd, line)
    except OSError:
        pass
    finally:
        os.close(fd)


def read(root: Path, model: str, device: str) -> list[Measured]:
    """The measurements of this model on this device, oldest first; a line that is none of ours is passed over."""
    path = root / FILE
    try:
        stat = path.stat()
    except OSError:
        return []
    every = _lines(path, stat.st_size, stat.st_mtime_ns)
    return [entry for entry in every if entry.model == model and entry.device == device][-LOOKED_AT:]


@lru_cache(maxsize=8)
def _lines(path: Path, size: int, changed_ns: int) -> tuple[Measured, ...]:
    found = []
    for line in path.read_text("utf-8", "replace").splitlines():
        try:
            found.append(_entry(json.loads(line)))
        except (ValueError, TypeError, RecursionError):
            continue
    return tuple(found)


def _entry(raw: Any) -> Measured:
    entry = Measured(**raw)
    figures = (entry.at, entry.measured_gib, entry.fixed_gib, entry.moving_gib)
    if not all(isinstance(value, (int, float)) and value >= 0 for value in figures) or not entry.measured_gib:
        raise ValueError("no measurement")
    return entry


def calibrate(entries: Sequence[Measured]) -> Calibration:
    """The factor on the moving share that explains the measurements best, and the error that is then left.

    Least squares with a prior at 1 (ridge regression): a run in which the moving share was small says little about it.
    """
    if not entries:
        return Calibration()
    weight = total = 0.0
    for entry in entries:
        trust = (MEASURED_SPREAD * entry.measured_gib) ** -2
        weight += trust * entry.moving_gib**2
        total += trust * entry.moving_gib * (entry.measured_gib - entry.fixed_gib)
    prior = PRIOR_SPREAD**-2
    ratio = max(0.2, (prior + total) / (prior + weight))
    missed = max(abs(e.fixed_gib + ratio * e.moving_gib - e.measured_gib) / e.measured_gib for e in entries)
    spread = max(LEAST.get(len(entries), LEAST_OF_MANY), 1.5 * missed)
    return Calibration(ratio, spread, len(entries), entries[-1])
