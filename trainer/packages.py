"""Optional packages: whether they are here, and the refusal in words where a setting needs one that is not. Torch-free."""

from __future__ import annotations

import importlib.util

from trainer.refusal import Refusal
from trainer.schema import Config

NEEDS_BITSANDBYTES = {"hyperparams.method": "qlora", "hyperparams.optimizer": "adamw_8bit"}
"""Settings and the value of each that bitsandbytes computes."""


def has_bitsandbytes() -> bool:
    """Whether bitsandbytes is installed; nothing of it is imported."""
    return importlib.util.find_spec("bitsandbytes") is not None


def needs_bitsandbytes(config: Config) -> bool:
    """Whether a setting of this config is computed by bitsandbytes."""
    return config.hyperparams.method == "qlora" or config.hyperparams.optimizer == "adamw_8bit"


def missing_for(config: Config) -> list[tuple[str, str]]:
    """(setting, sentence) for each setting whose package is not here."""
    if has_bitsandbytes():
        return []
    found = []
    if config.hyperparams.method == "qlora":
        text = "QLoRA needs the package bitsandbytes: pip install 'signalbox[qlora]'. Or use LoRA."
        found.append(("hyperparams.method", text))
    if config.hyperparams.optimizer == "adamw_8bit":
        text = "The 8-bit optimizer needs the package bitsandbytes: pip install 'signalbox[qlora]'. Or use AdamW."
        found.append(("hyperparams.optimizer", text))
    return found


def check_packages(config: Config) -> None:
    """Refuse the first setting whose package is not here."""
    for field, text in missing_for(config):
        raise Refusal(text, field)
