"""The main job on real input, as a person does it in Chromium, from an uploaded file to the receipt of a stop."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import runs
from tests.conftest import RunningApp, end_app, start_app
from trainer import checkpoint
from trainer.run import status
from trainer.workspace import Workspace

pytestmark = pytest.mark.browser
POINTS = "document.querySelector('.sb-chart-loss, [aria-label^=Loss] .js-plotly-plot, .js-plotly-plot')?.data?.[0]?.x.length ?? 0"


@pytest.fixture(scope="module")
def journey(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[RunningApp]:
    """A server whose workspace has one model and no data."""
    workspace = Workspace(tmp_path_factory.mktemp("journey") / "ws").create()
    shutil.copytree(tiny_model, workspace.models_dir / "tiny-qwen3")
    app = start_app(workspace.root, "--foreground")
    yield app
    end_app(app)


def pick(page: Any, field: str, name: str) -> None:
    page.click(f"{field} input")
    page.get_by_role("option").filter(has_text=name).first.click()


def type_into(page: Any, key: str, text: str) -> None:
    box = page.locator(f"#f-{key} input, #f-{key} textarea").first
    box.fill(text)
    box.press("Tab")


def test_from_an_uploaded_file_to_a_stopped_and_saved_run(journey: RunningApp, page: Any, tmp_path: Path) -> None:
    hosts: set[str] = set()
    page.on("request", lambda request: hosts.add(re.sub(r"^\w+://([^/:]+).*", r"\1", request.url)))
    data = runs.write_rows(tmp_path / "my chats.jsonl", 120)
    workspace = Workspace(journey.workspace)

    page.goto(f"{journey.url}/data")
    page.wait_for_selector(".sb-upload")
    page.set_input_files("#sb-upload", str(data))
    page.get_by_text("120 of 120 rows are usable").first.wait_for()

    page.goto(f"{journey.url}/models")
    page.get_by_text("tiny-qwen3").first.wait_for()
    page.get_by_text("can be trained").first.wait_for()

    page.goto(journey.url)
    page.wait_for_selector("#train:not(.sb-waiting)")
    pick(page, "#f-model_path", "tiny-qwen3")
    pick(page, "#f-data-dataset_path", "my chats")
    pick(page, "#f-profile-name", "emoji_think")
    page.get_by_text("Respond naturally and concisely").first.wait_for()
    page.get_by_role("button", name="All", exact=True).click()
    page.click('[data-opens="group-memory"]')
    for key, text in (
        ("hyperparams-max_length", "512"),
        ("hyperparams-max_steps", "2000"),
        ("hyperparams-batch_size", "2"),
    ):
        type_into(page, key, text)
    rate = page.locator("#f-hyperparams-learning_rate input").first
    rate.fill("2e-4")
    for _ in range(3):
        rate.press("ArrowUp")
    assert rate.input_value() == "2e-4", "a real number is text, never a stepper"
    rate.press("Tab")

    page.get_by_role("button", name="Smoke test").first.click()
    smoke = "document.querySelector('#gate-lines [data-code=smoke]')?.textContent ?? ''"
    page.wait_for_function(f"/passed 1\\d of 1\\d|passed 1\\d;|failed/i.test({smoke})", timeout=90_000)
    assert "passed" in page.evaluate(smoke).lower()

    page.get_by_role("button", name="Start training").first.click()
    page.wait_for_url(re.compile(r"live\?run="), timeout=30_000)
    run = workspace.run(page.url.rsplit("=", 1)[1])
    page.wait_for_function(f"({POINTS}) >= 20", timeout=60_000)
    saved = json.loads(run.config.read_text())
    assert saved["profile"]["name"] == "emoji_think" and saved["config"]["hyperparams"]["max_steps"] == 2000

    page.reload()
    page.wait_for_function(f"({POINTS}) >= 20", timeout=30_000)
    second = page.context.new_page()
    second.goto(page.url)
    second.wait_for_function(f"({POINTS}) >= 20", timeout=30_000)
    assert status(run).state == "running"
    second.close()

    page.get_by_role("button", name="Stop", exact=True).first.click()
    page.get_by_role("button", name="Save and stop").first.click()
    page.get_by_text(re.compile(r"Stopped by \w+ at step")).first.wait_for(timeout=30_000)
    now = status(run)
    assert now.state == "stopped"
    found = checkpoint.newest_verified(run.checkpoints)
    assert found.step == now.current_step and (found.path / "model" / "adapter_model.safetensors").exists()
    page.get_by_role("button", name=re.compile("^Resume")).first.click()
    runs.wait_for(lambda: status(run).state == "running" and status(run).current_step > found.step, 60)
    page.wait_for_function(
        "() => [...document.querySelectorAll('button')].some(b => b.innerText.trim() === 'Stop' && b.offsetParent)"
    )
    page.get_by_role("button", name="Stop", exact=True).first.click()
    page.get_by_role("button", name="Save and stop").first.click()
    runs.wait_for(lambda: status(run).state == "stopped", 30)

    page.goto(f"{journey.url}/runs")
    page.get_by_text("my chats").first.wait_for()
    assert hosts == {"127.0.0.1"}
