"""What only a GPU can show: the fast kernel really called, half precision, device memory given back. `pytest -m gpu`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests import runs
from tests.tiny import tiny_model_dir
from trainer import launch
from trainer.events import all_events
from trainer.machine import machine
from trainer.metrics import read_metrics
from trainer.smoke import run_smoke
from trainer.worker import Worker
from trainer.workspace import Workspace

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device that this torch can use"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workspace, Path, Path, Worker]:
    root = tmp_path_factory.mktemp("gpu")
    model = tiny_model_dir(root / "model", hidden=256, layers=4)
    worker = Worker()
    yield Workspace(root / "ws").create(), model, runs.write_rows(root / "rows.jsonl"), worker
    worker.close()


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_fast_kernel_is_called_in_half_precision_and_the_log_says_so(place, method):
    workspace, model, data, worker = place
    run = runs.new(workspace, runs.settings(model, data, method=method, max_steps=20))
    assert runs.train(run, workspace, worker) == "finished"
    log = " ".join(event["text"] for event in all_events(run.events) if event["kind"] == "log")
    assert "Flash Attention: varlen" in log or "Flash Attention: flash_attn" in log
    curve = read_metrics(run.metrics)
    assert curve["loss"][-1] < curve["loss"][0] and (curve["allocated_gib"] > 0).all()


def test_half_precision_follows_the_exact_run(place):
    workspace, model, data, worker = place
    losses = {}
    for precision in ("fp32", "bf16"):
        run = runs.new(workspace, runs.settings(model, data, fp_precision=precision, max_steps=20))
        assert runs.train(run, workspace, worker) == "finished"
        losses[precision] = read_metrics(run.metrics)["loss"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=2e-2)


def test_every_check_of_the_smoke_test_is_possible_and_passes(place, tmp_path):
    workspace, model, data, worker = place
    config = runs.settings(model, data, use_gradient_checkpointing=True)
    prompt = launch.prompt_of(config, workspace.profiles)
    report = run_smoke(tmp_path, config, prompt, workspace, worker, machine(), 1, lambda: False)
    assert report["failed"] == 0 and report["not_possible"] == 0, report["summary"]


def test_memory_after_the_tenth_run_is_that_after_the_third(place):
    workspace, model, data, worker = place
    after = []
    for _ in range(10):
        run = runs.new(workspace, runs.settings(model, data, max_steps=3))
        runs.train(run, workspace, worker)
        after.append(all_events(run.events)[-1]["memory_after_gib"])
    assert after[9] <= after[2] + 0.01, after
