"""The command line of the page: refusals before anything starts, one server for a workspace, ends and restarts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

import app as app_module
from tests.conftest import ROOT, RunningApp, end_app, free_port, start_app
from trainer.checkpoint import newest_verified
from trainer.locks import holder, is_held
from trainer.run import RunDir
from trainer.run import status as run_status


def run_app(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """`python app.py` to its end."""
    command = [sys.executable, str(ROOT / "app.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=cwd, stdin=subprocess.DEVNULL)


def wait_until(true: Callable[[], Any], what: str, timeout_s: float = 60) -> None:
    """Wait for something of another process."""
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, f"not within {timeout_s:.0f} s: {what}"
        time.sleep(0.05)


def test_every_refusal_is_one_line_with_exit_2_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "a-file").write_text("")
    with __import__("socket").create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        cases = {
            ("--config", str(tmp_path / "none.json")): "no config file",
            ("--config", str(tmp_path / "broken.json")): "Cannot read the config file",
            ("--config", str(tmp_path / "list.json")): "must be a JSON object",
            ("--workspace", str(tmp_path / "a-file")): "Cannot write to the workspace",
            ("--model-root", str(tmp_path / "none")): "There is no folder",
            ("--data-root", str(tmp_path / "none")): "There is no folder",
            ("--share",): "not in this version",
            ("--host", "0.0.0.0"): "ssh -L",
            ("--host", "192.168.1.7"): "no logins",
            ("--port", "99999"): "not a port",
            ("--port", "http"): "not a port",
            ("--no-such-option",): "unrecognized",
            ("start",): "invalid choice",
            ("--port", port): f"Port {port} is in use by ",
        }
        for arguments, words in cases.items():
            more = () if "--workspace" in arguments else ("--workspace", str(tmp_path / "w"))
            done = run_app(*arguments, *more, "--no-browser")
            assert done.returncode == 2, arguments
            assert words in done.stderr, (arguments, done.stderr)
            assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr, done.stderr
            assert done.stdout == ""


def test_a_port_in_use_is_said_with_the_program_that_has_it(tmp_path: Path) -> None:
    code = "import socket,time; s=socket.create_server(('127.0.0.1',0)); print(s.getsockname()[1], flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        port = other.stdout.readline().strip()
        done = run_app("--port", port, "--workspace", str(tmp_path / "w"))
        other.kill()
    assert f"(process {other.pid})" in done.stderr and "--port" in done.stderr


def test_a_workspace_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    if os.geteuid() == 0:  # root may write anywhere: a place where even root may not
        refused = run_app("--workspace", "/proc/signalbox")
    else:
        (tmp_path / "closed").mkdir(mode=0o500)
        refused = run_app("--workspace", str(tmp_path / "closed"))
    assert refused.returncode == 2 and "Choose another with --workspace" in refused.stderr


def test_stop_without_a_server_says_so_and_is_no_fault(tmp_path: Path) -> None:
    done = run_app("stop", "--workspace", str(tmp_path))
    assert done.returncode == 0 and "is not open" in done.stdout


def test_a_second_server_of_a_workspace_is_refused_and_told_where_the_first_is(app: RunningApp) -> None:
    for more in ((), ("--foreground",), ("--detach",)):
        done = run_app("--workspace", str(app.workspace), "--port", str(free_port()), "--no-browser", *more)
        assert done.returncode == 2 and app.url in done.stderr


def test_the_note_in_the_lock_names_the_process(app: RunningApp) -> None:
    note = holder(app.workspace / "server.lock")
    assert note is not None and note["pid"] == app.process.pid and note["url"] == app.url


def test_a_supervised_server_survives_a_restart_and_a_crash_and_ends_on_sigterm(tmp_path: Path) -> None:
    running = start_app(tmp_path / "w")
    lock = running.workspace / "server.lock"

    def pid() -> int | None:
        return (holder(lock) or {}).get("pid")

    def answers() -> bool:
        try:
            return bool(running.get("api/health")["ok"])
        except OSError:
            return False

    first = pid()
    assert first not in (None, running.process.pid)
    request = urllib.request.Request(f"{running.url}/api/restart", b"", method="POST")
    urllib.request.urlopen(request, timeout=10).close()
    wait_until(lambda: pid() not in (None, first) and answers(), "a fresh process after exit code 75")
    second = pid()
    assert second is not None
    os.kill(second, signal.SIGSEGV)
    wait_until(lambda: pid() not in (None, second) and answers(), "a fresh process after a crash")
    third = pid()
    said = end_app(running)
    assert running.process.returncode == 0
    assert not is_held(lock) and third is not None and not psutil.pid_exists(third)
    assert "was ended by SIGSEGV" in said
    assert "Fatal Python error: Segmentation fault" in (running.workspace / "crash.log").read_text()


@pytest.mark.slow
def test_a_sigterm_in_the_middle_of_a_run_ends_it_at_a_step_and_saves_it(tmp_path: Path) -> None:
    running = start_app(tmp_path / "w", "--foreground")
    urllib.request.urlopen(
        urllib.request.Request(f"{running.url}/api/train/try", b"{}", {"content-type": "application/json"}), timeout=20
    ).close()

    def steps() -> int:
        run = running.get("api/state")["run"]
        return run["step"] if run and run["state"] == "running" else 0

    wait_until(lambda: steps() >= 3, "a run that makes steps", timeout_s=180)
    began = time.monotonic()
    said = end_app(running)
    assert running.process.returncode == 0 and time.monotonic() - began < app_module.SAVE_S + 10
    assert "the run ends its step and is saved" in said
    run = RunDir(next((tmp_path / "w" / "runs").iterdir()))
    now = run_status(run)
    assert now.state == "stopped" and now.current_step >= 3
    assert newest_verified(run.checkpoints).step == now.current_step, "what was trained last is what was saved"


def test_detached_it_answers_goes_on_without_its_terminal_and_is_ended_by_stop(tmp_path: Path) -> None:
    port = str(free_port())
    began = time.monotonic()
    done = run_app("--detach", "--port", port, "--workspace", "w", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"Signalbox is open on http://127.0.0.1:{port}" in done.stdout
    assert urllib.request.urlopen(f"http://127.0.0.1:{port}/api/health", timeout=10).status == 200
    note = holder(tmp_path / "w" / "server.lock")
    supervisor = holder(tmp_path / "w" / "supervisor.lock")
    assert note is not None and supervisor is not None
    assert os.getsid(note["pid"]) == os.getsid(supervisor["pid"]) != os.getsid(0)
    assert time.monotonic() - began < 60
    stopped = run_app("stop", "--workspace", "w", cwd=tmp_path)
    assert stopped.returncode == 0 and "Stopped." in stopped.stdout
    assert not psutil.pid_exists(note["pid"]) or psutil.Process(note["pid"]).status() == psutil.STATUS_ZOMBIE
    assert not is_held(tmp_path / "w" / "server.lock") and not is_held(tmp_path / "w" / "supervisor.lock")
    assert "Signalbox is open" in (tmp_path / "w" / "server.log").read_text()


def test_a_server_that_crashes_again_and_again_is_given_up_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The real supervisor with a server that only counts its starts and dies of a real signal."""
    code = "import os, pathlib\np = pathlib.Path(__file__).with_name('starts')\n"
    code += "p.write_text((p.read_text() if p.exists() else '') + '.')\nos.kill(os.getpid(), 11)\n"
    (tmp_path / "app.py").write_text(code)
    before = {number: signal.getsignal(number) for number in app_module.SIGNALS}
    monkeypatch.setattr(app_module, "HERE", tmp_path)
    monkeypatch.setattr(app_module, "BACK_OFF_S", 0.01)
    args = app_module.parser().parse_args(["--workspace", str(tmp_path), "--no-browser"])
    try:
        assert app_module.supervise(app_module.options_of(args)) == 1
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert (tmp_path / "starts").read_text() == "." * (app_module.RESTARTS + 1)
    assert "it stays ended" in capsys.readouterr().err


@pytest.mark.parametrize("code", [0, 2, 3])
def test_a_server_that_ends_of_itself_is_not_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    (tmp_path / "app.py").write_text(f"raise SystemExit({code})")
    before = {number: signal.getsignal(number) for number in app_module.SIGNALS}
    monkeypatch.setattr(app_module, "HERE", tmp_path)
    args = app_module.parser().parse_args(["--workspace", str(tmp_path), "--no-browser"])
    try:
        assert app_module.supervise(app_module.options_of(args)) == code
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_the_second_ctrl_c_ends_the_server_at_once() -> None:
    code = (
        "import threading, time\nfrom ui.process import _listen_to_signals\nstop = threading.Event()\n"
        "_listen_to_signals(stop)\nprint('ready', flush=True)\nstop.wait()\nprint('saving', flush=True)\ntime.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "saving\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=5) == 130


def test_paths_are_taken_from_where_the_command_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = app_module.options_of(app_module.parser().parse_args(["--config", "a.json", "--model-root", "m"]))
    assert options.config == tmp_path / "a.json"
    assert options.workspace == tmp_path / "workspace"
    assert options.model_roots == (tmp_path / "m",)


def test_a_child_gets_the_same_options_again() -> None:
    words = [
        "--config",
        "/c.json",
        "--workspace",
        "/w",
        "--model-root",
        "/m",
        "--model-root",
        "/n",
        "--data-root",
        "/d",
    ]
    words += ["--host", "::1", "--port", "7000", "--public-host", "a.example", "--root-path", "box/"]
    options = app_module.options_of(app_module.parser().parse_args(words))
    again = app_module.options_of(app_module.parser().parse_args(options.arguments(browser=True)))
    assert again == options
    assert options.url == "http://[::1]:7000/box/"


def test_the_shipped_config_is_the_starting_point() -> None:
    options = app_module.options_of(app_module.parser().parse_args([]))
    assert options.config == ROOT / "config.json"
    assert isinstance(json.loads(options.config.read_text()), dict)
