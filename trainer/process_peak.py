"""The most memory this process has held since a moment, as the kernel counts it (VmHWM); a poll once a second misses peaks.

Linux alone lets a process ask for this and begin anew; elsewhere there is no figure, and callers fall back on polling.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

GIB = 1024**3
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_M_MMAP_THRESHOLD = -3  # mallopt(3)
_RESET_PEAK = "5"  # proc(5): sets the peak resident set size to the present one


def begin() -> bool:
    """Begin anew; False where the kernel does not do that, so that `peak_gib` may be of an earlier time."""
    try:
        _CLEAR.write_text(_RESET_PEAK)
    except OSError:
        return False
    return True


def peak_gib() -> float | None:
    """The most resident memory since `begin`, GiB; None where the kernel does not say."""
    return _read("VmHWM:")


def now_gib() -> float | None:
    """Resident memory now, GiB; None where the kernel does not say."""
    return _read("VmRSS:")


def _read(name: str) -> float | None:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    found = next((line for line in lines if line.startswith(name)), None)
    return int(found.split()[1]) * 1024 / GIB if found else None


def give_large_blocks_back(at_least_bytes: int = 1 << 18) -> bool:
    """Have glibc map blocks of this size and more one by one, so that a freed one leaves the process at once.

    Left alone, glibc raises that limit to 32 MiB after the first large block is freed: activations then come out of a
    heap with holes, and a training on a processor holds 10 to 50 % more memory than it has tensors. Each mapping costs page
    faults, though: a step of a 32 M model took 28 % longer. False elsewhere.
    """
    if sys.platform != "linux":
        return False
    try:
        return bool(ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, at_least_bytes))
    except AttributeError:  # another C library
        return False
