"""Every place of a run at which a person may ask it to end, each held open by a barrier until the test lets it go on.

A barrier stands inside the product's own call (a hook of autograd, a stopped worker process, an fsync that does not come
back), so that no clock decides whether the command met the phase. Used by tests/test_stop_places.py.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from trainer import session, worker
from trainer.loop import evaluate, optim, prepare, sample, saves, shortage
from trainer.loop import step as steps
from trainer.loop.forward import Found
from trainer.loop.save import Saver
from trainer.loop.saves import Saves
from trainer.loop.step import Stepper
from trainer.loop.train import Training
from trainer.workspace import Workspace

Patch = pytest.MonkeyPatch
WAIT_S = 60.0
STEPS = 6
AT = 3  # the step at which most places are held
BAD_STEP = 4


class Barrier:
    """The trainer waits in `hold` until the test calls `release`; it passes from then on."""

    def __init__(self) -> None:
        self.reached, self.released = threading.Event(), threading.Event()

    def hold(self) -> None:
        """The trainer's side: say that it is here, and wait."""
        self.reached.set()
        assert self.released.wait(WAIT_S), "the test never let it go on"

    def release(self) -> None:
        """Let the trainer go on, now and whenever it comes here."""
        self.released.set()


@dataclass(frozen=True)
class Place:
    """Where a run is held. `phase` and `state` are what its status must say there.

    `stops_at` is the step at which a stop or a pause ends the run, `saves_at` that which a checkpoint saves (None: refused
    there); `ends` where the command comes too late to be anything but finished. `always` is arranged in each life of the run
    and in that of the unbroken one, but after the commands in `forgets` not in that which the run is compared with: that
    memory ran out is remembered by what is saved afterwards. `leaves`: a stop ends it without waiting for what holds it.
    """

    name: str
    phase: str
    arrange: Callable[[Barrier, Patch, Workspace], None]
    stops_at: int
    saves_at: int | None
    state: str = "running"
    settings: dict[str, Any] = field(default_factory=dict)
    always: Callable[[Patch], None] | None = None
    ends: bool = False
    forgets: frozenset[str] = frozenset()
    leaves: bool = False


class AtStep:
    """Which step is being taken, and which micro-batch of it; patched into the stepper."""

    def __init__(self, patch: Patch) -> None:
        self.step, self.micro = 0, 0
        take, backward = Stepper.step, Stepper._backward

        def step(stepper: Stepper, number: int, *given: Any) -> Any:
            self.step, self.micro = number, 0
            return take(stepper, number, *given)

        def micro(stepper: Stepper, *given: Any) -> Any:
            self.micro += 1
            return backward(stepper, *given)

        patch.setattr(Stepper, "step", step)
        patch.setattr(Stepper, "_backward", micro)

    @property
    def here(self) -> bool:
        """Whether this is the first micro-batch of the step that is held."""
        return (self.step, self.micro) == (AT, 1)


def before(
    patch: Patch, owner: Any, name: str, barrier: Barrier, when: Callable[..., bool] = lambda *given: True
) -> None:
    """Hold whoever calls `owner.name`, where `when` is true of what it is given, before the call does anything."""
    real = getattr(owner, name)

    def held(*given: Any, **named: Any) -> Any:
        if when(*given):
            barrier.hold()
        return real(*given, **named)

    patch.setattr(owner, name, held)


def tokenising(barrier: Barrier, patch: Patch, workspace: Workspace) -> None:
    """The worker process itself stands still, with the rows in its hands."""
    shutil.rmtree(workspace.tokens)
    workspace.tokens.mkdir()
    ask = worker._Child.ask

    def frozen(child: worker._Child, request: dict[str, Any], *given: Any) -> Any:
        if request["op"] == "tokenise" and not barrier.released.is_set():
            assert child._process is not None
            pid = child._process.pid
            os.kill(pid, signal.SIGSTOP)
            threading.Thread(target=lambda: barrier.released.wait(WAIT_S) and _go_on(pid), daemon=True).start()
            barrier.reached.set()
        return ask(child, request, *given)

    patch.setattr(worker._Child, "ask", frozen)


def _go_on(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # cancelled meanwhile, and ended
        os.kill(pid, signal.SIGCONT)


def loading(barrier: Barrier, patch: Patch, workspace: Workspace) -> None:
    """Before the weights are read."""
    before(patch, prepare, "load_model", barrier)


def held_out(step: int) -> Callable[[Barrier, Patch, Workspace], None]:
    """Inside the check of `step`: one of its groups is being computed."""

    def arrange(barrier: Barrier, patch: Patch, workspace: Workspace) -> None:
        now, check = {"step": -1}, Training._held_out_loss

        def checked(training: Training) -> Any:
            now["step"] = training.progress.step
            return check(training)

        patch.setattr(Training, "_held_out_loss", checked)
        before(patch, evaluate, "losses", barrier, lambda *given: now["step"] == step)

    return arrange


def between_steps(barrier: Barrier, patch: Patch, workspace: Workspace) -> None:
    """The step is recorded, the next not begun."""
    before(patch, Saves, "watch_disk", barrier, lambda kept: kept._progress.step == AT)


def forward(barrier: Barrier, patch: Patch, workspace: Workspace) -> None:
    """In the forward pass of the first of two micro-batches."""
    at = AtStep(patch)
    before(patch, steps, "forward", barrier, lambda *given: at.here)


def backward(barrier: Barrier, patch: Patch, workspace: Workspace) -> None:
    """In the middle of the backward pass: a hook of autograd, when one gradient is there and others are not."""
    at, take = AtStep(patch), Stepper._backward

    def hooked(stepper: Stepper, *given: Any) -> Any:
        handle = stepper.named[-1][1].register_hook(lambda grad: barrier.hold() if at.here else None)
        try:
            return take(stepper, *given)
        finally:
            handle.remove()

    patch.setattr(Stepper, "_backward", hooked)


def update(barrier: Barrier, patch: Patch, workspace: Workspace) -> None:
    """Gradients are clipped, weights are about to change."""
    at = AtStep(patch)
    before(patch, optim.StepGuard, "step", barrier, lambda *given: at.step == AT)


def sampling(barrier: Barrier, patch: Patch, workspace: Workspace) -> None:
    """After a token of an answer."""
    before(patch, sample._Limit, "__call__", barrier)


def copying(barrier: Barrier, patch: Patch, workspace: Workspace) -> None:
    """Weights and states are being copied off the device."""
    before(patch, saves, "snapshot", barrier)


def writing(barrier: Barrier, patch: Patch, workspace: Workspace) -> None:
    """The disk does not come back from the first fsync of a save, nor from any other meanwhile; the loop is between two steps."""
    real = os.fsync

    def slow(fd: int) -> None:
        if threading.current_thread().name == "saver":
            barrier.reached.set()
        if barrier.reached.is_set():
            assert barrier.released.wait(WAIT_S)
        real(fd)

    patch.setattr(os, "fsync", slow)
    watch = Saves.watch_disk

    def wait(kept: Saves) -> None:
        if kept._progress.step == AT + 1:
            assert barrier.released.wait(WAIT_S)
        watch(kept)

    patch.setattr(Saves, "watch_disk", wait)


def _short_once(patch: Patch, owner: Any, name: str, at: Callable[[], bool]) -> None:
    """Memory runs out once, when `at` is true, in `owner.name`."""
    real, done = getattr(owner, name), []

    def short(*given: Any, **named: Any) -> Any:
        if at() and not done:
            done.append(1)
            raise torch.OutOfMemoryError("simulated")
        return real(*given, **named)

    patch.setattr(owner, name, short)


def out_of_memory(barrier: Barrier, patch: Patch, workspace: Workspace) -> None:
    """On the ladder: the step's gradients are to be dropped and the micro-batch halved."""
    before(patch, shortage, "smaller", barrier)


def short_in_forward(patch: Patch) -> None:
    """Memory runs out in step AT of the life that comes to it with two rows at once."""
    at = AtStep(patch)
    _short_once(patch, steps, "forward", lambda: at.here)


def out_of_memory_in_update(barrier: Barrier, patch: Patch, workspace: Workspace) -> None:
    """On the way back to the last checkpoint."""
    before(patch, session, "note_memory", barrier)


def short_in_update(patch: Patch) -> None:
    """Memory runs out while weights change."""
    at = AtStep(patch)
    _short_once(patch, optim.StepGuard, "step", lambda: at.step == AT)


def rewinding(barrier: Barrier, patch: Patch, workspace: Workspace) -> None:
    """A step diverged, and the run is about to go back."""
    before(patch, session, "rewind", barrier)


def poisoned(patch: Patch) -> None:
    """Whatever is trained at step BAD_STEP at the full rate has no number for a loss."""
    at, real = AtStep(patch), steps.forward
    rows: set[int] = set()

    def forward(model: Any, batch: Any, path: Any) -> Found:
        found = real(model, batch, path)
        if at.step == BAD_STEP and not rows:
            rows.update(batch.rows)
        bad = torch.tensor([math.nan if row in rows else 1.0 for row in batch.rows])
        return Found(found.labels * bad[batch.label_row], found.router)

    patch.setattr(steps, "forward", forward)


def last_save(barrier: Barrier, patch: Patch, workspace: Workspace) -> None:
    """The last step is taken, and its save awaited."""
    before(patch, Saver, "wait", barrier)


def freeing(barrier: Barrier, patch: Patch, workspace: Workspace) -> None:
    """All is saved; memory is being given back and measured."""
    before(patch, session, "free_memory", barrier)


SAVES = {"output": {"save_steps": 2, "save_total_limit": 9}}
PLACES = (
    Place("tokenising", "tokenise", tokenising, 0, None, state="preparing", leaves=True),
    Place("loading", "load", loading, 0, None, state="preparing"),
    Place("held-out check before step 1", "eval", held_out(0), 0, 1),
    Place("between steps", "train", between_steps, AT, AT),
    Place("in a step: forward", "train", forward, AT, AT),
    Place("in a step: backward", "train", backward, AT, AT),
    Place("in a step: update", "train", update, AT, AT),
    Place("held-out check in mid-run", "eval", held_out(AT), AT, AT),
    Place("sampling", "sample", sampling, AT, AT, settings={"eval": {"sample_steps": AT, "sample_max_tokens": 8}}),
    Place("a save: copy", "save", copying, AT, AT + 1, settings={"output": {"save_steps": AT, "save_total_limit": 9}}),
    Place(
        "a save: files",
        "train",
        writing,
        AT + 1,
        AT + 1,
        settings={"output": {"save_steps": AT, "save_total_limit": 9}},
    ),
    Place(
        "out of memory: the ladder",
        "train",
        out_of_memory,
        AT - 1,
        AT,
        always=short_in_forward,
        forgets=frozenset({"stop-now"}),
    ),
    Place(
        "out of memory in the update",
        "train",
        out_of_memory_in_update,
        2,
        AT,
        settings=SAVES,
        always=short_in_update,
        forgets=frozenset({"stop", "pause", "stop-now"}),
    ),
    Place(
        "rewinding",
        "train",
        rewinding,
        2,
        AT,
        settings={**SAVES, "on_divergence": "rewind"},
        always=poisoned,
    ),
    Place("ending: the last save", "train", last_save, STEPS, STEPS, ends=True),
    Place("ending: memory", "train", freeing, STEPS, STEPS, ends=True),
)
