"""Memory that runs out in every phase of a run: each step is trained once, on the same rows, and nothing is lost in silence."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests import runs
from tests.lives import assert_same, row_losses
from tests.tiny import tiny_model_dir
from trainer import checkpoint
from trainer.events import all_events
from trainer.loop import evaluate, optim, sampler, saves
from trainer.loop import step as steps
from trainer.metrics import read_metrics
from trainer.run import RunDir, status
from trainer.worker import Worker
from trainer.workspace import Workspace

Place = tuple[Workspace, Worker, Path, Path]
OFF = {"eval_strategy": "no"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    root, worker = tmp_path_factory.mktemp("ladder"), Worker()
    model, data = tiny_model_dir(root / "model", hidden=32, layers=1), runs.write_rows(root / "rows.jsonl", 24)
    yield Workspace(root / "ws").create(), worker, model, data
    worker.close()


def new(place: Place, **changes: Any) -> RunDir:
    """A run of 8 steps of 4 rows at once, saved every third step."""
    given: dict[str, Any] = {"batch_size": 4, "gradient_accumulation": 1, "output": {"save_steps": 3}, "eval": OFF}
    return runs.new(place[0], runs.settings(place[2], place[3], **{**given, **changes}))


def ended(place: Place, run: RunDir) -> str:
    """How a life of `run` ends."""
    return runs.train(run, place[0], place[1])


def kinds(run: RunDir) -> list[str]:
    return [event["kind"] for event in all_events(run.events)]


class Short:
    """Memory that runs out at given calls, before or after the real work was done."""

    def __init__(self, real: Any, at: set[int], *, after: bool = False) -> None:
        self.real, self.at, self.after, self.calls = real, at, after, 0

    def __call__(self, *given: Any, **named: Any) -> Any:
        self.calls += 1
        if self.calls in self.at and not self.after:
            raise torch.OutOfMemoryError("simulated")
        result = self.real(*given, **named)
        if self.calls in self.at:
            raise torch.OutOfMemoryError("simulated")
        return result

    def method(self) -> Any:
        """To stand in a class."""
        return lambda *given, **named: self(*given, **named)


def assert_each_step_once(tight: RunDir, calm: RunDir, updates: int = 8) -> None:
    """The same steps of the same rows with the same losses (but for the order of sums), and one update a step."""
    ours, theirs = read_metrics(tight.metrics), read_metrics(calm.metrics)
    for column in ("step", "tokens", "labels", "learning_rate"):
        assert ours[column].tolist() == theirs[column].tolist(), column
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    rows = [[sorted((row, labels) for row, _, labels in step) for step in row_losses(run)] for run in (tight, calm)]
    assert rows[0] == rows[1]
    states = load_file(checkpoint.newest_verified(tight.checkpoints).path / checkpoint.OPTIMIZER)
    assert {float(value) for name, value in states.items() if name.startswith("step/")} == {float(updates)}


@pytest.fixture(scope="module")
def calm(place: Place) -> RunDir:
    run = new(place)
    assert ended(place, run) == "finished"
    gc.collect()
    return run


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("at", [{1}, {4}, {4, 5, 6}])
def test_in_forward_or_backward_the_step_is_played_again_smaller(
    place: Place, calm: RunDir, monkeypatch: pytest.MonkeyPatch, where: str, at: set[int]
) -> None:
    if where == "forward":
        monkeypatch.setattr(steps, "forward", Short(steps.forward, at))
    else:  # gradients of the micro-batch are there already when it runs out
        monkeypatch.setattr(steps.Stepper, "_backward", Short(steps.Stepper._backward, at, after=True).method())
    run = new(place)
    assert ended(place, run) == "finished", status(run).cause
    assert kinds(run).count("oom_rung") == len(at) and "rewind" not in kinds(run)
    assert_each_step_once(run, calm)


@pytest.mark.parametrize(("at", "back_to"), [({2}, [0]), ({5}, [3]), ({5, 6}, [3, 3]), ({1, 8}, [0, 6])])
def test_in_the_update_the_run_goes_back_to_its_last_checkpoint_and_on_with_less(
    place: Place, calm: RunDir, monkeypatch: pytest.MonkeyPatch, at: set[int], back_to: list[int]
) -> None:
    # all of the weights were updated when it runs out, which is the worst: played again, the step would count twice
    monkeypatch.setattr(optim.StepGuard, "step", Short(optim.StepGuard.step, at, after=True).method())
    run = new(place)
    assert ended(place, run) == "finished", status(run).cause
    found = [event for event in all_events(run.events) if event["kind"] == "rewind"]
    assert [event["to"] for event in found] == back_to and all("Nothing is skipped" in event["text"] for event in found)
    rungs = [event["text"] for event in all_events(run.events) if event["kind"] == "oom_rung"]
    assert [text.split("now ")[1][0] for text in rungs] == ["2", "1"][: len(at)], "the rung is kept on the way back"
    assert_each_step_once(run, calm)


def test_in_every_update_the_run_ends_in_words_with_its_checkpoint(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new(place)
    assert runs.train(run, place[0], place[1], stop_at=3) == "stopped"
    monkeypatch.setattr(optim.StepGuard, "step", Short(optim.StepGuard.step, set(range(1, 99))).method())
    assert ended(place, run) == "failed"
    assert "Out of memory at step 4 with one row at a time" in (status(run).cause or "")
    assert kinds(run).count("oom_rung") == 3 and checkpoint.newest_verified(run.checkpoints).step == 3


def test_in_the_held_out_check_it_is_measured_in_smaller_groups(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"eval": {"eval_steps": 4}, "data": {"validation_split": 0.4}}
    whole, tight, none = (new(place, **settings) for _ in range(3))
    assert ended(place, whole) == "finished"
    losses = {event["step"]: event["loss"] for event in all_events(whole.events) if event["kind"] == "eval"}
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "losses", Short(evaluate.losses, {1, 2}))
        assert ended(place, tight) == "finished", status(tight).cause
    measured = {event["step"]: event["loss"] for event in all_events(tight.events) if event["kind"] == "eval"}
    assert measured == pytest.approx(losses, rel=1e-5) and kinds(tight).count("oom_rung") == 2
    assert_same(tight, whole, "out of memory in the held-out check")
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "losses", Short(evaluate.losses, set(range(1, 999))))
        assert ended(place, none) == "finished", status(none).cause
    told = [event["text"] for event in all_events(none.events) if event["kind"] == "alert"]
    assert [text.split(" was")[0] for text in told] == [f"Held-out loss of step {step}" for step in (0, 4, 8)]
    assert read_metrics(none.metrics)["loss"].tolist() == read_metrics(whole.metrics)["loss"].tolist()


def test_in_a_sample_or_in_the_copy_of_a_save_the_run_goes_on_and_says_so(
    place: Place, calm: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new(place, eval={"eval_strategy": "no", "sample_steps": 4, "sample_max_tokens": 4})
    monkeypatch.setattr(sampler, "answer", Short(sampler.answer, {1}))
    monkeypatch.setattr(saves, "snapshot", Short(saves.snapshot, {1}))
    assert ended(place, run) == "finished", status(run).cause
    told = [event["text"] for event in all_events(run.events) if event["kind"] == "alert"]
    assert told[0].startswith("Saving step 3 went wrong: there is not enough memory for a copy")
    assert told[1].startswith("Sample 1 could not be written") and len(told) == 2
    assert [event["step"] for event in all_events(run.events) if event["kind"] == "checkpoint"] == [6, 8]
    assert_same(run, calm, "out of memory in a sample and in a save")
    last = new(place)
    monkeypatch.setattr(saves, "snapshot", Short(saves.snapshot, {3}))
    assert ended(place, last) == "failed" and "not enough memory" in (status(last).cause or "")
    assert checkpoint.newest_verified(last.checkpoints).step == 6
    monkeypatch.undo()
    assert ended(place, last) == "finished"
    assert_same(last, calm, "resumed after a last save that found no memory")
    assert np.isfinite(read_metrics(last.metrics)["loss"]).all()
