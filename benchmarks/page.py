"""What a person waits for, measured in a real browser: start, first loss, bytes an update, stop, and what tabs cost.

    python -m benchmarks.page [--repeat 5] [--steps-window 20]      writes benchmarks/results/page-DATE.json

The browser runs on the same machine and competes for its cores. Figures are medians over `--repeat` runs, with all of them
kept. Compared with what LlamaBoard 0.9.5 showed on the same kind of machine (docs/benchmarks.md says how), not timed here.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
from playwright.sync_api import Browser, Page, sync_playwright

from trainer.metrics import read_records
from trainer.run import status
from trainer.workspace import Workspace

ROOT = Path(__file__).resolve().parent.parent
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
FEED = re.compile(r"/feed\?")


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def server(workspace: Path):
    """The app as a person starts it (supervisor and server), ended by SIGTERM; yields (address, pid)."""
    port = free_port()
    command = [sys.executable, str(ROOT / "app.py"), "--no-browser", "--port", str(port), "--workspace", str(workspace)]
    environment = {**os.environ, "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield f"http://127.0.0.1:{port}/", process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


def open_when_ready(page: Page, address: str, limit_s: float = 60.0, first_time: bool = False) -> None:
    """Load the Train page as soon as the server answers, until its main button can be seen."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", int(address.rsplit(":", 1)[1].strip("/")))) == 0:
                break
        time.sleep(0.02)
    page.goto(address, wait_until="commit")
    name = "Try it now" if first_time else "Start training"
    page.get_by_role("button", name=name).first.wait_for(state="visible", timeout=limit_s * 1000)


def starter(workspace: Path) -> None:
    """Write the starter model and data and register the data, once for all runs."""
    subprocess.run(
        [sys.executable, "-m", "trainer", "starter", "--workspace", str(workspace)],
        cwd=ROOT,
        check=True,
        stdout=subprocess.DEVNULL,
    )


def choose(page: Page, label: str, text: str) -> None:
    """Pick the entry of a dropdown that contains `text`."""
    page.get_by_label(label, exact=True).first.click()
    page.get_by_role("option").filter(has_text=text).first.click()


def start_times(browser: Browser, workspace: Path, repeat: int) -> list[float]:
    """Seconds from the command to the Start button, the file cache warm."""
    found = []
    for _ in range(repeat + 1):
        page = browser.new_context().new_page()
        started = time.perf_counter()
        with server(workspace) as (address, _):
            open_when_ready(page, address)
            found.append(time.perf_counter() - started)
        page.context.close()
    return found[1:]  # the first warms the file cache


def tree_mib(pid: int) -> float:
    """Resident memory of a process and its children, MiB."""
    process = psutil.Process(pid)
    return sum(p.memory_info().rss for p in [process, *process.children(recursive=True)]) / 2**20


def newest_run(workspace: Workspace, before: set[str]) -> Any:
    """The run that was not there before."""
    while True:
        new = [run for run in workspace.list_runs() if run.run_id not in before]
        if new:
            return new[0]
        time.sleep(0.005)


def one_run(browser: Browser, address: str, workspace: Workspace) -> dict[str, float]:
    """Start from the page, wait for the first point and thirty more, stop: seconds and bytes of each."""
    page = browser.new_context(viewport={"width": 1440, "height": 900}).new_page()
    sizes: list[int] = []
    page.on(
        "response",
        lambda r: sizes.append(int(r.headers.get("content-length") or len(r.body()))) if FEED.search(r.url) else None,
    )
    page.goto(address)
    choose(page, "Model", "starter")
    choose(page, "Data", "starter")
    page.get_by_role("button", name="Start training").first.wait_for(state="visible")
    page.wait_for_function(
        "() => [...document.querySelectorAll('button')]"
        ".some(b => b.innerText.trim() === 'Start training' && b.offsetParent && !b.disabled)"
    )
    before = {run.run_id for run in workspace.list_runs()}
    clicked = time.perf_counter()
    page.get_by_role("button", name="Start training").first.click()
    run = newest_run(workspace, before)
    page.wait_for_function(
        "() => [...document.querySelectorAll('#sb-live .scatterlayer .trace path')]"
        ".some(p => (p.getAttribute('d') || '').length > 3)",
        timeout=60_000,
    )
    first_point = time.perf_counter() - clicked
    while not len(read_records(run.metrics)) >= 1:
        time.sleep(0.01)
    sizes.clear()
    page.wait_for_timeout(15_000)
    update = statistics.median(sizes)
    page.get_by_role("button", name="Stop", exact=True).first.click()
    stopping = time.perf_counter()
    page.get_by_role("button", name=re.compile("Save and stop")).first.click()
    while status(run).state != "stopped":
        time.sleep(0.005)
    stopped = time.perf_counter() - stopping
    now = status(run)
    assert now.last_checkpoint_step == now.current_step
    page.context.close()
    return {"first_point_s": first_point, "update_bytes": update, "updates": len(sizes), "stop_saved_s": stopped}


def tab_costs(browser: Browser, address: str, workspace: Workspace, window_steps: int) -> dict[str, float]:
    """Median seconds a step with 0, 1 and 10 tabs open on the running run, in turn, twice over."""
    page = browser.new_context().new_page()
    page.goto(address)
    choose(page, "Model", "starter")
    choose(page, "Data", "starter")
    page.get_by_role("button", name="All", exact=True).click()
    page.wait_for_timeout(1500)
    before = {run.run_id for run in workspace.list_runs()}
    page.get_by_role("button", name="Start training").first.click()
    run = newest_run(workspace, before)
    page.context.close()
    found: dict[int, list[float]] = {0: [], 1: [], 10: []}
    context = browser.new_context()
    while len(read_records(run.metrics)) < 10:
        time.sleep(0.1)
    for tabs in (0, 1, 10, 10, 1, 0):
        pages = [context.new_page() for _ in range(tabs)]
        for tab in pages:
            tab.goto(f"{address}live?run={run.run_id}")
        time.sleep(2)
        start = len(read_records(run.metrics))
        while len(read_records(run.metrics)) < start + window_steps and status(run).state == "running":
            time.sleep(0.2)
        records = read_records(run.metrics)[start:]
        # seconds for each token: rows differ in length, and a step in how many it has
        found[tabs] += (records["seconds"] / records["tokens"]).tolist()
        for tab in pages:
            tab.close()
    subprocess.run(
        [sys.executable, "-m", "trainer", "stop", str(run.path), "--now"], cwd=ROOT, stdout=subprocess.DEVNULL
    )
    context.close()
    alone = statistics.median(found[0])
    return {f"{tabs}_tabs_relative": statistics.median(values) / alone for tabs, values in found.items()}


def main() -> None:
    """Measure everything and write the result."""
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--repeat", type=int, default=5)
    arguments.add_argument("--steps-window", type=int, default=20)
    given = arguments.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="signalbox-bench-"))
    workspace = Workspace(folder / "ws").create()
    starter(workspace.root)
    result: dict[str, Any] = {"conditions": conditions(given.repeat)}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        result["start_s"] = start_times(browser, workspace.root, given.repeat)
        with server(workspace.root) as (address, pid):
            page = browser.new_context().new_page()
            open_when_ready(page, address)
            time.sleep(6)
            result["idle_mib"] = tree_mib(pid)
            page.context.close()
            time.sleep(6)  # torch is warm by now
            result["runs"] = [one_run(browser, address, workspace) for _ in range(given.repeat)]
            result["tabs"] = tab_costs(browser, address, workspace, given.steps_window)
        browser.close()
    shutil.rmtree(folder)
    result["median"] = {
        "start_s": statistics.median(result["start_s"]),
        **{
            key: statistics.median(run[key] for run in result["runs"])
            for key in ("first_point_s", "update_bytes", "stop_saved_s")
        },
    }
    target = ROOT / "benchmarks" / "results" / f"page-{time.strftime('%Y-%m-%d')}.json"
    target.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result["median"] | {"idle_mib": result["idle_mib"]} | result["tabs"], indent=2))


def conditions(repeat: int) -> dict[str, Any]:
    """What the figures are true for."""
    packages = ("gradio", "torch", "transformers", "plotly", "playwright")
    return {
        "repeat": repeat,
        "cores": os.cpu_count(),
        "processor": platform.machine(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
        "load_at_start": os.getloadavg()[0],
        "browser": "Chromium, headless, on the same machine",
        "model": "starter model, CPU, form defaults",
    }


if __name__ == "__main__":
    main()
