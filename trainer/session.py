"""One life of a run, from taking its lock to its last event: the edge where any fault becomes a sentence in events.jsonl.

Called on the engine's thread or by the command line. Torch is imported inside, on the thread that computes.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from trainer import checkpoint, console, control, locks, process_peak
from trainer.ends import boot_id
from trainer.events import EventLog, all_events
from trainer.launch import Prompt
from trainer.machine import GIB, Machine
from trainer.notify import Message, Notifier, message_of, unsaved_message
from trainer.recovery import SHUTDOWN, trainer_note
from trainer.refusal import Refusal
from trainer.rewind import go_around, note_memory, rewind
from trainer.run import RunDir, status
from trainer.schema import Config
from trainer.signals import ControlWatch, Signals
from trainer.stall import StallWatch
from trainer.states import LIFECYCLE, State, derive
from trainer.telemetry import Telemetry
from trainer.worker import Worker
from trainer.workspace import Workspace

if TYPE_CHECKING:
    from trainer.loop.ready import Surroundings
    from trainer.loop.team import Team
    from trainer.loop.train import Outcome


TOO_LONG = "it was told to end, and the run was not through in time"
"""Why a run was cut off whose process had to end before it was stopped and saved."""


@dataclass
class Life:
    """An opened run: its lock, its events, and the flags others set. `close` frees the lock, last of all."""

    run: RunDir
    events: EventLog
    signals: Signals
    lock: locks.FileLock
    number: int
    poisoned: bool = False

    def cut_off(self) -> None:
        """Write that the process ends before the run does; called right before the process is gone."""
        try:
            self.events.append("cut_off", cause=TOO_LONG)
        except ValueError:
            pass  # the run has just come through after all, and its events are closed

    def close(self) -> None:
        """Close the events, then free the lock."""
        self.events.close()
        self.lock.release()


def open_life(
    run: RunDir,
    owner: str,
    *,
    resumed: bool,
    around_rows: bool = False,
    auto: bool = False,
    may: Callable[[State], bool] = lambda state: True,
) -> Life:
    """Take the run's lock and write its first event; Refusal when another process trains it.

    `around_rows`: a diverged run goes on without the rows of its bad step, at a lower rate. `auto` says that the run goes
    on by itself: nobody asked for this life. `may` says whether the run's state, looked at under the lock, allows it:
    between a look without the lock and this one another process may have trained the run to its end.
    """
    lock, events = locks.FileLock(run.lock), None
    try:
        if not lock.acquire({"owner": owner, **trainer_note()}):
            raise Refusal(f"The run {run.run_id} is being trained already, by another process.")
        past = list(all_events(run.events))
        state = derive(False, next((event["kind"] for event in reversed(past) if event["kind"] in LIFECYCLE), None))
        if not may(state):
            raise Refusal(f"This run is {state} by now, since another process was faster. Nothing was changed.")
        control.clear(run.control)  # a stop left for an earlier life must not end this one
        lives = sum(event["kind"] in ("started", "resumed", "rewind") for event in past)
        events = EventLog(run.events)
        by_itself = {"auto": True} if auto else {}
        events.append("resumed" if resumed else "started", owner=owner, life=lives + 1, **by_itself)
        if around_rows:
            lives += go_around(run, events, past)
    except BaseException as error:
        if events is not None:
            events.close()
        lock.release()
        if isinstance(error, OSError):
            why = error.strerror or error
            raise Refusal(f"The run's folder cannot be written: {why}. Nothing was started.") from None
        raise
    return Life(run, events, Signals(), lock, lives + 1)


def train_to_end(
    life: Life,
    workspace: Workspace,
    worker: Worker,
    machine: Machine,
    *,
    echo: Callable[[str], None] | None = None,
    team: Team | None = None,
    notifier: Notifier | None = None,
) -> str:
    """Train `life.run` until it ends, write the last event, free everything; returns the last event's kind.

    Never raises for what happens inside: a Refusal or a fault becomes a `failed` event with its cause. `team` is that of
    the processes which torchrun started, this one leading it; `notifier` tells the run's webhook.
    """

    def say(text: str) -> None:
        life.events.append("log", text=text)
        if echo is not None:
            echo(text)

    gpu = machine.gpu
    with contextlib.ExitStack() as unwind:  # whatever happens here, the run's lock is freed last
        unwind.callback(life.close)
        watch = ControlWatch(life.run.control, life.events, life.signals)
        watch.start()
        unwind.callback(watch.stop)
        telemetry = Telemetry(life.run.telemetry, _allocator if gpu else None, gpu.index if gpu else None)
        telemetry.start()
        unwind.callback(telemetry.stop)
        tell = (lambda message: notifier.tell(life.run.run_id, message)) if notifier else (lambda message: None)
        stall = StallWatch(life.run, life.events, telemetry, tell)
        stall.start()
        unwind.callback(stall.stop)
        kind, fields = _attempt(
            life, workspace, worker, machine, telemetry, say, team, lambda text: _tell_unsaved(life.run, tell, text)
        )
        if kind == "stopped" and fields.get("by") == SHUTDOWN:
            fields["boot"] = boot_id()
        fields |= free_memory(bool(gpu), fields.pop("memory_before_gib", None))
        watch.stop()  # a command answered behind the last event would make an ended run read as one that was cut off
        if kind == "failed" and echo is not None:
            console.say(fields["cause"], sys.stderr)
        try:
            life.events.append(kind, **fields)
        except OSError as error:  # the run will read as interrupted, which is what it is to a resume
            console.say(
                f"The end of run {life.run.run_id} could not be recorded: {error.strerror or error}.", sys.stderr
            )
        _tell_end(life.run, tell)
        return kind


def _tell_unsaved(run: RunDir, tell: Callable[[Message | None], None], text: str) -> None:
    try:
        tell(unsaved_message(status(run), text))
    except (OSError, ValueError):
        pass  # files that cannot be read just now; the alert stands in the run


def _tell_end(run: RunDir, tell: Callable[[Message | None], None]) -> None:
    try:
        tell(message_of(status(run)))
    except (OSError, ValueError):
        pass  # the run's files were taken away: there is nothing to tell of


def _attempt(
    life: Life,
    workspace: Workspace,
    worker: Worker,
    machine: Machine,
    telemetry: Telemetry,
    say: Callable[[str], None],
    team: Team | None,
    tell: Callable[[str], None],
) -> tuple[str, dict[str, Any]]:
    """Run the loop; whatever is raised becomes ("failed", cause), with no frame and no tensor kept alive."""
    fields: dict[str, Any] = {}
    try:
        kind, fields = _run(life, workspace, worker, machine, telemetry, say, team, tell)
    except Refusal as refusal:
        kind, fields = "failed", {"cause": refusal.message, "field": refusal.field}
        traceback.clear_frames(refusal.__traceback__)
    except Exception as error:  # the thread's edge: nothing above could do anything but print it
        text = "".join(traceback.format_exception(error))
        kind, fields = "failed", {"cause": _cause(error), "detail": text[-20_000:]}
        traceback.clear_frames(error.__traceback__)
        life.poisoned = _poisoned(error)
        if life.poisoned:
            fields["restart"] = True  # a fresh process may go on with it, by itself where the settings say so
    fields.setdefault("memory_before_gib", used_gib(machine.gpu is not None))
    return kind, fields


def _run(
    life: Life,
    workspace: Workspace,
    worker: Worker,
    machine: Machine,
    telemetry: Telemetry,
    say: Callable[[str], None],
    team: Team | None,
    tell: Callable[[str], None],
) -> tuple[str, dict[str, Any]]:
    import torch

    from trainer.loop.prepare import pick_device
    from trainer.loop.ready import Surroundings
    from trainer.loop.team import ALONE

    snapshot = life.run.snapshot()
    config = Config.model_validate(snapshot["config"])
    _refuse_without_model(Path(config.model_path))
    prompt = Prompt(snapshot["profile"]["name"], snapshot["profile"]["system_prompt"], snapshot["profile"]["date"])
    found = _where_to_go_on(life.run, say)
    torch.set_num_threads(snapshot["threads"])
    device = pick_device(machine.device)
    around = Surroundings(
        life.run,
        life.events,
        life.signals,
        telemetry,
        worker,
        workspace.tokens,
        workspace.profiles,
        device,
        machine.gpu.name if machine.gpu else machine.cpu_name,
        torch.get_num_threads(),
        life.number,
        say,
        team or ALONE,
        lambda: workspace.current.standing(life.run.run_id),
        tell,
        workspace.root,
        used_gib(False),
    )
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    else:
        process_peak.begin()
    return _train(life, around, config, prompt, found)


def _train(
    life: Life, around: Surroundings, config: Config, prompt: Prompt, found: checkpoint.Found | None
) -> tuple[str, dict[str, Any]]:
    """Get ready and take the steps; once more from a checkpoint when memory ran out in the update, or after a divergence where
    the settings say so.
    """
    from trainer.loop.fit_start import remember_run
    from trainer.loop.prepare import Left
    from trainer.loop.ready import get_ready
    from trainer.loop.shortage import go_on_smaller
    from trainer.loop.train import Training

    gpu = around.device != "cpu"
    try:
        ready = get_ready(around, config, prompt, found)
        outcome = Training(around, config, ready).loop()
        remember_run(around, ready)
        del ready
        while outcome.kind in ("diverged", "memory"):
            short = outcome if outcome.kind == "memory" else None
            if short is not None:
                found = _where_to_go_on(life.run, around.say)
                note_memory(life.events, short.step, found.step if found else 0)
            elif (back := _back(life, config, around.team, outcome)) is not None:
                found = back
            else:
                break
            free_memory(gpu, None)  # the weights that are no good go before the good ones come
            around = replace(around, life=around.life + 1)
            training = Training(around, config, get_ready(around, config, prompt, found))
            if short is not None:
                go_on_smaller(training, short.step, short.fields["progress"])
            outcome = training.loop()
            del training
    except Left:
        wish, saved = life.signals.wish, found.step if found else None
        ended = {"step": saved or 0, "by": wish.by, "saved_step": saved}
        return "paused" if wish.end == "pause" else "stopped", ended
    return outcome.kind, {"step": outcome.step, "memory_before_gib": used_gib(gpu), **outcome.fields}


def _refuse_without_model(folder: Path) -> None:
    if not folder.is_dir():
        raise Refusal(
            f"The model folder {folder.name} is gone, and a resume begins with it. Put it back; every checkpoint of the run "
            "is untouched.",
            "model_path",
        )


def _back(life: Life, config: Config, team: Team, outcome: Outcome) -> checkpoint.Found | None:
    """Where to go on after a divergence, if the settings say so and a whole checkpoint is there; None ends the run."""
    if outcome.kind != "diverged" or config.hyperparams.on_divergence != "rewind" or team.size > 1:
        return None
    return rewind(life.run, life.events, outcome.step, outcome.fields["rows"])


def _where_to_go_on(run: RunDir, say: Callable[[str], None]) -> checkpoint.Found | None:
    """The newest checkpoint that verifies; None for a run cut off before its first save, which starts over.

    Raises Refusal where checkpoints are there and none is whole. The run's lock must be held.
    """
    for name in checkpoint.put_back(run.checkpoints):
        say(f"{name} was put back: the save that was to take its place was cut off.")
    return checkpoint.newest_verified(run.checkpoints) if checkpoint.listed(run.checkpoints) else None


def _allocator() -> tuple[float, float]:
    """(allocated, reserved) GiB of torch's allocator on the GPU; zeros until torch is there."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return 0.0, 0.0
    return torch.cuda.memory_allocated() / GIB, torch.cuda.memory_reserved() / GIB


def used_gib(gpu: bool) -> float:
    """Memory in use: of torch's allocator on a GPU, of the process on a CPU."""
    return _allocator()[1] if gpu else psutil.Process().memory_info().rss / GIB


def free_memory(gpu: bool, before_gib: float | None) -> dict[str, float | None]:
    """Collect, give memory back, and measure: {"memory_before_gib", "memory_after_gib"}."""
    gc.collect()
    torch = sys.modules.get("torch")
    if gpu and torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    elif sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # glibc keeps freed pages otherwise, and the receipt would call that a leak
    return {"memory_before_gib": before_gib, "memory_after_gib": used_gib(gpu)}


def _cause(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0][:300]
    if type(error).__name__ == "OutOfMemoryError":
        return f"Out of memory while loading or preparing: {first} Lower the micro-batch or the maximum length, or use LoRA."
    if isinstance(error, OSError) and error.strerror:  # a full disk, a folder that was closed to us, a bad sector
        where = f" ({Path(os.fsdecode(error.filename)).name})" if error.filename else ""
        return (
            f"The disk refused: {error.strerror}{where}. Checkpoints saved before are safe; resume when that is mended."
        )
    return f"{type(error).__name__}: {first}"


def _poisoned(error: Exception) -> bool:
    """Whether CUDA itself is broken now, so that only a new process can train (exit code 75 asks the supervisor)."""
    text = str(error)
    return "CUDA error" in text or "device-side assert" in text
