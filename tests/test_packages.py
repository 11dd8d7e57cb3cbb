"""Settings that need an optional package: hidden in the form and refused in words where it is absent."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests import runs
from trainer import launch
from trainer.config import fields
from trainer.packages import NEEDS_BITSANDBYTES
from trainer.refusal import Refusal
from ui.form import choice_labels, to_component

FIELDS = {info.key: info for info in fields()}


def pretend(monkeypatch: pytest.MonkeyPatch, here: bool) -> None:
    real = importlib.util.find_spec

    def find(name: str, package: str | None = None):
        return (object() if here else None) if name == "bitsandbytes" else real(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find)


@pytest.mark.parametrize("setting", NEEDS_BITSANDBYTES)
@pytest.mark.parametrize("here", [True, False], ids=["installed", "absent"])
def test_a_choice_is_offered_and_accepted_where_its_package_is_and_nowhere_else(
    setting: str, here: bool, tiny_model: Path, tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, here)
    value = NEEDS_BITSANDBYTES[setting]
    offered = [choice for _, choice in choice_labels(FIELDS[setting])]
    assert (value in offered) == here and set(offered) | {value} == set(FIELDS[setting].choices)
    assert to_component(FIELDS[setting], value) == (value if here else None)
    config = runs.settings(tiny_model, tiny_dataset, **{setting.split(".")[1]: value})
    if here:
        launch.check_paths(config)
        return
    with pytest.raises(Refusal, match="pip install 'signalbox\\[qlora\\]'") as caught:
        launch.check_paths(config)
    assert caught.value.field == setting
