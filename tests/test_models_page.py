"""The Models page: what lies in the roots with its report, broken folders named, the starter model made by a job."""

from __future__ import annotations

import json
import shutil
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import RunningApp
from trainer.models.inspect import inspect_model
from ui.report import KINDS, model_view


def post(app: RunningApp, path: str, body: Any = None) -> None:
    """A POST with JSON."""
    request = urllib.request.Request(f"{app.url}/{path}", json.dumps(body or {}).encode(), method="POST")
    urllib.request.urlopen(request, timeout=20).close()


def report(app: RunningApp, name: str, **options: Any) -> dict[str, Any]:
    """The report on a model of the workspace, checked now."""
    item = next(item for item in app.get("api/models")["items"] if item["name"] == name)["id"]
    post(app, f"api/models/{item}/check", options)
    deadline = time.monotonic() + 90
    while (found := app.get(f"api/models/{item}"))["state"] == "running":
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return found


def test_a_good_model_is_good_and_its_facts_are_those_of_its_files(tiny_model: Path) -> None:
    view = model_view(inspect_model(tiny_model))
    facts = dict(view["facts"])
    assert (view["status"], view["word"], view["groups"]) == ("pass", "good", [])
    config = json.loads((tiny_model / "config.json").read_text())
    assert facts["Kind"] == "a whole model"
    assert facts["Architecture"] == config["architectures"][0]
    assert facts["Longest row"] == f"{config['max_position_embeddings']} tokens"
    assert facts["Chat template"] == "yes"


def test_a_broken_folder_is_reported_with_file_cause_and_fix(tiny_model: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(tiny_model, tmp_path / "broken")
    weights = next(broken.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    view = model_view(inspect_model(broken))
    assert view["status"] == "problem" and view["word"] == "cannot be trained"
    assert view["headline"].startswith("Cannot train this folder:")
    assert weights.name in view["groups"][0]["title"] and view["groups"][0]["fix"]


def test_every_kind_the_inspector_knows_has_words(tmp_path: Path) -> None:
    doc = inspect_model.__doc__ or ""
    named = doc.split("one of ")[1].split(".")[0].replace("\n", " ")
    assert {kind.strip() for kind in named.split(",")} == set(KINDS)


def test_a_model_in_the_workspace_is_listed_checked_and_checked_again_in_depth(
    app: RunningApp, tiny_model: Path
) -> None:
    shutil.copytree(tiny_model, app.workspace / "models" / "listed", dirs_exist_ok=True)
    found = report(app, "listed")
    assert found["state"] == "done" and found["view"]["word"] == "good"
    assert report(app, "listed", deep=True)["view"]["word"] == "good"


def test_a_model_whose_weights_are_not_numbers_is_found_in_depth(app: RunningApp, tiny_model: Path) -> None:
    import numpy as np
    from safetensors.numpy import load_file, save_file

    folder = shutil.copytree(tiny_model, app.workspace / "models" / "nan", dirs_exist_ok=True)
    tensors = load_file(folder / "model.safetensors")
    name = sorted(tensors)[0]
    spoilt = tensors[name].copy()
    spoilt.flat[3] = np.nan
    save_file({**tensors, name: spoilt}, folder / "model.safetensors", {"format": "pt"})
    assert report(app, "nan")["view"]["word"] == "good", "headers alone cannot show it"
    view = report(app, "nan", deep=True)["view"]
    assert view["word"] == "cannot be trained" and name in json.dumps(view["groups"])


def test_a_tensor_that_is_missing_is_found_after_the_headers_were_shown(app: RunningApp, tiny_model: Path) -> None:
    from safetensors.numpy import load_file, save_file

    folder = shutil.copytree(tiny_model, app.workspace / "models" / "lacking", dirs_exist_ok=True)
    tensors = load_file(folder / "model.safetensors")
    lost = next(name for name in sorted(tensors) if "down_proj" in name)
    save_file({name: value for name, value in tensors.items() if name != lost}, folder / "model.safetensors")
    item = next(item for item in app.get("api/models")["items"] if item["name"] == "lacking")["id"]
    post(app, f"api/models/{item}/check")
    seen: list[dict[str, Any]] = []
    deadline = time.monotonic() + 120
    while (found := app.get(f"api/models/{item}"))["state"] == "running":
        seen += [found] if found["view"] else []
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert seen and seen[0]["word"] == "checking shapes" and seen[0]["view"]["status"] == "pass"
    assert dict(seen[0]["view"]["facts"])["Names and shapes"] == "being compared"
    assert found["view"]["word"] == "cannot be trained" and lost in found["view"]["headline"]
    assert dict(found["view"]["facts"])["Names and shapes"].startswith("other than")
    assert list((app.workspace / "cache" / "layouts").glob("*.json")), "the layout is kept for the next check"


@pytest.mark.browser
def test_a_folder_named_like_markup_is_only_a_name(app: RunningApp, page: Any, tiny_model: Path) -> None:
    name = "<img src=x onerror=window.__x=1>"
    folder = app.workspace / "models" / name
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": name, "architectures": [name]}))
    page.goto(f"{app.url}/models")
    page.wait_for_function("document.querySelector('.sb-shelf-list')?.innerText.includes('<img')")
    page.get_by_role("button", name=name).click()
    page.wait_for_function(
        "document.querySelector('.sb-shelf-report')?.innerText.includes('Cannot train')", timeout=60_000
    )
    assert page.evaluate("window.__x") is None
    assert page.locator(".sb-shelf img").count() == 0
    shutil.rmtree(folder)


@pytest.mark.browser
def test_models_are_checked_without_being_asked_and_problems_are_said(
    app: RunningApp, page: Any, tiny_model: Path
) -> None:
    shutil.copytree(tiny_model, app.workspace / "models" / "a-good-one", dirs_exist_ok=True)
    broken = shutil.copytree(tiny_model, app.workspace / "models" / "a-broken-one", dirs_exist_ok=True)
    (broken / "tokenizer.json").unlink()
    page.goto(f"{app.url}/models")
    page.wait_for_function(
        """() => { const rows = [...document.querySelectorAll('.sb-shelf-table tbody tr')].map(r => r.innerText);
        return rows.some(r => r.includes('a-good-one') && r.trim().endsWith('good'))
            && rows.some(r => r.includes('a-broken-one') && r.includes('cannot be trained')); }""",
        timeout=60_000,
    )
    page.get_by_role("button", name="a-broken-one").click()
    page.wait_for_function("document.querySelector('.sb-shelf-report').innerText.includes('tokenizer')")
    assert "Cannot train this folder" in page.inner_text(".sb-shelf-report")


def test_the_starter_model_and_its_data_are_made_by_a_job_and_can_be_trained(app: RunningApp) -> None:
    post(app, "api/models/starter")
    deadline = time.monotonic() + 240
    while (state := app.get("api/models/starter"))["state"] == "running":
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert state == {"state": "done", "error": None}
    names = {item["name"] for item in app.get("api/models")["items"]}
    made = next(name for name in names if "starter" in name.lower())
    assert report(app, made)["view"]["status"] != "problem"
    assert any("starter" in item["name"].lower() for item in app.get("api/data")["items"])
