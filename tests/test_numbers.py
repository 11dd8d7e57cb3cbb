"""Figures for people: the Python and the JavaScript formatter against one table, and against each other."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from ui import numbers

TABLE = json.loads((Path(__file__).parent / "number_cases.json").read_text(encoding="utf-8"))
WORDS = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf")}
SCALED = ("memory", "disk", "loss", "rate", "grad_norm", "count", "percent", "speed", "duration")


def written(name: str, args: list[Any]) -> str:
    """What Python writes, with the words of the wire turned into numbers and the table's time zone."""
    values = [WORDS.get(value, value) if isinstance(value, str) else value for value in args]
    more = [ZoneInfo(TABLE["zone"])] if name == "when" else []
    return getattr(numbers, name)(*values, *more)


@pytest.mark.parametrize(("name", "args", "expected"), TABLE["cases"])
def test_python_writes_every_figure_as_the_table_says(name: str, args: list[Any], expected: str) -> None:
    assert written(name, args) == expected


def test_the_table_has_cases_for_every_formatter() -> None:
    assert {name for name, _, _ in TABLE["cases"]} == {*SCALED, "eta", "when"}


def test_javascript_writes_every_figure_as_the_table_says(run_numbers_js: Callable[[Any], list[str]]) -> None:
    calls = [[name, args] for name, args, _ in TABLE["cases"]]
    wrong = [
        (name, args, expected, got)
        for (name, args, expected), got in zip(TABLE["cases"], run_numbers_js(calls), strict=True)
        if got != expected
    ]
    assert wrong == []


def test_python_and_javascript_agree_on_figures_nobody_chose(
    run_numbers_js: Callable[[Any], list[str]],
) -> None:
    draw = random.Random(7)
    calls: list[list[Any]] = []
    for name in SCALED:
        largest = 12 if name == "disk" else 7
        calls += [[name, [10 ** draw.uniform(-6, largest)]] for _ in range(300)]
        # halves and edges, where rounding parts ways
        calls += [[name, [draw.randrange(0, 4000) / 8]] for _ in range(100)]
        calls += [
            [name, [draw.choice((1, 10, 60, 100, 600, 3600, 86400, 1e5, 1e6)) * (1 - 10**-k)]] for k in range(2, 12)
        ]
    now = TABLE["now_s"]
    calls += [["when", [now - 10 ** draw.uniform(0, 8), now]] for _ in range(200)]
    differ = [
        (call, written(*call), got)
        for call, got in zip(calls, run_numbers_js(calls), strict=True)
        if written(*call) != got
    ]
    assert differ == []
