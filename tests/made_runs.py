"""Runs written by the trainer's own writers, without a model, for tests of what reads them: feed, board, list."""

from __future__ import annotations

import math
import shutil
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np

from trainer import locks, metrics, telemetry
from trainer.events import EventLog
from trainer.metrics import MetricsWriter, RecordFile
from trainer.run import RunDir, create_run
from trainer.schema import Config

SPIKE_LOSS = 40.0


class MadeRun:
    """A run whose lock this process holds until `close`; every method writes what the trainer would write."""

    def __init__(self, runs: Path, name: str = "made", *, lora: bool = True, gpu: bool = False, why: str = "") -> None:
        config = Config.model_validate(
            {
                "model_path": "/secret/place/tiny-qwen3",
                "data": {"dataset_path": "/secret/place/chats.jsonl"},
                "hyperparams": {"method": "lora" if lora else "full"},
            }
        )
        device = {"name": "gpu-1", "summary": "NVIDIA RTX 4090 · 23.1 GiB free"}
        snapshot = {
            "config": config.model_dump(mode="json"),
            "profile": {"name": "emoji_think", "system_prompt": "", "date": "2026-11-23"},
            "model": {"display_name": "tiny-qwen3", "path": config.model_path, "fingerprint": "0" * 16},
            "data": {"files": [{"name": "chats.jsonl", "weight": 1.0}]},
            "device": device if gpu else {"name": "cpu", "summary": "AMD EPYC · 20.1 GiB free"},
            "versions": {"torch": "2.13.0"},
            "threads": 1,
            "seed": 42,
        }
        self.gpu = gpu
        self.run: RunDir = create_run(runs, snapshot, notes={"name": name, "why": why})
        self.lock = locks.FileLock(self.run.lock)
        assert self.lock.acquire({"owner": "test"})
        self.events = EventLog(self.run.events)
        self.metrics = MetricsWriter(self.run.metrics, self.run.rows)
        self.telemetry = RecordFile(self.run.telemetry, telemetry.RECORD.itemsize)
        self.began = time.time()
        self.done = 0

    @property
    def run_id(self) -> str:
        """The run's id."""
        return self.run.run_id

    def start(self, total_steps: int = 200) -> MadeRun:
        """The events up to the first step."""
        self.events.append("started", owner="owner", life=1)
        self.events.append("log", text="Using profile system prompt: Answer.")
        self.events.append("phase", name="tokenise", done=40, total=40)
        self.events.append("plan", total_steps=total_steps, steps_per_epoch=total_steps, rows=40, held_out_rows=4)
        self.events.append("running", step=0)
        self.events.append("phase", name="train")
        return self

    def step(self, loss: float | None = None, step: int | None = None, seconds: float = 0.1) -> int:
        """One step and its telemetry sample; the loss falls unless it is given."""
        self.done = step if step is not None else self.done + 1
        value = 1.0 + math.exp(-self.done / 30) if loss is None else loss
        values = dict.fromkeys(metrics.COLUMNS, float("nan")) | {
            "step": self.done,
            "t": time.time(),
            "elapsed_s": self.done * seconds,
            "loss": value,
            "grad_norm": 0.51,
            "learning_rate": 1.9753e-4,
            "labels": 700,
            "tokens": 1843,
            "rows": 4,
            "seconds": seconds,
            "process_gib": 1.234,
            "peak_gib": 1.3,
        }
        self.metrics.step(values, [(7, value * 300, 300), (3, value * 200, 200)])
        self.sample()
        return self.done

    def sample(self) -> None:
        """One telemetry record."""
        values = dict.fromkeys(telemetry.COLUMNS, float("nan")) | {"t": time.time(), "process_gib": 1.2345}
        if self.gpu:
            values |= {"allocated_gib": 17.9123, "reserved_gib": 18.4321, "device_gib": 19.2468, "limit_gib": 24.0}
            values |= {"utilisation": 97.0, "temperature_c": 66.0, "power_w": 412.5}
        self.telemetry.append(struct.pack(f"<{len(telemetry.COLUMNS)}d", *(values[n] for n in telemetry.COLUMNS)))

    def checkpoint(self, size_bytes: int = 4_800_000) -> None:
        """The event and the directory of a checkpoint of the newest step."""
        from trainer.checkpoint import MODEL, OPTIMIZER, STATE, new_staging, seal

        staging = new_staging(self.run.checkpoints, self.done)
        (staging / MODEL).mkdir()
        (staging / MODEL / "adapter_model.safetensors").write_bytes(b"0" * 900)
        (staging / OPTIMIZER).write_bytes(b"0" * 90)
        (staging / STATE).write_bytes(b"0" * 10)
        seal(staging, self.done)
        self.events.append("checkpoint", step=self.done, bytes=size_bytes, seconds=3.2, best=True)

    def end(self, kind: str, **fields: Any) -> MadeRun:
        """The last event, then the lock is freed."""
        self.events.append(kind, **fields)
        self.close()
        return self

    def remove(self) -> None:
        """Free the lock and take the whole run away, for tests that share a workspace."""
        self.lock.release()
        shutil.rmtree(self.run.path, ignore_errors=True)

    def close(self) -> None:
        """Free the lock as a killed trainer would."""
        self.events.close()
        self.metrics.close()
        self.lock.release()


def write_long_run(made: MadeRun, steps: int, spike_at: int, nan_at: int) -> None:
    """`steps` records and telemetry samples at once: noise, one spike, one NaN."""
    noise = np.random.default_rng(0)
    records = np.zeros(steps, metrics.RECORD)
    records["step"] = np.arange(1, steps + 1)
    records["t"] = made.began + np.arange(steps)
    records["loss"] = 1.0 + noise.random(steps)
    records["loss"][spike_at - 1] = SPIKE_LOSS
    records["loss"][nan_at - 1] = float("nan")
    for name in ("grad_norm", "learning_rate", "tokens", "seconds"):
        records[name] = 1.0 + noise.random(steps)
    made.run.metrics.write_bytes(records.tobytes())
    samples = np.full(steps, float("nan"), telemetry.RECORD)
    samples["t"] = records["t"]
    samples["process_gib"] = 1.0 + noise.random(steps)
    made.run.telemetry.write_bytes(samples.tobytes())
    made.done = steps
