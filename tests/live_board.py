"""The live board as tests open it: runs in the server's workspace, and waiting for what the page shows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from tests.conftest import RunningApp
from tests.made_runs import MadeRun
from trainer.workspace import Workspace

LOSS = ".sb-chart-loss"
PATIENCE_MS = 15_000


def runs_in(app: RunningApp) -> Iterator[Callable[..., MadeRun]]:
    """Makes runs in the server's workspace; they are gone after the test. For a fixture to yield from."""
    runs: list[MadeRun] = []

    def one(name: str, **settings: Any) -> MadeRun:
        runs.append(MadeRun(Workspace(app.workspace).runs, name, **settings))
        return runs[-1]

    yield one
    for run in runs:
        run.remove()


def at_step_30(make: Callable[..., MadeRun]) -> MadeRun:
    """A run of 200 steps that stands at step 30, on a GPU."""
    run = make("watched", gpu=True).start(200)
    for _ in range(30):
        run.step()
    return run


def drawn(page: Any, trace: int = 0) -> int:
    """Points of one trace of the loss chart."""
    return page.evaluate(f"document.querySelector('{LOSS}')?.data?.[{trace}]?.x.length ?? 0")


def wait_until(page: Any, condition: str) -> None:
    """Wait for a JavaScript condition."""
    page.wait_for_function(condition, timeout=PATIENCE_MS)


def open_board(page: Any, app: RunningApp, run_id: str, points: int) -> None:
    """Open a run and wait until its curve is drawn."""
    page.goto(f"{app.url}/live?run={run_id}")
    wait_until(page, f"(document.querySelector('{LOSS}')?.data?.[0]?.x.length ?? 0) >= {points}")


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait for something on this side."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it did not happen within 10 s"
        time.sleep(0.02)
