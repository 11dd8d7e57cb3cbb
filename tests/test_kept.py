"""The table of what blocks keep, held to the tensors that are alive, for each family and format; and a step's whole peak."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.live_bytes import LiveBytes
from tests.memory_rows import MemoryRows
from tests.tiny import tiny_config
from trainer.data.loader import MicroBatch, assemble
from trainer.loop.fit import sizes_of
from trainer.loop.forward import Path, forward, plain_head
from trainer.loop.kept import COUNTED, Format, kept
from trainer.loop.memory import Work, forecast
from trainer.machine import GIB
from trainer.models import attention
from trainer.models.activations import recompute
from trainer.models.lora import add_lora
from trainer.schema import Config

LENGTH, HIDDEN, VOCABULARY = 96, 128, 640
FAMILIES = ("qwen3", "llama", "mistral", "gemma", "gemma2", "granite", "phi3", "gpt2", "gpt_neox")


def one_row() -> MicroBatch:
    ids = np.random.default_rng(0).integers(3, VOCABULARY, LENGTH).tolist()
    return assemble(MemoryRows([(ids, [0] + [1] * (LENGTH - 1))]), np.arange(1), "cpu")


def model_of(family: str, layers: int, format_: Format) -> Any:
    attention.register("sdpa")
    config = tiny_config(family, VOCABULARY, hidden=HIDDEN, layers=layers, tied=True)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME)
    return model.to(torch.bfloat16) if format_ == "half" else model


def alive(family: str, layers: int, format_: Format, *, lora: bool, dropout: float = 0.0) -> tuple[int, Any]:
    """Bytes alive at the end of a forward pass, and the model."""
    model = model_of(family, layers, format_)
    trained = add_lora(model, rank=8, alpha=16, dropout=dropout, targets=[], seed=0) if lora else model
    trained.train()
    compute = torch.float32 if format_ == "fp32" else torch.bfloat16
    autocast = torch.bfloat16 if format_ == "mixed" or (lora and format_ == "half") else None
    counted = LiveBytes()
    counted.leave_out(list(model.parameters()) + list(model.buffers()))
    batch = one_row()
    with counted:
        found = forward(model, batch, Path("fused", plain_head(model), compute, autocast))
        now = counted.now
    assert torch.isfinite(found.labels).all()
    return now, model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("format_", "lora"), [("fp32", False), ("mixed", False), ("fp32", True), ("half", True)])
def test_a_block_keeps_what_the_table_says(family: str, format_: Format, lora: bool) -> None:
    assert family in COUNTED
    (one, _), (two, model) = (alive(family, layers, format_, lora=lora) for layers in (1, 2))
    sizes = sizes_of(model, model)
    widths = sizes.widths(8 if lora else 0)
    each = kept(family, format_, lora=lora).bytes_each(widths, 4 if format_ == "fp32" else 2, LENGTH)
    copies = 2 * sizes.matrices if format_ == "mixed" else 0
    if lora and format_ == "half":  # of the added matrices, which are fp32
        copies = 2 * sum(p.numel() for p in model.parameters() if p.requires_grad) // 2
    assert LENGTH * each + copies == pytest.approx(two - one, rel=0.06), (two - one) / LENGTH


def test_dropout_on_the_added_matrices_keeps_their_inputs_and_noise() -> None:
    (one, _), (two, model) = (alive("llama", layers, "fp32", lora=True, dropout=0.1) for layers in (1, 2))
    widths = sizes_of(model, model).widths(8)
    each = kept("llama", "fp32", lora=True, dropout=True).bytes_each(widths, 4, LENGTH)
    assert LENGTH * each == pytest.approx(two - one, rel=0.02)


STEPS: dict[str, dict[str, Any]] = {
    "nothing recomputed": {},
    "all recomputed": {"use_gradient_checkpointing": True},
    "selective": {"use_gradient_checkpointing": True, "gradient_checkpointing_policy": "selective"},
}


@pytest.mark.parametrize("policy", STEPS)
@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_peak_of_forward_and_backward_is_that_of_the_forecast(policy: str, method: str) -> None:
    config = Config.model_validate({"hyperparams": {"method": method, **STEPS[policy]}, "lora": {"r": 8}})
    model = model_of("qwen3", 4, "fp32")
    trained = add_lora(model, rank=8, alpha=16, dropout=0.0, targets=[], seed=0) if method == "lora" else model
    trained.train()
    if STEPS[policy]:
        recompute(model, config.hyperparams.gradient_checkpointing_policy)
    counted, batch = LiveBytes(), one_row()
    counted.leave_out(list(model.parameters()) + list(model.buffers()))
    with counted:
        forward(model, batch, Path("fused", plain_head(model), torch.float32, None)).labels.sum().backward()
    sizes = sizes_of(model, trained)
    found = forecast(config, sizes, Work(LENGTH, LENGTH - 1, LENGTH), on_gpu=False)
    static = found.parts["weights"] + found.parts["optimiser states"] + found.parts["libraries"]
    assert found.step_fixed_gib + found.step_moving_gib - static == pytest.approx(counted.peak / GIB, rel=0.12)
