"""Suggested settings for this model, data and device, each with its reason. Pure; called by `ui/routes_train.py`.

Settings that a person has set are left alone. The rules are few and plain on purpose: each one can be said in a
sentence, and that sentence is shown.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Set
from dataclasses import dataclass
from typing import Any

from trainer.config import Config, as_text, get, merged, parse_value, resolve, unflatten
from trainer.config import field as setting
from ui import numbers
from ui.derived import Plan, plan_of
from ui.gate_facts import Facts
from ui.train_actions import METHOD_RATES, RATE

FEW_ROWS = 500
STEPS_AN_EPOCH = 10
CHECKS_A_RUN = 10
LENGTH_MULTIPLE = 64
ROOMY = 0.6
"""Of the free memory: a run that needs less may compute more rows at once."""


@dataclass(frozen=True)
class Suggestion:
    """One value to take over: the setting, what it is now, the text to set, and why."""

    key: str
    before: Any
    text: str
    reason: str


def suggest(config: Config, chosen: Set[str], facts: Facts) -> list[Suggestion]:
    """Suggestions for every setting not in `chosen`; a value that is the same already is left out."""
    found: dict[str, Suggestion] = {}

    def take(key: str, value: Any, text: str, reason: str) -> None:
        before = get(config, key)
        if key not in chosen and key not in found and value != before:
            found[key] = Suggestion(key, before, text, reason)

    # first of all that it fits: a change of micro-batch and accumulation belongs together
    for key, text, reason in _memory(facts, chosen):
        take(key, parse_value(key, text), text, reason)
    rules = (_rate(config), _length(config, facts), _size(config, _plan(config, facts)), _precision(config, facts))
    for key, value, reason in (entry for rule in (*rules, _room(config, facts)) for entry in rule):
        take(key, value, as_text(setting(key), value), reason)
    # how often to save and check follows from the steps that the run will have with what was suggested so far
    taken = {s.key: parse_value(s.key, s.text) for s in found.values()}
    later = resolve(merged(config.model_dump(), unflatten(taken)))
    for key, value, reason in _rhythm(later, _plan(later, facts)):
        take(key, value, as_text(setting(key), value), reason)
    return list(found.values())


def _plan(config: Config, facts: Facts) -> Plan:
    usable = facts.data.usable if facts.data and facts.data.state == "ready" else None
    return plan_of(config, usable, facts.data.tokens if facts.data else None, bool(config.data.validation_dataset_path))


Rule = Iterator[tuple[str, Any, str]]


def _rate(config: Config) -> Rule:
    method = config.hyperparams.method
    usual = METHOD_RATES[method]
    ratio = config.hyperparams.learning_rate / usual
    if not 1 / 5 < ratio < 5:
        word = {"full": "full training", "lora": "LoRA", "qlora": "QLoRA"}[method]
        yield RATE, usual, f"{word[0].upper()}{word[1:]} usually wants about {as_text(setting(RATE), usual)}."


def _length(config: Config, facts: Facts) -> Rule:
    data, key = facts.data, "hyperparams.max_length"
    if data is None or not data.longest:
        return
    enough = _rounded(data.longest)
    now = config.hyperparams.max_length
    if enough <= now // 2:
        yield (
            key,
            max(enough, 8),
            f"The longest row has {data.longest:,} tokens; nothing is cut, less memory is needed.",
        )
    elif data.longest > now and data.p99 and _rounded(data.p99) < now // 2:
        yield key, max(_rounded(data.p99), 8), f"99 % of the rows have at most {data.p99:,} tokens."


def _rounded(tokens: int) -> int:
    return math.ceil(tokens / LENGTH_MULTIPLE) * LENGTH_MULTIPLE


def _size(config: Config, plan: Plan) -> Rule:
    rows, h = plan.trained_rows, config.hyperparams
    if not rows or h.max_steps is not None:
        return
    if rows < FEW_ROWS and h.num_epochs == 1:
        yield "hyperparams.num_epochs", 3.0, f"With {rows:,} rows one pass is short."
    wanted = max(1, rows // STEPS_AN_EPOCH)
    if h.rows_per_step > wanted and h.gradient_accumulation > 1:
        smaller = max(1, wanted // h.batch_size)
        few = math.ceil(rows / h.rows_per_step)
        word = "step" if few == 1 else "steps"
        reason = f"{rows:,} rows give only {few} {word} an epoch at {h.rows_per_step:,} rows a step."
        yield "hyperparams.gradient_accumulation", smaller, reason


def _rhythm(config: Config, plan: Plan) -> Rule:
    if not plan.steps:
        return
    steps, h = plan.steps, config.hyperparams
    if h.warmup_steps >= steps or (h.warmup_steps > 0 and h.warmup_steps > steps // 3):
        yield "hyperparams.warmup_steps", steps // 10, f"A tenth of the {steps:,} steps."
    every = max(1, steps // CHECKS_A_RUN)
    if config.eval.eval_strategy == "steps" and not steps / 100 <= config.eval.eval_steps <= steps / 2:
        yield "eval.eval_steps", every, f"About {min(CHECKS_A_RUN, steps)} held-out checks in {steps:,} steps."
    save = config.output.save_steps
    if save > 0 and not steps / 100 <= save <= steps / 2:
        yield "output.save_steps", every, f"A stop loses at most {every:,} of {steps:,} steps."


def _precision(config: Config, facts: Facts) -> Rule:
    key, now = "hyperparams.fp_precision", config.hyperparams.fp_precision
    if facts.on_gpu and now == "fp32":
        yield key, "auto", "16-bit computation with fp32 weights is faster on this GPU; the updates stay exact."
    elif not facts.on_gpu and facts.device_name and now == "fp16":
        yield key, "auto", "Processors are slow at fp16, and its gradients overflow; auto takes fp32 here."


def _room(config: Config, facts: Facts) -> Rule:
    """What free memory allows: larger pieces of the same step."""
    memory, h = facts.memory, config.hyperparams
    if memory is None or not memory.fits or h.auto_micro_batch or h.gradient_accumulation == 1:
        return
    if memory.needs_gib <= ROOMY * memory.free_gib:
        used = f"{numbers.memory(memory.needs_gib)} of {numbers.memory(memory.free_gib)}"
        reason = (
            f"Only about {used} would be used: larger pieces of the same {h.rows_per_step:,} rows a step are faster."
        )
        yield "hyperparams.auto_micro_batch", True, reason


def _memory(facts: Facts, chosen: Set[str]) -> Iterator[tuple[str, str, str]]:
    memory = facts.memory
    if memory is None:
        return
    if memory.fits:
        for offer in memory.faster:
            for key, text in offer.values.items():
                yield key, text, f"It fits without: about {-offer.saves_gib:.1f} GiB more, {offer.cost}."
        return
    offer = next((offer for offer in memory.offers if not chosen & offer.values.keys()), None)
    if offer is not None:
        cost = f", {offer.cost}" if offer.cost else ""
        for key, text in offer.values.items():
            yield key, text, f"Makes it fit: {offer.text}, about {offer.saves_gib:.1f} GiB less{cost}."
