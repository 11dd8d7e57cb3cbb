"""A driver of a GPU that hangs, lies or leaves: readings are missing then, and neither training nor page suffers."""

from __future__ import annotations

import sys
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import runs
from tests.tiny import tiny_model_dir
from trainer import machine as machine_module
from trainer.machine import Nvml, machine
from trainer.telemetry import COLUMNS, RECORD, Telemetry
from trainer.worker import Worker
from trainer.workspace import Workspace

OFF = {"eval_strategy": "no"}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("driver")
    return tiny_model_dir(root / "model"), runs.write_rows(root / "rows.jsonl")


class Driver(types.ModuleType):
    """A library of the driver with one GPU; `act` decides what every question after the first look does."""

    class NVMLError(Exception):
        """As pynvml has it."""

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.act: Callable[[], Any] = lambda: None

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("nvml"):
            raise AttributeError(name)
        answers = {
            "nvmlInit": None, "nvmlDeviceGetCount": 1, "nvmlDeviceGetHandleByIndex": 0, "nvmlDeviceGetUUID": "GPU-1",
            "nvmlDeviceGetName": "RTX", "nvmlDeviceGetTemperature": 66, "nvmlDeviceGetPowerUsage": 400_000,
            "nvmlDeviceGetMemoryInfo": types.SimpleNamespace(total=24 << 30, free=20 << 30, used=4 << 30),
            "nvmlDeviceGetUtilizationRates": types.SimpleNamespace(gpu=97),
        }  # fmt: skip

        def question(*given: Any) -> Any:
            if name.startswith("nvmlDeviceGet") and name not in ("nvmlDeviceGetCount", "nvmlDeviceGetHandleByIndex"):
                self.act()
            return answers[name]

        return question


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver()
    monkeypatch.setitem(sys.modules, "pynvml", made)
    monkeypatch.setattr(machine_module, "PATIENCE_S", 0.2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return made


def test_a_driver_that_hangs_costs_the_readings_and_neither_training_nor_page(
    workspace: Workspace, sources: Any, worker: Worker, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvml = Nvml()
    assert nvml.gpus()[0].free_gib == 20 and nvml.reading(0)["utilisation"] == 97
    awake = threading.Event()
    driver.act = lambda: awake.wait(30)
    monkeypatch.setattr(
        "trainer.session.Telemetry", lambda path, allocator, index: Telemetry(path, None, 0, every_s=0.1)
    )
    run = runs.new(workspace, runs.settings(*sources, max_steps=6, eval=OFF))
    began = time.monotonic()
    assert runs.train(run, workspace, worker) == "finished"
    hanging = sum(thread.name == "nvml" for thread in threading.enumerate())
    for _ in range(5):
        assert machine(nvml).gpus[0].name == "RTX", "known from before, so that a run for it does not land on the CPU"
    assert time.monotonic() - began < 25, "the driver hangs for 30 s"
    samples = np.fromfile(run.telemetry, RECORD)
    assert len(samples) > 1 and np.isnan(samples["utilisation"]).all() and np.isfinite(samples["process_gib"]).all()
    asked = sum(thread.name == "nvml" for thread in threading.enumerate())
    assert asked <= hanging + 1, "while one question hangs, no other is asked"
    awake.set()
    runs.wait_for(lambda: nvml.reading(0)["utilisation"] == 97)


@pytest.mark.parametrize("fault", [Driver.NVMLError("GPU is lost"), OSError("libnvidia-ml.so"), ValueError("bytes")])
def test_a_driver_that_raises_is_not_measured_and_its_gpu_is_not_forgotten(
    driver: Driver, tmp_path: Path, fault: Exception
) -> None:
    nvml = Nvml()
    assert len(nvml.gpus()) == 1

    def act() -> None:
        raise fault

    driver.act = act
    assert "driver does not answer" in (machine(Nvml()).advice or ""), (
        "one that never answered is said, not passed over"
    )
    assert set(nvml.reading(0).values()) == {None} and len(nvml.gpus()) == 1
    telemetry = Telemetry(tmp_path / "t.bin", None, 0, every_s=0.02)
    telemetry.start()
    written = tmp_path / "t.bin"
    runs.wait_for(lambda: written.exists() and written.stat().st_size >= 3 * RECORD.itemsize)
    telemetry.stop()
    assert len(COLUMNS) == len(RECORD.names or ()) and np.isnan(telemetry.latest["utilisation"])
