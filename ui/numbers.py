"""How figures are written for people; `assets/numbers.js` is its twin and both pass tests/number_cases.json.

Pure functions. None is missing and becomes "–", never 0; NaN and infinity are said by name. Halves round away
from zero, as JavaScript's toFixed does, so that a figure does not change when a script takes over.
"""

from __future__ import annotations

import math
from datetime import datetime, tzinfo
from decimal import ROUND_HALF_UP, Decimal

MISSING = "–"
ESTIMATE_FROM_STEP = 20
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


def memory(gib: float | None) -> str:
    """Memory given in GiB: "18.4 GiB", under 1 GiB whole MiB."""
    if (odd := _odd(gib)) is not None or gib is None:
        return odd or MISSING
    if abs(gib) < 1:
        mib = _fixed(gib * 1024, 0)
        return "1.0 GiB" if mib == "1024" else f"{mib} MiB"
    return f"{_fixed(gib, 1)} GiB"


def disk(size_bytes: float | None) -> str:
    """Disk space or a file's size given in bytes: GB = 10^9, one decimal under 100; MB and kB below."""
    if (odd := _odd(size_bytes)) is not None or size_bytes is None:
        return odd or MISSING
    for unit, scale in (("kB", 1e3), ("MB", 1e6), ("GB", 1e9)):
        value = size_bytes / scale
        if unit == "kB" and size_bytes < 1000:
            return f"{_fixed(size_bytes, 0)} bytes"
        if unit == "GB" or float(_fixed(value, 0)) < 1000:
            return f"{_fixed(value, 1) if value < 99.95 else _grouped(_fixed(value, 0))} {unit}"
    raise AssertionError("unreachable")


def loss(value: float | None) -> str:
    """A loss: three decimals, under 0.1 three significant digits, under 1e-4 as 1.2e-5."""
    if (odd := _odd(value)) is not None or value is None:
        return odd or MISSING
    if value == 0 or abs(value) >= 0.1:
        return _fixed(value, 3)
    return _significant(value, 3) if abs(value) >= 1e-4 else _exponent(value, 2)


def rate(value: float | None) -> str:
    """A learning rate: two significant digits, as 3.1e-4 below 0.01; trailing zeros are dropped."""
    if (odd := _odd(value)) is not None or value is None:
        return odd or MISSING
    if value == 0:
        return "0"
    text = _significant(value, 2) if abs(value) >= 0.01 else _exponent(value, 2)
    mantissa, mark, exponent = text.partition("e")
    if "." in mantissa:
        mantissa = mantissa.rstrip("0").rstrip(".")
    return mantissa + mark + exponent


def grad_norm(value: float | None) -> str:
    """A gradient norm: two decimals, from a million on as 1.2e6."""
    if (odd := _odd(value)) is not None or value is None:
        return odd or MISSING
    return _fixed(value, 2) if abs(value) < 1e6 else _exponent(value, 2)


def count(value: float | None) -> str:
    """A number of things: 12,408, from a million on three digits with M or B."""
    if (odd := _odd(value)) is not None or value is None:
        return odd or MISSING
    if abs(value) < 999_999.5:
        return _grouped(_fixed(value, 0))
    unit, scale = ("M", 1e6) if abs(value) < 999.5e6 else ("B", 1e9)
    short = value / scale
    places = 2 if abs(short) < 9.995 else 1 if abs(short) < 99.95 else 0
    return f"{_grouped(_fixed(short, places))} {unit}"


def percent(part: float | None, whole: float | None = 1.0) -> str:
    """`part` of `whole` in whole percent; 100 % only when all of it is there, 0 % only when none is."""
    if part is None or not whole:
        return MISSING
    if (odd := _odd(part / whole)) is not None:
        return odd
    share = part / whole * 100
    if 0 < share < 1:
        return "under 1 %"
    return f"{_fixed(min(share, 99), 0) if part < whole else _fixed(share, 0)} %"


def speed(tokens_per_s: float | None) -> str:
    """Training speed: 5,120 tok/s, from 100,000 on 152k tok/s."""
    if (odd := _odd(tokens_per_s)) is not None or tokens_per_s is None:
        return odd or MISSING
    if tokens_per_s < 99_999.5:
        return f"{_grouped(_fixed(tokens_per_s, 0))} tok/s"
    return f"{_grouped(_fixed(tokens_per_s / 1000, 0))}k tok/s"


def duration(seconds: float | None) -> str:
    """A length of time in two units at most: 41 s, 4 min 5 s, 12 min, 6 h 40 min, 2 d 3 h."""
    if (odd := _odd(seconds)) is not None or seconds is None:
        return odd or MISSING
    if seconds < 0.5:
        return "under 1 s"
    whole = int(_fixed(seconds, 0))
    if whole < 60:
        return f"{whole} s"
    if whole < 600:
        return _two(whole // 60, "min", whole % 60, "s")
    minutes = int(_fixed(seconds / 60, 0))
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 1440:
        return _two(minutes // 60, "h", minutes % 60, "min")
    hours = int(_fixed(seconds / 3600, 0))
    return _two(hours // 24, "d", hours % 24, "h")


def eta(remaining_s: float | None, step: int) -> str:
    """How long still: "estimating" until 20 steps are done, then "about 12 min"."""
    if step < ESTIMATE_FROM_STEP or remaining_s is None or not math.isfinite(remaining_s):
        return "estimating"
    return f"about {duration(remaining_s)}"


def when(at_s: float | None, now_s: float, zone: tzinfo | None = None) -> str:
    """A moment (seconds since 1970): 12 min ago, 14:18 today, 12 Nov 14:18 this year, else with the year."""
    if at_s is None:
        return MISSING
    passed = now_s - at_s
    if 0 <= passed < 60:
        return "just now"
    if 60 <= passed < 3600:
        return f"{int(passed // 60)} min ago"
    at, now = datetime.fromtimestamp(at_s, zone), datetime.fromtimestamp(now_s, zone)
    hour = f"{at.hour:02d}:{at.minute:02d}"
    if at.date() == now.date():
        return hour
    year = "" if at.year == now.year else f" {at.year}"
    return f"{at.day} {_MONTHS[at.month - 1]}{year} {hour}"


def _odd(value: float | None) -> str | None:
    """The name of a figure that is none: NaN, inf, -inf."""
    if value is None or math.isfinite(value):
        return None
    return "NaN" if math.isnan(value) else "inf" if value > 0 else "-inf"


def _fixed(value: float, places: int) -> str:
    text = str(Decimal(value).quantize(Decimal(1).scaleb(-places), ROUND_HALF_UP))
    return text.removeprefix("-") if float(text) == 0 else text


def _grouped(digits: str) -> str:
    whole, point, rest = digits.partition(".")
    return f"{int(whole):,}{point}{rest}"


def _exponent(value: float, digits: int) -> str:
    exact = Decimal(value)
    power = exact.adjusted()
    mantissa = exact.scaleb(-power).quantize(Decimal(1).scaleb(1 - digits), ROUND_HALF_UP)
    if abs(mantissa) >= 10:
        power += 1
        mantissa = exact.scaleb(-power).quantize(Decimal(1).scaleb(1 - digits), ROUND_HALF_UP)
    return f"{mantissa}e{power}"


def _significant(value: float, digits: int) -> str:
    power = Decimal(value).adjusted()
    places = max(digits - 1 - power, 0)
    text = _fixed(value, places)
    if Decimal(text).adjusted() > power and places > 0:  # 0.0999… became 0.100: one decimal less
        text = _fixed(value, places - 1)
    return text


def _two(large: int, large_unit: str, small: int, small_unit: str) -> str:
    return f"{large} {large_unit}" + (f" {small} {small_unit}" if small else "")
