"""The training benchmark as it is run: rehearsed on the smallest sizes, every arm in a process of its own."""

from __future__ import annotations

import importlib.util
import json
import shutil
from dataclasses import replace
from typing import Any

import pytest

from benchmarks.train import Bench
from benchmarks.training.figures import Timed, model_flops, peak_tflops, ratios
from benchmarks.training.suites import HF, MIXED, OURS, OURS_PACKED, SHAPES, TRL, Suite, suite
from benchmarks.training.table import text

# TRL comes with the extra [bench]; transformers is measured against in any case
HAS_TRL = importlib.util.find_spec("trl") is not None


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Mixed rows in fp32, full training, uncompiled, once; every arm a process of its own."""
    case = next(case for case in suite("rehearsal").cases if case.group == MIXED)
    small = Suite("cpu", (replace(case, precision="fp32"),), rounds=1, minutes=5)
    folder = tmp_path_factory.mktemp("bench")
    peers = ("hf", "trl", "liger") if HAS_TRL else ("hf", "liger")
    return Bench(small, peers, folder, folder / "out.json", "cpu", threads=1)


@pytest.fixture(scope="module")
def measured(rehearsed: Bench) -> dict[str, Any]:
    """Ours beside transformers and TRL, Liger asked for where it cannot run."""
    result = rehearsed.run()
    assert json.loads(rehearsed.output.read_text()) == json.loads(json.dumps(result))
    return result


def of(result: dict[str, Any], arm: str) -> dict[str, Any]:
    (found,) = (each for each in result["results"] if each["arm"] == arm)
    assert found["status"] == "measured", found
    return found


def test_the_same_rows_give_the_same_losses_as_transformers_step_by_step(measured):
    line = next(each for each in measured["ratios"] if (each["ours"], each["peer"]) == (OURS.name, HF.name))
    assert line["same_steps"] and line["first_loss_difference"] < 1e-4 and line["largest_loss_difference"] < 1e-3
    assert of(measured, OURS.name)["tokens"] == of(measured, HF.name)["tokens"]
    assert of(measured, OURS.name)["losses"][0] != of(measured, OURS.name)["losses"][1]


@pytest.mark.skipif(not HAS_TRL, reason="trl is not installed")
def test_the_same_packs_give_the_same_losses_as_trl_step_by_step(measured):
    line = next(each for each in measured["ratios"] if (each["ours"], each["peer"]) == (OURS_PACKED.name, TRL.name))
    assert line["same_steps"] and line["first_loss_difference"] < 1e-4 and line["largest_loss_difference"] < 1e-3


def test_what_was_measured_says_on_what_with_which_versions_and_under_which_conditions(measured):
    assert measured["device"]["kind"] == "cpu" and measured["device"]["name"] and measured["device"]["cores"] >= 1
    assert measured["versions"]["torch"] and measured["versions"]["transformers"] and "trl" in measured["versions"]
    conditions = measured["conditions"]
    assert conditions["threads"] == 1 and conditions["load_average_before"] >= 0 and conditions["alike"]
    rows = next(iter(conditions["rows"].values()))
    assert 0.3 < rows["labels"] / rows["tokens"] < 0.5 and rows["real_of_padded"] < 1 and rows["packs_full"] > 0.9
    ours = of(measured, OURS.name)
    assert len(ours["step_s"]) == 2 and ours["peak_gib"] > 0 and len(ours["losses"]) == 3
    printed = text(measured)
    assert "not known" in printed and "real tokens/s" in printed


def test_a_peer_that_cannot_run_here_is_named_and_not_left_out(measured):
    assert "Liger | not possible on a CPU" in text(measured)


@pytest.mark.slow
def test_a_broken_case_is_reported_and_the_rest_goes_on(rehearsed, measured):
    (case,) = rehearsed.suite.cases
    lost = replace(case, name="lost", model="small")
    shutil.copytree(rehearsed.folder / "rows" / case.data, rehearsed.folder / "rows" / lost.data)
    second = replace(rehearsed, suite=replace(rehearsed.suite, cases=(lost, case)), results=[])
    second._one(OURS, case.group, 1, 0.0)
    assert [result["status"] for result in second.results] == ["broken", "measured"]
    assert "small" in second.results[0]["why"]
    assert second.results[1]["losses"] == of(measured, OURS.name)["losses"]
    assert "broken" in text(second._write())


def test_the_share_of_the_peak_is_known_for_known_devices_alone():
    assert peak_tflops("NVIDIA H100 80GB HBM3") == 989 and peak_tflops("NVIDIA H100 PCIe") == 756
    assert peak_tflops("NVIDIA L4") == 121 and peak_tflops("NVIDIA L40S") == 362
    assert peak_tflops("AMD EPYC") is None and peak_tflops("NVIDIA GeForce RTX 4090 D") is None


def test_the_operations_of_qwen3_are_those_counted_by_hand():
    shape = SHAPES["qwen3-0.6b"]
    assert shape.body == pytest.approx(440.4e6, rel=1e-3) and shape.head == pytest.approx(155.6e6, rel=1e-3)
    # a document of 2,048 tokens with all of them labels: 4.28 GFLOP a token
    whole = model_flops(shape, Timed(2048, 2048, 2048**2), frozen=False)
    assert whole / 2048 == pytest.approx(4.28e9, rel=2e-3)
    assert model_flops(shape, Timed(2048, 0, 0), frozen=True) == pytest.approx(4 * shape.body * 2048)


def test_ratios_compare_arms_of_one_round_and_skip_what_was_not_measured():
    def result(number: int, arm: str, seconds: float) -> dict[str, Any]:
        figures = {"total_s": seconds, "cpu_s": seconds, "tokens": 100, "labels": 40, "flops": 1.0, "peak_gib": 1.0}
        return {"case": "c", "arm": arm, "round": number, "status": "measured", "losses": [2.0, 1.0], **figures}

    results = [result(1, "a", 1), result(1, "b", 2), result(2, "a", 1), result(2, "b", 6), result(3, "a", 1)]
    results.append({"case": "c", "arm": "b", "round": 3, "status": "broken"})
    (line,) = ratios(results, "a", "b")
    assert (line["ratio"], line["least"], line["greatest"], line["rounds"]) == (4, 2, 6, 2)
