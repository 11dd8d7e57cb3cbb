"""The engine of a server: one thread that alone touches torch, and the lease of the device it computes on.

Torch-free to import; handlers of the page call `start_*`, which refuse at once or hand the work to the thread.
"""

from __future__ import annotations

import contextlib
import os
import queue
import secrets
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from trainer import console, launch, lease
from trainer.ends import End
from trainer.files import make_private_dir
from trainer.locks import FileLock
from trainer.machine import Machine, Nvml, machine
from trainer.notify import Notifier, message_of
from trainer.recovery import recover, settle
from trainer.refusal import Refusal
from trainer.run import RunDir, new_run_id, only_by_torchrun, status
from trainer.schema import Config
from trainer.session import Life, open_life, train_to_end
from trainer.signals import HURRY_S, Signals
from trainer.states import LIVE_STATES, Settling, State, allowed
from trainer.worker import Worker
from trainer.workspace import Workspace

QUEUE_LOOK_S = 0.5
MUST_RESTART = 75  # the exit code that asks the supervisor for a fresh process


@dataclass(frozen=True)
class _Task:
    """What the thread is to do, which device lock it frees afterwards, and how it is asked to end."""

    kind: Literal["warm", "train", "smoke"]
    work: Callable[[], None]
    lock: FileLock | None = None
    signals: Signals = field(default_factory=Signals)
    life: Life | None = None


class Engine:
    """Runs one thing at a time on its own thread: a training, a smoke test. Safe to call from any thread."""

    def __init__(self, workspace: Workspace, worker: Worker) -> None:
        self.workspace = workspace
        self.worker = worker
        self.poisoned = threading.Event()
        self.notifier = Notifier(workspace.root)
        self._ending = threading.Event()
        self._nvml = Nvml()
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._accepted: _Task | None = None  # the training or smoke test that holds the device, waiting or at work
        self._start = threading.Lock()
        self._importing = threading.Lock()
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    def machine(self) -> Machine:
        """The machine now: devices, free memory, what to mend."""
        return machine(self._nvml)

    def holder(self) -> lease.Holder | None:
        """Who has the device, in this process or any other; None when it is free."""
        return lease.holder(self.machine().device)

    def warm(self) -> None:
        """Import torch on the engine's thread and start the worker, so that the first run does not wait for them."""
        self.worker.warm()
        self._tasks.put(_Task("warm", self._import_torch))

    def start_run(self, config: Config, owner: str, name: str = "", why: str = "") -> str:
        """Make a run and train it; returns its id. Raises Refusal (also Busy) before anything is written."""
        here = self.machine()
        self._refuse_when_broken()
        launch.check_paths(config)
        name, folder = name.strip() or launch.auto_name(config), self.workspace.runs / new_run_id()
        with self._starting():
            lock = lease.acquire(here.device, kind="train", owner=owner, run_id=folder.name, name=name, run_path=folder)
            try:
                threads = threads_for(here)
                run, _ = launch.new_run(
                    self.workspace, config, here, owner=owner, threads=threads, output=folder, name=name, why=why
                )
                self._train(run, lock, here, owner, resumed=False)
            except BaseException:
                lock.release()
                raise
        return run.run_id

    def resume_run(self, run_id: str, owner: str, *, around_rows: bool = False, auto: bool = False) -> None:
        """Go on with a run from its newest checkpoint that verifies. Raises Refusal where its state does not allow it.

        `around_rows`: a diverged run goes on without the rows of its bad step, at half the rate. `auto` marks a life that
        nobody asked for, see `trainer.recovery`.
        """
        self._refuse_when_broken()
        run = self.workspace.run(run_id)
        now, command = status(run), "resume-around" if around_rows else "resume"
        if command not in allowed(now.state):
            raise Refusal(f"This run is {now.state}: there is nothing to resume.")
        if now.processes > 1:
            raise Refusal(only_by_torchrun(now.processes))
        may = lambda state: command in allowed(state)  # noqa: E731
        self._begin(run, now.name, owner, may, around_rows=around_rows, auto=auto)
        try:
            self.workspace.queue.remove(run_id)
            self.workspace.queue.release(resumed_run=run_id)
        except Refusal as refusal:  # the run has begun all the same
            console.say(f"The queue could not be told that the run goes on: {refusal.message}", sys.stderr)

    def enqueue_new(self, config: Config, owner: str, name: str = "", why: str = "") -> str:
        """Make a run and put it at the end of the queue; returns its id. Raises Refusal before anything is written."""
        here = self.machine()
        run, _ = launch.new_run(
            self.workspace, config, here, owner=owner, threads=threads_for(here), name=name, why=why
        )
        self.workspace.queue.add(run.run_id, owner)
        return run.run_id

    def enqueue(self, run_id: str, owner: str) -> int:
        """Put a run that was never started, or one to go on with, at the end of the queue; returns its place from 1."""
        run = self.workspace.run(run_id)
        now = status(run)
        if not _can_wait(now.state):
            raise Refusal(f"This run is {now.state}: it cannot wait in the queue.")
        if now.processes > 1:
            raise Refusal(only_by_torchrun(now.processes))
        return self.workspace.queue.add(run_id, owner)

    def start_next(self) -> str | None:
        """Start the first run of the queue if the device is free and nobody holds the queue back; returns its id.

        A run that cannot be started is marked failed with the reason and makes room for the next.
        """
        waiting = self.workspace.queue.read()
        if self._accepted is not None or self.poisoned.is_set() or waiting.held_by or not waiting.entries:
            return None
        first = waiting.entries[0]
        try:
            run = self.workspace.run(first.run_id)
            now = status(run)
            started = _can_wait(now.state)
            if started:
                self._begin(run, now.name, first.by, _can_wait)
        except lease.Busy:
            return None
        except Refusal as refusal:  # deleted meanwhile, or its folder cannot be written
            started = False
            self._mark_failed(first.run_id, refusal)
        self.workspace.queue.remove(first.run_id)
        return first.run_id if started else None

    def tend_queue(self) -> None:
        """Keep starting the next run of the queue from now on, until `shutdown`."""
        threading.Thread(target=self._tend, name="queue", daemon=True).start()

    def _tend(self) -> None:
        while not self._ending.wait(QUEUE_LOOK_S):
            try:
                self.start_next()
            except (Refusal, OSError):  # a queue file that cannot be read or written: the page says so when it looks
                continue

    def _mark_failed(self, run_id: str, refusal: Refusal) -> None:
        with contextlib.suppress(Refusal, OSError):
            run = self.workspace.run(run_id)
            life = open_life(run, "queue", resumed=run.events.exists(), may=_can_wait)
            life.events.append("failed", cause=refusal.message)
            life.close()

    def start_smoke(self, config: Config, owner: str) -> str:
        """Start a smoke test; returns its id. Its report grows in smoke/ID/report.json."""
        here = self.machine()
        launch.check_paths(config)
        self._refuse_when_broken()
        prompt = launch.prompt_of(config, self.workspace.profiles)
        smoke_id = time.strftime("%Y%m%d-%H%M%S-") + secrets.token_hex(2)
        with self._starting():
            lock = lease.acquire(here.device, kind="smoke", owner=owner, run_id=smoke_id, name=config.display_name)
            folder = make_private_dir(self.workspace.smoke / smoke_id)
            signals = Signals()

            def work() -> None:
                from trainer.smoke import run_smoke

                run_smoke(
                    folder,
                    config,
                    prompt,
                    self.workspace,
                    self.worker,
                    here,
                    threads_for(here),
                    signals.interrupt,
                )

            self._hand_over(_Task("smoke", work, lock, signals))
        return smoke_id

    def first_batch(self, config: Config, cancelled: Callable[[], bool]) -> dict[str, Any]:
        """The first micro-batch of a run with these settings, as `trainer.loop.first_batch` shows it.

        Works on the caller's thread, which may wait for the tokens; takes no device and draws nothing at random.
        """
        launch.check_paths(config)
        prompt = launch.prompt_of(config, self.workspace.profiles)
        self._import_torch()
        from trainer.loop.first_batch import first_batch
        from trainer.loop.prepare import Left

        try:
            return first_batch(config, prompt, self.workspace, self.worker, cancelled)
        except Left:
            raise Refusal("Left before it was done.") from None

    def stop_smoke(self) -> None:
        """End the smoke test in progress at its next check; harmless when there is none."""
        task = self._accepted
        if task is not None and task.kind == "smoke":
            task.signals.ask("stop", "owner")

    def shutdown(self, timeout_s: float, by: str = "shutdown of the server") -> bool:
        """Stop at the step, save, end the thread; False when it did not end in time.

        A step that takes too long is dropped, and the one before it saved; a run that is not through by then is cut off,
        and says so.
        """
        with self._start:  # what is being started now is stopped too, and nothing is started any more
            self._ending.set()
            task = self._accepted
        if task is not None:
            task.signals.ask("stop", by)
        self._tasks.put(None)
        self._thread.join(min(timeout_s, HURRY_S))
        if task is not None:
            task.signals.hurry.set()
        self._thread.join(max(0.0, timeout_s - HURRY_S))
        in_time = not self._thread.is_alive()
        if not in_time and task is not None and task.life is not None:
            task.life.cut_off()
        self.notifier.wait(1.0)
        self.worker.close()
        return in_time

    def settle(self, run_id: str, command: Settling, by: str) -> None:
        """Leave a run that was cut off, or end a paused one: see `trainer.recovery.settle`."""
        settle(self.workspace.run(run_id), command, by)

    def recover(self, ends: list[End]) -> list[RunDir]:
        """Say why runs were cut off, and let the newest that may go on by itself; returns those newly explained."""

        def resume(run: RunDir) -> None:
            self.resume_run(run.run_id, status(run).owner or "the run itself", auto=True)

        cut = recover(self.workspace.list_runs(), ends, resume)
        for run in cut:
            now = status(run)
            detail = "It goes on by itself." if now.state in LIVE_STATES else "It waits for you."
            self.notifier.tell(run.run_id, message_of(replace(now, state="interrupted"), detail))
        return cut

    def must_restart(self) -> bool:
        """Whether only a fresh process can train, and nothing is at work here that it would cut off."""
        return self.poisoned.is_set() and self._accepted is None

    @contextmanager
    def _starting(self) -> Iterator[None]:
        """One start at a time, and none once the end has begun: nothing would take it up."""
        with self._start:
            if self._ending.is_set():
                raise lease.Busy("The server is ending.")  # for the queue too: the run goes on waiting
            yield

    def _refuse_when_broken(self) -> None:
        if self.poisoned.is_set():
            raise Refusal(
                "The engine must restart before it can train: restart the server. Runs and checkpoints are safe."
            )

    def _hand_over(self, task: _Task) -> None:
        self._accepted = task
        self._tasks.put(task)

    def _begin(
        self,
        run: RunDir,
        name: str,
        owner: str,
        may: Callable[[State], bool],
        *,
        around_rows: bool = False,
        auto: bool = False,
    ) -> None:
        here = self.machine()
        with self._starting():
            lock = lease.acquire(
                here.device, kind="train", owner=owner, run_id=run.run_id, name=name or run.run_id, run_path=run.path
            )
            try:
                resumed = run.events.exists()
                self._train(run, lock, here, owner, resumed=resumed, around_rows=around_rows, auto=auto, may=may)
            except BaseException:
                lock.release()
                raise

    def _train(
        self,
        run: RunDir,
        lock: FileLock,
        here: Machine,
        owner: str,
        *,
        resumed: bool,
        around_rows: bool = False,
        auto: bool = False,
        may: Callable[[State], bool] = lambda state: True,
    ) -> None:
        life = open_life(run, owner, resumed=resumed, around_rows=around_rows, auto=auto, may=may)

        def work() -> None:
            end = train_to_end(life, self.workspace, self.worker, here, notifier=self.notifier)
            if life.poisoned:
                self.poisoned.set()
            if end == "paused":
                self._hold_queue(life)

        self._hand_over(_Task("train", work, lock, life.signals, life))

    def _hold_queue(self, life: Life) -> None:
        """After a pause: somebody wants the device for something else."""
        try:
            if self.workspace.queue.read().entries:
                self.workspace.queue.hold(life.signals.wish.by, life.run.run_id)
        except Refusal as refusal:  # a full disk, a damaged file: nothing that the engine must restart for
            console.say(f"The queue could not be held back after the pause: {refusal.message}", sys.stderr)

    def _import_torch(self) -> None:
        with self._importing:  # two threads that import torch and its friends at once meet half-made modules
            import trainer.loop.first_batch
            import trainer.loop.train
            import trainer.smoke  # noqa: F401

    def _loop(self) -> None:
        while (task := self._tasks.get()) is not None:
            try:
                task.work()
            except Exception:  # the thread's edge: a fault in the edge below it must not end the thread in silence
                self.poisoned.set()
                traceback.print_exc()
            finally:
                if task.lock is not None:
                    task.lock.release()
                if self._accepted is task:
                    self._accepted = None


def _can_wait(state: State) -> bool:
    """Whether a run in this state can stand in the queue: never started, or at rest with something to go on from."""
    return state == "queued" or "resume" in allowed(state)


def threads_for(here: Machine) -> int:
    """Threads for the computation on a CPU: one core stays free, or the page would stutter and slow the training."""
    allowed_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else here.cores
    return max(1, min(here.cores, allowed_cores) - 1)
