"""The live board of a run that is stopped or has ended: choices, what is safe, the next step. In a real browser."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.conftest import RunningApp
from tests.live_board import at_step_30, open_board, runs_in, wait_for
from tests.made_runs import MadeRun
from trainer import control

pytestmark = pytest.mark.browser


@pytest.fixture
def make(app: RunningApp) -> Iterator[Callable[..., MadeRun]]:
    yield from runs_in(app)


@pytest.fixture
def made(make: Callable[..., MadeRun]) -> MadeRun:
    return at_step_30(make)


def test_stop_asks_what_to_do_with_the_steps_and_sends_the_choice(page: Any, app: RunningApp, made: MadeRun) -> None:
    made.checkpoint()
    for _ in range(12):
        made.step()
    open_board(page, app, made.run_id, 42)
    page.get_by_role("button", name="Stop", exact=True).click()
    row = page.locator(".sb-live-actions")
    assert [b.inner_text() for b in row.get_by_role("button").all()] == [
        "Save and stop, about 3 s",
        "Discard 12 steps…",
        "Keep running",
    ]
    row.get_by_role("button", name="Keep running").click()
    assert not list(made.run.control.iterdir())
    page.get_by_role("button", name="Stop", exact=True).click()
    row.get_by_role("button", name="Discard 12 steps…").click()
    assert "Discard 12 steps? Step 30 stays." in row.inner_text()
    row.get_by_role("button", name="Discard 12 steps").click()
    wait_for(lambda: bool(list(made.run.control.glob("*.json"))))
    assert [order.command for order in control.take(made.run.control)] == ["stop-now"]
    made.events.append("stopping", by="owner", now=True)
    made.end(
        "stopped",
        step=30,
        by="owner",
        now=True,
        saved_step=30,
        saved_bytes=4_800_000_000,
        memory_before_gib=18.4,
        memory_after_gib=0.6,
    )
    notice = page.locator(".sb-live-notice")
    notice.get_by_text("Stopped by owner at step 30.").wait_for()
    assert "Saved: step 30 (4.8 GB). GPU memory 18.4 GiB → 614 MiB" in notice.inner_text()
    assert notice.get_by_role("button", name="Resume").is_visible()


SAVED = {"step": 30, "by": "lab-2", "saved_step": 30, "saved_bytes": 4_800_000}
FAILED = {"cause": "CUDA out of memory", "detail": "Traceback <b>"}
DIVERGED = {"step": 42, "cause": "loss became NaN at step 42."}
# last event, its fields, what the notice says, its first button
ENDS = [
    ("finished", SAVED, ["Finished 30 steps", "Saved: step 30 (4.8 MB)."], "Use this model"),
    ("failed", FAILED, ["Failed at step 42", FAILED["cause"], "Safe: step 30. Lost: 12 steps"], "Resume from 30"),
    ("diverged", DIVERGED, ["Stopped: loss became NaN at step 42.", "Last good: step 30."], "Resume from 30"),
    ("paused", SAVED, ["Paused by lab-2 at step 30."], "Resume"),
    (None, {}, ["Cut off at step 42", "Safe: step 30. 12 steps will be repeated."], "Resume from 30"),
]


@pytest.mark.parametrize(("kind", "fields", "texts", "action"), ENDS)
def test_every_end_says_first_what_is_safe_and_offers_the_next_step(
    page: Any, app: RunningApp, made: MadeRun, kind: str | None, fields: dict[str, Any], texts: list[str], action: str
) -> None:
    made.checkpoint()
    for _ in range(0 if kind == "finished" else 12):
        made.step()
    if kind is None:
        made.close()  # killed: the lock is free, no last event
    else:
        made.end(kind, **fields)
    open_board(page, app, made.run_id, 30)
    notice = page.locator(".sb-live-notice")
    notice.get_by_role("button", name=action, exact=True).wait_for()
    for text in texts:
        assert text in notice.inner_text()
    assert not page.get_by_role("button", name="Stop", exact=True).count()


def test_a_run_that_was_cut_off_says_why_and_is_left_with_one_click(page: Any, app: RunningApp, made: MadeRun) -> None:
    made.checkpoint()
    made.step()
    made.events.append("cut_off", cause="signal 9 (SIGKILL), the kernel ended it for want of memory")
    made.close()
    open_board(page, app, made.run_id, 30)
    notice = page.locator(".sb-live-notice")
    notice.get_by_role("button", name="Leave it", exact=True).wait_for()
    assert (
        "ended without stopping: signal 9 (SIGKILL), the kernel ended it for want of memory; last"
        in notice.inner_text()
    )
    notice.get_by_role("button", name="Leave it", exact=True).click()
    notice.get_by_text("Cut off, and left by owner. The last good step is 30.").wait_for()
    assert notice.get_by_role("button", name="Resume", exact=True).is_visible()
    assert "Saved: step 30" in notice.inner_text()


def test_the_waiting_of_a_paused_run_is_ended_with_one_click(page: Any, app: RunningApp, made: MadeRun) -> None:
    made.checkpoint()
    made.end("paused", by="lab-2", step=30, saved_step=30)
    open_board(page, app, made.run_id, 30)
    page.get_by_role("button", name="End it here", exact=True).click()
    page.get_by_text("Stopped by owner at step 30.").wait_for()
