"""Planted faults in model folders: each is named with its code and its file, and the sentence says what to do."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.both_verdicts import judged
from tests.damage import (
    EMBED,
    INDEX,
    POINTER,
    SHARDS,
    UP,
    Damage,
    add_token,
    change_index,
    change_json,
    change_tensors,
    codes,
    copy_shard,
    cut,
    duplicate_key,
    folder_instead,
    link_out,
    make_pipe,
    misname_shard,
    pop,
    pop_block,
    set_config,
    unlink,
    write_file,
)
from trainer.models import is_valid_model_dir
from trainer.models.inspect import inspect_model, sentence

pytest_plugins = ("tests.model_fixtures",)


# name -> which good folder, what is done to it, the code of the problem, the file it names, a word of the message
FAULTS: dict[str, tuple[str, Damage, str, str, str]] = {
    "no config": ("single", unlink("config.json"), "no_config", "config.json", "missing"),
    "config cut off": ("single", cut("config.json", 0.5), "bad_json", "config.json", "JSON"),
    "config empty": ("single", cut("config.json", 0), "empty_file", "config.json", "empty"),
    "config a list": ("single", write_file("config.json", "[]"), "bad_json", "config.json", "object"),
    "config too deep": ("single", write_file("config.json", "[" * 99_999), "bad_json", "config.json", "deep"),
    "config with a BOM": ("single", write_file("config.json", b"\xef\xbb\xbf{}"), "bad_json", "config.json", "BOM"),
    "config not UTF-8": ("single", write_file("config.json", b'{"a":"\xff"}'), "bad_json", "config.json", "utf-8"),
    "config with NaN": ("single", set_config(rms_norm_eps=float("nan")), "bad_json", "config.json", "NaN"),
    "config a folder": ("single", folder_instead, "not_a_file", "config.json", "plain file"),
    "layers -1": ("single", set_config(num_hidden_layers=-1), "config_bad_value", "config.json", "-1"),
    "layers 10 million": ("single", set_config(num_hidden_layers=10**7), "config_bad_value", "config.json", "10000000"),
    "layers true": ("single", set_config(num_hidden_layers=True), "config_bad_value", "config.json", "True"),
    "vocabulary 2^40": ("single", set_config(vocab_size=2**40), "config_bad_value", "config.json", "vocab_size"),
    "hidden a text": ("single", set_config(hidden_size="64"), "config_bad_value", "config.json", "hidden_size"),
    "key heads other": ("single", set_config(num_key_value_heads=3), "shape_mismatch", "model.safetensors", "k_proj"),
    "experts 10 million": ("single", set_config(num_experts=10**7), "config_bad_value", "config.json", "num_experts"),
    "a deep size absurd": (
        "single",
        set_config(vision_config={"depth": 2**40}),
        "config_bad_value",
        "config.json",
        "depth",
    ),
    "more layers than tensors": (
        "single",
        set_config(num_hidden_layers=9_999),
        "shape_mismatch",
        "config.json",
        "9,999 layers",
    ),
    "weights elsewhere": (
        "single",
        set_config(transformers_weights="other.safetensors"),
        "other_weights",
        "config.json",
        "other.safetensors",
    ),
    "no type": ("single", set_config(model_type=None), "no_model_type", "config.json", "model_type"),
    "unknown type": ("single", set_config(model_type="blorp"), "unknown_model_type", "config.json", "blorp"),
    "a T5": ("single", set_config(model_type="t5"), "not_causal", "config.json", "t5"),
    "a classifier": (
        "single",
        set_config(architectures=["LlamaForSequenceClassification"]),
        "not_causal",
        "config.json",
        "class",
    ),
    "unknown quantisation": (
        "single",
        set_config(quantization_config={"quant_method": "zap"}),
        "unknown_quantisation",
        "config.json",
        "zap",
    ),
    "more layers named": (
        "single",
        set_config(num_hidden_layers=4),
        "missing_tensor",
        "model.safetensors",
        "model.layers.3.",
    ),
    "other vocabulary": ("single", set_config(vocab_size=390), "shape_mismatch", "model.safetensors", "390"),
    "other hidden size": ("single", set_config(hidden_size=128), "shape_mismatch", "model.safetensors", "shape"),
    "other inner size": ("single", set_config(intermediate_size=256), "shape_mismatch", "model.safetensors", "mlp"),
    "no weights": ("single", unlink("model.safetensors"), "no_weights", "model.safetensors", "no weights"),
    "weights renamed": (
        "single",
        lambda p: (p / "model.safetensors").rename(p / "weights.safetensors"),
        "misnamed_weights",
        "weights.safetensors",
        "model.safetensors",
    ),
    "weights empty": ("single", cut("model.safetensors", 0), "empty_file", "model.safetensors", "0 bytes"),
    "weights half": ("single", cut("model.safetensors", 0.5), "truncated", "model.safetensors", "cut off"),
    "a byte less": ("single", cut("model.safetensors", drop_bytes=1), "truncated", "model.safetensors", "1 of"),
    "four bytes": ("single", write_file("model.safetensors", b"1234"), "too_short", "model.safetensors", "4 bytes"),
    "bytes too many": (
        "single",
        lambda p: (p / "model.safetensors").open("ab").write(b"xx") and None,
        "trailing_bytes",
        "model.safetensors",
        "2 bytes",
    ),
    "header length lies": (
        "single",
        lambda p: (p / "model.safetensors").write_bytes(b"\xff" * 8 + b"{}") and None,
        "header_too_large",
        "model.safetensors",
        "header",
    ),
    "duplicate key": ("single", duplicate_key, "duplicate_key", "model.safetensors", "lm_head.copy"),
    "a web page": (
        "single",
        write_file("model.safetensors", "<!DOCTYPE html><html></html>"),
        "header_too_large",
        "model.safetensors",
        "header",
    ),
    "no tensor": (
        "single",
        change_tensors(lambda tensors: tensors.clear()),
        "no_tensors",
        "model.safetensors",
        "no tensor",
    ),
    "a tensor missing": ("single", change_tensors(pop(UP)), "missing_tensor", "model.safetensors", UP),
    "the embedding missing": ("single", change_tensors(pop(EMBED)), "missing_tensor", "model.safetensors", EMBED),
    "the last block missing": (
        "single",
        change_tensors(pop_block(2)),
        "missing_tensor",
        "model.safetensors",
        "layers.2.",
    ),
    "untied without a head": (
        "single",
        set_config(tie_word_embeddings=False),
        "missing_tensor",
        "model.safetensors",
        "lm_head",
    ),
    "a pointer": ("single", write_file("model.safetensors", POINTER), "lfs_pointer", "model.safetensors", "LFS"),
    "a pipe": ("single", make_pipe, "not_a_file", "model.safetensors", "plain file"),
    "a link out": ("single", link_out("model.safetensors"), "link_out", "model.safetensors", "outside"),
    "a config linked out": ("single", link_out("config.json"), "link_out", "config.json", "outside"),
    "a link to nothing": (
        "single",
        lambda p: ((p / "config.json").unlink(), (p / "config.json").symlink_to("x")) and None,
        "broken_link",
        "config.json",
        "nothing",
    ),
    "no tokenizer": ("single", unlink("tokenizer.json"), "no_tokenizer", "tokenizer.json", "tokenizer"),
    "tokenizer cut off": ("single", cut("tokenizer.json", 0.9), "bad_json", "tokenizer.json", "JSON"),
    "tokenizer without words": (
        "single",
        write_file("tokenizer.json", '{"model": {}}'),
        "bad_tokenizer",
        "tokenizer.json",
        "vocabulary",
    ),
    "tokenizer too large": ("single", add_token, "tokenizer_larger_than_model", "tokenizer.json", "400"),
    "adapter beside it": (
        "single",
        write_file("adapter_config.json", "{}"),
        "adapter_beside_model",
        "adapter_config.json",
        "LoRA",
    ),
    "no index": ("sharded", unlink(INDEX), "no_index", INDEX, "3 shards"),
    "index cut off": ("sharded", cut(INDEX, 0.5), "bad_json", INDEX, "JSON"),
    "index without a map": ("sharded", write_file(INDEX, '{"metadata": {}}'), "bad_index", INDEX, "weight_map"),
    "index names a tensor twice": (
        "sharded",
        write_file(INDEX, '{"weight_map": {"a": "b", "a": "c"}}'),
        "bad_json",
        INDEX,
        "twice",
    ),
    "a shard missing": ("sharded", unlink(SHARDS[2]), "missing_shard", SHARDS[2], "shard 3 of 3"),
    "a shard misnamed": ("sharded", misname_shard, "missing_shard", SHARDS[2], "shard 3 of 3"),
    "a shard cut off": ("sharded", cut(SHARDS[1], drop_bytes=10), "truncated", SHARDS[1], "10 of"),
    "a shard empty": ("sharded", cut(SHARDS[1], 0), "empty_file", SHARDS[1], "empty"),
    "a shard twice": ("sharded", copy_shard, "tensor_in_two_shards", SHARDS[1], "two shards"),
    "a tensor elsewhere": (
        "sharded",
        change_index(lambda places: places.update({EMBED: SHARDS[2]})),
        "tensor_not_in_shard",
        SHARDS[2],
        EMBED,
    ),
    "a shard in another folder": (
        "sharded",
        change_index(lambda places: places.update({EMBED: "../single/model.safetensors"})),
        "unsafe_path",
        INDEX,
        "../single",
    ),
    "a shard by its whole path": (
        "sharded",
        change_index(lambda places: places.update({EMBED: "/etc/passwd"})),
        "unsafe_path",
        INDEX,
        "/etc",
    ),
    "a shard linked out": ("sharded", link_out(SHARDS[0]), "link_out", SHARDS[0], "outside"),
    "adapter weights missing": (
        "lora",
        unlink("adapter_model.safetensors"),
        "no_weights",
        "adapter_model.safetensors",
        "matrices",
    ),
    "adapter weights cut": (
        "lora",
        cut("adapter_model.safetensors", 0.7),
        "truncated",
        "adapter_model.safetensors",
        "cut off",
    ),
    "adapter of another kind": (
        "lora",
        lambda p: change_json(p / "adapter_config.json", peft_type="IA3"),
        "adapter_kind",
        "adapter_config.json",
        "IA3",
    ),
    "adapter rank 0": (
        "lora",
        lambda p: change_json(p / "adapter_config.json", r=0),
        "config_bad_value",
        "adapter_config.json",
        "0",
    ),
    "adapter base gone": (
        "lora",
        lambda p: change_json(p / "adapter_config.json", base_model_name_or_path="/nowhere/base"),
        "base_not_found",
        "adapter_config.json",
        "/nowhere/base",
    ),
    "adapter base not named": (
        "lora",
        lambda p: change_json(p / "adapter_config.json", base_model_name_or_path=None),
        "base_not_found",
        "adapter_config.json",
        "base model",
    ),
}


# what no header tells: only the architecture knows
BY_SHAPES = {
    "key heads other", "more layers named", "other vocabulary", "other hidden size", "other inner size",
    "a tensor missing", "the embedding missing", "the last block missing", "untied without a head",
}  # fmt: skip


def test_the_folders_that_are_damaged_below_were_good(good_models: dict[str, Path]) -> None:
    for path in good_models.values():
        assert codes(judged(path)) == []


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_named_with_its_file(name: str, copy_of_model: Callable[[str], Path]) -> None:
    original, damage, code, file, word = FAULTS[name]
    path = copy_of_model(original)
    damage(path)
    start_s = time.monotonic()
    headers = inspect_model(path)
    assert time.monotonic() - start_s < 2
    assert is_valid_model_dir(path) is headers["valid"] is (name in BY_SHAPES)
    report = judged(path)
    assert code in codes(report), report["problems"]
    found = next(problem for problem in report["problems"] if problem["code"] == code)
    assert found["file"] == file and word in found["message"], found
    assert sentence(report).startswith("Cannot train this folder: ") and sentence(report).endswith(
        "Nothing was changed."
    )


def test_the_sentence_for_a_missing_shard_is_that_of_the_page(copy_of_model: Callable[[str], Path]) -> None:
    path = copy_of_model("sharded")
    (path / SHARDS[2]).unlink()
    assert sentence(inspect_model(path)) == (
        "Cannot train this folder: shard 3 of 3 is missing (model-00003-of-00003.safetensors, named in the index). "
        "Download that file again. Nothing was changed."
    )


def test_several_missing_shards_are_each_named(copy_of_model: Callable[[str], Path]) -> None:
    path = copy_of_model("sharded")
    unlink(SHARDS[0], SHARDS[1])(path)
    assert codes(inspect_model(path)) == ["missing_shard", "missing_shard"]


def test_a_misnamed_shard_is_told_its_name(copy_of_model: Callable[[str], Path]) -> None:
    path = copy_of_model("sharded")
    misname_shard(path)
    report = inspect_model(path)
    assert report["problems"][0]["fix"] == f"Rename model-00003-of-00004.safetensors to {SHARDS[2]}."
    (path / "model-00003-of-00004.safetensors").rename(path / SHARDS[2])
    assert inspect_model(path)["valid"]
