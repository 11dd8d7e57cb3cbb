"""The first batch as a person sees it: read from the collated tensors, with borders, positions, labels and what was cut."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import runs
from tests.conftest import RunningApp, end_app, start_app
from trainer import launch
from trainer.data.loader import assemble
from trainer.data.tokens import TokenCache, load_tokenizer
from trainer.loop import prepare
from trainer.loop.first_batch import first_batch
from trainer.refusal import Refusal
from trainer.worker import Worker
from trainer.workspace import Workspace
from ui.guard import Caller
from ui.site import Site
from ui.train_batch import batch_of, find_batch

SESSION = "e" * 24
OWNER = Caller("owner", SESSION, True)


def rows_file(path: Path, long: int = 3) -> Path:
    """Short rows, and `long` whose answers go on for hundreds of tokens."""
    lines = []
    for n in range(12):
        answer = f"answer {n}. " * (60 if n < long else 1)
        turns = [{"role": "user", "content": f"question {n}?"}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": turns}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_what_is_shown_is_what_the_first_step_is_given(tiny_model: Path, tmp_path: Path) -> None:
    workspace, worker = Workspace(tmp_path / "ws").create(), Worker()
    config = runs.settings(tiny_model, rows_file(tmp_path / "d.jsonl"), max_length=64, batch_size=4, packing=True)
    prompt = launch.prompt_of(config, workspace.profiles)
    try:
        shown = first_batch(config, prompt, workspace, worker)
        tokens = prepare.all_tokens(config, prompt, (workspace.tokens, workspace.profiles), worker)
    finally:
        worker.close()
    groups = prepare.plan_of(config, tokens).micro_batches(1, 4)
    batch = assemble(tokens.cache, groups[0], "cpu")
    documents = shown["documents"]
    assert tuple(document["row"] for document in documents) == batch.rows
    every = [token for document in documents for token in document["pieces"]]
    assert [token["id"] for token in every] == batch.ids[0].tolist()
    assert [token["position"] for token in every] == batch.positions[0].tolist()
    assert [at for at, token in enumerate(every) if token["trained"]] == (batch.label_at + 1).tolist()
    assert np.cumsum([document["tokens"] for document in documents]).tolist() == list(batch.documents.borders[1:])
    own = load_tokenizer(tiny_model)
    for document in documents:
        ids = [token["id"] for token in document["pieces"]]
        assert "".join(token["text"] for token in document["pieces"]) == own.decode(ids)
        whole = json.loads((tmp_path / "d.jsonl").read_text().splitlines()[document["line"] - 1])["messages"]
        length = len(own.apply_chat_template(whole, tokenize=True, return_dict=True)["input_ids"])
        assert document["cut"] == max(0, length - 64)
    assert any(document["cut"] for document in documents) and not all(document["cut"] for document in documents)
    assert all(token["special"] == token["text"].startswith("<|") for token in every)


def test_the_cache_knows_how_much_of_each_row_was_cut(tiny_model: Path, tmp_path: Path) -> None:
    workspace, worker = Workspace(tmp_path / "ws").create(), Worker()
    config = runs.settings(tiny_model, rows_file(tmp_path / "d.jsonl"), max_length=64)
    try:
        cache = prepare.all_tokens(
            config, launch.prompt_of(config, workspace.profiles), (workspace.tokens, workspace.profiles), worker
        ).cache
    finally:
        worker.close()
    assert (cache.cut > 0).tolist() == [True] * 3 + [False] * 9
    assert int(cache.cut.sum()) == cache.meta["tokens_cut"]
    assert TokenCache.open(cache.path).cut.tolist() == cache.cut.tolist()


def settled(site: Site) -> dict[str, Any]:
    deadline = time.monotonic() + 60
    while (answer := batch_of(site, OWNER))["state"] == "running":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return answer


def test_the_page_finds_the_batch_of_its_form_and_says_when_it_is_old(
    site: Site, tiny_model: Path, tmp_path: Path
) -> None:
    assert batch_of(site, OWNER) == {"state": "none"}
    with pytest.raises(Refusal, match="No model is chosen"):
        site.engine.first_batch(runs.resolve({}), lambda: False)
    data = rows_file(tmp_path / "d.jsonl")
    values = {"model_path": str(tiny_model), "data.dataset_path": str(data), "hyperparams.max_length": "64"}
    site.drafts.change(SESSION, lambda draft: replace(draft, values=values))
    assert find_batch(site, OWNER) == {"state": "running"}
    found = settled(site)
    assert found["state"] == "done" and found["changed"] == []
    first = found["batch"]["documents"][0]
    assert len(first["shown"]) == first["tokens"] and first["shown"][0][2] == 0
    assert sum(kind == "label" for _, kind, _, _ in first["shown"]) == first["labels"]
    json.dumps(found, allow_nan=False)
    site.drafts.change(SESSION, lambda draft: draft.with_value("hyperparams.max_length", "48"))
    assert settled(site)["changed"] == ["maximum length"]
    site.drafts.change(SESSION, lambda draft: draft.with_value("hyperparams.learning_rate", "1e-5"))
    assert settled(site)["changed"] == ["maximum length"], "a rate does not change the batch"
    site.drafts.change(SESSION, lambda draft: draft.with_value("hyperparams.max_length", "64"))
    assert settled(site)["changed"] == []
    data.write_text(data.read_text() + "\n")
    assert settled(site)["changed"] == ["a file"]


def test_a_batch_that_cannot_be_made_says_why(site: Site, tiny_model: Path, tmp_path: Path) -> None:
    data = tmp_path / "d.jsonl"
    data.write_text("nonsense\n")
    values = {"model_path": str(tiny_model), "data.dataset_path": str(data)}
    site.drafts.change(SESSION, lambda draft: replace(draft, values=values))
    find_batch(site, OWNER)
    found = settled(site)
    assert found["state"] == "failed" and "No row of 1 can be trained" in found["text"]
    site.drafts.change(SESSION, lambda draft: draft.with_value("hyperparams.max_length", "two"))
    with pytest.raises(Refusal, match="Mend the settings"):
        find_batch(site, OWNER)


@pytest.mark.browser
def test_the_first_batch_in_a_browser(tiny_model: Path, tmp_path: Path, page: Any) -> None:
    (tmp_path / "data").mkdir()
    rows_file(tmp_path / "data" / "rows.jsonl", long=6)
    roots = ["--model-root", str(tiny_model.parent), "--data-root", str(tmp_path / "data")]
    app: RunningApp = start_app(tmp_path / "w", "--foreground", *roots)
    try:
        page.goto(app.url)
        page.wait_for_selector("#train:not(.sb-waiting)")
        for field, name in (("#f-model_path", "tiny-qwen3"), ("#f-data-dataset_path", "rows.jsonl")):
            page.click(f"{field} input")
            page.get_by_role("option").filter(has_text=name).first.click()
        page.wait_for_function("/rows usable/.test(document.querySelector('#gate-lines').textContent)")
        page.fill("#f-hyperparams-max_length input", "80")
        page.get_by_role("button", name="First batch", exact=True).click()
        page.wait_for_selector(".sb-document, #batch-said.sb-message", timeout=60_000)
        assert page.locator(".sb-document").count(), page.inner_text("#batch-said")
        assert not page.is_visible("#view-row-pane") and "First micro-batch: 2 rows" in page.inner_text("#batch-said")
        assert page.locator(".sb-document").count() == 2
        assert page.locator(".sb-tokens > .sb-position").all_inner_texts() == ["0", "0"]
        labels = "".join(page.locator(".sb-document .sb-tok-label").all_inner_texts())
        assert "answer" in labels and "question" not in labels
        second = page.locator(".sb-document").nth(1).locator(".sb-tok").first
        assert second.get_attribute("title").startswith("position 0, place ")
        cut = page.locator(".sb-document .sb-tok-cut")
        assert cut.count() >= 1 and "tokens cut" in cut.first.text_content()
        page.fill("#f-hyperparams-max_length input", "96")
        page.wait_for_selector("#batch-body.sb-batch-old")
        assert page.inner_text("#batch-said") == "Out of date: maximum length changed."
        page.click("#batch-again")
        page.wait_for_selector("#batch-body:not(.sb-batch-old)", timeout=60_000)
        assert "First micro-batch" in page.inner_text("#batch-said")
        page.get_by_role("button", name="One row", exact=True).click()
        assert page.is_visible("#view-row-pane") and not page.is_visible("#view-batch")
        page.goto("about:blank")
    finally:
        end_app(app)
