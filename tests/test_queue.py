"""The queue: its file, the engine that tends it, and the page's route to it."""

from __future__ import annotations

import inspect
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

import ui.feed
import ui.process
import ui.queue_api
from app import options_of, parser
from tests import runs
from tests.conftest import RunningApp
from tests.made_runs import MadeRun
from tests.tiny import tiny_model_dir
from trainer import control, lease
from trainer.engine import Engine
from trainer.machine import machine
from trainer.queue import MOST, Queue
from trainer.refusal import Refusal
from trainer.run import status
from trainer.worker import Worker
from trainer.workspace import Workspace
from ui.guard import Guard, Rules
from ui.site import Site


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("queue")
    return tiny_model_dir(root / "model"), runs.write_rows(root / "rows.jsonl")


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    made = Engine(Workspace(tmp_path / "ws").create(), Worker())
    yield made
    made.shutdown(10)


def order(queue: Queue) -> list[str]:
    return [entry.run_id for entry in queue.read().entries]


def test_runs_are_added_moved_and_removed_and_another_reader_sees_the_same(tmp_path: Path) -> None:
    queue = Queue(tmp_path / "queue.json")
    assert order(queue) == [] and not queue.read().held_by
    assert [queue.add(name, "me") for name in "abcd"] == [1, 2, 3, 4]
    with pytest.raises(Refusal, match="already"):
        queue.add("b", "me")
    queue.move("d", 0)
    queue.move("a", 99)
    assert order(Queue(queue.path)) == ["d", "b", "c", "a"]
    assert queue.remove("b") and not queue.remove("b")
    queue.hold("lab-2")
    assert order(queue) == ["d", "c", "a"] and queue.read().held_by == "lab-2"
    queue.release()
    assert not queue.read().held_by
    with pytest.raises(Refusal, match="no longer"):
        queue.move("b", 0)


def test_a_full_queue_and_a_damaged_file_are_refused_in_words(tmp_path: Path) -> None:
    queue = Queue(tmp_path / "queue.json")
    for number in range(MOST):
        queue.add(f"r{number}", "me")
    with pytest.raises(Refusal, match=str(MOST)):
        queue.add("one more", "me")
    queue.path.write_text("{half", encoding="utf-8")
    with pytest.raises(Refusal, match="cannot be read"):
        queue.add("x", "me")
    assert queue.path.read_text(encoding="utf-8") == "{half", "nothing is overwritten"


def test_many_at_once_lose_no_entry(tmp_path: Path) -> None:
    def add(start: int) -> None:
        mine = Queue(tmp_path / "queue.json")
        for number in range(start, start + 10):
            mine.add(f"r{number}", "me")

    threads = [threading.Thread(target=add, args=(start,)) for start in range(0, 50, 10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(order(Queue(tmp_path / "queue.json"))) == sorted(f"r{number}" for number in range(50))


def test_the_queue_runs_in_order_goes_on_after_a_failure_and_survives_a_restart(
    engine: Engine, place: tuple[Path, Path], tmp_path: Path
) -> None:
    short = runs.settings(*place, max_steps=2, eval={"eval_strategy": "no"})
    gone = runs.write_rows(tmp_path / "gone.jsonl", 20)
    names = [
        engine.enqueue_new(short, "me", name="first"),
        engine.enqueue_new(runs.settings(place[0], gone, max_steps=2), "me", name="fails"),
        engine.enqueue_new(short, "me", name="deleted"),
        engine.enqueue_new(short, "me", name="last"),
    ]
    assert [status(engine.workspace.run(name)).state for name in names] == ["queued"] * 4
    gone.unlink()
    (engine.workspace.run(names[2]).path / "config.json").unlink()
    engine.shutdown(10)  # nothing tended it: a server that ended before the first began

    again = Engine(Workspace(tmp_path / "ws"), Worker())
    try:
        again.tend_queue()
        runs.wait_for(lambda: not order(again.workspace.queue) and again.holder() is None, 60)
        ends = [status(again.workspace.run(name)) for name in (names[0], names[1], names[3])]
        assert [end.state for end in ends] == ["finished", "failed", "finished"]
        assert "gone.jsonl" in (ends[1].cause or "")
        assert ends[0].ended_at is not None and ends[2].started_at is not None
        assert ends[0].ended_at <= ends[2].started_at
    finally:
        again.shutdown(10)


def test_it_waits_for_the_device_and_for_whoever_holds_it_back(engine: Engine, place: tuple[Path, Path]) -> None:
    run_id = engine.enqueue_new(runs.settings(*place, max_steps=2, eval={"eval_strategy": "no"}), "me")
    lock = lease.acquire(machine().device, kind="train", owner="a command line", run_id="", name="other")
    assert engine.start_next() is None and order(engine.workspace.queue) == [run_id]
    lock.release()
    engine.workspace.queue.hold("me")
    assert engine.start_next() is None
    engine.workspace.queue.release()
    assert engine.start_next() == run_id and order(engine.workspace.queue) == []
    runs.wait_for(lambda: status(engine.workspace.run(run_id)).state == "finished")
    with pytest.raises(Refusal, match="finished"):
        engine.enqueue(run_id, "me")


def test_a_pause_holds_the_queue_and_a_waiting_run_goes_on_where_it_was(
    engine: Engine, place: tuple[Path, Path]
) -> None:
    endless = runs.settings(*place, max_steps=5000, eval={"eval_strategy": "no"})
    run_id = engine.start_run(endless, "me")
    run = engine.workspace.run(run_id)
    other = engine.enqueue_new(endless, "me")
    engine.tend_queue()
    runs.wait_for(lambda: status(run).current_step > 2)
    control.drop(run.control, "pause", "me")
    runs.wait_for(lambda: engine.holder() is None)
    assert engine.workspace.queue.read().held_by == "me" and status(engine.workspace.run(other)).state == "queued"
    paused_at = status(run).current_step
    engine.enqueue(run_id, "me")
    engine.workspace.queue.move(run_id, 0)
    engine.workspace.queue.release()
    runs.wait_for(lambda: status(run).current_step > paused_at)
    assert order(engine.workspace.queue) == [other]
    engine.workspace.queue.remove(other)
    control.drop(run.control, "stop-now", "me")


def test_a_pause_under_a_queue_that_cannot_be_read_breaks_nothing(engine: Engine, place: tuple[Path, Path]) -> None:
    run_id = engine.start_run(runs.settings(*place, max_steps=5000, eval={"eval_strategy": "no"}), "me")
    run = engine.workspace.run(run_id)
    runs.wait_for(lambda: status(run).current_step > 0, 60)
    engine.workspace.queue.path.write_text("{half", encoding="utf-8")
    control.drop(run.control, "pause", "me")
    runs.wait_for(lambda: engine.holder() is None)
    assert status(run).state == "paused" and not engine.poisoned.is_set()
    with pytest.raises(Refusal, match="queue.json of the workspace cannot be read") as refused:
        engine.workspace.queue.read()
    assert str(engine.workspace.root) not in refused.value.message, "viewers read it"


def test_the_queue_begins_when_runs_that_were_cut_off_have_had_their_turn(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "tend_queue", lambda self: said.append("queue"))
    monkeypatch.setattr(Engine, "recover", lambda self, ends: said.append("recover"))
    said: list[str] = []
    options = options_of(parser().parse_args(["--workspace", str(engine.workspace.root)]))
    site = Site(engine.workspace, engine, engine.worker, None, None, Path("config.json"))  # type: ignore[arg-type]
    ui.process._recover(site, options)
    assert said == ["recover", "queue"]
    assert inspect.getsource(ui.process.serve).count("tend_queue") == 0, "the run that waits would take the device"


def test_resuming_the_paused_run_lets_the_queue_go_on_and_no_other_hold_is_lifted(
    engine: Engine, place: tuple[Path, Path]
) -> None:
    endless = runs.settings(*place, max_steps=5000, eval={"eval_strategy": "no"})
    run_id = engine.start_run(endless, "me")
    run = engine.workspace.run(run_id)
    other = engine.enqueue_new(endless, "me")
    queue = engine.workspace.queue
    for by_hand in (False, True):
        runs.wait_for(lambda: status(run).state == "running")
        if by_hand:
            queue.hold("lab-2")
        control.drop(run.control, "pause", "me")
        runs.wait_for(lambda: status(run).state == "paused" and engine.holder() is None)
        assert queue.read().held_by == ("lab-2" if by_hand else "me")
        engine.resume_run(run_id, "me")
        assert queue.read().held_by == ("lab-2" if by_hand else "")
    queue.remove(other)
    control.drop(run.control, "stop-now", "me")


def test_the_model_that_was_queued_is_the_one_that_is_trained(
    engine: Engine, place: tuple[Path, Path], tmp_path: Path
) -> None:
    model = tiny_model_dir(tmp_path / "model")
    run_id = engine.enqueue_new(runs.settings(model, place[1], max_steps=2), "me")
    (model / "config.json").write_text(
        json.dumps(json.loads((model / "config.json").read_text()) | {"rms_norm_eps": 1e-4}), encoding="utf-8"
    )
    engine.start_next()
    runs.wait_for(lambda: status(engine.workspace.run(run_id)).state == "failed")
    assert "changed since the run was made" in (status(engine.workspace.run(run_id)).cause or "")


# ---- the page -----------------------------------------------------------------------------------------------------


def test_the_route_changes_the_queue_for_operators_and_refuses_the_rest(
    engine: Engine, place: tuple[Path, Path]
) -> None:
    site = Site(engine.workspace, engine, engine.worker, None, None, Path("config.json"))  # type: ignore[arg-type]
    routes = ui.feed.routes(site) + ui.queue_api.routes(site)
    owner = TestClient(Guard(Starlette(routes=routes), Rules()), base_url="http://localhost")
    viewer = TestClient(Guard(Starlette(routes=routes), Rules(share_port=80)), base_url="http://localhost")
    config = runs.settings(*place, max_steps=2)
    first, second = (engine.enqueue_new(config, "me", name=name) for name in ("first", "second"))
    assert owner.get("/api/runs").json()["queue"] == {"order": [first, second], "held_by": "", "fault": ""}
    answer = owner.post("/api/queue", json={"act": "move", "run_id": second, "place": 0}).json()
    assert answer["order"] == [second, first]
    assert owner.post("/api/queue", json={"act": "hold"}).json()["held_by"] == "owner"
    assert owner.get("/api/state").json()["next"] == {"name": "second", "held": True}
    assert viewer.post("/api/queue", json={"act": "go"}).status_code == 403
    assert owner.post("/api/queue", json={"act": "go"}).json()["held_by"] == ""
    assert owner.post("/api/queue", json={"act": "remove", "run_id": second}).json()["order"] == [first]
    assert owner.post("/api/queue", json={"act": "add", "run_id": second}).json()["order"] == [first, second]
    for bad in ({"act": "dance"}, {"act": "move", "run_id": first, "place": "0"}, {"act": "add", "run_id": 3}, [1]):
        assert owner.post("/api/queue", json=bad).status_code == 400, bad
    assert owner.post("/api/runs/" + second + "/delete", json={"name": "second"}).status_code == 200
    assert order(engine.workspace.queue) == [first]


@pytest.mark.browser
def test_a_run_is_added_moved_and_removed_on_the_page(page: Any, app: RunningApp) -> None:
    workspace = Workspace(app.workspace)
    made = [MadeRun(workspace.runs, name) for name in ("alpha", "beta")]
    for run in made:
        run.close()
    workspace.queue.hold("test")
    try:
        page.goto(f"{app.url}/runs")
        for name in ("alpha", "beta"):
            page.locator(".sb-runs-table tbody tr", has_text=name).get_by_role("button", name="Add to queue").click()
            page.locator(".sb-queue-list", has_text=name).wait_for()
        page.get_by_role("button", name="Earlier: beta").click()
        page.wait_for_function("document.querySelector('.sb-queue-list li a').textContent === 'beta'")
        assert order(workspace.queue) == [made[1].run_id, made[0].run_id]
        page.get_by_role("button", name="Out of the queue: beta").click()
        page.wait_for_function("document.querySelectorAll('.sb-queue-list li').length === 1")
        assert order(workspace.queue) == [made[0].run_id]
    finally:
        for run in made:
            workspace.queue.remove(run.run_id)
            run.remove()
        workspace.queue.release()
