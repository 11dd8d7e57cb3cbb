"""The list of runs: every run is there with its figures, can be found, and is deleted by its typed name alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

import ui.feed
from tests.conftest import RunningApp
from tests.made_runs import MadeRun
from trainer.engine import Engine
from trainer.worker import Worker
from trainer.workspace import Workspace
from ui.guard import Guard, Rules
from ui.site import Site


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    workspace = Workspace(tmp_path / "workspace").create()
    engine = Engine(workspace, Worker())
    yield Site(workspace, engine, engine.worker, None, None, Path("config.json"))  # type: ignore[arg-type]
    engine.shutdown(5)


@pytest.fixture
def client(site: Site) -> TestClient:
    return TestClient(Guard(Starlette(routes=ui.feed.routes(site)), Rules()), base_url="http://localhost")


@pytest.fixture
def viewer(site: Site) -> TestClient:
    guard = Guard(Starlette(routes=ui.feed.routes(site)), Rules(share_port=80))
    return TestClient(guard, base_url="http://localhost")


def finished(site: Site, name: str = "good run", steps: int = 3) -> MadeRun:
    made = MadeRun(site.workspace.runs, name, why="to see").start(steps)
    for _ in range(steps):
        made.step()
    made.checkpoint()
    made.events.append("eval", step=steps, loss=1.5, rows=4, best=True)
    return made.end("finished", step=steps)


def test_a_line_tells_what_the_run_was_and_how_it_went(client: TestClient, site: Site) -> None:
    made = finished(site)
    (row,) = client.get("/api/runs").json()["runs"]
    assert row["state"] == "finished" and row["name"] == "good run" and row["why"] == "to see"
    assert row["model"] == "tiny-qwen3" and row["data"] == ["chats.jsonl"] and row["profile"] == "emoji_think"
    assert row["step"] == row["total"] == 3 and row["best"] == 1.5 and row["peak_gib"] == pytest.approx(1.3)
    assert row["seconds"] == pytest.approx(0.3) and row["began"] == pytest.approx(made.began, abs=5)
    assert row["bytes"] == sum(path.stat().st_size for path in made.run.path.rglob("*") if path.is_file())


def test_an_unchanged_list_is_not_sent_again(client: TestClient, site: Site) -> None:
    finished(site)
    first = client.get("/api/runs").json()
    assert client.get(f"/api/runs?h={first['h']}").json() == {"h": first["h"]}
    finished(site, "second")
    assert len(client.get(f"/api/runs?h={first['h']}").json()["runs"]) == 2


def test_a_run_that_cannot_be_read_is_listed_with_the_reason(client: TestClient, site: Site) -> None:
    finished(site)
    broken = finished(site, "broken")
    broken.run.config.write_text("{ not json")
    rows = {row["run_id"]: row for row in client.get("/api/runs").json()["runs"]}
    assert len(rows) == 2 and "Cannot be read" in rows[broken.run_id]["cause"]


def test_a_nan_is_listed_as_nan(client: TestClient, site: Site) -> None:
    made = MadeRun(site.workspace.runs).start()
    made.step(loss=float("nan"))
    made.end("diverged", step=1, cause="loss became NaN at step 1.")
    (row,) = client.get("/api/runs").json()["runs"]
    assert row["state"] == "diverged" and row["loss"] == "nan" and row["best"] is None


def test_only_the_owner_deletes_and_only_by_the_name(client: TestClient, viewer: TestClient, site: Site) -> None:
    made = finished(site)
    address = f"/api/runs/{made.run_id}/delete"
    assert viewer.post(address, json={"name": "good run"}).status_code == 403
    for body in ({"name": "bad"}, {}, {"name": 3}, []):
        assert client.post(address, json=body).status_code == 400, body
    assert made.run.config.is_file()
    assert client.post(address, json={"name": "good run"}).json()["freed_bytes"] > 0
    assert client.get("/api/runs").json()["runs"] == []


def test_a_run_in_training_is_not_deleted(client: TestClient, site: Site) -> None:
    made = MadeRun(site.workspace.runs, "live").start()
    reply = client.post(f"/api/runs/{made.run_id}/delete", json={"name": "live"})
    assert reply.status_code == 400 and "is being trained" in reply.json()["error"]
    made.close()


def test_a_checkpoint_is_verified_byte_by_byte_and_an_incomplete_one_is_shown_as_such(
    client: TestClient, site: Site
) -> None:
    made = MadeRun(site.workspace.runs).start()
    made.step()
    made.checkpoint()
    made.step()
    made.checkpoint()
    made.close()
    address = f"/api/runs/{made.run_id}"
    assert client.post(f"{address}/verify", json={"step": 1}).json() == {"problems": []}
    weights = made.run.checkpoints / "step_00000001" / "model" / "adapter_model.safetensors"
    weights.write_bytes(b"1" + weights.read_bytes()[1:])
    assert "checksum" in client.post(f"{address}/verify", json={"step": 1}).json()["problems"][0]
    (made.run.checkpoints / "step_00000002" / "MANIFEST.json").unlink()
    newest, oldest = client.get(f"{address}/checkpoints").json()["checkpoints"]
    assert not newest["whole"] and oldest["whole"] and oldest["bytes"] == 1000
    for step in (3, "1", None, True):
        assert client.post(f"{address}/verify", json={"step": step}).status_code == 400, step


def test_settings_are_told_in_the_words_of_the_form_with_what_differs_from_the_default(
    client: TestClient, site: Site
) -> None:
    answer = client.get(f"/api/runs/{finished(site).run_id}/settings").json()
    entries = {entry["key"]: entry for group in answer["groups"].values() for entry in group}
    assert (
        entries["hyperparams.learning_rate"]["title"] == "Learning rate"
        and entries["hyperparams.learning_rate"]["value"] == 2e-4
    )
    assert entries["model_path"]["changed"] and not entries["hyperparams.learning_rate"]["changed"]
    assert entries["model_path"]["value"] == "/secret/place/tiny-qwen3" and answer["versions"] == {"torch": "2.13.0"}


def test_no_folder_of_this_machine_is_told_to_a_viewer(client: TestClient, viewer: TestClient, site: Site) -> None:
    run = finished(site).run
    snapshot = json.loads(run.config.read_text(encoding="utf-8"))
    run.config.write_text(json.dumps(snapshot | {"workspace": "/secret/place"}), encoding="utf-8")
    address = f"/api/runs/{run.run_id}/settings"
    assert client.get(address).json()["facts"]["workspace"] == "/secret/place"
    told = viewer.get(address)
    assert told.status_code == 200 and "/secret/place" not in told.text


# ---- in the browser -----------------------------------------------------------------------------------------------


@pytest.fixture
def three(app: RunningApp) -> Iterator[list[MadeRun]]:
    runs = Workspace(app.workspace).runs
    made = [MadeRun(runs, name).start(3) for name in ("alpha <b>x</b>", "beta", "gamma")]
    for run in made:
        run.step()
        run.checkpoint()
    made[0].end("finished", step=1)
    made[1].end("failed", cause="ValueError: bad row")
    made[2].end("stopped", step=1, by="owner")
    yield made
    for run in made:
        run.remove()


@pytest.mark.browser
def test_runs_are_found_filtered_opened_and_deleted_by_typing_the_name(
    page: Any, app: RunningApp, three: list[MadeRun]
) -> None:
    page.goto(f"{app.url}/runs")
    page.get_by_role("link", name="alpha <b>x</b>").wait_for()  # text, not markup
    page.get_by_label("Find a run").fill("beta")
    assert page.locator(".sb-runs-table tbody tr").count() == 1
    page.get_by_label("Find a run").fill("")
    page.get_by_role("button", name="Needs a look").click()
    assert "ValueError: bad row" in page.locator(".sb-runs-table tbody").inner_text()
    page.get_by_role("button", name="All").click()

    row = page.locator(".sb-runs-table tbody tr", has_text="gamma")
    row.get_by_role("button", name="Delete").click()
    act = page.locator(".sb-runs-dialog .sb-danger")
    assert act.is_disabled()
    page.get_by_label("The run's name").fill("gamm")
    assert act.is_disabled()
    page.get_by_label("The run's name").fill("gamma")
    act.click()
    row.wait_for(state="detached")
    assert not three[2].run.path.exists() and three[1].run.path.exists()

    page.get_by_role("link", name="beta").click()
    page.wait_for_url(f"**/live?run={three[1].run_id}")


@pytest.mark.browser
def test_a_run_is_named_and_every_tab_sees_it(page: Any, app: RunningApp, three: list[MadeRun]) -> None:
    page.goto(f"{app.url}/runs")
    page.locator(".sb-runs-table tbody tr", has_text="beta").get_by_role("button", name="Name").click()
    page.get_by_label("Name", exact=True).fill("second try")
    page.get_by_label("Why").fill("a lower rate")
    page.get_by_role("button", name="Save").click()
    page.get_by_role("link", name="second try").wait_for()
    assert json.loads(three[1].run.notes.read_text()) == {"name": "second try", "why": "a lower rate"}
