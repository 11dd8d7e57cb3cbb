"""Model directories: inspecting them (no torch), loading, attention, LoRA, converting, and the starter model."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["is_valid_model_dir"]


def is_valid_model_dir(path: str | os.PathLike[str]) -> bool:
    """Whether the folder can be trained: full, sharded, pickle and LoRA folders count. Always a bool."""
    from trainer.models.inspect import inspect_model

    return bool(inspect_model(Path(path))["valid"])
