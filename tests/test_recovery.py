"""Runs that were cut off: why, going on by themselves three times at most, and being left. The engine, the locks and the
events are real; the deaths are of real processes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

import ui.feed
from tests import runs
from tests.conftest import ROOT
from tests.made_runs import MadeRun
from tests.tiny import tiny_model_dir
from trainer import control, locks
from trainer.checkpoint import newest_verified
from trainer.cli import main
from trainer.ends import End, boot_id
from trainer.engine import Engine
from trainer.events import EventLog, all_events
from trainer.recovery import SHUTDOWN, cause_of, recover, settle
from trainer.refusal import Refusal
from trainer.run import RunDir, StatusReader, status
from trainer.worker import Worker
from trainer.workspace import Workspace
from ui.guard import Guard, Rules
from ui.site import Site


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("recovery")
    return tiny_model_dir(root / "model"), runs.write_rows(root / "rows.jsonl")


@pytest.fixture
def engine(workspace: Workspace):
    made = Engine(workspace, Worker())
    yield made
    made.shutdown(10)


@pytest.fixture(scope="module")
def killed(place: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A real run whose process was killed by SIGKILL when step 4 was recorded, with a checkpoint of step 2."""
    workspace = Workspace(tmp_path_factory.mktemp("killed") / "ws").create()
    config = runs.settings(*place, max_steps=10, output={"save_steps": 2}, eval={"eval_strategy": "no"})
    run = runs.new(workspace, config)
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom tests import runs\nfrom trainer.worker import Worker\n"
        "from trainer.metrics import MetricsWriter\nfrom trainer.run import RunDir\nfrom trainer.workspace import Workspace\n"
        "record = MetricsWriter.step\n"
        "def step(self, values, rows):\n"
        "    record(self, values, rows)\n"
        "    if values['step'] < 4: return\n"
        "    runs.wait_for(lambda: [*Path(sys.argv[1]).glob('checkpoints/step_00000002/MANIFEST.json')])\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "MetricsWriter.step = step\n"
        "runs.train(RunDir(Path(sys.argv[1])), Workspace(Path(sys.argv[2])), Worker())\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(run.path), str(workspace.root)], cwd=ROOT, timeout=120)
    assert done.returncode == -9 and status(run).state == "interrupted"
    return run


def cut_off(workspace: Workspace, killed: RunDir, allowed: int = 0) -> RunDir:
    """A copy of the killed run, in a workspace of its own."""
    run = RunDir(workspace.runs / killed.run_id)
    shutil.copytree(killed.path, run.path)
    snapshot = run.snapshot()
    snapshot["config"]["output"]["resume_interrupted"] = allowed
    run.config.write_text(json.dumps(snapshot))
    return run


def last_pid(run: RunDir) -> int:
    return int(locks.last_note(run.lock)["pid"])


def kinds(run: RunDir) -> list[str]:
    return [event["kind"] for event in all_events(run.events)]


def test_a_run_cut_off_says_why_once_and_goes_on_by_itself_to_its_end(
    engine: Engine, workspace: Workspace, killed: RunDir
) -> None:
    run = cut_off(workspace, killed, allowed=3)
    ends = [End(last_pid(run), boot_id(), 0, 1, -9, "the kernel ended it for want of memory")]
    assert engine.recover(ends) == [run]
    runs.wait_for(lambda: status(run).state == "finished", 60)
    events = all_events(run.events)
    cut = next(event for event in events if event["kind"] == "cut_off")
    assert cut["cause"] == "signal 9 (SIGKILL), the kernel ended it for want of memory"
    resumed = next(event for event in events if event["kind"] == "resumed")
    assert resumed["auto"] is True and resumed["owner"] == "test", "whose run it is has not changed"
    assert status(run).cause is None and newest_verified(run.checkpoints).step == 10
    assert engine.recover(ends) == [] and kinds(run).count("cut_off") == 1


def test_without_the_setting_it_is_offered_with_its_cause(engine: Engine, workspace: Workspace, killed: RunDir) -> None:
    run = cut_off(workspace, killed)
    engine.recover([End(last_pid(run), boot_id(), 0, 1, -11, crash="Segmentation fault in step.py, line 3 (f)")])
    now = status(run)
    assert now.state == "interrupted" and "Segmentation fault in step.py" in (now.cause or "")
    assert engine.holder() is None
    engine.resume_run(run.run_id, "me")
    runs.wait_for(lambda: status(run).state == "finished", 60)


def made(workspace: Workspace, name: str, allowed: int = 3, autos: int = 0) -> MadeRun:
    run = MadeRun(workspace.runs, name)
    snapshot = run.run.snapshot()
    snapshot["config"]["output"]["resume_interrupted"] = allowed
    run.run.config.write_text(json.dumps(snapshot))
    run.start()
    run.step()
    for _ in range(autos):
        run.events.append("resumed", owner="me", auto=True)
        run.events.append("running", step=1)
    return run


def went_on(listed: list[MadeRun]) -> list[RunDir]:
    taken: list[RunDir] = []
    recover([each.run for each in listed], [], taken.append)
    return taken


def test_three_times_in_a_row_and_then_it_waits_for_a_person(workspace: Workspace) -> None:
    for autos in range(5):
        run = made(workspace, "night", autos=autos)
        run.close()
        assert bool(went_on([run])) is (autos < 3), autos
        now = status(run.run)
        assert now.resumed_itself == autos and now.resumes_allowed == 3 and now.state == "interrupted"
    run = made(workspace, "night", autos=3)
    run.events.append("resumed", owner="me")
    run.events.append("running", step=1)
    run.close()
    assert went_on([run]) == [run.run], "a person has resumed it: it counts from the beginning"


def test_a_settings_file_cannot_ask_for_more_than_three(workspace: Workspace) -> None:
    run = made(workspace, "night", allowed=99, autos=3)
    run.close()
    assert went_on([run]) == []


def test_only_the_newest_goes_on_and_the_others_are_explained_and_offered(workspace: Workspace) -> None:
    listed = [made(workspace, name) for name in ("first", "second", "third")]
    for run in listed:
        time.sleep(0.01)
        run.step()
        run.close()
    assert went_on(listed) == [listed[2].run]
    assert all("cut_off" in kinds(run.run) for run in listed)


@pytest.mark.parametrize(
    ("kind", "fields", "goes_on"),
    [
        ("failed", {"cause": "CUDA error: an illegal memory access", "restart": True}, True),
        ("failed", {"cause": "Out of memory"}, False),
        ("stopped", {"by": SHUTDOWN, "boot": "an earlier start"}, True),
        ("stopped", {"by": SHUTDOWN, "boot": boot_id()}, False),
        ("stopped", {"by": "owner"}, False),
        ("paused", {"by": "owner"}, False),
        ("finished", {}, False),
        ("diverged", {"cause": "NaN"}, False),
    ],
)
def test_which_ends_are_not_the_runs_own(
    workspace: Workspace, kind: str, fields: dict[str, Any], goes_on: bool
) -> None:
    run = made(workspace, "night")
    run.end(kind, **fields)
    assert bool(went_on([run])) is goes_on
    assert "cut_off" not in kinds(run.run)


def test_a_run_of_torchrun_is_not_taken_up_by_the_server_alone(workspace: Workspace) -> None:
    run = made(workspace, "team")
    run.checkpoint()
    state = run.run.checkpoints / "step_00000001" / "state.json"
    state.write_text('{"facts": {"processes": 2}}')
    run.close()
    assert went_on([run]) == []
    state.write_text('{"facts": {"processes": 1}}')
    assert went_on([run]) == [run.run]


def test_a_run_that_cannot_go_on_gets_an_alert_with_the_reason(engine: Engine, workspace: Workspace) -> None:
    run = made(workspace, "night")
    run.close()

    def busy(_: RunDir) -> None:
        raise Refusal("The run other has the device since 02:00.")

    recover([run.run], [], busy)
    alert = all_events(run.run.events)[-1]
    assert alert["kind"] == "alert" and "The run other has the device since 02:00." in alert["text"]
    assert status(run.run).state == "interrupted" and not locks.is_held(run.run.lock)


def test_a_live_run_is_left_alone(workspace: Workspace) -> None:
    run = made(workspace, "live")
    assert went_on([run]) == [] and "cut_off" not in kinds(run.run)
    with pytest.raises(Refusal, match="being trained"):
        settle(run.run, "leave", "me")
    run.close()


def test_the_cause_is_of_this_process_and_this_start_of_the_machine() -> None:
    ends = [End(7, "old", 0, 1, -9), End(7, boot_id(), 0, 1, -6), End(8, boot_id(), 0, 1, -11)]
    assert cause_of({"pid": 7, "boot": boot_id()}, ends) == "signal 6 (SIGABRT)"
    assert cause_of({"pid": 9, "boot": boot_id()}, ends) == ""
    assert cause_of({"pid": 9, "boot": "older"}, ends) == "the machine was restarted or lost its power"
    assert cause_of({}, ends) == "", "a run of an earlier version left no note"


def test_leave_makes_a_cut_off_run_stopped_at_its_last_good_step_and_resumable(
    engine: Engine, workspace: Workspace, killed: RunDir
) -> None:
    run = cut_off(workspace, killed, allowed=3)
    assert main(["discard", str(run.path)]) == 2, "only a paused run is discarded"
    assert main(["leave", str(run.path)]) == 0
    end = all_events(run.events)[-1]
    assert (end["kind"], end["step"], end["saved_step"]) == ("stopped", 2, 2)
    assert end["step"] == newest_verified(run.checkpoints).step
    assert status(run).state == "stopped" and not locks.is_held(run.lock)
    assert main(["leave", str(run.path)]) == 2, "there is nothing left to leave"
    assert engine.recover([]) == [] and engine.holder() is None, "a run that was left does not go on by itself"
    engine.resume_run(run.run_id, "me")
    runs.wait_for(lambda: status(run).state == "finished", 60)


def test_discard_ends_the_waiting_of_a_paused_run(
    engine: Engine, workspace: Workspace, place: tuple[Path, Path]
) -> None:
    run_id = engine.start_run(runs.settings(*place, max_steps=5000, eval={"eval_strategy": "no"}), "me")
    run = workspace.run(run_id)
    runs.wait_for(lambda: status(run).current_step > 1)
    with pytest.raises(Refusal, match="being trained"):
        engine.settle(run_id, "discard", "me")
    control.drop(run.control, "pause", "me")
    runs.wait_for(lambda: status(run).state == "paused" and engine.holder() is None)
    step = status(run).current_step
    with pytest.raises(Refusal, match="nothing to leave"):
        engine.settle(run_id, "leave", "me")
    engine.settle(run_id, "discard", "me")
    now = status(run)
    assert (now.state, now.last_checkpoint_step) == ("stopped", step)
    assert newest_verified(run.checkpoints).step == step


def test_nobody_sees_a_run_live_while_it_is_being_left(workspace: Workspace) -> None:
    run = made(workspace, "left")
    run.close()
    reader = StatusReader(run.run)
    append = EventLog.append

    def slow(log: EventLog, kind: str, **fields: Any) -> int:
        assert reader.read().state == "interrupted" and locks.is_held(run.run.lock)
        return append(log, kind, **fields)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EventLog, "append", slow)
        settle(run.run, "leave", "me")
    assert reader.read().state == "stopped"


def test_the_page_may_leave_and_discard_as_operator_and_not_as_viewer(workspace: Workspace, engine: Engine) -> None:
    site = Site(workspace, engine, engine.worker, None, None, Path("config.json"))  # type: ignore[arg-type]
    app = Starlette(routes=ui.feed.routes(site))
    owner = TestClient(Guard(app, Rules()), base_url="http://localhost")
    viewer = TestClient(Guard(app, Rules(share_port=80)), base_url="http://localhost")
    cut, paused = made(workspace, "cut"), made(workspace, "paused")
    cut.close()
    paused.end("paused", by="me", step=1)
    for run, command in ((cut, "leave"), (paused, "discard")):
        address = f"/api/runs/{run.run_id}/command"
        assert viewer.post(address, json={"command": command}).status_code == 403
        other = "discard" if command == "leave" else "leave"
        refused = owner.post(address, json={"command": other})
        assert refused.status_code == 409 and "Nothing was changed" in refused.json()["error"]
        assert owner.post(address, json={"command": command}).status_code == 202
        assert status(run.run).state == "stopped"
