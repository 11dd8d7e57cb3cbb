"""No false alarm: good folders of many architectures and in many layouts pass both verdicts and the deep check, and not
a byte of them changes. Built with transformers and peft; loading each one is what says that it is good."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedConfig

from tests.both_verdicts import contents, judged
from tests.damage import change_json, codes
from tests.test_families import FUSED, ONE_ROW
from tests.tiny import ARCHITECTURES, tiny_adapter_dir, tiny_model_dir, tiny_tokenizer

Build = Callable[[Path], Path]
Tensors = dict[str, torch.Tensor]
LLAMA_ROTARY = "model.layers.{}.self_attn.rotary_emb.inv_freq"


def tiny(architecture: str, **options: Any) -> Build:
    """A folder of `tests.tiny`."""
    return lambda path: tiny_model_dir(path / "model", architecture, **options)


def of_config(config: PreTrainedConfig, **saving: Any) -> Build:
    """A folder with random weights of `config`, whose vocabulary has room for the tokenizer's."""

    def build(path: Path) -> Path:
        folder = tiny_tokenizer(path / "model", vocab=259)
        parts = (config, *(getattr(config, name) for name in config.sub_configs))
        sized = type(config).from_dict(json.loads(json.dumps(config.to_dict())) | {"vocab_size": 512})
        assert parts and sized.vocab_size == 512
        AutoModelForCausalLM.from_config(sized).save_pretrained(folder, **saving)
        return folder

    return build


def rewritten(architecture: str, change: Callable[[Tensors], Tensors], **options: Any) -> Build:
    """A folder whose tensors were renamed, doubled or joined by others, as older releases wrote them."""

    def build(path: Path) -> Path:
        folder = tiny_model_dir(path / "model", architecture, **options)
        tensors = change(load_file(folder / "model.safetensors"))
        save_file(
            {name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
        )
        return folder

    return build


def pickled(architecture: str, shards: int) -> Build:
    """A folder with .bin files."""

    def build(path: Path) -> Path:
        folder = tiny_model_dir(path / "model", architecture)
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        names = [f"pytorch_model-{n + 1:05}-of-{shards:05}.bin" for n in range(shards)]
        if shards == 1:
            torch.save(tensors, folder / "pytorch_model.bin")
            return folder
        places = {tensor: names[number % shards] for number, tensor in enumerate(tensors)}
        for name in names:
            torch.save({tensor: tensors[tensor] for tensor in tensors if places[tensor] == name}, folder / name)
        index = {"metadata": {}, "weight_map": places}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        return folder

    return build


def base_only(architecture: str) -> Build:
    """A folder saved from the model without its head: names have no prefix, the head is the embedding."""

    def build(path: Path) -> Path:
        whole = tiny_model_dir(path / "whole", architecture)
        AutoModel.from_pretrained(whole).save_pretrained(path / "model")
        shutil.copytree(
            whole, path / "model", dirs_exist_ok=True, ignore=lambda _, names: {"model.safetensors"} & {*names}
        )
        return path / "model"

    return build


def adapter(architecture: str, as_bin: bool = False, **options: Any) -> Build:
    """A LoRA adapter beside its base, as peft saves it; `options` as in LoraConfig."""

    def build(path: Path) -> Path:
        base = tiny_model_dir(path / "base", architecture)
        if not options and not as_bin:
            return tiny_adapter_dir(path / "lora", base)
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(task_type="CAUSAL_LM", r=4, **({"target_modules": "all-linear"} | options))
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        model.save_pretrained(path / "lora", safe_serialization=not as_bin)
        if as_bin and (path / "lora" / "adapter_model.safetensors").exists():  # newer peft writes safetensors only
            tensors = load_file(path / "lora" / "adapter_model.safetensors")
            (path / "lora" / "adapter_model.safetensors").unlink()
            torch.save(tensors, path / "lora" / "adapter_model.bin")
        return path / "lora"

    return build


def hub_cache(path: Path) -> Path:
    """A folder of links into the blobs of a hub cache."""
    made = tiny_model_dir(path / "made", "qwen3", max_shard_size="100KB")
    blobs, snapshot = path / "models--org--tiny" / "blobs", path / "models--org--tiny" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(made.iterdir())):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    return snapshot


def one_large_model_among_others(path: Path) -> Path:
    """A folder with what else hubs keep there: readme, original weights, a generation config, an image."""
    folder = tiny_model_dir(path / "model", "mistral")
    (folder / "README.md").write_text("# A model")
    (folder / "LICENSE").write_text("Apache")
    save_file({"tok_embeddings.weight": torch.zeros(3)}, folder / "consolidated.safetensors")
    (folder / "params.json").write_text("{}")
    (folder / "original").mkdir()
    (folder / "original" / "consolidated.00.pth").write_bytes(b"x")
    return folder


def with_inner(tensors: Tensors) -> Tensors:
    return tensors | {LLAMA_ROTARY.format(n): torch.ones(8) for n in range(2)}


def with_masks(tensors: Tensors) -> Tensors:
    masks = {f"transformer.h.{n}.attn.bias": torch.ones(1, 1, 512, 512) for n in range(2)}
    return tensors | masks | {f"transformer.h.{n}.attn.masked_bias": torch.tensor(-1e4) for n in range(2)}


def with_neox_buffers(tensors: Tensors) -> Tensors:
    stem = "gpt_neox.layers.{}.attention."
    more: Tensors = {}
    for n in range(2):
        more[stem.format(n) + "bias"] = torch.ones(1, 1, 512, 512, dtype=torch.bool)
        more[stem.format(n) + "masked_bias"] = torch.tensor(-1e9)
        more[stem.format(n) + "rotary_emb.inv_freq"] = torch.ones(8)
    return tensors | more


def only_the_head(tensors: Tensors) -> Tensors:
    rest = {name: tensor for name, tensor in tensors.items() if name != "model.embed_tokens.weight"}
    return rest | {"lm_head.weight": tensors["model.embed_tokens.weight"]}


FAMILIES: dict[str, PreTrainedConfig] = FUSED | ONE_ROW
# name -> how the folder is made, and the warnings that are right for it
LAYOUTS: dict[str, tuple[Build, set[str]]] = {
    **{f"{name}, tied": (tiny(name), set()) for name in ARCHITECTURES},
    **{
        f"{name}, bf16, untied, sharded": (tiny(name, tied=False, dtype="bfloat16", max_shard_size="100KB"), set())
        for name in ARCHITECTURES
    },
    **{name: (of_config(config), set()) for name, config in FAMILIES.items()},
    "olmoe in its own names, sharded": (of_config(FAMILIES["olmoe"], max_shard_size="20KB"), set()),
    "mixtral as it is in memory, experts fused": (of_config(FAMILIES["mixtral"], save_original_format=False), set()),
    "qwen3-moe with fused experts": (of_config(FAMILIES["qwen3-moe"], save_original_format=False), set()),
    "llama, fp16": (tiny("llama", dtype="float16"), set()),
    "gemma, fp16, sharded": (tiny("gemma", dtype="float16", max_shard_size="50KB"), set()),
    "qwen3, one layer": (tiny("qwen3", layers=1), set()),
    "llama, rows for more tokens than there are": (tiny("llama", vocab=512), set()),
    "llama, .bin": (pickled("llama", 1), {"pickle_weights", "deep_skipped"}),
    "gpt2, three .bin": (pickled("gpt2", 3), {"pickle_weights", "deep_skipped"}),
    "llama with the rotary buffers of 2023": (rewritten("llama", with_inner), set()),
    "gpt2 with its masks of 2020": (rewritten("gpt2", with_masks), set()),
    "gpt-neox with buffers of 2022": (rewritten("gpt_neox", with_neox_buffers, tied=False), set()),
    "gpt2 without a prefix, as first published": (
        rewritten("gpt2", lambda t: {name.removeprefix("transformer."): value for name, value in t.items()}),
        set(),
    ),
    "llama with head and embedding, both": (
        rewritten("llama", lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"]}),
        set(),
    ),
    "qwen3 with the head in place of the embedding": (rewritten("qwen3", only_the_head), set()),
    "qwen3 without its head": (base_only("qwen3"), set()),
    "gemma2 without its head": (base_only("gemma2"), set()),
    "links of a hub cache": (hub_cache, set()),
    "a folder with much else in it": (one_large_model_among_others, set()),
    **{f"adapter on {name}": (adapter(name), set()) for name in ("llama", "qwen3", "gpt2", "mixtral", "phi3", "gemma")},
    "adapter on all layers": (adapter("mistral", target_modules="all-linear"), set()),
    "adapter with DoRA": (adapter("llama", use_dora=True), set()),
    "adapter with a rank of its own": (adapter("qwen3", rank_pattern={"q_proj": 8}), set()),
    "adapter with a whole head": (adapter("llama", modules_to_save=["lm_head"]), set()),
    "adapter on the embedding": (adapter("llama", target_modules=["q_proj", "embed_tokens"]), set()),
    "adapter, .bin": (adapter("llama", as_bin=True), {"pickle_weights", "deep_skipped"}),
}


def test_these_are_more_than_thirty_layouts_of_more_than_eight_architectures() -> None:
    assert len(LAYOUTS) > 80
    assert len({*ARCHITECTURES, *(config.model_type for config in FAMILIES.values())}) > 30


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_good_folder_raises_no_alarm_and_stays_as_it_is(name: str, tmp_path: Path) -> None:
    build, warned = LAYOUTS[name]
    path = build(tmp_path)
    before = contents(tmp_path)
    report = judged(path, deep=True, model_roots=[tmp_path])
    assert codes(report) == []
    # random weights of older families start some matrices at zero, which a person should hear of and no more
    assert {item["code"] for item in report["warnings"]} - {"zero_weights"} == warned, report["warnings"]
    assert report["facts"]["shapes"] == ("unknown" if "pickle_weights" in warned else "as expected")
    assert contents(tmp_path) == before, "the check changed the folder"
    if report["kind"] == "full" and "pickle_weights" not in warned:
        model, loaded = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
        assert not loaded["missing_keys"] and not loaded["mismatched_keys"]
        # transformers forgot this single number of its own
        assert not [name for name in loaded["unexpected_keys"] if not name.endswith("masked_bias")]


def test_a_folder_that_may_not_be_written_is_checked_all_the_same(tmp_path: Path) -> None:
    path = tiny_model_dir(tmp_path / "model", "llama")
    change_json(path / "config.json", torch_dtype="float32")
    for file in path.iterdir():
        file.chmod(0o400)
    path.chmod(0o500)
    try:
        assert codes(judged(path, deep=True)) == []
    finally:
        path.chmod(0o700)
