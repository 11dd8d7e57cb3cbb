"""Whether a run fits into memory: the estimate of `trainer.loop.memory` as a fact of the gate, with ways out."""

from __future__ import annotations

from typing import Any

from trainer.config import Config
from trainer.machine import Machine
from ui.gate_facts import DataFact, MemoryFact


def memory_fact(
    config: Config, report: dict[str, Any] | None, data: DataFact | None, here: Machine
) -> MemoryFact | None:
    """None."""
    return None
