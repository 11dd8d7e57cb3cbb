"""The bytes of one checkpoint before there is one: tensors to the byte, the small files beside them by the model's own.

Torch-free; called by the page, which asks again with every change of the form.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from trainer.disk_need import checkpoint_bytes
from trainer.schema import Config

SMALL_FILES = (".json", ".jinja", ".txt", ".model")
ROUNDING_BYTES = 100_000
"""So far a whole checkpoint's files may be off: headers, settings and the tokenizer as it is written again."""


def one_checkpoint(config: Config, files: str) -> tuple[int, int] | None:
    """(bytes of the tensors, bytes of all files) of one checkpoint; None where the model's headers do not tell.

    `files` changes when a file of the model's folder does; the headers are read again only then.
    """
    h = config.hyperparams
    key = (h.method, h.fp_precision, h.master_weights, h.optimizer, config.lora.r, tuple(config.lora.target_modules))
    return _one(_Asked(config, (config.model_path, files, *key)))


class _Asked:
    """Settings that are the same question when `key` is."""

    def __init__(self, config: Config, key: tuple[object, ...]) -> None:
        self.config, self.key = config, key

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Asked) and self.key == other.key


@lru_cache(maxsize=64)
def _one(asked: _Asked) -> tuple[int, int] | None:
    tensors = checkpoint_bytes(asked.config)
    if tensors is None:
        return None
    folder = Path(asked.config.model_path)
    beside = sum(path.stat().st_size for path in folder.iterdir() if path.suffix in SMALL_FILES and path.is_file())
    return tensors, tensors + beside
