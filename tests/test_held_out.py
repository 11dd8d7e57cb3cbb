"""Held-out loss and samples of real runs: measured from step 0 on rows that are never trained, the best kept, cancellable."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

import profiles
from tests import runs
from tests.tiny import tiny_model_dir
from trainer import checkpoint
from trainer.data.packing import split
from trainer.data.render import Renderer
from trainer.events import all_events
from trainer.metrics import read_metrics, read_rows
from trainer.run import RunDir, status
from trainer.worker import Worker
from trainer.workspace import Workspace


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """(workspace, model, training rows, held-out rows of an own file, worker)."""
    root = tmp_path_factory.mktemp("place")
    worker = Worker()
    own = root / "own.jsonl"
    chat = [{"role": "user", "content": "What is 2 and 2?"}, {"role": "assistant", "content": "It is four."}]
    own.write_text("".join(json.dumps({"messages": chat[:1] + [{**chat[1], "content": "Four. " * n}]}) + "\n"
                           for n in range(1, 6)), "utf-8")  # fmt: skip
    yield (
        Workspace(root / "ws").create(),
        tiny_model_dir(root / "model"),
        runs.write_rows(root / "rows.jsonl"),
        own,
        worker,
    )
    worker.close()


def events(run: RunDir, kind: str) -> list[dict[str, Any]]:
    return [event for event in all_events(run.events) if event["kind"] == kind]


def loss_of(folder: Path, model: Path, file: Path, rows: list[int]) -> float:
    """Mean loss of a label over `rows` of `file`, from transformers alone, one row at a time."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    renderer = Renderer(tokenizer, None, "2026-01-01")
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    lines = file.read_text("utf-8").splitlines()
    total, count = 0.0, 0
    for row in rows:
        rendered = renderer.render(json.loads(lines[row])["messages"])
        ids = torch.tensor([rendered.ids])
        labels = torch.where(torch.tensor([rendered.labels]), ids, -100)
        with torch.no_grad():
            mine = int((labels != -100).sum())
            total, count = total + float(loaded(input_ids=ids, labels=labels).loss) * mine, count + mine
    return total / count


@pytest.mark.parametrize("kind", ["split", "own file"])
def test_from_step_0_held_out_loss_is_transformers_loss_of_rows_that_are_never_trained(place, kind) -> None:
    workspace, model, data, own, worker = place
    settings = {"validation_split": 0.2} if kind == "split" else {"validation_dataset_path": str(own)}
    config = runs.settings(
        model, data, data=settings, max_steps=None, num_epochs=1, eval={"eval_steps": 4}, output={"save_steps": 4}
    )
    run = runs.new(workspace, config)
    assert runs.train(run, workspace, worker) == "finished"
    trained, held = split(60, 0.2, 200, config.data.seed) if kind == "split" else (np.arange(60), np.arange(5))
    file = data if kind == "split" else own
    seen = {row for step in range(1, status(run).current_step + 1) for row, _, _ in read_rows(run.rows, step)}
    assert seen == set(trained.tolist())
    measured = {event["step"]: event["loss"] for event in events(run, "eval")}
    assert list(measured)[:2] == [0, 4] and list(measured)[-1] == status(run).current_step
    assert measured[0] == pytest.approx(loss_of(model, model, file, held.tolist()), rel=1e-5)
    last, path = checkpoint.newest_verified(run.checkpoints).step, checkpoint.newest_verified(run.checkpoints).path
    assert measured[last] == pytest.approx(loss_of(path / "model", model, file, held.tolist()), rel=1e-5)


def test_the_split_follows_the_seed_and_measuring_changes_no_bit_of_the_training(place) -> None:
    workspace, model, data, _, worker = place
    curves = {}
    for often in (1, 8):
        run = runs.new(
            workspace, runs.settings(model, data, method="lora", lora={"dropout": 0.2}, eval={"eval_steps": often})
        )
        assert runs.train(run, workspace, worker) == "finished"
        curves[often] = read_metrics(run.metrics)["loss"].tolist()
    assert curves[1] == curves[8]
    one, same, other = (split(60, 0.2, 200, seed)[1].tolist() for seed in (1, 1, 2))
    assert one == same != other


def test_early_stopping_keeps_the_best_weights_and_they_give_the_best_loss(place) -> None:
    workspace, model, data, _, worker = place
    config = runs.settings(
        model,
        data,
        learning_rate=0.02,
        warmup_steps=0,
        lr_schedule="constant",
        max_steps=80,
        early_stopping_patience=3,
        data={"validation_split": 0.2},
        eval={"eval_steps": 1},
        output={"save_total_limit": 1},
    )
    run = runs.new(workspace, config)
    assert runs.train(run, workspace, worker) == "finished"
    measured = [(event["loss"], event["step"]) for event in events(run, "eval")]
    best_loss, best_step = min(measured)
    assert 0 < best_step == measured[-1][1] - 3 < 77 and "3 checks" in events(run, "finished")[0]["cause"]
    folder = run.checkpoints / f"step_{best_step:08d}"
    assert (folder / "MANIFEST.json").exists(), "the best checkpoint was pruned"
    held = split(60, 0.2, 200, config.data.seed)[1].tolist()
    assert loss_of(folder / "model", model, data, held) == pytest.approx(best_loss, rel=1e-5)
    assert [event["best"] for event in events(run, "checkpoint") if event["step"] == best_step] == [True]


def generated(model: Any, tokenizer: Any, text: str, tokens: int) -> str:
    ids = torch.tensor([Renderer(tokenizer, None, "2026-01-01").prompt([{"role": "user", "content": text}])])
    ends = dict(eos_token_id=2, pad_token_id=0)
    out = model.eval().generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens, **ends
    )
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=False)


def test_samples_are_the_raw_answers_of_base_and_adapter_to_the_users_prompts(place) -> None:
    workspace, model, data, _, worker = place
    prompts = ["How much is 3 and 4?", "Sure? 🤔"]
    config = runs.settings(
        model,
        data,
        method="lora",
        learning_rate=0.02,
        eval={"sample_steps": 4, "sample_prompts": prompts, "sample_max_tokens": 12},
        output={"save_steps": 4},
    )
    run = runs.new(workspace, config)
    assert runs.train(run, workspace, worker) == "finished"
    samples = events(run, "sample")
    assert [(s["step"], s["prompt"], s["wanted"]) for s in samples] == [(n, p, None) for n in (4, 8) for p in prompts]
    tokenizer = AutoTokenizer.from_pretrained(model)
    base = AutoModelForCausalLM.from_pretrained(model)
    for sample in samples:
        tuned = AutoPeftModelForCausalLM.from_pretrained(run.checkpoints / f"step_{sample['step']:08d}" / "model")
        assert sample["text"] == generated(tuned, tokenizer, sample["prompt"], 12)
        assert sample["base"] == generated(base, tokenizer, sample["prompt"], 12)
    assert any(sample["text"] != sample["base"] for sample in samples), "training moved no answer"


def test_the_profiles_processors_constrain_samples(place, monkeypatch) -> None:
    workspace, model, data, _, worker = place
    forced = AutoTokenizer.from_pretrained(model).encode("Z", add_special_tokens=False)[0]

    def only(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([forced]), 0.0)

    kind = type(profiles.load("emoji_think"))
    monkeypatch.setattr(kind, "logits_processors", lambda self, tokenizer: [only])
    config = runs.settings(
        model, data, profile={"name": "emoji_think"}, max_steps=2, eval={"sample_steps": 2, "sample_max_tokens": 5}
    )
    run = runs.new(workspace, config)
    assert runs.train(run, workspace, worker) == "finished"
    assert [sample["text"] for sample in events(run, "sample")] == ["ZZZZZ"] * 3


LONG = {"sample_steps": 1, "sample_prompts": ["Go on."], "sample_max_tokens": 400}


@pytest.fixture
def endless(monkeypatch) -> None:
    """No token ends an answer, so that limits alone do."""
    monkeypatch.setattr("trainer.loop.sample.ends", lambda trained, tokenizer: None)


def test_a_sample_ends_at_its_tokens_or_its_seconds_whichever_comes_first(place, endless) -> None:
    workspace, model, data, _, worker = place
    tokenizer = AutoTokenizer.from_pretrained(model)
    lengths = {}
    for limit, settings in {"tokens": {"sample_max_tokens": 7}, "seconds": {"sample_max_s": 0.05}}.items():
        run = runs.new(workspace, runs.settings(model, data, max_steps=1, eval={**LONG, **settings}))
        assert runs.train(run, workspace, worker) == "finished"
        text = events(run, "sample")[0]["text"]
        lengths[limit] = len(tokenizer.encode(text, add_special_tokens=False))
    assert lengths["tokens"] <= 7 and 0 < lengths["seconds"] < 350


@pytest.mark.parametrize("command", ["stop", "stop-now"])
def test_a_stop_in_the_middle_of_a_sample_ends_it_and_no_half_answer_is_kept(
    place, endless, command, monkeypatch
) -> None:
    workspace, model, data, _, worker = place
    from trainer.loop import sample as sampling
    from trainer.session import open_life, train_to_end

    run = runs.new(workspace, runs.settings(model, data, max_steps=50, eval=LONG))
    life = open_life(run, "test", resumed=False)
    real, calls, asked = sampling._Limit.__call__, [0], [0.0]

    def then_stop(self, *arguments, **more):
        calls[0] += 1
        if calls[0] == 20:
            life.signals.ask(command, "test")
            asked[0] = time.monotonic()
        return real(self, *arguments, **more)

    monkeypatch.setattr(sampling._Limit, "__call__", then_stop)
    from trainer.machine import machine

    assert train_to_end(life, workspace, worker, machine()) == "stopped"
    assert calls[0] == 20, "tokens were written after the stop"
    assert status(run).current_step == 1 and events(run, "sample") == []
    assert bool(checkpoint.listed(run.checkpoints)) == (command == "stop")
    assert len(read_metrics(run.metrics)) == 1
