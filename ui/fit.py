"""Whether a run fits: the forecast of `trainer.loop.memory` beside what is free, and what would make it fit.

Pure but for the history of measurements in the workspace. Called by `ui/facts.py`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from trainer import fit_history, process_peak
from trainer.config import Config, parse_value
from trainer.fit_history import Calibration
from trainer.launch import fingerprint
from trainer.loop.memory import LIBRARIES_GIB, Forecast, Sizes, Work, forecast
from trainer.machine import Machine
from trainer.packages import has_bitsandbytes
from trainer.refusal import Refusal
from ui.checks import stamp
from ui.gate_facts import DataFact, MemoryFact, Offer

MOST_OFFERS = 6
BATCH, ACCUMULATION, LENGTH = "hyperparams.batch_size", "hyperparams.gradient_accumulation", "hyperparams.max_length"


@dataclass(frozen=True)
class Setting:
    """What a forecast is made for besides the settings: model, data, device, steps, and what was measured here before."""

    sizes: Sizes
    data: DataFact | None
    on_gpu: bool
    steps: int | None
    known: Calibration
    free_gib: float

    def of(self, config: Config) -> Forecast:
        """The forecast for these settings; an automatic micro-batch is the one that would be chosen."""
        return forecast(automatic(config, self), self.sizes, work_about(config, self), self.on_gpu, self.known)

    def fits(self, found: Forecast) -> bool:
        """Whether it fits even where the forecast is as low as its stated error allows."""
        return found.total_gib * (1 + found.error) <= self.free_gib


def memory_fact(
    config: Config,
    report: dict[str, Any] | None,
    data: DataFact | None,
    here: Machine,
    root: Path | None = None,
    steps: int | None = None,
) -> MemoryFact | None:
    """The forecast beside what is free on the device that would train; None where the model's sizes are not known."""
    sizes = Sizes.of(report["facts"]) if report else None
    if sizes is None:
        return None
    free, total = (here.gpu.free_gib, here.gpu.total_gib) if here.gpu else (_free_here(here), here.total_gib)
    known = calibration(root, config.model_path, here.device) if root is not None else Calibration()
    setting = Setting(sizes, data, here.gpu is not None, steps, known, free)
    found = setting.of(config)
    offers = () if setting.fits(found) else offers_of(config, setting, found)
    size = automatic(config, setting).hyperparams.batch_size if config.hyperparams.auto_micro_batch else None
    return MemoryFact(
        found.total_gib, free, total, found.parts["weights"], tuple(found.parts.items()), offers, found.error,
        moment=found.moment, words=found.words, micro_batch=size,
        faster=faster_ways(config, setting, found),
    )  # fmt: skip


def _free_here(here: Machine) -> float:
    """Free memory of a processor: what this very process holds of the libraries need not be had again."""
    return here.free_gib + min(process_peak.now_gib() or 0.0, LIBRARIES_GIB["cpu"])


def calibration(root: Path, model_path: str, device: str) -> Calibration:
    """What was measured of this model on this device before."""
    path = Path(model_path)
    try:
        key = _fingerprint(path, repr(stamp(path)))
    except (OSError, Refusal, ValueError):
        return Calibration()
    return fit_history.calibrate(fit_history.read(root, key, device))


@lru_cache(maxsize=32)
def _fingerprint(path: Path, files: str) -> str:
    """The folder's fingerprint, read again only when a file of it has changed."""
    return fingerprint(path)


def work_about(config: Config, setting: Setting) -> Work:
    """What is computed at once where the longest rows meet, as far as the data is known."""
    config = automatic(config, setting)
    h, data = config.hyperparams, setting.data
    longest = min(data.longest, h.max_length) if data is not None and data.longest else h.max_length
    length = h.max_length if h.packing else longest
    share = data.label_share if data is not None and data.label_share is not None else 1.0
    held_out = 0
    if config.eval.eval_strategy != "no" and (config.data.validation_split or config.data.validation_dataset_path):
        held_out = max(longest, min(2 * h.max_length, config.data.validation_max_rows * longest))
    saves = 0 < config.output.save_steps < (setting.steps or math.inf)
    tokens = h.batch_size * length
    return Work(tokens, math.ceil(tokens * share), longest, h.gradient_accumulation, held_out, saves)


def automatic(config: Config, setting: Setting) -> Config:
    """The settings with the micro-batch that a run would choose by itself, where it is to."""
    h = config.hyperparams
    if not h.auto_micro_batch:
        return config
    plain = config.model_copy(update={"hyperparams": h.model_copy(update={"auto_micro_batch": False})})
    sizes = [size for size in range(min(h.rows_per_step, 1024), 0, -1) if h.rows_per_step % size == 0]
    made = (_with_batch(plain, size) for size in sizes)
    return next((each for each in made if setting.fits(setting.of(each))), _with_batch(plain, 1))


def _with_batch(config: Config, size: int) -> Config:
    h = config.hyperparams
    changed = {"batch_size": size, "gradient_accumulation": h.rows_per_step // size}
    return config.model_copy(update={"hyperparams": h.model_copy(update=changed)})


@dataclass(frozen=True)
class _Way:
    """One change: its kind (two of a kind do not go together), its words, what it sets, and what it costs."""

    kind: str
    text: str
    values: dict[str, str]
    cost: str


def offers_of(config: Config, setting: Setting, now: Forecast) -> tuple[Offer, ...]:
    """Changes after which the run fits, the cheapest first: single ones, and where none is enough, pairs of them."""
    ways = list(_ways(config, setting))
    found = _those_that_fit(config, setting, now, [(way,) for way in ways])
    if not found:
        pairs = [pair for pair in itertools.combinations(ways, 2) if pair[0].kind != pair[1].kind]
        found = _those_that_fit(config, setting, now, pairs)
    return tuple(found[:MOST_OFFERS])


def _those_that_fit(config: Config, setting: Setting, now: Forecast, candidates: list[tuple[_Way, ...]]) -> list[Offer]:
    offers, kinds = [], set()
    for ways in candidates:
        kind = tuple(way.kind for way in ways)
        if kind in kinds:  # a gentler change of the same kind is there already
            continue
        values = {key: text for way in ways for key, text in way.values.items()}
        after = setting.of(_changed(config, values))
        if setting.fits(after) and after.total_gib < now.total_gib:
            kinds.add(kind)
            cost = ", ".join(dict.fromkeys(way.cost for way in ways if way.cost))
            offers.append(Offer(" + ".join(way.text for way in ways), values, now.total_gib - after.total_gib, cost))
    return offers


def _changed(config: Config, values: dict[str, str]) -> Config:
    """The settings with some hyperparameters changed, without judging all others again: a hundred ways are tried at once."""
    update = {key.removeprefix("hyperparams."): parse_value(key, text) for key, text in values.items()}
    return config.model_copy(update={"hyperparams": config.hyperparams.model_copy(update=update)})


def _ways(config: Config, setting: Setting) -> Iterator[_Way]:
    """All changes in question, the cheapest for time and result first; of a kind the gentlest first."""
    h = config.hyperparams
    if not h.auto_micro_batch:
        for size in range(h.batch_size - 1, 0, -1):
            if h.rows_per_step % size == 0:
                values = {BATCH: str(size), ACCUMULATION: str(h.rows_per_step // size)}
                yield _Way("batch", f"Micro-batch {h.batch_size}→{size}", values, "same rows a step")
    on = "hyperparams.use_gradient_checkpointing"
    if not h.use_gradient_checkpointing:
        yield _Way("checkpointing", "Checkpointing on", {on: "true"}, "a quarter slower")
    elif h.gradient_checkpointing_policy == "selective":
        values = {"hyperparams.gradient_checkpointing_policy": "full"}
        yield _Way("checkpointing", "Full checkpointing", values, "a little slower")
    yield from _shorter(config, setting.data)
    if h.optimizer == "adamw" and has_bitsandbytes():
        yield _Way("states", "8-bit states", {"hyperparams.optimizer": "adamw_8bit"}, "approximate")
    if h.method == "full":
        yield _Way("method", "LoRA", {"hyperparams.method": "lora"}, "trains added matrices alone")
    if h.method != "qlora" and has_bitsandbytes():
        slow = "slower" if setting.on_gpu else "much slower on a processor"
        yield _Way("method", "QLoRA", {"hyperparams.method": "qlora"}, slow)


def faster_ways(config: Config, setting: Setting, now: Forecast) -> tuple[Offer, ...]:
    """What saves memory that is there: the run fits without it, and is faster or more exact."""
    h = config.hyperparams
    ways = []
    if h.use_gradient_checkpointing:
        off = {"hyperparams.use_gradient_checkpointing": "false"}
        ways.append(_Way("checkpointing", "Checkpointing off", off, "about a fifth faster"))
    if h.method == "qlora":
        ways.append(
            _Way("method", "LoRA", {"hyperparams.method": "lora"}, "faster, and the base is not rounded to 4 bits")
        )
    found = []
    for way in ways if setting.fits(now) else ():
        after = setting.of(_changed(config, way.values))
        if setting.fits(after):
            found.append(Offer(way.text, way.values, now.total_gib - after.total_gib, way.cost))
    return tuple(found)


def _shorter(config: Config, data: DataFact | None) -> Iterator[_Way]:
    """Shorter maximum lengths, each with the number of rows it would cut."""
    length = config.hyperparams.max_length
    if data is not None and data.longest:
        length = min(length, data.longest)
    size = 1 << max(3, (length - 1).bit_length() - 1)
    while size >= 8 and size < length:
        cut = rows_over(data, size)
        cost = "" if cut is None else f"cuts about {cut:,} rows" if cut else "cuts no row"
        yield _Way("length", f"Length {size:,}", {LENGTH: str(size)}, cost)
        size //= 2


def rows_over(data: DataFact | None, tokens: int) -> int | None:
    """How many rows are longer than this, about, by the measured sample; None where nothing was measured."""
    if data is None or not data.lengths:
        return None
    return round(sum(rows * _share_over(low, high, tokens) for low, high, rows in data.lengths))


def _share_over(low: float, high: float, tokens: int) -> float:
    """The share of a bin from `low` to `high` that lies over `tokens`, its rows being spread evenly."""
    return min(1.0, max(0.0, (high - tokens) / (high - low)))
