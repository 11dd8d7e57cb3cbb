"""Real tiny runs for the tests: a model, a dataset, and one function that trains to an end in this process."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from trainer import launch
from trainer.config import resolve
from trainer.machine import machine
from trainer.metrics import MetricsWriter
from trainer.run import RunDir
from trainer.schema import Config
from trainer.session import open_life, train_to_end
from trainer.worker import Worker
from trainer.workspace import Workspace


def write_rows(path: Path, count: int = 60) -> Path:
    """Chat rows of skewed lengths; every third has a system message, every fifth two turns."""
    with open(path, "w", encoding="utf-8") as file:
        for i in range(count):
            messages = [
                {"role": "user", "content": f"How much is {i} and {i + 1}?"},
                {"role": "assistant", "content": f"Together {2 * i + 1}. " * (1 + i % 7)},
            ]
            if i % 3 == 0:
                messages.insert(0, {"role": "system", "content": "You add numbers."})
            if i % 5 == 0:
                messages += [{"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes."}]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def settings(model: Path, data: Path, /, **hyperparams: Any) -> Config:
    """A config for a run of a few small steps; `hyperparams` may hold whole sections too (output=, eval=, lora=)."""
    sections = {
        name: hyperparams.pop(name) for name in ("output", "eval", "lora", "alerts", "profile") if name in hyperparams
    }
    data_settings = {"dataset_path": str(data), **hyperparams.pop("data", {})}
    base = {
        "batch_size": 2,
        "gradient_accumulation": 2,
        "learning_rate": 3e-3,
        "max_steps": 8,
        "max_length": 256,
        "warmup_steps": 2,
    }
    return resolve(
        {
            "model_path": str(model),
            "data": data_settings,
            "hyperparams": {"method": "full", **base, **hyperparams},
            **sections,
        }
    )


def new(workspace: Workspace, config: Config) -> RunDir:
    """A fresh run directory."""
    return launch.new_run(workspace, config, machine(), owner="test", threads=1)[0]


def train(
    run: RunDir, workspace: Workspace, worker: Worker, *, stop_at: int | None = None, command: str = "stop"
) -> str:
    """Train the run's next life in this thread; `command` is asked for right after step `stop_at` is recorded."""
    life = open_life(run, "test", resumed=run.events.exists())
    said: list[str] = []
    if stop_at is None:
        return train_to_end(life, workspace, worker, machine(), echo=said.append)
    record = MetricsWriter.step

    def and_ask(writer: MetricsWriter, values: dict[str, float], rows: list[tuple[int, float, int]]) -> None:
        record(writer, values, rows)
        if values["step"] >= stop_at:
            life.signals.ask(command, "test")

    with patch.object(MetricsWriter, "step", and_ask):
        return train_to_end(life, workspace, worker, machine(), echo=said.append)


def wait_for(condition: Callable[[], Any], seconds: float = 30.0) -> Any:
    """The first true value of `condition`, asked a hundred times a second."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.01)
    raise AssertionError("it did not happen in time")
