"""The report on model folders: good ones of ten architectures raise no alarm, warnings and facts are right, other
folders are told apart, the deep check sees what torch sees. Planted faults: `test_inspect_faults.py`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.both_verdicts import judged
from tests.damage import (
    EMBED,
    INDEX,
    POINTER,
    SHARDS,
    UP,
    change_index,
    change_json,
    change_tensors,
    codes,
    pop,
    set_config,
    unlink,
)
from tests.tiny import ARCHITECTURES, tiny_model_dir
from trainer.models import is_valid_model_dir
from trainer.models.inspect import inspect_model

pytest_plugins = ("tests.model_fixtures",)
ROOT = Path(__file__).resolve().parent.parent


def snapshot(path: Path) -> dict[str, tuple[bytes, int]]:
    """Contents and modification times of a folder."""
    return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in path.iterdir() if p.is_file()}


@pytest.mark.parametrize("shape", ["single-tied", "sharded-untied-bf16"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_good_folders_of_ten_architectures_raise_no_alarm(architecture: str, shape: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"tied": True}
    if shape != "single-tied":
        options = {"tied": False, "dtype": "bfloat16", "max_shard_size": "100KB"}
    path = tiny_model_dir(tmp_path / architecture, architecture, **options)
    before = snapshot(path)
    report = inspect_model(path, deep=True)
    assert (codes(report), report["warnings"], report["kind"]) == ([], [], "full")
    assert snapshot(path) == before
    model = AutoModelForCausalLM.from_pretrained(path)
    facts = report["facts"]
    assert facts["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert facts["architectures"] == [type(model).__name__]
    assert facts["model_type"] == model.config.model_type
    assert facts["vocab_size"] == model.config.vocab_size == facts["embedding_rows"]
    assert facts["hidden_size"] == model.config.hidden_size and facts["layers"] == model.config.num_hidden_layers
    assert facts["heads"] == model.config.num_attention_heads
    assert facts["max_positions"] == 512 and facts["tied"] == options["tied"] and facts["has_chat_template"]
    assert list(facts["dtypes"]) == (["F32"] if options["tied"] else ["BF16"])
    assert facts["size_bytes"] == sum(file.stat().st_size for file in path.glob("*.safetensors"))
    assert facts["shards"] == len(list(path.glob("*.safetensors"))) == (1 if options["tied"] else facts["shards"])
    assert is_valid_model_dir(path) is True and is_valid_model_dir(str(path)) is True


def test_an_adapter_is_valid_with_its_base_and_tells_which(good_models: dict[str, Path]) -> None:
    report = inspect_model(good_models["lora"], model_roots=[good_models["lora"].parent])
    assert (codes(report), report["warnings"], report["kind"]) == ([], [], "lora")
    assert report["facts"]["base_path"] == str(good_models["single"]) and report["facts"]["lora_rank"] == 4
    assert report["facts"]["architectures"] == ["LlamaForCausalLM"]
    assert is_valid_model_dir(good_models["lora"]) is True


def test_pickle_weights_are_valid_with_a_warning(good_models: dict[str, Path], tmp_path: Path) -> None:
    for sharded in (False, True):
        path = tmp_path / f"pickle-{sharded}"
        shutil.copytree(good_models["single"], path)
        tensors = {name: torch.from_numpy(value) for name, value in load_file(path / "model.safetensors").items()}
        (path / "model.safetensors").unlink()
        names = ["pytorch_model.bin"]
        if sharded:
            names = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
            places = {tensor: names[number % 2] for number, tensor in enumerate(tensors)}
            (path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
            for name in names:
                torch.save({tensor: tensors[tensor] for tensor in tensors if places[tensor] == name}, path / name)
        else:
            torch.save(tensors, path / names[0])
        report = inspect_model(path)
        assert codes(report) == [] and [item["code"] for item in report["warnings"]] == ["pickle_weights"]
        assert is_valid_model_dir(path) is True
        assert [item["code"] for item in inspect_model(path, deep=True)["warnings"]] == [
            "pickle_weights",
            "deep_skipped",
        ]
        size = (path / names[-1]).stat().st_size
        os.truncate(path / names[-1], size - 100)
        assert codes(inspect_model(path)) == ["bad_pickle"]
        (path / names[-1]).unlink()
        assert codes(inspect_model(path)) == [("missing_shard" if sharded else "no_weights")]


def test_a_zip_or_text_called_bin_is_not_weights(copy_of_model: Callable[[str], Path]) -> None:
    path = copy_of_model("single")
    (path / "model.safetensors").unlink()
    with zipfile.ZipFile(path / "pytorch_model.bin", "w") as archive:
        archive.writestr("readme.txt", "no weights")
    assert codes(inspect_model(path)) == ["bad_pickle"]
    (path / "pytorch_model.bin").write_text("Not found")
    assert codes(inspect_model(path)) == ["bad_pickle"]


def test_other_tokenizer_layouts_are_taken(copy_of_model: Callable[[str], Path]) -> None:
    path = copy_of_model("single")
    content = json.loads((path / "tokenizer.json").read_text("utf-8"))
    (path / "tokenizer.json").unlink()
    (path / "vocab.json").write_text(json.dumps(content["model"]["vocab"]), "utf-8")
    assert inspect_model(path)["problems"][0]["file"] == "merges.txt"
    (path / "merges.txt").write_text("#version: 0.2\n", "utf-8")
    assert inspect_model(path)["valid"] and inspect_model(path)["facts"]["tokens"] == 384
    (path / "added_tokens.json").write_text('{"<new>": 384}')
    assert codes(inspect_model(path)) == ["tokenizer_larger_than_model"]
    for name in ("vocab.json", "merges.txt", "added_tokens.json"):
        (path / name).unlink()
    (path / "tokenizer.model").write_bytes(b"\x0a\x05abc")
    assert inspect_model(path)["valid"]
    (path / "tokenizer.model").write_bytes(b"")
    assert codes(inspect_model(path)) == ["empty_file"]


def test_a_placeholder_for_images_beyond_the_rows_is_only_a_warning(copy_of_model: Callable[[str], Path]) -> None:
    path = copy_of_model("single")
    content = json.loads((path / "tokenizer.json").read_text("utf-8"))
    content["added_tokens"].append(content["added_tokens"][0] | {"id": 384, "content": "<image_soft_token>"})
    (path / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    report = inspect_model(path)
    assert codes(report) == [] and [item["code"] for item in report["warnings"]] == ["unused_tokens"]


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (set_config(auto_map={"AutoModelForCausalLM": "modeling.Custom"}), "auto_map"),
        (set_config(attn_implementation="someone/kernel"), "attn_implementation"),
        (set_config(_attn_implementation="eager"), "attn_implementation"),
        (set_config(_attn_implementation_internal="someone/kernel"), "attn_implementation"),
        (set_config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}), "quantised"),
        (set_config(num_hidden_layers=2), "extra_tensor"),
        (unlink("chat_template.jinja"), "no_chat_template"),
        (lambda p: change_json(p / "tokenizer_config.json", pad_token="<|im_end|>"), "pad_is_eos"),
        (lambda p: change_json(p / "tokenizer_config.json", eos_token=None), "no_eos_token"),
        (lambda p: change_json(p / "tokenizer_config.json", auto_map={"AutoTokenizer": ["t.T", None]}), "auto_map"),
    ],
)
def test_what_a_person_should_know_is_a_warning(
    damage: Callable[[Path], None], code: str, copy_of_model: Callable[[str], Path]
) -> None:
    path = copy_of_model("single")
    damage(path)
    report = judged(path)
    assert codes(report) == [] and [item["code"] for item in report["warnings"]] == [code]


def test_files_that_are_not_loaded_are_warned_of(copy_of_model: Callable[[str], Path]) -> None:
    path = copy_of_model("sharded")
    shutil.copy(path / SHARDS[0], path / "model-00001-of-00009.safetensors")
    assert [item["code"] for item in inspect_model(path)["warnings"]] == ["extra_shard"]
    (path / "model-00001-of-00009.safetensors").unlink()
    change_index(pop(EMBED))(path)
    assert [item["code"] for item in inspect_model(path)["warnings"]] == ["tensor_not_in_index"]
    change_index(lambda places: [places.pop(name) for name in [*places] if places[name] == SHARDS[2]] and None)(path)
    assert "index_incomplete" in [item["code"] for item in inspect_model(path)["warnings"]]
    save_file({"a": np.zeros(1, np.float32)}, path / "consolidated.safetensors")
    assert not any("consolidated" in item["file"] for item in inspect_model(path)["warnings"])


def test_a_base_is_found_in_the_roots_or_asked_for(copy_of_model: Callable[[str], Path], tmp_path: Path) -> None:
    path = copy_of_model("lora")
    elsewhere = tmp_path / "roots"
    change_json(path / "adapter_config.json", base_model_name_or_path="org/tiny-llama")
    report = inspect_model(path, model_roots=[elsewhere])
    assert codes(report) == [] and [item["code"] for item in report["warnings"]] == ["base_not_found"]
    tiny_model_dir(elsewhere / "tiny-llama", "llama", layers=3)
    report = inspect_model(path, model_roots=[elsewhere])
    assert codes(report) == [] and report["warnings"] == []
    assert report["facts"]["base_path"] == str((elsewhere / "tiny-llama").resolve())
    (elsewhere / "tiny-llama" / "model.safetensors").unlink()
    report = inspect_model(path, model_roots=[elsewhere])
    assert codes(report) == ["no_weights"] and "base model" in report["problems"][0]["message"]
    tiny_model_dir(elsewhere / "tiny-llama", "llama", hidden=96)
    assert codes(judged(path, model_roots=[elsewhere])) == ["adapter_does_not_fit"]


@pytest.mark.parametrize(
    ("files", "kind", "code"),
    [
        ({}, "nothing", "empty_folder"),
        ({"notes.txt": "x"}, "nothing", "no_model"),
        ({"llama/config.json": "{}"}, "nothing", "one_deeper"),
        ({"model.Q4_K_M.gguf": "GGUF"}, "gguf", "gguf"),
        ({"model.gguf": "GGUF", "config.json": "{}"}, "gguf", "gguf"),
        ({"model_index.json": "{}", "unet/config.json": "{}"}, "diffusers", "diffusers"),
        ({"MANIFEST.json": "{}", "model/config.json": "{}"}, "checkpoint", "checkpoint"),
        ({"checkpoint-900/config.json": "{}", "checkpoint-1000/config.json": "{}"}, "checkpoint", "checkpoint"),
        ({"consolidated.00.pth": "x", "params.json": "{}"}, "checkpoint", "checkpoint"),
        ({"__0_0.distcp": "x"}, "checkpoint", "checkpoint"),
        ({"config.json": POINTER, "model.safetensors": POINTER}, "lfs", "lfs_pointer"),
    ],
)
def test_other_folders_are_told_apart(files: dict[str, str], kind: str, code: str, tmp_path: Path) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    for name, content in files.items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(content)
    report = inspect_model(path)
    assert report["kind"] == kind and codes(report)[0] == code
    if "checkpoint-900/config.json" in files:
        assert "checkpoint-1000" in report["problems"][0]["fix"], "1000 is newer than 900"


def test_a_missing_folder_and_a_file_are_refused(tmp_path: Path) -> None:
    assert codes(inspect_model(tmp_path / "nowhere")) == ["missing_folder"]
    (tmp_path / "a.safetensors").write_bytes(b"x")
    assert codes(inspect_model(tmp_path / "a.safetensors")) == ["not_a_folder"]
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    assert inspect_model(tmp_path / "a.gguf")["kind"] == "gguf"
    assert is_valid_model_dir(tmp_path / "nowhere") is False


def test_the_links_of_a_hub_cache_are_followed(good_models: dict[str, Path], tmp_path: Path) -> None:
    blobs = tmp_path / "models--org--tiny" / "blobs"
    snapshot_dir = tmp_path / "models--org--tiny" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot_dir.mkdir(parents=True)
    for number, file in enumerate(sorted(good_models["sharded"].iterdir())):
        shutil.copy(file, blobs / str(number))
        (snapshot_dir / file.name).symlink_to(Path("../../blobs") / str(number))
    assert codes(inspect_model(snapshot_dir)) == []


def test_links_within_a_model_root_are_followed(copy_of_model: Callable[[str], Path]) -> None:
    path = copy_of_model("single")
    other = path.parent / "other"
    other.mkdir()
    (path / "model.safetensors").rename(other / "model.safetensors")
    (path / "model.safetensors").symlink_to(other / "model.safetensors")
    assert codes(inspect_model(path)) == ["link_out"]
    assert codes(inspect_model(path, model_roots=[path.parent])) == []


def test_a_hundred_shards_of_a_hundred_gigabytes_are_judged_within_a_second(
    good_models: dict[str, Path], tmp_path: Path
) -> None:
    """Sparse files: what a header promises is there, and costs no disk. By the processor's clock; the machine is shared."""
    path = tmp_path / "large"
    path.mkdir()
    for file in good_models["single"].iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, path)
    change_json(path / "config.json", model_type="qwen3_moe")
    places: dict[str, str] = {}
    for number in range(1, 101):
        name, header, at = f"model-{number:05}-of-00100.safetensors", {}, 0
        for expert in range(200):
            tensor = f"model.layers.{number}.mlp.experts.{expert}.w.weight"
            header[tensor] = {"dtype": "BF16", "shape": [2048, 1536], "data_offsets": [at, at + 2 * 2048 * 1536]}
            at += 2 * 2048 * 1536
            places[tensor] = name
        raw = json.dumps(header).encode()
        (path / name).write_bytes(len(raw).to_bytes(8, "little") + raw)
        os.truncate(path / name, 8 + len(raw) + at)
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    inspect_model(path)
    start_s = time.process_time()
    report = inspect_model(path)
    assert time.process_time() - start_s < 1
    assert report["valid"] and report["facts"]["shards"] == 100 and report["facts"]["size_bytes"] > 125_000_000_000
    assert report["facts"]["parameters"] == 20_000 * 2048 * 1536


def test_what_is_too_large_unreadable_or_twice_is_named(
    copy_of_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = copy_of_model("single")
    (path / INDEX).write_text('{"weight_map": {}}')
    assert [item["code"] for item in inspect_model(path)["warnings"]] == ["two_sets"]
    (path / INDEX).unlink()
    (path / "config.json").open("ab").truncate(64_000_001)
    assert codes(inspect_model(path)) == ["file_too_large"]
    # whoever runs this may be allowed to read everything, so the refusal is made here
    monkeypatch.setattr(os, "listdir", lambda path: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    report = inspect_model(path)
    assert codes(report) == ["unreadable"] and "Permission denied" in report["problems"][0]["message"]


def test_a_base_outside_the_model_folders_is_a_warning(good_models: dict[str, Path], tmp_path: Path) -> None:
    report = inspect_model(good_models["lora"], model_roots=[tmp_path])
    assert codes(report) == [] and [item["code"] for item in report["warnings"]] == ["base_outside_roots"]


def test_inspecting_imports_neither_torch_nor_transformers(good_models: dict[str, Path]) -> None:
    code = (
        "import sys; from trainer.models import is_valid_model_dir; from trainer.models.inspect import inspect_model;"
        "from pathlib import Path; path = Path(sys.argv[1]);"
        "print(is_valid_model_dir(path), inspect_model(path, deep=True)['valid'],"
        "[m for m in ('torch', 'transformers', 'safetensors', 'peft') if m in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(good_models["sharded"])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True True []"


def test_each_fault_that_loading_would_pass_over_really_loads(copy_of_model: Callable[[str], Path]) -> None:
    """Why the report matters: the library fills a missing tensor with random numbers and says nothing that stops."""
    path = copy_of_model("single")
    change_tensors(pop(UP))(path)
    model = AutoModelForCausalLM.from_pretrained(path)
    assert model.model.layers[1].mlp.up_proj.weight.isfinite().all()
    assert codes(judged(path)) == ["missing_tensor"]
