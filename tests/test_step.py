"""Optimiser steps against plain PyTorch and transformers.Trainer; the non-finite flag; precision."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments

from tests.memory_rows import random_rows
from trainer.data.loader import assemble
from trainer.loop import optim
from trainer.loop.forward import choose_path
from trainer.loop.schedule import learning_rate
from trainer.loop.step import Stepper, draw_seed, seed_draws
from trainer.models import attention
from trainer.models.load import Loaded

VOCABULARY = 97
CONFIG = LlamaConfig(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    pad_token_id=0,
)


def build(seed: int = 0) -> Loaded:
    torch.manual_seed(seed)
    function = attention.register("sdpa")
    return Loaded(AutoModelForCausalLM.from_config(CONFIG, attn_implementation=attention.NAME), function, None)


def stepper_for(
    loaded: Loaded, cache, *, fp16=False, compute=torch.float32, autocast=None, clip=1.0, decay=0.0
) -> Stepper:
    path = choose_path(loaded.model, assemble(cache, np.arange(2), "cpu"), compute=compute, autocast=autocast).path
    loaded.model.train()
    return Stepper(
        loaded,
        loaded.model,
        path,
        device="cpu",
        max_grad_norm=clip,
        weight_decay=decay,
        optimizer="adamw",
        seed=1,
        fp16=fp16,
    )


@pytest.mark.parametrize("groups", [[8], [4, 4], [1] * 8, [3, 3, 2]])
def test_any_accumulation_gives_the_same_step(groups):
    cache = random_rows(8, VOCABULARY, seed=2)
    whole, parted = build(), build()
    one = stepper_for(whole, cache).step(1, [np.arange(8)], cache, 1e-3)
    borders = np.cumsum([0, *groups])
    two = stepper_for(parted, cache).step(
        1, [np.arange(a, b) for a, b in zip(borders, borders[1:], strict=False)], cache, 1e-3
    )
    assert one.arrive()[0] == pytest.approx(two.arrive()[0], rel=1e-6)
    assert one.arrive()[1] == pytest.approx(two.arrive()[1], rel=1e-5)
    assert one.labels == two.labels and one.tokens == two.tokens


class _Padded(torch.utils.data.Dataset):
    def __init__(self, cache) -> None:
        self.cache = cache

    def __len__(self) -> int:
        return len(self.cache.lengths)

    def __getitem__(self, row: int) -> dict:
        ids = self.cache.ids(row).astype(np.int64)
        labels = np.where(self.cache.labels(row) > 0, ids, -100)
        return {"input_ids": ids, "labels": labels}


def _pad(rows: list[dict]) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)
    ids, labels, mask = (torch.full((len(rows), longest), fill) for fill in (0, -100, 0))
    for number, row in enumerate(rows):
        count = len(row["input_ids"])
        ids[number, :count], labels[number, :count] = (
            torch.tensor(row["input_ids"]),
            torch.tensor(row["labels"]),
        )
        mask[number, :count] = 1
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


@pytest.mark.parametrize("batch,accumulation", [(4, 1), (2, 3)])
def test_twenty_steps_follow_transformers_trainer_step_for_step(tmp_path, batch, accumulation):
    cache = random_rows(22, VOCABULARY, seed=4)  # 22 rows: the last step of each epoch is smaller
    loaded = build()
    theirs = copy.deepcopy(loaded.model)
    theirs.set_attn_implementation("sdpa")
    order: list[list[int]] = []

    def collate(rows):
        return _pad(rows)

    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        learning_rate=3e-3,
        num_train_epochs=4,
        max_steps=20,
        warmup_steps=3,
        lr_scheduler_type="cosine",
        max_grad_norm=1.0,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        weight_decay=0.01,
        seed=0,
        remove_unused_columns=False,
        logging_nan_inf_filter=False,
    )

    class InOrder(Trainer):
        def _get_train_sampler(self, *args):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    trainer = InOrder(model=theirs, args=arguments, train_dataset=_Padded(cache), data_collator=collate)
    trainer.train()
    wanted = [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "grad_norm" in entry]
    stepper = stepper_for(loaded, cache, decay=0.01)
    per_step = batch * accumulation
    number = 0
    while number < 20:
        for start in range(0, 22, per_step):
            if number == 20:
                break
            number += 1
            rows = np.arange(start, min(start + per_step, 22))
            groups = [rows[i : i + batch] for i in range(0, len(rows), batch)]
            rate = learning_rate(number, peak=3e-3, warmup_steps=3, total_steps=20, schedule="cosine")
            loss, norm, _, _ = stepper.step(number, groups, cache, rate).arrive()
            assert loss == pytest.approx(float(wanted[number - 1][0]), rel=2e-5), number
            assert norm == pytest.approx(float(wanted[number - 1][1]), rel=1e-4), number
    del order


def test_a_nan_leaves_weights_moments_and_step_count_untouched_from_then_on():
    cache = random_rows(8, VOCABULARY, seed=2)
    loaded = build()
    stepper = stepper_for(loaded, cache)
    stepper.step(1, [np.arange(4)], cache, 1e-3)
    with torch.no_grad():
        keep = loaded.model.model.norm.weight.clone()
        loaded.model.model.norm.weight[0] = float("nan")
    before = {name: tensor.clone() for name, tensor in optim.state_by_name(stepper.optimizer, stepper.named).items()}
    weights = [parameter.detach().clone() for _, parameter in stepper.named]
    bad = stepper.step(2, [np.arange(4)], cache, 1e-3)
    assert bad.arrive()[2]
    with torch.no_grad():
        loaded.model.model.norm.weight.copy_(keep)
    assert stepper.step(3, [np.arange(4, 8)], cache, 1e-3).arrive()[2], (
        "the flag stays up: later steps are skipped as well"
    )
    after = optim.state_by_name(stepper.optimizer, stepper.named)
    assert all(torch.equal(before[name], after[name]) for name in before)
    for (name, parameter), saved in zip(stepper.named, weights, strict=True):
        if name != "model.norm.weight":
            assert torch.equal(parameter, saved), name


def test_clipping_at_zero_is_off_and_a_small_limit_shrinks_the_update():
    cache = random_rows(4, VOCABULARY, seed=2)
    norms = {
        clip: stepper_for(build(), cache, clip=clip).step(1, [np.arange(4)], cache, 1e-3).arrive()[1]
        for clip in (0.0, 1e-3)
    }
    assert norms[0.0] == pytest.approx(norms[1e-3]), "the norm reported is the one before clipping"
    moments = {}
    for clip in (0.0, 1e-3):
        stepper = stepper_for(build(), cache, clip=clip)
        stepper.step(1, [np.arange(4)], cache, 1e-3)
        moments[clip] = sum(
            float(v.norm())
            for k, v in optim.state_by_name(stepper.optimizer, stepper.named).items()
            if k.startswith("exp_avg/")
        )
    assert moments[1e-3] < 0.1 * moments[0.0]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns_with_fp32_weights(precision):
    cache = random_rows(8, VOCABULARY, seed=2)
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    stepper = stepper_for(build(), cache, fp16=precision == "fp16", compute=half, autocast=half)
    found = [stepper.step(n, [np.arange(8)], cache, 3e-3).arrive()[0] for n in range(1, 25)]
    assert found[-1] < 0.9 * found[0]
    assert all(parameter.dtype == torch.float32 for _, parameter in stepper.named)
    exact = stepper_for(build(), cache)
    first = exact.step(1, [np.arange(8)], cache, 3e-3).arrive()[0]
    assert found[0] == pytest.approx(first, rel=2e-2)


def test_random_draws_are_a_function_of_seed_step_and_micro_batch():
    seeds = {draw_seed(s, n, m) for s in (1, 2) for n in range(50) for m in range(4)}
    assert len(seeds) == 400
    assert draw_seed(1, 5, 2) == draw_seed(1, 5, 2)


def test_optimizer_states_missing_from_a_checkpoint_are_refused_by_name():
    cache = random_rows(4, VOCABULARY, seed=2)
    stepper = stepper_for(build(), cache)
    saved = dict(optim.state_by_name(stepper.optimizer, stepper.named))
    gone = next(key for key in saved if key.startswith("exp_avg_sq/"))
    del saved[gone]
    with pytest.raises(ValueError, match=gone.split("/", 1)[1]):
        optim.restore(stepper.optimizer, stepper.named, saved)


def test_seeding_the_draws_of_a_micro_batch_gives_the_draws_of_torch_manual_seed():
    seed = draw_seed(1, 5, 2)
    torch.manual_seed(seed)
    wanted = torch.rand(8)
    torch.manual_seed(0)
    seed_draws(seed, "cpu")
    assert torch.equal(torch.rand(8), wanted)
