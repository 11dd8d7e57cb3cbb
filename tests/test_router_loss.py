"""Router losses of experts: the gradient is transformers' own one row at a time, in every way, and a resume is the same run."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers as hf

from tests import runs
from tests.exact import SIZES, VOCABULARY, build, relative_difference
from tests.memory_rows import random_rows
from tests.test_gradients import applied_gradient, stepper_of
from tests.tiny import tiny_model_dir
from trainer import checkpoint
from trainer.data.loader import assemble
from trainer.events import all_events
from trainer.loop import router
from trainer.loop.forward import WAYS, Path, choose_path, forward, plain_head
from trainer.metrics import read_metrics
from trainer.models import attention
from trainer.models.activations import recompute
from trainer.models.lora import add_lora
from trainer.worker import Worker
from trainer.workspace import Workspace

ROUTED = dict(output_router_logits=True, router_aux_loss_coef=0.5)  # large, so that a wrong one cannot hide
EXPERTS = dict(num_experts=4, num_experts_per_tok=2)
FAMILIES = {
    "granite-moe": hf.GraniteMoeConfig(**SIZES, **ROUTED, num_local_experts=4, num_experts_per_tok=2),
    "mixtral": hf.MixtralConfig(**SIZES, **ROUTED, num_local_experts=4, num_experts_per_tok=2),
    "olmoe": hf.OlmoeConfig(**SIZES, **ROUTED, **EXPERTS),
    "qwen3-moe": hf.Qwen3MoeConfig(**SIZES, **ROUTED, **EXPERTS, head_dim=8, moe_intermediate_size=32),
}
ROWS = np.arange(7)


def reference(model, cache) -> dict[str, torch.Tensor]:
    """Gradient of the definition, from transformers' own `.loss` of each row: its label part and its router part."""
    model.set_attn_implementation("eager")
    model.zero_grad()
    labels_of = [int(cache.labels(row)[1:].sum()) for row in ROWS]
    tokens_of = [len(cache.ids(row)) for row in ROWS]
    for row, labels, tokens in zip(ROWS, labels_of, tokens_of, strict=True):
        ids = torch.tensor(cache.ids(row).astype(np.int64))[None]
        targets = torch.where(torch.tensor(cache.labels(row).astype(bool))[None], ids, -100)
        targets[0, 0] = -100
        out = model(input_ids=ids, labels=targets)
        routed = ROUTED["router_aux_loss_coef"] * out.aux_loss
        alone = out.loss - routed  # what `.loss` is without its router part
        (alone * labels / sum(labels_of) + routed * tokens / sum(tokens_of)).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.set_attn_implementation(attention.NAME)
    return found


@pytest.mark.parametrize(
    "groups", [[4, 2, 1], *(pytest.param(each, marks=pytest.mark.slow) for each in ([7], [1] * 7))], ids=str
)
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_of_a_step_with_router_losses_is_the_defined_one(family, method, groups) -> None:
    loaded = build(FAMILIES[family])
    cache = random_rows(len(ROWS), VOCABULARY, seed=3)
    trained = loaded.model
    if method == "lora":
        trained = add_lora(loaded.model, rank=4, alpha=8, dropout=0.0, targets=[], seed=3)
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.data.normal_(0, 0.05)
    wanted = reference(loaded.model, cache)
    stepper = stepper_of(loaded, trained, cache)
    assert stepper.path.router == 0.5 and stepper.path.way == "fused"
    borders = np.cumsum([0, *groups])
    mine = applied_gradient(stepper, [ROWS[a:b] for a, b in zip(borders, borders[1:], strict=False)], cache)
    prefix = "base_model.model." if method == "lora" else ""
    wanted = {prefix + name: value for name, value in wanted.items()}
    assert relative_difference(mine, wanted) <= 1e-6
    stepper.path = replace(stepper.path, router=None)
    without = applied_gradient(stepper, [ROWS], cache)
    assert relative_difference(without, {name: wanted[name] for name in without}) > 1e-3, (
        "the router part moves nothing"
    )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_each_way_gives_every_row_its_own_router_loss_as_transformers_does(way, family) -> None:
    loaded = build(FAMILIES[family])
    cache = random_rows(4, VOCABULARY, seed=3)
    path = Path(way, plain_head(loaded.model), torch.float32, None, 0.5)
    with torch.no_grad():
        found = forward(loaded.model, assemble(cache, np.arange(4), "cpu"), path).router
        for row in range(4):
            ids = torch.tensor(cache.ids(row).astype(np.int64))[None]
            assert float(found[row]) == pytest.approx(float(loaded.model(input_ids=ids).aux_loss), rel=1e-6)


def test_the_check_of_every_start_sees_a_router_loss_that_is_wrong(monkeypatch) -> None:
    loaded = build(FAMILIES["mixtral"])
    batch = assemble(random_rows(2, VOCABULARY, seed=3), np.arange(2), "cpu")
    real = router.of_rows
    monkeypatch.setattr(router, "of_rows", lambda *arguments: real(*arguments) * 1.01)
    choice = choose_path(loaded.model, batch, compute=torch.float32, autocast=None)
    assert choice.path.way == "one row at a time"
    assert "differs" in dict(choice.passed_over)["fused"]
    monkeypatch.setattr(
        router, "of_rows", lambda model, logits, borders: real(model, logits, (0, borders[-1])).expand(2)
    )
    choice = choose_path(loaded.model, batch, compute=torch.float32, autocast=None)
    assert "see each other" in dict(choice.passed_over)["fused"]


def test_without_the_models_own_wish_nothing_is_added() -> None:
    config = copy.deepcopy(FAMILIES["mixtral"])
    config.output_router_logits = False
    loaded = build(config)
    batch = assemble(random_rows(2, VOCABULARY, seed=3), np.arange(2), "cpu")
    path = choose_path(loaded.model, batch, compute=torch.float32, autocast=None).path
    assert path.router is None and forward(loaded.model, batch, path).router is None


@pytest.mark.parametrize("policy", ["full", "selective"])
def test_gradient_checkpointing_changes_no_bit_of_it(policy) -> None:
    cache = random_rows(len(ROWS), VOCABULARY, seed=3)
    found = []
    for checkpointing in (False, True):
        loaded = build(FAMILIES["qwen3-moe"])
        if checkpointing:
            recompute(loaded.model, policy)
        found.append(applied_gradient(stepper_of(loaded, loaded.model, cache), [ROWS[:4], ROWS[4:]], cache))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("place")
    model = tiny_model_dir(root / "model", "mixtral")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | ROUTED))
    worker = Worker()
    yield Workspace(root / "ws").create(), model, runs.write_rows(root / "rows.jsonl"), worker
    worker.close()


def test_a_run_says_that_it_adds_them_writes_samples_and_resumes_to_the_last_bit(place) -> None:
    workspace, model, data, worker = place
    config = runs.settings(model, data, eval={"eval_steps": 3, "sample_steps": 4, "sample_max_tokens": 6})
    whole, broken = runs.new(workspace, config), runs.new(workspace, config)
    assert runs.train(whole, workspace, worker) == "finished"
    assert runs.train(broken, workspace, worker, stop_at=3) == "stopped"
    assert runs.train(broken, workspace, worker) == "finished"
    assert read_metrics(whole.metrics)["loss"].tolist() == read_metrics(broken.metrics)["loss"].tolist()
    files = [checkpoint.newest_verified(run.checkpoints).path / "model/model.safetensors" for run in (whole, broken)]
    assert files[0].read_bytes() == files[1].read_bytes()
    said = [event["text"] for event in all_events(whole.events) if event["kind"] in ("log", "alert")]
    assert any("Router loss is added: coefficient 0.5" in text for text in said)
    samples = [event for event in all_events(whole.events) if event["kind"] == "sample"]
    assert len(samples) == 6, [text for text in said if "Sample" in text]
