"""Real tiny runs, killed with SIGKILL at random moments and resumed until they end; a report in JSON on stdout.

One warm process, which has imported torch and never computes, forks for each life of a run: no life waits for imports. What
the worker process does is done by the same code inside the life. Started by tests/test_kill.py; by hand:
`python -m tests.kill_loop PLACE --kills 500 --seed 1`.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy.ctypeslib  # noqa: F401  (these four: what a life would import)
import transformers.models.qwen3.modeling_qwen3  # noqa: F401

import tests.runs as runs
import trainer.data.tokens
import trainer.loop.train
import trainer.worker_ops
from tests.tiny import tiny_model_dir
from trainer import checkpoint
from trainer.events import all_events
from trainer.files import read_json
from trainer.machine import Machine, machine
from trainer.metrics import read_metrics, read_rows
from trainer.run import RunDir, status
from trainer.schema import Config
from trainer.session import open_life, train_to_end
from trainer.workspace import Workspace

KINDS: dict[str, dict[str, Any]] = {
    "full, a save each step, 2 kept": dict(method="full", output={"save_steps": 1, "save_total_limit": 2}),
    "full, a save each second step, 3 kept": dict(method="full", output={"save_steps": 2, "save_total_limit": 3}),
    "lora with dropout, a save each step, 1 kept": dict(
        method="lora", lora={"r": 4, "dropout": 0.1}, output={"save_steps": 1, "save_total_limit": 1}
    ),
}
STEPS = 10
DAMAGE_ONE_IN = 6
LIFE_LIMIT_S = 120.0
CURVE = ("step", "loss", "grad_norm", "learning_rate")
HIDDEN = (checkpoint.STAGING, checkpoint.REPLACED, checkpoint.REMOVED)


class WorkerHere:
    """The worker's operations without its process, whose start would cost each life a second."""

    def call(self, op: str, *, timeout_s: float, on_progress: Any = None, cancelled: Any = None, **args: Any) -> Any:
        """What the child process would answer."""
        return json.loads(json.dumps(trainer.worker_ops.Operations(lambda done, total: None).run(op, args)))


@dataclass
class Report:
    """What happened, and every promise that was not kept."""

    kills: int = 0
    in_a_save: int = 0
    by_phase: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    lives: int = 0
    resumed_and_went_on: int = 0
    damaged: int = 0
    acknowledged: int = 0
    saved_unacknowledged: int = 0
    stood_aside: int = 0
    violations: list[str] = field(default_factory=list)
    seconds: float = 0.0


@dataclass
class Victim:
    """One run: what it acknowledged and what was done to it. `gone` was pruned, `broken` was damaged by us."""

    run: RunDir
    kind: str
    keep: int
    acknowledged: set[int] = field(default_factory=set)
    gone: set[int] = field(default_factory=set)
    broken: set[int] = field(default_factory=set)
    events_seen: int = 0


def fork_life(run: RunDir, workspace: Workspace, here: Machine) -> int:
    """Start the next life of `run` in a forked child; returns its pid. The child never returns."""
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        said = os.open(run.path / "said.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(said, 1)
        os.dup2(said, 2)
        life = open_life(run, "kill loop", resumed=run.events.exists())
        train_to_end(life, workspace, WorkerHere(), here)  # type: ignore[arg-type]
        code = 0
    finally:
        os._exit(code)


def wait(pid: int, seconds: float) -> int | None:
    """The exit code of a child that ends in time, else None."""
    deadline = time.monotonic() + seconds
    while True:
        done, how = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(how)
        if time.monotonic() >= deadline:
            return None
        time.sleep(0.001)


def proof(run: RunDir) -> dict[str, Any]:
    """All that must be the same in a run that was never killed: curve, rows, held-out losses, weights and states."""
    last = checkpoint.newest_verified(run.checkpoints)
    files = read_json(last.path / checkpoint.MANIFEST)["files"]
    curve = [[float(record[name]) for name in CURVE] for record in read_metrics(run.metrics)]
    return {
        "state": status(run).state,
        "curve": curve,
        "rows": [read_rows(run.rows, step) for step in range(1, STEPS + 1)],
        "held out": {e["step"]: e["loss"] for e in all_events(run.events) if e["kind"] == "eval"},
        "weights": {name: entry["sha256"] for name, entry in files.items() if name.endswith(".safetensors")},
        "step": last.step,
    }


def hidden(run: RunDir, since_s: float = 0.0) -> list[Path]:
    """What saves and removals in progress left in the checkpoint folder, changed after `since_s` (seconds since 1970)."""
    found = [path for path in run.checkpoints.iterdir() if path.name.startswith(HIDDEN)]
    return [path for path in found if path.stat().st_ctime >= since_s]


def standing_aside(run: RunDir) -> dict[int, Path]:
    """{step: directory} of checkpoints that stepped aside for one that never came."""
    prefix = checkpoint.REPLACED + checkpoint.STEP
    steps = {int(path.name.removeprefix(prefix)): path for path in hidden(run) if path.name.startswith(prefix)}
    return {step: path for step, path in steps.items() if not checkpoint.directory_of(run.checkpoints, step).exists()}


def newest_whole(run: RunDir) -> int | None:
    """The step that a resume must take up, one that stands aside included; None where there is none."""
    there = dict(checkpoint.listed(run.checkpoints)) | standing_aside(run)
    return max((step for step, path in there.items() if not checkpoint.verify(path)), default=None)


def check(victim: Victim, report: Report) -> None:
    """Hold the promises against what is on the disk now."""
    run, wrong = victim.run, report.violations
    events = all_events(run.events)
    new, victim.events_seen = events[victim.events_seen :], len(events)
    for event in new:
        if event["kind"] == "checkpoint":
            victim.acknowledged.add(event["step"])
            victim.gone.discard(event["step"])
            victim.broken.discard(event["step"])
            report.acknowledged += 1
        if event["kind"] == "failed":
            wrong.append(f"{run.run_id} ({victim.kind}): a resume failed: {event['cause']}")
    if [event["n"] for event in events] != list(range(1, len(events) + 1)):
        wrong.append(f"{run.run_id}: events are not numbered one by one")
    there = dict(checkpoint.listed(run.checkpoints))
    aside = standing_aside(run)
    faults = {step: checkpoint.verify(path) for step, path in there.items()}
    for step, problems in faults.items():
        if problems and step not in victim.broken:
            wrong.append(f"{run.run_id}: step {step} stands under its name and is not whole: {problems[0]}")
    whole = {step for step, problems in faults.items() if not problems}
    report.saved_unacknowledged += len(whole - victim.acknowledged)
    for step in sorted(victim.acknowledged - victim.broken - victim.gone - whole, reverse=True):
        if step in aside and not checkpoint.verify(aside[step]):
            report.stood_aside += 1
        elif sum(newer > step for newer in whole) >= victim.keep:
            victim.gone.add(step)
        else:
            wrong.append(f"{run.run_id}: step {step} was acknowledged and is lost; whole: {sorted(whole)}")


def check_resume(victim: Victim, expected: int | None, first_event: int, report: Report) -> None:
    """A life that came so far must have taken up the newest whole checkpoint, and no other."""
    said = [e["text"] for e in all_events(victim.run.events)[first_event:] if e["kind"] == "log"]
    resumed = [int(text.split()[-1].rstrip(".")) for text in said if text.startswith("Resuming from step")]
    if resumed:
        report.resumed_and_went_on += 1
        if expected is not None and resumed != [expected]:
            report.violations.append(f"{victim.run.run_id}: resumed from {resumed}, the newest whole one is {expected}")


def damage_newest(victim: Victim, draw: random.Random, report: Report) -> None:
    """Flip a bit of the newest checkpoint where an older whole one is there: the step will be saved once more."""
    listed = checkpoint.listed(victim.run.checkpoints)
    if len(listed) < 2 or checkpoint.verify(listed[0][1]) or checkpoint.verify(listed[1][1]):
        return
    path = draw.choice(sorted(listed[0][1].rglob("*.safetensors")))
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)
    victim.broken.add(listed[0][0])
    report.damaged += 1


def torture(
    victim: Victim, workspace: Workspace, here: Machine, draw: random.Random, life_s: float, report: Report
) -> None:
    """Kill and resume one run until it has finished or `report` has its kills."""
    run = victim.run
    report.runs += 1
    stuck = 0  # lives without a new checkpoint: on a machine that became slower than `life_s` they are let live longer
    while status(run).state != "finished" and not report.violations:
        if draw.randrange(DAMAGE_ONE_IN) == 0:
            damage_newest(victim, draw, report)
        expected, first_event, began_s = newest_whole(run), victim.events_seen, time.time()
        pid = fork_life(run, workspace, here)
        report.lives += 1
        acknowledged = report.acknowledged
        code = wait(pid, draw.uniform(0.0, life_s * (1 + stuck / 4)))
        if code is None:
            os.kill(pid, signal.SIGKILL)
            code = wait(pid, LIFE_LIMIT_S)
        if code == -signal.SIGKILL:
            report.kills += 1
            phases = [e["name"] for e in all_events(run.events)[first_event:] if e["kind"] == "phase"]
            report.by_phase[phases[-1] if phases else "opening"] += 1
            report.in_a_save += bool(hidden(run, began_s))
        elif code != 0:
            report.violations.append(
                f"{run.run_id}: a life ended with exit code {code}: {(run.path / 'said.txt').read_text()}"
            )
        check(victim, report)
        stuck = stuck + 1 if report.acknowledged == acknowledged else 0
        check_resume(victim, expected, first_event, report)


def unbroken(workspace: Workspace, config: Config, here: Machine) -> tuple[dict[str, Any], float]:
    """The proof of a run that nobody kills, and the seconds of its life."""
    run, started = runs.new(workspace, config), time.monotonic()
    code = wait(fork_life(run, workspace, here), LIFE_LIMIT_S)
    took = time.monotonic() - started
    if code != 0 or status(run).state != "finished":
        raise SystemExit(f"the unbroken run did not finish: {(run.path / 'said.txt').read_text()}")
    return proof(run), took


def kill_all(place: Path, kills: int, seed: int) -> Report:
    """Run after run of all kinds until `kills` lives were killed; each run is finished and compared."""
    workspace, here, draw = Workspace(place / "ws").create(), machine(), random.Random(seed)
    data = runs.write_rows(place / "rows.jsonl", 40)
    maker = os.fork()
    if maker == 0:  # the warm process itself must never compute: a thread of torch would not survive the forks
        tiny_model_dir(place / "model", hidden=32, layers=1)
        os._exit(0)
    os.waitpid(maker, 0)
    configs = {
        kind: runs.settings(place / "model", data, max_steps=STEPS, eval={"eval_steps": 4}, **settings)
        for kind, settings in KINDS.items()
    }
    gc.collect()
    gc.freeze()  # else each life would walk, and copy, all that the libraries made
    report, started = Report(), time.monotonic()
    whole = {kind: unbroken(workspace, config, here) for kind, config in configs.items()}
    while report.kills < kills and not report.violations:
        kind = list(KINDS)[report.runs % len(KINDS)]
        wanted, life_s = whole[kind]
        victim = Victim(runs.new(workspace, configs[kind]), kind, configs[kind].output.save_total_limit)
        torture(victim, workspace, here, draw, life_s, report)
        if not report.violations:
            found = proof(victim.run)
            report.violations += [
                f"{victim.run.run_id} ({kind}): {part} differs from the unbroken run" for part in wanted
                if found[part] != wanted[part]
            ]  # fmt: skip
    report.seconds = time.monotonic() - started
    return report


def main() -> None:
    """Read the arguments, kill, print the report."""
    parser = argparse.ArgumentParser()
    parser.add_argument("place", type=Path)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    asked.place.mkdir(parents=True, exist_ok=True)
    report = kill_all(asked.place, asked.kills, asked.seed)
    json.dump(vars(report), sys.stdout)


if __name__ == "__main__":
    main()
