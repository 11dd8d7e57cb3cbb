"""The ends of a life: no command after the last event, receipts that name what is whole, and early stopping cut off."""

from __future__ import annotations

import errno
import json
import time
from pathlib import Path
from typing import Any

import pytest

from tests import runs
from tests.tiny import tiny_model_dir
from trainer import checkpoint, control
from trainer.events import all_events
from trainer.machine import machine
from trainer.metrics import read_metrics
from trainer.notify import Message, Notifier
from trainer.run import status
from trainer.session import open_life, train_to_end
from trainer.worker import Worker
from trainer.workspace import Workspace

Place = tuple[Workspace, Path, Path]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    root = tmp_path_factory.mktemp("session")
    data = runs.write_rows(root / "rows.jsonl", 30)
    return Workspace(root / "ws").create(), tiny_model_dir(root / "model", hidden=32, layers=1), data


def test_a_stop_that_comes_when_the_run_has_just_ended_changes_nothing(place: Place, worker: Worker) -> None:
    workspace, model, data = place
    run = runs.new(workspace, runs.settings(model, data, max_steps=2, eval={"eval_strategy": "no"}))

    class Late(Notifier):
        def tell(self, run_id: str, message: Message | None) -> None:
            control.drop(run.control, "stop", "a person")
            time.sleep(0.4)  # the folder is looked at ten times a second

    life = open_life(run, "test", resumed=False)
    assert train_to_end(life, workspace, worker, machine(), notifier=Late(workspace.root)) == "finished"
    assert status(run).state == "finished", [event["kind"] for event in all_events(run.events)][-3:]


def test_receipt_and_status_name_the_newest_step_that_is_whole(place: Place, worker: Worker) -> None:
    workspace, model, data = place
    config = runs.settings(
        model, data, max_steps=8, eval={"eval_strategy": "no"}, output={"save_steps": 2, "save_total_limit": 9}
    )
    run = runs.new(workspace, config)
    assert runs.train(run, workspace, worker, stop_at=6) == "stopped"
    assert status(run).last_checkpoint_step == 6
    weights = checkpoint.directory_of(run.checkpoints, 6) / checkpoint.OPTIMIZER
    weights.write_bytes(weights.read_bytes()[:-1])
    assert runs.train(run, workspace, worker, stop_at=5) == "stopped"
    receipt = all_events(run.events)[-1]
    assert (receipt["kind"], receipt["step"], receipt["saved_step"]) == ("stopped", 5, 5)
    assert status(run).last_checkpoint_step == 5


def test_a_run_that_stopped_early_and_was_killed_before_it_said_so_ends_at_the_same_step(
    place: Place, worker: Worker
) -> None:
    workspace, model, data = place
    config = runs.settings(
        model, data, max_steps=12, learning_rate=0.5, warmup_steps=0, early_stopping_patience=2,
        eval={"eval_strategy": "steps", "eval_steps": 1}, output={"save_steps": 0},
    )  # fmt: skip
    run = runs.new(workspace, config)
    assert runs.train(run, workspace, worker) == "finished"
    ended = all_events(run.events)[-1]
    assert "no better held-out loss" in ended["cause"] and ended["step"] < 12
    lines = run.events.read_text().splitlines()
    last = next(at for at, line in enumerate(lines) if json.loads(line)["kind"] == "finished")
    run.events.write_text("\n".join(lines[:last]) + "\n")  # as kill -9 between the last save and this event leaves it
    assert status(run).state == "interrupted"
    assert runs.train(run, workspace, worker) == "finished"
    assert (status(run).cause_step, int(read_metrics(run.metrics)["step"][-1])) == (ended["step"], ended["step"])


def test_the_best_on_the_disk_stays_pinned_where_a_better_one_could_not_be_written(
    place: Place, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, model, data = place
    config = runs.settings(
        model, data, max_steps=8, learning_rate=1e-3, warmup_steps=0, lr_schedule="constant",
        eval={"eval_strategy": "steps", "eval_steps": 2}, output={"save_steps": 2, "save_total_limit": 1},
    )  # fmt: skip
    losses = iter([9.0, 5.0, 4.0, 8.0, 8.0])  # of steps 0, 2, 4, 6, 8: the best is that of step 4
    monkeypatch.setattr("trainer.loop.train.held_out_loss", lambda *given: next(losses))
    seal = checkpoint.seal

    def full(staging: Path, step: int) -> int:
        if step == 4:
            raise OSError(28, "No space left on device")
        return seal(staging, step)

    monkeypatch.setattr(checkpoint, "seal", full)
    run = runs.new(workspace, config)
    assert runs.train(run, workspace, worker) == "finished", status(run).cause
    assert [step for step, _ in checkpoint.listed(run.checkpoints)] == [8, 2], "step 2 is the best that was written"


def test_a_command_that_cannot_be_read_just_now_waits_and_takes_none_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for command in ("checkpoint", "stop"):
        control.drop(tmp_path, command)
    read, seen = control.read_json, []

    def full_table(path: Path) -> Any:
        seen.append(path)
        if len(seen) == 2:
            raise OSError(errno.EMFILE, "Too many open files")
        return read(path)

    monkeypatch.setattr(control, "read_json", full_table)
    assert [order.command for order in control.take(tmp_path)] == ["checkpoint"]
    assert [order.command for order in control.take(tmp_path)] == ["stop"]
