"""The workspace: where configs, profiles, models, datasets and runs lie, and how a name becomes a path.

Owns the layout of the directory tree and the folders of datasets. Used by the page, the command line and the
engine; keeps nothing in memory, so every caller sees what is on disk now. Torch-free.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
import secrets
import shutil
import time
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from trainer.current import Current
from trainer.files import NAME, fsync_dir, make_private_dir, read_json, write_json
from trainer.hub_names import downloaded
from trainer.queue import Queue
from trainer.refusal import Refusal
from trainer.run import RunDir

_TEXT_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt")
DATA_SUFFIXES = (*_TEXT_SUFFIXES, ".parquet", *(f"{suffix}.gz" for suffix in _TEXT_SUFFIXES))
_MODEL_FILES = ("config.json", "adapter_config.json")
_DATASET_ID = re.compile(r"[0-9a-f]{16}")
_NAME_CHARACTERS = 80
_CHUNK_BYTES = 2**20
STAGING = ".staging-"
_LEFT_OVER_S = 24 * 3600


@dataclass(frozen=True)
class DatasetInfo:
    """One dataset to choose from.

    `id` is the first 16 hex digits of the content's sha256, or `at-` and a hash of the path for a file that
    lies in a data root and was not copied. `rows` is None until the doctor has counted them; `added` is in
    seconds since 1970.
    """

    id: str
    name: str
    path: Path
    bytes: int
    rows: int | None
    added: float

    @property
    def folder(self) -> Path | None:
        """The dataset's own folder (manifest, repaired copies, rejects); None for a file in a data root."""
        return None if self.id.startswith("at-") else self.path.parent


@dataclass(frozen=True)
class Workspace:
    """A workspace directory and the further roots where models and data are looked for."""

    root: Path
    model_roots: tuple[Path, ...] = ()
    data_roots: tuple[Path, ...] = ()

    @property
    def configs(self) -> Path:
        """Saved configs, with their backups."""
        return self.root / "configs"

    @property
    def profiles(self) -> Path:
        """Profiles that users declare."""
        return self.root / "profiles"

    @property
    def models_dir(self) -> Path:
        """Model folders of this workspace."""
        return self.root / "models"

    @property
    def datasets_dir(self) -> Path:
        """One folder a dataset."""
        return self.root / "datasets"

    @property
    def runs(self) -> Path:
        """One directory a run."""
        return self.root / "runs"

    @property
    def current(self) -> Current:
        """Which checkpoint people use."""
        return Current(self.root / "current.json")

    @property
    def queue(self) -> Queue:
        """The runs that wait for the device."""
        return Queue(self.root / "queue.json")

    @property
    def tokens(self) -> Path:
        """Token caches; may be deleted when no run is live."""
        return self.root / "cache" / "tokens"

    @property
    def layouts(self) -> Path:
        """Names and shapes of architectures that were checked; may be deleted at any time."""
        return self.root / "cache" / "layouts"

    @property
    def jobs(self) -> Path:
        """State and results of jobs of the page."""
        return self.root / "jobs"

    @property
    def smoke(self) -> Path:
        """One folder a smoke test."""
        return self.root / "smoke"

    @property
    def uploads(self) -> Path:
        """Files on their way in."""
        return self.root / "uploads"

    @property
    def drafts(self) -> Path:
        """The form's drafts, one file a session."""
        return self.root / "drafts"

    def create(self) -> Workspace:
        """Make the directories, readable by their owner alone; Refusal when the place cannot be written."""
        folders = (
            self.root, self.configs, self.profiles, self.models_dir, self.datasets_dir, self.runs,
            self.tokens, self.jobs, self.smoke, self.uploads, self.drafts,
        )  # fmt: skip
        try:
            for folder in folders:
                make_private_dir(folder)
        except OSError as error:
            reason = f"{error.strerror or error}. Choose another with --workspace."
            raise Refusal(f"Cannot use {self.root} as the workspace: {reason}") from None
        return self

    def models(self) -> list[Path]:
        """Model folders that are direct children of the roots, in the order of roots, then by name."""
        found = []
        for root in (self.models_dir, *self.model_roots):
            found += [p for p in _children(root) if p.is_dir() and holds_model(p)]
        return found

    def find_model(self, name_or_path: str) -> Path:
        """A model's folder from its name in a root (the first root wins), a path or a hub's id; Refusal if none."""
        _refuse_zero_byte(name_or_path, "model")
        if not name_or_path:
            raise Refusal("No model is chosen.", "model_path")
        given = Path(name_or_path).expanduser()
        if given.name == name_or_path:
            for path in self.models():
                if path.name == name_or_path:
                    return path
        if given.is_dir():
            return given.absolute()
        if (fetched := downloaded(self.models_dir, name_or_path)) is not None:
            return fetched
        near = difflib.get_close_matches(given.name, [p.name for p in self.models()], n=1)
        hint = f" Closest: {near[0]}." if near else ""
        raise Refusal(f"There is no model folder '{name_or_path}'.{hint}", "model_path")

    def datasets(self) -> list[DatasetInfo]:
        """Datasets of the workspace, newest first, then data files that lie in the roots as they are, by name."""
        own = [info for p in _children(self.datasets_dir) if (info := _read_dataset(p))]
        own.sort(key=lambda info: (-info.added, info.name))
        roots = (self.datasets_dir, *self.data_roots)
        return own + [_in_place(p) for root in roots for p in _children(root) if _is_data_file(p)]

    def find_dataset(self, id_or_path: str) -> Path:
        """The file of a dataset from its id or from a path; raises Refusal when there is none."""
        _refuse_zero_byte(id_or_path, "dataset")
        if not id_or_path:
            raise Refusal("No data is chosen.", "data.dataset_path")
        info = self.dataset(id_or_path)
        if info:
            return info.path
        path = Path(id_or_path).expanduser()
        if path.is_file():
            return path.absolute()
        raise Refusal(f"There is no dataset '{id_or_path}'.", "data.dataset_path")

    def dataset(self, dataset_id: str) -> DatasetInfo | None:
        """What is known of the dataset with this id, or None."""
        if _DATASET_ID.fullmatch(dataset_id):
            return _read_dataset(self.datasets_dir / dataset_id)
        if dataset_id.startswith("at-"):
            return next((info for info in self.datasets() if info.id == dataset_id), None)
        return None

    def add_dataset(self, uploaded: Path, original_name: str, repaired_from: str | None = None) -> DatasetInfo:
        """Copy a file into a folder of its own, in one step: it is there whole or not at all.

        The same content twice is one dataset, under its first name. `repaired_from` is the id of the dataset
        that this one mends. Raises Refusal when the file is empty or cannot be read or stored.
        """
        name = safe_name(original_name)
        staging = self.datasets_dir / f"{STAGING}{secrets.token_hex(6)}"
        try:
            _sweep(self.datasets_dir)
            make_private_dir(staging)
            with open(uploaded, "rb") as source:
                digest, size = _copy_hashed(source, staging / name)
            if not size:
                raise Refusal(f"{name} is empty. Nothing was added.")
            dataset_id = digest[:16]
            manifest = {"id": dataset_id, "sha256": digest, "name": name, "file": name, "bytes": size}
            manifest |= {"rows": None, "added": time.time(), "repaired_from": repaired_from}
            write_json(staging / "manifest.json", manifest)
            self._put_in_place(staging, dataset_id)
        except OSError as error:
            reason = error.strerror or str(error)
            raise Refusal(
                f"Cannot add {name}: {reason}. Other data is as it was. Mend that, then add it again."
            ) from None
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        info = _read_dataset(self.datasets_dir / dataset_id)
        if info is None:
            raise Refusal(f"{name} was stored, but its folder {dataset_id} cannot be read back.")
        return info

    def _put_in_place(self, staging: Path, dataset_id: str) -> None:
        target = self.datasets_dir / dataset_id
        try:
            os.rename(staging, target)
        except OSError:
            if _read_dataset(target) is None:  # anything but the same content added before
                raise
        fsync_dir(self.datasets_dir)

    def note_rows(self, dataset_id: str, rows: int) -> None:
        """Write down how many rows the doctor counted."""
        path = self.datasets_dir / dataset_id / "manifest.json"
        if _DATASET_ID.fullmatch(dataset_id) and path.exists():
            write_json(path, read_json(path) | {"rows": rows})

    def knows(self, path: Path) -> bool:
        """Whether a path lies inside the workspace or one of the roots, links followed."""
        real = path.resolve()
        return any(real.is_relative_to(r.resolve()) for r in (self.root, *self.model_roots, *self.data_roots))

    def run(self, run_id: str) -> RunDir:
        """The run with this id; raises Refusal when there is none."""
        path = self.runs / run_id
        if not NAME.fullmatch(run_id) or not (path / "config.json").is_file():
            raise Refusal(f"There is no run '{run_id[:80]}'.")
        return RunDir(path)

    def list_runs(self) -> list[RunDir]:
        """All runs, newest first."""
        found = [p for p in _children(self.runs) if (p / "config.json").is_file()]
        return [RunDir(p) for p in sorted(found, key=lambda p: p.name, reverse=True)]


def holds_model(folder: Path) -> bool:
    """Whether a folder looks like a model; `trainer.models.inspect` says whether it is a good one."""
    return any((folder / name).is_file() for name in _MODEL_FILES) or any(folder.glob("*.gguf"))


def safe_name(text: str) -> str:
    """A file name reduced to harmless text: no folders, no control characters, 80 characters at most."""
    last = re.split(r"[/\\]", unicodedata.normalize("NFC", text))[-1]
    kept = "".join(c if c.isalnum() or c in "._-+ ()" else "_" for c in last).strip(" .")
    stem, dot, suffix = kept.rpartition(".")
    if dot and len(suffix) <= 8:
        kept = stem[: _NAME_CHARACTERS - len(suffix) - 1] + "." + suffix
    kept = kept[:_NAME_CHARACTERS].strip(" .") or "data"
    while len(kept.encode("utf-8", "replace")) > 240:  # a name is at most 255 bytes on common file systems
        kept = kept[:-1]
    return "data-manifest.json" if kept.lower() == "manifest.json" else kept


def _sweep(folder: Path) -> None:
    """Remove what additions left there whose process was killed; one of today may still be at work."""
    for path in folder.glob(f"{STAGING}*"):
        try:
            left_over = time.time() - path.stat().st_mtime > _LEFT_OVER_S
        except FileNotFoundError:  # an addition at work, which has just put it in place
            continue
        if left_over:
            shutil.rmtree(path, ignore_errors=True)


def _refuse_zero_byte(text: str, what: str) -> None:
    if "\0" in text:
        raise Refusal(f"That is not the name of a {what}.")


def _children(folder: Path) -> Iterable[Path]:
    """Entries of a folder by name, hidden ones left out; none where the folder is missing or closed to us."""
    try:
        return sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    except OSError:
        return ()


def _is_data_file(path: Path) -> bool:
    return path.name.lower().endswith(DATA_SUFFIXES) and path.is_file()


def _read_dataset(folder: Path) -> DatasetInfo | None:
    try:
        manifest: dict[str, Any] = read_json(folder / "manifest.json")
        path = folder / manifest["file"]
        size, rows = path.stat().st_size, manifest.get("rows")
        return DatasetInfo(manifest["id"], manifest["name"], path, size, rows, float(manifest["added"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None  # not a folder of ours, or one that somebody is deleting


def _in_place(path: Path) -> DatasetInfo:
    path = path.absolute()
    mark = hashlib.sha256(os.fsencode(path)).hexdigest()[:13]
    stat = path.stat()
    return DatasetInfo(f"at-{mark}", path.name, path, stat.st_size, None, stat.st_mtime)


def _copy_hashed(source: BinaryIO, target: Path) -> tuple[str, int]:
    """Copy and hash in one pass, so that the hash is of the bytes stored; returns hex digest and size."""
    digest, size = hashlib.sha256(), 0
    with open(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        while chunk := source.read(_CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest(), size
