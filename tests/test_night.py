"""A night of a real server: its terminal closes, its CUDA context breaks, it is killed; and signals in every phase."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import ROOT, free_port
from tests.runs import wait_for
from trainer.checkpoint import newest_verified
from trainer.events import all_events
from trainer.locks import holder, is_held
from trainer.run import RunDir, status
from trainer.signals import GIVE_UP_S

EXIT_S = 10.0


def in_a_terminal(command: list[str], cwd: Path) -> tuple[int, str]:
    """Run `command` in a session with a terminal of its own, then close that terminal; its exit code and its words."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(cwd)
        os.execv(command[0], command)
    said = b""
    with contextlib.suppress(OSError):  # EIO: nobody has the other end open any more
        while piece := os.read(terminal, 4096):
            said += piece
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said.decode()


def post(url: str, body: Any) -> int:
    """The status of a POST."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    try:
        return urllib.request.urlopen(request, timeout=10).status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


@pytest.mark.slow
def test_a_night_without_a_terminal_with_a_broken_gpu_and_a_kill(
    tmp_path: Path, tiny_model: Path, tiny_dataset: Path
) -> None:
    (tmp_path / "app.py").symlink_to(ROOT / "tests" / "night_app.py")
    config = {
        "model_path": str(tiny_model),
        "data": {"dataset_path": str(tiny_dataset)},
        "hyperparams": {"max_steps": 50_000, "num_epochs": 1000, "batch_size": 1, "gradient_accumulation": 1},
        "output": {"save_steps": 2, "resume_interrupted": 2},
        "eval": {"eval_strategy": "no"},
    }
    (tmp_path / "mine.json").write_text(json.dumps(config))
    port = str(free_port())
    command = [sys.executable, "app.py", "--detach", "--port", port, "--workspace", "w", "--config", "mine.json"]
    code, said = in_a_terminal(command, tmp_path)
    assert code == 0 and "End it with: python app.py stop" in said, said
    try:
        _night(tmp_path / "w", f"http://127.0.0.1:{port}")
    finally:
        began = time.monotonic()
        stop = [sys.executable, "app.py", "stop", "--workspace", "w"]
        stopped = subprocess.run(stop, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        took_s = time.monotonic() - began
    assert "Stopped." in stopped.stdout and not is_held(tmp_path / "w" / "server.lock")
    run = RunDir(next((tmp_path / "w" / "runs").iterdir()))
    end = all_events(run.events)[-1]
    assert (end["kind"], end["by"]) == ("stopped", "shutdown of the server")
    assert newest_verified(run.checkpoints).step == status(run).current_step
    assert took_s < EXIT_S + 3, "and the command that asked had to start first"


def _night(workspace: Path, url: str) -> None:
    lock = workspace / "server.lock"
    wait_for(lambda: post(f"{url}/api/train/start", {}) == 200, 90)
    run = RunDir(next((workspace / "runs").iterdir()))

    def lives() -> list[dict[str, Any]]:
        return [event for event in all_events(run.events) if event["kind"] in ("started", "resumed")]

    def trains(life: int) -> bool:
        found = [event for event in all_events(run.events) if event["kind"] == "checkpoint"]
        return (
            len(lives()) == life
            and status(run).state == "running"
            and bool(found)
            and found[-1]["t"] > lives()[-1]["t"]
        )

    first = holder(lock)
    wait_for(lambda: trains(2), 120)
    failed = next(event for event in all_events(run.events) if event["kind"] == "failed")
    assert failed["restart"] is True and "illegal memory access" in failed["cause"]
    second = holder(lock)
    assert first is not None and second is not None and second["pid"] != first["pid"], "a fresh process"
    os.kill(second["pid"], signal.SIGKILL)
    wait_for(lambda: trains(3), 120)
    cut = next(event for event in all_events(run.events) if event["kind"] == "cut_off")
    assert cut["cause"].startswith("signal 9 (SIGKILL), sent from outside")
    assert [event.get("auto", False) for event in lives()] == [False, True, True]
    third = holder(lock)
    assert third is not None
    os.kill(third["pid"], signal.SIGKILL)
    wait_for(lambda: status(run).state == "interrupted" and len(_causes(run)) == 2, 90)
    assert len(lives()) == 3, "twice was allowed: the third time it waits for a person"
    assert post(f"{url}/api/runs/{run.run_id}/command", {"command": "resume"}) == 202
    wait_for(lambda: trains(4), 90)


def _causes(run: RunDir) -> list[str]:
    return [event["cause"] for event in all_events(run.events) if event["kind"] == "cut_off"]


@pytest.mark.slow
def test_a_signal_in_every_phase_ends_the_command_in_ten_seconds_and_loses_nothing(tmp_path: Path) -> None:
    """One process after the other phase by phase, told to end in the middle; what takes too long is left."""
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.night_phases", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 2, done.stderr  # the last phase is stuck for good: the process ended itself
    phases = {
        line.split()[1]: json.loads(line.split(" ", 2)[2]) for line in done.stdout.splitlines() if line[:5] == "PHASE"
    }
    assert list(phases) == ["tokenise", "load", "eval", "sample", "save", "step"]
    for phase, found in phases.items():
        assert found["seconds"] < EXIT_S, (phase, found)
        assert found["state"] == "stopped" and found["by"].startswith("shutdown of the machine"), (phase, found)
        assert found["saved"] == found["step"], (phase, found)
    assert phases["save"]["step"] > 0 and phases["step"]["step"] == 2, (
        "the step under way was dropped, that before saved"
    )
    stuck = RunDir(tmp_path / "stuck")
    now = status(stuck)
    assert now.state == "interrupted" and "was not through in time" in (now.cause or "")
    ended = all_events(stuck.events)
    asked = next(event["t"] for event in ended if event["kind"] == "log" and event["text"] == "SIGTERM")
    assert GIVE_UP_S - 1 < ended[-1]["t"] - asked < EXIT_S


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_the_command_now(tmp_path: Path, second: int) -> None:
    code = (
        "import os, time\nfrom trainer.cli import install_stop\n"
        "install_stop(lambda by: print('asked by', by, flush=True))\nprint('ready', flush=True)\n"
        "while True: time.sleep(0.1)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "asked by shutdown of the machine or service\n"
        began = time.monotonic()
        process.send_signal(second)
        assert process.wait(timeout=5) == -second and time.monotonic() - began < 2


def test_the_same_signal_twice_at_once_is_one_word_and_later_it_is_a_second() -> None:
    """A service manager tells the whole group, and the supervisor passes its own on: the save must not be lost."""
    code = (
        "import threading, time\nfrom ui.process import _listen_to_signals\nstop = threading.Event()\n"
        "_listen_to_signals(stop)\nprint('ready', flush=True)\nstop.wait()\nprint('saving', flush=True)\ntime.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "saving\n"
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert psutil.pid_exists(process.pid) and process.poll() is None
        time.sleep(1.0)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=5) == 143
