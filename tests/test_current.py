"""The current model: promoted and rolled back by one rename, never pruned, never deleted, never a damaged one."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

import ui.feed
from tests import runs
from tests.conftest import RunningApp
from tests.made_runs import MadeRun
from tests.tiny import tiny_model_dir
from trainer import checkpoint
from trainer.engine import Engine
from trainer.refusal import Refusal
from trainer.run import RunDir
from trainer.worker import Worker
from trainer.workspace import Workspace
from ui.guard import Guard, Rules
from ui.site import Site


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workspace, RunDir]:
    """A workspace with a run that kept the checkpoints of four steps."""
    root = tmp_path_factory.mktemp("current")
    model, data = tiny_model_dir(root / "model", hidden=32, layers=1), runs.write_rows(root / "rows.jsonl", 20)
    workspace, worker = Workspace(root / "ws").create(), Worker()
    config = runs.settings(
        model, data, max_steps=4, output={"save_steps": 1, "save_total_limit": 9}, eval={"eval_strategy": "no"}
    )
    run = runs.new(workspace, config)
    try:
        assert runs.train(run, workspace, worker) == "finished"
    finally:
        worker.close()
    return workspace, run


@pytest.fixture
def workspace(place: tuple[Workspace, RunDir]) -> Iterator[Workspace]:
    yield place[0]
    place[0].current.path.unlink(missing_ok=True)


def test_promote_and_roll_back_keep_the_history_and_move_no_weights(
    workspace: Workspace, place: tuple[Workspace, RunDir]
) -> None:
    run, current = place[1], workspace.current
    assert current.history() == ()
    with pytest.raises(Refusal, match="No model was current before"):
        current.roll_back()
    files = {path: path.stat().st_mtime_ns for path in run.checkpoints.rglob("*") if path.is_file()}
    current.promote(run, 2, "owner")
    current.promote(run, 4, "lab-2")
    assert [(entry.step, entry.by) for entry in current.history()] == [(4, "lab-2"), (2, "owner")]
    assert (current.history()[0].model / "model.safetensors").is_file()
    assert current.steps_of(run.run_id) == {2, 4} and current.is_of(run.run_id)
    with pytest.raises(Refusal, match="already"):
        current.promote(run, 4, "owner")
    with pytest.raises(Refusal, match="no checkpoint of step 9"):
        current.promote(run, 9, "owner")
    assert current.roll_back().step == 2
    assert [entry.step for entry in current.history()] == [2]
    assert files == {path: path.stat().st_mtime_ns for path in run.checkpoints.rglob("*") if path.is_file()}


def test_a_damaged_checkpoint_is_neither_promoted_nor_rolled_back_to(
    workspace: Workspace, place: tuple[Workspace, RunDir]
) -> None:
    run, current = place[1], workspace.current
    weights = checkpoint.directory_of(run.checkpoints, 3) / "model" / "model.safetensors"
    good = weights.read_bytes()
    current.promote(run, 3, "owner")
    current.promote(run, 4, "owner")
    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    try:
        with pytest.raises(Refusal, match="no longer whole"):
            current.roll_back()
        assert current.history()[0].step == 4
        current.path.unlink()
        with pytest.raises(Refusal, match="Step 3 is damaged"):
            current.promote(run, 3, "owner")
        assert current.history() == ()
    finally:
        weights.write_bytes(good)


def test_a_file_that_cannot_be_read_is_refused_and_kept(workspace: Workspace, place: tuple[Workspace, RunDir]) -> None:
    workspace.current.path.write_text("{half", encoding="utf-8")
    with pytest.raises(Refusal, match="cannot be read"):
        workspace.current.promote(place[1], 4, "owner")
    assert workspace.current.path.read_text(encoding="utf-8") == "{half"


def test_what_is_or_was_current_outlives_the_pruning_of_its_own_run(tmp_path: Path) -> None:
    model, data = tiny_model_dir(tmp_path / "model", hidden=32, layers=1), runs.write_rows(tmp_path / "rows.jsonl", 20)
    workspace, worker = Workspace(tmp_path / "ws").create(), Worker()
    settings: dict[str, Any] = {
        "max_steps": 8, "output": {"save_steps": 1, "save_total_limit": 2}, "eval": {"eval_strategy": "no"},
    }  # fmt: skip
    run = runs.new(workspace, runs.settings(model, data, **settings))
    try:
        assert runs.train(run, workspace, worker, stop_at=3) == "stopped"
        (older, newer) = sorted(step for step, _ in checkpoint.listed(run.checkpoints))
        workspace.current.promote(run, older, "owner")
        workspace.current.promote(run, newer, "owner")
        assert runs.train(run, workspace, worker) == "finished"
    finally:
        worker.close()
    assert sorted(step for step, _ in checkpoint.listed(run.checkpoints)) == [older, newer, 7, 8]


def test_what_is_made_current_while_its_run_prunes_is_kept_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promoted between the look at what is current and the removal: the current model must never be the one removed."""
    model, data = tiny_model_dir(tmp_path / "model", hidden=32, layers=1), runs.write_rows(tmp_path / "rows.jsonl", 20)
    workspace, worker = Workspace(tmp_path / "ws").create(), Worker()
    config = runs.settings(
        model, data, max_steps=5, output={"save_steps": 1, "save_total_limit": 2}, eval={"eval_strategy": "no"}
    )
    run, prune = runs.new(workspace, config), checkpoint.prune
    promoting: list[threading.Thread] = []

    def promote(step: int) -> None:
        with contextlib.suppress(Refusal):
            workspace.current.promote(run, step, "owner")

    def late(checkpoints: Path, keep: int, *given: Any) -> list[int]:
        if len(found := checkpoint.listed(checkpoints)) > keep:
            promoting.append(threading.Thread(target=promote, args=(found[-1][0],)))
            promoting[-1].start()
            promoting[-1].join(0.3)
        return prune(checkpoints, keep, *given)

    monkeypatch.setattr(checkpoint, "prune", late)
    try:
        assert runs.train(run, workspace, worker) == "finished"
    finally:
        worker.close()
    for thread in promoting:
        thread.join()
    assert promoting and all(entry.checkpoint.exists() for entry in workspace.current.history())


def test_the_page_promotes_rolls_back_and_refuses_to_delete_the_run_that_holds_it(
    workspace: Workspace, place: tuple[Workspace, RunDir]
) -> None:
    run = place[1]
    engine = Engine(workspace, Worker())
    try:
        site = Site(workspace, engine, engine.worker, None, None, Path("config.json"))  # type: ignore[arg-type]
        owner = TestClient(Guard(Starlette(routes=ui.feed.routes(site)), Rules()), base_url="http://localhost")
        viewer = TestClient(
            Guard(Starlette(routes=ui.feed.routes(site)), Rules(share_port=80)), base_url="http://localhost"
        )
        base = f"/api/runs/{run.run_id}"
        assert viewer.post(f"{base}/promote", json={"step": 4}).status_code == 403
        assert owner.post(f"{base}/promote", json={"step": "4"}).status_code == 400
        for step in (1, 4):
            assert owner.post(f"{base}/promote", json={"step": step}).status_code == 200
        listed = owner.get(f"{base}/checkpoints").json()
        assert {row["step"]: row["names"] for row in listed["checkpoints"]}[4] == ["last", "current"]
        assert listed["before"] == {"name": run.run_id, "step": 1}
        name = next(row["to_type"] for row in owner.get("/api/runs").json()["runs"])
        refused = owner.post(f"{base}/delete", json={"name": name})
        assert refused.status_code == 400 and "holds the current model" in refused.json()["error"]
        assert viewer.post("/api/current/roll-back", json={}).status_code == 403
        assert owner.post("/api/current/roll-back", json={}).json() == {"run_id": run.run_id, "step": 1}
        assert run.path.is_dir()
    finally:
        engine.shutdown(5)


@pytest.mark.browser
def test_a_checkpoint_is_made_current_on_the_board(page: Any, app: RunningApp) -> None:
    made = MadeRun(Workspace(app.workspace).runs, "made").start(2)
    made.step()
    made.checkpoint()
    made.end("finished", step=1)
    try:
        page.goto(f"{app.url}/live?run={made.run_id}")
        page.get_by_role("tab", name="Checkpoints").click()
        page.get_by_role("button", name="Make current").click()
        page.locator("#sb-panel-Checkpoints td", has_text="last, current").wait_for()
        assert Workspace(app.workspace).current.is_of(made.run_id)
    finally:
        Workspace(app.workspace).current.path.unlink(missing_ok=True)
        made.remove()
