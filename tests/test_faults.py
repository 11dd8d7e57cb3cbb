"""What a review found, each shown once more: full disks, lost stops, leaking rows, changed models. Mended, and kept so."""

from __future__ import annotations

import errno
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from starlette.applications import Starlette
from starlette.testclient import TestClient
from transformers import AutoModelForCausalLM, BloomConfig, Gemma2Config, Lfm2Config, Qwen3MoeConfig

from tests import runs
from tests.exact import build
from tests.memory_rows import random_rows
from tests.tiny import tiny_adapter_dir, tiny_model_dir
from trainer import control, locks
from trainer.data.loader import BadRow, assemble
from trainer.engine import Engine
from trainer.events import EventLog, all_events, read_events
from trainer.launch import base_of
from trainer.loop.forward import choose_path
from trainer.loop.step import UpdateOutOfMemory
from trainer.machine import machine
from trainer.metrics import COLUMNS, MetricsWriter, read_metrics
from trainer.models import attention
from trainer.refusal import Refusal
from trainer.run import status
from trainer.schema import Config, NotifySettings
from trainer.session import open_life, train_to_end
from trainer.telemetry import Telemetry
from trainer.worker import Worker
from trainer.workspace import Workspace
from ui import feed
from ui.guard import Guard, Rules
from ui.site import Site


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


# -- a second review


# weights as sharp as these (a deviation of 0.1) carry rounding on to 5e-6 nats in fp32
EXPERTS = dict(hidden_size=256, num_hidden_layers=4, num_experts=16, num_experts_per_tok=4, moe_intermediate_size=128)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_are_trained_packed_though_other_rows_change_how_many_tokens_each_gets(dtype):
    config = Qwen3MoeConfig(**{**SMALL, **HEADS, **EXPERTS, "head_dim": 64, "initializer_range": 0.1})
    torch.manual_seed(0)
    model = build(config).model.to(dtype)
    choice = choose_path(
        model, assemble(random_rows(2, 131, seed=0), np.arange(2), "cpu"), compute=dtype, autocast=None
    )
    assert choice.path.way == "fused" and choice.passed_over == ()


def test_memory_that_runs_out_in_the_clip_of_an_fp16_step_is_played_again_with_a_fresh_scale(
    place, worker, monkeypatch
):
    workspace, model, data = place
    config = runs.settings(model, data, fp_precision="fp16", eval={"eval_strategy": "no"}, output={"save_steps": 3})
    whole, broken = runs.new(workspace, config), runs.new(workspace, config)
    assert runs.train(whole, workspace, worker) == "finished"
    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def short(*given, **named):
        calls.append(None)
        if len(calls) in (2, 5):  # before anything was saved, and after
            raise torch.OutOfMemoryError("simulated")
        return clip(*given, **named)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", short)
    assert runs.train(broken, workspace, worker) == "finished", status(broken).cause
    ours, theirs = read_metrics(broken.metrics), read_metrics(whole.metrics)
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-2)


@pytest.mark.parametrize("way", ["resume", "queue"])
def test_a_run_that_another_process_ended_meanwhile_is_not_taken_up_by_what_was_seen_before(
    engine, place, monkeypatch, way
):
    workspace, model, data = place
    run = runs.new(workspace, runs.settings(model, data))
    open_life(run, "other", resumed=False).close()
    seen = status(run)
    assert seen.state == "interrupted"
    log = EventLog(run.events)
    log.append("finished", step=8)
    log.close()
    before = run.events.read_bytes()
    monkeypatch.setattr("trainer.engine.status", lambda run: seen)  # looked at a moment before it ended
    if way == "resume":
        with pytest.raises(Refusal, match="This run is finished by now, since another process was faster"):
            engine.resume_run(run.run_id, "me")
    else:
        workspace.queue.add(run.run_id, "me")
        assert engine.start_next() is None and workspace.queue.read().entries == ()
    assert run.events.read_bytes() == before and engine.holder() is None and not locks.is_held(run.lock)


def test_a_process_that_follows_ends_with_one_line_on_a_bad_row_and_without_memory(monkeypatch):
    from trainer.loop import follow

    told = {
        "run": "x",
        "cache": "c",
        "held_out": "c",
        "folder": "f",
        "checkpoint": None,
        "skip": [],
        "left_out": [[], []],
    }
    snapshot = {"config": Config().model_dump(), "threads": 1}
    cache = SimpleNamespace(place_words=lambda row: "rows.jsonl, line 8")
    monkeypatch.setattr(follow.RunDir, "snapshot", lambda run: snapshot)
    monkeypatch.setattr(follow.TokenCache, "open", lambda path: cache)
    monkeypatch.setattr(follow.prepare, "split_rows", lambda *given: None)
    monkeypatch.setattr(follow.prepare, "build_model", lambda *given, **named: None)
    team = SimpleNamespace(rank=1, hear_facts=lambda: told)
    for raised, said in (
        (BadRow(7, "it cannot be read"), "Process 1 stopped: rows.jsonl, line 8 is bad, it cannot be read."),
        (torch.OutOfMemoryError("x"), "Process 1 ran out of memory. Resume with a smaller hyperparams.batch_size"),
        (UpdateOutOfMemory(), "Process 1 ran out of memory."),
    ):

        def fail(*given, raised=raised):
            raise raised

        monkeypatch.setattr(follow, "_obey", fail)
        with pytest.raises(Refusal) as caught:
            follow.follow(team, SimpleNamespace(device="cpu"))
        assert caught.value.message.startswith(said)


def test_a_run_of_several_processes_is_not_offered_to_be_resumed_by_the_page_and_is_refused_in_words(engine, place):
    workspace, model, data = place
    run = runs.new(workspace, runs.settings(model, data))
    log = EventLog(run.events)
    for kind, fields in (
        ("started", {}),
        ("plan", {"total_steps": 8, "processes": 2}),
        ("diverged", {"step": 3, "rows": []}),
    ):
        log.append(kind, **fields)
    log.close()
    before = run.events.read_bytes()
    now = status(run)
    assert (now.state, now.processes, now.allowed) == ("diverged", 2, ())
    for act in (
        lambda: engine.resume_run(run.run_id, "me", around_rows=True),
        lambda: engine.resume_run(run.run_id, "me"),
        lambda: engine.enqueue(run.run_id, "me"),
    ):
        with pytest.raises(Refusal, match="torchrun --nproc-per-node 2 -m trainer resume"):
            act()
    assert run.events.read_bytes() == before
    client = TestClient(
        Guard(Starlette(routes=feed.routes(Site(workspace, engine, None, None, None, None))), Rules()),
        base_url="http://localhost",
    )
    answer = client.post(f"/api/runs/{run.run_id}/command", json={"command": "resume-around"})
    assert answer.status_code == 409 and "torchrun" in answer.json()["error"]
    assert client.get(f"/api/runs/{run.run_id}/feed").json()["s"]["allowed"] == []


def test_a_step_that_became_empty_takes_the_point_of_an_earlier_life_off_the_curve(tmp_path):
    writer = MetricsWriter(tmp_path / "metrics.bin", tmp_path / "rows.bin")
    row = dict.fromkeys(COLUMNS, 1.0)
    for step, loss in ((1, 3.0), (2, 2.0), (3, float("nan"))):
        writer.step(row | {"step": step, "loss": loss}, [])
    writer.nothing(3, 5.0, 9.0)
    assert read_metrics(tmp_path / "metrics.bin")["step"].tolist() == [1, 2], "before the next step is there"
    writer.step(row | {"step": 4, "loss": 1.0}, [])
    writer.close()
    curve = read_metrics(tmp_path / "metrics.bin")
    assert curve["step"].tolist() == [1, 2, 4] and np.isfinite(curve["loss"]).all()


def test_a_webhook_that_cannot_be_kept_leaves_no_run_behind(place, monkeypatch):
    workspace, model, data = place
    config = runs.settings(model, data).model_copy(
        update={"notify": NotifySettings(webhook_url="https://x.example/hook")}
    )
    monkeypatch.setattr("trainer.notify.write_json", full_disk)
    with pytest.raises(Refusal, match="webhook of the run cannot be kept"):
        runs.new(workspace, config)
    assert list(workspace.runs.iterdir()) == []


@pytest.mark.parametrize(
    ("named", "said"), [("/secret/place/base", "'base'"), ("C:\\secret\\base", "'base'"), ("org/base", "'org/base'")]
)
def test_a_base_model_that_is_not_here_is_named_without_its_folders(tmp_path, named, said):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": named}))
    with pytest.raises(Refusal) as caught:
        base_of(tmp_path)
    assert said in caught.value.message and "secret" not in caught.value.message


def test_a_life_that_is_refused_closes_its_events(place, monkeypatch):
    workspace, model, data = place
    run = runs.new(workspace, runs.settings(model, data))
    made = []
    real = EventLog.__init__
    monkeypatch.setattr(EventLog, "__init__", lambda self, path: (real(self, path), made.append(self))[0])
    monkeypatch.setattr("trainer.events.write_whole", full_disk)
    with pytest.raises(Refusal, match="cannot be written"):
        open_life(run, "test", resumed=False)
    assert len(made) == 1 and made[0]._file.closed and not locks.is_held(run.lock)


def test_a_stop_that_is_answered_just_before_training_begins_never_reads_as_running(place):
    workspace, model, data = place
    run = runs.new(workspace, runs.settings(model, data))
    life = open_life(run, "test", resumed=False)
    for kind, state in (("stopping", "stopping"), ("running", "stopping"), ("phase", "stopping")):
        life.events.append(kind)
        assert status(run).state == state
    life.close()
    assert status(run).state == "interrupted"
    life = open_life(run, "test", resumed=True)
    life.events.append("running")
    assert status(run).state == "running"
    life.close()
