"""Good model folders and copies of them: a pytest plugin for the modules that name it in `pytest_plugins`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.damage import SHARDS
from tests.tiny import tiny_adapter_dir, tiny_model_dir


@pytest.fixture(scope="session")
def good_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Good folders that tests copy: one file, three shards, and a LoRA adapter of the first."""
    root = tmp_path_factory.mktemp("models")
    single = tiny_model_dir(root / "single", "llama", layers=3)
    sharded = tiny_model_dir(root / "sharded", "llama", dtype="bfloat16", max_shard_size="100KB")
    assert [(sharded / name).exists() for name in SHARDS] == [True] * 3
    return {"single": single, "sharded": sharded, "lora": tiny_adapter_dir(root / "lora", single)}


@pytest.fixture
def copy_of_model(good_models: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """Makes a copy of an original that a test may damage."""

    def make(name: str) -> Path:
        return Path(shutil.copytree(good_models[name], tmp_path / "models" / name))

    return make
