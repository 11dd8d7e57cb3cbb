"""Checkpoints: a directory with what from_pretrained loads, the optimizer's states and our own, sealed by a manifest.

Written beside its final name, every file fsynced, MANIFEST.json last, then renamed: a reader sees a whole checkpoint or none.
Where a step is saved again, the old one steps aside by a rename and goes when the new one is safe; the trainer that opens a
run after a kill in between puts it back. Readers change nothing. Reading and verifying need no torch.
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
STEP, STAGING, REPLACED, REMOVED = "step_", ".staging_", ".replaced_", ".removed_"


def directory_of(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint of `step` stands."""
    return checkpoints / f"{STEP}{step:08d}"


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
    _into_place(staging, directory_of(staging.parent, step))
    return total


def _into_place(staging: Path, final: Path) -> None:
    """Rename `staging` to `final`; one that stands there (the step was saved before) is whole on the disk until that is done."""
    aside = final.with_name(f"{REPLACED}{final.name}")
    if final.exists():
        if aside.exists():  # of a save that was killed after its own was in place
            shutil.rmtree(aside)
        os.rename(final, aside)
        fsync_dir(final.parent)
    try:
        os.rename(staging, final)
    except OSError:
        if aside.exists():
            os.rename(aside, final)
        raise
    fsync_dir(final.parent)
    # the new one is safe; what cannot be removed now is hidden and swept by the next save
    shutil.rmtree(aside, ignore_errors=True)


def put_back(checkpoints: Path) -> list[str]:
    """Give checkpoints that stepped aside for one that never came their names back; returns these names.

    For the trainer that holds the run's lock, before it looks for what to resume from. Raises OSError.
    """
    back = []
    for name in _names(checkpoints, REPLACED + STEP):
        final = checkpoints / name.removeprefix(REPLACED)
        if not final.exists():
            os.rename(checkpoints / name, final)
            back.append(final.name)
    if back:
        fsync_dir(checkpoints)
    return back


def new_staging(checkpoints: Path, step: int) -> Path:
    """An empty directory to write the checkpoint of `step` into; what a killed save or removal left is swept away."""
    make_private_dir(checkpoints)
    put_back(checkpoints)
    sweep(checkpoints)
    staging = checkpoints / f"{STAGING}{step:08d}"
    staging.mkdir(mode=0o700)
    return staging


def sweep(checkpoints: Path) -> None:
    """Take away what killed saves and removals left in hidden names: it takes room that the next save may need.

    What steps aside for a save that never came must have been put back. Raises OSError for a folder that is closed to us.
    """
    for left in [name for hidden in (STAGING, REPLACED, REMOVED) for name in _names(checkpoints, hidden)]:
        shutil.rmtree(checkpoints / left, ignore_errors=True)  # what cannot go must not stand in the way of every save


def _names(folder: Path, prefix: str) -> list[str]:
    """Entries of `folder` that begin with `prefix`, in order; a folder that is not there has none, other OSErrors are raised."""
    try:
        return sorted(name for name in os.listdir(folder) if name.startswith(prefix))
    except FileNotFoundError:
        return []


def _manifest(directory: Path) -> dict[str, dict[str, Any]]:
    """{file: {"bytes", "sha256"}} as sealed. Raises Refusal in words when it is missing, unreadable or no manifest of ours."""
    try:
        files = dict(read_json(directory / MANIFEST)["files"])
    except FileNotFoundError:
        raise Refusal(f"{MANIFEST} is missing: the save was cut off") from None
    except OSError as error:
        raise Refusal(f"{MANIFEST} cannot be read: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError):
        raise Refusal(f"{MANIFEST} is damaged") from None
    if not {STATE, OPTIMIZER} <= files.keys() or not all(isinstance(entry, dict) for entry in files.values()):
        raise Refusal(f"{MANIFEST} is damaged")
    return files


def verify(directory: Path) -> list[str]:
    """What is wrong with a checkpoint, in words; an empty list means every byte is as it was written."""
    return _problems(directory, read_contents=True)


def looks_whole(directory: Path) -> bool:
    """Whether a checkpoint is sealed and all its files have their sizes: what can be told without reading them."""
    return not _problems(directory, read_contents=False)


def _problems(directory: Path, *, read_contents: bool) -> list[str]:
    try:
        files = _manifest(directory)
    except Refusal as refusal:
        return [refusal.message]
    problems = []
    for name, entry in files.items():
        path = directory / name
        try:
            if not path.is_file():
                problems.append(f"{name} is missing")
            elif path.stat().st_size != entry.get("bytes"):
                problems.append(f"{name} has {path.stat().st_size} bytes instead of {entry.get('bytes')}")
            elif read_contents and _sha256(path) != entry.get("sha256"):
                problems.append(f"{name} is damaged: its checksum differs")
        except OSError as error:  # a bad sector is damage too: the one before it may be whole
            problems.append(f"{name} cannot be read: {error.strerror or error}")
    return problems


@dataclass(frozen=True)
class Found:
    """The newest checkpoint that verifies, and what was passed over on the way to it (directory name, why)."""

    path: Path
    step: int
    passed_over: tuple[tuple[str, str], ...]

    @property
    def damaged_steps(self) -> frozenset[int]:
        """The steps passed over."""
        return frozenset(int(name.removeprefix(STEP)) for name, _ in self.passed_over)


def listed(checkpoints: Path) -> list[tuple[int, Path]]:
    """(step, directory) of every checkpoint, newest first, verified or not. Raises OSError for a folder that is closed to us."""
    found = []
    for name in _names(checkpoints, STEP):
        path, digits = checkpoints / name, name.removeprefix(STEP)
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
    """Take a checkpoint away: out of sight by one rename first, so that neither a kill nor power loss leaves half in place."""
    grave = directory.with_name(f"{REMOVED}{directory.name}")
    if grave.exists():
        shutil.rmtree(grave)
    os.rename(directory, grave)
    fsync_dir(directory.parent)
    shutil.rmtree(grave)


def prune(checkpoints: Path, keep: int, pinned: set[int], damaged: frozenset[int] = frozenset()) -> list[int]:
    """Keep the newest `keep` good ones and the `pinned` steps (best, current); returns the steps removed.

    One that is known to be `damaged`, is not sealed or misses bytes counts for nothing: it never pushes a good one out. It
    goes with the good ones of its age. Raises OSError; what was removed until then is gone, the rest is whole.
    """
    gone, good = [], 0
    for step, path in listed(checkpoints):
        if good < keep:
            good += step not in damaged and looks_whole(path)
        elif step not in pinned:
            remove(path)
            gone.append(step)
    return gone


def free_bytes(path: Path) -> int:
    """Bytes a user's file may still take on the disk of `path`."""
    stat = os.statvfs(path)
    return stat.f_bavail * stat.f_frsize
