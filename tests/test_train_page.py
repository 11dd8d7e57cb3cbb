"""The Train page in a real browser, on a real server: what a person does and what then is true on disk."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import RunningApp, end_app, start_app

pytestmark = pytest.mark.browser
RATE = "#f-hyperparams-learning_rate"


@pytest.fixture(scope="module")
def train_app(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_dataset: Path) -> Iterator[RunningApp]:
    """A server that knows one tiny model and two datasets."""
    data = tmp_path_factory.mktemp("train-data")
    shutil.copy(tiny_dataset, data / "good.jsonl")
    lines = tiny_dataset.read_text(encoding="utf-8").splitlines()
    short = {"messages": [{"role": "user", "content": "Only a question <script>alert(1)</script>"}]}
    (data / "mixed.jsonl").write_text("\n".join([json.dumps(short), "{broken", *lines[:20]]) + "\n")
    roots = ["--model-root", str(tiny_model.parent), "--data-root", str(data)]
    app = start_app(tmp_path_factory.mktemp("train-workspace"), "--foreground", *roots)
    yield app
    end_app(app)


@pytest.fixture
def train(train_app: RunningApp, page: Any) -> Any:
    """A fresh session's Train page."""
    opened(page, train_app)
    return page


def opened(page: Any, app: RunningApp) -> None:
    page.goto(app.url)
    page.wait_for_selector("#train:not(.sb-waiting)")
    page.wait_for_function("document.querySelector('#f-hyperparams-learning_rate input').value !== ''")


def visit(page: Any, app: RunningApp, path: str) -> None:
    """Go to another page and wait until Gradio has built it; it complains when left before."""
    page.goto(f"{app.url}/{path}")
    page.wait_for_selector("#sb-status")
    page.wait_for_load_state("load")


def until(what: Callable[[], bool], limit_s: float = 20.0) -> None:
    deadline = time.monotonic() + limit_s
    while not what():
        assert time.monotonic() < deadline, "this did not happen in time"
        time.sleep(0.05)


def pick(page: Any, field: str, name: str) -> None:
    page.click(f"{field} input")
    page.get_by_role("option").filter(has_text=name).first.click()


def choose(page: Any, data: str = "good.jsonl") -> None:
    """Choose the tiny model and a dataset, and wait until both are checked."""
    pick(page, "#f-model_path", "tiny-qwen3")
    pick(page, "#f-data-dataset_path", data)
    page.wait_for_function("/rows usable|rows are usable/.test(document.querySelector('#gate-lines').textContent)")


def draft_of(app: RunningApp) -> dict[str, Any]:
    drafts = sorted((app.workspace / "drafts").glob("*.json"), key=lambda path: path.stat().st_mtime)
    return json.loads(drafts[-1].read_text()) if drafts else {"values": {}, "why": ""}


def changes(page: Any) -> str:
    return page.inner_text("#train-changes")


def test_the_page_asks_no_other_host_and_opens_with_what_blocks(train_app: RunningApp, page: Any) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    opened(page, train_app)
    assert page.inner_text("#gate-head").strip() == "2 problems"
    assert page.is_disabled("#train-start") and page.is_disabled("#train-smoke")
    page.get_by_role("button", name="Choose a model").click()
    assert page.evaluate("document.activeElement.closest('.sb-field').id") == "f-model_path"
    assert [url for url in asked if not url.startswith((train_app.url, "data:", "blob:"))] == []


def test_choosing_model_and_data_shows_the_row_as_tokens_and_opens_the_start(train_app: RunningApp, train: Any) -> None:
    choose(train)
    until(lambda: train.is_enabled("#train-start"))
    train.wait_for_selector(".sb-tok-label")
    labels = "".join(train.locator(".sb-tokens .sb-tok-label").all_inner_texts())
    assert labels == "0 plus 0 is 0.<|im_end|>"
    train.click("#view-next")
    train.wait_for_function("document.querySelector('.sb-tokens').textContent.includes('1 plus 1')")
    train.get_by_role("button", name="Text", exact=True).click()
    said = train.locator("#view-body .sb-said").all_inner_texts()
    assert "What is 1 plus 1?" in said and "You are a helpful assistant." in said
    assert "2 steps · 1 epoch" in train.inner_text("#gate-plan") or "3 steps · 1 epoch" in train.inner_text(
        "#gate-plan"
    )


def test_the_draft_survives_a_reload_and_another_page(train_app: RunningApp, train: Any) -> None:
    choose(train)
    train.fill(f"{RATE} input", "3e-4")
    until(lambda: changes(train) == "3 changes")
    visit(train, train_app, "runs")
    opened(train, train_app)
    assert train.input_value(f"{RATE} input") == "3e-4"
    assert train.input_value("#f-model_path input") == "tiny-qwen3"
    assert changes(train) == "3 changes"


def test_what_is_typed_right_before_leaving_is_kept(train_app: RunningApp, train: Any) -> None:
    train.fill(f"{RATE} input", "4e-4")
    visit(train, train_app, "data")
    opened(train, train_app)
    assert train.input_value(f"{RATE} input") == "4e-4"


def test_deleting_and_pasting_are_changes_too(train_app: RunningApp, train: Any) -> None:
    box = train.locator(f"{RATE} input")
    box.click()
    box.press("End")
    box.press("Backspace")  # Gradio's own input event does not hear of it
    until(lambda: draft_of(train_app)["values"] == {"hyperparams.learning_rate": "2e-"})
    train.wait_for_selector(f"{RATE}.sb-bad")
    assert train.inner_text(f"{RATE}-message") == 'Learning rate is "2e-". Allowed: 0 to 1.'


def test_a_value_out_of_bounds_is_named_at_its_field_and_stops_the_start(train_app: RunningApp, train: Any) -> None:
    choose(train)
    until(lambda: train.is_enabled("#train-start"))
    height = train.locator(RATE).bounding_box()["height"]
    train.fill(f"{RATE} input", "5")
    train.wait_for_selector(f"{RATE}.sb-bad")
    assert train.inner_text(f"{RATE}-message") == "Learning rate is 5. Allowed: 0 to 1."
    assert train.get_attribute(f"{RATE} input", "aria-invalid") == "true"
    assert train.is_disabled("#train-start") and train.is_disabled("#bottom-start")
    assert abs(train.locator(RATE).bounding_box()["height"] - height) <= 1, "the page moved"
    train.get_by_role("button", name="Go to the field").click()
    assert train.evaluate("document.activeElement.closest('.sb-field').id") == RATE[1:]
    train.fill(f"{RATE} input", "1e-3")
    until(lambda: train.is_enabled("#train-start"))
    # the same rule holds on the server, whatever the page shows
    session = train.context.request
    train.fill(f"{RATE} input", "5")
    train.wait_for_selector(f"{RATE}.sb-bad")
    refused = session.post(f"{train_app.url}/api/train/start", data={})
    assert refused.status == 400
    assert refused.json()["error"] == "Cannot start yet: learning rate is 5. Allowed: 0 to 1."
    assert list((train_app.workspace / "runs").iterdir()) == []


def test_a_method_brings_its_rate_says_so_and_takes_it_back(train: Any) -> None:
    train.get_by_label("Full", exact=True).check()
    train.wait_for_function(f"document.querySelector('{RATE} input').value === '1e-5'")
    train.wait_for_selector(f"{RATE}.sb-noted")
    assert "Set to 1e-5 with the method" in train.inner_text(f"{RATE}-message")
    train.click("#train-changes")
    train.get_by_role("button", name="Undo Method").click()
    train.wait_for_function(f"document.querySelector('{RATE} input').value === '2e-4'")
    until(lambda: changes(train) == "no changes")
    train.fill(f"{RATE} input", "7e-4")
    until(lambda: changes(train) == "1 change")
    train.get_by_label("Full", exact=True).check()
    until(lambda: changes(train) == "2 changes")
    assert train.input_value(f"{RATE} input") == "7e-4", "a rate chosen by hand was overwritten"


def test_revert_can_be_taken_back(train: Any) -> None:
    train.fill(f"{RATE} input", "7e-4")
    until(lambda: changes(train) == "1 change")
    train.click("#train-revert")
    train.wait_for_function(f"document.querySelector('{RATE} input').value === '2e-4'")
    until(lambda: changes(train) == "changes dropped")
    train.click("#train-changes")
    train.get_by_role("button", name="Bring back").click()
    train.wait_for_function(f"document.querySelector('{RATE} input').value === '7e-4'")


def test_bad_rows_are_counted_by_kind_and_their_text_is_harmless(train: Any) -> None:
    choose(train, "mixed.jsonl")
    text = train.inner_text("#gate-lines")
    assert "20 of 22 rows are usable" in text and "2 have problems: " in text
    train.get_by_role("button", name="Text", exact=True).click()
    train.wait_for_function("document.querySelector('#view-body').textContent.includes('nothing to learn')")
    assert train.locator("#view-body script").count() == 0


def test_suggestions_have_reasons_and_are_taken_with_one_click(train: Any) -> None:
    choose(train)
    train.click("#train-suggest")
    train.wait_for_selector("#train-suggestions table")
    assert "The longest row has" in train.inner_text("#train-suggestions")
    train.get_by_role("button", name="Use these").click()
    train.wait_for_function("document.querySelector('#f-hyperparams-max_length input').value === '64'")
    assert train.input_value("#f-hyperparams-num_epochs input") == "3"


def test_the_memory_bar_moves_while_somebody_types_and_no_line_stays_grey(train: Any) -> None:
    choose(train)
    until(lambda: "Memory by part" in train.inner_text("#gate-fit"))
    before = train.inner_html("#gate-fit")
    # measured on a quiet machine: 125 ms (docs/fit.md); the limit here is that of a busy one
    moved_ms = train.evaluate("""async () => {
        const box = document.querySelector('#f-hyperparams-batch_size input'), fit = document.querySelector('#gate-fit');
        const before = fit.innerHTML, start = performance.now();
        const moved = new Promise((resolve) => new MutationObserver(() => fit.innerHTML !== before && resolve())
          .observe(fit, { childList: true, subtree: true }));
        box.value = '1024';
        box.dispatchEvent(new Event('input', { bubbles: true }));
        window.wasGrey = document.querySelector('#gate-lines [data-code="memory"]').classList.contains('sb-touched');
        await moved;
        return performance.now() - start;
      }""")
    assert moved_ms < 2000 and train.inner_html("#gate-fit") != before
    assert train.evaluate("window.wasGrey"), "the line that judged it is grey from the first key on"
    until(lambda: train.locator("#gate-lines .sb-touched").count() == 0)


def test_saving_keeps_the_version_before_and_puts_it_back(train_app: RunningApp, train: Any) -> None:
    train.click("#train-save-as")
    for rate in ("1e-3", "2e-3"):
        train.fill(f"{RATE} input", rate)
        until(lambda: changes(train) == "1 change")
        train.fill("#train-save-name", "mine")
        train.get_by_role("button", name="Save", exact=True).click()
        until(lambda: changes(train) == "no changes")
    saved = train_app.workspace / "configs" / "mine.json"
    assert json.loads(saved.read_text())["hyperparams"]["learning_rate"] == 2e-3
    assert train.input_value("#train-config") == "mine"
    train.get_by_role("button", name="Put back").click()
    train.wait_for_function(f"document.querySelector('{RATE} input').value === '1e-3'")
    assert json.loads(saved.read_text())["hyperparams"]["learning_rate"] == 1e-3
    train.select_option("#train-config", "")
    train.wait_for_function(f"document.querySelector('{RATE} input').value === '2e-4'")


def test_a_config_cannot_be_saved_outside_its_folder(train_app: RunningApp, train: Any) -> None:
    for name in ("../evil", "a/b", ".hidden", " "):
        reply = train.context.request.post(f"{train_app.url}/api/train/save", data={"name": name})
        assert reply.status == 400, name
    assert not list(train_app.workspace.glob("**/*evil*"))


def test_settings_are_found_by_their_words_wherever_they_are(train: Any) -> None:
    assert not train.is_visible("#f-data-seed")
    train.fill("#train-find", "same seed")
    assert train.is_visible("#f-data-seed") and not train.is_visible(RATE)
    train.fill("#train-find", "save_total")
    assert train.is_visible("#f-output-save_total_limit"), "a closed group opens for a hit"
    train.fill("#train-find", "nonsense")
    assert train.inner_text("#train-said") == "No setting has these words."
    train.fill("#train-find", "")
    train.get_by_role("button", name="All", exact=True).click()
    assert train.is_visible("#f-data-seed")


def test_two_tabs_of_a_session_show_one_form(train_app: RunningApp, train: Any) -> None:
    other = train.context.new_page()
    opened(other, train_app)
    train.bring_to_front()
    train.fill(f"{RATE} input", "9e-4")
    other.bring_to_front()
    other.wait_for_function(f"document.querySelector('{RATE} input').value === '9e-4'", timeout=15_000)


def test_every_field_says_what_it_is_to_a_screen_reader(train: Any) -> None:
    train.get_by_role("button", name="All", exact=True).click()
    bad = train.evaluate("""() => [...document.querySelectorAll('#train .sb-field')].filter((field) => {
        const input = field.querySelector('input, textarea');
        const named = input.getAttribute('aria-label') || input.closest('label')?.textContent.trim()
          || field.querySelector('[data-testid="block-info"]')?.textContent.trim();
        const described = input.getAttribute('aria-describedby');
        return !named || !described || !described.split(' ').every((id) => document.getElementById(id));
      }).map((field) => field.id)""")
    assert bad == []


def test_nothing_is_wider_than_the_window(train: Any) -> None:
    for width in (360, 390, 768, 1024, 1440):
        train.set_viewport_size({"width": width, "height": 844})
        assert train.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0, width


def test_on_a_phone_start_is_in_reach_without_scrolling(train: Any) -> None:
    train.set_viewport_size({"width": 390, "height": 844})
    for button in ("#bottom-gate", "#bottom-smoke", "#bottom-start"):
        box = train.locator(button).bounding_box()
        assert box["y"] >= 0 and box["y"] + box["height"] <= 844 and box["height"] >= 44
    train.click("#bottom-gate")
    until(lambda: 0 <= train.locator("#gate-title").bounding_box()["y"] < 844)


def test_start_makes_a_run_of_exactly_what_the_form_says(train_app: RunningApp, train: Any) -> None:
    choose(train)
    train.get_by_role("button", name="All", exact=True).click()
    train.fill("#f-hyperparams-max_steps input", "2")
    train.fill("#train-why", "to see it start")
    until(lambda: draft_of(train_app)["why"] == "to see it start")
    until(lambda: train.is_enabled("#train-start"))
    train.fill(f"{RATE} input", "3e-4")
    train.click("#train-start")  # at once: what was typed a moment ago must be in the run
    train.wait_for_url("**/live?run=*", timeout=30_000)
    run = train_app.workspace / "runs" / train.url.rsplit("=", 1)[1]
    config = json.loads((run / "config.json").read_text())["config"]
    assert config["hyperparams"]["learning_rate"] == 3e-4 and config["hyperparams"]["max_steps"] == 2
    assert json.loads((run / "notes.json").read_text())["why"] == "to see it start"
    until(lambda: train_app.get("api/state")["run"] is None, 90)


def test_the_smoke_test_fills_the_gate_and_grows_old_when_a_setting_changes(train_app: RunningApp, train: Any) -> None:
    choose(train)
    until(lambda: train.is_enabled("#train-smoke"))
    train.click("#train-smoke")
    smoke = train.locator('#gate-lines [data-code="smoke"]')
    until(lambda: "Stop the smoke test" in train.inner_text("#train-smoke"))
    until(lambda: "passed" in smoke.text_content() or "failed" in smoke.text_content(), 90)
    assert "passed" in smoke.text_content(), smoke.text_content()
    assert "about" in train.inner_text("#gate-plan"), "the time is known now"
    until(lambda: "calibrated by " in train.locator('#gate-lines [data-code="memory"]').text_content())
    train.fill("#f-hyperparams-max_length input", "48")
    until(lambda: "out of date, maximum length changed" in smoke.text_content())


def test_try_it_now_makes_everything_and_starts(tmp_path: Path, page: Any) -> None:
    app = start_app(tmp_path / "w", "--foreground")
    try:
        page.goto(app.url)
        page.wait_for_selector("#train:not(.sb-waiting)")
        assert page.is_visible("#train-first") and not page.is_visible("#train-form")
        page.get_by_role("button", name="Try it now").click()
        page.wait_for_url("**/live?run=*", timeout=60_000)
        (run,) = (app.workspace / "runs").iterdir()
        assert json.loads((run / "notes.json").read_text())["name"] == "First try"
        opened(page, app)
        assert page.is_visible("#train-form"), "afterwards the form is there, with what is running"
        page.goto("about:blank")  # or the page would say that its server is gone
    finally:
        end_app(app)


@pytest.mark.browser
def test_a_further_file_is_chosen_with_its_weight(train_app: RunningApp, train: Any) -> None:
    choose(train)
    train.get_by_role("button", name="All", exact=True).click()
    train.select_option("#more-data-file", label=next(t for t in _offered(train) if t.startswith("mixed.jsonl")))
    train.fill("#more-data-weight", "0")
    train.locator("#more-data button").click()
    assert "over 0, at most 100" in train.inner_text("#more-data")
    train.fill("#more-data-weight", "0.5")
    train.locator("#more-data button").click()
    assert train.input_value("#f-data-dataset_paths textarea").endswith("mixed.jsonl * 0.5")
    until(lambda: "mixed.jsonl * 0.5" in str(draft_of(train_app)["values"].get("data.dataset_paths")))
    train.wait_for_function("/have problems/.test(document.querySelector('#gate-lines').textContent)")


def _offered(page: Any) -> list[str]:
    until(lambda: page.locator("#more-data-file option").count() > 1)
    return page.locator("#more-data-file option").all_text_contents()
