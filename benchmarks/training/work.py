"""What an arm is given and what it gives back, and the two settings that all arms share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.training.suites import Arm, Case
from trainer.data.packing import Plan
from trainer.data.tokens import TokenCache

LEARNING_RATE = 1e-4
LORA_RANK, LORA_ALPHA = 16, 32


@dataclass(frozen=True)
class Work:
    """One case for one arm: the same rows, plan and model folder for all arms of a form."""

    arm: Arm
    case: Case
    cache: TokenCache
    plan: Plan
    model_path: Path
    device: str
    scratch: Path


@dataclass(frozen=True)
class Trained:
    """What came out: the loss of each step in nats a label, the kernel of attention, and what else is worth knowing."""

    losses: list[float]
    attention: str
    notes: dict[str, Any]
