"""Whether a run fits: the estimate of `trainer.loop.memory` beside what is free, and what would make it fit.

Pure; called by `ui/facts.py`.
"""

from __future__ import annotations

from typing import Any

from trainer.config import Config, merged, resolve, unflatten
from trainer.loop.memory import Sizes, parts
from trainer.machine import Machine
from trainer.packages import has_bitsandbytes
from ui.gate_facts import DataFact, MemoryFact, Offer

SPREAD = 0.25
"""How far off the estimate may be; the smoke test measures the peak."""


def memory_fact(
    config: Config, report: dict[str, Any] | None, data: DataFact | None, here: Machine
) -> MemoryFact | None:
    """The estimate beside what is free on the device that would train; None where the model's sizes are not known."""
    sizes = Sizes.of(report["facts"]) if report else None
    if sizes is None:
        return None
    on_gpu = here.gpu is not None
    longest = data.longest if data is not None else None
    found = parts(config, sizes, longest, on_gpu)
    needs = sum(found.values())
    free, total = (here.gpu.free_gib, here.gpu.total_gib) if here.gpu else (here.free_gib, here.total_gib)
    offers = () if needs <= free else _offers(config, sizes, longest, on_gpu, needs, free)
    return MemoryFact(needs, free, total, found["weights"], tuple(found.items()), offers, SPREAD)


def _offers(
    config: Config, sizes: Sizes, longest: int | None, on_gpu: bool, needs: float, free: float
) -> tuple[Offer, ...]:
    """Single changes that bring the estimate under what is free, the cheapest for the result first."""
    h = config.hyperparams
    ways: list[tuple[str, dict[str, str], str]] = []
    if not h.use_gradient_checkpointing:
        ways.append(("Checkpointing on", {"hyperparams.use_gradient_checkpointing": "true"}, "a quarter slower"))
    batch = h.batch_size
    while batch > 1:
        batch = max(1, batch // 2)
        more = -(-h.rows_per_step // batch)
        values = {"hyperparams.batch_size": str(batch), "hyperparams.gradient_accumulation": str(more)}
        ways.append((f"Micro-batch {h.batch_size}→{batch}", values, ""))
    if h.method == "full":
        ways.append(("LoRA", {"hyperparams.method": "lora"}, ""))
    if on_gpu and h.method != "qlora" and has_bitsandbytes():
        ways.append(("QLoRA", {"hyperparams.method": "qlora"}, "slower"))
    offers, kinds = [], set()
    for text, values, cost in ways:
        changed = resolve(merged(config.model_dump(), unflatten(values)))
        saves = needs - sum(parts(changed, sizes, longest, on_gpu).values())
        kind = text.split(" ")[0]
        if needs - saves <= free and kind not in kinds and saves > 0:
            kinds.add(kind)
            offers.append(Offer(text, values, saves, cost))
    return tuple(offers)
