"""The engine of a server: one thing at a time on one thread, busy in words, ended cleanly."""

from __future__ import annotations

import threading

import pytest

from tests import runs
from tests.tiny import tiny_model_dir
from trainer import checkpoint, control
from trainer.engine import Engine, threads_for
from trainer.files import read_json
from trainer.lease import Busy
from trainer.machine import Gpu, Machine, _visible
from trainer.refusal import Refusal
from trainer.run import status
from trainer.worker import Worker
from trainer.workspace import Workspace


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("engine")
    return tiny_model_dir(root / "model"), runs.write_rows(root / "rows.jsonl")


@pytest.fixture
def engine(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    made = Engine(Workspace(tmp_path / "ws").create(), Worker())
    yield made
    made.shutdown(10)


def test_a_run_started_stopped_and_resumed_through_the_engine(engine, place):
    config = runs.settings(*place, max_steps=5000, eval={"eval_strategy": "no"})
    run_id = engine.start_run(config, "me", name="mine", why="because")
    run = engine.workspace.run(run_id)
    runs.wait_for(lambda: status(run).current_step > 2)
    holder = engine.holder()
    assert holder is not None and holder.name == "mine" and holder.owner == "me"
    with pytest.raises(Busy, match="mine"):
        engine.start_run(config, "someone else")
    with pytest.raises(Busy):
        engine.start_smoke(config, "someone else")
    assert len(engine.workspace.list_runs()) == 1, "a refused start leaves no directory"
    with pytest.raises(Refusal, match="running"):
        engine.resume_run(run_id, "me")
    control.drop(run.control, "pause", "me")
    runs.wait_for(lambda: status(run).state == "paused" and engine.holder() is None)
    paused_at = status(run).current_step
    engine.resume_run(run_id, "me")
    runs.wait_for(lambda: status(run).current_step > paused_at)
    control.drop(run.control, "stop", "me")
    runs.wait_for(lambda: status(run).state == "stopped")
    assert status(run).name == "mine" and status(run).gen == 2


def test_twenty_starts_at_once_give_one_run(engine, place):
    config = runs.settings(*place, max_steps=5000, eval={"eval_strategy": "no"})
    barrier, won, told = threading.Barrier(20), [], []

    def start() -> None:
        barrier.wait()
        try:
            won.append(engine.start_run(config, "me"))
        except Busy as busy:
            told.append(str(busy))

    threads = [threading.Thread(target=start) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1 and len(told) == 19 and all("has the device since" in text for text in told)
    control.drop(engine.workspace.run(won[0]).control, "stop-now", "me")


def test_a_stop_while_tokenising_or_loading_is_answered_and_leaves_a_stopped_run(engine, place):
    run_id = engine.start_run(runs.settings(*place, max_steps=5000), "me")
    run = engine.workspace.run(run_id)
    control.drop(run.control, "stop", "me")
    runs.wait_for(lambda: status(run).state == "stopped")
    assert engine.holder() is None or runs.wait_for(lambda: engine.holder() is None)


def test_a_smoke_test_runs_on_the_engine_and_writes_its_report(engine, place):
    smoke_id = engine.start_smoke(runs.settings(*place), "me")
    report = engine.workspace.smoke / smoke_id / "report.json"
    runs.wait_for(lambda: report.exists() and read_json(report)["state"] == "done", 60)
    assert read_json(report)["failed"] == 0


def test_a_smoke_test_can_be_stopped(engine, place):
    smoke_id = engine.start_smoke(runs.settings(*place), "me")
    report = engine.workspace.smoke / smoke_id / "report.json"
    runs.wait_for(lambda: report.exists())
    engine.stop_smoke()
    runs.wait_for(lambda: read_json(report)["state"] in ("stopped", "done"), 60)


def test_shutting_down_saves_the_run_at_its_step(engine, place):
    run_id = engine.start_run(runs.settings(*place, max_steps=50_000, eval={"eval_strategy": "no"}), "me")
    run = engine.workspace.run(run_id)
    runs.wait_for(lambda: status(run).current_step > 2)
    assert engine.shutdown(10)
    now = status(run)
    assert now.state == "stopped" and checkpoint.newest_verified(run.checkpoints).step == now.current_step


def test_a_config_without_a_model_is_refused_before_anything_is_written(engine, place, tmp_path):
    with pytest.raises(Refusal, match="does not exist"):
        engine.start_run(runs.settings(tmp_path / "nowhere", place[1]), "me")
    assert engine.workspace.list_runs() == [] and engine.holder() is None


def machine_with(gpus: tuple[Gpu, ...], cpu_build: bool) -> Machine:
    return Machine(gpus, "Some CPU", 8, 64.0, 40.0, cpu_build, None)


def test_the_device_is_the_gpu_only_where_torch_can_use_it(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(12)), raising=False)
    gpu = Gpu(0, "GPU-1234", "RTX", 24.0, 23.1)
    assert machine_with((gpu,), False).device == "gpu-1234"
    assert machine_with((gpu,), False).summary == "RTX · 23.1 GiB free"
    assert machine_with((gpu,), True).device == "cpu"
    assert machine_with((), True).summary == "Some CPU · 40.0 GiB free"
    assert threads_for(machine_with((), True)) == 7
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2}, raising=False)
    assert threads_for(machine_with((), True)) == 2, "a container's share counts, not the machine"


def test_visible_devices_are_taken_in_the_order_of_the_variable():
    gpus = [Gpu(i, f"GPU-{i}{i}", "x", 1.0, 1.0) for i in range(3)]
    assert [g.index for g in _visible(gpus, "2,0")] == [2, 0]
    assert [g.index for g in _visible(gpus, "GPU-11")] == [1]
    assert _visible(gpus, "") == [] and _visible(gpus, None) == gpus
    assert [g.index for g in _visible(gpus, "1,9,0")] == [1]


def test_nothing_is_started_or_taken_up_once_the_server_is_ending(engine, place):
    run_id = engine.start_run(runs.settings(*place, max_steps=50_000, eval={"eval_strategy": "no"}), "me")
    assert engine.shutdown(60)
    events = engine.workspace.run(run_id).events.read_bytes()
    for attempt in (
        lambda: engine.start_run(runs.settings(*place), "me"),
        lambda: engine.start_smoke(runs.settings(*place), "me"),
        lambda: engine.resume_run(run_id, "me", auto=True),
    ):
        with pytest.raises(Refusal, match="is ending"):
            attempt()
    assert len(engine.workspace.list_runs()) == 1 and engine.workspace.run(run_id).events.read_bytes() == events
