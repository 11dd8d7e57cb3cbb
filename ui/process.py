"""One server process, from options to exit code: lock, signals, surroundings, parts, page, ordered end.

Called by `app.py --foreground`. Gradio is imported when the server is opened, torch later by the engine.
"""

from __future__ import annotations

import errno
import faulthandler
import os
import signal
import socket
import sys
import threading
import time
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.console import say
from trainer.ends import CRASH_LOG, read_ends
from trainer.locks import FileLock, device_lock_path, holder
from trainer.recovery import SHUTDOWN
from trainer.refusal import Refusal
from trainer.signals import GIVE_UP_S

if TYPE_CHECKING:
    from ui.server import Server
    from ui.site import Site

SAVE_S = GIVE_UP_S
"""So long a run may take to stop and save when the server is told to end: the whole end stays under ten seconds."""
AGAIN_S = 1.0
"""A second signal within this time is the same word said twice: a service manager tells us and our supervisor."""
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


@dataclass(frozen=True)
class Options:
    """The arguments, with every path absolute, so that the working directory no longer matters."""

    config: Path
    workspace: Path
    model_roots: tuple[Path, ...]
    data_roots: tuple[Path, ...]
    host: str
    port: int
    public_hosts: tuple[str, ...]
    root_path: str
    browser: bool

    @property
    def url(self) -> str:
        """Where the page is on this machine."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}{self.root_path}{'/' if self.root_path else ''}"

    @property
    def lock(self) -> Path:
        """Held by the server of the workspace; the note in it says which process and which address."""
        return self.workspace / "server.lock"

    @property
    def supervisor_lock(self) -> Path:
        """Held by the process that keeps the server alive, also while it waits to start it again."""
        return self.workspace / "supervisor.lock"

    @property
    def log(self) -> Path:
        """What a detached server says."""
        return self.workspace / "server.log"

    def arguments(self, browser: bool) -> list[str]:
        """The same options as a command line for a child."""
        words = ["--config", str(self.config), "--workspace", str(self.workspace), "--host", self.host]
        words += ["--port", str(self.port), "--root-path", self.root_path]
        for option, values in (
            ("--model-root", self.model_roots),
            ("--data-root", self.data_roots),
            ("--public-host", self.public_hosts),
        ):
            for value in values:
                words += [option, str(value)]
        return words if browser else [*words, "--no-browser"]

    def listen(self) -> socket.socket:
        """A listening socket; OSError when the port cannot be had."""
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        return socket.create_server((self.host, self.port), family=family, backlog=128)


def serve(options: Options) -> int:
    """Be the server until a signal or a restart ends it; returns the exit code."""
    stop = threading.Event()
    asked = _listen_to_signals(stop)
    lock = FileLock(options.lock)
    note = {"pid": os.getpid(), "url": options.url, "started": time.time()}
    if not lock.acquire(note):
        raise Refusal("Another server has just opened this workspace.")
    crash_log = open(options.workspace / CRASH_LOG, "a", encoding="utf-8")
    faulthandler.enable(crash_log)
    try:
        listening = options.listen()
    except OSError as error:
        raise Refusal(port_trouble(options, error)) from None
    site, server = _open(options, listening, stop)
    if not asked and server.start():
        say(f"Signalbox is open on {options.url}")
        if options.browser:
            _open_browser(options.url)
        threading.Thread(target=_recover, args=(site, options), name="recover", daemon=True).start()
        while not stop.wait(0.5):
            if site.engine.must_restart() and _is_supervised(options):
                say("The GPU's context is broken: starting a fresh process.", sys.stderr)
                server.restart()
    _close(site, server, asked)
    lock.release()
    return server.exit_code


def _open(options: Options, listening: socket.socket, ended: threading.Event) -> tuple[Site, Server]:
    for name in [name for name in os.environ if name.startswith("GRADIO_")]:
        del os.environ[name]  # what is reachable is decided here, not by the shell we were started from
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    from trainer.workspace import Workspace

    workspace = Workspace(options.workspace, options.model_roots, options.data_roots).create()
    _private_surroundings(workspace.root / "server")
    with _without_stub_files():
        from ui.server import Server
    from trainer.engine import Engine
    from trainer.jobs import Jobs
    from trainer.worker import Worker
    from ui.drafts import Drafts
    from ui.site import Site

    worker = Worker()
    site = Site(
        workspace=workspace,
        engine=Engine(workspace, worker),
        worker=worker,
        jobs=Jobs(workspace.jobs),
        drafts=Drafts(workspace.drafts),
        config_path=options.config,
    )
    return site, Server(site, listening, ended, public_hosts=options.public_hosts, root_path=options.root_path)


def _private_surroundings(folder: Path) -> None:
    """Work in an empty private folder, with another for temporary files: Gradio serves files out of both."""
    for name in ("empty", "temporary"):
        (folder / name).mkdir(parents=True, exist_ok=True, mode=0o700)
    os.chdir(folder / "empty")
    os.environ["GRADIO_TEMP_DIR"] = str(folder / "temporary")


@contextmanager
def _without_stub_files() -> Iterator[None]:
    """While Gradio is imported, keep it from writing a .pyi stub for each component: a third of its import.

    It looks up each class's source file for that, and skips a class whose file cannot be found.
    """
    import inspect

    look_up = inspect.getfile

    def unless_gradio(thing: Any) -> str:
        if isinstance(thing, type) and thing.__module__.startswith("gradio."):
            raise OSError("no stub file is wanted")
        return look_up(thing)

    inspect.getfile = unless_gradio
    try:
        yield
    finally:
        inspect.getfile = look_up


def _recover(site: Site, options: Options) -> None:
    """Look after the runs of a server that is gone, and only then go on with the queue: it would take their device."""
    try:
        site.engine.recover(read_ends(options.workspace))
    except (OSError, ValueError) as error:  # a workspace that cannot be read: the page says more
        say(f"Runs that were cut off could not be looked after: {error}", sys.stderr)
    finally:
        site.engine.tend_queue()


def _is_supervised(options: Options) -> bool:
    """Whether somebody would start us again."""
    return hasattr(os, "getppid") and (holder(options.supervisor_lock) or {}).get("pid") == os.getppid()


def _close(site: Site, server: Server, asked: list[int]) -> None:
    works = (holder(device_lock_path(site.engine.machine().device)) or {}).get("pid") == os.getpid()
    if works:
        say("Stopping: the run ends its step and is saved.")
    # an engine that is only importing torch has nothing to save, and need not be waited for
    by = SHUTDOWN if signal.SIGTERM in asked else "shutdown of the server"
    if not site.engine.shutdown(SAVE_S if works else 0.2, by) and works:
        say("The run was not through in time and is cut off. Its last checkpoint is safe.", sys.stderr)
    server.stop(timeout_s=1.0)
    site.worker.close()


def _listen_to_signals(stop: threading.Event) -> list[int]:
    """Let the first signal set `stop`; a second one ends the process at once. Returns those heard."""
    heard: list[int] = []
    first_s = [0.0]

    def hear(number: int, frame: Any) -> None:
        if heard and (number == signal.SIGINT or time.monotonic() - first_s[0] > AGAIN_S):
            os._exit(128 + number)
        first_s[0] = first_s[0] if heard else time.monotonic()
        heard.append(number)
        stop.set()

    for number in SIGNALS:
        signal.signal(number, hear)
    return heard


def owned_by_terminal() -> bool:
    """Whether the server ends when a terminal is closed: it writes to one."""
    return any(os.isatty(fd) for fd in (1, 2))


def _open_browser(url: str) -> None:
    # a text browser would take the terminal over, and over ssh the browser would open on the wrong machine
    has_screen = sys.platform != "linux" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if has_screen and "SSH_CONNECTION" not in os.environ:
        threading.Thread(target=webbrowser.open, args=(url,), name="browser", daemon=True).start()


def port_trouble(options: Options, error: OSError) -> str:
    """Why the port cannot be had, and from whom."""
    if error.errno != errno.EADDRINUSE:
        return f"Cannot listen on {options.host} port {options.port}: {error.strerror or error}."
    import psutil  # only here: it costs time that a good start does not have

    owner = "another program"
    try:
        for link in psutil.net_connections("tcp"):
            if link.status == psutil.CONN_LISTEN and link.laddr.port == options.port and link.pid:
                owner = f"{psutil.Process(link.pid).name()} (process {link.pid})"
    except psutil.Error:
        pass  # other users' programs are not shown to us
    return f"Port {options.port} is in use by {owner}. End that program, or choose another port with --port."
