"""LoRA folders: adapter_config.json, its matrices, and the base model they belong to.

A base that is named but not there is a problem when it is a path, and a warning when it is a hub name: it may be
downloaded. Called by `trainer.models.inspect`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.models.findings import Findings
from trainer.models.folder import ModelFolder
from trainer.models.headers import TensorInfo
from trainer.models.weights import Weights, read_pickles, read_safetensors

CONFIG = "adapter_config.json"
_HUB_NAME = re.compile(r"(?:[\w.-]+/)?[\w.-]+")
_MATRIX = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_(A|B)(?:\.default)?\.weight")
_FLOATS = ("F64", "F32", "F16", "BF16")


def check_adapter(folder: ModelFolder, findings: Findings) -> tuple[dict[str, Any] | None, Weights | None]:
    """Judge adapter_config.json and the matrices; returns both as far as they could be read."""
    config = folder.json(CONFIG)
    weights = _find(folder, findings)
    if config is None:
        return None, weights
    kind = config.get("peft_type")
    if kind != "LORA":
        message = f"the adapter is of the kind {str(kind)[:40]}; only LoRA can be trained on"
        findings.problem("adapter_kind", CONFIG, message, "Choose a LoRA adapter or a whole model.")
    rank = config.get("r")
    if type(rank) is not int or not 0 < rank <= 2**16:
        message = f"{CONFIG} gives r the value {str(rank)[:40]}; a whole number from 1 is needed"
        findings.problem("config_bad_value", CONFIG, message, f"Download {CONFIG} again.")
    mapping = config.get("auto_mapping")
    library = str(mapping.get("parent_library")) if isinstance(mapping, dict) else "transformers"
    if library.split(".")[0] != "transformers":
        message = f"{CONFIG} names code of its own (auto_mapping: {library[:80]})"
        findings.warn("auto_map", CONFIG, message, "That code is never run.")
    facts = findings.facts
    facts["lora_rank"], facts["base_model"] = rank, config.get("base_model_name_or_path")
    if weights is not None and weights.headers:
        tensors = weights.tensors
        facts["parameters"] = sum(info.elements for info in tensors.values())
        facts["dtypes"] = sorted({info.dtype for info in tensors.values()})
        if not any(_MATRIX.fullmatch(name) or "lora_" in name for name in tensors):
            message = f"{weights.files[0]} holds no LoRA matrices"
            findings.problem("no_tensors", weights.files[0], message, "Download the adapter again.")
    return config, weights


def _find(folder: ModelFolder, findings: Findings) -> Weights | None:
    if folder.has("adapter_model.safetensors"):
        return read_safetensors(folder, findings, ["adapter_model.safetensors"])
    if folder.has("adapter_model.bin"):
        return read_pickles(folder, findings, ["adapter_model.bin"])
    message = "the adapter's matrices are missing (no adapter_model.safetensors or adapter_model.bin)"
    findings.problem("no_weights", "adapter_model.safetensors", message, "Download the adapter's weights too.")
    return None


def base_path(name: str, folder: Path, model_roots: Sequence[Path]) -> Path | None:
    """Where the base that the adapter in `folder` names lies: as a path, beside the adapter, or in a model root."""
    last = name.rstrip("/\\").replace("\\", "/").rsplit("/", 1)[-1]
    places = [Path(name) if Path(name).is_absolute() else folder.parent / name]
    names = [part for part in (name, last, name.replace("/", "--"), name.replace("/", "_")) if not _leaves(part)]
    places += [root / part for root in model_roots for part in names]
    return next((place.resolve() for place in places if _holds_config(place)), None)


def _holds_config(place: Path) -> bool:
    try:
        return (place / "config.json").is_file()
    except (OSError, ValueError):  # a name that no file system takes
        return False


def check_base(name: Any, folder: Path, model_roots: Sequence[Path], findings: Findings) -> Path | None:
    """The folder of the base model, or None with what is wrong noted."""
    if not isinstance(name, str) or not name or "\0" in name:
        message = f"{CONFIG} does not name the base model"
        findings.problem("base_not_found", CONFIG, message, "Set base_model_name_or_path to the base model's folder.")
        return None
    found = base_path(name, folder, model_roots)
    if found is not None:
        if model_roots and not any(found.is_relative_to(root.resolve()) for root in model_roots):
            message = f"the base model lies outside the model folders ({name[:160]})"
            findings.warn("base_outside_roots", CONFIG, message, "Check that it is the base you mean.")
        return found
    message = f"the base model {name[:160]} is not here"
    if _HUB_NAME.fullmatch(name) and name not in (".", ".."):
        findings.warn("base_not_found", CONFIG, message, "Download it into a model folder under that name.")
    else:
        findings.problem(
            "base_not_found", CONFIG, message, f"Put it there, or change base_model_name_or_path in {CONFIG}."
        )
    return None


def _leaves(name: str) -> bool:
    return name.startswith(("/", "\\", "~")) or ".." in name.replace("\\", "/").split("/") or ":" in name


def check_fit(adapter: dict[str, TensorInfo], base: dict[str, TensorInfo], findings: Findings) -> None:
    """Hold the shapes of the LoRA matrices against the base weights of the same name."""
    for name, info in adapter.items():
        match = _MATRIX.fullmatch(name)
        weight = base.get(f"{match[1]}.weight") if match else None
        if (
            match is None
            or weight is None
            or weight.dtype not in _FLOATS
            or len(weight.shape) != 2
            or len(info.shape) != 2
        ):
            continue
        side = info.shape[1] if match[2] == "A" else info.shape[0]
        if side not in weight.shape:
            message = f"{name[:120]} has the shape {list(info.shape)}, its base weight {list(weight.shape)}"
            findings.problem(
                "adapter_does_not_fit", "adapter_model.safetensors", message, "Choose the base it was made for."
            )
            return
