"""Shared fixtures: the real server as a child process, a real browser, a tiny model and dataset.

A browser that is not there skips its tests with the reason; with CI=true it fails them instead.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.figures import figures, pytest_terminal_summary  # noqa: F401  (a fixture and a hook)
from trainer.worker import Worker
from trainer.workspace import Workspace

pytest.register_assert_rewrite("tests.states_people", "tests.sweeps", "tests.stop_places")
ROOT = Path(__file__).resolve().parent.parent
ASSETS = ROOT / "ui" / "assets"
START_S = 90.0
# for every process of the tests: nothing over the network, one thread, no telemetry
os.environ |= {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass(frozen=True)
class RunningApp:
    """A server that answers: its address, its workspace, its process."""

    url: str
    workspace: Path
    process: subprocess.Popen[str]

    def get(self, path: str) -> Any:
        """The JSON of a GET."""
        with urllib.request.urlopen(f"{self.url}/{path}", timeout=10) as reply:
            return json.load(reply)


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    """A worker process for the tests of one file."""
    made = Worker()
    yield made
    made.close()


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """An empty workspace, its device locks beside it."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return Workspace(tmp_path / "ws").create()


def unavailable(what: str) -> None:
    """Skip a test that needs `what`; on CI its absence is a fault of the set-up and fails."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{what} is not installed, and CI must run these tests")
    pytest.skip(f"{what} is not installed")


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def start_app(workspace: Path, *arguments: str, port: int | None = None) -> RunningApp:
    """Start `python app.py` on a workspace and wait until it answers; the caller ends it."""
    port = port or free_port()
    command = [
        sys.executable,
        str(ROOT / "app.py"),
        "--no-browser",
        "--port",
        str(port),
        "--workspace",
        str(workspace),
    ]
    process = subprocess.Popen(
        [*command, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
    )
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            urllib.request.urlopen(f"{url}/api/health", timeout=2).close()
            return RunningApp(url, workspace, process)
        except (urllib.error.URLError, OSError):
            time.sleep(0.05)
    process.kill()
    raise AssertionError(f"the server did not start: {process.communicate()[0]}")


def end_app(app: RunningApp) -> str:
    """End a server as a service manager would; returns what it said."""
    app.process.terminate()
    try:
        return app.process.communicate(timeout=30)[0]
    except subprocess.TimeoutExpired:
        app.process.kill()
        raise


@pytest.fixture(scope="session", autouse=True)
def private_runtime(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Device locks of these tests meet nobody else's."""
    os.environ["XDG_RUNTIME_DIR"] = str(tmp_path_factory.mktemp("runtime"))


@pytest.fixture(scope="module")
def only_new_objects() -> Iterator[None]:
    """What is there now is left out when objects are collected or counted: a smoke test does both, half a second each time."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete, very small model directory."""
    from tests.tiny import tiny_model_dir

    return tiny_model_dir(tmp_path_factory.mktemp("models") / "tiny-qwen3")


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty good chat rows."""
    path = tmp_path_factory.mktemp("data") / "forty.jsonl"
    path.write_text(
        "".join(
            json.dumps(
                {
                    "messages": [
                        {"role": "user", "content": f"What is {n} plus {n}?"},
                        {"role": "assistant", "content": f"{n} plus {n} is {2 * n}."},
                    ]
                }
            )
            + "\n"
            for n in range(40)
        ),
        encoding="utf-8",
    )
    return path


@pytest.fixture(scope="session")
def app(tmp_path_factory: pytest.TempPathFactory, private_runtime: None) -> Iterator[RunningApp]:
    """One real server for the whole session, on an empty workspace."""
    running = start_app(tmp_path_factory.mktemp("workspace"), "--foreground")
    yield running
    end_app(running)


@pytest.fixture(scope="session")
def app_url(app: RunningApp) -> str:
    """Where the session's server is."""
    return app.url


@pytest.fixture
def site(tmp_path: Path, private_runtime: None) -> Iterator[Any]:
    """All parts of a server in this process, on an empty workspace; nothing listens."""
    from trainer.engine import Engine
    from trainer.jobs import Jobs
    from trainer.worker import Worker
    from trainer.workspace import Workspace
    from ui.drafts import Drafts
    from ui.site import Site

    workspace = Workspace(tmp_path / "workspace").create()
    worker = Worker()
    engine = Engine(workspace, worker)
    drafts = Drafts(workspace.drafts)
    yield Site(workspace, engine, worker, Jobs(workspace.jobs), drafts, ROOT / "config.json")
    engine.shutdown(timeout_s=5)
    worker.close()


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A real Chromium, closed at the end."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        unavailable("Chromium")
    playwright_api = pytest.importorskip("playwright.sync_api")
    options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    with playwright_api.sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=chromium, args=options)
        yield made
        made.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A fresh tab at 1440 x 900 with its own cookies; what its console said must stay empty."""
    context = browser.new_context(viewport={"width": 1440, "height": 900}, timezone_id="Europe/Berlin")
    made = context.new_page()
    said: list[str] = []
    made.on("console", lambda message: message.type == "error" and said.append(message.text))
    made.on("pageerror", lambda error: said.append(str(error)))
    yield made
    context.close()
    assert said == []


@pytest.fixture(scope="session")
def run_numbers_js(request: pytest.FixtureRequest) -> Callable[[Any], list[str]]:
    """Calls formatters of numbers.js: [[name, arguments], ...] -> texts; in node if it is there, else Chromium."""
    source = (ASSETS / "numbers.js").read_text(encoding="utf-8")
    calls_js = "JSON.parse(CALLS).map(([name, args]) => window.signalbox.numbers[name](...args))"
    node = shutil.which("node")

    def in_node(calls: Any) -> list[str]:
        text = f"globalThis.window = globalThis;\n{source}\nconst CALLS = {json.dumps(json.dumps(calls))};\n"
        text += f"process.stdout.write(JSON.stringify({calls_js}));"
        environment = {**os.environ, "TZ": "Europe/Berlin"}
        done = subprocess.run([node, "-"], input=text, capture_output=True, text=True, check=True, env=environment)
        return json.loads(done.stdout)

    def in_chromium(calls: Any) -> list[str]:
        context = request.getfixturevalue("browser").new_context(timezone_id="Europe/Berlin")
        tab = context.new_page()
        tab.add_script_tag(content=source)
        result = tab.evaluate(f"(CALLS) => {calls_js}", json.dumps(calls))
        context.close()
        return result

    return in_node if node else in_chromium
