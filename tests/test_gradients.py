"""The gradient a step really applies: full and LoRA, every way of accumulating, partial last steps, packed, and in bf16."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model

from tests.exact import SIZES, VOCABULARY, build, reference, relative_difference
from tests.memory_rows import MemoryRows, random_rows
from trainer.data.loader import assemble
from trainer.data.packing import Plan, make_plan
from trainer.loop.forward import choose_path
from trainer.loop.step import Stepper
from trainer.models.load import Loaded
from trainer.models.lora import add_lora, sensible_targets

CONFIGS = {
    "llama": hf.LlamaConfig(**SIZES),
    "gemma2": hf.Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=3.0, sliding_window=16),
    "gpt2": hf.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=256,
        resid_pdrop=0,
        attn_pdrop=0,
        embd_pdrop=0,
    ),
    "mixtral": hf.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
}
ROWS = 7


def stepper_of(loaded: Loaded, trained: Any, cache: MemoryRows, autocast: torch.dtype | None = None) -> Stepper:
    """A stepper on the path that the check of every start chooses."""
    compute = autocast or next(loaded.model.parameters()).dtype
    path = choose_path(loaded.model, assemble(cache, np.arange(2), "cpu"), compute=compute, autocast=autocast).path
    trained.train()
    settings = dict(device="cpu", max_grad_norm=1.0, weight_decay=0.0, optimizer="adamw", seed=1, fp16=False)
    return Stepper(loaded, trained, path, **settings)


def applied_gradient(stepper: Stepper, groups: list[np.ndarray], cache: MemoryRows) -> dict[str, torch.Tensor]:
    """The gradient that a real step has ready when it comes to its update."""
    found: dict[str, torch.Tensor] = {}

    def instead(rate: float, sums: list[torch.Tensor]) -> torch.Tensor:
        found.update({name: p.grad.clone() for name, p in stepper.named if p.grad is not None})
        stepper.optimizer.zero_grad(set_to_none=True)
        return torch.zeros(())

    stepper._update = instead  # type: ignore[method-assign]
    stepper.step(1, groups, cache, 1e-3)
    return found


def with_lora(loaded: Loaded) -> tuple[Any, Any]:
    """(our adapter on the model, peft's own on a copy of it): the same matrices, none of them zero."""
    plain = copy.deepcopy(loaded.model)
    ours = add_lora(loaded.model, rank=4, alpha=8, dropout=0.0, targets=[], seed=3)
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=sensible_targets(plain), task_type="CAUSAL_LM")
    theirs = get_peft_model(plain, settings)
    generator = torch.Generator().manual_seed(5)
    matrices = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
            matrices[name].data = parameter.data.clone()
    return ours, theirs


def plan_for(cache: MemoryRows, packs_per_step: int, capacity: int | None) -> Plan:
    """One epoch of all rows."""
    rows = np.arange(len(cache.lengths))
    settings = dict(seed=1, epochs=1.0, max_steps=None, packs_per_step=packs_per_step, capacity=capacity)
    return make_plan(cache.lengths, rows, np.empty(0, np.int64), np.ones(len(rows)), **settings)


@pytest.mark.parametrize("capacity", [None, 80], ids=["rows", "packed"])
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize(
    "family", ["llama", "gemma2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2", "mixtral"))]
)
def test_every_step_of_every_accumulation_applies_the_gradient_of_transformers(family, method, capacity) -> None:
    loaded = build(CONFIGS[family])
    cache = random_rows(ROWS, VOCABULARY, seed=3)
    ours, theirs = (loaded.model, loaded.model) if method == "full" else with_lora(loaded)
    stepper = stepper_of(loaded, ours, cache)
    wanted: dict[tuple[int, ...], dict[str, torch.Tensor]] = {}
    partial = 0
    for packs_per_step in range(1, ROWS + 1):
        plan = plan_for(cache, packs_per_step, capacity)
        for step in range(1, plan.total_steps + 1):
            first, end = plan.step_packs[step - 1]
            partial += end - first < packs_per_step
            for packs_each in range(1, packs_per_step + 1):
                groups = plan.micro_batches(step, packs_each)
                rows = tuple(int(row) for group in groups for row in group)
                if rows not in wanted:
                    wanted[rows] = reference(theirs, cache, rows)[1]
                mine = applied_gradient(stepper, groups, cache)
                assert relative_difference(mine, wanted[rows]) <= 1e-6, (packs_per_step, step, packs_each)
    assert partial > 2, "no step was a partial one"


BF16 = {
    "llama": CONFIGS["llama"],
    "qwen3": hf.Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=True),
    "gemma2": CONFIGS["gemma2"],
}


@pytest.mark.parametrize("family", BF16)
@pytest.mark.parametrize("weights", ["fp32 masters", "pure bf16"])
def test_the_gradient_in_bf16_is_no_further_off_than_that_of_transformers_in_bf16(family, weights) -> None:
    """Measured against the exact fp32 gradient of the same weights; figures in docs/exactness.md."""
    exact = build(BF16[family])
    cache = random_rows(24, VOCABULARY, seed=3)
    rows = range(24)
    if weights == "pure bf16":  # the same numbers in both: what is measured is the computation alone
        exact.model.to(torch.bfloat16).to(torch.float32)
    _, wanted = reference(exact.model, cache, rows)
    loaded = build(BF16[family])
    loaded.model.load_state_dict(exact.model.state_dict())
    autocast = torch.bfloat16
    if weights == "pure bf16":
        loaded.model.to(torch.bfloat16)
        autocast = None
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast is not None):
        _, theirs = reference(loaded.model, cache, rows)
    stepper = stepper_of(loaded, loaded.model, cache, autocast)
    mine = applied_gradient(stepper, [np.arange(a, a + 8) for a in (0, 8, 16)], cache)
    ours_off, theirs_off = relative_difference(mine, wanted), relative_difference(theirs, wanted)
    print(f"{family}, {weights}: ours {ours_off:.2e}, transformers {theirs_off:.2e}")
    assert ours_off <= 1.05 * theirs_off
    assert ours_off <= 2e-2
