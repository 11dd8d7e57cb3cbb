"""Signalbox as it is measured: the product's own model building, plan and training loop, on a token cache."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.training.clock import Clock, Peak
from benchmarks.training.data import SEED
from benchmarks.training.work import LEARNING_RATE, LORA_ALPHA, LORA_RANK, Trained, Work
from trainer.config import resolve
from trainer.events import EventLog
from trainer.loop import prepare
from trainer.loop.ready import Progress, Ready, Surroundings
from trainer.loop.save import Saver
from trainer.loop.train import Training
from trainer.machine import machine
from trainer.metrics import read_records
from trainer.rewind import Rewinds
from trainer.run import create_run
from trainer.schema import Config
from trainer.signals import Signals
from trainer.telemetry import Telemetry
from trainer.worker import Worker


def settings(work: Work) -> Config:
    """The case as a config of the product."""
    case, packed = work.case, work.arm.form == "packed"
    return resolve(
        {
            "model_path": str(work.model_path),
            "data": {"dataset_path": "rows.jsonl", "seed": SEED},
            "hyperparams": {
                "method": case.method,
                "batch_size": case.micro_packs if packed else case.micro_rows,
                "gradient_accumulation": case.packs // case.micro_packs if packed else case.accumulation,
                "learning_rate": LEARNING_RATE,
                "lr_schedule": "constant",
                "warmup_steps": 0,
                "fp_precision": case.precision,
                "max_length": case.max_length,
                "packing": packed,
                "use_gradient_checkpointing": case.checkpointing,
                "compile": work.arm.compiled,
            },
            "lora": {"r": LORA_RANK, "alpha": LORA_ALPHA},
            "output": {"save_steps": 0},
            "eval": {"eval_strategy": "no"},
        }
    )


def train(work: Work, clock: Clock, peak: Peak) -> Trained:
    """Train through `Training.loop`: metrics, row losses and telemetry are written as in any run.

    The state after the last step is not saved, since no arm saves: `saved_step` says that it is on the disk already.
    """
    config, here = settings(work), machine()
    said: list[str] = []
    model = prepare.build_model(config, work.model_path, work.cache, work.device, here.cpu_name, said.append)
    _time_steps(model.stepper, clock)
    run = create_run(work.scratch / "runs", {"config": config.model_dump()})
    events = EventLog(run.events)
    telemetry = Telemetry(run.telemetry, None, None)
    around = Surroundings(
        run, events, Signals(), telemetry, Worker(), work.scratch, work.scratch, work.device, here.cpu_name, 1, 1,
        said.append,
    )  # fmt: skip
    rows = len(work.cache.lengths)
    tokens = prepare.Tokens(work.cache, work.cache, np.empty(0, np.int64), np.arange(rows), np.ones(rows))
    saver = Saver(run.checkpoints, events, model.trained, model.tokenizer, model.loaded.base_path, 1)
    h = config.hyperparams
    progress = Progress(packs_each=h.batch_size, checkpointing=h.use_gradient_checkpointing)
    ready = Ready(tokens, work.plan, model, saver, None, [], progress, work.plan.total_steps, {}, Rewinds())
    telemetry.start()
    model.loaded.attention.calls.clear()
    peak.start()
    try:
        outcome = Training(around, config, ready).loop()
    finally:
        telemetry.stop()
        around.worker.close()
        events.close()
    if outcome.kind != "finished":
        raise RuntimeError(f"the run ended {outcome.kind} at step {outcome.step}")
    calls = model.loaded.attention.calls
    notes = {"loss path": model.choice.path.way, "precision": model.precision.name}
    return Trained(
        [float(loss) for loss in read_records(run.metrics)["loss"]],
        ", ".join(sorted(calls)) or ("inside compiled layers" if work.arm.compiled else "the model's own"),
        notes
        | ({} if progress.packs_each == h.batch_size else {"micro-batch after an out-of-memory": progress.packs_each}),
    )


def _time_steps(stepper: Any, clock: Clock) -> None:
    """Have the clock told after each of the product's steps; nothing else of the step changes."""
    step = stepper.step

    def timed(*args: Any) -> Any:
        record = step(*args)
        clock.step_ended()
        return record

    stepper.step = timed
