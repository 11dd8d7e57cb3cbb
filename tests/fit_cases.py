"""Runs whose memory is forecast and then measured: models, rows and settings that differ in all that the forecast goes by."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.conftest import ROOT
from tests.tiny import tiny_model_dir

MODELS: dict[str, dict[str, Any]] = {
    "qwen3 37 M": {"architecture": "qwen3", "hidden": 512, "layers": 12, "vocab": 16_000},
    "llama 79 M": {"architecture": "llama", "hidden": 768, "layers": 8, "vocab": 24_000, "tied": False},
    "gpt2 30 M": {"architecture": "gpt2", "hidden": 512, "layers": 8, "vocab": 8_000},
    "mistral 32 M": {"architecture": "mistral", "hidden": 640, "layers": 8, "vocab": 4_000},
}
"""113 to 303 MiB of fp32 weights each."""
RECOMPUTED = {"use_gradient_checkpointing": True}
SELECTIVE = RECOMPUTED | {"gradient_checkpointing_policy": "selective"}
LORA = {"method": "lora"}
BF16 = {"fp_precision": "bf16"}


@dataclass(frozen=True)
class Case:
    """One run: its model, what is set, and which rows it trains."""

    name: str
    model: str
    settings: dict[str, Any]
    rows: str = "long"
    more: dict[str, Any] = field(default_factory=dict)


def _of(size: int, length: int, accumulation: int = 1, **rest: Any) -> dict[str, Any]:
    return {"batch_size": size, "max_length": length, "gradient_accumulation": accumulation, **rest}


CASES = (
    Case("full, fp32, 2 x 128", "qwen3 37 M", _of(2, 128)),
    Case("full, fp32, 8 x 128", "qwen3 37 M", _of(8, 128)),
    Case("full, fp32, 4 x 128, accumulated twice, checkpointing", "qwen3 37 M", _of(4, 128, 2, **RECOMPUTED)),
    Case("full, fp32, 8 x 128, selective checkpointing", "qwen3 37 M", _of(8, 128, **SELECTIVE)),
    Case("full, bf16, 4 x 128", "qwen3 37 M", _of(4, 128, **BF16)),
    Case("LoRA, fp32, 8 x 128", "qwen3 37 M", _of(8, 128, **LORA)),
    Case("LoRA with dropout, fp32, 4 x 128", "qwen3 37 M", _of(4, 128, **LORA), more={"lora": {"dropout": 0.1}}),
    Case("LoRA, fp32, 2 x 512, checkpointing", "qwen3 37 M", _of(2, 512, **LORA, **RECOMPUTED)),
    Case("full, fp32, 2 x 64", "llama 79 M", _of(2, 64)),
    Case("LoRA, bf16, 8 x 128", "llama 79 M", _of(8, 128, **LORA, **BF16)),
    Case("LoRA, bf16, 8 x 128, selective checkpointing", "llama 79 M", _of(8, 128, **LORA, **BF16, **SELECTIVE)),
    Case("full, fp32, 4 x 128", "gpt2 30 M", _of(4, 128)),
    Case("LoRA, fp32, 2 x 512", "gpt2 30 M", _of(2, 512, **LORA)),
    Case("full, fp32, packed, 3 x 256", "mistral 32 M", _of(3, 256, packing=True), rows="short"),
    Case("full, pure bf16, 4 x 128", "mistral 32 M", _of(4, 128, **BF16, master_weights="none")),
    Case("full, fp32, 4 x 128, saved beside the training", "mistral 32 M", _of(4, 128), more={"output": {"save_steps": 2}}),
)  # fmt: skip


def model_of(root: Path, name: str) -> Path:
    """The folder of one of MODELS, made once."""
    path = root / name.replace(" ", "-")
    return path if path.exists() else tiny_model_dir(path, **MODELS[name])


def rows_of(root: Path, kind: str) -> Path:
    """Rows that are cut to any maximum length ("long"), or of very different lengths ("short")."""
    path = root / f"{kind}.jsonl"
    if path.exists():
        return path
    draw = random.Random(0)

    def words(count: int) -> str:
        return " ".join("".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=6)) for _ in range(count))

    with open(path, "w", encoding="utf-8") as file:
        for _ in range(80):
            length = 400 if kind == "long" else draw.randint(3, 20)
            turns = [{"role": "user", "content": words(3)}, {"role": "assistant", "content": words(length)}]
            file.write(json.dumps({"messages": turns}) + "\n")
    return path


def measured(root: Path, case: Case, steps: int = 2, workspace: Path | None = None) -> dict[str, Any]:
    """What the run says of its memory: forecast, measured peak of its own process, and when it was reached.

    A `workspace` that is given remembers the runs before.
    """
    given = dict(case.settings)
    config = {
        "model_path": str(model_of(root, case.model)),
        "data": {"dataset_path": str(rows_of(root, case.rows)), "validation_split": 0},
        "hyperparams": {"method": "full", "learning_rate": 1e-4, "warmup_steps": 0, "max_steps": steps} | given,
        "eval": {"eval_strategy": "no"},
        "output": {"save_steps": 0},
        **case.more,
    }
    if config["output"]["save_steps"]:
        config["hyperparams"]["max_steps"] = 4
    folder = root / "ws" / str(abs(hash(case.name)))
    folder.mkdir(parents=True)
    settings = folder / "settings.json"
    settings.write_text(json.dumps(config))
    (folder / "lock").mkdir()
    environment = os.environ | {"XDG_RUNTIME_DIR": str(folder / "lock"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "tests.peak_of_run", str(settings), str(workspace or folder)]
    said = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert said.returncode == 0, said.stderr[-2000:]
    found = json.loads(said.stdout.splitlines()[-1])
    assert found["state"] == "finished", found
    return found


def main() -> None:
    """Print the table of docs/fit.md: `python -m tests.fit_cases FOLDER`."""
    root = Path(sys.argv[1])
    root.mkdir(parents=True, exist_ok=True)
    print("| model | run | forecast GiB | measured GiB | off | reached in |\n| --- | --- | --- | --- | --- | --- |")
    for case in CASES:
        found = measured(root, case)
        memory, peak = found["memory"], found["peak_gib"]
        off = memory["forecast_gib"] / peak - 1
        row = (case.model, case.name, f"{memory['forecast_gib']:.2f}", f"{peak:.2f}", f"{off:+.1%}", memory["moment"])
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
