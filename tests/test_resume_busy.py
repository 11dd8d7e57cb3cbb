"""The weights of a run do not depend on who looks: twenty clients of the real server, doctors at work, the same bits."""

from __future__ import annotations

import json
import shutil
import socket
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests import runs
from tests.lives import assert_same
from trainer.run import RunDir, status
from trainer.schema import Config
from ui.server import Server
from ui.site import Site

CLIENTS = 20


class Crowd:
    """Clients of a server, each on a thread of its own, and a doctor's visit after the other; counts what was answered."""

    def __init__(self, url: str, run: RunDir, data: Path, model: Path) -> None:
        self.url, self.run, self.data, self.model = url, run, data, model
        self.answered: Counter[str] = Counter()
        self.unwell: list[str] = []
        self._over = threading.Event()
        work = [self._poll] * CLIENTS + [self._examine]
        self._threads = [threading.Thread(target=self._until_over, args=(each,)) for each in work]

    def __enter__(self) -> Crowd:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(60)

    def _until_over(self, work: Any) -> None:
        memory: dict[str, Any] = {}
        while not self._over.is_set():
            try:
                work(memory)
            except (urllib.error.URLError, OSError, AssertionError) as trouble:
                self.unwell.append(f"{work.__name__}: {trouble}")
                return

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        sent = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/{path}", sent, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as reply:
            return json.load(reply)

    def _poll(self, memory: dict[str, Any]) -> None:
        """What live.js asks each second, here ten times as often."""
        since = f"?gen={memory['gen']}&since={memory['next']}&h={memory.get('h')}" if memory else ""
        memory |= self._ask(f"api/runs/{self.run.run_id}/feed{since}")
        self._ask("api/state")
        self.answered["feed"] += 1
        time.sleep(0.1)

    def _examine(self, memory: dict[str, Any]) -> None:
        """Check the dataset and the model again and again, as two jobs that the worker does beside the training."""
        for kind, path in (("data", self.data), ("models", self.model)):
            (item,) = [each for each in self._ask(f"api/{kind}")["items"] if each["name"] == path.name]
            self._ask(f"api/{kind}/{item['id']}/check", {})
            while (report := self._ask(f"api/{kind}/{item['id']}"))["state"] == "running":
                time.sleep(0.02)
            assert report["state"] == "done", report
            self.answered[kind] += 1


def train(site: Site, config: Config) -> RunDir:
    """Start a run on the site's engine, as the Start button does."""
    return site.workspace.run(site.engine.start_run(config, "owner"))


def ended(run: RunDir) -> str:
    """How the run ended, waited for."""
    runs.wait_for(lambda: status(run).state in ("finished", "failed", "stopped", "diverged"), 120)
    return status(run).state


@pytest.mark.slow
def test_twenty_clients_and_the_doctors_leave_the_weights_as_they_are(
    site: Site, tiny_model: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_model, site.workspace.models_dir / "tiny")
    data = site.workspace.add_dataset(runs.write_rows(tmp_path / "rows.jsonl"), "rows.jsonl").path
    lora = {"r": 4, "dropout": 0.1}
    config = runs.settings(
        model, data, method="lora", lora=lora, max_steps=20, eval={"eval_steps": 10}, output={"save_steps": 5}
    )
    alone = train(site, config)
    assert ended(alone) == "finished", status(alone).cause
    listening = socket.create_server(("127.0.0.1", 0), backlog=128)
    server = Server(site, listening, threading.Event())
    assert server.start()
    try:
        busy = train(site, config)
        with Crowd(f"http://127.0.0.1:{listening.getsockname()[1]}", busy, data, model) as crowd:
            assert ended(busy) == "finished", status(busy).cause
            runs.wait_for(lambda: crowd.answered["models"] or crowd.unwell, 60)
    finally:
        server.stop()
    print(dict(crowd.answered))
    assert (
        crowd.unwell == [] and crowd.answered["feed"] > CLIENTS and crowd.answered["data"] and crowd.answered["models"]
    )
    assert busy.snapshot()["threads"] == alone.snapshot()["threads"]
    assert_same(busy, alone, "with twenty clients and the doctors at work")
