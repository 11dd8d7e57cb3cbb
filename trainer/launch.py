"""From settings to a run directory: what is refused before anything is written, and the snapshot that fixes the rest.

Torch-free; called by the page's engine and by the command line alike.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import profiles
from trainer import disk_need
from trainer.data.mapping import Mapping, mapping_of
from trainer.fields import without_secrets
from trainer.files import read_json
from trainer.machine import Machine
from trainer.models.adapter import base_path
from trainer.notify import keep_webhook
from trainer.packages import check_packages, needs_bitsandbytes
from trainer.refusal import Refusal
from trainer.run import RunDir, create_run
from trainer.schema import Config, WeightedFile
from trainer.values import figure_text
from trainer.workspace import Workspace

VERSIONED = ("torch", "transformers", "peft", "safetensors", "tokenizers", "numpy")
WEIGHTS = {".safetensors", ".bin"}


@dataclass(frozen=True)
class Prompt:
    """The system prompt of a run, its date filled in, and where it came from."""

    profile: str | None
    text: str
    date: str

    @property
    def line(self) -> str:
        """The log line; scripts look for its first words."""
        if self.profile is not None and self.text:
            return f"Using profile system prompt: {self.text}"
        return (
            f"Using config system prompt: {self.text}"
            if self.text
            else "No system prompt: no profile and none in the config."
        )


def prompt_of(config: Config, user_profiles: Path, date: str | None = None) -> Prompt:
    """The prompt that the run's rows get; `date` (YYYY-MM-DD) defaults to today and is then fixed for the run's life."""
    date = date or datetime.date.today().isoformat()
    name = config.profile.name
    try:
        own = profiles.load(name, user_profiles).system_prompt(date) if name is not None else ""
    except ValueError as error:
        raise Refusal(str(error), "profile.name") from None
    try:
        return Prompt(name, own or profiles.fill_date(config.profile.system_prompt, date), date)
    except ValueError as error:
        raise Refusal(str(error), "profile.system_prompt") from None


def fingerprint(path: Path) -> str:
    """A hash that changes when the model does: names and sizes of its files, and the first MiB of each."""
    digest = hashlib.sha256()
    base = [base_of(path)] if (path / "adapter_config.json").exists() else []
    for file in sorted(file for folder in [path, *base] for file in folder.iterdir()):
        if file.suffix in {".json", ".safetensors", ".bin", ".model", ".jinja", ".txt"} and file.is_file():
            digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
            with open(file, "rb") as handle:
                digest.update(handle.read(1 << 20))
    return digest.hexdigest()[:16]


def base_of(adapter: Path) -> Path:
    """The base model's directory that an adapter names, beside it if need be; Refusal when it is not on this machine."""
    named = read_json(adapter / "adapter_config.json").get("base_model_name_or_path") or ""
    base = base_path(named, adapter, [adapter.parent]) if named else None
    if base is None:
        raise Refusal(
            f"The adapter {adapter.name} belongs to the base model '{_folder_name(named)}', which is not a folder here. "
            "Put it beside it.",
            "model_path",
        )
    return base


def _folder_name(named: str) -> str:
    """What to call a base model: the last folder of a path, whose rest is this machine's own; a name of a hub as it is."""
    return re.split(r"[/\\]", named.rstrip("/\\"))[-1] if re.match(r"[/~.\\]|[A-Za-z]:", named) else named


def check_paths(config: Config) -> None:
    """Refuse what can be seen at once: no model, no data, a folder that is no model, an unreadable file, a missing package."""
    if not config.model_path:
        raise Refusal("No model is chosen. Set model_path, or use --model.", "model_path")
    model = Path(config.model_path)
    if not model.is_dir():
        raise Refusal(f"The model folder {model} does not exist. Check model_path.", "model_path")
    if not any(file.suffix in WEIGHTS for file in model.iterdir()):
        raise Refusal(f"{model} holds no model weights. `python -m trainer check-model` says what it is.", "model_path")
    if not config.data.files:
        raise Refusal("No data is chosen. Set data.dataset_path, or use --dataset.", "data.dataset_path")
    named = [("data.dataset_path", file.path) for file in config.data.files]
    if config.data.validation_dataset_path:
        named.append(("data.validation_dataset_path", config.data.validation_dataset_path))
    for field, path in named:
        if not Path(path).is_file():
            raise Refusal(f"The dataset {path} does not exist or is no file. Check {field}.", field)
        if not os.access(path, os.R_OK):
            raise Refusal(f"The dataset {path} cannot be read (no permission). Check the file's rights.", field)
    Mapping.parse(config.data.columns)  # refuses what is no mapping
    if config.hyperparams.method == "full" and (model / "adapter_config.json").exists():
        raise Refusal(
            f"{model.name} is a LoRA adapter: it can be trained on with method lora, not full.",
            "hyperparams.method",
        )
    check_packages(config)


def snapshot(config: Config, prompt: Prompt, machine: Machine, owner: str, threads: int) -> dict[str, Any]:
    """What the run is made of, written once into its config.json."""
    model = Path(config.model_path)
    return {
        "config": without_secrets(config.model_dump(mode="json")),
        "profile": {"name": prompt.profile, "system_prompt": prompt.text, "date": prompt.date},
        "model": {"display_name": config.display_name, "path": str(model), "fingerprint": fingerprint(model)},
        "data": {"files": [_file_facts(config, file) for file in config.data.files]},
        "device": {"name": machine.device, "summary": machine.summary},
        "versions": versions(config),
        "threads": threads,
        "seed": config.data.seed,
        "owner": owner,
    }


def _file_facts(config: Config, file: WeightedFile) -> dict[str, Any]:
    mapping = mapping_of(Path(file.path), config.data.columns)
    return {"name": Path(file.path).name, "weight": file.weight, "columns": mapping.texts() if mapping else []}


def versions(config: Config) -> dict[str, str]:
    """The libraries that the curve of a run with these settings depends on, as they are installed here."""
    packages = ("bitsandbytes",) if needs_bitsandbytes(config) else ()
    return {name: importlib.metadata.version(name) for name in (*VERSIONED, *packages)}


def approximations(config: dict[str, Any], on_gpu: bool) -> list[str]:
    """What in a run's settings (a snapshot's `config`) is not exact, in words for log and page; empty for most runs."""
    h = config.get("hyperparams", {})
    found = []
    bf16 = h.get("fp_precision") == "bf16" or (h.get("fp_precision") == "auto" and on_gpu)
    if bf16 and h.get("master_weights") == "none" and h.get("method") == "full":
        found.append("pure bf16 weights and optimizer states")
    if h.get("optimizer") == "adamw_8bit":
        found.append("8-bit optimizer states")
    return found


def auto_name(config: Config) -> str:
    """What tells this run from others: data, method, rate."""
    data = Path(config.data.files[0].path).stem if config.data.files else "run"
    h = config.hyperparams
    method = {"full": "full", "lora": f"LoRA r{config.lora.r}", "qlora": f"QLoRA r{config.lora.r}"}[h.method]
    return f"{data} · {method} · lr {figure_text(h.learning_rate)}"


def new_run(
    workspace: Workspace,
    config: Config,
    machine: Machine,
    *,
    owner: str,
    threads: int,
    output: Path | None = None,
    name: str = "",
    why: str = "",
) -> tuple[RunDir, Prompt]:
    """Check, then make the run's directory. Raises Refusal; then no run was made."""
    check_paths(config)
    prompt = prompt_of(config, workspace.profiles)
    disk_need.refuse_a_full_disk(config, output or workspace.runs)
    made = {**snapshot(config, prompt, machine, owner, threads), "workspace": str(workspace.root)}
    notes = {"name": name.strip() or auto_name(config), "why": why.strip()}
    run = create_run(workspace.runs, made, output, notes)
    try:
        keep_webhook(workspace.root, run.run_id, config.notify.webhook_url)
    except Refusal:  # a run that is there would wait to be started, and its end be told to nobody
        shutil.rmtree(run.path, ignore_errors=True)
        raise
    return run, prompt
