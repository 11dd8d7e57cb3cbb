"""Pickle weights to safetensors, in a new folder. The only place of the project that unpickles, and it takes tensors
only.

Runs in the limited worker process. The source is never changed; the target appears whole or not at all.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import secrets
import shutil
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.files import fsync_dir
from trainer.models.adapter import CONFIG as ADAPTER_CONFIG
from trainer.models.architecture import OUTPUT_LAYERS
from trainer.models.findings import Findings
from trainer.models.folder import ModelFolder
from trainer.models.inspect import inspect_model, sentence
from trainer.models.weights import SAFETENSORS_INDEX, Weights, find_weights, read_pickles
from trainer.refusal import Refusal

if TYPE_CHECKING:
    import torch

    Tensors = dict[str, torch.Tensor]

# what a model folder needs beside its weights; code and other programs' states stay behind
_KEPT = re.compile(r".+\.(json|jinja|model|txt|md|tiktoken)|LICENSE.*|NOTICE.*", re.IGNORECASE)
_LEFT = re.compile(r".+\.bin\.index\.json|trainer_state\.json|model\.safetensors\.index\.json")


def convert_model(source: Path, target: Path) -> dict[str, Any]:
    """Write the pickle model or adapter `source` as safetensors into `target`, a folder that is empty or not there.

    Returns {"target", "files", "tensors", "bytes", "tied", "copied"}. Raises Refusal in words for whatever the files
    did.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise Refusal(f"The folder {target.name} is not empty. Choose a new one; nothing was written.")
    if not source.is_dir():
        raise Refusal(f"There is no model folder {source.name}. Nothing was written.")
    folder, weights = _pickles(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if free < weights.size_bytes * 1.1:
        raise Refusal(
            f"The copy needs {weights.size_bytes / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB free. "
            "Nothing was written."
        )
    staging = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    staging.mkdir(mode=0o700)
    try:
        report = _write(folder, weights, staging)
        _publish(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return {"target": str(target), **report}


def _pickles(source: Path) -> tuple[ModelFolder, Weights]:
    findings = Findings()
    folder = ModelFolder(source, (), findings)
    adapter = folder.has(ADAPTER_CONFIG) and not folder.has("config.json")
    if adapter and not folder.has("adapter_model.safetensors") and folder.has("adapter_model.bin"):
        weights: Weights | None = read_pickles(folder, findings, ["adapter_model.bin"])
    else:
        weights = find_weights(folder, findings)
    if findings.problems:
        first = findings.problems[0]
        raise Refusal(f"Cannot convert {source.name}: {first['message']}. {first['fix']} Nothing was written.")
    if weights is None or weights.kind != "pickle":
        raise Refusal(f"{source.name} holds safetensors already. Nothing has to be converted.")
    return folder, weights


def _write(folder: ModelFolder, weights: Weights, staging: Path) -> dict[str, Any]:
    from safetensors.torch import save_file

    config = folder.json("config.json") if folder.has("config.json") else {}
    ties = bool((config or {}).get("tie_word_embeddings"))
    adapter = weights.files == ("adapter_model.bin",)
    places: dict[str, str] = {}
    tied: list[str] = []
    total_bytes = 0
    for number, file in enumerate(weights.files, 1):
        path = folder.file(file)
        assert path is not None, "find_weights has judged every file"
        tensors = load_tensors(path)
        tied += _drop_tied(tensors) if ties else []
        name = "adapter_model.safetensors" if adapter else _shard_name(number, len(weights.files))
        save_file(_separate(tensors), staging / name, metadata={"format": "pt"})
        twice = sorted(set(places) & set(tensors))
        if twice:
            raise Refusal(
                f"Tensor {twice[0]} lies in two of the files. Download the folder again; nothing was written."
            )
        places |= dict.fromkeys(tensors, name)
        total_bytes += sum(tensor.nbytes for tensor in tensors.values())
    if len(weights.files) > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(places.items()))}
        (staging / SAFETENSORS_INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")
    copied = _copy_rest(folder, staging)
    report = inspect_model(staging, model_roots=[folder.path.parent])
    damaged = [item for item in report["problems"] if item["file"] in set(places.values())]
    if damaged:
        raise Refusal(f"The converted files are not right: {sentence(report)}")
    files = sorted(set(places.values()))
    return {"files": files, "tensors": len(places), "bytes": total_bytes, "tied": tied, "copied": copied}


def _shard_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"


def load_tensors(path: Path) -> Tensors:
    """The tensors of one pickle file, on the CPU; Refusal when it holds anything that is not a tensor."""
    import torch

    try:
        # weights_only refuses every class but tensors; its own text advises to switch that off, so it is never shown
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError:
        raise Refusal(
            f"{path.name} holds more than numbers and was not opened: it could run code. "
            "Download the model's safetensors files; nothing was written."
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        raise Refusal(f"{path.name} cannot be read ({reason}). Download it again; nothing was written.") from None
    good = isinstance(content, dict) and bool(content)
    if not good or not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in content.items()):
        raise Refusal(f"{path.name} is not a table of named tensors, so it is no model. Nothing was written.")
    odd = [name for name, value in content.items() if value.is_sparse or value.is_quantized or value.is_meta]
    if odd:
        raise Refusal(f"{path.name} holds {odd[0]} in a form that safetensors does not have. Nothing was written.")
    return {name: value.detach() for name, value in content.items()}


def _view(tensor: torch.Tensor) -> tuple[Any, ...]:
    """What makes two tensors the same numbers in memory: storage, offset, shape and strides."""
    return tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tuple(tensor.shape), tensor.stride()


def _drop_tied(tensors: Tensors) -> list[str]:
    """Take out the output layer where it is the embedding itself: the config ties them again at loading."""
    views = [(name, _view(tensor)) for name, tensor in tensors.items()]
    tied = [
        name
        for name, view in views
        if name.endswith(OUTPUT_LAYERS) and any(view == other and name != twin for twin, other in views)
    ]
    for name in tied:
        del tensors[name]
    return tied


def _separate(tensors: Tensors) -> Tensors:
    """The same tensors, each in memory of its own: safetensors has no views and no shared storage."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        whole = tensor.is_contiguous() and storage.nbytes() == tensor.nbytes and storage.data_ptr() not in seen
        seen.add(storage.data_ptr())
        result[name] = tensor if whole else tensor.clone().contiguous()
    return result


def _copy_rest(folder: ModelFolder, staging: Path) -> list[str]:
    copied = []
    for name in folder.matching(lambda name: _KEPT.fullmatch(name) and not _LEFT.fullmatch(name)):
        path = folder.file(name)
        if path is not None:
            shutil.copyfile(path, staging / name)
            copied.append(name)
    return copied


def _publish(staging: Path, target: Path) -> None:
    for path in staging.iterdir():
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    fsync_dir(staging)
    if target.exists():
        target.rmdir()
    staging.rename(target)
    fsync_dir(target.parent)
