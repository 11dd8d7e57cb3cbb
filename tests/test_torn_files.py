"""The append files of a real run, cut at every byte or zeroed by power loss: read up to there, mended when opened, resumed."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests import runs
from tests.figures import Note
from tests.kill_loop import WorkerHere
from tests.tiny import tiny_model_dir
from trainer import checkpoint, metrics, telemetry
from trainer.events import EventLog, all_events, read_events
from trainer.metrics import COLUMNS, MetricsWriter, read_metrics, read_records, read_rows
from trainer.run import RunDir, status
from trainer.workspace import Workspace

STEPS = 6


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workspace, RunDir]:
    """A real run that was stopped at step 3 of 6."""
    root = tmp_path_factory.mktemp("torn")
    workspace = Workspace(root / "ws").create()
    model = tiny_model_dir(root / "model", hidden=32, layers=1)
    config = runs.settings(model, runs.write_rows(root / "rows.jsonl", 20), max_steps=STEPS, eval={"eval_steps": 2})
    run = runs.new(workspace, config)
    assert runs.train(run, workspace, WorkerHere(), stop_at=3) == "stopped"  # type: ignore[arg-type]
    return workspace, run


@pytest.fixture
def copy(whole: tuple[Workspace, RunDir], tmp_path: Path) -> RunDir:
    """A copy of it to damage."""
    shutil.copytree(whole[1].path, tmp_path / "run")
    return RunDir(tmp_path / "run")


def values(step: int) -> dict[str, float]:
    return {**dict.fromkeys(COLUMNS, 0.0), "step": step, "loss": 1.0}


def same(found: np.ndarray, wanted: np.ndarray) -> bool:
    """Equal to the last bit, NaN included."""
    return found.tobytes() == wanted.tobytes()


@pytest.mark.torture
def test_metrics_cut_at_every_byte_keep_their_whole_records_and_are_appended_to(copy: RunDir, figures: Note) -> None:
    content, width = copy.metrics.read_bytes(), metrics.RECORD.itemsize
    records = np.frombuffer(content, metrics.RECORD)
    assert len(records) >= 3
    for cut in range(len(content) + 1):
        copy.metrics.write_bytes(content[:cut])
        kept = cut // width
        assert same(read_records(copy.metrics), records[:kept])
        if cut % 7 == 0:
            now = status(copy)
            assert now.state == "stopped" and now.current_step == kept
        writer = MetricsWriter(copy.metrics, copy.rows)
        writer.step(values(kept + 1), [])
        writer.close()
        found = read_metrics(copy.metrics)
        assert same(found[:kept], records[:kept]) and found[kept:]["step"].tolist() == [kept + 1]
    figures("Torn files: metrics.bin", "cut at every byte, then appended to", tried=len(content) + 1, lost=0)


@pytest.mark.torture
def test_rows_cut_at_every_byte_keep_their_whole_records_and_are_appended_to(copy: RunDir, figures: Note) -> None:
    content, width = copy.rows.read_bytes(), metrics.ROW_RECORD.itemsize
    records = np.frombuffer(content, metrics.ROW_RECORD)
    for cut in range(len(content) + 1):
        copy.rows.write_bytes(content[:cut])
        kept = records[: cut // width]
        for step in (1, 2, 3):
            wanted = [(int(r["row"]), float(r["loss_sum"]), int(r["labels"])) for r in kept if r["step"] == step]
            assert read_rows(copy.rows, step) == wanted
        writer = MetricsWriter(copy.metrics, copy.rows, life=2)
        writer.step(values(4), [(77, 1.5, 3)])
        writer.close()
        assert read_rows(copy.rows, 4)[-1] == (77, 1.5, 3)
        assert copy.rows.stat().st_size % width == 0
    figures("Torn files: rows.bin", "cut at every byte, then appended to", tried=len(content) + 1, lost=0)


@pytest.mark.torture
def test_telemetry_cut_at_every_byte_keeps_its_whole_records_and_is_appended_to(copy: RunDir, figures: Note) -> None:
    content, width = copy.telemetry.read_bytes(), telemetry.RECORD.itemsize
    records = np.frombuffer(content, telemetry.RECORD)
    for cut in range(len(content) + 1):
        copy.telemetry.write_bytes(content[:cut])
        kept = cut // width
        assert same(metrics.map_records(copy.telemetry, telemetry.RECORD), records[:kept])
        writer = telemetry.Telemetry(copy.telemetry, None, None, every_s=60.0)
        writer.start()
        writer.stop()
        found = metrics.map_records(copy.telemetry, telemetry.RECORD)
        assert same(found[:kept], records[:kept]) and len(found) == kept + 2
    figures("Torn files: telemetry.bin", "cut at every byte, then appended to", tried=len(content) + 1, lost=0)


@pytest.mark.torture
def test_events_cut_at_every_byte_keep_their_whole_lines_and_are_appended_to(copy: RunDir, figures: Note) -> None:
    content = copy.events.read_bytes()
    events = all_events(copy.events)
    assert len(events) > 15
    for cut in range(len(content) + 1):
        copy.events.write_bytes(content[:cut])
        kept = content[:cut].count(b"\n")
        assert read_events(copy.events)[0] == events[:kept]
        log = EventLog(copy.events)
        number = log.append("log", text="on")
        log.close()
        found = read_events(copy.events)[0]
        assert found[:kept] == events[:kept] and len(found) == kept + 1 and found[-1]["n"] == number == kept + 1
        if cut % 50 == 0:
            assert status(copy).state in ("queued", "interrupted", "stopped")
    figures("Torn files: events.jsonl", "cut at every byte, then appended to", tried=len(content) + 1, lost=0)


Harm = Callable[[bytes, random.Random], bytes]


def zero_tail(content: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(content))
    return content[:at] + bytes(len(content) - at)


def zero_middle(content: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(content))
    end = draw.randrange(at, len(content))
    return content[:at] + bytes(end - at) + content[end:]


def torn_middle(content: bytes, draw: random.Random) -> bytes:
    lines = content.splitlines(keepends=True)
    at = draw.randrange(len(lines))
    lines[at] = lines[at][: draw.randrange(len(lines[at]))]  # the next line goes on in the same one
    return b"".join(lines)


def nul_line(content: bytes, draw: random.Random) -> bytes:
    return content + bytes(draw.randrange(1, 5000)) + (b"\n" if draw.random() < 0.5 else b"")


@pytest.mark.parametrize("harm", [zero_tail, zero_middle, torn_middle, nul_line], ids=lambda harm: harm.__name__)
def test_events_zeroed_or_torn_anywhere_are_read_around_and_no_number_comes_twice(copy: RunDir, harm: Harm) -> None:
    content, draw = copy.events.read_bytes(), random.Random(7)
    before = {event["n"]: event for event in all_events(copy.events)}
    for _ in range(300):
        copy.events.write_bytes(harm(content, draw))
        status(copy)
        for _life in range(2):
            log = EventLog(copy.events)
            log.append("resumed", owner="me")
            log.append("log", text="on")
            log.close()
        found = all_events(copy.events)
        numbers = [event["n"] for event in found]
        assert numbers == sorted(set(numbers)), numbers
        assert [event["kind"] for event in found[-4:]] == ["resumed", "log"] * 2
        assert all(event == before[event["n"]] for event in found[:-4]), "an event that is read is as it was written"
        assert status(copy).state == "interrupted"


@pytest.mark.parametrize("harm", [zero_tail, zero_middle], ids=lambda harm: harm.__name__)
def test_records_zeroed_anywhere_never_draw_a_step_zero(copy: RunDir, harm: Harm) -> None:
    content, draw = copy.metrics.read_bytes(), random.Random(8)
    width = metrics.RECORD.itemsize
    for _ in range(200):
        # power loss zeroes pages, which begin anywhere in a record; what begins with a step is read as one
        copy.metrics.write_bytes(harm(content, draw))
        steps = read_metrics(copy.metrics)["step"].tolist()
        assert set(steps) <= {1, 2, 3} and steps == sorted(steps)
        now = status(copy)
        assert now.current_step in (0, 1, 2, 3)
        writer = MetricsWriter(copy.metrics, copy.rows)
        writer.step(values(4), [])
        writer.close()
        assert copy.metrics.stat().st_size % width == 0
        assert read_metrics(copy.metrics)["step"].tolist() == [*steps, 4] and status(copy).current_step == 4


def test_a_piece_that_could_not_be_cut_off_costs_no_later_event(copy: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    log, before = EventLog(copy.events), len(all_events(copy.events))

    def half_and_no_cut(fd: int, content: bytes) -> None:
        os.write(fd, content[: len(content) // 2])
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("trainer.events.write_whole", half_and_no_cut)
        assert log.append("log", text="lost") == 0
    log.append("log", text="kept")
    log.append("log", text="too")
    log.close()
    assert [event["text"] for event in all_events(copy.events)[before:]] == ["kept", "too"]


@pytest.mark.torture
@pytest.mark.parametrize("seed", range(3))
def test_a_run_whose_files_are_all_torn_or_zeroed_is_resumed_to_its_end(
    whole: tuple[Workspace, RunDir], tmp_path: Path, seed: int, figures: Note
) -> None:
    workspace, original = whole
    unbroken = RunDir(tmp_path / "unbroken")
    shutil.copytree(original.path, unbroken.path)
    assert runs.train(unbroken, workspace, WorkerHere()) == "finished"  # type: ignore[arg-type]
    torn, draw = RunDir(tmp_path / "run"), random.Random(seed)
    shutil.copytree(original.path, torn.path)
    for path in (torn.metrics, torn.rows, torn.telemetry, torn.events):
        content = path.read_bytes()
        cut = content[: draw.randrange(len(content))]
        path.write_bytes(cut if draw.random() < 0.5 else zero_tail(content, draw))
    assert runs.train(torn, workspace, WorkerHere()) == "finished"  # type: ignore[arg-type]
    now = status(torn)
    assert now.state == "finished" and now.current_step == STEPS
    saved = checkpoint.newest_verified(original.checkpoints).step

    def later(run: RunDir) -> list[tuple[float, float]]:
        return [(float(r["step"]), float(r["loss"])) for r in read_metrics(run.metrics) if r["step"] > saved]

    assert later(torn) == later(unbroken) and len(later(torn)) == STEPS - saved
    figures(
        "Torn files: all of a run", "cut or zeroed, then resumed to its end", tried=1, failed_resumes=0, differences=0
    )
