"""Ways to damage a copy of a good model folder, for the tests of the model report. Fixtures: `model_fixtures.py`."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file, save_file

SHARDS = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
INDEX = "model.safetensors.index.json"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 123\n"
EMBED = "model.embed_tokens.weight"
UP = "model.layers.1.mlp.up_proj.weight"
Damage = Callable[[Path], None]


def change_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; None removes the key."""
    content = json.loads(path.read_text("utf-8")) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}), "utf-8")


def codes(report: dict[str, Any]) -> list[str]:
    """The codes of the problems, in order."""
    assert report["valid"] == (not report["problems"])
    for finding in report["problems"] + report["warnings"]:
        assert set(finding) == {"code", "file", "message", "fix"}
        assert finding["message"] and not finding["message"].endswith(".") and finding["fix"].endswith(".")
        assert "please" not in (finding["message"] + finding["fix"]).lower()
    return [problem["code"] for problem in report["problems"]]


def unlink(*names: str) -> Damage:
    """Remove files."""

    def damage(path: Path) -> None:
        for name in names:
            (path / name).unlink()

    return damage


def cut(name: str, keep: float = 0.0, drop_bytes: int = 0) -> Damage:
    """Cut a file off: a share of it stays, or all but the last bytes."""

    def damage(path: Path) -> None:
        size = (path / name).stat().st_size
        os.truncate(path / name, size - drop_bytes if drop_bytes else int(size * keep))

    return damage


def write_file(name: str, content: str | bytes) -> Damage:
    """Replace or add a file."""

    def damage(path: Path) -> None:
        (path / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return damage


def set_config(**changes: Any) -> Damage:
    """Set keys of config.json; None removes one."""
    return lambda path: change_json(path / "config.json", **changes)


def change_tensors(change: Callable[[dict[str, Any]], None]) -> Damage:
    """Rewrite model.safetensors with changed tensors."""

    def damage(path: Path) -> None:
        tensors = load_file(path / "model.safetensors")
        change(tensors)
        save_file(tensors, path / "model.safetensors", {"format": "pt"})

    return damage


def change_index(change: Callable[[dict[str, str]], None]) -> Damage:
    """Rewrite the index's map from tensors to files."""

    def damage(path: Path) -> None:
        content = json.loads((path / INDEX).read_text())
        change(content["weight_map"])
        (path / INDEX).write_text(json.dumps(content))

    return damage


def pop(*names: str) -> Callable[[dict[str, Any]], None]:
    """Drop entries by name."""
    return lambda tensors: [tensors.pop(name) for name in names] and None


def pop_block(number: int) -> Callable[[dict[str, Any]], None]:
    """Drop all tensors of one block."""

    def drop(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if name.startswith(f"model.layers.{number}.")]:
            tensors.pop(name)

    return drop


def put_number(name: str, value: float) -> Damage:
    """Write one number into a tensor."""

    def change(tensors: dict[str, Any]) -> None:
        tensors[name].reshape(-1)[5] = value

    return change_tensors(change)


def add_token(path: Path) -> None:
    """Give the tokenizer a token beyond the rows of the model."""
    content = json.loads((path / "tokenizer.json").read_text("utf-8"))
    content["added_tokens"].append(content["added_tokens"][0] | {"id": 400, "content": "<new>"})
    (path / "tokenizer.json").write_text(json.dumps(content), "utf-8")


def duplicate_key(path: Path) -> None:
    """Name one tensor twice in the header; the library would take it."""
    raw = (path / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + length].rstrip()
    name = b'"lm_head.copy":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    header = header[:-1] + b"," + name + b"," + name + b"}"
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + raw[8 + length :])


def link_out(name: str) -> Damage:
    """Replace a file by a link to a place outside the folder."""

    def damage(path: Path) -> None:
        outside = path.parent.parent / "outside"
        outside.mkdir()
        shutil.move(path / name, outside / name)
        (path / name).symlink_to(outside / name)

    return damage


def make_pipe(path: Path) -> None:
    """Replace the weights by a pipe, which would block a naive reader."""
    (path / "model.safetensors").unlink()
    os.mkfifo(path / "model.safetensors")


def folder_instead(path: Path) -> None:
    """Replace config.json by a folder."""
    (path / "config.json").unlink()
    (path / "config.json").mkdir()


def copy_shard(path: Path) -> None:
    """Put a copy of the first shard in the place of the second."""
    shutil.copy(path / SHARDS[0], path / SHARDS[1])


def misname_shard(path: Path) -> None:
    """Give the third shard another number of shards in its name."""
    (path / SHARDS[2]).rename(path / "model-00003-of-00004.safetensors")
