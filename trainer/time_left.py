"""How long a run still takes, from its plan and what its steps took so far: tokens are weighed, not steps. Pure, torch-free.

A step is what its tokens take forward and backward, and what it takes whatever it holds (update, reading, writing). To the
steps come the held-out checks, samples and saves that the settings ask for, each as long as those of this run were.
Called by `trainer.run`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trainer.data.packing import Plan

MARKS = 512
"""So many points of the plan are kept: exact for runs of at most so many steps, and a line between the points beyond."""
DISK_BYTES_A_S = 2e8
"""How fast a checkpoint is taken to be written until the run's first save has shown it."""
ASIDES = ("eval", "sample", "save")


@dataclass(frozen=True)
class TokenMarks:
    """Tokens planned up to a step: `tokens[i]` in the first `steps[i]` steps; both begin with 0 and end with the whole run."""

    steps: Sequence[int]
    tokens: Sequence[int]

    def up_to(self, step: int) -> float:
        """Tokens of the first `step` steps."""
        return float(np.interp(step, self.steps, self.tokens))


@dataclass
class Asides:
    """What happened between the steps of this life: seconds of each held-out check, sample and save, in order."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in ASIDES})
    written_s: list[float] = field(default_factory=list)  # of each checkpoint, on the saver's thread
    open: tuple[str, float] | None = None

    def phase(self, name: str | None, at: float) -> None:
        """A phase begins at `at`; the one before ends."""
        if self.open is not None:
            began = self.open
            self.seconds[began[0]].append(max(0.0, at - began[1]))
        self.open = (name, at) if name in ASIDES else None

    def typical(self, name: str) -> float | None:
        """Seconds that one takes, by the last few; None where none was made yet."""
        return float(np.median(self.seconds[name][-5:])) if self.seconds[name] else None


def marks_of(plan: Plan, lengths: np.ndarray) -> TokenMarks:
    """The tokens of a plan by step. `lengths` (all rows,) in tokens."""
    if plan.total_steps == 0:
        return TokenMarks([0], [0])
    of_rows = np.concatenate([[0], np.cumsum(np.asarray(lengths, np.int64)[plan.rows])])
    ends = of_rows[plan.pack_starts[plan.step_packs[:, 1]]]
    at = np.unique(np.linspace(0, plan.total_steps, min(MARKS, plan.total_steps) + 1).round().astype(np.int64))
    return TokenMarks(at.tolist(), [0 if step == 0 else int(ends[step - 1]) for step in at])


def steps_s(marks: TokenMarks | None, step: int, total_steps: int, recent: np.ndarray) -> float:
    """Seconds that the steps after `step` take. `recent` are metrics records of this life; without marks steps are alike."""
    steps, tokens = total_steps - step, float(recent["tokens"].sum())
    computed = float(recent["forward_backward_s"].sum())
    rest = max(0.0, float(recent["seconds"].sum()) - computed) / len(recent)
    if marks is None or tokens <= 0:
        return steps * float(recent["seconds"].mean())
    return (marks.up_to(total_steps) - marks.up_to(step)) * computed / tokens + steps * rest


def asides_s(config: Mapping[str, Any], step: int, total_steps: int, epoch_steps: int | None, asides: Asides) -> float:
    """Seconds of the held-out checks, samples and saves still to come; `config` as in a snapshot."""
    settings, output = config.get("eval", {}), config.get("output", {})
    total = 0.0
    if (each := asides.typical("eval")) is not None:
        total += each * _checks(settings, step, total_steps, epoch_steps)
    if (each := asides.typical("sample")) is not None and settings.get("sample_steps"):
        total += each * (total_steps // settings["sample_steps"] - step // settings["sample_steps"])
    if (each := asides.typical("save")) is not None:
        every = output.get("save_steps") or 0
        total += each * ((total_steps - 1) // every - step // every + 1 if every else 1)
    return total


def _checks(settings: Mapping[str, Any], step: int, total_steps: int, epoch_steps: int | None) -> int:
    """Held-out checks after `step`: where the settings say, and one at the end."""
    if settings.get("eval_strategy") == "epoch":
        every = epoch_steps or total_steps
    else:
        every = settings.get("eval_steps") or total_steps
    return (total_steps - 1) // every - step // every + 1


def last_write_s(checkpoint_bytes: float | None, asides: Asides) -> float:
    """Seconds that the run waits for its last checkpoint to be on the disk."""
    if asides.written_s:
        return float(np.median(asides.written_s[-5:]))
    return (checkpoint_bytes or 0.0) / DISK_BYTES_A_S
