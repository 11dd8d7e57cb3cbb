"""Checkpoints: a directory with what from_pretrained loads, the optimizer's states and our own, sealed by a manifest.

Written beside its final name, every file fsynced, MANIFEST.json last, then renamed: a reader sees a whole checkpoint or none.
Reading and verifying need no torch.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.files import fsync_dir, make_private_dir, read_json, write_json
from trainer.refusal import Refusal

MANIFEST, STATE, OPTIMIZER, MODEL = "MANIFEST.json", "state.json", "optimizer.safetensors", "model"
FORMAT = 1


def directory_of(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint of `step` stands."""
    return checkpoints / f"step_{step:08d}"


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file() and path.name != MANIFEST)


def seal(staging: Path, step: int) -> int:
    """fsync every file, write the manifest last, rename to the final name; returns the bytes on disk."""
    entries, total = {}, 0
    for path in _files(staging):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        size = path.stat().st_size
        entries[path.relative_to(staging).as_posix()] = {"bytes": size, "sha256": _sha256(path)}
        total += size
    for folder in [path for path in staging.rglob("*") if path.is_dir()]:
        fsync_dir(folder)
    write_json(staging / MANIFEST, {"format": FORMAT, "step": step, "files": entries})
    final = directory_of(staging.parent, step)
    if final.exists():  # the same step saved again after a rewind or resume: the new one takes its place
        remove(final)
    os.rename(staging, final)
    fsync_dir(staging.parent)
    return total


def new_staging(checkpoints: Path, step: int) -> Path:
    """An empty directory to write the checkpoint of `step` into; what a killed save left there is swept away."""
    make_private_dir(checkpoints)
    for left in checkpoints.glob(".staging_*"):
        shutil.rmtree(left)
    return make_private_dir(checkpoints / f".staging_{step:08d}")


def verify(directory: Path) -> list[str]:
    """What is wrong with a checkpoint, in words; an empty list means every byte is as it was written."""
    try:
        manifest = read_json(directory / MANIFEST)
        files = dict(manifest["files"])
    except FileNotFoundError:
        return [f"{MANIFEST} is missing: the save was cut off"]
    except (ValueError, KeyError, TypeError):
        return [f"{MANIFEST} is damaged"]
    problems = []
    for name, entry in files.items():
        path = directory / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != entry.get("bytes"):
            problems.append(f"{name} has {path.stat().st_size} bytes instead of {entry.get('bytes')}")
        elif _sha256(path) != entry.get("sha256"):
            problems.append(f"{name} is damaged: its checksum differs")
    return problems


@dataclass(frozen=True)
class Found:
    """The newest checkpoint that verifies, and what was passed over on the way to it (directory name, why)."""

    path: Path
    step: int
    passed_over: tuple[tuple[str, str], ...]


def listed(checkpoints: Path) -> list[tuple[int, Path]]:
    """(step, directory) of every checkpoint, newest first, verified or not."""
    found = []
    for path in checkpoints.glob("step_*"):
        digits = path.name.removeprefix("step_")
        if digits.isdigit() and path.is_dir() and not path.is_symlink():
            found.append((int(digits), path))
    return sorted(found, reverse=True)


def newest_verified(checkpoints: Path) -> Found:
    """The checkpoint to resume from; Refusal when there is none. Nothing is deleted."""
    passed_over: list[tuple[str, str]] = []
    for step, path in listed(checkpoints):
        problems = verify(path)
        if not problems:
            return Found(path, step, tuple(passed_over))
        passed_over.append((path.name, problems[0]))
    if passed_over:
        reasons = "; ".join(f"{name}: {why}" for name, why in passed_over)
        raise Refusal(
            f"No checkpoint of this run is whole ({reasons}). Nothing was deleted. Start a new run from the model."
        )
    raise Refusal("This run has no checkpoint to resume from. Start a new run.")


def read_state(directory: Path) -> dict[str, Any]:
    """The checkpoint's own state (step, best, counters); call after `verify`."""
    state = read_json(directory / STATE)
    if state.get("format") != FORMAT:
        raise Refusal(
            f"{directory.name} was written by another version (format {state.get('format')}, known: {FORMAT})."
        )
    return state


def remove(directory: Path) -> None:
    """Take a checkpoint away: out of sight by one rename first, so that a kill never leaves half of one in place."""
    grave = directory.with_name(f".removed_{directory.name}")
    if grave.exists():
        shutil.rmtree(grave)
    os.rename(directory, grave)
    shutil.rmtree(grave)


def prune(checkpoints: Path, keep: int, pinned: set[int]) -> list[int]:
    """Keep the newest `keep` and the `pinned` steps (best, current); returns the steps removed."""
    gone = []
    for step, path in listed(checkpoints)[keep:]:
        if step not in pinned:
            remove(path)
            gone.append(step)
    return gone


def free_bytes(path: Path) -> int:
    """Bytes a user's file may still take on the disk of `path`."""
    stat = os.statvfs(path)
    return stat.f_bavail * stat.f_frsize
