"""What a resume finds changed: each key once. It must match (refused, with the difference), may change, or is warned of."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import runs
from tests.lives import assert_same
from tests.tiny import tiny_model_dir
from trainer import checkpoint
from trainer.events import all_events
from trainer.files import read_json, write_json
from trainer.run import status
from trainer.worker import Worker
from trainer.workspace import Workspace

PROFILE = {"name": "mine", "description": "d", "system_prompt": "Answer.", "overwrites_system": False}


class World:
    """A workspace, a model, data and a profile that a test may change, and a run stopped after its third step."""

    def __init__(self, root: Path, model: Path, worker: Worker) -> None:
        self.worker, self.workspace = worker, Workspace(root / "ws").create()
        self.model, self.data = shutil.copytree(model, root / "model"), runs.write_rows(root / "rows.jsonl", 16)
        self.profile = self.workspace.profiles / "mine.json"
        self.profile.write_text(json.dumps(PROFILE))
        self.config = runs.settings(self.model, self.data, eval={"eval_strategy": "no"}, profile={"name": "mine"})
        self.run = runs.new(self.workspace, self.config)
        assert runs.train(self.run, self.workspace, worker, stop_at=3) == "stopped", status(self.run).cause

    def resume(self) -> str:
        """How the next life ends."""
        return runs.train(self.run, self.workspace, self.worker)

    def snapshot(self, change: Callable[[dict[str, Any]], None]) -> None:
        """Change the run's config.json by hand."""
        content = read_json(self.run.config)
        change(content)
        write_json(self.run.config, content)

    def state(self, **progress: Any) -> None:
        """Change the newest checkpoint's progress and seal it again, so that every byte verifies."""
        folder = checkpoint.newest_verified(self.run.checkpoints).path
        state = read_json(folder / checkpoint.STATE)
        state["progress"] |= progress
        write_json(folder / checkpoint.STATE, state)
        (folder / checkpoint.MANIFEST).unlink()
        staging = folder.rename(folder.with_name(".staging_x"))
        checkpoint.seal(staging, 3)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Worker]]:
    worker = Worker()
    yield tiny_model_dir(tmp_path_factory.mktemp("world") / "model", hidden=32, layers=1), worker
    worker.close()


@pytest.fixture
def world(parts: tuple[Path, Worker], tmp_path: Path) -> World:
    return World(tmp_path, *parts)


def hyper(key: str, value: Any) -> Callable[[World], None]:
    return lambda world: world.snapshot(lambda s: s["config"]["hyperparams"].__setitem__(key, value))


def edit(world: World) -> None:
    world.data.write_text(world.data.read_text().replace("Together 1.", "Together 2.", 1))


def fingerprint(world: World) -> None:
    config = read_json(world.model / "config.json")
    write_json(world.model / "config.json", config | {"changed": True})


MUST_MATCH: dict[str, tuple[Callable[[World], Any], str]] = {
    "dataset edited": (edit, "token key was"),
    "dataset shrunk": (lambda w: runs.write_rows(w.data, 12), "token key was"),
    "dataset grown": (lambda w: runs.write_rows(w.data, 20), "token key was"),
    "dataset removed": (lambda w: w.data.unlink(), "rows.jsonl"),
    "model changed": (fingerprint, "the model folder model changed since the run was made"),
    "profile edited": (
        lambda w: w.profile.write_text(json.dumps(PROFILE | {"overwrites_system": True})),
        "token key was",
    ),
    "profile removed": (lambda w: w.profile.unlink(), "mine"),
    "seed": (lambda w: w.snapshot(lambda s: s["config"]["data"].__setitem__("seed", 7)), "was"),
    "batch": (hyper("batch_size", 4), "plan was"),
    "accumulation": (hyper("gradient_accumulation", 4), "plan was"),
    "steps": (hyper("max_steps", 9), "plan was"),
    "steps fewer than done": (hyper("max_steps", 2), "plan was"),
    "max length": (hyper("max_length", 128), "token key was"),
    "threads": (lambda w: w.snapshot(lambda s: s.__setitem__("threads", 2)), "threads was 1 and is now 2"),
    "rate": (hyper("learning_rate", 1e-4), "learning rate was 0.003 and is now 0.0001"),
    "schedule": (hyper("lr_schedule", "constant"), "lr schedule was cosine and is now constant"),
    "warm-up": (hyper("warmup_steps", 1), "warmup steps was 2 and is now 1"),
    "decay": (hyper("weight_decay", 0.5), "weight decay was"),
    "clipping": (hyper("max_grad_norm", 9.0), "max grad norm was"),
    "precision": (hyper("fp_precision", "bf16"), "fp precision was"),
    "step far beyond": (lambda w: w.state(step=10**9), "of step 1000000000"),
    "step negative": (lambda w: w.state(step=-1), "of step -1"),
    "step no number": (lambda w: w.state(step="three"), "of step 'three'"),
    "micro-batch of none": (lambda w: w.state(packs_each=0), "micro-batches of 0"),
    "unknown progress": (lambda w: w.state(wings=2), "its state is not one that a run writes"),
}


@pytest.mark.parametrize("what", MUST_MATCH)
def test_what_must_match_refuses_and_shows_the_difference(world: World, what: str) -> None:
    change, says = MUST_MATCH[what]
    change(world)
    assert world.resume() == "failed", f"{what}: never finished after zero steps, never another curve in silence"
    cause = status(world.run).cause or ""
    assert says in cause and "Error" not in cause, cause
    assert status(world.run).current_step == 3 and checkpoint.newest_verified(world.run.checkpoints).step == 3


@pytest.mark.parametrize("what", ["token cache deleted", "dataset touched", "model named otherwise", "notes"])
def test_what_may_change_leaves_the_same_curve(world: World, what: str) -> None:
    whole = runs.new(world.workspace, world.config)
    assert runs.train(whole, world.workspace, world.worker) == "finished"
    if what == "token cache deleted":
        shutil.rmtree(world.workspace.tokens)
    elif what == "dataset touched":
        os.utime(world.data, (1, 1))
    elif what == "model named otherwise":
        world.snapshot(lambda s: s["model"].__setitem__("display_name", "another"))
    else:
        world.run.notes.write_text('{"name": "x", "why": "y"}')
    assert world.resume() == "finished", status(world.run).cause
    assert_same(world.run, whole, what)


def test_another_library_is_warned_of_by_both_versions_and_the_run_goes_on(world: World) -> None:
    world.snapshot(lambda s: s["versions"].__setitem__("transformers", "5.0.1"))
    assert world.resume() == "finished"
    lines = [event["text"] for event in all_events(world.run.events) if event["kind"] == "log"]
    (warning,) = [line for line in lines if line.startswith("Warning")]
    assert "transformers was 5.0.1 and is now 5." in warning and "no longer claimed" in warning
