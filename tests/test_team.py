"""Two processes train one run: one directory, the curve of one process, a clean stop, an exact resume, a named loss."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from tests.runs import new, settings, train, wait_for, write_rows
from tests.tiny import tiny_model_dir
from trainer import rewind
from trainer.data.packing import make_plan
from trainer.events import EventLog, all_events
from trainer.loop.team import Team, _buckets
from trainer.metrics import RECORD, ROW_RECORD, read_metrics, read_rows
from trainer.run import RunDir, status
from trainer.schema import Config
from trainer.worker import Worker
from trainer.workspace import Workspace

ROOT = Path(__file__).resolve().parent.parent
STEPS = 40


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and a dataset."""
    path = tmp_path_factory.mktemp("team")
    tiny_model_dir(path / "model")
    write_rows(path / "data.jsonl", 46)
    return path


@pytest.fixture(scope="module")
def config(place: Path) -> Config:
    """LoRA with dropout; five rows a step in micro-batches of two, so that the last is smaller and an epoch does not divide."""
    return settings(
        place / "model",
        place / "data.jsonl",
        method="lora",
        batch_size=2,
        gradient_accumulation=3,
        max_steps=STEPS,
        lora={"r": 4, "dropout": 0.1},
        eval={"eval_strategy": "steps", "eval_steps": 10},
    )


def _torchrun(place: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "XDG_RUNTIME_DIR": str(place)}
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "trainer", *arguments],
        cwd=place,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _train(place: Path, config: Config, output: str) -> tuple[subprocess.Popen[str], RunDir]:
    (place / f"{output}.json").write_text(config.model_dump_json(), encoding="utf-8")
    command = ["train", "--config", f"{output}.json", "--workspace", "workspace", "--output", output]
    return _torchrun(place, *command), RunDir(place / output)


def _end(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, out + err
    return out + err


def _columns(run: RunDir) -> np.ndarray:
    return np.fromfile(run.metrics, RECORD)


@pytest.fixture(scope="module")
def unbroken(place: Path, config: Config) -> RunDir:
    """A run of two processes from its first step to its last."""
    process, run = _train(place, config, "unbroken")
    output = _end(process)
    assert output.count("Run directory:") == 1  # one process speaks
    return run


@pytest.mark.slow
def test_two_processes_give_the_curve_of_one(place: Path, config: Config, unbroken: RunDir) -> None:
    workspace, worker = Workspace(place / "alone").create(), Worker()
    try:
        alone = new(workspace, config)
        assert train(alone, workspace, worker) == "finished"
    finally:
        worker.close()
    one, two = _columns(alone), _columns(unbroken)
    assert len(one) == len(two) == STEPS
    for column in ("loss", "grad_norm", "learning_rate"):
        assert np.allclose(two[column], one[column], rtol=1e-5, atol=0), column
    for column in ("labels", "tokens", "rows"):
        assert np.array_equal(two[column], one[column]), column
    rows_one, rows_two = np.fromfile(alone.rows, ROW_RECORD), np.fromfile(unbroken.rows, ROW_RECORD)
    assert np.array_equal(rows_one["row"], rows_two["row"])
    assert np.allclose(rows_one["loss_sum"], rows_two["loss_sum"], rtol=1e-4)
    held_out = [[e["loss"] for e in all_events(run.events) if e["kind"] == "eval"] for run in (alone, unbroken)]
    assert len(held_out[0]) == 5 and np.allclose(*held_out, rtol=1e-5)


@pytest.mark.slow
def test_the_processes_write_one_run_directory(place: Path, unbroken: RunDir) -> None:
    assert status(unbroken).state == "finished"
    kinds = [event["kind"] for event in all_events(unbroken.events)]
    assert kinds.count("started") == kinds.count("running") == kinds.count("finished") == 1
    assert len(list((place / "workspace" / "runs").iterdir())) == 0


def test_a_terminated_team_resumes_on_the_same_curve_bit_for_bit_and_not_as_one_process(
    place: Path, config: Config, unbroken: RunDir
) -> None:
    process, run = _train(place, config, "stopped")
    wait_for(lambda: run.metrics.exists() and len(_columns(run)) >= 7, 120)
    next(p for p in _workers(process) if p.environ()["RANK"] == "0").send_signal(signal.SIGTERM)
    _end(process)
    now = status(run)
    assert now.state == "stopped" and 7 <= now.current_step < STEPS

    workspace, worker = Workspace(place / "workspace"), Worker()
    try:
        assert train(run, workspace, worker) == "failed"
    finally:
        worker.close()
    assert "processes was 2 and is now 1" in (status(run).cause or "")

    _end(_torchrun(place, "resume", str(run.path)))
    assert status(run).state == "finished"
    before, after = _columns(unbroken), _columns(run)
    for column in ("step", "loss", "grad_norm", "learning_rate"):
        assert np.array_equal(before[column], after[column]), column
    weights = [
        (path / "checkpoints" / f"step_{STEPS:08d}" / "model" / "adapter_model.safetensors").read_bytes()
        for path in (unbroken.path, run.path)
    ]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_a_team_leaves_out_the_rows_that_a_rewind_skipped(place: Path, config: Config, unbroken: RunDir) -> None:
    """A person went around the bad rows of a team's run on the page; the team then goes on without them, in step."""
    process, run = _train(place, config, "around")
    wait_for(lambda: run.metrics.exists() and len(_columns(run)) >= 4, 120)
    next(p for p in _workers(process) if p.environ()["RANK"] == "0").send_signal(signal.SIGTERM)
    _end(process)
    at = status(run).current_step
    bad = [row for row, *_ in read_rows(unbroken.rows, at + 1)] + [read_rows(unbroken.rows, at + 2)[0][0]]
    log = EventLog(run.events)
    rewind.note(log, at + 1, at, [{"row": row} for row in bad], rewind.Rewinds())
    log.close()
    _end(_torchrun(place, "resume", str(run.path)))
    assert status(run).state == "finished", status(run).cause
    steps = read_metrics(run.metrics)["step"].tolist()
    assert at + 1 not in steps and at + 2 in steps
    assert not {row for step in steps if step > at for row, *_ in read_rows(run.rows, int(step))} & set(bad)


def _workers(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return [p for p in psutil.Process(process.pid).children() if "trainer" in p.cmdline()]


@pytest.mark.slow
def test_a_lost_process_ends_the_run_in_words_and_its_checkpoint_stays(place: Path, config: Config) -> None:
    saving = config.model_copy(update={"output": config.output.model_copy(update={"save_steps": 4})})
    endless = saving.model_copy(update={"hyperparams": saving.hyperparams.model_copy(update={"max_steps": 5000})})
    process, run = _train(place, endless, "lost")
    wait_for(lambda: list(run.checkpoints.glob("step_*")), 120)
    helper = next(p for p in _workers(process) if p.environ()["RANK"] == "1")
    helper.kill()
    process.communicate(timeout=120)
    assert process.returncode != 0
    now = status(run)
    # torchrun tells the leader to end as well; whichever it notices first, its steps are safe
    assert now.state == "failed" and "processes ended" in (now.cause or ""), json.dumps(now.as_json())
    assert list(run.checkpoints.glob("step_*"))


def test_every_process_gets_a_part_and_every_pack_is_in_one() -> None:
    lengths = np.full(23, 10)
    plan = make_plan(
        lengths,
        np.arange(23),
        np.empty(0, np.int64),
        np.ones(23),
        seed=1,
        epochs=1,
        max_steps=None,
        packs_per_step=6,
        capacity=None,
    )
    for step in range(1, plan.total_steps + 1):
        groups = plan.micro_batches(step, plan.packs_each(step, most=6, processes=2))
        shares = [Team(rank, 2).share(groups) for rank in range(2)]
        assert all(shares) or sum(map(len, groups)) == 1
        assert sorted(place for share in shares for place, _ in share) == list(range(len(groups)))
        counts = [sum(len(rows) for _, rows in share) for share in shares]
        assert abs(counts[0] - counts[1]) <= 1


def test_buckets_hold_every_parameter_once_and_stay_small(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr("trainer.loop.team.BUCKET_ELEMENTS", 100)
    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in (30, 60, 20, 500, 1, 99)]
    buckets = list(_buckets(parameters))
    assert [p for bucket in buckets for p in bucket] == parameters
    assert all(len(bucket) == 1 or sum(p.numel() for p in bucket) <= 100 for bucket in buckets)
