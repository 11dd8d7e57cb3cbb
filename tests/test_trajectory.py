"""A real run on the starter model and its data, against transformers.Trainer on the same rows in the same order."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from tests import runs
from tests.test_step import _pad
from trainer.data.tokens import TokenCache
from trainer.events import all_events
from trainer.metrics import read_metrics, read_rows
from trainer.models.starter import write_starter
from trainer.run import RunDir
from trainer.worker import Worker
from trainer.workspace import Workspace

STEPS, ROWS, BATCH, ACCUMULATION = 50, 98, 2, 2  # 25 steps an epoch, the last of them with 2 rows instead of 4
RATE, WARM_UP = 5e-4, 5


class Dataset(torch.utils.data.Dataset):
    """Rows of the run's own token cache."""

    def __init__(self, cache: TokenCache) -> None:
        self.cache = cache

    def __len__(self) -> int:
        """Rows of the cache."""
        return len(self.cache.lengths)

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        """What Trainer's collator gets: ids, and the ids of labels with -100 elsewhere."""
        ids = np.asarray(self.cache.ids(row)).astype(np.int64)
        return {"input_ids": ids, "labels": np.where(np.asarray(self.cache.labels(row)) > 0, ids, -100)}


class Order(torch.utils.data.Sampler):
    """The rows of each epoch as the run trained them."""

    def __init__(self, epochs: list[list[int]]) -> None:
        self.epochs = epochs
        self.next = itertools.count()

    def __iter__(self) -> Iterator[int]:
        """The rows of the next epoch."""
        return iter(self.epochs[next(self.next)])

    def __len__(self) -> int:
        """Rows of an epoch."""
        return len(self.epochs[0])


def by_trainer(model: Path, cache: TokenCache, epochs: list[list[int]], out: Path) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step of transformers.Trainer."""
    arguments = TrainingArguments(
        output_dir=str(out),
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=ACCUMULATION,
        learning_rate=RATE,
        num_train_epochs=2,
        warmup_steps=WARM_UP,
        lr_scheduler_type="cosine",
        max_grad_norm=1.0,
        weight_decay=0.01,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        logging_nan_inf_filter=False,
    )

    class InOrder(Trainer):
        def _get_train_sampler(self, *args):
            return Order(epochs)

    trainer = InOrder(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        args=arguments,
        train_dataset=Dataset(cache),
        data_collator=_pad,
    )
    trainer.train()
    return [(float(e["loss"]), float(e["grad_norm"])) for e in trainer.state.log_history if "grad_norm" in e]


def one_run(root: Path) -> tuple[Path, RunDir, TokenCache]:
    """A finished run of 50 steps on the starter model: (model, run, its tokens)."""
    model, data = write_starter(root / "models", root / "data")
    few = root / "few.jsonl"
    few.write_text("".join(data.read_text("utf-8").splitlines(keepends=True)[:ROWS]), "utf-8")
    workspace, worker = Workspace(root / "ws").create(), Worker()
    config = runs.settings(
        model,
        few,
        learning_rate=RATE,
        warmup_steps=WARM_UP,
        weight_decay=0.01,
        batch_size=BATCH,
        gradient_accumulation=ACCUMULATION,
        max_steps=None,
        num_epochs=2,
        fp_precision="fp32",
        max_length=96,
        eval={"eval_strategy": "no"},
    )
    run = runs.new(workspace, config)
    try:
        assert runs.train(run, workspace, worker) == "finished"
    finally:
        worker.close()
    key = next(event["token_key"] for event in all_events(run.events) if event["kind"] == "plan")
    return model, run, TokenCache.open(workspace.tokens / key)


def test_fifty_steps_on_the_starter_model_are_those_of_transformers_trainer(tmp_path: Path) -> None:
    model, run, cache = one_run(tmp_path)
    rows = [[row for row, _, _ in read_rows(run.rows, step)] for step in range(1, STEPS + 1)]
    assert [len(part) for part in rows] == [4] * 24 + [2] + [4] * 24 + [2]
    epochs = [list(itertools.chain(*rows[:25])), list(itertools.chain(*rows[25:]))]
    wanted = by_trainer(model, cache, epochs, tmp_path / "theirs")
    found = read_metrics(run.metrics)
    assert len(found) == len(wanted) == STEPS
    loss_off = [abs(float(mine["loss"]) / loss - 1) for mine, (loss, _) in zip(found, wanted, strict=True)]
    norm_off = [abs(float(mine["grad_norm"]) / norm - 1) for mine, (_, norm) in zip(found, wanted, strict=True)]
    print(f"loss off by {max(loss_off):.1e} at most, gradient norm by {max(norm_off):.1e}")
    assert max(loss_off) <= 1e-5
    assert max(norm_off) <= 1e-4
    assert found["loss"][-1] == pytest.approx(wanted[-1][0], rel=1e-5) and found["loss"][-1] < 0.9 * found["loss"][0]
