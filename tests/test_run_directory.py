"""events.jsonl, metrics.bin, rows.bin, control/ and the status derived from them; torn tails, lost locks, NaN."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer import control, lease, locks
from trainer.events import EventLog, read_events, wire
from trainer.metrics import COLUMNS, RECORD, MetricsWriter, read_metrics, read_records, read_rows, thin
from trainer.refusal import Refusal
from trainer.run import StatusReader, create_run, status
from trainer.states import LIVE_STATES, allowed, derive

NOW = time.time() + 1000


def values(step: int, loss: float) -> dict[str, float]:
    return {
        **dict.fromkeys(COLUMNS, 0.0),
        "step": step,
        "loss": loss,
        "t": NOW + 0.5 * step,
        "tokens": 10.0,
        "seconds": 0.5,
    }


@pytest.fixture
def run(tmp_path):
    return create_run(tmp_path, {"config": {"model_path": "m"}, "model": {"display_name": "M"}}, notes={"name": "n"})


def test_events_are_numbered_and_read_from_a_cursor(tmp_path):
    log = EventLog(tmp_path / "e")
    assert [log.append("log", text=str(i)) for i in range(3)] == [1, 2, 3]
    first, cursor = read_events(tmp_path / "e")
    assert [event["text"] for event in first] == ["0", "1", "2"]
    log.append("eval", loss=float("nan"))
    more, _ = read_events(tmp_path / "e", cursor)
    assert [event["loss"] for event in more] == ["nan"]


def test_an_events_file_torn_at_every_byte_is_read_up_to_the_tear_and_goes_on(tmp_path):
    path = tmp_path / "e"
    log = EventLog(path)
    for i in range(4):
        log.append("log", text="é" * i)
    log.close()
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        kept = whole[:cut].count(b"\n")
        assert len(read_events(path)[0]) == kept
        log = EventLog(path)
        assert log.append("log", text="on") == kept + 1
        log.close()
        assert [event["n"] for event in read_events(path)[0]] == list(range(1, kept + 2))


def test_metrics_torn_at_every_byte_keep_their_whole_records(run):
    writer = MetricsWriter(run.metrics, run.rows)
    for step in range(1, 4):
        writer.step(values(step, step / 10), [(step, 1.5, 2)])
    writer.close()
    whole = run.metrics.read_bytes()
    for cut in range(len(whole) + 1):
        run.metrics.write_bytes(whole[:cut])
        assert len(read_records(run.metrics)) == cut // RECORD.itemsize
        writer = MetricsWriter(run.metrics, run.rows)
        writer.step(values(9, 0.9), [])
        writer.close()
        assert read_records(run.metrics)[-1]["step"] == 9


def test_a_step_trained_again_after_a_resume_replaces_the_earlier_record_and_its_rows(run):
    writer = MetricsWriter(run.metrics, run.rows, life=1)
    for step in range(1, 7):
        writer.step(values(step, 1.0), [(100 + step, 1.0, 1), (200 + step, 1.0, 1)])
    writer.close()
    writer = MetricsWriter(run.metrics, run.rows, life=2)
    for step in range(4, 6):
        writer.step(values(step, 2.0), [(300 + step, 2.0, 3)])
    writer.close()
    curve = read_metrics(run.metrics)
    assert curve["step"].tolist() == [1, 2, 3, 4, 5]
    assert curve["loss"].tolist() == [1, 1, 1, 2, 2]
    assert read_rows(run.rows, 4) == [(304, 2.0, 3)]
    assert read_rows(run.rows, 3) == [(103, 1.0, 1), (203, 1.0, 1)]
    assert read_rows(run.rows, 77) == []


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=3000), st.integers(4, 200))
@settings(max_examples=100, deadline=None)
def test_thinning_keeps_the_extremes_and_the_limit(y, limit):
    y = np.array(y)
    x = np.arange(len(y))
    tx, ty = thin(x, y, limit)
    assert len(ty) <= max(limit + 2, 4)
    assert ty.min() == y.min() and ty.max() == y.max()
    assert (np.diff(tx) > 0).all()


def test_thinning_keeps_a_nan_and_stays_where_it_was_as_points_arrive():
    y = np.random.default_rng(0).normal(size=100_000)
    y[54_321] = np.nan
    tx, ty = thin(np.arange(len(y)), y, 2000)
    assert np.isnan(ty).sum() == 1 and 54_321 in tx
    longer, _ = thin(np.arange(100_001), np.append(y, 0.0), 2000)
    assert len(set(tx) - set(longer)) <= 2


def test_the_state_follows_from_the_lock_and_the_last_event():
    assert derive(True, "started") == "preparing"
    assert derive(True, "running") == "running"
    assert derive(False, "running") == "interrupted"
    assert derive(False, "stopping") == "interrupted"
    assert derive(True, "finished") == "finished"
    assert derive(False, None) == "queued"
    assert "stop" in allowed("running") and "stop" not in allowed("stopped")
    assert {"running", "preparing", "pausing", "stopping"} == LIVE_STATES


def test_the_status_is_derived_and_a_cut_off_run_reads_as_interrupted(run):
    lock = locks.FileLock(run.lock)
    assert lock.acquire({"pid": 1})
    log = EventLog(run.events)
    log.append("started", owner="me")
    log.append("plan", total_steps=40, steps_per_epoch=20)
    reader = StatusReader(run)
    assert reader.read().state == "preparing"
    log.append("running", step=0)
    writer = MetricsWriter(run.metrics, run.rows)
    for step in range(1, 31):
        writer.step(values(step, float("nan") if step == 30 else 1.0), [])
    log.append("eval", step=20, loss=1.25, best=True)
    now = reader.read()
    assert (now.state, now.current_step, now.total_steps, now.best_held_out) == ("running", 30, 40, 1.25)
    assert now.eta_s == pytest.approx(5.0) and now.epoch == pytest.approx(1.5)
    assert now.loss is not None and math.isnan(now.loss)
    assert wire(now.as_json())["loss"] == "nan"
    lock.release()
    assert reader.read().state == "interrupted"
    assert status(run).eta_s is None
    log.append("failed", cause="because", step=30)
    assert (status(run).state, status(run).cause) == ("failed", "because")


def test_a_reader_and_a_fresh_read_agree_after_any_sequence_of_events(run):
    log, reader = EventLog(run.events), StatusReader(run)
    for kind in ("started", "running", "paused", "resumed", "running", "rewind", "stopping", "stopped"):
        log.append(kind)
        assert reader.read() == status(run)
    assert status(run).gen == 3


def test_commands_are_taken_oldest_first_once_and_rubbish_is_swept(run):
    control.drop(run.control, "pause", "a")
    control.drop(run.control, "stop", "b", now=False)
    (run.control / "zzz.json").write_text("{not json")
    assert [order.command for order in control.take(run.control)] == ["pause", "stop"]
    assert control.take(run.control) == [] and not list(run.control.iterdir())
    with pytest.raises(Refusal):
        control.drop(run.control, "explode")


def test_a_lock_is_exclusive_between_handles_and_dies_with_its_process(tmp_path):
    path = tmp_path / "lock"
    first, second = locks.FileLock(path), locks.FileLock(path)
    assert first.acquire({"owner": "me"}) and not second.acquire({}, retry_s=0.05)
    assert locks.is_held(path) and locks.holder(path) == {"owner": "me"}
    first.release()
    assert not locks.is_held(path) and locks.holder(path) is None
    code = (
        "import os, signal; from pathlib import Path; from trainer.locks import FileLock\n"
        f"assert FileLock(Path({str(path)!r})).acquire({{}})\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    assert second.acquire({}, retry_s=0.05)


def test_the_device_lease_names_its_holder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    lock = lease.acquire("cpu", kind="train", owner="lab-2", run_id="r", name="support-chats")
    with pytest.raises(lease.Busy, match="support-chats.*lab-2"):
        lease.acquire("cpu", kind="smoke", owner="x", run_id="", name="")
    lock.release()
    lease.acquire("cpu", kind="smoke", owner="x", run_id="", name="").release()


def test_a_folder_with_something_in_it_is_refused_and_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(Refusal, match="not empty"):
        create_run(tmp_path, {}, output=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_the_snapshot_is_readable_json_with_the_run_id(run):
    content = json.loads(run.config.read_text())
    assert content["run_id"] == run.run_id and run.read_notes() == {"name": "n"}
