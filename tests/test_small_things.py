"""Small things that ruin nights, each with the real thing: clocks, descriptors, pipes, slow and closed disks, lost
folders."""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

import ui.feed
from tests import runs
from tests.conftest import ROOT
from tests.tiny import tiny_model_dir
from trainer import alone, checkpoint, clock
from trainer.engine import Engine
from trainer.events import all_events
from trainer.machine import machine
from trainer.metrics import MetricsWriter, read_metrics
from trainer.refusal import Refusal
from trainer.run import RunDir, _begin_of_life, create_run, status
from trainer.session import open_life, train_to_end
from trainer.worker import Worker
from trainer.workspace import Workspace
from ui.guard import Guard, Rules
from ui.site import Site

OFF = {"eval_strategy": "no"}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("small")
    return tiny_model_dir(root / "model"), runs.write_rows(root / "rows.jsonl")


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[int, Callable[[], Any]]], None]:
    """Do something right after a step was recorded."""

    def arrange(acts: dict[int, Callable[[], Any]]) -> None:
        record = MetricsWriter.step

        def step(writer: MetricsWriter, values: dict[str, float], rows: list[tuple[int, float, int]]) -> None:
            record(writer, values, rows)
            acts.get(int(values["step"]), lambda: None)()

        monkeypatch.setattr(MetricsWriter, "step", step)

    return arrange


def alerts(run: RunDir) -> list[str]:
    return [event["text"] for event in all_events(run.events) if event["kind"] == "alert"]


# -- the clock


def test_a_clock_put_back_and_forward_changes_no_duration_and_no_order(
    workspace: Workspace, sources: Any, worker: Worker, at_step: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, shift = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: real() + shift[0])
    at_step({3: lambda: shift.__setitem__(0, -3600.0), 6: lambda: shift.__setitem__(0, 7200.0)})
    run = runs.new(workspace, runs.settings(*sources, max_steps=30, eval=OFF))
    began = time.monotonic()
    assert runs.train(run, workspace, worker) == "finished"
    took = time.monotonic() - began
    records = read_metrics(run.metrics)
    assert (np.diff(records["t"]) > 0).all() and records["t"][-1] - records["t"][0] < took
    assert records["elapsed_s"][-1] < took and (records["seconds"] > 0).all()
    times = [event["t"] for event in all_events(run.events)]
    assert times == sorted(times) and times[-1] - times[0] < took + 1
    assert abs(clock.now() - real()) < 5, "and it is the time of day all the same"


def test_a_clock_put_back_between_two_lives_leaves_a_time_left_that_is_none_of_the_past() -> None:
    assert _begin_of_life(np.array([10.0, 11, 12]), 9.0) == 0
    assert _begin_of_life(np.array([3.0, 4, 10, 11]), 9.0) == 2
    assert _begin_of_life(np.array([5000.0, 5001, 10, 11]), 9.0) == 2, "records from a future that did not come"


# -- descriptors


def test_without_a_descriptor_left_training_goes_on_says_so_and_saves_the_next_time(
    workspace: Workspace, sources: Any, worker: Worker, at_step: Any
) -> None:
    taken: list[int] = []
    before = resource.getrlimit(resource.RLIMIT_NOFILE)

    def exhaust() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, before[1]))
        try:
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        except OSError:
            return

    def give_back() -> None:
        while taken:
            os.close(taken.pop())
        resource.setrlimit(resource.RLIMIT_NOFILE, before)

    def wait_and_give_back() -> None:
        runs.wait_for(lambda: taken and saver_is_through())
        give_back()

    def saver_is_through() -> bool:
        return not any(thread.name == "saver" for thread in threading.enumerate())

    at_step({3: exhaust, 9: wait_and_give_back})
    run = runs.new(workspace, runs.settings(*sources, max_steps=14, output={"save_steps": 4}, eval=OFF))
    try:
        assert runs.train(run, workspace, worker) == "finished"
    finally:
        give_back()
    said = alerts(run)
    assert len(said) in (1, 2) and "Saving step 4 went wrong: Too many open files" in said[0], said
    assert [step for step, _ in checkpoint.listed(run.checkpoints)][-1] in (8, 12)
    assert all(checkpoint.verify(path) == [] for _, path in checkpoint.listed(run.checkpoints))
    assert not list(run.checkpoints.glob(".staging_*")) and len(read_metrics(run.metrics)) == 14


# -- where the lines go


@pytest.mark.parametrize("reader", ["gone", "asleep"])
def test_a_log_whose_reader_is_gone_or_asleep_neither_ends_nor_holds_up_a_run(
    workspace: Workspace, sources: Any, worker: Worker, monkeypatch: pytest.MonkeyPatch, reader: str
) -> None:
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    with pytest.raises(BlockingIOError):
        while True:
            os.write(write_end, b"x" * 4096)
    os.set_blocking(write_end, True)
    if reader == "gone":
        os.close(read_end)
    with os.fdopen(write_end, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        monkeypatch.setattr(sys, "stderr", pipe)
        run = runs.new(workspace, runs.settings(*sources, max_steps=3, eval=OFF))
        life = open_life(run, "test", resumed=False)
        trained = threading.Thread(
            target=train_to_end, args=(life, workspace, worker, machine()), kwargs={"echo": alone._say}
        )
        trained.start()
        trained.join(60)
        hangs = trained.is_alive()
        if reader == "asleep":
            os.close(read_end)
        monkeypatch.undo()
    assert not hangs and status(run).state == "finished"


def test_the_exit_code_of_a_command_does_not_suffer_from_a_reader_that_left() -> None:
    code = "import sys, time\nfrom trainer.console import say\nsys.stdin.read()\nfor _ in range(3): say('line')\nsys.exit(7)\n"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    ) as process:
        assert process.stdout is not None and process.stdin is not None
        process.stdout.close()
        process.stdin.close()
        assert process.wait(20) == 7
    done = subprocess.run(["sh", "-c", f'exec 1>&-; exec "$0" -c "{code}" </dev/null', sys.executable], cwd=ROOT)
    assert done.returncode == 7


# -- slow and closed disks


@pytest.mark.parametrize("file", [".staging_", "events.jsonl"])
def test_while_an_fsync_takes_five_seconds_the_page_is_live_and_stop_is_answered_at_once(
    workspace: Workspace, sources: Any, at_step: Any, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    engine = Engine(workspace, Worker())
    site = Site(workspace, engine, engine.worker, None, None, Path("config.json"))  # type: ignore[arg-type]
    client = TestClient(Guard(Starlette(routes=ui.feed.routes(site)), Rules()), base_url="http://localhost")
    at_step({n: lambda: time.sleep(0.02) for n in range(10_000)})
    config = runs.settings(*sources, max_steps=5000, output={"save_steps": 5}, eval=OFF)
    run = workspace.run(engine.start_run(config, "me"))
    runs.wait_for(lambda: status(run).current_step > 1, 60)
    real, slow = os.fsync, threading.Event()

    def fsync(fd: int) -> None:
        # of the saver, or of anybody's: nothing that a stop waits for may be synced
        if file in os.readlink(f"/proc/self/fd/{fd}"):
            slow.set()
        if slow.is_set():
            time.sleep(5)
        real(fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        assert slow.wait(30), "a save is being written"
        waits = []
        for _ in range(8):
            began = time.monotonic()
            assert client.get(f"/api/runs/{run.run_id}/feed").status_code == 200
            waits.append(time.monotonic() - began)
            time.sleep(0.05)
        began = time.monotonic()
        assert client.post(f"/api/runs/{run.run_id}/command", json={"command": "stop"}).status_code == 202
        runs.wait_for(lambda: status(run).state == "stopping")
        answered = time.monotonic() - began
    assert engine.shutdown(60)
    assert max(waits) < 0.3 and answered < 1.0, (waits, answered)
    assert (
        status(run).state == "stopped" and checkpoint.newest_verified(run.checkpoints).step == status(run).current_step
    )


def as_anybody(work: Callable[[], Any]) -> Any:
    """`work` on a thread to which closed folders are closed, also where the tests are run by root."""
    found: list[Any] = []

    def on_thread() -> None:
        if os.geteuid() == 0:
            header = (ctypes.c_uint32 * 2)(0x20080522, 0)
            sets = (ctypes.c_uint32 * 6)()
            libc = ctypes.CDLL(None, use_errno=True)
            assert libc.capget(header, sets) == 0
            sets[0] &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
            assert libc.capset(header, sets) == 0, os.strerror(ctypes.get_errno())
        found.append(work())

    thread = threading.Thread(target=on_thread)
    thread.start()
    thread.join()
    return found[0]


def test_a_folder_that_is_closed_is_refused_before_the_first_step(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    (tmp_path / "own").mkdir(mode=0o555)

    def attempt() -> list[str]:
        said = []
        for output in (closed / "run", tmp_path / "own"):
            with pytest.raises(Refusal) as caught:
                create_run(tmp_path, {}, output)
            said.append(caught.value.message)
        return said

    for text in as_anybody(attempt):
        assert "Permission denied. Choose another folder." in text
    assert os.listdir(closed) == [] and os.listdir(tmp_path / "own") == []


def test_a_folder_closed_in_mid_run_costs_a_save_and_says_so_and_what_is_safe_stays(
    workspace: Workspace, sources: Any, worker: Worker, at_step: Any
) -> None:
    run = runs.new(workspace, runs.settings(*sources, max_steps=30, output={"save_steps": 4}, eval=OFF))
    first = run.checkpoints / "step_00000004" / "MANIFEST.json"
    at_step({6: lambda: runs.wait_for(first.exists) and os.chmod(run.checkpoints, 0o555)})
    try:
        assert as_anybody(lambda: runs.train(run, workspace, worker)) == "failed"
    finally:
        os.chmod(run.checkpoints, 0o700)
    now = status(run)
    assert now.current_step == 30, "training goes on"
    assert "Saving step 8 went wrong: Permission denied" in alerts(run)[0]
    assert now.cause == "The checkpoint could not be written: Permission denied. The ones before it are whole."
    assert checkpoint.newest_verified(run.checkpoints).step == 4


# -- folders that are taken away


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_model_folder_removed_in_mid_run_ends_nothing_and_a_resume_says_what_is_missing(
    workspace: Workspace, sources: Any, worker: Worker, at_step: Any, tmp_path: Path, method: str
) -> None:
    model = shutil.copytree(sources[0], tmp_path / "model")
    config = runs.settings(model, sources[1], method=method, max_steps=12, output={"save_steps": 4}, eval=OFF)
    run = runs.new(workspace, config)
    at_step({5: lambda: os.rename(model, tmp_path / "elsewhere")})
    assert runs.train(run, workspace, worker, stop_at=9) == "stopped"
    assert checkpoint.newest_verified(run.checkpoints).step >= 9 and alerts(run) == []
    assert runs.train(run, workspace, worker) == "failed"
    assert status(run).cause == (
        "The model folder model is gone, and a resume begins with it. Put it back; every checkpoint of the run is untouched."
    )
    os.rename(tmp_path / "elsewhere", model)
    assert runs.train(run, workspace, worker) == "finished"
