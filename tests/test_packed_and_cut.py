"""Packing changes nothing but the speed, and a row that is too long never teaches an end that it does not have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import runs
from tests.memory_rows import MemoryRows, random_rows
from tests.test_forward import FAMILIES, VOCABULARY, build, reference, relative_difference
from tests.tiny import tiny_model_dir, tiny_tokenizer
from trainer.data.doctor import check_data
from trainer.data.loader import assemble
from trainer.data.packing import Plan, make_plan, waste
from trainer.data.render import Renderer
from trainer.data.tokens import TokenCache, TokenRequest, build_cache, load_tokenizer
from trainer.events import all_events
from trainer.loop.forward import Path as LossPath
from trainer.loop.forward import choose_path, losses
from trainer.models.starter import as_jsonl, build_tokenizer, starter_rows, texts_of
from trainer.refusal import Refusal
from trainer.worker import Worker
from trainer.workspace import Workspace

DATE = "2025-11-22"


def plan(lengths: np.ndarray, capacity: int | None, packs_per_step: int = 4) -> Plan:
    rows, none = np.arange(len(lengths)), np.empty(0, np.int64)
    return make_plan(
        lengths, rows, none, np.ones(len(rows)), seed=3, epochs=1, max_steps=None, packs_per_step=packs_per_step,
        capacity=capacity,
    )  # fmt: skip


def gradients(model: Any, cache: MemoryRows, groups: list[np.ndarray], path: LossPath) -> dict[str, torch.Tensor]:
    """The gradient of one step, summed over its micro-batches as training sums it."""
    model.zero_grad()
    labels = sum(int(cache.labels(int(row))[1:].sum()) for group in groups for row in group)
    for group in groups:
        (losses(model, assemble(cache, group, "cpu"), path).sum() / labels).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["gpt2", "gemma2 with caps", "mistral with a window of 16"])
def test_a_packed_step_has_the_gradient_of_its_rows_one_by_one(family: str) -> None:
    loaded, cache = build(FAMILIES[family]), random_rows(23, VOCABULARY, seed=9)
    path = choose_path(loaded.model, assemble(cache, np.arange(2), "cpu"), compute=torch.float32, autocast=None).path
    assert path.way == "fused", "where rows are computed one by one there is nothing to compare"
    packed = plan(cache.lengths, capacity=96).micro_batches(1, 2)
    rows = np.concatenate(packed)
    assert len(rows) > 4, "four packs hold more than four rows"
    loaded.model.train()
    together = gradients(loaded.model, cache, packed, path)
    alone = gradients(loaded.model, cache, [rows[n : n + 1] for n in range(len(rows))], path)
    assert relative_difference(together, alone) <= 1e-6
    _, plainly = reference(loaded.model, cache, rows)
    assert relative_difference(together, plainly) <= 1e-6


@pytest.fixture(scope="module")
def starter(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The starter's tokenizer and data, without its weights."""
    root, rows = tmp_path_factory.mktemp("starter"), starter_rows()
    build_tokenizer(texts_of(rows)).save_pretrained(root / "model")
    (root / "rows.jsonl").write_bytes(as_jsonl(rows))
    return root / "model", root / "rows.jsonl"


def tokens_of(model: Path, data: Path, root: Path, limit: int, too_long: Any = "cut") -> TokenCache:
    request = TokenRequest((str(data),), str(model), None, "", DATE, limit, too_long)
    return TokenCache.open(build_cache(request, root, lambda done, total: None))


def test_packs_of_the_starter_data_are_full_to_two_percent_at_2048_tokens(
    starter: tuple[Path, Path], tmp_path: Path
) -> None:
    lengths = np.asarray(tokens_of(*starter, tmp_path, 2048).lengths)
    made = plan(lengths, capacity=2048)
    assert sorted(made.rows) == list(range(len(lengths)))
    lost = waste(made, lengths, 2048)
    assert 0 <= lost < 0.02, lost
    packs = len(made.pack_starts) - 1
    assert packs <= -(-int(lengths.sum()) // 2048) + 1, "at most one pack more than any packing needs"


def test_the_whole_plan_is_told_before_step_1(tmp_path: Path) -> None:
    worker, workspace = Worker(), Workspace(tmp_path / "ws").create()
    data = runs.write_rows(tmp_path / "rows.jsonl")
    config = runs.settings(
        tiny_model_dir(tmp_path / "model"), data, packing=True, max_steps=None, num_epochs=2, batch_size=1
    )
    run = runs.new(workspace, config)
    try:
        assert runs.train(run, workspace, worker) == "finished"
    finally:
        worker.close()
    events = all_events(run.events)
    kinds = [event["kind"] for event in events]
    told = next(event for event in events if event["kind"] == "plan")
    assert kinds.index("plan") < kinds.index("running")
    assert told["total_steps"] == events[-1]["step"] > 2 and 0 <= told["waste"] < 1


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokenizer(tmp_path_factory.mktemp("model") / "tiny")


ROW = [
    {"role": "user", "content": "First question?"},
    {"role": "assistant", "content": "The first answer is here."},
    {"role": "user", "content": "Second question?"},
    {"role": "assistant", "content": "The second answer stands at the end."},
]


def test_wherever_a_row_is_cut_its_labels_are_those_of_the_whole_row_and_no_end_is_added(
    model: Path, tmp_path: Path
) -> None:
    data = tmp_path / "row.jsonl"
    data.write_text(
        json.dumps({"messages": ROW}) + "\n" + json.dumps({"messages": [*ROW[:1], {**ROW[1], "content": "a"}]})
    )
    tokenizer = load_tokenizer(model)
    renderer = Renderer(tokenizer, None, DATE)
    whole = renderer.render(ROW)
    short = len(renderer.render([ROW[0], {**ROW[1], "content": "a"}]).ids)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    ends = [at for at, n in enumerate(whole.ids) if n == end and whole.labels[at]]
    assert len(ends) == 2 and len(whole.ids) == ends[1] + 2, "the end of the turn, then a line break"
    first_label = whole.labels.index(True)
    for limit in range(8, len(whole.ids) + 2):
        cache = tokens_of(model, data, tmp_path / "tokens", limit) if limit > first_label else None
        if cache is None:  # nothing of an answer is left, also not of the short row
            with pytest.raises(Refusal, match=f"2 with no answer in the first {limit} tokens"):
                tokens_of(model, data, tmp_path / "tokens", limit)
            continue
        kept = min(limit, len(whole.ids))
        assert cache.ids(0).tolist() == whole.ids[:kept]
        assert cache.labels(0).tolist() == [int(label) for label in whole.labels[:kept]]
        batch = assemble(cache, np.array([0]), "cpu")
        trained_ends = [int(at) + 1 for at, n in zip(batch.label_at, batch.targets, strict=True) if int(n) == end]
        assert trained_ends == [at for at in ends if at < limit], "an end is trained exactly where the row has it"
        assert int(batch.label_at.max()) + 1 < kept
        cut = [max(0, length - limit) for length in (len(whole.ids), short)]
        assert (cache.meta["rows_cut"], cache.meta["tokens_cut"]) == (sum(n > 0 for n in cut), sum(cut))


def test_a_row_whose_answers_are_all_cut_away_is_left_out_counted_and_said(model: Path, tmp_path: Path) -> None:
    late = {"messages": [{"role": "user", "content": "long " * 60}, {"role": "assistant", "content": "yes"}]}
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"messages": ROW}) + "\n" + json.dumps(late) + "\n")
    cache = tokens_of(model, data, tmp_path / "tokens", 64)
    assert (cache.meta["rows"], cache.meta["rows_without_labels"]) == (1, 1)
    assert cache.source[:, 1].tolist() == [1]
    report = check_data(data, tokenizer=load_tokenizer(model), max_length=64)
    (found,) = [warning for warning in report["warnings"] if warning["code"] == "answers_cut_away"]
    assert found["message"] == "No answer begins within 64 tokens, so the row is left out (1 of 2 sampled rows)."
    assert check_data(data, tokenizer=load_tokenizer(model), max_length=4096)["warnings"] == []


def test_the_log_of_a_run_says_what_was_cut_dropped_and_left_out(tmp_path: Path) -> None:
    worker, workspace = Worker(), Workspace(tmp_path / "ws").create()
    data = runs.write_rows(tmp_path / "rows.jsonl")
    late = {"messages": [{"role": "user", "content": "long " * 60}, {"role": "assistant", "content": "yes"}]}
    data.write_text(data.read_text() + json.dumps(late) + "\n{}\n")
    run = runs.new(workspace, runs.settings(tiny_model_dir(tmp_path / "model"), data, max_length=48, max_steps=1))
    try:
        assert runs.train(run, workspace, worker) == "finished"
    finally:
        worker.close()
    said = [str(event.get("text")) for event in all_events(run.events) if event["kind"] == "log"]
    (told,) = [text for text in said if text.startswith("Data: ")]
    meta = TokenCache.open(next(path for path in workspace.tokens.iterdir() if path.is_dir())).meta
    assert meta["rows_cut"] > 0 and meta["rows_without_labels"] > 1
    late_rows = f"{meta['rows_without_labels']} without an answer in the first 48 tokens."
    assert told.endswith(f"{meta['rows_cut']} rows cut, 0 dropped, 1 unusable, {late_rows}")
