"""Figures that follow from the form and the data: steps of a run, and the line that says what will happen.

Pure. The step count is that of `trainer.data.packing.make_plan` for runs without packing; packed runs are estimated
from the tokens. Called by the gate's facts and by the Train page.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from trainer.config import Config
from ui import numbers


@dataclass(frozen=True)
class Plan:
    """What a run will be: optimiser steps (None where unknown, `exact` False where estimated), rows trained."""

    steps: int | None
    exact: bool
    trained_rows: int | None
    held_out_rows: int | None


def plan_of(config: Config, usable_rows: int | None, tokens: int | None, held_out_file: bool) -> Plan:
    """Steps from the number of usable rows and, with packing, their tokens."""
    h = config.hyperparams
    if usable_rows is None:
        return Plan(h.max_steps, True, None, None)
    share = 0.0 if held_out_file or config.eval.eval_strategy == "no" else config.data.validation_split
    most = config.data.validation_max_rows
    held_out = min(math.ceil(usable_rows * share), most, usable_rows - 1) if share > 0 else 0
    trained = usable_rows - max(held_out, 0)
    if trained < 1:
        return Plan(None, True, 0, held_out)
    weights = [file.weight for file in config.data.files] or [1.0]
    exact = all(weight == 1.0 for weight in weights) and not h.packing
    packs = trained * sum(weights) / len(weights)
    if h.packing:
        per_row = min((tokens or 0) / usable_rows or h.max_length, h.max_length)
        # best-fit decreasing leaves a few per cent of the room empty; a row never needs more than a pack of its own
        packs = min(packs, max(1.0, packs * per_row / h.max_length * 1.03))
    steps = _steps(packs, h.rows_per_step, h.num_epochs)
    if h.max_steps is not None:
        return Plan(h.max_steps, True, trained, held_out)
    return Plan(steps, exact, trained, held_out)


def _steps(packs: float, per_step: int, epochs: float) -> int:
    whole = math.floor(epochs)
    steps = whole * math.ceil(packs / per_step)
    rest = epochs - whole
    if rest > 0:
        steps += math.ceil(max(1, round(packs * rest)) / per_step)
    return steps


def derived_line(config: Config, plan: Plan, seconds_a_step: float | None, now_s: float | None = None) -> str:
    """ "64 rows a step · 1,240 steps · 2 epochs · about 6 h 40 min, done about 05:30"; unknown parts are left out."""
    h = config.hyperparams
    unit = "pack" if h.packing else "row"
    parts = [f"{h.rows_per_step:,} {unit}{'s' if h.rows_per_step != 1 else ''} a step"]
    if plan.steps is not None:
        about = "" if plan.exact else "about "
        parts.append(f"{about}{plan.steps:,} step{'s' if plan.steps != 1 else ''}")
    if h.max_steps is None:
        parts.append(f"{h.num_epochs:g} epoch{'s' if h.num_epochs != 1 else ''}")
    if plan.steps is not None and seconds_a_step is not None:
        whole_s = plan.steps * seconds_a_step
        ends = time.strftime("%H:%M", time.localtime((now_s or time.time()) + whole_s))
        parts.append(f"about {numbers.duration(whole_s)}" + (f", done about {ends}" if whole_s < 86_400 else ""))
    return " · ".join(parts)
