"""What a dataset's manifest knows besides its file: column mapping, repaired versions, rejects, and which runs used it.

Called by the Data page. A dataset's file is never changed: a repaired copy is a dataset of its own that names where it
came from.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.data.mapping import FIELD, Mapping
from trainer.files import fsync_dir, read_json, write_json
from trainer.refusal import Refusal
from trainer.run import status
from trainer.states import LIVE_STATES
from trainer.workspace import STAGING, DatasetInfo, Workspace

REJECTS = "rejects.jsonl"


@dataclass(frozen=True)
class Use:
    """A run that trains on a dataset: its name, and whether it is going on now."""

    run_id: str
    name: str
    is_live: bool


def manifest_of(info: DatasetInfo) -> dict[str, Any]:
    """The manifest, {} for a file in a data root or a manifest that cannot be read."""
    try:
        return read_json(info.folder / "manifest.json") if info.folder is not None else {}
    except (OSError, ValueError):
        return {}


def save_columns(info: DatasetInfo, columns: Sequence[str]) -> list[str]:
    """Keep a column mapping with a dataset ([] removes it); returns it in its order. Raises Refusal."""
    mapping = Mapping.parse(columns)
    texts = mapping.texts() if mapping is not None else []
    if info.folder is None:
        told = ", ".join(texts) or "nothing"
        raise Refusal(
            f"{info.name} lies in a data root, which is not written to. Add the file here, or set Columns on the Train page "
            f"to: {told}.",
            FIELD,
        )
    write_json(info.folder / "manifest.json", manifest_of(info) | {"columns": texts})
    return texts


def add_repaired(
    workspace: Workspace, info: DatasetInfo, copy: Path, rejects: Path, result: dict[str, Any]
) -> DatasetInfo:
    """Take a repaired copy in as a new version of `info`, with its rejects and what was changed. Raises Refusal."""
    stem = info.name.removesuffix(".gz").rpartition(".")[0] or info.name
    made = workspace.add_dataset(copy, f"{stem}-repaired.jsonl", repaired_from=info.id)
    assert made.folder is not None
    shutil.copyfile(rejects, made.folder / REJECTS)
    os.chmod(made.folder / REJECTS, 0o600)
    extra = {"repair": result, "repaired_from": info.id, "rows": result["kept"], "rejects": REJECTS}
    write_json(made.folder / "manifest.json", manifest_of(made) | extra)
    fsync_dir(made.folder)
    return made


def rejects_of(info: DatasetInfo) -> Path | None:
    """The rows that a repaired copy left out, with their reasons; None where the dataset is no repaired copy."""
    path = info.folder / REJECTS if info.folder is not None else None
    return path if path is not None and manifest_of(info).get("rejects") == REJECTS and path.is_file() else None


def versions(workspace: Workspace, info: DatasetInfo) -> list[DatasetInfo]:
    """The repaired copies made of this dataset, newest first."""
    return [each for each in workspace.datasets() if manifest_of(each).get("repaired_from") == info.id]


def used_by(workspace: Workspace, info: DatasetInfo) -> list[Use]:
    """Runs whose settings name this file, newest first."""
    found = []
    for run in workspace.list_runs():
        try:
            data = run.snapshot()["config"]["data"]
            paths = [data.get("dataset_path"), data.get("validation_dataset_path")]
            paths += [file.get("path") for file in data.get("dataset_paths") or []]
        except (Refusal, KeyError, TypeError, AttributeError):
            continue  # a run of another version, or one that somebody is deleting
        if str(info.path) in paths:
            now = status(run)
            found.append(Use(run.run_id, now.name or run.run_id, now.state in LIVE_STATES or now.state == "queued"))
    return found


def delete_dataset(workspace: Workspace, info: DatasetInfo, typed_name: str) -> list[Use]:
    """Delete a dataset of the workspace with its manifest and rejects; returns the runs that used it.

    Raises Refusal when the name typed is another, when a run that goes on or waits needs it, or for a file in a data root.
    """
    if info.folder is None or info.folder.parent != workspace.datasets_dir:
        raise Refusal(f"{info.name} lies in a data root. It was not added here, so it is not deleted here.")
    if typed_name.strip() != info.name:
        raise Refusal(f"That is not the name. To delete this data, type: {info.name}")
    uses = used_by(workspace, info)
    live = next((use for use in uses if use.is_live), None)
    if live is not None:
        raise Refusal(
            f"The run {live.name} needs this data now. Stop it or take it out of the queue; nothing was deleted."
        )
    tombstone = workspace.datasets_dir / f"{STAGING}{secrets.token_hex(6)}"
    try:
        os.rename(info.folder, tombstone)
        fsync_dir(workspace.datasets_dir)
    except OSError as error:
        raise Refusal(f"Cannot delete {info.name}: {error.strerror or error}. Nothing was deleted.") from None
    shutil.rmtree(tombstone, ignore_errors=True)  # what is left is swept by a later addition
    return uses
