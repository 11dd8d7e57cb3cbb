"""Signalbox: start the control room. `python app.py --help` lists what can be said to it.

This file reads the arguments, checks what can be checked before anything starts, and keeps the server alive:
the server runs as a child (`--foreground`), is started again after exit code 75 or a native crash, and is
handed every signal. Nothing heavy is imported at the top: no torch, no Gradio.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any, NoReturn

from trainer.ends import CRASH_LOG, Watch, signal_name
from trainer.locks import FileLock, holder, is_held
from trainer.refusal import Refusal
from ui.process import SAVE_S, SIGNALS, Options, port_trouble, say, serve

HERE = Path(__file__).resolve().parent
RESTART_CODE = 75
RESTARTS = 5
RESTARTS_WITHIN_S = 600.0
BACK_OFF_S = 1.0
LOG_BYTES = 10_000_000


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python app.py", description="The control room for fine-tuning language models."
    )
    made.error = _refuse  # type: ignore[method-assign]  # one line, like every other refusal
    made.add_argument("command", nargs="?", choices=["stop"], help="stop: end the server of the workspace")
    made.add_argument("--config", metavar="F", help="starting values of the form (default: config.json beside app.py)")
    made.add_argument("--workspace", metavar="D", default="workspace", help="runs, data, models (default: ./workspace)")
    made.add_argument("--model-root", metavar="D", action="append", default=[], help="a further folder of models")
    made.add_argument("--data-root", metavar="D", action="append", default=[], help="a further folder of data")
    made.add_argument("--host", default="127.0.0.1", help="address to listen on; this machine's own only")
    made.add_argument("--port", type=_port, default=7860)
    made.add_argument("--share", action="store_true", help="a link for teammates (not in this version yet)")
    made.add_argument("--public-host", metavar="H", action="append", default=[], help="a reverse proxy's name for us")
    made.add_argument("--root-path", metavar="P", default="", help="the path under which a reverse proxy shows us")
    made.add_argument("--detach", action="store_true", help="go on without this terminal; ended by: app.py stop")
    made.add_argument("--foreground", action="store_true", help="no supervisor: this process is the server")
    made.add_argument("--no-browser", action="store_true", help="do not open a browser")
    return made


def _refuse(message: str) -> NoReturn:
    say(f"{message}. `python app.py --help` lists what is possible.", sys.stderr)
    sys.exit(2)


def _port(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text} is not a port; allowed are 1 to 65535")
    return int(text)


def options_of(args: argparse.Namespace) -> Options:
    """The arguments as Options."""
    return Options(
        config=Path(args.config).absolute() if args.config else HERE / "config.json",
        workspace=Path(args.workspace).absolute(),
        model_roots=tuple(Path(root).absolute() for root in args.model_root),
        data_roots=tuple(Path(root).absolute() for root in args.data_root),
        host=args.host,
        port=args.port,
        public_hosts=tuple(args.public_host),
        root_path=("/" + args.root_path.strip("/")) if args.root_path.strip("/") else "",
        browser=not args.no_browser,
    )


def check(options: Options, share: bool) -> None:
    """Find now what would make a start fail later; the first thing found is raised as Refusal."""
    tunnel = f"ssh -L {options.port}:localhost:{options.port} user@{socket.gethostname()}"
    if share:
        raise Refusal(f"Sharing by link is not in this version yet. From another computer use: {tunnel}")
    if not (options.host in ("localhost", "::1") or options.host.startswith("127.")):
        raise Refusal(
            f"--host {options.host} would let everybody who reaches it start and stop runs: this version has "
            f"no logins. Leave --host out; from another computer use: {tunnel}"
        )
    _check_config(options.config)
    for root in (*options.model_roots, *options.data_roots):
        if not root.is_dir():
            raise Refusal(f"There is no folder {root}. Name an existing one, or leave the option out.")
    _check_workspace(options)
    try:
        options.listen().close()
    except OSError as error:
        raise Refusal(port_trouble(options, error)) from None


def _check_config(path: Path) -> None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Refusal(f"There is no config file {path}. Name one with --config.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise Refusal(f"Cannot read the config file {path}: {error}") from None
    if not isinstance(found, dict):
        raise Refusal(f"The config file {path} does not hold settings: it must be a JSON object.")


def _check_workspace(options: Options) -> None:
    probe = options.workspace / f".write-{os.getpid()}"
    try:
        options.workspace.mkdir(parents=True, exist_ok=True, mode=0o700)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        reason = error.strerror or str(error)
        raise Refusal(
            f"Cannot write to the workspace {options.workspace}: {reason}. Choose another with --workspace."
        ) from None
    if is_held(options.lock):
        raise Refusal(_already_open(options))


def _already_open(options: Options) -> str:
    there = (holder(options.lock) or {}).get("url", "another address")
    return (
        f"Signalbox is already open for this workspace on {there}. Use that, end it with "
        "`python app.py stop`, or choose another --workspace."
    )


def supervise(options: Options) -> int:
    """Run the server as a child, again after exit code 75 or a native crash; returns its last exit code."""
    lock = FileLock(options.supervisor_lock)
    if not lock.acquire({"pid": os.getpid(), "url": options.url}):
        raise Refusal(_already_open(options))
    stop = threading.Event()
    child: subprocess.Popen[bytes] | None = None
    pending: list[int] = []

    def forward(number: int, frame: Any) -> None:
        stop.set()
        pending.append(number)
        if child is not None and child.poll() is None:
            child.send_signal(number)

    for number in SIGNALS:
        signal.signal(number, forward)
    starts: deque[float] = deque(maxlen=RESTARTS + 1)
    browser = options.browser
    while True:
        starts.append(time.monotonic())
        child = _start_server(options, browser)
        watch = Watch(options.workspace, child.pid)
        for number in pending:  # one that came while the child was being made
            child.send_signal(number)
        code = child.wait()
        watch.ended(code)
        crashed = code < 0 and -code not in SIGNALS
        if stop.is_set() or not (crashed or code == RESTART_CODE):
            return max(code, 0)
        if len(starts) > RESTARTS and time.monotonic() - starts[0] < RESTARTS_WITHIN_S:
            within = f"{RESTARTS_WITHIN_S / 60:.0f} min"
            say(f"The server ended {len(starts)} times in {within}: it stays ended.", sys.stderr)
            return 1
        if crashed:
            log = options.workspace / CRASH_LOG
            say(
                f"The server was ended by {signal_name(-code)}; starting it again. What it was doing: {log}", sys.stderr
            )
            stop.wait(min(BACK_OFF_S * 2 ** (len(starts) - 1), 30))
            if stop.is_set():
                return 1
        browser = False


def _start_server(options: Options, browser: bool) -> subprocess.Popen[bytes]:
    # a process group of its own: the terminal's Ctrl-C reaches it once, through us
    group: dict[str, Any] = {} if sys.platform == "win32" else {"process_group": 0}
    command = [sys.executable, str(HERE / "app.py"), "--foreground", *options.arguments(browser)]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, **group)


def detach(options: Options) -> int:
    """Start a supervisor that needs no terminal, wait until the page answers, say where it is."""
    if options.log.exists() and options.log.stat().st_size > LOG_BYTES:
        options.log.replace(options.log.with_suffix(".log.1"))
    with open(os.open(options.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as log:
        began = log.tell()
        child = subprocess.Popen(
            [sys.executable, str(HERE / "app.py"), *options.arguments(browser=False)],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and child.poll() is None:
        if _answers(options):
            say(f"Signalbox is open on {options.url}\nLog: {options.log}\nEnd it with: python app.py stop")
            return 0
        time.sleep(0.1)
    with open(options.log, "rb") as log:
        log.seek(began)
        said = log.read().decode("utf-8", "replace").strip()
    raise Refusal(f"The server did not start. It said: {said or 'nothing'}")


def _answers(options: Options) -> bool:
    from http.client import HTTPConnection, HTTPException  # only here: it costs time that a plain start does not have

    connection = HTTPConnection(options.host, options.port, timeout=2)
    try:
        connection.request("GET", f"{options.root_path}/api/health")
        return connection.getresponse().status == 200
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()


def stop_server(options: Options) -> int:
    """End the server of the workspace and wait until it is gone: it saves a live run first."""
    note = holder(options.supervisor_lock) or holder(options.lock)
    if note is None:
        say(f"Signalbox is not open for the workspace {options.workspace}.")
        return 0
    # as Ctrl-C, a person's word; SIGTERM is the machine's, after whose restart a run may go on by itself
    os.kill(note["pid"], signal.SIGINT)
    deadline = time.monotonic() + SAVE_S + 20
    while is_held(options.supervisor_lock) or is_held(options.lock):
        if time.monotonic() > deadline:
            raise Refusal(f"The server (process {note['pid']}) has not ended yet. It may still be saving: look again.")
        time.sleep(0.05)
    say("Stopped.")
    return 0


def main(argv: list[str] | None = None) -> int:
    """The command line: returns the exit code; a Refusal is one line on stderr and 2."""
    args = parser().parse_args(argv)
    options = options_of(args)
    try:
        if args.command == "stop":
            return stop_server(options)
        check(options, args.share)
        if args.detach:
            return detach(options)
        return serve(options) if args.foreground else supervise(options)
    except Refusal as refusal:
        say(refusal.message, sys.stderr)
        return 2


if __name__ == "__main__":
    code = main()
    if "--foreground" in sys.argv:
        os._exit(code)  # a thread of torch that is still in native code must not hold up or crash the end
    sys.exit(code)
