"""The smoke test on good and on broken models: what passes, what is named, and that it touches nothing."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import runs
from tests.tiny import tiny_model_dir
from trainer import launch
from trainer.engine import threads_for
from trainer.loop import smoke_checkpoint, smoke_steps
from trainer.machine import machine
from trainer.smoke import run_smoke
from trainer.worker import Worker
from trainer.workspace import Workspace

pytestmark = pytest.mark.usefixtures("only_new_objects")


@pytest.fixture(scope="module")
def worker():
    made = Worker()
    yield made
    made.close()


@pytest.fixture
def workspace(tmp_path):
    return Workspace(tmp_path / "ws").create()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return runs.write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl")


def smoke(workspace, worker, config, interrupt=lambda: False, name="one") -> dict:
    folder = workspace.smoke / name
    folder.mkdir()
    prompt = launch.prompt_of(config, workspace.profiles)
    here = machine()
    report = run_smoke(folder, config, prompt, workspace, worker, here, threads_for(here), interrupt)
    assert json.loads((folder / "report.json").read_text()) == report, "the file is the report"
    return report


def line(report: dict, code: str) -> dict:
    found = [entry for entry in report["lines"] if entry["code"] == code]
    assert found, [entry["text"] for entry in report["lines"]]
    return found[0]


@pytest.mark.parametrize(
    "method,profile,recompute", [("full", "plain", False), ("lora", "emoji_think", True), ("full", "regime3", True)]
)
def test_a_good_model_passes_every_check_that_a_cpu_can_make(
    workspace, worker, data, tmp_path, method, profile, recompute
):
    model = tiny_model_dir(tmp_path / "model")
    config = runs.settings(
        model, data, method=method, profile={"name": profile}, use_gradient_checkpointing=recompute, max_length=1024
    )
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    report = smoke(workspace, worker, config)
    assert report["state"] == "done" and report["failed"] == 0, report["summary"]
    assert report["not_possible"] == 0 and report["passed"] >= 17
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before
    assert not list(workspace.runs.iterdir()) and report["seconds_a_step"] > 0 and report["total_steps"] == 8
    assert report["judged"]["hyperparams.method"] == method


def test_at_least_ten_optimiser_steps_are_taken_the_longest_rows_first(workspace, worker, data, tmp_path, monkeypatch):
    taken = []
    step = smoke_steps.Bench.step

    def noting(self, rows, number=None):
        taken.append([int(self.tokens.cache.lengths[row]) for row in rows])
        return step(self, rows, number)

    monkeypatch.setattr(smoke_steps.Bench, "step", noting)
    smoke(workspace, worker, runs.settings(tiny_model_dir(tmp_path / "model"), data))
    assert len(taken) >= 10
    assert min(taken[0]) >= max(taken[5]), "the first step has the longest rows"


def test_a_template_that_drops_the_prompt_fails_by_name(workspace, worker, data, tmp_path):
    model = tiny_model_dir(tmp_path / "model")
    template = (
        "{% for m in messages %}{% if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    (model / "chat_template.jinja").write_text(template)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    report = smoke(workspace, worker, runs.settings(model, data, profile={"name": "plain"}))
    assert line(report, "prompt")["status"] == "problem"
    assert "does not see your prompt" in report["summary"]


def test_rows_whose_answers_are_all_cut_away_fail_in_words(workspace, worker, tmp_path):
    model = tiny_model_dir(tmp_path / "model")
    long = tmp_path / "long.jsonl"
    row = {"messages": [{"role": "user", "content": "word " * 400}, {"role": "assistant", "content": "yes"}]}
    long.write_text((json.dumps(row) + "\n") * 20)
    report = smoke(workspace, worker, runs.settings(model, long, max_length=32))
    assert report["failed"] == 1 and "answer" in report["summary"], report["summary"]


def test_a_rate_that_diverges_is_named_with_the_losses_seen(workspace, worker, data, tmp_path):
    report = smoke(
        workspace, worker, runs.settings(tiny_model_dir(tmp_path / "model"), data, learning_rate=1.0, max_grad_norm=0)
    )
    assert report["failed"] >= 1
    assert "rate 1 is too high" in " ".join(entry["text"] for entry in report["lines"]) or "NaN" in report["summary"]


def test_nan_weights_are_named_by_tensor(workspace, worker, data, tmp_path):
    model = tiny_model_dir(tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    name = next(name for name in weights if name.endswith("mlp.up_proj.weight"))
    weights[name][0, 0] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    report = smoke(workspace, worker, runs.settings(model, data))
    assert name in report["summary"] and "NaN" in report["summary"]


def test_a_rate_of_zero_fails_because_nothing_is_learnt(workspace, worker, data, tmp_path):
    report = smoke(workspace, worker, runs.settings(tiny_model_dir(tmp_path / "model"), data, learning_rate=0))
    assert line(report, "learns")["status"] == "problem"


def test_a_checkpoint_that_comes_back_different_is_caught(workspace, worker, data, tmp_path, monkeypatch):
    load = smoke_checkpoint.load_optimizer

    def damaged(directory):
        states = load(directory)
        name = next(key for key in states if key.startswith("exp_avg_sq/"))
        states[name] = states[name] * 2 + 1
        return states

    monkeypatch.setattr(smoke_checkpoint, "load_optimizer", damaged)
    report = smoke(workspace, worker, runs.settings(tiny_model_dir(tmp_path / "model"), data))
    assert line(report, "checkpoint")["status"] == "problem" and "exp_avg_sq" in line(report, "checkpoint")["text"]


def test_checkpointing_that_is_not_really_on_is_caught(workspace, worker, data, tmp_path, monkeypatch):
    from trainer.models import activations

    monkeypatch.setattr(activations, "recompute", lambda model, policy: None)
    monkeypatch.setattr("trainer.loop.prepare.recompute", lambda model, policy: None)
    report = smoke(
        workspace, worker, runs.settings(tiny_model_dir(tmp_path / "model"), data, use_gradient_checkpointing=True)
    )
    assert line(report, "checkpointing")["status"] == "problem"


def test_a_stop_ends_it_between_checks(workspace, worker, data, tmp_path):
    report = smoke(workspace, worker, runs.settings(tiny_model_dir(tmp_path / "model"), data), interrupt=lambda: True)
    assert report["state"] == "stopped" and report["failed"] == 0


def test_simulated_out_of_memory_on_the_longest_rows_gives_the_remedies(workspace, worker, data, tmp_path, monkeypatch):
    def full(self, rows, number=None):
        raise torch.OutOfMemoryError("simulated")

    monkeypatch.setattr(smoke_steps.Bench, "step", full)
    report = smoke(workspace, worker, runs.settings(tiny_model_dir(tmp_path / "model"), data))
    assert "Out of memory" in line(report, "memory")["text"] and "LoRA" in line(report, "memory")["text"]
