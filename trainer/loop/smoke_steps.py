"""Checks of the smoke test that take optimiser steps: the longest rows, a batch that must be learnt, the run's forecast."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel

from trainer import checkpoint
from trainer.data.packing import Plan
from trainer.disk_need import file_size
from trainer.loop import optim
from trainer.loop.prepare import Left, Model, Tokens
from trainer.machine import GIB
from trainer.refusal import Refusal
from trainer.report import Report
from trainer.schema import Config

LONGEST_STEPS, REPEATED_STEPS = 3, 8
MUST_FALL = 0.005  # of the first loss of a repeated batch
MAY_RISE = 1.2


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
        self.taken = 0
        self.seconds: list[float] = []
        self.tokens_done: list[int] = []
        self.peak_gib = 0.0
        self.first_loss = float("nan")

    def step(self, rows: np.ndarray, number: int | None = None) -> float:
        """One optimiser step on one micro-batch; returns its loss. Raises Left when a stop was asked for."""
        if self.interrupt():
            raise Left()
        record = self.model.stepper.step(number or self.taken + 1, [rows], self.tokens.cache, self.rate)
        assert record is not None
        loss, _, bad, _ = record.arrive()
        if self.taken == 0:
            self.first_loss = loss
        self.taken += 1
        self.seconds.append(sum(record.marks.seconds()) + record.data_s)
        self.tokens_done.append(record.tokens)
        if self.device.startswith("cuda"):
            self.peak_gib = torch.cuda.max_memory_allocated() / GIB
        return float("nan") if bad else loss


def heaviest(plan: Plan, lengths: np.ndarray, size: int) -> list[np.ndarray]:
    """Micro-batches of `size` packs (rows, unpacked), made of the longest of the plan, the heaviest first."""
    starts = plan.pack_starts
    tokens = np.add.reduceat(lengths[plan.rows], starts[:-1])
    _, first_of_each = np.unique(plan.rows[starts[:-1]], return_index=True)  # later epochs bring the same rows again
    order = first_of_each[np.argsort(-tokens[first_of_each], kind="stable")]
    packs = [plan.rows[starts[pack] : starts[pack + 1]] for pack in order[: LONGEST_STEPS * size]]
    return [np.concatenate(packs[at : at + size]) for at in range(0, len(packs), size)]


def longest_rows(report: Report, bench: Bench) -> None:
    """Steps on the longest rows of the data first: what fits them fits the run."""
    size = bench.config.hyperparams.batch_size
    groups = heaviest(bench.plan, np.asarray(bench.tokens.cache.lengths), size)[:LONGEST_STEPS]
    found = []
    if bench.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    for rows in groups:
        found.append(bench.step(rows))
    if not np.all(np.isfinite(found)):
        _diverged(bench)
    longest = int(np.asarray(bench.tokens.cache.lengths)[groups[0]].max())
    if bench.device.startswith("cuda"):
        report.add(
            "memory",
            "pass",
            f"Peak memory {bench.peak_gib:.1f} GiB at the longest rows ({longest:,} tokens, micro-batch {size}).",
            f"{bench.peak_gib:.1f} GiB",
        )
        report.fact(peak_gib=bench.peak_gib)
    else:
        report.add(
            "memory",
            "not_possible",
            f"Device memory: not possible on a CPU. The longest rows ({longest:,} tokens) trained.",
        )
    report.add(
        "steps",
        "pass",
        f"{len(found)} optimiser steps on the longest rows: loss {found[0]:.3f} to {found[-1]:.3f}, all finite.",
    )


def loss_falls(report: Report, bench: Bench) -> None:
    """One typical batch, trained again and again at the chosen rate, is learnt; a rate too high shows here."""
    rows = bench.plan.micro_batches(1, bench.config.hyperparams.batch_size)[0]
    found = [bench.step(rows) for _ in range(REPEATED_STEPS)]
    # the steps before may have ruined the weights already: what counts is the loss that the model came with
    start = min(found[0], bench.first_loss)
    if not np.all(np.isfinite(found)) or found[-1] > MAY_RISE * start:
        last = found[-1] if np.isfinite(found[-1]) else "NaN"
        report.add(
            "learns",
            "problem",
            f"The rate {bench.rate:.2g} is too high: the loss went from {start:.3f} to "
            + (f"{last:.3f}" if not isinstance(last, str) else last)
            + f" in {bench.taken} steps. Try a tenth of it.",
        )
        raise Refusal("The remaining checks were left out: weights that diverge prove nothing.")
    fall = 1 - found[-1] / found[0]
    text = (
        f"The loss of one batch trained {REPEATED_STEPS} times went from {found[0]:.3f} to {found[-1]:.3f} "
        f"(at least {MUST_FALL:.1%} lower is needed)."
    )
    report.add("learns", "pass" if fall >= MUST_FALL else "problem", text, f"−{fall:.1%}")


def _diverged(bench: Bench) -> None:
    raise Refusal(
        f"The loss became NaN or infinite on the longest rows at the rate {bench.rate:.2g}. Lower the rate or use fp32.",
        "hyperparams.learning_rate",
    )


def forecast(report: Report, bench: Bench, folder: Path) -> None:
    """Seconds a step at the plan's mean length, the whole run's time, and the disk it needs."""
    h = bench.config.hyperparams
    typical = slice(LONGEST_STEPS, LONGEST_STEPS + REPEATED_STEPS)
    seconds_a_token = float(np.median(np.array(bench.seconds[typical]) / np.array(bench.tokens_done[typical])))
    lengths = np.asarray(bench.tokens.cache.lengths)
    tokens_a_step = float(lengths[bench.plan.rows].sum()) / max(1, bench.plan.total_steps)
    seconds = seconds_a_token * tokens_a_step
    whole = seconds * bench.plan.total_steps
    report.fact(
        seconds_a_step=seconds,
        forecast_s=whole,
        total_steps=bench.plan.total_steps,
        tokens_a_step=tokens_a_step,
    )
    hours, minutes = divmod(round(whole / 60), 60)
    text = f"About {seconds:.2f} s a step ({h.rows_per_step} rows); the whole run about " + (
        f"{hours} h {minutes} min." if hours else f"{max(1, minutes)} min."
    )
    report.add("speed", "pass", text, f"{tokens_a_step / seconds:,.0f} tok/s")
    size = report_size(bench, folder)
    free = checkpoint.free_bytes(folder)
    enough = free > size
    report.add(
        "disk",
        "pass" if enough else "problem",
        f"Disk: checkpoints need up to {file_size(size)}, {file_size(free)} is free.",
        file_size(size),
    )


def report_size(bench: Bench, folder: Path) -> int:
    """Bytes of the most checkpoints that exist at once: those kept, the best, and one being written."""
    stepper, trained = bench.model.stepper, bench.model.trained
    whole = trained.parameters() if not isinstance(trained, PeftModel) else [p for _, p in stepper.named]
    weights = sum(parameter.nbytes for parameter in whole)
    states = sum(state.nbytes for state in optim.state_by_name(stepper.optimizer, stepper.named).values())
    return (weights + states) * (bench.config.output.save_total_limit + 2)
