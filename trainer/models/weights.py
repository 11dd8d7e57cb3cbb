"""The weight files of a model folder: which there are, whether they are whole, and the tensors their headers name.

Index and shards are held against each other both ways. Called by `trainer.models.inspect` and
`trainer.models.adapter`.
"""

from __future__ import annotations

import re
import zipfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from trainer.models.findings import Findings, listed
from trainer.models.folder import ModelFolder
from trainer.models.headers import BadHeader, Header, TensorInfo, read_header

SAFETENSORS_INDEX = "model.safetensors.index.json"
PICKLE_INDEX = "pytorch_model.bin.index.json"
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.(safetensors|bin)")
# weights of other programs that may lie in the same folder
_FOREIGN = re.compile(r"(adapter_model|consolidated|optimizer|rng_state|scheduler)\b.*|training_args\.bin")
_LEGACY_PICKLE = b"\x80\x02"


@dataclass(frozen=True)
class Weights:
    """The files that will be loaded; `headers` is empty for pickle weights, whose tensors stay unknown here."""

    kind: Literal["safetensors", "pickle"]
    files: tuple[str, ...]
    size_bytes: int
    headers: dict[str, Header] = field(default_factory=dict)

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """All tensors by name."""
        return {name: info for header in self.headers.values() for name, info in header.tensors.items()}


def find_weights(folder: ModelFolder, findings: Findings) -> Weights | None:
    """Find and judge the weights of a whole model; None, with a problem noted, when there is nothing to judge."""
    if folder.has("model.safetensors"):
        if folder.has(SAFETENSORS_INDEX):
            message = f"model.safetensors is used; {SAFETENSORS_INDEX} and its shards are not"
            findings.warn("two_sets", SAFETENSORS_INDEX, message, "Remove the set you do not mean.")
        return read_safetensors(folder, findings, ["model.safetensors"])
    if folder.has(SAFETENSORS_INDEX):
        return _sharded(folder, findings, SAFETENSORS_INDEX)
    if folder.has("pytorch_model.bin"):
        return read_pickles(folder, findings, ["pytorch_model.bin"])
    if folder.has(PICKLE_INDEX):
        return _sharded(folder, findings, PICKLE_INDEX)
    _explain_absence(folder, findings)
    return None


def read_safetensors(folder: ModelFolder, findings: Findings, files: list[str]) -> Weights:
    """Judge the header of each of `files`; a bad one is a problem that names the file and what is wrong."""
    headers: dict[str, Header] = {}
    for name in files:
        path = folder.file(name)
        if path is None:
            continue
        try:
            headers[name] = read_header(path)
        except BadHeader as error:
            findings.problem(error.code, name, f"{name} {error.text}", f"Download {name} again.")
        except OSError as error:
            message = f"{name} cannot be read ({error.strerror})"
            findings.problem("unreadable", name, message, "Give this user the right to read it.")
    size = sum(header.file_bytes for header in headers.values())
    if headers and not any(header.tensors for header in headers.values()):
        findings.problem("no_tensors", files[0], f"{files[0]} holds no tensor", f"Download {files[0]} again.")
    return Weights("safetensors", tuple(files), size, headers)


def read_pickles(folder: ModelFolder, findings: Findings, files: list[str]) -> Weights:
    """Judge pickle weights from outside: they are never opened here, only converted first."""
    size = 0
    for name in files:
        path = folder.file(name)
        if path is None:
            continue
        size += path.stat().st_size
        fault = _pickle_fault(path)
        if fault:
            findings.problem("bad_pickle", name, f"{name} {fault}", f"Download {name} again.")
    shown = files[0] if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
    findings.warn(
        "pickle_weights",
        files[0],
        f"the weights are pickle files ({shown}), which can carry code; they are converted before training",
        "Run `python -m trainer convert FOLDER NEW_FOLDER` and use the new folder.",
    )
    return Weights("pickle", tuple(files), size)


def _pickle_fault(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(4)
    if start.startswith(_LEGACY_PICKLE):
        return ""
    if start != b"PK\x03\x04":
        return "is not a file that torch wrote"
    try:
        with zipfile.ZipFile(path) as archive:
            if not any(entry.endswith("data.pkl") for entry in archive.namelist()):
                return "is an archive without data.pkl, so not a file that torch wrote"
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return "is cut off: the end of its archive is missing"
    return ""


def _sharded(folder: ModelFolder, findings: Findings, index: str) -> Weights | None:
    places = _read_index(folder, findings, index)
    if places is None:
        return None
    files = sorted(set(places.values()))
    unsafe = [name for name in files if _is_unsafe(name)]
    if unsafe:
        message = f"{index} names '{unsafe[0][:120]}', which is not a plain file name"
        findings.problem("unsafe_path", index, message, "Shards have to lie in the folder itself.")
        return None
    present = [name for name in files if folder.has(name)]
    strays = folder.matching(lambda name: _SHARD.fullmatch(name) and name not in files and not _FOREIGN.match(name))
    for name in files:
        if name not in present:
            _missing_shard(findings, name, strays)
    if strays:
        message = f"{listed(strays)} is not named in {index} and is not loaded"
        findings.warn("extra_shard", strays[0], message, "Remove it, or download the folder again.")
    _check_numbers(findings, index, files)
    if index == PICKLE_INDEX:
        return read_pickles(folder, findings, present or files) if present else None
    weights = read_safetensors(folder, findings, present)
    _compare(findings, index, places, weights)
    return weights


def _read_index(folder: ModelFolder, findings: Findings, index: str) -> dict[str, str] | None:
    content = folder.json(index, hook=_unique_pairs)
    if content is None:
        return None
    places = content.get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        message = f"{index} has no weight_map from tensors to files"
        findings.problem("bad_index", index, message, f"Download {index} again.")
        return None
    return places


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"it names '{twice[:100]}' twice")
    return result


def _is_unsafe(name: str) -> bool:
    return name in ("", ".", "..") or any(mark in name for mark in "/\\:\0")


def _missing_shard(findings: Findings, name: str, strays: list[str]) -> None:
    number = _SHARD.fullmatch(name)
    which = f"shard {int(number[2])} of {int(number[3])}" if number else "a weight file"
    stem = name.rsplit(".", 1)[0]
    misnamed = [stray for stray in strays if stray.startswith(stem[: stem.rfind("-of-")])] if number else []
    fix = f"Rename {misnamed[0]} to {name}." if misnamed else "Download that file again."
    findings.problem("missing_shard", name, f"{which} is missing ({name}, named in the index)", fix)


def _check_numbers(findings: Findings, index: str, files: list[str]) -> None:
    numbered = [match for match in map(_SHARD.fullmatch, files) if match]
    totals = {int(match[3]) for match in numbered}
    if len(totals) != 1 or len(numbered) != len(files):
        return
    absent = sorted(set(range(1, min(totals.pop(), 10_000) + 1)) - {int(match[2]) for match in numbered})
    if absent:
        message = f"{index} names no tensor of shard {listed([str(number) for number in absent])}"
        findings.warn("index_incomplete", index, message, "Compare the index with the original download.")


def _compare(findings: Findings, index: str, places: dict[str, str], weights: Weights) -> None:
    """Hold the index and the headers of the readable shards against each other."""
    holders: dict[str, list[str]] = {}
    for file, header in weights.headers.items():
        for tensor in header.tensors:
            holders.setdefault(tensor, []).append(file)
    twice = [tensor for tensor, files in holders.items() if len(files) > 1]
    if twice:
        message = f"tensor {listed(twice, 1)} lies in two shards ({', '.join(holders[twice[0]])})"
        findings.problem("tensor_in_two_shards", holders[twice[0]][1], message, "Download the folder again.")
    absent_from: dict[str, list[str]] = {}
    for tensor, file in places.items():
        if file in weights.headers and file not in holders.get(tensor, ()):
            absent_from.setdefault(file, []).append(tensor)
    for file, absent in absent_from.items():
        message = f"{file} does not hold {listed(absent, 1)}, which the index places there"
        findings.problem("tensor_not_in_shard", file, message, f"Download {file} and {index} again.")
    unnamed = [tensor for tensor in holders if tensor not in places]
    if unnamed:
        message = f"the shards hold {len(unnamed):,} tensors that {index} does not name, first {unnamed[0][:120]}"
        findings.warn("tensor_not_in_index", index, message, "Compare the index with the original download.")


def _explain_absence(folder: ModelFolder, findings: Findings) -> None:
    found = folder.matching(lambda name: name.endswith((".safetensors", ".bin")) and not _FOREIGN.match(name))
    numbered = [name for name in found if _SHARD.fullmatch(name)]
    if numbered:
        index = SAFETENSORS_INDEX if numbered[0].endswith(".safetensors") else PICKLE_INDEX
        message = f"{index} is missing, so the {len(numbered)} shards cannot be put together"
        findings.problem("no_index", index, message, f"Download {index} again.")
        for name in _absent_numbers(numbered):
            _missing_shard(findings, name, [])
    elif found:
        name = "model.safetensors" if found[0].endswith(".safetensors") else "pytorch_model.bin"
        message = f"the weights are not called {name} (found: {listed(found)})"
        fix = f"Rename {found[0]} to {name}." if len(found) == 1 else "Keep one set of weights and rename it."
        findings.problem("misnamed_weights", found[0], message, fix)
    else:
        message = "there are no weights (no model.safetensors, no shards with an index, no pytorch_model.bin)"
        findings.problem("no_weights", "model.safetensors", message, "Download the weight files too.")


def _absent_numbers(names: list[str]) -> list[str]:
    match = _SHARD.fullmatch(names[0])
    assert match is not None
    total = min(int(match[3]), 10_000)
    wanted = [f"{match[1]}-{number:05}-of-{int(match[3]):05}.{match[4]}" for number in range(1, total + 1)]
    return [name for name in wanted if name not in names]
