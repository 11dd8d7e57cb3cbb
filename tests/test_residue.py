"""What runs leave behind in a server's process: nothing, however they end."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from tests import runs
from tests.tiny import tiny_model_dir
from trainer import control
from trainer.data.tokens import TokenCache
from trainer.engine import Engine
from trainer.loop.step import Stepper
from trainer.machine import GIB
from trainer.run import RunDir, status
from trainer.session import free_memory
from trainer.worker import Worker
from trainer.workspace import Workspace

GROWTH_MIB = 10.0
OFF = {"eval_strategy": "no"}


class Server:
    """An engine, and lives of tiny runs that end in four ways."""

    def __init__(self, root: Path, model: Path, data: Path) -> None:
        self.engine = Engine(Workspace(root / "ws").create(), Worker())
        self.model, self.data = model, data

    def life(self, wanted: str, act: Callable[[RunDir], None] = lambda run: None, **changes: Any) -> None:
        """One run through the engine to its end, which must be `wanted`."""
        config = runs.settings(self.model, self.data, **{"max_steps": 4, "eval": OFF, **changes})
        run = self.engine.workspace.run(self.engine.start_run(config, "me"))
        act(run)
        runs.wait_for(lambda: status(run).ended_at and self.engine.holder() is None and not self.engine._accepted, 60)
        assert status(run).state == wanted, status(run).cause

    def finish(self) -> None:
        """To the last step."""
        self.life("finished")

    def stop(self) -> None:
        """A person's stop."""
        self.life("stopped", lambda run: control.drop(run.control, "stop", "me"), max_steps=5000)

    def bad_row(self) -> None:
        """A row whose token is none of the model's."""
        folder = next(self.engine.workspace.tokens.glob("*/cache.json")).parent
        ids = np.load(folder / "ids.npy", mmap_mode="r+")
        ids[TokenCache.open(folder).offsets[0] :] = 70_000
        ids.flush()
        del ids
        self.life("failed")
        shutil.rmtree(folder)

    def diverge(self) -> None:
        """Weights that are no numbers."""
        step = Stepper.step

        def poisoned(stepper: Stepper, number: int, *given: Any) -> Any:
            if number == 2:
                with torch.no_grad():
                    stepper.named[0][1].fill_(float("nan"))
            return step(stepper, number, *given)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Stepper, "step", poisoned)
            self.life("diverged")

    def residue(self) -> tuple[float, int, int]:
        """(MiB of the process, threads, open files) once everything is given back."""
        free_memory(False, None)
        return psutil.Process().memory_info().rss / GIB * 1024, threading.active_count(), open_files()


def open_files() -> int:
    """Descriptors of this process."""
    return len(os.listdir("/proc/self/fd"))


def cycles(server: Server, count: int) -> list[tuple[float, int, int]]:
    """`count` runs that end in four ways in turn, and what is left after each."""
    ways = (server.finish, server.stop, server.bad_row, server.diverge)
    found = []
    for number in range(count):
        ways[number % len(ways)]()
        found.append(server.residue())
    return found


def check(place: Path, count: int, first: int) -> None:
    """Cycle `count` leaves what cycle `first` left: the same threads and files, and less than GROWTH_MIB more memory."""
    model, data = tiny_model_dir(place / "model", hidden=128, layers=2), runs.write_rows(place / "rows.jsonl", 24)
    server = Server(place, model, data)
    try:
        found = cycles(server, count)
    finally:
        assert server.engine.shutdown(60)
    grown = found[-1][0] - found[first - 1][0]
    print(f"{grown:.1f} MiB more after cycle {count} than after cycle {first}: {[round(mib) for mib, *_ in found]}")
    assert grown < GROWTH_MIB, found
    assert {threads for _, threads, _ in found[first - 1 :]} == {found[first - 1][1]}, found
    assert {files for *_, files in found[first - 1 :]} == {found[first - 1][2]}, found


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
def test_four_ways_to_end_leave_no_thread_no_file_and_no_memory(tmp_path: Path) -> None:
    check(tmp_path, 8, 4)


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
def test_the_twentieth_cycle_leaves_what_the_third_left(tmp_path: Path) -> None:
    check(tmp_path, 20, 3)
