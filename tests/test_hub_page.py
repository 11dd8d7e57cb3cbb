"""Download on the Models page: its bar, cancel, resume, what is said when it fails, and the model's report afterwards."""

from __future__ import annotations

import os
import time
import urllib.error
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import RunningApp, end_app, start_app
from tests.hub_server import Hub, Model, files_of, running_hub
from tests.test_models_page import post
from ui.guard import ACTIONS
from ui.hub_api import routes, standing


@contextmanager
def app_with_hub(workspace: Path, model: Model) -> Iterator[tuple[RunningApp, Hub]]:
    """A server of ours whose hub is one on loopback with `org/name`; its own processes alone may ask it."""
    changed = {"HF_HUB_OFFLINE": "0", "HF_HOME": str(workspace / "home"), "NO_PROXY": "127.0.0.1"}
    before = {name: os.environ.get(name) for name in (*changed, "HF_ENDPOINT")}
    with running_hub(org__name=model) as hub:
        try:
            os.environ |= changed | {"HF_ENDPOINT": hub.url}
            app = start_app(workspace)
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
        try:
            yield app, hub
        finally:
            end_app(app)


def waited(app: RunningApp, until: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """How the download stands once `until` holds."""
    deadline = time.monotonic() + 60
    while not until(now := app.get("api/hub")):
        assert time.monotonic() < deadline, now
        time.sleep(0.05)
    return now


def test_only_owner_and_operators_download_and_only_the_owner_throws_away(site: Any) -> None:
    found = {route.path: route.endpoint.action for route in routes(site)}
    assert {path: set(ACTIONS[action]) for path, action in found.items()} == {
        "/api/hub": {"owner", "operator", "viewer"},
        "/api/hub/download": {"owner", "operator"},
        "/api/hub/cancel": {"owner", "operator"},
        "/api/hub/discard": {"owner"},
    }


def test_the_newest_of_two_downloads_in_one_second_is_the_one_that_is_shown(site: Any) -> None:
    for at in range(12):  # ids of jobs of one second are drawn: an order by id is soon wrong
        job = site.jobs.start("download", lambda handle: {})
        while site.jobs.read(job)["state"] == "running":
            time.sleep(0.005)
        assert standing(site)["job"] == job, at


@pytest.mark.slow
@pytest.mark.browser
def test_a_person_downloads_cancels_resumes_and_sees_the_report(page: Any, tiny_model: Path, tmp_path: Path) -> None:
    files = files_of(tiny_model)
    slow = Model(files, bytes_a_second=len(files["model.safetensors"]) / 40)
    with app_with_hub(tmp_path / "w", slow) as (app, hub):
        page.goto(f"{app.url}/models")
        page.get_by_label("Model id").fill("org/gone")
        page.get_by_role("button", name="Download").click()
        page.wait_for_function("document.body.innerText.includes('There is no model org/gone')", timeout=20_000)
        page.get_by_label("Model id").fill("org/name")
        page.get_by_label("Model id").press("Enter")
        page.wait_for_function("+document.querySelector('.sb-bar').getAttribute('aria-valuenow') >= 5", timeout=30_000)
        _picture(page, "running")
        # the same model again joins, another one is told to wait
        post(app, "api/hub/download", {"id": "org/name"})
        with pytest.raises(urllib.error.HTTPError) as refused:
            post(app, "api/hub/download", {"id": "org/other"})
        assert b"org/name is being downloaded" in refused.value.read()
        began = time.monotonic()
        page.get_by_role("button", name="Cancel").click()
        waited(app, lambda now: now["state"] == "cancelled")
        assert time.monotonic() - began < 3  # with the click; test_hub.py holds the second itself
        page.get_by_role("button", name="Resume").wait_for()
        page.wait_for_function("document.body.innerText.includes('What has arrived is kept')")
        _picture(page, "cancelled")
        slow.bytes_a_second = None
        hub.seen.clear()
        page.reload()
        page.get_by_role("button", name="Resume").click()
        page.wait_for_function("document.body.innerText.includes('org/name is here, as org--name')", timeout=30_000)
        page.wait_for_function(
            "document.querySelector('.sb-shelf-report')?.innerText.includes('org--name')"
            " && [...document.querySelectorAll('.sb-shelf-table tr')].some(r => r.innerText.trim().endsWith('good'))",
            timeout=60_000,
        )
        _picture(page, "done")
        assert any("range" in headers for headers in hub.asked("model.safetensors"))
        assert (app.workspace / "models/org--name/model.safetensors").read_bytes() == files["model.safetensors"]
        assert page.get_by_role("button", name="Resume").count() == 0
        page.goto("about:blank")  # a poll of a server that has ended would stand in the console


@pytest.mark.browser
@pytest.mark.slow
def test_the_server_may_end_in_the_middle_and_the_rest_is_resumed_or_thrown_away(
    page: Any, tiny_model: Path, tmp_path: Path
) -> None:
    files = files_of(tiny_model)
    slow = Model(files, bytes_a_second=len(files["model.safetensors"]) / 20)
    with app_with_hub(tmp_path / "w", slow) as (app, _):
        post(app, "api/hub/download", {"id": "org/name"})
        waited(app, lambda now: now["done"] > len(files["model.safetensors"]) / 10)
    with app_with_hub(tmp_path / "w", replace(slow)) as (app, _):
        now = waited(app, lambda now: bool(now["left"]))
        assert now["state"] == "interrupted" and now["left"][0]["id"] == "org/name"
        page.on("dialog", lambda dialog: dialog.accept())
        page.goto(f"{app.url}/models")
        page.get_by_role("button", name="Throw away").click()
        waited(app, lambda now: not now["left"])
        page.wait_for_function("!document.body.innerText.includes('Throw away')")
        assert not list((app.workspace / "models").glob(".download-*"))
        page.goto("about:blank")


@pytest.mark.browser
def test_a_name_that_is_none_is_said_on_the_page(app: RunningApp, browser: Any) -> None:
    context = browser.new_context()  # not the fixture's page: the browser notes a refused request in its console
    page = context.new_page()
    page.goto(f"{app.url}/models")
    page.get_by_label("Model id").fill("../../etc")
    page.get_by_role("button", name="Download").click()
    page.wait_for_function("document.querySelector('.sb-upload .sb-tone-bad')?.innerText.includes('is no model id')")
    context.close()


def _picture(page: Any, name: str) -> None:
    """A picture for the person who looks at these tests' work; only where a folder for them is named."""
    folder = os.environ.get("HUB_PICTURES")
    if folder:
        page.screenshot(path=f"{folder}/{name}.png", full_page=True)
        before = page.viewport_size
        page.set_viewport_size({"width": 390, "height": 844})
        page.screenshot(path=f"{folder}/{name}-phone.png", full_page=True)
        page.set_viewport_size(before)
