"""How long a run still takes: by its tokens, with what comes between the steps, held against runs that really ended."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import runs
from tests.tiny import tiny_model_dir
from trainer import clock
from trainer.data.packing import make_plan
from trainer.events import all_events
from trainer.metrics import RECORD, read_metrics
from trainer.run import RunDir, StatusReader, status
from trainer.time_left import Asides, TokenMarks, asides_s, last_write_s, marks_of, steps_s
from trainer.worker import Worker
from trainer.workspace import Workspace

Place = tuple[Workspace, Worker, Path, Path]


def records(tokens: list[int], rate: float = 1000.0, rest: float = 0.5) -> np.ndarray:
    """Steps of so many tokens, `rate` tokens a second forward and backward and `rest` seconds besides."""
    made = np.zeros(len(tokens), RECORD)
    made["tokens"], made["forward_backward_s"] = tokens, np.array(tokens) / rate
    made["seconds"] = made["forward_backward_s"] + rest
    return made


def test_tokens_are_weighed_and_not_steps() -> None:
    marks = TokenMarks([0, 10, 20], [0, 1000, 11_000])  # ten short steps, then ten long ones
    left = steps_s(marks, 10, 20, records([100] * 10))
    assert left == pytest.approx(10 * 0.5 + 10_000 / 1000)
    assert steps_s(None, 10, 20, records([100] * 10)) == pytest.approx(10 * 0.6), "a run of an older version"


def test_the_marks_are_the_plans_own_tokens() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 200, 700)
    for capacity in (None, 256):
        plan = make_plan(
            lengths, np.arange(700), np.empty(0, np.int64), np.ones(700), seed=1, epochs=2, max_steps=None,
            packs_per_step=4, capacity=capacity,
        )  # fmt: skip
        marks = marks_of(plan, lengths)
        assert marks.up_to(plan.total_steps) == 2 * lengths.sum()
        for step in (1, 17, plan.total_steps // 2):
            exact = sum(lengths[plan.rows[: plan.pack_starts[plan.step_packs[step - 1, 1]]]])
            assert marks.up_to(step) == exact if plan.total_steps <= 512 else pytest.approx(exact, rel=0.02)


def test_checks_samples_and_saves_still_to_come_are_counted() -> None:
    asides = Asides()
    for at, name in enumerate(["eval", "train", "sample", "train", "save", "train"]):
        asides.phase(name, at * (at + 1) / 2)  # the check takes 1 s, the sample 3 s, the save 5 s
    settings: dict[str, Any] = {
        "eval": {"eval_strategy": "steps", "eval_steps": 10, "sample_steps": 15},
        "output": {"save_steps": 20},
    }
    # after step 30 of 60: checks at 40, 50, 60; samples at 45, 60; saves at 40 and at the end
    assert asides_s(settings, 30, 60, None, asides) == 3 * 1 + 2 * 3 + 2 * 5
    # of 65 steps besides: a check and a save at the end, which no multiple is, and the save at 60
    assert asides_s(settings, 30, 65, None, asides) == 4 * 1 + 2 * 3 + 3 * 5
    assert asides_s(settings | {"output": {"save_steps": 0}}, 30, 60, None, asides) == 3 * 1 + 2 * 3 + 5
    by_epoch = settings | {"eval": {"eval_strategy": "epoch"}}
    assert asides_s(by_epoch, 30, 60, 20, asides) == 2 * 1 + 2 * 5
    assert asides_s(settings, 30, 60, None, Asides()) == 0.0, "what was never seen is not made up"
    assert last_write_s(4e8, Asides()) == 2.0 and last_write_s(4e8, Asides(written_s=[7.0])) == 7.0


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    root, worker = tmp_path_factory.mktemp("time"), Worker()
    model = tiny_model_dir(root / "model", hidden=256, layers=3)
    rows = root / "rows.jsonl"
    rng = np.random.default_rng(3)
    with open(rows, "w") as file:
        for number in range(400):
            words = " ".join(f"w{number * 7 % 91}" for _ in range(int(rng.lognormal(3.2, 0.8))))
            turns = [{"role": "user", "content": f"Say {number}."}, {"role": "assistant", "content": words + "."}]
            file.write(json.dumps({"messages": turns}) + "\n")
    yield Workspace(root / "ws").create(), worker, model, rows
    worker.close()


def forecast_after(run: RunDir, step: int) -> tuple[float, float]:
    """(seconds forecast when `step` was recorded, seconds it really took from there to the end)."""
    records = read_metrics(run.metrics)
    mine = records[:step]
    at = float(mine["t"][-1])
    reader = StatusReader(run)
    events = list(all_events(run.events))
    for event in events:
        if event["t"] <= at:
            reader._apply(event)
    left = reader._seconds_left(mine, step, len(records))
    return left, next(event["t"] for event in events if event["kind"] == "finished") - at


KINDS: dict[str, dict[str, Any]] = {
    "rows as they come": {"batch_size": 2, "gradient_accumulation": 1, "max_steps": 140},
    "packed": {"batch_size": 2, "gradient_accumulation": 1, "max_steps": 70, "packing": True, "max_length": 192},
    "checks, samples and saves": {
        "batch_size": 4, "gradient_accumulation": 1, "max_steps": 100, "output": {"save_steps": 18},
        "eval": {"eval_strategy": "steps", "eval_steps": 15, "sample_steps": 16, "sample_max_tokens": 8},
    },
    "LoRA, checkpointing": {
        "batch_size": 4, "gradient_accumulation": 1, "max_steps": 80, "method": "lora", "use_gradient_checkpointing": True,
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_after_20_steps_the_end_is_known_to_a_tenth(place: Place, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # seconds of this process's own work: on a machine that others use too, the wall's clock would measure them
    monkeypatch.setattr(time, "perf_counter", time.process_time)
    monkeypatch.setattr(clock, "now", lambda: 1e9 + time.process_time())
    off = []
    for _ in range(3):  # a neighbour's burst in one of them costs caches too, which no clock leaves out
        run = runs.new(place[0], runs.settings(place[2], place[3], **({"eval": {"eval_strategy": "no"}} | KINDS[kind])))
        assert runs.train(run, place[0], place[1]) == "finished", status(run).cause
        forecast, real = forecast_after(run, 20)
        off.append(forecast / real - 1)
    print(f"{kind}: {', '.join(f'{each:+.1%}' for each in off)}")
    assert abs(sorted(off)[1]) <= 0.10, off
