"""LoRA: which layers get matrices in each architecture, what is refused in words, and what stays as it is."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM

from tests import runs
from tests.exact import SIZES, VOCABULARY, build, reference, relative_difference
from tests.memory_rows import random_rows
from tests.test_families import FUSED, ONE_ROW
from tests.test_forward import FAMILIES
from tests.test_gradients import applied_gradient, stepper_of
from tests.tiny import tiny_model_dir
from trainer import checkpoint
from trainer.events import all_events
from trainer.models.lora import add_lora, sensible_targets, targets_line
from trainer.refusal import Refusal
from trainer.run import status
from trainer.worker import Worker
from trainer.workspace import Workspace

CONFIGS = {**FAMILIES, **FUSED, **ONE_ROW} | {
    "dbrx": hf.DbrxConfig(
        d_model=32,
        n_heads=4,
        n_layers=2,
        max_seq_len=64,
        vocab_size=VOCABULARY,
        ffn_config=dict(ffn_hidden_size=32, moe_num_experts=4, moe_top_k=2),
        attn_config=dict(kv_n_heads=2, rope_theta=1e4, clip_qkv=8),
    ),
    "jamba": hf.JambaConfig(
        **SIZES,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        num_experts=4,
        num_experts_per_tok=2,
        use_mamba_kernels=False,
        mamba_d_state=8,
        mamba_dt_rank=4,
    ),
}
USUAL = "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj"
ATTENTION = "k_proj o_proj q_proj v_proj"
TARGETS = {
    "bloom": "dense dense_4h_to_h dense_h_to_4h query_key_value",
    "cohere with a logit scale": USUAL,
    "dbrx": "Wqkv out_proj",
    "deepseek v3": "kv_a_proj_with_mqa kv_b_proj o_proj q_a_proj q_b_proj",
    "falcon": "dense dense_4h_to_h dense_h_to_4h query_key_value",
    "gemma2 with caps": USUAL,
    "gemma3": USUAL,
    "glm4": "down_proj gate_up_proj k_proj o_proj q_proj v_proj",
    "gpt-j": "fc_in fc_out k_proj out_proj q_proj v_proj",
    "gpt-neox": "dense dense_4h_to_h dense_h_to_4h query_key_value",
    "gpt-oss with sinks": ATTENTION,
    "gpt2": "c_attn c_fc c_proj",
    "granite-moe": ATTENTION,
    "jamba": "in_proj k_proj o_proj out_proj q_proj v_proj",
    "llama": USUAL,
    "mamba": "in_proj",
    "mixtral": ATTENTION,
    "mpt": "Wqkv down_proj out_proj up_proj",
    "opt": "fc1 fc2 k_proj out_proj q_proj v_proj",
    "phi": "dense fc1 fc2 k_proj q_proj v_proj",
    "phi3": "down_proj gate_up_proj o_proj qkv_proj",
    "qwen2-moe": ATTENTION,
    "qwen3 tied": USUAL,
    "qwen3-moe": ATTENTION,
    "qwen3-next": "in_proj_ba in_proj_qkvz k_proj o_proj out_proj q_proj v_proj",
    "starcoder2": "c_fc c_proj k_proj o_proj q_proj v_proj",
}
EXPERTS = {
    "dbrx", "deepseek v3", "gpt-oss with sinks", "granite-moe", "jamba", "mixtral", "qwen2-moe", "qwen3-moe", "qwen3-next"
}  # fmt: skip


def lora(model, targets=(), **changes) -> PeftModel:
    return add_lora(model, **(dict(rank=2, alpha=4, dropout=0.0, seed=0, targets=list(targets)) | changes))


@pytest.mark.parametrize("family", TARGETS)
def test_the_sensible_targets_of_an_architecture_are_what_really_gets_matrices_and_gradients(family) -> None:
    loaded = build(CONFIGS[family])
    wanted = TARGETS[family].split()
    assert sensible_targets(loaded.model) == wanted
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a warning of peft's would stand in the log of every run
        trained = lora(loaded.model)
    moved = {name: p for name, p in trained.named_parameters() if p.requires_grad}
    assert sorted({name.split(".lora_")[0].rsplit(".", 1)[-1] for name in moved}) == wanted
    assert not any(part in name.split(".") for name in moved for part in ("router", "gate", "experts", "lm_head"))
    assert all(parameter.dtype == torch.float32 for parameter in moved.values())
    line = targets_line(trained)
    assert all(name in line for name in wanted) and ("experts" in line) == (family in EXPERTS)
    cache = random_rows(2, VOCABULARY, seed=3)
    found = applied_gradient(stepper_of(loaded, trained, cache), [np.arange(2)], cache)
    idle = [name for name in moved if "lora_B" in name and not found[name].abs().sum() > 0]
    assert not idle, "these matrices are trained by nothing"


REFUSED = {
    "no such layer": ("llama", "qproj", "is no layer"),
    "nothing": ("llama", "", "is no layer"),
    "a part of a name": ("llama", "proj", "is no layer"),
    "a norm": ("llama", "input_layernorm", "is no linear layer"),
    "a whole block": ("llama", "self_attn", "is no linear layer"),
    "the tied head": ("qwen3 tied", "lm_head", "tied to the embeddings"),
    "the tied embeddings": ("qwen3 tied", "embed_tokens", "tied to the embeddings"),
    "experts in one block": ("mixtral", "experts", "is no linear layer"),
    "an expert's matrix": ("mixtral", "w1", "is no layer"),
    "a router": ("mixtral", "gate", "is no linear layer"),
    "what peft would read as experts": ("deepseek v3", "down_proj", "with experts"),
    "what a kernel reads itself": ("mamba", "out_proj", "kernels"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_target_that_cannot_be_trained_is_refused_by_name_with_those_that_can(what) -> None:
    family, target, why = REFUSED[what]
    model = build(CONFIGS[family]).model
    with pytest.raises(Refusal, match=why) as caught:
        lora(model, [target])
    assert f"'{target}'" in caught.value.message and sensible_targets(model)[0] in caught.value.message
    assert caught.value.field == "lora.target_modules"
    assert not any("lora_" in name for name, _ in model.named_parameters()), "the model was changed all the same"


def test_an_own_choice_of_targets_is_taken_as_it_is() -> None:
    trained = lora(build(CONFIGS["llama"]).model, ["self_attn.q_proj", "down_proj"])
    names = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name, p in trained.named_parameters() if p.requires_grad}
    assert names == {"q_proj", "down_proj"}


def test_matrices_on_a_head_of_its_own_leave_the_fused_way_and_are_exact() -> None:
    loaded = build(CONFIGS["llama"])
    trained = lora(loaded.model, ["q_proj", "lm_head"])
    for parameter in trained.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.05, generator=torch.Generator().manual_seed(1))
    cache = random_rows(5, VOCABULARY, seed=3)
    wanted = {f"base_model.model.{name}": g for name, g in reference(loaded.model, cache, range(5))[1].items()}
    stepper = stepper_of(loaded, trained, cache)
    assert stepper.path.way == "own head"
    assert relative_difference(applied_gradient(stepper, [np.arange(5)], cache), wanted) <= 1e-6


@pytest.fixture(scope="module")
def worker():
    made = Worker()
    yield made
    made.close()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("lora")
    return root, Workspace(root / "ws").create(), runs.write_rows(root / "rows.jsonl")


def saved_model(run) -> Path:
    return checkpoint.newest_verified(run.checkpoints).path / "model"


def are_tied(model) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_tied_embeddings_stay_tied_through_training_saving_and_resume(place, worker) -> None:
    root, workspace, data = place
    model = tiny_model_dir(root / "tied", "llama", tied=True)
    run = runs.new(workspace, runs.settings(model, data, method="full", max_steps=6))
    assert runs.train(run, workspace, worker, stop_at=3) == "stopped"
    first = AutoModelForCausalLM.from_pretrained(saved_model(run))
    assert runs.train(run, workspace, worker) == "finished"
    last = AutoModelForCausalLM.from_pretrained(saved_model(run))
    started = AutoModelForCausalLM.from_pretrained(model)
    assert are_tied(started) and are_tied(first) and are_tied(last) and last.config.tie_word_embeddings
    weights = [each.get_input_embeddings().weight for each in (started, first, last)]
    assert not torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])
    from safetensors import safe_open

    with safe_open(saved_model(run) / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # one matrix, saved once


def test_under_lora_embeddings_and_head_are_those_of_the_base_to_the_last_bit(place, worker) -> None:
    root, workspace, data = place
    model = tiny_model_dir(root / "tied-lora", "llama", tied=True)
    run = runs.new(workspace, runs.settings(model, data, method="lora", max_steps=6))
    assert runs.train(run, workspace, worker, stop_at=3) == "stopped"
    assert runs.train(run, workspace, worker) == "finished"
    tuned, base = (
        AutoPeftModelForCausalLM.from_pretrained(saved_model(run)),
        AutoModelForCausalLM.from_pretrained(model),
    )
    assert are_tied(tuned.get_base_model())
    assert torch.equal(tuned.get_base_model().get_input_embeddings().weight, base.get_input_embeddings().weight)
    merged = copy.deepcopy(tuned).merge_and_unload()
    assert are_tied(merged) and torch.equal(merged.lm_head.weight, base.lm_head.weight)
    assert any(
        "LoRA matrices on: down_proj, gate_proj" in e["text"] for e in all_events(run.events) if e["kind"] == "log"
    )


@pytest.mark.parametrize("architecture", ["mixtral", "gpt2"])
def test_an_adapter_of_such_a_model_resumes_to_the_last_bit_and_peft_gives_its_loss(
    place, worker, architecture
) -> None:
    root, workspace, data = place
    model = tiny_model_dir(root / architecture, architecture)
    config = runs.settings(model, data, method="lora", max_steps=6, eval={"eval_steps": 6})
    whole, broken = runs.new(workspace, config), runs.new(workspace, config)
    assert runs.train(whole, workspace, worker) == "finished"
    assert runs.train(broken, workspace, worker, stop_at=3) == "stopped"
    assert runs.train(broken, workspace, worker) == "finished"
    files = [saved_model(run) / "adapter_model.safetensors" for run in (whole, broken)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert AutoPeftModelForCausalLM.from_pretrained(saved_model(whole)) is not None


def test_a_target_that_matches_nothing_ends_a_run_in_words(place, worker) -> None:
    root, workspace, data = place
    model = tiny_model_dir(root / "refused", "llama")
    run = runs.new(workspace, runs.settings(model, data, method="lora", lora={"target_modules": ["qproj"]}))
    assert runs.train(run, workspace, worker) == "failed"
    assert "LoRA target 'qproj' is no layer of this model" in status(run).cause
