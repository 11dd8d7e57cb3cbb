"""`python -m tests.night_phases FOLDER`: trains runs as the command line does and sends itself SIGTERM in a given phase.

Slow are, each in its own run: the groups of held-out rows, the disk (every fsync), the micro-batches from step 3 on. Prints
`PHASE name {"seconds", "state", "step", "saved", "by"}`; started by tests/test_night.py.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tests import runs
from tests.tiny import tiny_model_dir
from trainer import checkpoint
from trainer.alone import train_alone
from trainer.events import EventLog, all_events
from trainer.loop import evaluate
from trainer.loop.step import Stepper
from trainer.run import RunDir, status
from trainer.schema import Config
from trainer.workspace import Workspace

_append, _backward, _losses, _fsync = EventLog.append, Stepper._backward, evaluate.losses, os.fsync


class Teller:
    """Sends the signal once, and knows when."""

    def __init__(self, phase: str) -> None:
        self.phase = phase
        self.told_s = 0.0
        self.log: EventLog | None = None

    def append(self, log: EventLog, kind: str, **fields: Any) -> int:
        """Write the event; at the phase send the signal, a moment later, so that it comes in the middle."""
        self.log = log
        number = _append(log, kind, **fields)
        if kind == "phase" and fields["name"] == self.phase:
            threading.Timer(0.05, self.tell).start()
        return number

    def tell(self) -> None:
        """The signal, as a service manager sends it."""
        if not self.told_s and self.log is not None:
            _append(self.log, "log", text="SIGTERM")
            self.told_s = time.monotonic()
            os.kill(os.getpid(), signal.SIGTERM)


def one(root: Path, name: str, config: Config, phase: str = "", slow_step_s: float = 0.0) -> None:
    """Train one run, be told to end in `phase` or in a slow step 3, say how long it took and what is left."""
    teller = Teller(phase or name)
    micro_batches = config.hyperparams.gradient_accumulation

    def backward(stepper: Stepper, batch: Any, labels: int) -> Any:
        stepper.taken = getattr(stepper, "taken", 0) + 1  # type: ignore[attr-defined]
        if slow_step_s and stepper.taken > 2 * micro_batches:
            threading.Timer(0.05, teller.tell).start()
            time.sleep(slow_step_s)
        return _backward(stepper, batch, labels)

    with patch.object(EventLog, "append", lambda log, kind, **fields: teller.append(log, kind, **fields)):
        with patch.object(Stepper, "_backward", backward):
            train_alone(Workspace(root / "ws").create(), config, root / name)
    seconds = time.monotonic() - teller.told_s
    run = RunDir(root / name)
    end = all_events(run.events)[-1]
    saved = checkpoint.newest_verified(run.checkpoints).step if checkpoint.listed(run.checkpoints) else 0
    found = {"seconds": seconds, "state": status(run).state, "step": end["step"], "saved": saved, "by": end.get("by")}
    print("PHASE", name, json.dumps(found), flush=True)


def main(root: Path) -> None:
    """All phases, the one that never ends last."""
    model = tiny_model_dir(root / "model")
    small, large = runs.write_rows(root / "small.jsonl"), runs.write_rows(root / "large.jsonl", 60_000)
    off = {"eval_strategy": "no"}
    one(root, "tokenise", runs.settings(model, large, eval=off))
    one(root, "load", runs.settings(model, small, eval=off))
    slow_group = lambda *given: time.sleep(0.5) or _losses(*given)  # noqa: E731
    with patch.object(evaluate, "losses", slow_group):
        config = runs.settings(model, small, max_length=64)
        many = config.data.model_copy(update={"validation_split": 0.5})
        one(root, "eval", config.model_copy(update={"data": many}))
    sample = {"eval_strategy": "no", "sample_steps": 2, "sample_max_tokens": 8192, "sample_max_s": 3600}
    one(root, "sample", runs.settings(model, small, eval=sample))
    with patch.object(os, "fsync", lambda fd: time.sleep(0.06) or _fsync(fd)):
        one(root, "save", runs.settings(model, small, eval=off, output={"save_steps": 3}))
    long = runs.settings(model, small, eval=off, batch_size=1, gradient_accumulation=4, output={"save_steps": 0})
    one(root, "step", long, "never", slow_step_s=3.0)
    one(root, "stuck", long, "never", slow_step_s=3600.0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
