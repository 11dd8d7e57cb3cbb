"""What the weights of an architecture look like on disk, kept by a hash of the config: names and shapes. No torch.

A layout is made by `trainer.models.shapes` from the library's own model; here it is kept, read back and held against
headers. Weights that are exactly the layout need no second look. Called by `trainer.models.inspect`.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.files import make_private_dir, read_json, write_json
from trainer.models.headers import TensorInfo

FORMAT = 1
KEPT = 64
# what says nothing about names and shapes, or must never be followed: kernels, code and files that a config names
IGNORED_KEYS = frozenset(
    "attn_implementation _attn_implementation _attn_implementation_internal _attn_implementation_autoset "
    "experts_implementation _experts_implementation _experts_implementation_internal auto_map custom_generate "
    "fusion_config kernel_config distributed_config quantization_config transformers_weights transformers_version "
    "_name_or_path name_or_path _commit_hash torch_dtype dtype".split()
)


@dataclass(frozen=True)
class Layout:
    """Tensor name -> shape as the library writes it; `tied` may be absent, since another tensor holds the numbers."""

    tensors: dict[str, tuple[int, ...]]
    tied: frozenset[str]


def bare_config(config: dict[str, Any]) -> dict[str, Any]:
    """`config` without what chooses kernels, code, files or quantisation, at every depth."""
    return {key: _bare(value) for key, value in config.items() if key not in IGNORED_KEYS}


def _bare(value: Any) -> Any:
    if isinstance(value, dict):
        return bare_config(value)
    return [_bare(item) for item in value] if isinstance(value, list) else value


def layout_key(config: dict[str, Any]) -> str:
    """The name under which the layout of `config` is kept: its sha256, with the library's version."""
    content = [FORMAT, importlib.metadata.version("transformers"), bare_config(config)]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def matches(layout: Layout, tensors: dict[str, TensorInfo]) -> bool:
    """Whether `tensors` are the layout, name by name and shape by shape; a tied one may be there or not."""
    if not layout.tensors.keys() - layout.tied <= tensors.keys():
        return False
    return all(layout.tensors.get(name) == info.shape for name, info in tensors.items())


def read_layout(cache: Path, key: str) -> Layout | None:
    """The layout kept under `key`; None when there is none, or none that can be read."""
    try:
        content = read_json(cache / f"{key}.json")
        tensors = {str(name): tuple(int(size) for size in shape) for name, shape in content["tensors"].items()}
        return Layout(tensors, frozenset(str(name) for name in content["tied"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def keep_layout(cache: Path, key: str, layout: Layout) -> None:
    """Write the layout whole or not at all, and drop the oldest of more than 64. Raises OSError."""
    make_private_dir(cache)
    write_json(cache / f"{key}.json", {"tensors": layout.tensors, "tied": sorted(layout.tied)})
    kept = sorted(cache.glob("*.json"), key=lambda file: file.stat().st_mtime_ns)
    for file in kept[:-KEPT]:
        file.unlink(missing_ok=True)
