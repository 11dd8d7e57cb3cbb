"""The learning rate of a step. Pure; the same curve as transformers' schedulers, checked against them in the tests."""

from __future__ import annotations

import math
from typing import Literal


def learning_rate(
    step: int,
    *,
    peak: float,
    warmup_steps: int,
    total_steps: int,
    schedule: Literal["linear", "cosine", "constant"],
) -> float:
    """Rate of `step` (1-based): from 0 up to `peak` over the warm-up, then down to 0 at the end, or flat.

    The first step of a warm-up has rate 0, as in transformers, so that trajectories can be compared step for step.
    """
    done = step - 1
    if done < warmup_steps:
        return peak * done / max(1, warmup_steps)
    if schedule == "constant":
        return peak
    progress = (done - warmup_steps) / max(1, total_steps - warmup_steps)
    if schedule == "linear":
        return peak * max(0.0, 1.0 - progress)
    return peak * max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
