"""A run's memory beside its forecast: what the real plan computes at once, the automatic micro-batch, and what it came to.

Called by `trainer.loop.ready` before the first step and by `trainer.session` after the last.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from transformers import PreTrainedModel

from trainer import fit_history, process_peak
from trainer.data.packing import Plan
from trainer.fit_history import Measured
from trainer.loop.memory import LIBRARIES_GIB, Forecast, Sizes, Work, forecast
from trainer.machine import GIB
from trainer.schema import Config


@dataclass(frozen=True)
class Fit:
    """The forecast that a run was begun with, for what it was made, and the memory that was taken before anything was loaded."""

    forecast: Forecast
    work: Work
    packs_each: int
    model: str  # fingerprint
    device: str
    before_gib: float


def sizes_of(model: PreTrainedModel, trained: torch.nn.Module) -> Sizes:
    """The sizes of a model that is loaded: its weights counted, its shape from its config."""
    config = model.config.get_text_config()
    heads = int(getattr(config, "num_attention_heads", 0) or 1)
    hidden = int(config.hidden_size)
    head_size = int(getattr(config, "head_dim", None) or hidden // heads)
    own = [parameter for parameter in trained.parameters() if parameter.requires_grad]
    count = sum(_elements(parameter) for parameter in model.parameters())
    is_adapter = trained is not model
    adapter = sum(parameter.numel() for parameter in own) if is_adapter else None
    embedding: Any = model.get_input_embeddings().weight
    head: Any = model.get_output_embeddings()
    return Sizes(
        parameters=count - (adapter or 0),
        hidden=hidden,
        layers=int(config.num_hidden_layers),
        vocabulary=int(embedding.shape[0]),
        inner=int(getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * hidden),
        attention=heads * head_size,
        keys=int(getattr(config, "num_key_value_heads", None) or heads) * head_size,
        heads=heads,
        model_type=str(config.model_type),
        tied=head is not None and head.weight is embedding,
        adapter=adapter,
    )


def _elements(parameter: torch.nn.Parameter) -> int:
    """Weights in a parameter; bitsandbytes packs two of 4 bits into one byte."""
    return parameter.numel() * (2 if type(parameter).__name__ == "Params4bit" else 1)


def work_of(
    config: Config, plan: Plan, lengths: np.ndarray, labels: np.ndarray, held_out_tokens: int, packs_each: int
) -> Work:
    """What is computed at once where the plan is heaviest. `lengths` and `labels` (all rows,): tokens and trained ones."""
    starts, rows = plan.pack_starts[:-1], plan.rows
    first, end = plan.step_packs[:, 0], plan.step_packs[:, 1]
    within = np.arange(len(starts)) - np.repeat(first, end - first)
    begins = np.flatnonzero(within % packs_each == 0)
    longest = int(lengths[rows].max())
    save = config.output.save_steps
    return Work(
        tokens=int(np.add.reduceat(np.add.reduceat(lengths[rows], starts), begins).max()),
        labels=int(np.add.reduceat(np.add.reduceat(labels[rows], starts), begins).max()),
        longest=longest,
        micro_batches=int(-(-(end - first).max() // packs_each)),
        held_out_tokens=held_out_tokens,
        saves_between=0 < save < plan.total_steps,
    )


def room_gib(device: str) -> float:
    """Memory that is still to be had on the device now, GiB, what torch's allocator holds and does not use included."""
    if device == "cpu":
        return psutil.virtual_memory().available / GIB
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return free / GIB


def divisors(rows: int, most: int) -> list[int]:
    """Micro-batches that leave the rows of a step as they are, the largest first."""
    return [size for size in range(min(rows, most), 0, -1) if rows % size == 0]


def largest_that_fits(forecasts: dict[int, Forecast], room: float) -> int:
    """The largest micro-batch whose forecast, with its error on top, leaves the `room` there is; 1 where none does.

    Weights, states and libraries are taken already by the time this is asked.
    """
    for size in sorted(forecasts, reverse=True):
        found = forecasts[size]
        taken = sum(found.parts[name] for name in ("weights", "optimiser states", "libraries"))
        if found.total_gib * (1 + found.error) - taken <= room:
            return size
    return 1


def fit_of(
    config: Config,
    sizes: Sizes,
    works: dict[int, Work],
    root: Path,
    model: str,
    device: str,
    before_gib: float,
    room: float,
) -> Fit:
    """The forecast of the run, and its micro-batch: the settings' own, or with `auto_micro_batch` the largest that fits.

    `works` holds what is computed for each micro-batch in question; `model` is the folder's fingerprint.
    """
    known = fit_history.calibrate(fit_history.read(root, model, device))
    found = {size: forecast(config, sizes, work, device != "cpu", known) for size, work in works.items()}
    size = largest_that_fits(found, room) if config.hyperparams.auto_micro_batch else config.hyperparams.batch_size
    return Fit(found[size], works[size], size, model, device, before_gib)


def measured_gib(device: str, before_gib: float) -> float | None:
    """The peak since the run began, as the forecast counts it: libraries besides what grew; None where nothing tells."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated() / GIB + LIBRARIES_GIB["gpu"]
    peak = process_peak.peak_gib()
    return None if peak is None or before_gib <= 0 else peak - before_gib + LIBRARIES_BEFORE_GIB


LIBRARIES_BEFORE_GIB = 0.35
"""Of LIBRARIES_GIB, what is resident before a model is loaded; the rest comes with the first step."""


def remember(root: Path, fit: Fit, kind: str, name: str, now_s: float, *, steps_alone: bool = False) -> Measured | None:
    """Append what was measured to the workspace's history; returns it, None where there is no figure."""
    peak = measured_gib("cpu" if fit.device == "cpu" else "gpu", fit.before_gib)
    if peak is None:
        return None
    plain = fit.forecast
    fixed, moving = plain.fixed_gib, plain.moving_gib
    if steps_alone:
        fixed, moving = plain.step_fixed_gib, plain.step_moving_gib
    entry = Measured(kind, name, now_s, fit.model, fit.device, peak, fixed, moving)
    fit_history.append(root, entry)
    return entry


def with_micro_batch(config: Config, size: int) -> Config:
    """The settings with another micro-batch and the same rows per step."""
    h = config.hyperparams
    changed = {"batch_size": size, "gradient_accumulation": h.rows_per_step // size}
    return replace_hyperparams(config, changed)


def replace_hyperparams(config: Config, changed: dict[str, int]) -> Config:
    """The settings with some hyperparameters changed."""
    return config.model_copy(update={"hyperparams": config.hyperparams.model_copy(update=changed)})
