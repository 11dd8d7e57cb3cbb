"""The command line as scripts use it: real processes, their log, their exit status, and one line for every refusal."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import runs
from tests.tiny import tiny_model_dir
from trainer.cli import main

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, a dataset and a config.json that names both."""
    root = tmp_path_factory.mktemp("cli")
    model, data = tiny_model_dir(root / "model"), runs.write_rows(root / "rows.jsonl")
    config = {
        "model_display_name": "Tiny",
        "model_path": model.name,
        "profile": {"name": "emoji_think"},
        "data": {"dataset_path": data.name},
        "hyperparams": {
            "method": "full",
            "batch_size": 2,
            "gradient_accumulation": 2,
            "max_length": 256,
            "use_gradient_checkpointing": True,
        },
    }
    (root / "config.json").write_text(json.dumps(config))
    return root


def trainer(place: Path, *arguments: str, **changes) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "XDG_RUNTIME_DIR": str(place)}
    return subprocess.run(
        [sys.executable, "-m", "trainer", *arguments],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
        **changes,
    )


def test_a_healthy_run_logs_what_scripts_look_for_and_no_word_of_trouble(place):
    done = trainer(place, "train", "--config", "config.json", "--max-steps", "10", "--skip-eval", "--output", "out")
    assert done.returncode == 0, done.stderr
    log = done.stdout + done.stderr
    assert "Using profile system prompt: Current date: 20" in log and "{date}" not in log
    assert "Gradient checkpointing enabled" in log
    assert "Flash Attention: " in log
    for word in ("error", "failed", "exception", "traceback", "warning"):
        assert word not in log.lower(), log
    now = json.loads(trainer(place, "status", "out", "--json").stdout)
    assert (now["state"], now["current_step"], now["total_steps"]) == ("finished", 10, 10)
    assert now["model_display_name"] == "Tiny" and now["current_file"] == "rows.jsonl" and now["loss"] > 0
    assert "finished: step 10/10" in trainer(place, "status", "out").stdout


def test_metrics_come_as_json_csv_and_text_one_row_a_step(place):
    if not (place / "out").exists():
        trainer(place, "train", "--max-steps", "10", "--skip-eval", "--output", "out")
    rows = json.loads(trainer(place, "metrics", "out", "--json").stdout)
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert {"loss", "grad_norm", "learning_rate", "labels", "tokens", "seconds", "memory_gib"} <= set(rows[0])
    lines = trainer(place, "metrics", "out", "--csv").stdout.splitlines()
    assert len(lines) == 11 and float(lines[1].split(",")[1]) == rows[0]["loss"]


def test_smoke_answers_in_json_and_its_exit_status_is_the_verdict(place):
    done = trainer(place, "smoke", "--json")
    assert done.returncode == 0, done.stderr + done.stdout
    report = json.loads(done.stdout)
    assert report["failed"] == 0 and report["passed"] >= 10
    bad = trainer(place, "smoke", "--json", "--set", "hyperparams.learning_rate=0")
    assert bad.returncode == 1 and json.loads(bad.stdout)["failed"] == 1


def test_inspect_shows_the_first_batch_with_the_labels_marked(place):
    done = trainer(place, "inspect")
    assert done.returncode == 0, done.stderr
    assert "[Together]" in done.stdout or "Together" in done.stdout.replace("[", "").replace("]", "")
    assert "First micro-batch: 2 rows" in done.stdout


def test_check_data_names_the_line_and_exits_1(place):
    bad = place / "bad.jsonl"
    bad.write_text(
        (place / "rows.jsonl").read_text() + '{"messages": [{"role": "user", "content": "only a question"}]}\n'
    )
    done = trainer(place, "check-data", str(bad), "--json")
    report = json.loads(done.stdout)
    assert done.returncode == 1 and report["valid"] is False
    assert report["problems"][0]["line"] == 61 and report["rows"] == 61
    assert trainer(place, "check-data", "rows.jsonl").returncode == 0


def test_stop_from_another_process_saves_and_resume_finishes_the_run(place):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "XDG_RUNTIME_DIR": str(place)}
    process = subprocess.Popen(
        [sys.executable, "-m", "trainer", "train", "--output", "long", "--max-steps", "100000", "--skip-eval"],
        cwd=place,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )

    def state() -> dict:
        done = trainer(place, "status", "long", "--json")
        return json.loads(done.stdout) if done.returncode == 0 else {"state": "none", "current_step": 0}

    try:
        runs.wait_for(lambda: (place / "long" / "metrics.bin").exists() and state()["current_step"] > 2, 90)
        second = trainer(place, "train", "--max-steps", "1")
        assert second.returncode == 2 and "has the device since" in second.stderr and second.stderr.count("\n") == 1
        assert trainer(place, "stop", "long").returncode == 0
        assert process.wait(30) == 0
    finally:
        if process.poll() is None:
            process.kill()
    stopped = state()
    assert stopped["state"] == "stopped" and stopped["last_checkpoint_step"] == stopped["current_step"]
    again = trainer(place, "stop", "long")
    assert again.returncode == 2 and "stopped" in again.stderr


def test_sigterm_saves_at_the_step_and_exits_in_under_ten_seconds(place):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "XDG_RUNTIME_DIR": str(place)}
    process = subprocess.Popen(
        [sys.executable, "-m", "trainer", "train", "--output", "term", "--max-steps", "100000", "--skip-eval"],
        cwd=place,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    metrics = place / "term" / "metrics.bin"
    runs.wait_for(lambda: metrics.exists() and metrics.stat().st_size > 1000, 90)
    started = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(15) == 0 and time.monotonic() - started < 10
    assert list((place / "term" / "checkpoints").glob("step_*/MANIFEST.json"))


REFUSALS = {
    "missing config": (["train", "--config", "nowhere.json"], "nowhere.json"),
    "config that is not JSON": (["train", "--config", "rows.jsonl"], "rows.jsonl"),
    "unknown profile": (["train", "--profile", "nobody"], "Available: plain, emoji_think, regime3"),
    "dataset that is not there": (["train", "--dataset", "gone.jsonl"], "gone.jsonl"),
    "dataset that is a folder": (["train", "--dataset", "model"], "no file"),
    "model that is not there": (["train", "--model", "gone"], "gone"),
    "non-empty output": (["train", "--output", "model"], "not empty"),
    "value out of bounds": (["train", "--set", "hyperparams.learning_rate=5"], "Allowed"),
    "unknown setting": (["train", "--set", "hyperparams.learning_rat=1"], "learning_rate"),
    "workspace that cannot be written": (["train", "--workspace", "rows.jsonl/ws"], "rows.jsonl"),
    "a folder that is no run": (["status", "model"], "not a run"),
    "smoke without a model": (["smoke", "--model", "gone"], "gone"),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_a_refusal_is_one_line_exit_2_and_nothing_half_written(place, what, monkeypatch, capfd):
    arguments, word = REFUSALS[what]
    monkeypatch.chdir(place)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(place))
    before = {str(path) for path in place.rglob("*")}
    assert main(arguments) == 2
    told = capfd.readouterr().err
    assert told.count("\n") == 1 and word in told and "Traceback" not in told
    new = {str(path.relative_to(place)) for path in place.rglob("*") if str(path) not in before}
    assert not [name for name in new if not name.startswith(("workspace", "signalbox-"))]
    assert not [name for name in new if "runs/" in name]
