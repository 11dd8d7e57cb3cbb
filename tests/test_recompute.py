"""Gradient checkpointing gives the same gradients to the last bit, dropout included; compiled layers give nearly the same."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf

from tests.exact import SIZES, VOCABULARY, build
from tests.memory_rows import random_rows
from tests.test_gradients import applied_gradient, plan_for, stepper_of
from trainer.models.activations import recompute, recomputes
from trainer.models.lora import add_lora

CONFIGS = {
    "llama": hf.LlamaConfig(**SIZES),
    "gemma2": hf.Gemma2Config(**SIZES, head_dim=8, attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    "gpt2 with dropout": hf.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=256),
    "mixtral": hf.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
}


def gradient(family: str, method: str, policy: str | None, capacity: int | None) -> dict[str, torch.Tensor]:
    """The gradient of one step of two micro-batches (rows, or packs of `capacity` tokens)."""
    loaded = build(CONFIGS[family])
    trained = loaded.model
    if method == "lora":
        trained = add_lora(loaded.model, rank=4, alpha=8, dropout=0.25, targets=[], seed=3)
        generator = torch.Generator().manual_seed(5)
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.data.normal_(0, 0.05, generator=generator)
    if policy is not None:
        recompute(loaded.model, policy)
    assert recomputes(loaded.model) == (policy is not None)
    cache = random_rows(8, VOCABULARY, seed=3)
    stepper = stepper_of(loaded, trained, cache)
    groups = plan_for(cache, 4, capacity).micro_batches(1, 2)
    return applied_gradient(stepper, groups, cache)


@pytest.mark.parametrize("capacity", [None, 120], ids=["rows", "packed"])
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("family", CONFIGS)
def test_recomputed_activations_give_the_same_gradient_to_the_last_bit(family, method, capacity) -> None:
    kept = gradient(family, method, None, capacity)
    again = gradient(family, method, None, capacity)
    for policy in ("full", "selective"):
        found = gradient(family, method, policy, capacity)
        assert found.keys() == kept.keys() and len(found) > 5
        different = [name for name in kept if not torch.equal(kept[name], found[name])]
        assert not different, (policy, different[:3])
    assert all(torch.equal(kept[name], again[name]) for name in kept), "the gradient itself is not repeatable"


def test_another_seed_draws_another_dropout() -> None:
    """What makes the equality above worth something: the draws do reach the gradient."""
    loaded = build(CONFIGS["llama"])
    trained = add_lora(loaded.model, rank=4, alpha=8, dropout=0.25, targets=[], seed=3)
    cache = random_rows(4, VOCABULARY, seed=3)
    stepper = stepper_of(loaded, trained, cache)
    first = applied_gradient(stepper, [np.arange(4)], cache)
    stepper.seed += 1
    second = applied_gradient(stepper, [np.arange(4)], cache)
    assert any(not torch.equal(first[name], second[name]) for name in first if "lora_B" in name)


COMPILED = """
import sys
import numpy as np, torch
from tests.exact import VOCABULARY, build, relative_difference
from tests.memory_rows import random_rows
from tests.test_gradients import applied_gradient, stepper_of
from tests.test_recompute import CONFIGS
from trainer.loop.prepare import compile_layers
cache = random_rows(5, VOCABULARY, seed=3)
found = []
for compiled in (False, True):
    loaded = build(CONFIGS["llama"])
    stepper = stepper_of(loaded, loaded.model, cache)
    if compiled:
        compile_layers(loaded, print)
    found.append(applied_gradient(stepper, [np.arange(3), np.arange(3, 5)], cache))
print("relative error", relative_difference(found[1], found[0]))
from torch._dynamo.utils import counters
print("graphs", counters["stats"]["unique_graphs"])
assert counters["stats"]["unique_graphs"] >= 1, "nothing was compiled"
assert relative_difference(found[1], found[0]) <= 1e-5
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler, and there is no g++")
def test_compiled_layers_give_the_gradient_of_the_plain_ones(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", COMPILED],
        cwd=Path(__file__).resolve().parent.parent,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-2000:]
