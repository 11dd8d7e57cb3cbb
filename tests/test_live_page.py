"""The live board in a real browser, over runs that the trainer's own writers (and once the trainer itself) write."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ASSETS, ROOT, RunningApp
from tests.live_board import LOSS, at_step_30, drawn, open_board, runs_in, wait_until
from tests.made_runs import SPIKE_LOSS, MadeRun, write_long_run
from trainer.workspace import Workspace
from ui.pages import live, runs

pytestmark = pytest.mark.browser
BOTH = "['.sb-chart-loss', '.sb-chart-memory'].map((chart) => document.querySelector(chart))"


@pytest.fixture
def make(app: RunningApp) -> Iterator[Callable[..., MadeRun]]:
    yield from runs_in(app)


@pytest.fixture
def made(make: Callable[..., MadeRun]) -> MadeRun:
    return at_step_30(make)


def test_twenty_points_arrive_while_somebody_watches_at_half_a_kibibyte_an_update(
    page: Any, app: RunningApp, made: MadeRun
) -> None:
    open_board(page, app, made.run_id, 30)
    sizes: list[int] = []
    page.on("response", lambda reply: "/feed?" in reply.url and sizes.append(len(reply.body())))
    before, updates = drawn(page), 0
    for _ in range(22):
        made.step()
        time.sleep(0.12)
    wait_until(page, f"document.querySelector('{LOSS}').data[0].x.length >= {before + 20}")
    page.wait_for_timeout(1200)
    made.step()
    updates = len(sizes)
    wait_until(page, f"document.querySelector('{LOSS}').data[0].x.length >= {before + 23}")
    page.wait_for_timeout(200)
    assert len(sizes) > updates and sizes[updates] <= 512, sizes
    assert page.locator(".sb-live-steps").inner_text() == "53 / 200"


def test_zoom_survives_three_updates_and_every_chart_shows_the_same_stretch(
    page: Any, app: RunningApp, made: MadeRun
) -> None:
    open_board(page, app, made.run_id, 30)
    box = page.locator(f"{LOSS} .nsewdrag").first.bounding_box()
    page.mouse.move(box["x"] + 200, box["y"] + 60)
    page.mouse.down()
    page.mouse.move(box["x"] + 600, box["y"] + 200, steps=8)
    page.mouse.up()
    ranges = f"{BOTH}.map((box) => box.layout.xaxis.range.map((x) => Math.round(x * 100)))"
    wait_until(page, f"JSON.stringify({ranges}[0]) === JSON.stringify({ranges}[1]) && {ranges}[0][1] < 3000")
    zoomed = page.evaluate(ranges)
    node = page.evaluate_handle(f"document.querySelector('{LOSS} .main-svg')")
    for update in range(1, 4):
        made.step()
        wait_until(page, f"document.querySelector('{LOSS}').data[0].x.length === {30 + update}")
        assert page.evaluate(ranges) == zoomed
    assert node.evaluate("(svg) => svg.isConnected")  # the same drawing, extended, not a new one
    page.get_by_label("More for this chart").click()
    page.get_by_role("menuitem", name="Reset zoom").click()
    wait_until(page, f"{ranges}[0][1] >= 3300")


def test_a_reload_and_a_second_tab_show_the_same(page: Any, app: RunningApp, made: MadeRun) -> None:
    def shown(tab: Any) -> list[str]:
        wait_until(tab, f"(document.querySelector('{LOSS}')?.data?.[0]?.x.length ?? 0) >= 30")
        return tab.locator(".sb-live-value").all_inner_texts() + tab.locator(".sb-live-events li").all_inner_texts()

    open_board(page, app, made.run_id, 30)
    first = shown(page)
    second = page.context.new_page()
    second.goto(f"{app.url}/live")  # the running one, without naming it
    assert shown(second) == first
    assert made.run_id in second.url
    page.bring_to_front()  # a tab that nobody sees does not ask
    page.reload()
    assert shown(page) == first
    assert first[0] == "1.368" and "19.2 / 24.0 GiB" in first


def test_nan_is_a_mark_on_the_curve_and_a_word_in_the_figure_never_zero(
    page: Any, app: RunningApp, made: MadeRun
) -> None:
    open_board(page, app, made.run_id, 30)
    made.step(loss=float("nan"))
    wait_until(page, "document.querySelector('.sb-live-value').textContent === 'NaN'")
    wait_until(page, f"document.querySelector('{LOSS}').data[0].x.length === 31")
    data = page.evaluate(
        f"document.querySelector('{LOSS}').data.map((t) => ({{name: t.name, x: [...t.x], y: [...t.y], text: t.text}}))"
    )
    loss, marks = data[0], next(trace for trace in data if trace["name"] == "NaN")
    assert loss["y"][-1] is None and 0 not in loss["y"]
    assert marks["x"] == [31] and marks["text"] == ["step 31: loss is NaN"]
    assert page.locator(f"{LOSS} .points path.point").count() >= 1


def test_without_a_server_the_figures_stay_and_the_page_says_since_when(
    browser: Any, app: RunningApp, made: MadeRun
) -> None:
    context = browser.new_context()  # a page of its own: the browser rightly reports the failed requests
    page = context.new_page()
    open_board(page, app, made.run_id, 30)
    before = page.locator(".sb-live-value").all_inner_texts()
    page.route("**/feed?*", lambda route: route.abort())
    page.wait_for_timeout(1500)  # an answer on its way would be stamped by a clock that is just being put in
    page.clock.install()
    page.clock.run_for(130_000)
    bar = page.locator(".sb-live-bar.sb-tone-warn")
    bar.wait_for()
    assert re.fullmatch(r"No answer since \d\d:\d\d \(2 min( \d+ s)?\)\. Trying again\.", bar.inner_text())
    assert page.locator(".sb-live-value").all_inner_texts() == before
    page.unroute("**/feed?*")
    page.clock.run_for(16_000)
    bar.wait_for(state="hidden")
    context.close()


def test_names_logs_and_samples_are_text_and_run_nothing(
    page: Any, app: RunningApp, make: Callable[..., MadeRun]
) -> None:
    evil = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
    made = make(evil, why=evil).start()
    made.step()
    made.events.append("log", text=evil)
    made.events.append("alert", code="spike", step=1, text=evil)
    made.events.append("sample", step=1, prompt=evil, text=evil, base=evil)
    made.end("failed", cause=evil, detail=evil)
    open_board(page, app, made.run_id, 1)
    for tab in ("Log", "Settings", "Checkpoints", "Samples"):
        page.get_by_role("tab", name=tab).click()
    page.wait_for_timeout(300)
    assert page.title() != "owned"
    assert page.locator(".sb-live img, .sb-live script").count() == 0
    assert evil in page.locator(".sb-live-title summary").inner_text()


def test_the_curve_takes_the_colours_of_the_theme_and_changes_with_it(
    page: Any, app: RunningApp, made: MadeRun
) -> None:
    open_board(page, app, made.run_id, 30)
    line = f"document.querySelector('{LOSS}').data[1].line.color"
    colours = f"[{line}, getComputedStyle(document.body).getPropertyValue('--sb-run').trim()]"
    light = page.evaluate(colours)
    page.evaluate("document.body.classList.toggle('dark')")
    wait_until(page, f"{colours}[0] !== {json.dumps(light[0])}")
    dark = page.evaluate(colours)
    assert light[0] == light[1] and dark[0] == dark[1] != light[0]


def test_the_board_fits_the_screen_the_loss_is_tall_and_time_and_step_are_one_axis(
    page: Any, app: RunningApp, made: MadeRun
) -> None:
    open_board(page, app, made.run_id, 30)
    assert page.locator(LOSS).bounding_box()["height"] >= 300
    assert page.locator(".sb-tabs").bounding_box()["y"] < 880
    ranges = f"{BOTH}.map((box) => JSON.stringify(box.layout.xaxis.range))"
    edges = f"{BOTH}.map((box) => box.querySelector('.nsewdrag').getBoundingClientRect())"
    for axis in ("time", "step"):
        page.get_by_role("button", name=axis, exact=True).click()
        wait_until(page, f"{ranges}[0] === {ranges}[1]")
        suffix = page.evaluate(f"document.querySelector('{LOSS}').layout.xaxis.ticksuffix")
        assert (suffix == "") == (axis == "step")
        assert len(set(page.evaluate(f"{edges}.map((b) => `${{b.left}} ${{b.right}}`)"))) == 1


def test_on_a_phone_nothing_is_cut_off_and_the_actions_stay_under_the_thumb(
    browser: Any, app: RunningApp, made: MadeRun
) -> None:
    context = browser.new_context(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    page = context.new_page()
    open_board(page, app, made.run_id, 30)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.locator(LOSS).bounding_box()["height"] == 220
    page.mouse.wheel(0, 600)
    for name in ("Pause", "Stop"):
        box = page.get_by_role("button", name=name, exact=True).bounding_box()
        assert box["y"] + box["height"] <= 844 and box["height"] >= 44
    context.close()


def test_somebody_away_for_an_hour_is_told_what_happened_since(page: Any, app: RunningApp, made: MadeRun) -> None:
    made.events.append("alert", code="spike", step=20, text="spike")
    made.events.append("bad_row", step=21, row=7, file="a.jsonl", line=8, text="Left out of step 21: a.jsonl, line 8")
    seen = json.dumps({made.run_id: {"at": time.time() - 3600, "step": 10, "loss": 2}})
    page.add_init_script(f"localStorage.setItem('signalbox.seen', {json.dumps(seen)})")
    open_board(page, app, made.run_id, 30)
    line = page.locator(".sb-live-back")
    line.wait_for()
    assert re.fullmatch(
        r"Since you last looked \(.+\): 20 steps · loss 2\.000 → 1\.\d{3} · 2 alerts\.", line.inner_text()
    )
    assert "Left out of step 21: a.jsonl, line 8" in page.locator(".sb-live-alarms").inner_text()
    assert "a.jsonl line 8 left out from 21 on" in page.locator(".sb-live-events").inner_text()


def test_preparing_shows_its_steps_with_figures_and_draws_memory_already(
    page: Any, app: RunningApp, make: Callable[..., MadeRun]
) -> None:
    made = make("early")
    made.events.append("started", owner="owner", life=1)
    made.events.append("phase", name="tokenise", done=8100, total=12408)
    made.sample()
    page.goto(f"{app.url}/live?run={made.run_id}")
    steps = page.locator(".sb-live-preparing li")
    steps.filter(has_text="tokenise 8,100/12,408").wait_for()
    assert steps.all_inner_texts() == ["check", "tokenise 8,100/12,408", "first step"]
    wait_until(page, "document.querySelector('.sb-chart-memory')?.data?.[0]?.x.length === 1")
    assert page.locator(".sb-live-value").all_inner_texts()[:2] == ["–", "–"]
    ranges = f"{BOTH}.map((box) => JSON.stringify(box._fullLayout.xaxis.range))"
    page.wait_for_timeout(2500)  # nothing new is drawn above, but time goes on below
    wait_until(page, f"{ranges}[0] === {ranges}[1] && document.querySelector('{LOSS}')._fullLayout.xaxis.range[1] > 2")
    made.events.append("running", step=0)
    made.events.append("phase", name="train")
    made.step()
    wait_until(page, f"document.querySelector('{LOSS}').layout.xaxis.ticksuffix === ''")  # from time to steps
    page.locator(".sb-live-preparing").wait_for(state="hidden")


def test_a_click_on_the_curve_opens_the_rows_of_that_step(page: Any, app: RunningApp, made: MadeRun) -> None:
    open_board(page, app, made.run_id, 30)
    box = page.locator(f"{LOSS} .nsewdrag").first.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + box["height"] * 0.5)
    page.locator(f"{LOSS} .hoverlayer .hovertext, {LOSS} .hoverlayer .legend").first.wait_for()
    page.mouse.down()
    page.mouse.up()
    page.get_by_text(re.compile(r"2 rows of step 1[45], highest loss first")).wait_for()


def test_a_run_of_a_hundred_thousand_steps_opens_thinned_and_goes_on(page: Any, app: RunningApp, made: MadeRun) -> None:
    write_long_run(made, 100_000, spike_at=33_333, nan_at=50_000)
    made.events.append("rewind", step=100_000)
    open_board(page, app, made.run_id, 1000)
    assert drawn(page) <= 2000
    assert page.evaluate(f"Math.max(...document.querySelector('{LOSS}').data[0].y)") == SPIKE_LOSS
    before = drawn(page)
    made.step()
    wait_until(page, f"document.querySelector('{LOSS}').data[0].x.length === {before + 1}")
    assert page.evaluate(f"document.querySelector('{LOSS}').data[0].x.at(-1)") == 100_001


def test_without_a_run_the_page_says_what_the_machine_is_and_follows_the_next_one_by_itself(
    page: Any, app: RunningApp, make: Callable[..., MadeRun]
) -> None:
    page.goto(f"{app.url}/live")
    page.get_by_text(re.compile(r"^Idle · .+ GiB free")).wait_for()
    assert page.get_by_role("link", name="Start a run").is_visible()
    made = make("new one", gpu=True).start(50)
    made.step()
    wait_until(page, f"location.search === '?run={made.run_id}'")
    made.end("finished", step=1)
    page.get_by_text("Finished 1 step in").wait_for()


def test_no_script_addresses_the_root_of_the_host_so_that_a_root_path_works() -> None:
    scripts = [ASSETS / name for name in {*live.SCRIPTS, *runs.SCRIPTS}]
    rooted = re.compile(r"[\"'`]/(?:api|live|runs|files)[^\"'`]*")
    assert len(scripts) == 14
    assert [found for path in scripts for found in rooted.findall(path.read_text())] == []


def test_a_real_run_is_watched_stopped_from_the_page_and_its_receipt_is_true(
    page: Any, app: RunningApp, tiny_model: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    config = {
        "model_path": str(tiny_model),
        "data": {"dataset_path": str(tiny_dataset)},
        "hyperparams": {"max_steps": 5000, "gradient_accumulation": 1},
        "eval": {"eval_steps": 50},
        "output": {"save_steps": 40},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "trainer", "train", "--config", str(tmp_path / "config.json")]
    command += ["--workspace", str(app.workspace)]
    trainer = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        page.goto(f"{app.url}/live")
        page.wait_for_function(f"(document.querySelector('{LOSS}')?.data?.[0]?.x.length ?? 0) >= 30", timeout=150_000)
        page.get_by_role("button", name="Stop", exact=True).click()
        page.get_by_role("button", name="Save and stop").click()
        notice = page.locator(".sb-live-notice")
        notice.get_by_text("Stopped by owner at step").wait_for(timeout=30_000)
        assert trainer.wait(30) == 0, trainer.stdout.read()
    finally:
        trainer.kill()
        trainer.wait()
    run = Workspace(app.workspace).run(page.url.rsplit("=", 1)[1])
    step = int(re.search(r"at step ([\d,]+)", notice.inner_text()).group(1).replace(",", ""))
    assert f"Saved: step {step:,}" in notice.inner_text()
    assert (run.checkpoints / f"step_{step:08d}" / "MANIFEST.json").is_file()
    page.get_by_role("tab", name="Rows").click()
    page.get_by_label("Step", exact=True).fill(str(step))
    page.get_by_role("button", name="Show", exact=True).first.click()
    page.get_by_role("cell", name="forty.jsonl, line").first.wait_for()
    page.locator(".sb-live-turns").first.get_by_role("button", name="Show").click()
    page.locator(".sb-live-turns pre").first.wait_for()
    assert re.search(r"What is \d+ plus \d+\?", page.locator(".sb-live-turns").first.inner_text())
