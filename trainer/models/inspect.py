"""The header verdict on a model folder: can it be trained, and if not, which file is the reason and what to do.

Reads headers and JSON only (`deep=True` reads the numbers too), imports no torch, changes nothing. Whether every tensor
of the architecture is there is the shape verdict's (`trainer.models.shapes`), which `trainer.models.full_report` asks
for after this one. Called in the worker, and by `trainer.models.is_valid_model_dir`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.models.adapter import CONFIG as ADAPTER_CONFIG
from trainer.models.adapter import check_adapter, check_base, check_fit
from trainer.models.architecture import check_config, check_tensors
from trainer.models.deep import check_numbers
from trainer.models.findings import Findings
from trainer.models.folder import ModelFolder
from trainer.models.layout import layout_key, matches, read_layout
from trainer.models.tokenizer_files import check_tokenizer
from trainer.models.weights import Weights, find_weights

_STEP_FOLDER = re.compile(r"(?:checkpoint-|step_|global_step)(\d+)")
_TRAINING_FILE = re.compile(r"(.+\.(distcp|pth|pt|ckpt)|zero_to_fp32\.py|trainer_state\.json|MANIFEST\.json)")
_WEIGHTS = re.compile(r"(model|pytorch_model).*\.(safetensors|bin)(\.index\.json)?")


def inspect_model(
    path: Path, *, deep: bool = False, model_roots: Sequence[Path] = (), layouts: Path | None = None
) -> dict[str, Any]:
    """Judge the folder `path`; `model_roots` is where links may lead and where an adapter's base is looked for.

    `layouts` is where layouts of architectures are kept: weights that are exactly one need no shape verdict. Returns
    {"valid", "kind", "problems": [{"code", "file", "message", "fix"}], "warnings": [the same], "facts"}; kind is
    one of full, lora, gguf, diffusers, checkpoint, lfs, nothing. Sizes are bytes. Never raises for what a folder holds.
    """
    findings = Findings()
    kind = _inspect(Path(path), deep, model_roots, layouts, findings)
    if any(problem["code"] == "lfs_pointer" for problem in findings.problems):
        kind = "lfs"
    return {
        "valid": not findings.problems,
        "kind": kind,
        "problems": findings.problems,
        "warnings": findings.warnings,
        "facts": findings.facts,
    }


def sentence(report: dict[str, Any]) -> str:
    """The report in words, for a person: the first problem, what to do, and that nothing was changed."""
    problems = report["problems"]
    if not problems:
        warnings = len(report["warnings"])
        return "This folder can be trained." + (f" {warnings} warning{'s' * (warnings > 1)}." if warnings else "")
    more = f" {len(problems) - 1} more problem{'s' * (len(problems) > 2)}." if len(problems) > 1 else ""
    first = problems[0]
    return f"Cannot train this folder: {first['message']}. {first['fix']}{more} Nothing was changed."


def _inspect(path: Path, deep: bool, roots: Sequence[Path], layouts: Path | None, findings: Findings) -> str:
    if not path.is_dir():
        return _not_a_folder(path, findings)
    try:
        folder = ModelFolder(path, roots, findings)
    except OSError as error:
        message = f"the folder cannot be read ({error.strerror})"
        findings.problem("unreadable", "", message, "Give this user the right to read it.")
        return "nothing"
    has_weights = bool(folder.matching(_WEIGHTS.fullmatch))
    if folder.has(ADAPTER_CONFIG) and not (has_weights and folder.has("config.json")):
        _inspect_adapter(folder, deep, roots, findings)
        return "lora"
    if folder.has("model_index.json"):
        message = "this is an image model (diffusers), not a language model"
        findings.problem("diffusers", "model_index.json", message, "Choose a text generation model.")
        return "diffusers"
    ggufs = folder.matching(lambda name: name.lower().endswith(".gguf"))
    if ggufs and not has_weights:
        _gguf(ggufs[0], findings)
        return "gguf"
    if has_weights or folder.has("config.json"):
        if folder.has(ADAPTER_CONFIG):
            message = "a LoRA adapter lies in the folder of a whole model and would change what is loaded"
            findings.problem(
                "adapter_beside_model", ADAPTER_CONFIG, message, "Move the adapter to a folder of its own."
            )
        inspect_full(folder, deep, findings, layouts)
        return "full"
    return _not_a_model(folder, findings)


def inspect_full(folder: ModelFolder, deep: bool, findings: Findings, layouts: Path | None = None) -> Weights | None:
    """Judge a whole model: config, weights, tokenizer, and how they fit together."""
    config = check_config(folder, findings)
    weights = find_weights(folder, findings)
    facts = findings.facts
    _note_files(facts, weights)
    if weights is not None and weights.headers:
        check_tensors(config or {}, weights, findings)
    facts["shapes"] = _shapes(config, weights, findings, layouts)
    rows = facts.get("embedding_rows") or facts.get("vocab_size")
    check_tokenizer(folder, findings, rows)
    if deep and weights is not None:
        check_numbers(folder.path, weights, findings)
    return weights


def _shapes(config: dict[str, Any] | None, weights: Weights | None, findings: Findings, layouts: Path | None) -> str:
    """Whether a shape verdict is due: not for what is damaged, pickled, or known to be as expected."""
    if config is None or weights is None or not weights.headers or findings.problems:
        return "unknown"
    layout = read_layout(layouts, layout_key(config)) if layouts is not None else None
    return "as expected" if layout is not None and matches(layout, weights.tensors) else "due"


def _note_files(facts: dict[str, Any], weights: Weights | None) -> None:
    facts["size_bytes"] = weights.size_bytes if weights else 0
    facts["shards"] = len(weights.files) if weights else 0


def _inspect_adapter(folder: ModelFolder, deep: bool, roots: Sequence[Path], findings: Findings) -> None:
    config, weights = check_adapter(folder, findings)
    _note_files(findings.facts, weights)
    if deep and weights is not None:
        check_numbers(folder.path, weights, findings)
    if config is None:
        return
    base = check_base(config.get("base_model_name_or_path"), folder.path, roots, findings)
    findings.facts["base_path"] = str(base) if base else None
    if base is None:
        return
    below = Findings()
    base_weights = inspect_full(ModelFolder(base, roots, below), deep, below)
    for fact in (
        "architectures",
        "model_type",
        "vocab_size",
        "max_positions",
        "tied",
        "has_chat_template",
        "quantised",
    ):
        findings.facts[fact] = below.facts.get(fact)
    findings.facts["tokenizer_files"] = below.facts.get("tokenizer_files", [])
    findings.facts["base_facts"] = below.facts
    for found, note in ((below.problems, findings.problem), (below.warnings, findings.warn)):
        for item in found:
            note(item["code"], item["file"], f"in the base model: {item['message']}", item["fix"])
    if weights is not None and base_weights is not None:
        check_fit(weights.tensors, base_weights.tensors, findings)
    known = not findings.problems and weights is not None and weights.headers and below.facts["shapes"] != "unknown"
    findings.facts["shapes"] = "due" if known else "unknown"


def _not_a_folder(path: Path, findings: Findings) -> str:
    if not path.exists():
        findings.problem(
            "missing_folder", "", f"there is no folder {path.name}", "Check the name, or download the model."
        )
        return "nothing"
    if path.suffix.lower() == ".gguf":
        _gguf(path.name, findings)
        return "gguf"
    message = f"{path.name} is a file, not a folder"
    findings.problem("not_a_folder", path.name, message, "Choose the folder it lies in.")
    return "nothing"


def _gguf(name: str, findings: Findings) -> None:
    message = f"{name} is a GGUF file, made for running and not for training"
    findings.problem("gguf", name, message, "Download the original safetensors model.")


def _not_a_model(folder: ModelFolder, findings: Findings) -> str:
    inner = [name for name in folder.names if (folder.path / name / "config.json").is_file()]
    steps = sorted((int(match[1]), name) for name in folder.names if (match := _STEP_FOLDER.fullmatch(name)))
    training = folder.matching(_TRAINING_FILE.fullmatch)
    if "model" in inner and training:
        message = "this is a checkpoint of a run; its model lies in the folder model"
        findings.problem("checkpoint", "model", message, "Choose the folder model inside it.")
        return "checkpoint"
    if steps:
        message = f"this folder holds checkpoints of a training, the newest is {steps[-1][1]}"
        findings.problem("checkpoint", steps[-1][1], message, f"Choose {steps[-1][1]} inside it.")
        return "checkpoint"
    if training:
        message = f"this is the state of another training program ({training[0]}), not a model folder"
        findings.problem("checkpoint", training[0], message, "Export it there as a transformers model.")
        return "checkpoint"
    if inner:
        message = f"the model lies one folder deeper, in {inner[0]}"
        findings.problem("one_deeper", inner[0], message, f"Choose {inner[0]} inside it.")
    elif folder.names:
        findings.problem(
            "no_model", "", "no model is in it (no config.json, no weights)", "Choose the folder of a model."
        )
    else:
        findings.problem("empty_folder", "", "the folder is empty", "Download the model into it.")
    return "nothing"
