"""A row that turns bad in mid-run: it stops the run by name, or is left out from there on where the settings say so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import runs
from tests.lives import assert_same, one_life
from tests.test_team import _end, _torchrun
from tests.tiny import tiny_model_dir
from trainer import bad_rows, checkpoint
from trainer.bad_rows import LeftOut, left_out_of
from trainer.data.loader import BadRow
from trainer.data.tokens import TokenCache
from trainer.events import DURABLE, all_events
from trainer.metrics import MetricsWriter, read_metrics, read_rows
from trainer.notify import message_of
from trainer.run import RunDir, status
from trainer.worker import Worker
from trainer.workspace import Workspace

OFF = {"eval_strategy": "no"}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("bad")
    return tiny_model_dir(root / "model", hidden=32, layers=1), runs.write_rows(root / "rows.jsonl", 24)


def new(workspace: Workspace, sources: tuple[Path, Path], **settings: Any) -> RunDir:
    base: dict[str, Any] = {"max_steps": 8, "eval": OFF, "data": {"bad_row": "skip"}}
    return runs.new(workspace, runs.settings(*sources, **base | settings))


def events(run: RunDir, kind: str = bad_rows.KIND) -> list[dict[str, Any]]:
    return [event for event in all_events(run.events) if event["kind"] == kind]


class Damage:
    """A row of a token cache with an id that no model knows, until it is mended."""

    def __init__(self, workspace: Workspace, *rows: int) -> None:
        self.folder = next(workspace.tokens.glob("*/cache.json")).parent
        self.cache = TokenCache.open(self.folder)
        self.ids = np.load(self.folder / "ids.npy", mmap_mode="r+")
        self.before = self.ids.copy()
        for row in rows:
            self.do(row)

    def do(self, row: int) -> None:
        """Damage one row."""
        self.ids[self.cache.offsets[row] + 3] = 70_000
        self.ids.flush()

    def mend(self) -> None:
        """Put all rows back."""
        self.ids[:] = self.before
        self.ids.flush()


@pytest.fixture
def straight(workspace: Workspace, sources: Any, worker: Worker) -> RunDir:
    """The run in which no row is bad."""
    run = new(workspace, sources)
    assert one_life(run, workspace, worker) == "finished"
    return run


# -- stop


def test_a_damaged_row_stops_the_run_by_name_with_all_before_it_saved(
    workspace: Workspace, sources: Any, worker: Worker
) -> None:
    config = runs.settings(*sources, max_steps=8, eval=OFF)
    straight = runs.new(workspace, config)
    assert runs.train(straight, workspace, worker) == "finished"
    folder = next(workspace.tokens.glob("*/cache.json")).parent
    cache = TokenCache.open(folder)
    row = max((row for row, _, _ in read_rows(straight.rows, 5)), key=lambda row: cache.lengths[row])
    ids = np.load(folder / "ids.npy", mmap_mode="r+")
    ids[cache.offsets[row] + 3] = 70_000
    ids.flush()
    run = runs.new(workspace, config)
    assert runs.train(run, workspace, worker) == "failed"
    cause = status(run).cause or ""
    assert (
        f"Row {row:,} (rows.jsonl, line {row + 1:,}) stopped step 5: its token 70,000 is none of the model's" in cause
    )
    assert folder.name in cause and "resume" in cause
    assert checkpoint.newest_verified(run.checkpoints).step == 4
    shutil.rmtree(folder)
    assert runs.train(run, workspace, worker) == "finished", "what the sentence advises"
    assert read_metrics(run.metrics)["loss"].tolist() == read_metrics(straight.metrics)["loss"].tolist()


@pytest.mark.parametrize("fault", [OSError(5, "Input/output error"), IndexError("index 9 is out of bounds")])
def test_a_row_that_cannot_be_read_is_named_too_also_when_it_is_held_out(
    workspace: Workspace, sources: Any, worker: Worker, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    real = TokenCache.ids
    run = runs.new(workspace, runs.settings(*sources, max_steps=4))
    seen: list[int] = []

    def ids(cache: TokenCache, row: int) -> np.ndarray:
        if status(run).phase == "eval":
            seen.append(row)
            raise fault
        return real(cache, row)

    monkeypatch.setattr(TokenCache, "ids", ids)
    assert runs.train(run, workspace, worker) == "failed"
    assert f"Row {seen[0]:,} (rows.jsonl, line {seen[0] + 1:,})" in (status(run).cause or "")
    assert "cannot be read" in (status(run).cause or "") and BadRow(1, "x").row == 1


# -- skip


def rows_of(run: RunDir, step: int) -> list[int]:
    return [row for row, *_ in read_rows(run.rows, step)]


def test_it_is_left_out_of_its_step_named_by_file_and_line_and_the_loss_is_that_of_the_others(
    workspace: Workspace, sources: Any, worker: Worker, straight: RunDir
) -> None:
    bad = rows_of(straight, 5)[1]
    Damage(workspace, bad)
    run = new(workspace, sources)
    assert one_life(run, workspace, worker) == "finished", status(run).cause
    (event,) = events(run)
    assert (event["step"], event["row"], event["file"], event["line"]) == (5, bad, "rows.jsonl", bad + 1)
    assert f"rows.jsonl, line {bad + 1}, since its token 70,000 is none of the model's" in event["text"]
    assert bad_rows.KIND in DURABLE and event["text"] in [log["text"] for log in events(run, "log")]
    ours, theirs = read_metrics(run.metrics), read_metrics(straight.metrics)
    assert ours["step"].tolist() == list(range(1, 9)) and ours["loss"][:4].tolist() == theirs["loss"][:4].tolist()
    # the weights before step 5 are the same, so the other rows' losses are those of the run without damage
    others = [(loss, labels) for row, loss, labels in read_rows(straight.rows, 5) if row != bad]
    assert ours["loss"][4] == pytest.approx(sum(loss for loss, _ in others) / sum(n for _, n in others), rel=1e-5)
    assert ours["rows"][4] == 3 and bad not in {row for step in range(5, 9) for row in rows_of(run, step)}
    now = status(run)
    assert now.rows_left_out == 1 and "1 bad row was left out." in message_of(now).text  # type: ignore[union-attr]


@pytest.mark.parametrize("at", [4, 5, 7])
def test_a_resume_leaves_out_the_same_rows_though_they_were_mended_meanwhile(
    workspace: Workspace, sources: Any, worker: Worker, straight: RunDir, at: int
) -> None:
    damage = Damage(workspace, rows_of(straight, 5)[1])
    whole = new(workspace, sources, output={"save_steps": 4})
    assert one_life(whole, workspace, worker) == "finished"
    broken = new(workspace, sources, output={"save_steps": 4})
    assert one_life(broken, workspace, worker, at=at, command="stop-now" if at > 4 else "stop") == "stopped"
    if at > 4:  # found before the stop: its home is the run, not the damaged file
        assert checkpoint.newest_verified(broken.checkpoints).step == 4
        damage.mend()
    assert one_life(broken, workspace, worker) == "finished"
    assert_same(broken, whole, f"stopped at step {at}")
    assert len(events(broken)) == 1


def test_a_resume_trains_a_row_in_the_steps_in_which_it_was_sound(
    workspace: Workspace, sources: Any, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """24 rows, 4 a step: a row of the first epoch turns bad after it and is left out of the second alone."""
    settings = {"max_steps": 15}
    first = new(workspace, sources, **settings)
    assert one_life(first, workspace, worker) == "finished"
    bad = rows_of(first, 3)[0]
    again = next(step for step in range(7, 13) if bad in rows_of(first, step))
    damage, record = Damage(workspace), MetricsWriter.step

    def and_damage(writer: MetricsWriter, values: dict[str, float], rows: list[tuple[int, float, int]]) -> None:
        record(writer, values, rows)
        if values["step"] == 6:
            damage.do(bad)

    broken = new(workspace, sources, **settings)
    with monkeypatch.context() as patch:
        patch.setattr(MetricsWriter, "step", and_damage)
        whole = new(workspace, sources, **settings)
        assert one_life(whole, workspace, worker) == "finished"
        damage.mend()
        assert one_life(broken, workspace, worker, at=again + 1, command="stop-now") == "stopped"
    assert [event["step"] for event in events(whole)] == [event["step"] for event in events(broken)] == [again]
    damage.mend()
    assert checkpoint.listed(broken.checkpoints) == [], "it starts over, from step 1"
    assert one_life(broken, workspace, worker) == "finished"
    assert_same(broken, whole, "started over")
    assert bad in rows_of(broken, 3) and bad not in rows_of(broken, again)


def test_a_step_whose_rows_are_all_bad_leaves_no_record_and_the_run_goes_on(
    workspace: Workspace, sources: Any, worker: Worker, straight: RunDir
) -> None:
    Damage(workspace, *rows_of(straight, 6))
    run = new(workspace, sources)
    assert one_life(run, workspace, worker) == "finished", status(run).cause
    assert read_metrics(run.metrics)["step"].tolist() == [1, 2, 3, 4, 5, 7, 8]
    assert [event["step"] for event in events(run)] == [6] * 4
    assert sorted(event["row"] for event in events(run)) == sorted(rows_of(straight, 6))
    assert checkpoint.newest_verified(run.checkpoints).step == 8


def test_so_many_that_it_is_no_accident_stop_the_run_with_what_was_trained_saved(
    workspace: Workspace, sources: Any, worker: Worker, straight: RunDir
) -> None:
    Damage(workspace, *(row for step in (3, 4, 5, 6) for row in rows_of(straight, step)))
    run = new(workspace, sources)
    assert one_life(run, workspace, worker) == "failed"
    cause = status(run).cause or ""
    assert cause.startswith("12 bad rows were left out before, and more are no accident. Row "), cause
    assert "Delete that folder in cache/tokens and resume" in cause and len(events(run)) == 12
    assert checkpoint.newest_verified(run.checkpoints).step == 5
    assert LeftOut(dict.fromkeys(range(101), 1)).too_many(10_000) and not LeftOut({1: 1}).too_many(2)
    shutil.rmtree(Damage(workspace).folder)
    assert one_life(run, workspace, worker) == "finished", "what the sentence advises"


def test_a_held_out_row_is_left_out_of_the_checks_and_of_those_of_a_resume(
    workspace: Workspace, sources: Any, worker: Worker
) -> None:
    settings: dict[str, Any] = {
        "eval": {"eval_strategy": "steps", "eval_steps": 4},
        "data": {"bad_row": "skip", "validation_split": 0.2},
    }
    sound = new(workspace, sources, **settings)
    assert one_life(sound, workspace, worker) == "finished"
    trained = {row for step in range(1, 9) for row in rows_of(sound, step)}
    bad = next(row for row in range(24) if row not in trained)
    damage = Damage(workspace, bad)
    whole, broken = (new(workspace, sources, **settings) for _ in range(2))
    assert one_life(whole, workspace, worker) == "finished"
    assert one_life(broken, workspace, worker, at=5, command="stop-now") == "stopped"
    damage.mend()
    assert one_life(broken, workspace, worker) == "finished"
    (event,) = events(whole)
    assert event["held_out"] and event["row"] == bad and "held-out check of step 0" in event["text"]
    held = {run.path: [(e["rows"], e["loss"]) for e in events(run, "eval")] for run in (sound, whole, broken)}
    assert [rows for rows, _ in held[whole.path]] == [4, 4, 4] and [rows for rows, _ in held[sound.path]] == [5, 5, 5]
    assert held[broken.path][0] == held[whole.path][0] and held[broken.path][-2:] == held[whole.path][-2:]
    assert_same(broken, whole, "stopped with a bad held-out row")
    assert_same(whole, sound, "the training itself")


def test_the_events_are_the_home_of_what_is_left_out() -> None:
    told = [{"kind": "bad_row", "row": 4, "step": 9}, {"kind": "bad_row", "row": 4, "step": 7}, {"kind": "log"}]
    found = left_out_of([*told, {"kind": "bad_row", "row": 4, "step": 3, "held_out": True}])
    assert (found.at(6), found.at(7), found.held_out_at(3), found.count) == (frozenset(), {4}, {4}, 2)


@pytest.mark.slow
def test_a_team_leaves_out_the_same_row_at_the_same_step(
    workspace: Workspace, sources: Any, worker: Worker, straight: RunDir, tmp_path: Path
) -> None:
    Damage(workspace, rows_of(straight, 3)[0], rows_of(straight, 6)[2])
    alone = new(workspace, sources)
    assert one_life(alone, workspace, worker) == "finished"
    config = runs.settings(*sources, max_steps=8, eval=OFF, data={"bad_row": "skip"})
    (tmp_path / "team.json").write_text(config.model_dump_json(), encoding="utf-8")
    _end(_torchrun(tmp_path, "train", "--config", "team.json", "--workspace", str(workspace.root), "--output", "team"))
    team = RunDir(tmp_path / "team")
    assert status(team).state == "finished"
    told = [[(e["step"], e["row"], e["text"]) for e in events(run)] for run in (alone, team)]
    assert told[0] == told[1] and [step for step, *_ in told[1]] == [3, 6], json.dumps(told)
    one, two = read_metrics(alone.metrics), read_metrics(team.metrics)
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5) and two["rows"].tolist() == one["rows"].tolist()
