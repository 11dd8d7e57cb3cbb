"""The time that is written down: the wall clock as it stood when the process began, carried on by a clock that nobody sets.

A clock that is put back or forward in mid-run would make durations negative and events out of order. Time in which the
machine slept counts, where the system has such a clock.
"""

from __future__ import annotations

import time


def _steady_s() -> float:
    """Seconds since some fixed moment, never set back; sleep of the machine included on Linux."""
    boottime = getattr(time, "CLOCK_BOOTTIME", None)
    return time.clock_gettime(boottime) if boottime is not None else time.monotonic()


_BEGAN = time.time() - _steady_s()


def now() -> float:
    """Seconds since 1970, as this process counts them: it never goes back while the process lives."""
    return _BEGAN + _steady_s()
