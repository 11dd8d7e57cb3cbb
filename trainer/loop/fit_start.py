"""The forecast at a run's start and its measurement at the end: said in the log, kept in the snapshot and in the history."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from trainer import clock, process_peak
from trainer.data.packing import Plan
from trainer.files import write_json
from trainer.fit_history import Measured
from trainer.launch import fingerprint
from trainer.loop import fit as fits
from trainer.loop.fit import Fit
from trainer.loop.memory import Work, memory_text
from trainer.loop.prepare import Model, Tokens
from trainer.loop.smoke_steps import heaviest
from trainer.report import Report
from trainer.schema import Config

MALLOC_HOLDS = 1.6
"""Up to so many times the forecast glibc's malloc was seen to hold where it keeps freed blocks of a training."""

if TYPE_CHECKING:
    from trainer.loop.ready import Ready, Surroundings


def fit_before_start(
    around: Surroundings, config: Config, model: Model, tokens: Tokens, plan: Plan, groups: list[np.ndarray]
) -> Fit | None:
    """The run's forecast and its micro-batch, said in the log; None where nothing is kept (no workspace, several processes).

    An automatic micro-batch is settled once, in the run's first life, and stands in its snapshot from then on.
    """
    if around.root is None:
        return None
    snapshot = around.run.snapshot()
    settled = snapshot.get("micro_batch")
    h = config.hyperparams
    automatic = h.auto_micro_batch and settled is None
    sizes = fits.divisors(h.rows_per_step, 1024) if automatic else [int((settled or {}).get("rows", h.batch_size))]
    lengths, labels = np.asarray(tokens.cache.lengths), np.asarray(tokens.cache.label_counts)
    held_out = np.asarray(tokens.held_out.lengths)
    most = max((int(held_out[group].sum()) for group in groups), default=0)
    works = {size: fits.work_of(config, plan, lengths, labels, most, size) for size in sizes}
    device = "cpu" if around.device == "cpu" else str(snapshot["device"]["name"])
    room = fits.room_gib(around.device)
    shape = fits.sizes_of(model.loaded.model, model.trained)
    key = snapshot["model"]["fingerprint"]
    chosen = config if automatic else fits.with_micro_batch(config, sizes[0])
    found = fits.fit_of(chosen, shape, works, around.root, key, device, around.before_gib, room)
    if automatic:
        rows = {"rows": found.packs_each, "accumulation": h.rows_per_step // found.packs_each}
        write_json(around.run.config, snapshot | {"micro_batch": rows})
        around.events.append("micro_batch", **rows)
        unit = "packs" if h.packing else "rows"
        around.say(
            f"Micro-batch {found.packs_each}, chosen by itself: the largest that fits in {memory_text(room)} still free. "
            f"Accumulation {rows['accumulation']}; each step trains the same {h.rows_per_step} {unit}."
        )
    plain = found.forecast
    by = f", {plain.words}" if plain.words else ""
    around.say(
        f"Memory: about {memory_text(plain.total_gib)} at the peak (±{100 * plain.error:.0f} %{by}), in the {plain.moment}."
    )
    _give_back_where_short(around, found, room)
    return found


def _give_back_where_short(around: Surroundings, fit: Fit, room: float) -> None:
    """On a processor with little memory to spare, trade time for it: with room, malloc keeps what it has and is faster."""
    static = sum(fit.forecast.parts[name] for name in ("weights", "optimiser states", "libraries"))
    if around.device != "cpu" or fit.forecast.total_gib * MALLOC_HOLDS - static <= room:
        return
    if process_peak.give_large_blocks_back():
        around.say("Memory is short: what a step frees goes back at once, which costs up to a quarter more time.")


def fit_of_smoke(
    config: Config, model: Model, tokens: Tokens, plan: Plan, root: Path, device: str, before_gib: float
) -> Fit:
    """The forecast of a smoke test's first steps: its longest rows in one micro-batch, as `smoke_steps.heaviest` puts them."""
    h = config.hyperparams
    lengths, labels = np.asarray(tokens.cache.lengths), np.asarray(tokens.cache.label_counts)
    works = {}
    for size in fits.divisors(h.rows_per_step, 1024) if h.auto_micro_batch else [h.batch_size]:
        rows = heaviest(plan, lengths, size)[0]
        works[size] = Work(int(lengths[rows].sum()), int(labels[rows].sum()), int(lengths[rows].max()))
    shape, key = fits.sizes_of(model.loaded.model, model.trained), fingerprint(Path(config.model_path))
    room = fits.room_gib("cpu" if device == "cpu" else model.stepper.device)
    return fits.fit_of(config, shape, works, root, key, device, before_gib, room)


def remember_smoke(report: Report, fit: Fit, root: Path, smoke_id: str) -> Measured | None:
    """Keep the peak of the longest rows' steps, saves left out, tell the report, and return it."""
    measured = fits.remember(root, fit, "smoke", smoke_id, clock.now(), steps_alone=True)
    if measured is not None:
        report.fact(peak_gib=measured.measured_gib, forecast_gib=measured.forecast_gib)
    return measured


def remember_run(around: Surroundings, ready: Ready) -> None:
    """Keep the measured peak of a run that went as it was planned; one that went down the ladder measures something else."""
    fit, progress = ready.fit, ready.progress
    if fit is None or around.root is None or progress.step == 0 or progress.packs_each != fit.packs_each:
        return
    measured = fits.remember(around.root, fit, "run", around.run.run_id, clock.now())
    if measured is not None:
        around.events.append(
            "memory", forecast_gib=round(fit.forecast.total_gib, 3), measured_gib=round(measured.measured_gib, 3),
            error=fit.forecast.error, moment=fit.forecast.moment,
        )  # fmt: skip
