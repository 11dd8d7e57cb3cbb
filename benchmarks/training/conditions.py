"""What the figures are true for: device, versions, load, rows, and where the arms differ. No torch is imported."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.training.suites import SHAPES, Suite
from benchmarks.training.work import LEARNING_RATE, LORA_ALPHA, LORA_RANK
from trainer.machine import machine

PACKAGES = (
    "torch", "transformers", "accelerate", "peft", "trl", "datasets", "liger-kernel", "flash-attn", "triton", "numpy",
)  # fmt: skip
ALIKE = (
    "Random weights, the same model folder, token ids and label marks for every arm; the same number of optimiser steps.",
    "Arms of one form train the same rows in each step: 'rows' arms a fixed number of rows, 'packed' arms the same packs. "
    "Over the whole run both forms train the same rows once.",
    "AdamW (fused), betas 0.9 and 0.999, no weight decay, gradient norm clipped at 1, constant learning rate "
    f"{LEARNING_RATE:g}; LoRA of rank {LORA_RANK}, alpha {LORA_ALPHA}, on all linear layers of the blocks.",
    "bf16 cases: autocast over fp32 weights in full training, a bf16 base with fp32 matrices under LoRA, for every arm.",
    "Every arm's loss is the sum over the labels of the whole step divided by their number (transformers: "
    "num_items_in_batch; average_tokens_across_devices, its default, changes nothing on one device).",
    "Timed: from the end of the warm-up to the end of the last step, fetching and padding of batches included; imports, "
    "loading, packing and saving left out. The device is waited for at these two ends alone.",
)
DIFFERENT = (
    "transformers.Trainer: its padding collator and its own attention; the order of rows is fixed instead of drawn, its "
    "progress bar, logging and saving are off, all else is its default.",
    "TRL: given our packs in its own packed form (packing on, best-fit decreasing) instead of packing itself, so that "
    "steps compare; it computes entropy and accuracy besides the loss, its default. Without flash-attn its attention is "
    "transformers' own with a mask; on a CPU its head is computed for every position, not for labels alone.",
    "Signalbox: Training.loop of the product with metrics, row losses and telemetry written; nothing is saved at the end.",
)


def describe(device: str) -> dict[str, Any]:
    """The device and the versions: {"kind", "name", ..., "versions"}."""
    here = machine()
    versions: dict[str, Any] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    found: dict[str, Any] = {"versions": versions, "cores": here.cores, "processor": here.cpu_name}
    if device != "cpu" and here.gpu is not None:
        return found | {"kind": "gpu", "name": here.gpu.name, "memory_gib": round(here.gpu.total_gib, 1)}
    return found | {"kind": "cpu", "name": here.cpu_name, "memory_gib": round(here.total_gib, 1)}


def conditions(suite: Suite, device: str, threads: int, load_at_start: float, rows: dict[str, Any]) -> dict[str, Any]:
    """Everything else that a reader needs to judge the figures."""
    return {
        "commit": _commit(),
        "threads": threads,
        "load_average_before": load_at_start,
        "load_average_after": os.getloadavg()[0],
        "rounds": suite.rounds,
        "minutes": suite.minutes,
        "cases": [vars(case) | {"rows_per_step": case.rows_per_step} for case in suite.cases],
        "models": {
            case.model: vars(SHAPES[case.model])
            | {"weights": SHAPES[case.model].body + SHAPES[case.model].head, "head_weights": SHAPES[case.model].head}
            for case in suite.cases
        },
        "rows": rows,
        "memory": "allocator's peak"
        if device != "cpu"
        else "growth of the process over its size before the model was loaded",
        "mfu": "model FLOPs with the head on labels alone, the same for every arm, over the dense bf16 peak",
        "alike": ALIKE,
        "different": DIFFERENT,
    }


def _commit() -> str | None:
    """The commit that was measured, with "+" where files differ from it; None outside a checkout."""
    here = Path(__file__).parent
    try:
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True)
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=here, capture_output=True, text=True)
    except OSError:
        return None
    return None if head.returncode else head.stdout.strip() + ("+" if changed.stdout.strip() else "")
