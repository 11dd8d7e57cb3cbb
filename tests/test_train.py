"""Whole runs: trained, stopped, resumed to the last bit, failed in words, and what they leave on the disk."""

from __future__ import annotations

import hashlib
import json
import threading
import time

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests import runs
from tests.tiny import tiny_model_dir
from trainer import checkpoint, control
from trainer.events import read_events
from trainer.loop import step as steps
from trainer.metrics import read_metrics, read_rows
from trainer.run import status
from trainer.worker import Worker
from trainer.workspace import Workspace


@pytest.fixture(scope="module")
def worker():
    made = Worker()
    yield made
    made.close()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """(workspace, model directory, dataset)."""
    root = tmp_path_factory.mktemp("place")
    workspace = Workspace(root / "ws").create()
    return workspace, tiny_model_dir(root / "model"), runs.write_rows(root / "rows.jsonl")


def weights_hash(run) -> str:
    digest = hashlib.sha256()
    newest = checkpoint.newest_verified(run.checkpoints).path
    for file in sorted([*newest.glob("model/*.safetensors"), newest / "optimizer.safetensors"]):
        for name, tensor in sorted(load_file(file).items()):
            digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def curve(run) -> list[tuple[float, ...]]:
    return [
        tuple(float(r[name]) for name in ("step", "loss", "grad_norm", "learning_rate"))
        for r in read_metrics(run.metrics)
    ]


def kinds(run) -> list[str]:
    return [event["kind"] for event in read_events(run.events)[0]]


def test_a_full_run_learns_ends_and_leaves_a_model_that_transformers_loads(place, worker):
    workspace, model, data = place
    run = runs.new(
        workspace, runs.settings(model, data, max_steps=30, output={"save_steps": 10}, eval={"eval_steps": 10})
    )
    assert runs.train(run, workspace, worker) == "finished"
    found = curve(run)
    assert len(found) == 30 and np.mean([loss for _, loss, *_ in found[-5:]]) < 0.9 * found[0][1]
    now = status(run)
    assert (now.state, now.current_step, now.total_steps) == ("finished", 30, 30)
    assert now.best_held_out is not None and now.peak_gib and now.tokens_per_s
    newest = checkpoint.newest_verified(run.checkpoints)
    assert newest.step == 30
    loaded = AutoModelForCausalLM.from_pretrained(newest.path / "model")
    tokenizer = AutoTokenizer.from_pretrained(newest.path / "model")
    assert tokenizer.chat_template and loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()
    assert not list(run.path.rglob("*.pt")) and not list(run.path.rglob("*.bin.index*"))
    evals = [event for event in read_events(run.events)[0] if event["kind"] == "eval"]
    assert [event["step"] for event in evals] == [0, 10, 20, 30]
    last = found[-1]
    rows = read_rows(run.rows, 30)
    assert sum(s for _, s, _ in rows) / sum(n for *_, n in rows) == pytest.approx(last[1], rel=1e-9)


def test_a_lora_run_leaves_an_adapter_that_peft_loads_on_its_base(place, worker):
    workspace, model, data = place
    run = runs.new(
        workspace,
        runs.settings(model, data, method="lora", packing=True, eval={"sample_steps": 4, "sample_max_tokens": 4}),
    )
    assert runs.train(run, workspace, worker) == "finished"
    newest = checkpoint.newest_verified(run.checkpoints).path
    tuned = AutoPeftModelForCausalLM.from_pretrained(newest / "model")
    assert any(float(p.abs().sum()) > 0 for n, p in tuned.named_parameters() if "lora_B" in n)
    samples = [event for event in read_events(run.events)[0] if event["kind"] == "sample"]
    assert len(samples) == 6 and all(event["base"] is not None and event["wanted"] for event in samples)


def test_a_stop_is_acknowledged_at_once_and_its_receipt_says_what_is_saved(place, worker):
    workspace, model, data = place
    run = runs.new(workspace, runs.settings(model, data, max_steps=10_000, eval={"eval_strategy": "no"}))
    thread = threading.Thread(target=runs.train, args=(run, workspace, worker))
    thread.start()
    runs.wait_for(lambda: status(run).current_step >= 3)
    asked = time.time()
    control.drop(run.control, "stop", "lab-2")
    thread.join(30)
    events = {event["kind"]: event for event in read_events(run.events)[0]}
    assert events["stopping"]["t"] - asked < 1.0 and events["stopping"]["by"] == "lab-2"
    receipt = events["stopped"]
    assert receipt["saved_step"] == receipt["step"] == status(run).current_step and receipt["saved_bytes"] > 0
    assert receipt["memory_after_gib"] > 0 and receipt["by"] == "lab-2"


def test_stop_now_drops_the_steps_since_the_last_checkpoint_and_resume_goes_on_from_it(place, worker):
    workspace, model, data = place
    config = runs.settings(model, data, max_steps=40, output={"save_steps": 5}, eval={"eval_strategy": "no"})
    run = runs.new(workspace, config)
    assert runs.train(run, workspace, worker, stop_at=8, command="stop-now") == "stopped"
    newest = checkpoint.newest_verified(run.checkpoints).step
    assert newest % 5 == 0 and newest <= status(run).current_step
    assert runs.train(run, workspace, worker) == "finished"
    assert [step for step, *_ in curve(run)] == list(range(1, 41))


def test_a_rate_that_diverges_ends_as_diverged_with_the_last_good_checkpoint_kept(place, worker):
    workspace, model, data = place
    config = runs.settings(
        model,
        data,
        learning_rate=1.0,
        warmup_steps=0,
        max_steps=200,
        max_grad_norm=0,
        lr_schedule="constant",
        output={"save_steps": 1},
        fp_precision="fp32",
    )
    run = runs.new(workspace, config)
    import trainer.loop.optim as optim

    step = optim.StepGuard.step

    def hotter(self, optimizer, rate):
        step(self, optimizer, rate * 1e30)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optim.StepGuard, "step", hotter)
        assert runs.train(run, workspace, worker) == "diverged"
    now = status(run)
    assert "NaN or infinite" in now.cause
    for step_number, path in checkpoint.listed(run.checkpoints):
        assert step_number < now.cause_step
        for tensor in load_file(path / "model" / "model.safetensors").values():
            assert torch.isfinite(tensor).all()


@pytest.mark.parametrize("rungs", [1, 3])
def test_out_of_memory_goes_down_the_ladder_and_trains_the_same_tokens(place, worker, rungs):
    workspace, model, data = place
    config = runs.settings(model, data, batch_size=4, gradient_accumulation=1, eval={"eval_strategy": "no"})
    calm, tight = runs.new(workspace, config), runs.new(workspace, config)
    runs.train(calm, workspace, worker)
    backward, left = steps.Stepper._backward, [rungs]

    def failing(self, batch, *counts):
        if left[0] and self.optimizer.state and batch.tokens > 0:
            left[0] -= 1
            raise torch.OutOfMemoryError("simulated")
        return backward(self, batch, *counts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps.Stepper, "_backward", failing)
        assert runs.train(tight, workspace, worker) == "finished"
    assert kinds(tight).count("oom_rung") == rungs
    a, b = read_metrics(calm.metrics), read_metrics(tight.metrics)
    assert a["step"].tolist() == b["step"].tolist() and a["tokens"].tolist() == b["tokens"].tolist()
    assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)


def test_a_fault_becomes_a_failed_event_with_its_cause_and_the_next_run_starts(place, worker, monkeypatch):
    workspace, model, data = place
    run = runs.new(workspace, runs.settings(model, data))
    original = steps.Stepper._backward

    def broken(self, batch, *counts):
        raise RuntimeError("planted fault")

    monkeypatch.setattr(steps.Stepper, "_backward", broken)
    assert runs.train(run, workspace, worker) == "failed"
    assert "planted fault" in status(run).cause
    assert "Traceback" in read_events(run.events)[0][-1]["detail"]
    monkeypatch.setattr(steps.Stepper, "_backward", original)
    assert runs.train(runs.new(workspace, runs.settings(model, data)), workspace, worker) == "finished"


def test_a_changed_dataset_refuses_to_resume_and_says_what_differs(place, worker, tmp_path):
    workspace, model, _ = place
    data = runs.write_rows(tmp_path / "mine.jsonl")
    run = runs.new(workspace, runs.settings(model, data, max_steps=50))
    assert runs.train(run, workspace, worker, stop_at=2) == "stopped"
    runs.write_rows(data, count=40)
    assert runs.train(run, workspace, worker) == "failed"
    assert "Cannot resume" in status(run).cause and "token key" in status(run).cause


def test_early_stopping_ends_after_the_checks_it_was_given_and_keeps_the_best(place, worker):
    workspace, model, data = place
    config = runs.settings(
        model,
        data,
        learning_rate=0.5,
        warmup_steps=0,
        lr_schedule="constant",
        max_steps=60,
        early_stopping_patience=2,
        eval={"eval_steps": 1},
    )
    run = runs.new(workspace, config)
    assert runs.train(run, workspace, worker) in ("finished", "diverged")
    end = read_events(run.events)[0][-1]
    assert end["kind"] == "finished" and "no better held-out loss" in end["cause"] and status(run).current_step < 60


def test_a_model_path_that_is_gone_by_the_time_it_loads_is_a_sentence(place, worker, tmp_path):
    workspace, _, data = place
    model = tiny_model_dir(tmp_path / "model")
    run = runs.new(workspace, runs.settings(model, data))
    (model / "model.safetensors").write_bytes(b"")
    assert runs.train(run, workspace, worker) == "failed"
    cause = status(run).cause
    assert "model" in cause and "Traceback" not in cause and len(cause) < 500


def test_the_snapshot_names_everything_the_run_is_made_of(place):
    workspace, model, data = place
    snapshot = json.loads(
        runs.new(workspace, runs.settings(model, data, profile={"name": "emoji_think"})).config.read_text()
    )
    assert (
        snapshot["profile"]["system_prompt"].startswith("Current date: ")
        and "{date}" not in snapshot["profile"]["system_prompt"]
    )
    assert {"config", "profile", "model", "data", "device", "versions", "threads", "seed"} <= set(snapshot)
