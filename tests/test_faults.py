"""What a review found, each shown once more: full disks, lost stops, leaking rows, changed models. Mended, and kept so."""

from __future__ import annotations

import errno

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, Gemma2Config, Lfm2Config

from tests import runs
from tests.exact import build
from tests.memory_rows import random_rows
from tests.tiny import tiny_adapter_dir, tiny_model_dir
from trainer import control, locks
from trainer.data.loader import assemble
from trainer.engine import Engine
from trainer.events import EventLog, all_events, read_events
from trainer.loop.forward import choose_path
from trainer.machine import machine
from trainer.models import attention
from trainer.refusal import Refusal
from trainer.run import status
from trainer.session import open_life, train_to_end
from trainer.telemetry import Telemetry
from trainer.worker import Worker
from trainer.workspace import Workspace


@pytest.fixture(scope="module")
def worker():
    made = Worker()
    yield made
    made.close()


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    workspace = Workspace(tmp_path / "ws").create()
    return workspace, tiny_model_dir(tmp_path / "model"), runs.write_rows(tmp_path / "rows.jsonl")


@pytest.fixture
def engine(place):
    made = Engine(place[0], Worker())
    yield made
    made.shutdown(10)


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_disk_full_for_telemetry_and_metrics_costs_a_gap_and_not_the_run(place, worker, monkeypatch):
    workspace, model, data = place
    run = runs.new(workspace, runs.settings(model, data))
    monkeypatch.setattr("trainer.metrics.RecordFile.append", full_disk)
    assert runs.train(run, workspace, worker) == "finished"
    assert run.metrics.stat().st_size == 0 and not locks.is_held(run.lock)


def test_a_telemetry_that_cannot_start_frees_the_run_and_the_engine_goes_on(place, worker, monkeypatch):
    workspace, model, data = place
    run = runs.new(workspace, runs.settings(model, data))
    life = open_life(run, "test", resumed=False)
    with monkeypatch.context() as patch:
        patch.setattr(Telemetry, "start", full_disk)
        with pytest.raises(OSError):
            train_to_end(life, workspace, worker, machine())
    assert not locks.is_held(run.lock) and status(run).state == "interrupted"


def test_a_run_whose_first_event_cannot_be_written_leaves_no_lock(place, monkeypatch):
    workspace, model, data = place
    run = runs.new(workspace, runs.settings(model, data))
    with monkeypatch.context() as patch:
        patch.setattr("trainer.events.write_whole", full_disk)
        with pytest.raises(Refusal, match="cannot be written"):
            open_life(run, "test", resumed=False)
    assert not locks.is_held(run.lock)


def test_a_stop_asked_behind_the_warm_up_is_kept(engine, place):
    workspace, model, data = place
    engine.warm()
    run = workspace.run(engine.start_run(runs.settings(model, data, max_steps=5000), "me"))
    control.drop(run.control, "stop", "me")
    runs.wait_for(lambda: status(run).state == "stopped", 60)
    assert status(run).current_step < 100


def test_a_shutdown_reaches_a_run_that_waits_behind_the_warm_up(engine, place):
    workspace, model, data = place
    engine.warm()
    run = workspace.run(engine.start_run(runs.settings(model, data, max_steps=50_000), "me"))
    assert engine.shutdown(60)
    assert status(run).state == "stopped"


def test_stopping_the_smoke_test_never_stops_a_training(engine, place):
    workspace, model, data = place
    run = workspace.run(engine.start_run(runs.settings(model, data, max_steps=50_000), "me"))
    runs.wait_for(lambda: status(run).current_step > 1)
    engine.stop_smoke()
    before = status(run).current_step
    runs.wait_for(lambda: status(run).current_step > before + 3)
    control.drop(run.control, "stop-now", "me")
    runs.wait_for(lambda: engine.holder() is None)


def test_events_longer_than_one_read_are_all_counted(place):
    workspace, model, data = place
    run = runs.new(workspace, runs.settings(model, data))
    log = EventLog(run.events)
    log.append("started")
    for _ in range(9):
        log.append("log", text="x" * 600_000)
    log.append("log", text="y" * 5_000_000)  # one line longer than a read
    log.append("finished", step=1)
    assert status(run).state == "finished" and len(all_events(run.events)) == 12
    assert read_events(run.events, 0, 1 << 20)[1] > 0


SMALL = dict(vocab_size=131, hidden_size=32, num_hidden_layers=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
HEADS = dict(intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128)
CARRIERS = {
    "convolution": Lfm2Config(**SMALL, **HEADS, layer_types=["conv", "full_attention"]),
    "attention without positions": BloomConfig(vocab_size=131, hidden_size=32, n_layer=2, n_head=4, pad_token_id=0),
}


@pytest.mark.parametrize("kind", CARRIERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_carries_one_row_into_the_next_trains_one_row_at_a_time(kind, dtype):
    model = build(CARRIERS[kind]).model.to(dtype)
    cache = random_rows(2, 131, seed=4)
    choice = choose_path(model, assemble(cache, np.arange(2), "cpu"), compute=dtype, autocast=None)
    assert choice.path.way == "one row at a time"
    assert any("see each other" in why for _, why in choice.passed_over), choice.passed_over


def test_a_model_with_capped_attention_writes_answers():
    torch.manual_seed(0)
    config = Gemma2Config(**SMALL, **HEADS, head_dim=8, attn_logit_softcapping=2.0, sliding_window=8)
    attention.register("sdpa")
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME).eval()
    ids = torch.randint(3, 131, (1, 20))
    arguments = dict(attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    mine = model.generate(ids, **arguments)
    model.set_attn_implementation("eager")
    assert torch.equal(mine, model.generate(ids, **arguments))


def test_a_run_without_held_out_loss_can_be_resumed(place, worker):
    workspace, model, data = place
    run = runs.new(workspace, runs.settings(model, data, max_steps=30, eval={"eval_strategy": "no"}))
    assert runs.train(run, workspace, worker, stop_at=3) == "stopped"
    assert runs.train(run, workspace, worker) == "finished"


def test_other_weights_under_an_adapter_refuse_the_resume(place, worker, tmp_path):
    workspace, model, data = place
    adapter = tiny_adapter_dir(tmp_path / "adapter", model)
    run = runs.new(workspace, runs.settings(adapter, data, method="lora", max_steps=200))
    assert runs.train(run, workspace, worker, stop_at=2) == "stopped"
    tiny_model_dir(tmp_path / "other", seed=9)
    (model / "model.safetensors").write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())
    assert runs.train(run, workspace, worker) == "failed"
    assert "model folder" in status(run).cause and "changed" in status(run).cause


def test_the_best_checkpoint_named_is_one_that_exists(place, worker):
    workspace, model, data = place
    config = runs.settings(
        model, data, max_steps=12, output={"save_steps": 4, "save_total_limit": 1}, eval={"eval_steps": 2}
    )
    run = runs.new(workspace, config)
    assert runs.train(run, workspace, worker) == "finished"
    best = [event["step"] for event in all_events(run.events) if event["kind"] == "checkpoint" and event["best"]]
    assert best and (run.checkpoints / f"step_{best[-1]:08d}" / "MANIFEST.json").exists()


def test_a_fraction_of_an_epoch_is_shown_as_one(place, worker):
    workspace, model, data = place
    run = runs.new(workspace, runs.settings(model, data, max_steps=3, eval={"eval_strategy": "no"}))
    runs.train(run, workspace, worker)
    assert status(run).epoch == pytest.approx(3 / 15)
