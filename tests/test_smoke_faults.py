"""Each check of the smoke test against a planted fault: the line that must turn into a problem, and what it must say.

docs/testing.md has the table. Faults of files are made in files, faults of the code by taking the place of one function.
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import runs
from tests.test_smoke import line
from tests.test_smoke import smoke as smoked
from tests.tiny import tiny_model_dir
from trainer import checkpoint, process_peak, smoke
from trainer.data.loader import assemble
from trainer.loop import smoke_memory, smoke_steps
from trainer.loop.sample import _Limit
from trainer.models import activations
from trainer.models.attention import DocumentAttention
from trainer.workspace import Workspace

pytestmark = pytest.mark.usefixtures("only_new_objects")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_dir(tmp_path_factory.mktemp("models") / "good", layers=1)


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "ws").create()


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


# -- faults of files: planted(model folder), the line's code, words of its text


def end_token_nobody_trains(model: Path) -> None:
    for name, key in (("generation_config.json", "eos_token_id"), ("config.json", "eos_token_id")):
        edit(model / name, lambda content, key=key: content.update({key: 0}))
    edit(model / "tokenizer_config.json", lambda content: content.update(eos_token="<|endoftext|>"))


def embedding_too_short(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    name = "model.embed_tokens.weight"
    weights[name] = weights[name][:100].clone()
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    edit(model / "config.json", lambda content: content.update(vocab_size=100))


def nan_weight(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "plant,code,words",
    [
        (end_token_nobody_trains, "answers_end", ("never end", "<|endoftext|>", "generation_config.json")),
        (embedding_too_short, "refused", ("vocabulary ends at 99", "tokenizer belongs to another model")),
        (nan_weight, "refused", ("NaN", "model.norm.weight", "Download it again")),
    ],
)
def test_a_fault_in_the_models_files_is_named(workspace, worker, data, tmp_path, plant, code, words):
    folder = tiny_model_dir(tmp_path / "model", layers=1)
    plant(folder)
    found = line(smoked(workspace, worker, runs.settings(folder, data)), code)
    assert found["status"] == "problem"
    assert all(word in found["text"] for word in words), found["text"]


@pytest.mark.parametrize(
    "labels,words", [("none", ("No token of the data is trained",)), ("question", ("wrong tokens", "not of an answer"))]
)
def test_labels_that_are_masked_away_or_stand_on_the_question_are_named(workspace, worker, data, model, labels, words):
    config = runs.settings(model, data)
    assert smoked(workspace, worker, config)["failed"] == 0
    (path,) = workspace.tokens.glob("*/labels.npy")
    marks = np.load(path)
    np.save(path, np.zeros_like(marks) if labels == "none" else 1 - marks)
    found = line(smoked(workspace, worker, config, name="two"), "refused" if labels == "none" else "labels")
    assert found["status"] == "problem"
    assert all(word in found["text"] for word in (*words, "cache/tokens")), found["text"]


def test_a_tokenizer_of_another_vocabulary_is_seen_in_what_the_model_makes_of_the_text(workspace, worker, data, model):
    run = runs.new(workspace, runs.settings(model, data, learning_rate=1e-2, max_steps=40, output={"save_steps": 40}))
    assert runs.train(run, workspace, worker) == "finished"
    (trained,) = run.path.glob("checkpoints/*/model")
    good = line(smoked(workspace, worker, runs.settings(trained, data)), "tokenizer")
    assert good["status"] == "pass", good["text"]

    def exchange(content: dict[str, Any]) -> None:
        vocabulary = content["model"]["vocab"]
        names = [name for name, number in vocabulary.items() if number >= 3]
        vocabulary.update(zip(names, [vocabulary[name] for name in reversed(names)], strict=True))

    edit(trained / "tokenizer.json", exchange)
    bad = line(smoked(workspace, worker, runs.settings(trained, data), name="two"), "tokenizer")
    assert bad["status"] == "problem" and "worse than a guess" in bad["text"], bad["text"]


# -- faults of the code: planted(monkeypatch), settings, the line's code, words of its text


def loss_of_long_rows_too_small(patch: pytest.MonkeyPatch) -> None:
    from trainer.loop import forward

    real = forward.label_losses
    patch.setattr(forward, "label_losses", lambda *a: real(*a) * (0.9 if len(a[2]) > 30 else 1.0))


def recomputed_unasked(patch: pytest.MonkeyPatch) -> None:
    from trainer.loop import prepare

    real = prepare.load_model

    def load(*arguments: Any, **named: Any) -> Any:
        loaded = real(*arguments, **named)
        activations.recompute(loaded.model, "full")
        return loaded

    patch.setattr(prepare, "load_model", load)


def not_recomputed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(activations, "recompute", lambda model, policy: None)
    patch.setattr("trainer.loop.prepare.recompute", lambda model, policy: None)


def counted_under_another_name(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(DocumentAttention, "_count", lambda self, kernel: self.calls.update(["varlen"]))


def by_hand_in_the_steps(patch: pytest.MonkeyPatch) -> None:
    from trainer.models import attention

    real = attention._each_document

    def slow(q, k, v, documents, dropout, scaling, window, softcap, sinks=None):
        if documents.longest < 60:
            return real(q, k, v, documents, dropout, scaling, window, softcap, sinks)
        parts = [
            attention._by_hand(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], dropout, scaling, window, softcap, sinks)
            for a, b in zip(documents.borders, documents.borders[1:], strict=False)
        ]
        return torch.cat(parts, 2).transpose(1, 2)

    patch.setattr(attention, "_each_document", slow)


def another_kernel_after_the_start(patch: pytest.MonkeyPatch) -> None:
    real = smoke_steps.Bench.step

    def step(self: Any, rows: Any, number: int | None = None) -> float:
        self.model.loaded.attention._count("flash_attn")
        return real(self, rows, number)

    patch.setattr(smoke_steps.Bench, "step", step)


def weights_rounded_when_saved(patch: pytest.MonkeyPatch) -> None:
    from transformers import PreTrainedModel

    real = PreTrainedModel.save_pretrained

    def rounded(self: Any, folder: str, *, state_dict: dict[str, torch.Tensor]) -> None:
        real(self, folder, state_dict={name: tensor.bfloat16().float() for name, tensor in state_dict.items()})

    patch.setattr(PreTrainedModel, "save_pretrained", rounded)


def states_never_put_back(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("trainer.loop.smoke_checkpoint.optim.restore", lambda optimizer, named, saved: None)


def draws_of_no_seed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("trainer.loop.step.seed_draws", lambda seed, device: None)


def no_room_for_the_checkpoints(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(checkpoint, "free_bytes", lambda path: 1_500_000)


def limit_in_seconds_ignored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("trainer.loop.smoke_answer.SLACK_S", 0.2)
    patch.setattr(_Limit, "__call__", lambda self, ids, scores, **k: _no(time.sleep(0.1), ids))


def limit_in_tokens_ignored(patch: pytest.MonkeyPatch) -> None:
    from transformers import Qwen3ForCausalLM

    real = Qwen3ForCausalLM.generate
    patch.setattr(
        Qwen3ForCausalLM,
        "generate",
        lambda self, **named: real(self, **{**named, "max_new_tokens": 10**6, "eos_token_id": None}),
    )


def _no(_: None, ids: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(ids), dtype=torch.bool)


def adapter_frozen(patch: pytest.MonkeyPatch) -> None:
    from trainer.loop import prepare

    real = prepare.add_lora
    patch.setattr(prepare, "add_lora", lambda *a, **k: real(*a, **k).requires_grad_(False))


def gradients_lost(patch: pytest.MonkeyPatch) -> None:
    from trainer.loop.step import Stepper

    real = Stepper._update

    def update(self: Any, rate: float, sums: torch.Tensor) -> torch.Tensor:
        for name, parameter in self.named:
            if "layers" in name:
                parameter.grad = None
        return real(self, rate, sums)

    patch.setattr(Stepper, "_update", update)


def model_kept(patch: pytest.MonkeyPatch) -> None:
    from trainer.loop import smoke_answer

    real, kept = smoke_answer.generation, []

    def generation(report: Any, config: Any, prompt: Any, model: Any, *rest: Any) -> None:
        kept.append(model)
        real(report, config, prompt, model, *rest)

    patch.setattr(smoke_answer, "generation", generation)


def clock_that_stands(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(smoke_steps, "MARKS_SLACK_S", 0.0)  # the steps of this model take milliseconds
    patch.setattr("trainer.loop.step.Marks.seconds", lambda self: [0.0, 0.0])


def a_processor_with_no_room(patch: pytest.MonkeyPatch) -> None:
    real = smoke.fit_of_smoke

    def fit_of_smoke(*arguments: Any) -> Any:
        fit = real(*arguments)
        more = replace(fit.forecast, parts={**fit.forecast.parts, "activations": 10_000.0})
        return replace(fit, forecast=more)

    patch.setattr(smoke, "fit_of_smoke", fit_of_smoke)
    patch.setattr(smoke_steps.Bench, "step", lambda *a: pytest.fail("a step was taken"))


def out_of_memory_in_the_update(patch: pytest.MonkeyPatch) -> None:
    from trainer.loop.step import Stepper, UpdateOutOfMemory

    def update(self: Any, rate: float, sums: torch.Tensor) -> torch.Tensor:
        raise UpdateOutOfMemory

    patch.setattr(Stepper, "_update", update)


def steps_of_nan(patch: pytest.MonkeyPatch) -> None:
    real = smoke_steps.Bench.step
    patch.setattr(smoke_steps.Bench, "step", lambda *a: real(*a) * float("nan"))


CODE_FAULTS: list[tuple[Callable[[pytest.MonkeyPatch], None], dict[str, Any], str, tuple[str, ...]]] = [
    (loss_of_long_rows_too_small, {}, "loss", ("not the model's own", "instead of")),
    (not_recomputed, {"use_gradient_checkpointing": True}, "checkpointing", ("as many activations", "MiB")),
    (recomputed_unasked, {}, "checkpointing", ("off in the settings, but it is on",)),
    (counted_under_another_name, {}, "attention", ("varlen announced", "scaled_dot_product")),
    (by_hand_in_the_steps, {}, "attention", ("plain products seen",)),
    (another_kernel_after_the_start, {}, "attention", ("flash_attn", "counted in the steps")),
    (weights_rounded_when_saved, {}, "checkpoint", ("tensor ", "differs")),
    (states_never_put_back, {}, "checkpoint", ("tensor step/", "differs")),
    (draws_of_no_seed, {"method": "lora", "lora": {"dropout": 0.5}}, "checkpoint", ("the next loss is",)),
    (no_room_for_the_checkpoints, {}, "disk", ("too small", "is free", "Make room")),
    (limit_in_seconds_ignored, {"eval": {"sample_max_s": 1}}, "generation", ("does not end in time", "1 s are set")),
    (limit_in_tokens_ignored, {}, "generation", ("does not stop at its limit of 32 tokens",)),
    (adapter_frozen, {"method": "lora"}, "refused", ("no trainable parameters", "lora.target_modules")),
    (gradients_lost, {}, "trained", ("Only 2 of", "is as it was")),
    (model_kept, {}, "memory_back", ("not given back", "of tensors left")),
    (clock_that_stands, {}, "speed", ("own clock says 0.0", "no time of the run can be told")),
    (a_processor_with_no_room, {}, "memory", ("Too little memory", "were not tried", "is free")),
    (out_of_memory_in_the_update, {}, "memory", ("Out of memory with the longest rows", "tokens, micro-batch 2")),
    (steps_of_nan, {}, "steps", ("NaN or infinite on the longest rows", "Lower the rate")),
]


@pytest.mark.parametrize("plant,settings,code,words", CODE_FAULTS, ids=[fault[0].__name__ for fault in CODE_FAULTS])
def test_a_planted_fault_turns_its_line_into_a_problem(
    workspace, worker, data, model, monkeypatch, plant, settings, code, words
):
    plant(monkeypatch)
    report = smoked(workspace, worker, runs.settings(model, data, **settings))
    found = line(report, code)
    assert found["status"] == "problem", report["summary"]
    assert all(word in found["text"] for word in words), found["text"]
    assert report["failed"] == 1 and found["text"] in report["summary"], [entry["text"] for entry in report["lines"]]


@contextmanager
def limited(what: int, size: int) -> Iterator[None]:
    old = resource.getrlimit(what)
    resource.setrlimit(what, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(what, old)


def test_a_disk_that_takes_no_large_file_costs_the_checkpoints_line_and_leaves_nothing(workspace, worker, data, model):
    config = runs.settings(model, data)
    smoked(workspace, worker, config)
    with limited(resource.RLIMIT_FSIZE, 1 << 17):
        report = smoked(workspace, worker, config, name="two")
    found = line(report, "checkpoint")
    assert found["status"] == "problem" and "cannot be written" in found["text"], found["text"]
    assert line(report, "generation")["status"] == "pass", "the checks after it are made"
    assert [path.name for path in (workspace.smoke / "two").iterdir()] == ["report.json"]


def test_a_folder_of_runs_that_takes_no_file_is_named(workspace, worker, data, model):
    workspace.runs.rmdir()
    workspace.runs.write_text("in the way")
    found = line(smoked(workspace, worker, runs.settings(model, data)), "disk")
    assert found["status"] == "problem" and "takes no file: Not a directory" in found["text"], found["text"]


def test_a_processor_that_really_runs_out_of_memory_at_the_longest_rows_says_so(
    workspace, worker, data, model, monkeypatch
):
    config = runs.settings(model, data, batch_size=64, gradient_accumulation=1)
    real = smoke_steps.Bench.step

    def step(self: Any, rows: np.ndarray, number: int | None = None) -> float:
        assert len(assemble(self.tokens.cache, rows, "cpu").rows) > 40
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        with limited(resource.RLIMIT_AS, size + (4 << 20)):
            return real(self, np.tile(rows, 20), number)

    monkeypatch.setattr(smoke_steps.Bench, "step", step)
    report = smoked(workspace, worker, config)
    assert "Out of memory with the longest rows" in line(report, "memory")["text"], report["summary"]
    assert line(report, "memory_back")["status"] == "pass"


def test_where_the_kernel_counts_no_peak_the_line_says_not_possible(workspace, worker, data, model, monkeypatch):
    monkeypatch.setattr(process_peak, "begin", lambda: False)
    report = smoked(workspace, worker, runs.settings(model, data))
    assert line(report, "memory")["status"] == "not_possible" and report["summary"].startswith(
        "Passed 17; 1 not possible"
    )


def test_the_tensors_alive_are_counted_once_each_and_gone_when_dropped():
    before = smoke_memory.tensors_gib()
    held = [torch.zeros(1 << 18)]
    held.append(held[0][10:])  # the same storage
    assert smoke_memory.tensors_gib() - before == pytest.approx(1 / 1024, abs=1e-6)
    held.clear()
    assert smoke_memory.tensors_gib() == pytest.approx(before, abs=1e-6)
