"""Going on after a divergence: the bad rows are skipped, the rate is lowered, and every later life decides the same."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import runs
from tests.lives import assert_same, one_life
from tests.tiny import tiny_model_dir
from trainer import checkpoint
from trainer.events import all_events
from trainer.loop import step as steps
from trainer.loop.forward import Found
from trainer.machine import machine
from trainer.metrics import read_metrics, read_rows
from trainer.rewind import FACTOR, MOST, rewinds_of
from trainer.run import RunDir, status
from trainer.session import open_life, train_to_end
from trainer.states import allowed
from trainer.worker import Worker
from trainer.workspace import Workspace

Place = tuple[Workspace, Path, Path]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    root = tmp_path_factory.mktemp("rewind")
    data = runs.write_rows(root / "rows.jsonl", 30)
    return Workspace(root / "ws").create(), tiny_model_dir(root / "model", hidden=32, layers=1), data


def new(place: Place, **settings: Any) -> RunDir:
    workspace, model, data = place
    base = {
        "eval": {"eval_strategy": "no"}, "output": {"save_steps": 2, "save_total_limit": 9}, "max_steps": 8,
        "lr_schedule": "constant", "warmup_steps": 0, "on_divergence": "rewind",
    }  # fmt: skip
    return runs.new(workspace, runs.settings(model, data, **base | settings))


@pytest.fixture(scope="module")
def plain(place: Place, worker: Worker) -> RunDir:
    """The run in which nothing goes wrong."""
    run = new(place)
    assert one_life(run, place[0], worker) == "finished"
    return run


def poison(patch: pytest.MonkeyPatch, *rows: int) -> None:
    """From now on the loss of these rows is NaN in training."""
    forward = steps.forward

    def poisoned(model: Any, batch: Any, path: Any) -> Found:
        found = forward(model, batch, path)
        factors = torch.tensor([math.nan if row in rows else 1.0 for row in batch.rows])
        return Found(found.labels * factors[batch.label_row], found.router)

    patch.setattr(steps, "forward", poisoned)


def rewinds(run: RunDir) -> list[dict[str, Any]]:
    return [event for event in all_events(run.events) if event["kind"] == "rewind"]


def test_a_bad_row_is_skipped_and_the_run_goes_on_at_half_the_rate(
    place: Place, worker: Worker, plain: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = read_rows(plain.rows, 6)[1][0]
    poison(monkeypatch, bad)
    run = new(place)
    assert one_life(run, place[0], worker) == "finished", status(run).cause
    (event,) = rewinds(run)
    assert (event["step"], event["to"], event["rows"], event["factor"]) == (6, 4, [bad], FACTOR)
    assert "Step 6 diverged: back to step 4. 1 row is skipped" in event["text"]
    ours, theirs = read_metrics(run.metrics), read_metrics(plain.metrics)
    assert ours["step"].tolist() == theirs["step"].tolist() == list(range(1, 9))
    assert np.array_equal(ours["loss"][:4], theirs["loss"][:4])
    assert np.allclose(ours["learning_rate"], [3e-3] * 4 + [3e-3 * FACTOR] * 4, rtol=1e-12)
    assert np.isfinite(ours["loss"]).all() and ours["rows"][5] == theirs["rows"][5] - 1
    trained = {row for step in range(5, 9) for row, *_ in read_rows(run.rows, step)}
    assert trained == {row for step in range(5, 9) for row, *_ in read_rows(plain.rows, step)} - {bad}
    assert status(run).gen == 2, "the page draws the replaced points anew"


def test_stopped_or_resumed_around_at_any_time_it_is_the_same_run(
    place: Place, worker: Worker, plain: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, read_rows(plain.rows, 6)[1][0])
    whole = new(place)
    assert one_life(whole, place[0], worker) == "finished"
    for at in (4, 6, 7):  # at a checkpoint before it, in the bad step itself, and after it
        broken = new(place)
        assert one_life(broken, place[0], worker, at=at) == "stopped"
        assert one_life(broken, place[0], worker) == "finished"
        assert_same(broken, whole, f"stopped at step {at}")

    by_hand = new(place, on_divergence="stop")
    assert one_life(by_hand, place[0], worker) == "diverged"
    assert "resume-around" in allowed(status(by_hand).state)
    life = open_life(by_hand, "test", resumed=True, around_rows=True)
    assert train_to_end(life, place[0], worker, machine()) == "finished"
    assert_same(by_hand, whole, "a person resumed it around the row")


def test_a_step_whose_rows_are_all_skipped_leaves_no_record(
    place: Place, worker: Worker, plain: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [row for row, *_ in read_rows(plain.rows, 8)]
    poison(monkeypatch, *rows)
    run = new(place)
    assert one_life(run, place[0], worker) == "finished", status(run).cause
    assert rewinds(run)[0]["rows"] == rows and read_metrics(run.metrics)["step"].tolist() == list(range(1, 8))
    assert checkpoint.newest_verified(run.checkpoints).step == 8


def test_it_gives_up_after_some_rewinds_and_without_a_checkpoint(
    place: Place, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, *range(30))
    first = new(place)
    assert one_life(first, place[0], worker) == "diverged" and rewinds(first) == []
    # a person may still go around the rows: it starts over without them
    bad = [row["row"] for row in all_events(first.events)[-1]["rows"]]
    open_life(first, "test", resumed=True, around_rows=True).close()
    assert [(event["to"], event["rows"]) for event in rewinds(first)] == [(0, bad)]
    monkeypatch.undo()

    run = new(place, max_steps=40)
    assert one_life(run, place[0], worker, at=2) == "stopped"
    update = steps.Stepper._update

    def spoiled(self: steps.Stepper, rate: float, sums: torch.Tensor) -> torch.Tensor:
        self.named[0][1].grad[0, 0] = math.inf
        return update(self, rate, sums)

    monkeypatch.setattr(steps.Stepper, "_update", spoiled)
    assert one_life(run, place[0], worker) == "diverged"
    assert len(rewinds(run)) == MOST
    assert rewinds_of(all_events(run.events)).rate_factor == FACTOR**MOST
    assert checkpoint.newest_verified(run.checkpoints).step >= 2
