"""Deleting a run: the name typed, the run at rest, and nothing outside its directory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.made_runs import MadeRun
from trainer.refusal import Refusal
from trainer.run import RunDir
from trainer.run_delete import TOMBSTONE, delete_run
from trainer.workspace import Workspace


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "workspace").create()


def ended_run(workspace: Workspace, name: str = "my run") -> RunDir:
    made = MadeRun(workspace.runs, name).start()
    made.step()
    made.checkpoint()
    return made.end("finished", step=1).run


def test_the_typed_name_deletes_the_run_with_everything_in_it_and_says_how_much(workspace: Workspace) -> None:
    run, other = ended_run(workspace), ended_run(workspace, "other")
    size = sum(path.stat().st_size for path in run.path.rglob("*") if path.is_file())
    assert delete_run(run, " my run ") == size
    assert [kept.run_id for kept in workspace.list_runs()] == [other.run_id]
    assert os.listdir(workspace.runs) == [other.run_id]


@pytest.mark.parametrize("typed", ["", "my", "MY RUN", "my run2"])
def test_another_name_deletes_nothing(workspace: Workspace, typed: str) -> None:
    run = ended_run(workspace)
    with pytest.raises(Refusal, match="not the name"):
        delete_run(run, typed)
    assert run.config.is_file()


def test_a_run_in_training_is_refused_until_its_lock_is_free(workspace: Workspace) -> None:
    made = MadeRun(workspace.runs, "live").start()
    with pytest.raises(Refusal, match="is being trained"):
        delete_run(made.run, "live")
    assert made.run.config.is_file()
    made.close()
    delete_run(made.run, "live")
    assert workspace.list_runs() == []


def test_links_inside_are_removed_and_never_followed(workspace: Workspace, tmp_path: Path) -> None:
    outside = tmp_path / "precious"
    outside.mkdir()
    (outside / "weights.safetensors").write_bytes(b"keep me")
    run = ended_run(workspace)
    (run.path / "link").symlink_to(outside)
    (run.checkpoints / "step_00000002").symlink_to(outside)
    delete_run(run, "my run")
    assert (outside / "weights.safetensors").read_bytes() == b"keep me"


def test_a_run_that_is_itself_a_link_is_refused(workspace: Workspace, tmp_path: Path) -> None:
    run = ended_run(workspace)
    moved = tmp_path / "elsewhere"
    run.path.rename(moved)
    run.path.symlink_to(moved)
    with pytest.raises(Refusal, match="is a link"):
        delete_run(run, "my run")
    assert (moved / "config.json").is_file()


def test_a_half_removed_run_is_out_of_the_list_and_finished_by_the_next_deletion(workspace: Workspace) -> None:
    left = workspace.runs / f"{TOMBSTONE}20260101-000000-dead-1"
    (left / "checkpoints").mkdir(parents=True)
    (left / "config.json").write_text("{}")
    run = ended_run(workspace)
    assert [listed.run_id for listed in workspace.list_runs()] == [run.run_id]
    delete_run(run, "my run")
    assert os.listdir(workspace.runs) == []
