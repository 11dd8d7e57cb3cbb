"""Checks of the smoke test that take optimiser steps: the longest rows, a batch that must be learnt, the run's forecast."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

from trainer.data.packing import Plan
from trainer.loop.prepare import Left, Model, Tokens
from trainer.loop.step import UpdateOutOfMemory
from trainer.report import Report
from trainer.schema import Config

LONGEST_STEPS, REPEATED_STEPS = 3, 8
MUST_FALL = 0.005  # of the first loss of a repeated batch
MAY_RISE = 1.2
MUST_MOVE = 0.5  # of the trained tensors; a norm's scale in pure bf16 or an expert that no token chose may stand still
SAMPLED = 4096
MARKS_MAY_MISS = 0.5
MARKS_SLACK_S = 0.1


class Enough(Exception):
    """A problem after which the remaining checks would prove nothing: the line's code and its words."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code, self.text = code, text


def sample(tensor: torch.Tensor) -> torch.Tensor:
    """Up to SAMPLED values of a tensor, spread over it, copied."""
    flat = tensor.detach().flatten()
    return flat[:: max(1, len(flat) // SAMPLED)].clone()


class Bench:
    """Takes real optimiser steps at the full rate and keeps what they showed."""

    def __init__(
        self,
        config: Config,
        model: Model,
        tokens: Tokens,
        plan: Plan,
        device: str,
        report: Report,
        interrupt: Callable[[], bool],
    ) -> None:
        self.config, self.model, self.tokens, self.plan, self.device, self.interrupt = (
            config,
            model,
            tokens,
            plan,
            device,
            interrupt,
        )
        self.rate = config.hyperparams.learning_rate
        self.at_first = {name: sample(tensor) for name, tensor in model.stepper.named}
        self.taken = 0
        self.seconds: list[float] = []
        self.by_the_wall: list[float] = []
        self.tokens_done: list[int] = []
        self.first_loss = float("nan")

    def step(self, rows: np.ndarray, number: int | None = None) -> float:
        """One optimiser step on one micro-batch; returns its loss. Raises Left when a stop was asked for."""
        if self.interrupt():
            raise Left()
        started = time.perf_counter()
        record = self.model.stepper.step(number or self.taken + 1, [rows], self.tokens.cache, self.rate)
        assert record is not None
        loss, _, bad, _ = record.arrive()
        self.by_the_wall.append(time.perf_counter() - started)
        if self.taken == 0:
            self.first_loss = loss
        self.taken += 1
        self.seconds.append(sum(record.marks.seconds()) + record.data_s)
        self.tokens_done.append(record.tokens)
        return float("nan") if bad else loss


def heaviest(plan: Plan, lengths: np.ndarray, size: int) -> list[np.ndarray]:
    """Micro-batches of `size` packs (rows, unpacked), made of the longest of the plan, the heaviest first."""
    starts = plan.pack_starts
    tokens = np.add.reduceat(lengths[plan.rows], starts[:-1])
    _, first_of_each = np.unique(plan.rows[starts[:-1]], return_index=True)  # later epochs bring the same rows again
    order = first_of_each[np.argsort(-tokens[first_of_each], kind="stable")]
    packs = [plan.rows[starts[pack] : starts[pack + 1]] for pack in order[: LONGEST_STEPS * size]]
    return [np.concatenate(packs[at : at + size]) for at in range(0, len(packs), size)]


def longest_rows(report: Report, bench: Bench) -> np.ndarray:
    """Steps on the longest rows of the data first, which are returned: what fits them fits the run."""
    size = bench.config.hyperparams.batch_size
    lengths = np.asarray(bench.tokens.cache.lengths)
    groups = heaviest(bench.plan, lengths, size)[:LONGEST_STEPS]
    found = []
    if bench.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    try:
        for rows in groups:
            found.append(bench.step(rows))
    except (torch.OutOfMemoryError, UpdateOutOfMemory, MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        longest = int(lengths[groups[len(found)]].max())
        raise Enough(
            "memory",
            f"Out of memory with the longest rows ({longest:,} tokens, micro-batch {size}). Nothing was changed, and the "
            "remaining checks were left out. Lower the micro-batch or the maximum length, switch gradient checkpointing on, "
            "or use LoRA.",
        ) from None
    if not np.all(np.isfinite(found)):
        raise Enough(
            "steps",
            f"The loss became NaN or infinite on the longest rows at the rate {bench.rate:.2g}. Nothing was changed, and the "
            "remaining checks were left out. Lower the rate or use fp32.",
        )
    report.add(
        "steps",
        "pass",
        f"{len(found)} optimiser steps on the longest rows: loss {found[0]:.3f} to {found[-1]:.3f}, all finite.",
    )
    return groups[0]


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: a GPU has an exception of its own for it, a processor's allocator says so in words."""
    if isinstance(error, (torch.OutOfMemoryError, UpdateOutOfMemory, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def loss_falls(report: Report, bench: Bench) -> bool:
    """One typical batch, trained again and again at the chosen rate, is learnt; a rate too high shows here.

    Returns whether it was learnt.
    """
    rows = bench.plan.micro_batches(1, bench.config.hyperparams.batch_size)[0]
    found = [bench.step(rows) for _ in range(REPEATED_STEPS)]
    # the steps before may have ruined the weights already: what counts is the loss that the model came with
    start = min(found[0], bench.first_loss)
    if not np.all(np.isfinite(found)) or found[-1] > MAY_RISE * start:
        last = f"{found[-1]:.3f}" if np.isfinite(found[-1]) else "NaN"
        raise Enough(
            "learns",
            f"The rate {bench.rate:.2g} is too high: the loss went from {start:.3f} to {last} in {bench.taken} steps. Nothing "
            "was changed, and the remaining checks were left out: weights that diverge prove nothing. Try a tenth of it.",
        )
    fall = 1 - found[-1] / found[0]
    text = (
        f"The loss of one batch trained {REPEATED_STEPS} times went from {found[0]:.3f} to {found[-1]:.3f} "
        f"(at least {MUST_FALL:.1%} lower is needed)."
    )
    if fall >= MUST_FALL:
        report.add("learns", "pass", text, f"−{fall:.1%}")
        return True
    still = len(bench.model.stepper.named) - len(moved(bench))
    report.add(
        "learns",
        "problem",
        f"Nothing is learnt. {text} {still:,} trained tensors are as they were. Nothing was changed on the disk. Raise the rate.",
        f"−{fall:.1%}",
    )
    return False


def moved(bench: Bench) -> list[str]:
    """Names of the trained tensors that are not what they were before the first step."""
    return [name for name, tensor in bench.model.stepper.named if not torch.equal(sample(tensor), bench.at_first[name])]


def everything_moves(report: Report, bench: Bench) -> None:
    """The steps changed what is to be trained: seen in the tensors, not in which of them ask for a gradient."""
    named = bench.model.stepper.named
    changed = moved(bench)
    still = sorted({name for name, _ in named} - set(changed))
    figure = f"{len(changed):,} of {len(named):,}"
    if len(changed) >= MUST_MOVE * len(named):
        report.add("trained", "pass", f"{figure} trained tensors changed in {bench.taken} steps.", figure)
        return
    report.add(
        "trained",
        "problem",
        f"Only {figure} trained tensors changed in {bench.taken} steps; '{still[0]}' is as it was. Nothing was changed on the "
        "disk. Raise the rate; if it is not that, choose other lora.target_modules or full training.",
        figure,
    )


def forecast(report: Report, bench: Bench) -> None:
    """Seconds a step at the plan's mean length, and the whole run's time; the clock of the steps beside the wall's."""
    h = bench.config.hyperparams
    typical = slice(LONGEST_STEPS, LONGEST_STEPS + REPEATED_STEPS)
    seconds_a_token = float(np.median(np.array(bench.seconds[typical]) / np.array(bench.tokens_done[typical])))
    lengths = np.asarray(bench.tokens.cache.lengths)
    tokens_a_step = float(lengths[bench.plan.rows].sum()) / max(1, bench.plan.total_steps)
    seconds = seconds_a_token * tokens_a_step
    whole = seconds * bench.plan.total_steps
    marks, wall = sum(bench.seconds), sum(bench.by_the_wall)
    if abs(marks - wall) > MARKS_MAY_MISS * wall + MARKS_SLACK_S or seconds <= 0:
        report.add(
            "speed",
            "problem",
            f"The steps' own clock says {marks:.2f} s where {wall:.2f} s passed: no time of the run can be told from it. "
            "Training is not touched by it. Restart the server; if it stays so, report the device and its driver.",
        )
        return
    report.fact(
        seconds_a_step=seconds,
        forecast_s=whole,
        total_steps=bench.plan.total_steps,
        tokens_a_step=tokens_a_step,
    )
    text = f"About {seconds:.2f} s a step ({h.rows_per_step} rows); the whole run about {whole_words(whole)}."
    report.add("speed", "pass", text, f"{tokens_a_step / seconds:,.0f} tok/s")


def whole_words(seconds: float) -> str:
    """ "6 h 40 min", "1 min": a duration for a person, at least a minute."""
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{max(1, minutes)} min"
