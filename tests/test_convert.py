"""Converting pickle weights: the same numbers in safetensors, no code run, the target whole or not there at all."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.tiny import tiny_adapter_dir, tiny_model_dir
from trainer.models import is_valid_model_dir
from trainer.models.convert import convert_model
from trainer.models.inspect import inspect_model
from trainer.refusal import Refusal

IDS = torch.tensor([[1, 5, 9, 33, 2, 70]])


def as_pickle(path: Path, shards: int = 1, legacy: bool = False) -> dict[str, torch.Tensor]:
    """Replace a folder's safetensors by pickle files as the libraries wrote them; returns the tensors."""
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names = list(tensors)
    if shards == 1:
        torch.save(tensors, path / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
        return tensors
    places = {name: f"pytorch_model-{n % shards + 1:05}-of-{shards:05}.bin" for n, name in enumerate(names)}
    for file in sorted(set(places.values())):
        torch.save({name: tensors[name] for name in names if places[name] == file}, path / file)
    (path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return tensors


def contents(path: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.mark.parametrize(("shards", "legacy"), [(1, False), (1, True), (3, False)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_converted_model_has_the_same_numbers_and_answers(
    dtype: str, shards: int, legacy: bool, tmp_path: Path
) -> None:
    source = tiny_model_dir(tmp_path / "source", "qwen3", dtype=dtype)
    expected = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype))(IDS).logits
    tensors = as_pickle(source, shards, legacy)
    (source / "modeling_own.py").write_text("raise SystemExit")
    before = contents(source)
    report = convert_model(source, tmp_path / "new" / "target")
    target = Path(report["target"])
    assert contents(source) == before
    assert report["tensors"] == len(tensors) and len(report["files"]) == shards
    found = {name: value for file in report["files"] for name, value in load_file(target / file).items()}
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) and found[name].dtype == tensors[name].dtype for name in tensors)
    inspected = inspect_model(target, deep=True)
    assert inspected["valid"] and inspected["warnings"] == []
    assert torch.equal(AutoModelForCausalLM.from_pretrained(target, dtype=getattr(torch, dtype))(IDS).logits, expected)
    assert not any(name.endswith((".bin", ".py", ".bin.index.json")) for name in contents(target))
    assert {"config.json", "tokenizer.json", "chat_template.jinja", "generation_config.json"} <= set(report["copied"])
    assert [path.name for path in target.parent.iterdir()] == ["target"], "nothing else is left beside it"


def test_a_tied_output_layer_is_left_to_the_config_and_an_untied_one_is_written(tmp_path: Path) -> None:
    for tied in (True, False):
        source = tiny_model_dir(tmp_path / f"source-{tied}", "llama", tied=tied)
        expected = AutoModelForCausalLM.from_pretrained(source)(IDS).logits
        tensors = as_pickle(source)
        if tied:
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]  # one storage, two names
            torch.save(tensors, source / "pytorch_model.bin")
        report = convert_model(source, tmp_path / f"target-{tied}")
        assert report["tied"] == (["lm_head.weight"] if tied else [])
        assert ("lm_head.weight" in load_file(tmp_path / f"target-{tied}" / "model.safetensors")) != tied
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / f"target-{tied}")(IDS).logits, expected)


def test_views_and_shared_storage_come_out_as_tensors_of_their_own(tmp_path: Path) -> None:
    source = tiny_model_dir(tmp_path / "source", "llama", tied=False)
    tensors = as_pickle(source)
    keys = [f"model.layers.{n}.mlp.{name}_proj.weight" for n in (0, 1) for name in ("gate", "up")]
    fused = torch.cat([tensors[key] for key in keys])
    for key, part in zip(keys, fused.split(128), strict=True):
        tensors[key] = part
    tensors["lm_head.weight"] = tensors["lm_head.weight"].T.contiguous().T
    twin = "model.layers.1.input_layernorm.weight"
    tensors[twin] = tensors["model.layers.0.input_layernorm.weight"]
    torch.save(tensors, source / "pytorch_model.bin")
    convert_model(source, tmp_path / "target")
    found = load_file(tmp_path / "target" / "model.safetensors")
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_a_pickle_adapter_is_converted_too(tmp_path: Path) -> None:
    base = tiny_model_dir(tmp_path / "base", "llama")
    source = tiny_adapter_dir(tmp_path / "source", base)
    tensors = load_file(source / "adapter_model.safetensors")
    (source / "adapter_model.safetensors").unlink()
    torch.save(tensors, source / "adapter_model.bin")
    report = convert_model(source, tmp_path / "target")
    assert report["files"] == ["adapter_model.safetensors"]
    assert is_valid_model_dir(tmp_path / "target")
    found = load_file(tmp_path / "target" / "adapter_model.safetensors")
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


class Payload:
    """What a hostile file would hold: unpickling it makes a file."""

    def __init__(self, canary: str) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return open, (self.canary, "w")


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_with_code_is_refused_and_nothing_of_it_runs(legacy: bool, tmp_path: Path) -> None:
    source = tiny_model_dir(tmp_path / "source")
    canary = tmp_path / "canary"
    tensors = as_pickle(source)
    hostile = {**tensors, "x": Payload(str(canary))}
    torch.save(hostile, source / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(Refusal, match="could run code") as caught:
        convert_model(source, tmp_path / "target")
    assert "weights_only" not in str(caught.value), "the library's advice to switch the protection off is not passed on"
    assert not canary.exists() and not (tmp_path / "target").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
    torch.load(source / "pytorch_model.bin", weights_only=False)  # the payload itself works
    assert canary.exists()


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        ([torch.zeros(2)], "not a table"),
        ({}, "not a table"),
        ({"a": 1}, "not a table"),
        ({"state_dict": {"a": torch.zeros(2)}}, "not a table"),
        ({"a": torch.zeros(3).to_sparse()}, "form that safetensors"),
    ],
)
def test_what_is_no_table_of_tensors_is_refused(content: Any, cause: str, tmp_path: Path) -> None:
    source = tiny_model_dir(tmp_path / "source")
    as_pickle(source)
    torch.save(content, source / "pytorch_model.bin")
    with pytest.raises(Refusal, match=cause):
        convert_model(source, tmp_path / "target")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_broken_and_needless_conversions_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    good = tiny_model_dir(tmp_path / "good")
    with pytest.raises(Refusal, match="safetensors already"):
        convert_model(good, tmp_path / "target")
    with pytest.raises(Refusal, match="no model folder"):
        convert_model(tmp_path / "nowhere", tmp_path / "target")
    pickled = Path(shutil.copytree(good, tmp_path / "pickled"))
    as_pickle(pickled)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(Refusal, match="not empty"):
        convert_model(pickled, tmp_path / "full")
    os.truncate(pickled / "pytorch_model.bin", 1000)
    with pytest.raises(Refusal, match="cut off"):
        convert_model(pickled, tmp_path / "target")
    as_pickle(Path(shutil.copytree(good, tmp_path / "sharded")), shards=2)
    (tmp_path / "sharded" / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(Refusal, match="shard 2 of 2"):
        convert_model(tmp_path / "sharded", tmp_path / "target")
    assert not (tmp_path / "target").exists() and not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_an_empty_target_is_used_and_a_failure_while_writing_leaves_it_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_model_dir(tmp_path / "source")
    as_pickle(source)
    target = tmp_path / "target"
    target.mkdir()

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", full_disk)
        with pytest.raises(OSError, match="No space"):
            convert_model(source, target)
    assert list(target.iterdir()) == [] and sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]
    convert_model(source, target)
    assert is_valid_model_dir(target)
