"""The bytes of a checkpoint, forecast from headers and settings, beside those of one that a run really wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests import runs
from tests.kill_loop import WorkerHere
from tests.tiny import tiny_model_dir
from trainer import checkpoint
from trainer.disk_forecast import ROUNDING_BYTES, one_checkpoint
from trainer.models.headers import read_header
from trainer.schema import Config
from trainer.workspace import Workspace

KINDS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "pure bf16": {"method": "full", "fp_precision": "bf16", "master_weights": "none"},
    "LoRA": {"method": "lora", "lora": {"r": 6}},
    "LoRA on two layers": {"method": "lora", "lora": {"r": 4, "target_modules": ["q_proj", "down_proj"]}},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ["qwen3", "gpt2"])
def test_tensors_are_forecast_to_the_byte_and_all_files_to_the_rounding(
    tmp_path: Path, kind: str, architecture: str
) -> None:
    if architecture == "gpt2" and "two" in kind:
        pytest.skip("GPT-2 has no layers of these names")
    model = tiny_model_dir(tmp_path / "model", architecture, tied=architecture == "gpt2")
    workspace = Workspace(tmp_path / "ws").create()
    rows = runs.write_rows(tmp_path / "rows.jsonl", 8)
    config: Config = runs.settings(model, rows, max_steps=1, eval={"eval_strategy": "no"}, **KINDS[kind])
    run = runs.new(workspace, config)
    assert runs.train(run, workspace, WorkerHere()) == "finished"  # type: ignore[arg-type]
    written = checkpoint.newest_verified(run.checkpoints).path
    found = one_checkpoint(config, "")
    assert found is not None
    assert found[0] == sum(_tensor_bytes(path) for path in written.rglob("*.safetensors"))
    whole = sum(path.stat().st_size for path in written.rglob("*") if path.is_file())
    assert abs(found[1] - whole) < ROUNDING_BYTES, (found, whole)


def _tensor_bytes(path: Path) -> int:
    """Bytes of a file's tensors, but for the optimizer's step numbers, one for each."""
    sizes = {"F32": 4, "BF16": 2}
    tensors = read_header(path).tensors
    return sum(t.elements * sizes[t.dtype] for name, t in tensors.items() if not name.startswith("step/"))


def test_the_headers_are_read_again_only_when_a_file_or_a_setting_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer import disk_forecast

    asked: list[str] = []
    monkeypatch.setattr(disk_forecast, "checkpoint_bytes", lambda config: asked.append(config.model_path) or 5)
    (tmp_path / "config.json").write_text("{}")
    for rank, files in ((8, "a"), (8, "a"), (16, "a"), (8, "b")):
        config = runs.settings(tmp_path, tmp_path / "x", lora={"r": rank})
        assert one_checkpoint(config, files) == (5, 7)
    assert len(asked) == 3
