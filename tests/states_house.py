"""One server without a socket, two people who use it, and a trainer that waits at a gate between steps for the test's word.

Engine, lease, locks, events, control, queue, current model, deletion, uploads, guard and routes are the product's own. What
trains is either the product's whole life of a run on a tiny model (`real`), or a stand-in for it that computes nothing and
saves small files through the real checkpoint functions. Used by tests/test_states_model.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import queue
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import httpx
import torch
from starlette.applications import Starlette

import ui.data_api
import ui.feed
import ui.queue_api
from tests import runs
from trainer import checkpoint, cli, locks, metrics, session
from trainer.data.doctor import check_data
from trainer.engine import Engine
from trainer.jobs import Jobs
from trainer.loop.train import Training
from trainer.metrics import MetricsWriter
from trainer.run import RunDir
from trainer.schema import Config
from trainer.session import Life
from trainer.signals import ControlWatch
from trainer.worker import Worker
from trainer.workspace import Workspace
from ui.guard import Guard, Rules
from ui.site import Site

WAIT_S = 60.0


class Killed(BaseException):
    """The process is gone: raised through the trainer, which then writes no last event, while its locks are freed."""


class Gate:
    """Where the trainer waits; the test tells it what happens next, and hears when it has come to the next stop."""

    def __init__(self) -> None:
        self._said: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._stopped: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.life: Life | None = None

    def say(self, word: str) -> str:
        """Tell the waiting trainer `word`; returns "gate" when it waits again, "ended" when the life is over."""
        self._said.put(word)
        return self.heard()

    def heard(self) -> str:
        """What the trainer came to."""
        return self._stopped.get(timeout=WAIT_S)

    def ended(self) -> None:
        """The trainer's word that this life is over."""
        self._stopped.put("ended")

    def wait(self, life: Life) -> str:
        """The trainer's side: wait for "go" or "diverge"; "fail" and "kill" raise, "look" answers what control/ holds."""
        while True:
            self._stopped.put("gate")
            word = self._said.get(timeout=WAIT_S)
            if word == "look":
                ControlWatch(life.run.control, life.events, life.signals)._look()
                continue
            if word == "kill":
                raise Killed
            if word == "kill in a save":
                staging = checkpoint.new_staging(life.run.checkpoints, 77)
                (staging / "model.safetensors").write_bytes(b"half")
                raise Killed
            if word == "fail":
                raise RuntimeError("planted fault")
            while word == "until told" and not life.signals.interrupt():
                time.sleep(0.001)
            return word


def save_small(run: RunDir, life: Life, step: int, keep: int, promoted: set[int]) -> None:
    """A checkpoint of a few bytes, sealed, announced and pruned by the functions that a real save calls."""
    staging = checkpoint.new_staging(run.checkpoints, step)
    (staging / checkpoint.MODEL).mkdir()
    (staging / checkpoint.MODEL / "model.safetensors").write_bytes(f"{run.run_id} {step}".encode())
    (staging / checkpoint.OPTIMIZER).write_bytes(b"moments")
    (staging / checkpoint.STATE).write_bytes(b"{}")
    life.events.append("checkpoint", step=step, bytes=checkpoint.seal(staging, step), best=False)
    checkpoint.prune(run.checkpoints, keep, {step} | promoted)


def stand_in(gate: Gate, life: Life, workspace: Workspace) -> tuple[str, dict[str, Any]]:
    """A life without training: the phases, ends and saves of `trainer.loop.train`, step by step as the gate lets it."""
    run, signals = life.run, life.signals
    config = Config.model_validate(run.snapshot()["config"])
    total, every, keep = config.hyperparams.max_steps, config.output.save_steps, config.output.save_total_limit
    found = session._where_to_go_on(run, lambda text: None)
    step = saved = found.step if found else 0
    life.events.append("phase", name="load")
    gate.wait(life)
    kind = {"pause": "paused"}
    if signals.interrupt():
        return kind.get(str(signals.wish.end), "stopped"), {"step": step, "by": signals.wish.by}
    life.events.append("running", step=step)
    curve = MetricsWriter(run.metrics, run.rows, life.number)
    try:
        while step < total and signals.wish.end is None:
            if (word := gate.wait(life)) != "diverge" and signals.now():
                continue
            step += 1
            values = dict.fromkeys(metrics.COLUMNS, 1.0) | {"step": step, "t": time.time()}
            curve.step(values, [(step, 1.0, 1)])
            if word == "diverge":
                return "diverged", {"step": step, "cause": "planted", "rows": [{"row": step}]}
            if step < total and (signals.save_asked.is_set() or step % every == 0):
                signals.save_asked.clear()
                save_small(run, life, step, keep, workspace.current.steps_of(run.run_id))
                saved = step
    finally:
        curve.close()
    if step and saved != step and signals.wish.end != "stop-now":
        save_small(run, life, step, keep, workspace.current.steps_of(run.run_id))
    if step == total:
        return "finished", {"step": step}
    return kind.get(str(signals.wish.end), "stopped"), {"step": step, "by": signals.wish.by}


class NoWorker:
    """Stands in for the worker process of a cheap house: the doctor looks at uploads in this process."""

    def call(self, op: str, *, path: str, **args: Any) -> dict[str, Any]:
        """The doctor's report, the only question that is asked here."""
        assert op == "check_data"
        return check_data(path)

    def warm(self) -> None:
        """Nothing to start."""

    def close(self) -> None:
        """Nothing to end."""


class House:
    """A workspace with its server; `ask` is a request by one of its users, `close` takes everything away."""

    def __init__(self, model: Path, data: Path, *, real: bool) -> None:
        self.real, self.model, self.data = real, model, data
        self.root = Path(tempfile.mkdtemp(prefix="states-"))
        self.workspace = Workspace(self.root / "ws").create()
        self.gate = Gate()
        # a thread of its own: a browser that an earlier test opened keeps a loop running in this one
        self.asking = ThreadPoolExecutor(1)
        self.worker: Any = Worker() if real else NoWorker()
        self.patches = contextlib.ExitStack()
        self._patch()
        self.open()

    def _patch(self) -> None:
        """Put the gate in. Locks are refused sooner, since nobody here is about to free one."""
        acquire = locks.FileLock.acquire
        sooner = lambda lock, note, retry_s=1.0: acquire(lock, note, min(retry_s, 0.05))  # noqa: E731
        self.patches.enter_context(patch.object(locks.FileLock, "acquire", sooner))
        life_of = self._real_life if self.real else self._small_life
        self.patches.enter_context(patch("trainer.engine.train_to_end", life_of))
        if not self.real:  # what a disk keeps is for the tests of power loss
            self.patches.enter_context(patch.object(os, "fsync", lambda fd: None))
            return
        gate, one_step, find = self.gate, Training._one_step, session._where_to_go_on

        def found(run: RunDir, say: Any) -> Any:
            before = find(run, say)
            assert gate.life is not None
            gate.wait(gate.life)
            return before

        def step(training: Training) -> bool:
            training.saver.join()
            assert gate.life is not None
            if gate.wait(gate.life) == "diverge":
                with torch.no_grad():
                    training.stepper.named[0][1].fill_(float("nan"))
            return one_step(training)

        self.patches.enter_context(patch.object(session, "_where_to_go_on", found))
        self.patches.enter_context(patch.object(Training, "_one_step", step))

    def _real_life(self, life: Life, *given: Any, **named: Any) -> str:
        self.gate.life = life
        try:
            return session.train_to_end(life, *given, **named)
        except Killed:
            return "killed"
        finally:
            self.gate.ended()

    def _small_life(self, life: Life, workspace: Workspace, *given: Any, **named: Any) -> str:
        try:
            kind, fields = stand_in(self.gate, life, workspace)
        except RuntimeError as error:
            kind, fields = "failed", {"cause": str(error)}
        except Killed:
            kind = "killed"
        try:
            if kind != "killed":
                life.events.append(kind, **fields)
            return kind
        finally:
            life.close()
            self.gate.ended()

    def open(self) -> None:
        """Start the server."""
        self.engine = Engine(self.workspace, self.worker)
        jobs = Jobs(self.workspace.jobs)
        site = Site(self.workspace, self.engine, self.worker, jobs, None, self.root)  # type: ignore[arg-type]
        app = Starlette(
            routes=[*ui.feed.routes(site), *ui.queue_api.routes(site), *ui.data_api.routes(site)],
        )

        async def as_operator(scope: Any, receive: Any, send: Any) -> None:
            scope["signalbox.caller"] = replace(scope["signalbox.caller"], role="operator")
            await app(scope, receive, send)

        self.doors = {
            "owner": httpx.ASGITransport(Guard(app, Rules())),  # type: ignore[arg-type]
            "operator": httpx.ASGITransport(Guard(as_operator, Rules())),  # type: ignore[arg-type]
        }

    def ask(self, user: str, method: str, path: str, **body: Any) -> tuple[int, dict[str, Any]]:
        """One request by `user`; returns status and the JSON of the reply."""

        async def once() -> httpx.Response:
            async with httpx.AsyncClient(transport=self.doors[user], base_url="http://localhost") as client:
                return await client.request(method, path, timeout=WAIT_S, **body)

        reply = self.asking.submit(asyncio.run, once()).result()
        return reply.status_code, reply.json()

    def command_line(self, *words: str) -> int:
        """The exit status of `python -m trainer WORDS`, called in this process."""
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return cli.main(list(words))

    def settings(self, resumes: int) -> Config:
        """Four steps, a save after the second, one checkpoint kept."""
        return runs.settings(
            self.model,
            self.data,
            max_steps=4,
            output={"save_steps": 2, "save_total_limit": 1, "resume_interrupted": resumes},
            eval={"eval_strategy": "no"},
        )

    def tell(self, word: str) -> str:
        """Let the trainer go on; when its life is over, wait until the engine is free."""
        return self._settled(self.gate.say(word))

    def began(self) -> None:
        """A life was begun: wait until it stands at its first gate."""
        assert self.gate.heard() == "gate"

    def _settled(self, heard: str) -> str:
        while heard == "ended" and self.engine._accepted is not None:
            time.sleep(0.0002)
        return heard

    def restart(self, live: bool) -> None:
        """End the server as a service manager would, and start it anew."""
        if live:
            self.gate._said.put("until told")
        assert self.engine.shutdown(30)
        while live and self.gate.heard() != "ended":
            pass
        self._anew()

    def killed(self) -> None:
        """The server is gone with what it was doing; a new one comes up."""
        self.engine.shutdown(30)
        self._anew()

    def _anew(self) -> None:
        if self.real:
            self.worker = Worker()
        self.open()
        self.engine.recover([])

    @contextlib.contextmanager
    def closing(self) -> Iterator[None]:
        """Close whatever happens."""
        try:
            yield
        finally:
            self.patches.close()
            self.asking.shutdown()
            shutil.rmtree(self.root, ignore_errors=True)

    def close(self, live: bool) -> None:
        """End everything and take the workspace away."""
        with self.closing():
            deadline = time.monotonic() + WAIT_S
            # more than one life where a fault was planted and found: each waits at the gate for its word
            while self.engine._accepted is not None and time.monotonic() < deadline:
                if live:
                    self.gate._said.put("kill")
                time.sleep(0.01)
            self.engine.shutdown(30)
            for thread in threading.enumerate():  # the doctor may still look at an upload
                if thread.name.startswith("job-"):
                    thread.join(WAIT_S)
