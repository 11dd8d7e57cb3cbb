"""Runs without a server: the command line's train, resume, smoke, inspect and checks, each in this process alone."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer import launch, lease
from trainer.cli import REFUSED, install_stop
from trainer.console import say
from trainer.engine import MUST_RESTART, threads_for
from trainer.files import make_private_dir
from trainer.machine import Machine, machine
from trainer.notify import Notifier
from trainer.refusal import Refusal
from trainer.run import RunDir, new_run_id, status
from trainer.schema import Config
from trainer.session import Life, open_life, train_to_end
from trainer.signals import GIVE_UP_S, Deadline, Signals
from trainer.states import allowed
from trainer.worker import Worker
from trainer.workspace import Workspace

if TYPE_CHECKING:
    from trainer.loop.team import Team

NOTIFY_S = 5.0
"""So long the command waits, when all else is done, for the webhook to be told."""
GOOD_ENDS = ("finished", "stopped", "paused")


def owner_here() -> str:
    """Who runs this command."""
    return os.environ.get("USER") or "command line"


def _say(text: str) -> None:
    say(f"{time.strftime('%H:%M:%S')} {text}")


def ask_worker(op: str, **args: Any) -> Any:
    """One question to the worker process, which is ended afterwards."""
    worker = Worker()
    try:
        return worker.call(op, timeout_s=3600, **args)
    finally:
        worker.close()


def train_alone(workspace: Workspace, config: Config, output: Path | None) -> int:
    """Train a new run to its end; exit status 0, or 2 when it failed or diverged. Under torchrun, together."""
    here = machine()
    with _joined(here) as team:
        if team is not None and not team.leads:
            return _help_along(team, here)
        launch.check_paths(config)
        output = (output or workspace.runs / new_run_id()).absolute()
        with _devices(here, team, output, launch.auto_name(config)):
            threads = max(1, threads_for(here) // (team.size if team else 1))
            run, _ = launch.new_run(workspace, config, here, owner=owner_here(), threads=threads, output=output)
            say(f"Run directory: {run.path}")
            return _to_end(open_life(run, owner_here(), resumed=False), workspace, team)


def resume_alone(run: RunDir, quiet: bool) -> int:
    """Go on with a run from its newest whole checkpoint. Under torchrun, together."""
    here = machine()
    with _joined(here) as team:
        if team is not None and not team.leads:
            return _help_along(team, here)
        now = status(run)
        if now.state == "finished":
            print(f"This run is finished at step {now.current_step:,}: there is nothing to resume.")
            return 0
        if "resume" not in allowed(now.state):
            raise Refusal(f"This run is {now.state}: there is nothing to resume.")
        with _devices(here, team, run.path, now.name):
            root = Path(run.snapshot().get("workspace", run.path.parent.parent))
            workspace = Workspace(root).create()
            life = open_life(run, owner_here(), resumed=True, may=lambda state: "resume" in allowed(state))
            return _to_end(life, workspace, team, quiet=quiet)


@contextlib.contextmanager
def _joined(here: Machine) -> Iterator[Team | None]:
    """The processes that torchrun started, met; None where this one is alone, and torch is not imported yet."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield None
        return
    from trainer.loop import team

    size = int(os.environ["WORLD_SIZE"])
    if here.gpu is not None and len(here.gpus) < size:
        raise Refusal(f"{size} processes were started, and this machine has {len(here.gpus)} GPUs: one each is needed.")
    try:
        yield team.join(cuda=here.gpu is not None)
    finally:
        team.leave()


@contextlib.contextmanager
def _devices(here: Machine, team: Team | None, run: Path, name: str) -> Iterator[None]:
    """The lease of the device, or of every device a team computes on; Refusal (Busy) when one is taken."""
    devices = [gpu.uuid.lower() for gpu in here.gpus[: team.size]] if team and here.gpu else [here.device]
    with contextlib.ExitStack() as held:
        for device in devices:
            lock = lease.acquire(device, kind="train", owner=owner_here(), run_id=run.name, name=name, run_path=run)
            held.callback(lock.release)
        yield


def _help_along(team: Team, here: Machine) -> int:
    """Help the leader to its end. Signals are the leader's: a Ctrl-C reaches every process of the team."""
    from trainer.loop.follow import follow

    for name in ("SIGTERM", "SIGINT", "SIGHUP"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    follow(team, here)
    return 0


def _to_end(life: Life, workspace: Workspace, team: Team | None, quiet: bool = False) -> int:
    deadline = Deadline(life.signals, lambda: _give_up(life))
    install_stop(deadline.told)
    worker, notifier = Worker(), Notifier(workspace.root)
    run = life.run
    try:
        end = train_to_end(
            life,
            workspace,
            worker,
            machine(),
            echo=(lambda text: None) if quiet else _say,
            team=team,
            notifier=notifier,
        )
    finally:
        deadline.close()
        worker.close()
    notifier.wait(1.0 if deadline.was_told else NOTIFY_S)
    now = status(run)
    if not quiet:
        loss = f", loss {now.loss:.3f}" if now.loss is not None else ""
        _say(f"{end.capitalize()} at step {now.current_step:,} of {now.total_steps or 0:,}{loss}.")
    if life.poisoned:
        return MUST_RESTART
    return 0 if end in GOOD_ENDS else REFUSED


def _give_up(life: Life) -> None:
    """End the process in the middle of whatever takes too long: what was saved before stands."""
    life.cut_off()
    _say(f"The run was not through within {GIVE_UP_S:g} s and is cut off. Its last checkpoint is safe.")
    os._exit(REFUSED)


def _ask(signals: Signals, by: str) -> None:
    signals.ask("stop", by)


def smoke_alone(workspace: Workspace, config: Config, as_json: bool) -> int:
    """The smoke test; exit status 0 when every check that is possible here passed, else 1."""
    from trainer.smoke import run_smoke

    here = machine()
    launch.check_paths(config)
    prompt = launch.prompt_of(config, workspace.profiles)
    lock = lease.acquire(here.device, kind="smoke", owner=owner_here(), run_id="", name=config.display_name)
    worker, signals = Worker(), Signals()
    install_stop(lambda by: _ask(signals, by))
    try:
        folder = make_private_dir(workspace.smoke / (time.strftime("%Y%m%d-%H%M%S-") + os.urandom(2).hex()))
        report = run_smoke(folder, config, prompt, workspace, worker, here, threads_for(here), signals.interrupt)
    finally:
        worker.close()
        lock.release()
    if as_json:
        print(json.dumps(report))
    else:
        marks = {"pass": "✓", "problem": "✕", "not_possible": "–"}
        for line in report["lines"]:
            print(f"{marks[line['status']]} {line['text']}")
        print(report["summary"])
    return 0 if report["failed"] == 0 and report["state"] == "done" else 1


def inspect_alone(workspace: Workspace, config: Config) -> int:
    """Print the first batch, token by token: trained tokens underlined where the terminal can, marked by [] elsewhere."""
    from trainer.loop.first_batch import first_batch

    launch.check_paths(config)
    worker = Worker()
    try:
        shown = first_batch(config, launch.prompt_of(config, workspace.profiles), workspace, worker)
    finally:
        worker.close()
    colour = os.isatty(1)
    start = 0
    for document in shown["documents"]:
        piece = f", piece {document['piece']}" if document["piece"] else ""
        end = start + document["tokens"]
        print(
            f"-- row {document['row']} ({document['file']}, line {document['line']}{piece}): {document['tokens']} tokens, "
            f"{document['labels']} labels; places {start} to {end - 1} of the batch, positions 0 to {document['tokens'] - 1}"
        )
        start = end
        text = "".join(
            (f"\x1b[4;36m{token['text']}\x1b[0m" if colour else f"[{token['text']}]")
            if token["trained"]
            else token["text"]
            for token in document["pieces"]
        )
        print(text)
        if document["cut"]:
            print(f"-- cut here: {document['cut']:,} more tokens of the row do not fit into {shown['max_length']:,}.")
    print(shown["summary"])
    return 0
