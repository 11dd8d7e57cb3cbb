"""Jobs: what any tab can read about them while they run, after they end, and after the server died."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from trainer.files import write_json
from trainer.jobs import JobHandle, Jobs
from trainer.refusal import Refusal
from trainer.worker import WorkerDied


def ended(jobs: Jobs, job_id: str) -> dict[str, Any]:
    deadline = time.monotonic() + 10
    while (record := jobs.read(job_id))["state"] == "running":
        assert time.monotonic() < deadline, record
        time.sleep(0.01)
    return record


def test_a_job_runs_beside_us_and_its_result_is_kept(tmp_path: Path) -> None:
    jobs, gate = Jobs(tmp_path / "jobs"), threading.Event()

    def work(handle: JobHandle) -> dict[str, Any]:
        handle.progress(3, 10, "three of ten")
        gate.wait(10)
        return {"rows": 10}

    job_id = jobs.start("check", work)
    other_tab = Jobs(tmp_path / "jobs")
    time.sleep(0.05)
    assert other_tab.read(job_id)["state"] == "running"
    gate.set()
    record = ended(other_tab, job_id)
    assert (record["state"], record["result"], record["error"]) == ("done", {"rows": 10}, None)
    assert record["started"] <= record["ended"] <= record["updated"] <= time.time()
    assert (tmp_path / "jobs").stat().st_mode & 0o077 == 0


def test_progress_is_seen_while_it_runs_and_written_at_most_twice_a_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes: list[Any] = []

    def counted(path: Path, value: Any) -> None:
        writes.append(value["progress"])
        write_json(path, value)

    monkeypatch.setattr("trainer.jobs.write_json", counted)
    jobs, gate = Jobs(tmp_path), threading.Event()

    def work(handle: JobHandle) -> None:
        stop = time.monotonic() + 1.2
        done = 0
        while time.monotonic() < stop:
            done += 1
            handle.progress(done, 10**9)
            time.sleep(0.002)
        gate.wait(10)

    job_id = jobs.start("check", work)
    time.sleep(0.9)
    seen = jobs.read(job_id)["progress"]
    assert seen is not None and seen[0] > 1 and seen[1] == 10**9
    gate.set()
    ended(jobs, job_id)
    assert 3 <= len(writes) <= 5, writes


def test_a_refusal_is_the_sentence_and_a_crash_keeps_its_text(tmp_path: Path) -> None:
    jobs = Jobs(tmp_path)

    def refuse(handle: JobHandle) -> None:
        raise Refusal("There is no model folder x.", "model_path")

    def crash(handle: JobHandle) -> None:
        raise ZeroDivisionError("hidden words")

    def died(handle: JobHandle) -> None:
        raise WorkerDied("Checking the data ended unexpectedly.", "the last words")

    refused = ended(jobs, jobs.start("a", refuse))
    assert (refused["state"], refused["error"], refused["field"]) == (
        "failed", "There is no model folder x.", "model_path",
    )  # fmt: skip
    crashed = ended(jobs, jobs.start("a", crash))
    assert crashed["state"] == "failed" and "ZeroDivisionError" in crashed["error"]
    assert "hidden words" not in crashed["error"] and "hidden words" in crashed["detail"]
    assert ended(jobs, jobs.start("a", died))["detail"] == "the last words"


def test_a_result_that_is_no_json_is_a_failure_and_not_a_lost_job(tmp_path: Path) -> None:
    jobs = Jobs(tmp_path)
    for result in (float("nan"), {1, 2}):
        record = ended(jobs, jobs.start("a", lambda handle, result=result: result))
        assert record["state"] == "failed" and record["result"] is None and record["detail"]


def test_cancelling_reaches_the_work_from_anywhere(tmp_path: Path) -> None:
    jobs = Jobs(tmp_path)

    def work(handle: JobHandle) -> None:
        while not handle.cancelled():
            time.sleep(0.01)
        raise Refusal("Tokenising was cancelled.")

    job_id = jobs.start("a", work)
    Jobs(tmp_path).cancel(job_id)
    assert ended(jobs, job_id)["state"] == "cancelled"
    jobs.cancel(job_id)
    assert jobs.read(job_id)["state"] == "cancelled"


def test_a_job_of_a_killed_server_reads_as_interrupted(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from trainer.jobs import Jobs\n"
        "print(Jobs(Path(sys.argv[1])).start('check', lambda handle: time.sleep(60)), flush=True); time.sleep(60)"
    )
    server = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    job_id = server.stdout.readline().strip()
    assert Jobs(tmp_path).read(job_id)["state"] == "running"
    os.kill(server.pid, signal.SIGKILL)
    server.wait()
    record = Jobs(tmp_path).read(job_id)
    assert record["state"] == "interrupted" and "Start it again" in record["error"]
    assert json.loads((tmp_path / job_id / "job.json").read_text())["state"] == "running"
    Jobs(tmp_path).cancel(job_id)
    assert not (tmp_path / job_id / "cancel").exists()


def test_recent_jobs_are_listed_newest_first_and_by_kind(tmp_path: Path) -> None:
    jobs = Jobs(tmp_path / "jobs")
    assert jobs.recent() == []
    started = [jobs.start(kind, lambda handle: None) for kind in ("a", "b", "a")]
    for job_id in started:
        ended(jobs, job_id)
    (tmp_path / "jobs" / "not a job").mkdir()
    assert {job["id"] for job in jobs.recent()} == set(started)
    assert [job["kind"] for job in jobs.recent("a")] == ["a", "a"]
    assert [job["id"] for job in jobs.recent()] == sorted(started, reverse=True)


@pytest.mark.parametrize("name", ["../secret", "", "a/b", "..", "20250101-000000-ffffffff"])
def test_a_name_that_is_no_job_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "job.json").write_text('{"state": "done"}')
    (tmp_path / "jobs").mkdir()
    with pytest.raises(Refusal):
        Jobs(tmp_path / "jobs").read(name)
