"""The deep check of weights: NaN, infinity and lost data are named, on every float dtype as torch sees them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.damage import EMBED, UP, change_tensors, codes, put_number
from trainer.models.deep import check_numbers
from trainer.models.findings import Findings
from trainer.models.headers import read_header
from trainer.models.inspect import inspect_model
from trainer.models.weights import Weights

pytest_plugins = ("tests.model_fixtures",)


@pytest.mark.parametrize(
    ("name", "value", "code"),
    [
        (UP, float("nan"), "not_finite"),
        (UP, float("inf"), "not_finite"),
        (EMBED, float("-inf"), "not_finite"),
        ("model.norm.weight", float("nan"), "not_finite"),
    ],
)
def test_the_deep_check_names_tensors_that_are_not_finite(
    name: str, value: float, code: str, copy_of_model: Callable[[str], Path]
) -> None:
    path = copy_of_model("single")
    put_number(name, value)(path)
    assert inspect_model(path)["valid"]
    report = inspect_model(path, deep=True)
    assert codes(report) == [code] and name in report["problems"][0]["message"]
    assert report["problems"][0]["file"] == "model.safetensors"


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16", "float8_e5m2", "float8_e4m3fn"])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "finite"])
def test_the_deep_check_agrees_with_torch_on_every_dtype(dtype: str, value: str, tmp_path: Path) -> None:
    kind = getattr(torch, dtype)
    numbers = torch.linspace(-400, 400, 4097)
    numbers[4000] = 3.0 if value == "finite" else float(value)
    tensor = numbers.to(kind)
    tensor[0], tensor[1] = torch.finfo(kind).max, torch.finfo(kind).min
    save_file({"a": tensor}, tmp_path / "a.safetensors")
    header = read_header(tmp_path / "a.safetensors")
    findings = Findings()
    check_numbers(tmp_path, Weights("safetensors", ("a.safetensors",), 0, {"a.safetensors": header}), findings)
    assert bool(findings.problems) == (not bool(tensor.double().isfinite().all()))


def test_the_deep_check_tells_lost_data_from_an_added_block(copy_of_model: Callable[[str], Path]) -> None:
    path = copy_of_model("single")
    added = [f"model.layers.2.{name}.weight" for name in ("self_attn.o_proj", "mlp.down_proj")]
    change_tensors(lambda tensors: [tensors[name].fill(0) for name in added] and None)(path)
    report = inspect_model(path, deep=True)
    assert codes(report) == [] and [item["code"] for item in report["warnings"]] == ["zero_weights"]
    raw = bytearray((path / "model.safetensors").read_bytes())
    raw[len(raw) // 2 :] = bytes(len(raw) - len(raw) // 2)  # what a broken download often leaves
    (path / "model.safetensors").write_bytes(raw)
    assert codes(inspect_model(path, deep=True)) == ["zero_weights"]
    assert inspect_model(path)["valid"], "only the deep check reads the numbers"
