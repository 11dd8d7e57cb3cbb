"""Where a resume could slip: inside a step, at each step in turn, at a held-out check, after memory ran out, another day."""

from __future__ import annotations

import contextlib
import datetime
import gc
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import runs
from tests.lives import assert_same, curve, one_life
from tests.tiny import CHATML, tiny_model_dir
from trainer import checkpoint, clock
from trainer.config import resolve
from trainer.data.tokens import TokenCache, load_tokenizer
from trainer.events import all_events
from trainer.launch import prompt_of
from trainer.loop.step import Stepper
from trainer.metrics import read_metrics
from trainer.run import RunDir, status
from trainer.states import allowed
from trainer.worker import Worker
from trainer.workspace import Workspace

ROOT = Path(__file__).resolve().parent.parent
DAY_S = 86_400
# a python that starts with this on its path, and each child of it, lives a day later
TOMORROW = f"""
import datetime, time
_time, _localtime, _gmtime, _strftime = time.time, time.localtime, time.gmtime, time.strftime
time.time = lambda: _time() + {DAY_S}
time.time_ns = lambda: int(time.time() * 1e9)
time.localtime = lambda s=None: _localtime(time.time() if s is None else s)
time.gmtime = lambda s=None: _gmtime(time.time() if s is None else s)
time.strftime = lambda text, t=None: _strftime(text, time.localtime() if t is None else t)

class date(datetime.date):
    @classmethod
    def today(cls):
        return cls.fromtimestamp(time.time())

class later(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls.fromtimestamp(time.time(), tz)
    today = now

datetime.date, datetime.datetime = date, later
"""


@dataclass(frozen=True)
class Place:
    """A workspace, a worker, a model and sixteen rows."""

    workspace: Workspace
    worker: Worker
    model: Path
    rows: Path

    def new(self, **settings: Any) -> RunDir:
        """A run of 8 steps of 2 x 2 rows unless `settings` say otherwise."""
        base = {"gradient_accumulation": 2, "max_steps": 8, "eval": {"eval_strategy": "no"}}
        return runs.new(self.workspace, runs.settings(self.model, self.rows, **base | settings))

    def life(self, run: RunDir, **when: Any) -> str:
        """One life of `run`, ended as `when` says."""
        return one_life(run, self.workspace, self.worker, **when)

    def whole(self, **settings: Any) -> RunDir:
        """The unbroken run."""
        run = self.new(**settings)
        assert self.life(run) == "finished", status(run).cause
        return run


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    root = tmp_path_factory.mktemp("edges")
    model = tiny_model_dir(root / "model", hidden=32, layers=1)
    made = Place(Workspace(root / "ws").create(), Worker(), model, runs.write_rows(root / "rows.jsonl", 16))
    made.whole(max_steps=1)
    gc.collect()
    gc.freeze()  # each life collects garbage: what the imports left behind need not be looked through every time
    yield made
    gc.unfreeze()
    made.worker.close()


LORA = {"method": "lora", "lora": {"r": 4, "dropout": 0.1, "target_modules": ["q_proj", "down_proj"]}}
WIDE = {"gradient_accumulation": 4, "batch_size": 1, "output": {"save_steps": 2}, **LORA}


def events(run: RunDir, kind: str) -> list[dict[str, Any]]:
    """The run's events of one kind, in order."""
    return [event for event in all_events(run.events) if event["kind"] == kind]


def test_a_stop_now_inside_a_step_drops_the_partial_step_whichever_micro_batch_it_meets(place: Place) -> None:
    whole = place.whole(**WIDE)
    for micro in range(3):
        broken = place.new(**WIDE)
        assert place.life(broken, at=5, micro=micro, command="stop-now") == "stopped"
        assert curve(broken)[:, 0].tolist() == [1, 2, 3, 4], "step 5 left no record"
        assert checkpoint.newest_verified(broken.checkpoints).step == 4
        assert place.life(broken) == "finished"
        assert_same(broken, whole, f"stopped before micro-batch {micro + 1} of step 5")


def test_a_stop_now_before_anything_was_saved_starts_over_and_is_the_same_run(place: Place) -> None:
    settings = WIDE | {"output": {"save_steps": 0}}
    whole, broken = place.whole(**settings), place.new(**settings)
    assert place.life(broken, at=4, micro=1, command="stop-now") == "stopped"
    assert checkpoint.listed(broken.checkpoints) == [] and len(curve(broken)) == 3
    assert place.life(broken) == "finished"
    assert_same(broken, whole, "nothing saved")


@pytest.mark.parametrize("command", ["stop", "pause"])
def test_a_stop_or_pause_that_meets_a_step_half_done_finishes_it_and_saves(place: Place, command: str) -> None:
    whole, broken = place.whole(**WIDE), place.new(**WIDE)
    ended = place.life(broken, at=3, micro=1, command=command, by_file=True)
    assert ended == status(broken).state == {"stop": "stopped", "pause": "paused"}[command]
    assert len(curve(broken)) == 3 and checkpoint.newest_verified(broken.checkpoints).step == 3
    assert "resume" in allowed(status(broken).state)
    assert place.life(broken) == "finished"
    assert_same(broken, whole, command)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_run_stopped_after_every_single_step_is_the_unbroken_run(place: Place, method: str) -> None:
    settings = {"num_epochs": 2, "max_steps": None} | (LORA if method == "lora" else {})
    whole, broken = place.whole(**settings), place.new(**settings)
    total = len(curve(whole))
    assert total == 8 and status(whole).steps_per_epoch == 4, "several stops fall into each epoch, two on its border"
    ends = [place.life(broken, at=k, command=("stop", "pause")[k % 2]) for k in range(1, total + 1)]
    assert ends == ["paused", "stopped"] * 3 + ["paused", "finished"]
    assert status(broken).gen == total
    assert_same(broken, whole, "a life for each step")


def test_a_stop_asked_in_the_last_step_finishes_the_run(place: Place) -> None:
    whole, broken = place.whole(**WIDE), place.new(**WIDE)
    assert place.life(broken, at=8, micro=2) == "finished"
    assert "resume" not in allowed(status(broken).state)
    assert_same(broken, whole, "stopped in the last step")
    cut = place.new(**WIDE)
    assert place.life(cut, at=8, micro=2, command="stop-now") == "stopped"
    assert place.life(cut) == "finished"
    assert_same(cut, whole, "cut off in the last step")


def test_a_held_out_check_that_a_stop_cut_off_is_made_up_for_by_the_resume(place: Place) -> None:
    settings = {
        "learning_rate": 0.1,
        "warmup_steps": 0,
        "lr_schedule": "constant",
        "max_steps": 30,
        "early_stopping_patience": 2,
        "eval": {"eval_steps": 1},
        "data": {"validation_split": 0.25},
    }

    def checks(run: RunDir) -> list[tuple[Any, ...]]:
        return [(event["step"], event["loss"], event["best"]) for event in events(run, "eval")]

    whole = place.whole(**settings)
    total = len(curve(whole))
    assert 1 < total < 30, "it stops early, for want of a better loss"
    for k in range(1, total):
        broken = place.new(**settings)
        assert place.life(broken, at=k) == "stopped"
        assert place.life(broken) == "finished", status(broken).cause
        assert checks(broken) == checks(whole), f"stopped at {k}"
        assert_same(broken, whole, f"stopped at {k}")
        assert status(broken).best_step == status(whole).best_step
        best = checkpoint.directory_of(broken.checkpoints, status(broken).best_step or 0)
        assert status(broken).best_step == 0 or checkpoint.verify(best) == [], "the best weights are there"


@pytest.mark.parametrize("method, masters", [("full", "fp32"), ("full", "none"), ("lora", "fp32")])
def test_half_precision_is_taken_up_again_to_the_last_bit(place: Place, method: str, masters: str) -> None:
    settings = {"fp_precision": "bf16", "master_weights": masters, "max_steps": 5} | (LORA if method == "lora" else {})
    whole, broken = place.whole(**settings), place.new(**settings)
    assert [place.life(broken, at=k) for k in (2, 3)] == ["stopped", "stopped"]
    assert place.life(broken) == "finished"
    assert_same(broken, whole, f"{method} in bf16, master weights {masters}")


def test_a_smaller_micro_batch_after_memory_ran_out_is_kept_across_a_resume(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    backward, full = Stepper._backward, [False]

    def tight(self: Stepper, batch: Any, *of_step: int) -> torch.Tensor:
        if full[0]:
            full[0] = False
            raise torch.OutOfMemoryError("simulated")
        return backward(self, batch, *of_step)

    monkeypatch.setattr(Stepper, "_backward", tight)

    def lives(*stops: int | None) -> RunDir:
        run, full[0] = place.new(batch_size=4, gradient_accumulation=1), True
        for stop in stops:
            place.life(run, at=stop)
        return run

    whole, broken = lives(None), lives(3, None)
    assert [len(events(run, "oom_rung")) for run in (whole, broken)] == [1, 1]
    assert_same(broken, whole, "after a rung of the ladder")


def dated_place(tmp_path: Path, place: Place, worker: Worker) -> Place:
    """A model whose own template writes today's date into every row."""
    dated = tmp_path / "dated"
    shutil.copytree(place.model, dated)
    first = "{{- '<|im_start|>system\\nToday: ' + strftime_now('%Y-%m-%d') + '<|im_end|>\\n' -}}\n"
    (dated / "chat_template.jinja").write_text(first + CHATML, encoding="utf-8")
    return Place(Workspace(tmp_path / "ws").create(), worker, dated, place.rows)


def assert_same_day(broken: RunDir, whole: RunDir, here: Place, later: str) -> None:
    """The resumed life lived on the day `later`, made all tokens again, and they are those of the first day."""
    today = broken.snapshot()["profile"]["date"]
    assert later != today and status(broken).state == "finished", status(broken).cause
    assert events(broken, "resumed")[0]["t"] > events(broken, "stopped")[0]["t"] + DAY_S - 60
    assert [event["text"] for event in events(broken, "log")].count(events(whole, "log")[0]["text"]) == 2
    (key,) = {event["token_key"] for event in events(broken, "plan")}
    assert key == events(whole, "plan")[0]["token_key"]
    text = load_tokenizer(here.model).decode(TokenCache.open(here.workspace.tokens / key).ids(0).tolist())
    assert f"Current date: {today}" in text and f"Today: {today}" in text and later not in text
    assert_same(broken, whole, "resumed on the next day")
    assert [e["loss"] for e in events(broken, "eval")] == [e["loss"] for e in events(whole, "eval")]


DATED = LORA | {"profile": {"name": "emoji_think"}, "max_length": 512, "eval": {"eval_steps": 4}}


def test_a_run_resumed_on_the_next_day_trains_the_same_tokens(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The date stands in the profile's prompt and in the model's own template; the clock is another in every process."""
    here = dated_place(tmp_path, place, place.worker)
    whole, broken = here.whole(**DATED), here.new(**DATED)
    assert here.life(broken, at=3) == "stopped"
    shutil.rmtree(here.workspace.tokens)
    (tmp_path / "sitecustomize.py").write_text(TOMORROW, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for module, names in (
        (time, ("time", "time_ns", "localtime", "gmtime", "strftime")),
        (datetime, ("date", "datetime")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, getattr(module, name))  # so that it is put back
    exec(TOMORROW, {})
    monkeypatch.setattr(clock, "_BEGAN", clock._BEGAN + DAY_S)  # this process counts on from when it began
    later = prompt_of(resolve({"profile": {"system_prompt": "{date}"}}), tmp_path).text
    with contextlib.closing(Worker()) as worker:
        ended = one_life(broken, here.workspace, worker)
    monkeypatch.undo()
    assert ended == "finished", status(broken).cause
    assert_same_day(broken, whole, here, later)


@pytest.mark.slow
def test_a_run_resumed_by_command_on_the_next_day_in_a_new_process_trains_the_same_tokens(
    place: Place, tmp_path: Path
) -> None:
    here = dated_place(tmp_path, place, place.worker)
    whole, broken = here.whole(**DATED), here.new(**DATED)
    assert here.life(broken, at=3) == "stopped"
    shutil.rmtree(here.workspace.tokens)
    (tmp_path / "later").mkdir()
    (tmp_path / "later" / "sitecustomize.py").write_text(TOMORROW, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path / 'later'}{os.pathsep}{ROOT}"}

    def said(*words: str) -> str:
        command = [sys.executable, *words]
        done = subprocess.run(command, env=environment, cwd=ROOT, text=True, capture_output=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    later = said("-c", "import datetime; print(datetime.date.today())").strip()
    assert later not in said("-m", "trainer", "resume", str(broken.path))
    assert_same_day(broken, whole, here, later)


def test_the_spike_after_a_resume_is_marked_as_in_the_unbroken_run(place: Place) -> None:
    settings = {"max_steps": 30, "warmup_steps": 26, "learning_rate": 1.0, "alerts": {"loss_spike": 1.2}}
    whole, broken = place.whole(**settings), place.new(**settings)
    assert place.life(broken, at=22) == "stopped"
    assert place.life(broken) == "finished"
    marks = [[e["text"] for e in events(run, "alert") if e["code"] == "spike"] for run in (whole, broken)]
    assert marks[0] and marks[0] == marks[1]
    assert len(read_metrics(broken.metrics)) == 30
