"""A button that says "fits" fits: the offered settings are really trained, and the process never holds more than was free."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from tests import fit_cases
from tests.conftest import ROOT
from trainer import process_peak
from trainer.config import Config, merged, resolve, unflatten
from trainer.machine import Machine
from trainer.models.inspect import inspect_model
from ui.fit import memory_fact, rows_over
from ui.gate_facts import DataFact, MemoryFact

SETTINGS = {"method": "full", "batch_size": 16, "gradient_accumulation": 1, "max_length": 128, "max_steps": 2}
DATA = DataFact(
    "ready", rows=80, usable=80, longest=900, label_share=0.97, lengths=((500.0, 600.0, 20.0), (800.0, 900.0, 60.0))
)


def config_of(model: Path, rows: Path, **more: Any) -> Config:
    return resolve(
        {
            "model_path": str(model),
            "data": {"dataset_path": str(rows), "validation_split": 0},
            "hyperparams": SETTINGS | more,
            "eval": {"eval_strategy": "no"},
            "output": {"save_steps": 0},
        }
    )


def fact_of(config: Config, report: dict[str, Any], free_gib: float) -> MemoryFact:
    here = Machine((), "cpu", 2, 64.0, free_gib, True, None)
    with patch.object(process_peak, "now_gib", lambda: 0.0):  # what this very process holds is not what is asked
        found = memory_fact(config, report, DATA, here)
    assert found is not None
    return found


def peak_of(folder: Path, config: Config) -> float:
    """The most memory that a process training these settings held, GiB."""
    (folder / "lock").mkdir(parents=True)
    (folder / "settings.json").write_text(config.model_dump_json())
    environment = os.environ | {"XDG_RUNTIME_DIR": str(folder / "lock"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "tests.peak_of_run", str(folder / "settings.json"), str(folder)]
    said = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    found = json.loads(said.stdout.splitlines()[-1])
    assert found["state"] == "finished", found
    return float(found["peak_gib"])


@pytest.mark.slow
@pytest.mark.parametrize(("free_gib", "pairs"), [(1.35, False), (0.85, True)])
def test_what_is_offered_as_fitting_fits(tmp_path: Path, free_gib: float, pairs: bool) -> None:
    model, rows = fit_cases.model_of(tmp_path, "mistral 32 M"), fit_cases.rows_of(tmp_path, "long")
    config, report = config_of(model, rows), inspect_model(model)
    fact = fact_of(config, report, free_gib)
    assert not fact.fits and fact.offers
    assert any(" + " in offer.text for offer in fact.offers) == pairs
    for number, offer in enumerate(fact.offers[:4]):
        changed = resolve(merged(config.model_dump(), unflatten(offer.values)))
        peak = peak_of(tmp_path / str(number), changed)
        print(f"{free_gib} GiB free, {offer.text}: {peak:.2f} GiB taken")
        assert peak <= fact.free_gib, offer


def test_offers_keep_rows_per_step_say_their_cost_and_come_singly_before_pairs(tmp_path: Path) -> None:
    facts = {
        "parameters": 7_000_000_000, "hidden_size": 4096, "layers": 32, "vocab_size": 32_000, "intermediate_size": 14_336,
        "heads": 32, "kv_heads": 8, "model_type": "mistral", "tied": False,
    }  # fmt: skip
    config = config_of(tmp_path, tmp_path, max_length=2048, batch_size=6, gradient_accumulation=4)
    for free, is_pair in ((150.0, False), (36.0, True)):
        fact = fact_of(config, {"facts": facts}, free)
        assert fact.offers and all((" + " in offer.text) == is_pair for offer in fact.offers)
        for offer in fact.offers:
            changed = resolve(merged(config.model_dump(), unflatten(offer.values)))
            assert changed.hyperparams.rows_per_step == 24
            assert fact_of(changed, {"facts": facts}, free).fits and offer.saves_gib > 0 and offer.cost
    assert fact_of(config, {"facts": facts}, 2.0).offers == ()


def test_a_shorter_length_says_how_many_rows_it_cuts() -> None:
    assert rows_over(DATA, 900) == 0 and rows_over(DATA, 850) == 30 and rows_over(DATA, 550) == 70
    assert rows_over(DATA, 8) == 80 and rows_over(DataFact("ready"), 8) is None
