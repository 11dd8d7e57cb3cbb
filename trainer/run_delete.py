"""Deleting a run for good: the name typed, the run at rest, nothing outside its directory touched.

The directory is first renamed to a tombstone beside it, in one step, so that no reader sees half a run; then it is
removed relative to an open descriptor of its parent, which never follows a link. Called by the Runs page.
"""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path

from trainer.files import fsync_dir
from trainer.locks import FileLock
from trainer.refusal import Refusal
from trainer.run import RunDir

TOMBSTONE = ".deleted-"


def name_to_type(run: RunDir) -> str:
    """What a person types to delete `run`: the name they gave it, else its id."""
    return str(run.read_notes().get("name") or run.run_id)


def delete_run(run: RunDir, typed_name: str) -> int:
    """Delete `run` with everything in it and return the bytes freed.

    Raises Refusal when `typed_name` is not the run's name, when a trainer holds the run's lock, when the run is a
    link, or when the disk refuses; a half-removed tombstone is finished by the next deletion.
    """
    if not shutil.rmtree.avoids_symlink_attacks:
        raise Refusal("This system cannot delete a folder safely. Delete the run's folder by hand.")
    if typed_name.strip() != name_to_type(run):
        raise Refusal(f"That is not the name. To delete this run, type: {name_to_type(run)}")
    if run.path.is_symlink():
        raise Refusal("This run is a link to a folder elsewhere. Nothing was deleted; remove the link by hand.")
    size_bytes = disk_bytes(run.path)
    lock = FileLock(run.lock)
    if not lock.acquire({"kind": "delete", "run": run.run_id}, retry_s=0.2):
        raise Refusal("This run is being trained. Stop it first; nothing was deleted.")
    try:
        tombstone = run.path.with_name(f"{TOMBSTONE}{run.run_id}-{secrets.token_hex(4)}")
        os.rename(run.path, tombstone)
        fsync_dir(tombstone.parent)
    except OSError as error:
        raise Refusal(f"Cannot delete the run: {error.strerror or error}. Nothing was deleted.") from None
    finally:
        lock.release()
    _remove_tombstones(tombstone.parent)
    return size_bytes


def disk_bytes(folder: Path) -> int:
    """Bytes of all files under `folder`; links count as themselves."""
    total = 0
    for parent, _, names in os.walk(folder, followlinks=False):
        for name in names:
            try:
                total += os.lstat(os.path.join(parent, name)).st_size
            except FileNotFoundError:  # a checkpoint that was pruned while we counted
                continue
    return total


def _remove_tombstones(runs: Path) -> None:
    parent = os.open(runs, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        for name in sorted(os.listdir(parent)):
            if name.startswith(TOMBSTONE):
                shutil.rmtree(name, dir_fd=parent)
    except OSError as error:
        raise Refusal(
            f"The run is out of the list, but not all of its files could be removed: {error.strerror or error}. "
            f"They are in {runs}, in the folder whose name begins with {TOMBSTONE}."
        ) from None
    finally:
        os.close(parent)
