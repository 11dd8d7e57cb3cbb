"""What is behind the Train page: checks, facts, rows, roles. Real workspace, worker, jobs and drafts; no browser."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from trainer.config import resolve
from trainer.loop.memory import Sizes, Work, adapter_weights, forecast
from trainer.machine import Gpu, Machine
from trainer.refusal import Refusal
from ui import train_do
from ui.checks import stamp
from ui.drafts import Draft
from ui.facts import gather
from ui.fit import memory_fact
from ui.form_state import form_state, problem_list
from ui.gate import blocking, gate_lines
from ui.gate_facts import Facts, GateLine
from ui.guard import Caller
from ui.pages import train_html
from ui.site import Site
from ui.train_row import row_of
from ui.train_state import state_of, suggestions_of

SESSION = "c" * 24
OWNER = Caller("owner", SESSION, True)
OPERATOR = Caller("operator", SESSION, True)


def write(site: Site, **values: str) -> None:
    site.drafts.change(SESSION, lambda draft: replace(draft, values=draft.values | values))


def chosen(site: Site, model: Path, data: Path) -> None:
    write(site, **{"model_path": str(model), "data.dataset_path": str(data)})


def now(site: Site) -> tuple[Facts, list[GateLine]]:
    draft = site.drafts.read(SESSION)
    form = form_state(site.workspace, site.config_path, draft)
    facts = gather(site, form, draft)
    return facts, gate_lines(form.config, problem_list(form), facts)


def settled(site: Site, limit_s: float = 60.0) -> tuple[Facts, list[GateLine]]:
    """Facts and lines once nothing is being checked any more."""
    deadline = time.monotonic() + limit_s
    while True:
        facts, lines = now(site)
        if not any(line.status == "not-run" and line.code != "smoke" for line in lines):
            return facts, lines
        assert time.monotonic() < deadline, [line.text for line in lines]
        time.sleep(0.05)


def test_an_empty_workspace_shows_the_first_screen_and_what_is_missing(site: Site) -> None:
    state = state_of(site, OWNER)
    assert state["empty"] and not state["can_start"]
    assert "No model is chosen." in state["lines_html"]
    json.dumps(state, allow_nan=False)


def test_model_and_data_are_checked_once_for_all_tabs(site: Site, tiny_model: Path, tiny_dataset: Path) -> None:
    chosen(site, tiny_model, tiny_dataset)
    facts, lines = settled(site)
    assert blocking(lines) == []
    assert facts.model is not None and facts.model.valid and "qwen3" in facts.model.summary
    assert facts.data is not None and (facts.data.usable, facts.data.rows) == (40, 40)
    assert facts.data.longest and facts.data.label_share and 0 < facts.data.label_share < 1
    assert facts.memory is not None and facts.disk is not None and facts.steps == 3
    jobs = len(site.jobs.recent())
    state_of(site, OWNER)
    state_of(site, Caller("owner", "d" * 24, True))
    assert len(site.jobs.recent()) == jobs == 2


def test_a_file_that_changed_is_checked_again_and_meanwhile_the_old_answer_is_out_of_date(
    site: Site, tiny_model: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    data = tmp_path / "rows.jsonl"
    shutil.copy(tiny_dataset, data)
    chosen(site, tiny_model, data)
    settled(site)
    data.write_text(data.read_text() + "{broken\n")
    write(site, **{"hyperparams.max_length": "32"})
    _, lines = now(site)
    stale = next(line for line in lines if line.code == "data")
    assert stale.text.startswith("Data: 40 rows usable. Out of date, maximum length changed")
    facts, lines = settled(site)
    assert facts.data is not None and facts.data.rows == 41
    assert any("40 of 41 rows are usable" in line.text for line in lines)
    assert any(line.code == "too-long" and "longer than 32 tokens" in line.text for line in lines)


def test_data_that_cannot_be_opened_blocks_with_its_reason(
    site: Site, tiny_model: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    link = tmp_path / "link.jsonl"
    link.symlink_to(tiny_dataset)
    chosen(site, tiny_model, link)
    _, lines = settled(site)
    assert "is a link" in blocking(lines)[0].text
    write(site, **{"data.dataset_path": str(tmp_path / "none.jsonl")})
    assert "does not exist" in blocking(settled(site)[1])[0].text


def test_a_folder_that_is_no_model_blocks_with_file_and_fix(
    site: Site, tiny_model: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_model, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    chosen(site, broken, tiny_dataset)
    (stop,) = [line for line in blocking(settled(site)[1]) if line.code == "model"]
    assert "model.safetensors" in stop.text
    with pytest.raises(Refusal, match="Cannot start yet: cannot train this folder"):
        train_do.start(site, OWNER)
    assert list(site.workspace.runs.iterdir()) == []


def test_a_check_that_broke_is_a_warning_and_not_the_models_fault(
    site: Site, tiny_model: Path, tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer.worker import WorkerDied

    def die(*_: Any, **__: Any) -> Any:
        raise WorkerDied("Checking the model ended unexpectedly.", "detail")

    monkeypatch.setattr(type(site.worker), "call", die)
    chosen(site, tiny_model, tiny_dataset)
    _, lines = settled(site)
    assert blocking(lines) == []
    assert {line.code for line in lines if line.status == "warning"} >= {"model", "data"}


def test_a_row_is_shown_as_the_worker_renders_it(site: Site, tiny_model: Path, tiny_dataset: Path) -> None:
    assert row_of(site, OWNER, {"n": "1"})["said"].startswith("Choose a model and data")
    chosen(site, tiny_model, tiny_dataset)
    seen = row_of(site, OWNER, {"n": "3"})
    assert (seen["row"], seen["rows"]) == (3, 40)
    assert "".join(text for text, kind in seen["tokens"] if kind == "label") == "2 plus 2 is 4.<|im_end|>"
    assert seen["before"][0]["role"] == "user" and seen["after"][0]["role"] == "system"
    assert seen["profile"]["name"] == "plain" and seen["profile"]["system_prompt"] in seen["after"][0]["content"]
    assert "There is no row 41" in row_of(site, OWNER, {"n": "41"})["said"]
    for odd in ("-1", "x", "", "9" * 30, "²"):
        assert row_of(site, OWNER, {"n": odd})["row"] == 1


def test_an_operator_may_not_name_files_outside_the_roots(site: Site, tiny_model: Path, tmp_path: Path) -> None:
    for key in ("model_path", "data.dataset_path", "data.validation_dataset_path", "data.dataset_paths"):
        with pytest.raises(Refusal, match="only the owner may name a path"):
            train_do.typed(site, OPERATOR, {"values": {key: "/etc/passwd"}})
        with pytest.raises(Refusal, match="only the owner"):
            train_do.typed(site, OPERATOR, {"values": {key: f"{site.workspace.root}/../x"}})
    assert site.drafts.read(SESSION) == Draft()
    inside = site.workspace.models_dir / "m"
    train_do.typed(site, OPERATOR, {"values": {"model_path": str(inside), "hyperparams.learning_rate": "1e-3"}})
    train_do.typed(site, OWNER, {"values": {"model_path": str(tiny_model)}})
    assert site.drafts.read(SESSION).values["model_path"] == str(tiny_model)


@pytest.mark.parametrize("sent", [{}, {"values": 3}, {"values": {"gone": "1"}}, {"values": {"lora": "1"}}])
def test_what_the_page_would_never_send_is_refused(site: Site, sent: dict[str, Any]) -> None:
    with pytest.raises(Refusal):
        train_do.typed(site, OWNER, sent)
    assert site.drafts.read(SESSION) == Draft()


def test_foreign_words_are_text_on_the_page(site: Site) -> None:
    evil = '<img src=x onerror="alert(1)">\'&'
    write(
        site, **{"profile.name": evil, "model_path": evil, "hyperparams.learning_rate": evil, "data.dataset_path": evil}
    )
    state = state_of(site, OWNER)
    for name, markup in state.items():
        if name.endswith("_html"):
            assert "<img" not in markup and 'onerror="' not in markup, name
    assert "&lt;img" in state["diff_html"] and "&lt;img" in state["lines_html"]
    assert "<img" not in suggestions_of(site, OWNER)["html"]
    assert "<img" not in train_html.backups_html(evil, [(Path(evil), 0.0)], 1.0)


def test_a_smoke_test_that_nobody_runs_any_more_says_so(site: Site, tiny_model: Path, tiny_dataset: Path) -> None:
    chosen(site, tiny_model, tiny_dataset)
    folder = site.workspace.smoke / "20260101-000000-abcd"
    folder.mkdir(parents=True)
    report = {"state": "running", "lines": [], "passed": 0, "failed": 0, "not_possible": 0, "seconds": 1, "judged": {}}
    (folder / "report.json").write_text(json.dumps(report))
    site.drafts.change(SESSION, lambda draft: replace(draft, smoke_id=folder.name))
    _, lines = now(site)
    assert any(line.text == "Smoke test: interrupted after 0 checks." for line in lines)
    site.drafts.change(SESSION, lambda draft: replace(draft, smoke_id="../x"))
    assert any(line.text == "Smoke test: not run for these settings." for line in now(site)[1])


def test_a_stamp_changes_with_a_file_and_with_a_folders_files(tmp_path: Path) -> None:
    before = stamp(tmp_path)
    (tmp_path / "a").write_text("1")
    one = stamp(tmp_path)
    os.utime(tmp_path / "a", ns=(1, 1))
    assert before != one and one != stamp(tmp_path) and stamp(tmp_path / "none") == []


QWEN3_06B = {
    "parameters": 596_049_920, "hidden_size": 1024, "layers": 28, "vocab_size": 151_936, "intermediate_size": 3072,
    "heads": 16, "kv_heads": 8, "head_dim": 128, "model_type": "qwen3",
}  # fmt: skip
CARD = Machine((Gpu(0, "GPU-1", "NVIDIA RTX 4090", 24.0, 23.1),), "cpu", 8, 64.0, 60.0, False, None)


def full(**hyperparams: Any) -> Any:
    return resolve({"hyperparams": {"method": "full", "max_length": 2048} | hyperparams})


def whole(on_gpu: bool = True, **hyperparams: Any) -> dict[str, float]:
    """GiB by part of a run on whole rows of the maximum length."""
    sizes, config = Sizes.of(QWEN3_06B), full(**hyperparams)
    assert sizes is not None
    h = config.hyperparams
    tokens = h.batch_size * h.max_length
    return forecast(config, sizes, Work(tokens, tokens, h.max_length, h.gradient_accumulation), on_gpu).parts


def test_full_training_with_fp32_masters_costs_what_adamw_needs() -> None:
    found = whole(on_gpu=False, fp_precision="fp32")
    gib = 596_049_920 / 2**30
    for part, bytes_each in (("weights", 4), ("gradients", 4), ("optimiser states", 8)):
        assert found[part] == pytest.approx(gib * bytes_each)


def test_less_work_at_a_time_never_needs_more_memory() -> None:
    total: Callable[..., float] = lambda **h: sum(whole(**h).values())  # noqa: E731
    assert total(batch_size=8) > total(batch_size=4) > total(batch_size=1)
    assert total(max_length=4096) > total(max_length=1024)
    kept, some, none = (
        total(batch_size=8),
        total(batch_size=8, use_gradient_checkpointing=True, gradient_checkpointing_policy="selective"),
        total(batch_size=8, use_gradient_checkpointing=True),
    )
    assert kept > some > none
    assert total(method="full") > total(method="lora") > total(method="qlora")
    assert total(optimizer="adamw_8bit") < total() and total(master_weights="none") < total()


def test_every_offer_would_fit_and_keeps_the_rows_of_a_step() -> None:
    config = full(batch_size=16, gradient_accumulation=2)
    fact = memory_fact(config, {"facts": QWEN3_06B}, None, CARD)
    assert fact is not None and fact.needs_gib > fact.free_gib and len(fact.offers) >= 2
    for offer in fact.offers:
        assert (fact.needs_gib - offer.saves_gib) * (1 + fact.spread) <= fact.free_gib
        if "hyperparams.batch_size" in offer.values:
            rows = int(offer.values["hyperparams.batch_size"]) * int(offer.values["hyperparams.gradient_accumulation"])
            assert rows == config.hyperparams.rows_per_step


def test_a_model_of_unknown_sizes_has_no_estimate() -> None:
    assert memory_fact(full(), {"facts": QWEN3_06B | {"layers": None}}, None, CARD) is None
    assert memory_fact(full(), None, None, CARD) is None


def test_the_weights_of_an_adapter_are_counted_as_peft_counts_them(tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    from trainer.models.inspect import inspect_model
    from trainer.models.lora import add_lora

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    made = add_lora(model, rank=8, alpha=16, dropout=0.0, targets=[], seed=1)
    counted = sum(p.numel() for p in made.parameters() if p.requires_grad)
    sizes = Sizes.of(inspect_model(tiny_model)["facts"])
    assert sizes is not None and adapter_weights(sizes, 8) == counted


def test_plain_text_asks_for_no_profile_and_then_counts_its_pieces(
    site: Site, tiny_model: Path, tmp_path: Path
) -> None:
    book = tmp_path / "book.txt"
    book.write_text("A signal box stands by the line.\n" * 200)
    chosen(site, tiny_model, book)
    write(site, **{"hyperparams.max_length": "64"})
    (stop,) = blocking(settled(site)[1])
    assert "the profile plain is made for conversations" in stop.text
    assert stop.actions[0].values == {"profile.name": ""} and "profile.name" in stop.fields
    write(site, **stop.actions[0].values)
    facts, lines = settled(site)
    assert blocking(lines) == [] and facts.data is not None
    assert (facts.data.rows, facts.data.usable, facts.data.too_long) == (1, 1, 0)
    assert facts.data.trained_rows and facts.data.trained_rows > 20 and facts.steps and facts.steps > 1
    seen = row_of(site, OWNER, {"n": "1"})
    assert seen["after"][0]["role"] == "text" and seen["tokens"][0][1] == "context" and seen["tokens"][1][1] == "label"
