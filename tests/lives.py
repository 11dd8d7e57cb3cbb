"""Lives of a run, ended the ways a person ends them, and what must not depend on it: curve, row losses, weights, states."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from safetensors.torch import load_file

from tests.runs import wait_for
from trainer import checkpoint, control
from trainer.data.loader import MicroBatch
from trainer.loop.step import Stepper
from trainer.machine import machine
from trainer.metrics import MetricsWriter, read_metrics, read_rows
from trainer.run import RunDir
from trainer.session import Life, open_life, train_to_end
from trainer.worker import Worker
from trainer.workspace import Workspace

CURVE = ("step", "loss", "grad_norm", "learning_rate", "labels", "tokens", "rows")


def one_life(
    run: RunDir,
    workspace: Workspace,
    worker: Worker,
    *,
    at: int | None = None,
    micro: int | None = None,
    command: str = "stop",
    by_file: bool = False,
) -> str:
    """Train the next life of `run`; returns how it ended.

    `command` is asked for when step `at` has been recorded, or with `micro` as that micro-batch (from 0) of step `at`
    begins; `by_file` drops it into control/ as a page or another process does, and waits until it was taken.
    """
    life = open_life(run, "test", resumed=run.events.exists())

    def ask() -> None:
        if by_file:
            control.drop(run.control, command, "test")
            wait_for(lambda: life.signals.wish.end is not None)
        else:
            life.signals.ask(command, "test")  # type: ignore[arg-type]

    with _when(at, micro, ask):
        return _to_end(life, workspace, worker)


def _to_end(life: Life, workspace: Workspace, worker: Worker) -> str:
    return train_to_end(life, workspace, worker, machine(), echo=lambda text: None)


@contextmanager
def _when(at: int | None, micro: int | None, ask: Callable[[], None]) -> Iterator[None]:
    """Call `ask` at a place of the training that a clock could not hit: after a step, or inside one."""
    record, step, backward = MetricsWriter.step, Stepper.step, Stepper._backward
    place = {"step": 0, "micro": 0}

    def recorded(writer: MetricsWriter, values: dict[str, float], rows: list[tuple[int, float, int]]) -> None:
        record(writer, values, rows)
        if micro is None and values["step"] == at:
            ask()

    def stepping(self: Stepper, number: int, *args: object) -> object:
        place.update(step=number, micro=0)
        return step(self, number, *args)  # type: ignore[arg-type]

    def going_back(self: Stepper, batch: MicroBatch, *of_step: int) -> torch.Tensor:
        if place["step"] == at and place["micro"] == micro:
            ask()
        place["micro"] += 1
        return backward(self, batch, *of_step)

    with (
        patch.object(MetricsWriter, "step", recorded),
        patch.object(Stepper, "step", stepping),
        patch.object(Stepper, "_backward", going_back),
    ):
        yield


def curve(run: RunDir) -> np.ndarray:
    """(steps, columns) float64: what a run computed at each step; times and memory are left out."""
    found = read_metrics(run.metrics)
    return np.stack([found[name] for name in CURVE], 1)


def row_losses(run: RunDir) -> list[list[tuple[int, float, int]]]:
    """For each step its rows in order: (row, loss sum, labels)."""
    return [read_rows(run.rows, int(step)) for step in read_metrics(run.metrics)["step"]]


def state_hash(run: RunDir) -> str:
    """sha256 over names and bytes of the newest whole checkpoint's weights and optimizer states."""
    newest = checkpoint.newest_verified(run.checkpoints).path
    digest = hashlib.sha256()
    for file in (*sorted((newest / checkpoint.MODEL).glob("*.safetensors")), newest / checkpoint.OPTIMIZER):
        _add(digest, file)
    return digest.hexdigest()


def _add(digest: hashlib._Hash, file: Path) -> None:
    tensors = load_file(file)
    assert tensors, file
    for name in sorted(tensors):
        digest.update(f"{file.name}/{name}/{tensors[name].dtype}\0".encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes())


def assert_same(broken: RunDir, whole: RunDir, what: str) -> None:
    """Curve, row losses, weights and optimizer states are the same bits."""
    ours, theirs = curve(broken), curve(whole)
    assert ours.shape == theirs.shape, f"{what}: {len(ours)} steps instead of {len(theirs)}"
    differs = np.flatnonzero((ours.view(np.uint64) != theirs.view(np.uint64)).any(1))
    assert len(differs) == 0, f"{what}: first different step {ours[differs[0]]}, unbroken {theirs[differs[0]]}"
    assert row_losses(broken) == row_losses(whole), what
    assert state_hash(broken) == state_hash(whole), what
