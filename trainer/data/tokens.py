"""The token cache: every row of a run's files as ids and label marks, in arrays that are mapped, not read.

One folder for each way of making tokens, named by a hash of all that can move a token. `build_cache` is
called in the worker process, `TokenCache` in the engine and by whoever shows tokens of a run.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

import profiles
from trainer.data.build import Builder, Progress
from trainer.data.formats import Scan, scan
from trainer.data.mapping import mapping_of
from trainer.data.render import RENDERER_VERSION
from trainer.files import fsync_dir, read_json
from trainer.launch import base_of
from trainer.locks import FileLock
from trainer.refusal import Refusal

_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "chat_template.jinja", "chat_template.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model",
)  # fmt: skip


@dataclass(frozen=True)
class TokenRequest:
    """What to make tokens of, and how: `date` is YYYY-MM-DD, `max_length` in tokens."""

    files: tuple[str, ...]
    model_path: str
    profile: str | None
    system_prompt: str
    date: str
    max_length: int
    too_long: Literal["cut", "drop", "refuse"]
    profiles_root: str | None = None
    chat_template: Literal["model", "chatml"] = "model"
    columns: tuple[str, ...] = ()

    def mappings(self) -> list[list[str]]:
        """The column mapping of each file as texts: the setting, or what was saved with the dataset. Raises Refusal."""
        found = [mapping_of(Path(path), self.columns) for path in self.files]
        return [each.texts() if each is not None else [] for each in found]

    def key(self) -> str:
        """The name of the cache: a hash of all that can move a token; reads the files. Raises Refusal."""
        return self.key_of([scan(path) for path in self.files])

    def key_of(self, scans: list[Scan]) -> str:
        """The key when the files have been scanned already."""
        parts = asdict(self) | {
            "files": [each.sha256 for each in scans],
            "model_path": _tokenizer_digest(Path(self.model_path)),
            "profiles_root": None,
            "profile_source": _profile_digest(self.profile, self.profiles_root),
            "renderer": RENDERER_VERSION,
            "columns": self.mappings(),
        }
        if not any(parts["columns"]):  # so that the caches and runs of before column mappings keep their names
            del parts["columns"]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


class TokenCache:
    """A finished cache, mapped into memory. Rows are numbered from 0 in file order."""

    def __init__(self, path: Path, meta: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        self.path = path
        self.meta = meta
        self.offsets = arrays["offsets"]  # int64 (rows + 1,)
        self.source = arrays["source"]  # int64 (rows, 3): file number, line from 1, row of the file from 0
        self.pieces = arrays["pieces"]  # int32 (rows,): piece of a plain text from 0, -1 for a conversation
        self.cut = arrays["cut"]  # int32 (rows,): tokens cut off the row's end
        self._ids = arrays["ids"]
        self._labels = arrays["labels"]

    @classmethod
    def open(cls, path: Path) -> TokenCache:
        """Map the cache at `path`; raises Refusal when it is incomplete."""
        names = ("ids", "labels", "offsets", "source", "pieces", "cut")
        try:
            meta = read_json(path / "cache.json")
            arrays = {name: np.load(path / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in names}
        except (OSError, ValueError, EOFError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise Refusal(f"The token cache {path.name} is not readable ({reason}). Tokenise again.") from None
        tokens, rows = int(arrays["offsets"][-1]), len(arrays["offsets"]) - 1
        shapes = {"ids": (tokens,), "labels": (tokens,), "offsets": (rows + 1,), "source": (rows, 3)}
        shapes |= {"pieces": (rows,), "cut": (rows,)}
        if any(arrays[name].shape != shape for name, shape in shapes.items()) or meta.get("rows") != rows:
            raise Refusal(f"The token cache {path.name} is damaged: its parts differ in length. Tokenise again.")
        return cls(path, meta, arrays)

    def ids(self, row: int) -> np.ndarray:
        """Token ids of a row, int32 (length,)."""
        return self._ids[self.offsets[row] : self.offsets[row + 1]]

    def labels(self, row: int) -> np.ndarray:
        """1 where the token is trained, uint8 (length,)."""
        return self._labels[self.offsets[row] : self.offsets[row + 1]]

    def place(self, row: int) -> tuple[int, int, int, int | None]:
        """Where a row comes from: (file number, line from 1, row of the file from 0, piece of a plain text or None)."""
        file, line, index = (int(value) for value in self.source[row])
        piece = int(self.pieces[row])
        return file, line, index, None if piece < 0 else piece

    def place_words(self, row: int) -> str:
        """The same for a person: "chats.jsonl, line 8,113"."""
        file, line, _, piece = self.place(row)
        part = f", piece {piece + 1:,}" if piece is not None else ""
        known = self.meta["files"][file]
        return f"{Path(known['path']).name}, {known.get('unit', 'line')} {line:,}{part}"

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, int64 (rows,)."""
        return np.diff(self.offsets)

    @cached_property
    def label_counts(self) -> np.ndarray:
        """Trained tokens of each row, int64 (rows,)."""
        return np.add.reduceat(self._labels, self.offsets[:-1], dtype=np.int64)


def tokenizer_folder(path: Path) -> Path:
    """`path`, or the base model's folder for an adapter that came without a tokenizer of its own."""
    own = any((path / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model"))
    return path if own or not (path / "adapter_config.json").exists() else base_of(path)


def load_tokenizer(path: Path | str) -> Any:
    """The tokenizer in a model folder, from local files and without code of the model; raises Refusal."""
    path = Path(path)
    if not path.is_dir():
        raise Refusal(f"There is no model folder {path.name}.", "model_path")
    path = tokenizer_folder(path)
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except Exception as error:
        # the Rust library raises the bare class for a broken tokenizer.json, hence the width
        # the strict dataclass error is of config.json, which says what tokenizer it is
        broken = (OSError, ValueError, LookupError, TypeError, AttributeError, ImportError, StrictDataclassError)
        if type(error) is not Exception and not isinstance(error, broken):
            raise
        told = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
        first = told.splitlines()[0][:200]
        # the doctor tells a config.json that is at fault from a tokenizer's own files
        cause = error if isinstance(error, StrictDataclassError) else None
        said = f"The tokenizer of {path.name} cannot be loaded: {first.rstrip('.')}."
        raise Refusal(said, "model_path") from cause


def build_cache(request: TokenRequest, root: Path, progress: Progress) -> Path:
    """Make the cache of `request` in `root` unless it is there, and return its folder.

    `progress(rows done, rows in all)`. Written beside and renamed when complete; a second builder of the same
    cache waits for the first. Raises Refusal: a file or model that cannot be read, no usable row, or rows too
    long where that is to refuse.
    """
    scans = [scan(path) for path in request.files]
    if not scans:
        raise Refusal("No data file is chosen.", "data.dataset_path")
    key = request.key_of(scans)
    root.mkdir(parents=True, exist_ok=True)
    lock = FileLock(root / f".{key}.lock")
    while not lock.acquire({"pid": os.getpid()}):
        progress(0, sum(each.rows for each in scans))
    try:
        target = root / key
        if target.exists():
            try:
                return TokenCache.open(target).path
            except Refusal:
                shutil.rmtree(target)
        for left_over in root.glob(f".{key}.*.tmp"):  # of a builder that was killed: nobody else holds the lock
            shutil.rmtree(left_over)
        staging = root / f".{key}.{secrets.token_hex(4)}.tmp"
        staging.mkdir()
        try:
            about: dict[str, Any] = dict(
                identity(request.model_path, request.profile, request.profiles_root, request.chat_template)
            )
            about |= {"columns": request.mappings()}
            Builder(request, load_tokenizer(request.model_path), staging, scans, about).run(key, progress)
            os.rename(staging, target)
        except OSError as error:
            raise Refusal(f"The tokens could not be written: {error.strerror}. Nothing was changed.") from None
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        fsync_dir(root)
        return target
    finally:
        lock.release()


def tokenizer_files(model: Path) -> list[Path]:
    """The files in a model folder that its tokenizer and chat template are made of; raises Refusal for none."""
    folder = tokenizer_folder(model)
    found = [folder / name for name in _TOKENIZER_FILES if (folder / name).is_file()]
    if not found:
        raise Refusal(f"{model.name} has no tokenizer files.", "model_path")
    return found


def identity(model: str, profile: str | None, user_root: str | None, chat_template: str) -> dict[str, str]:
    """What a cache's tokens hang on besides data and settings, as hashes; stands in cache.json. Raises Refusal."""
    return {
        "tokenizer": _tokenizer_digest(Path(model)),
        "profile_source": _profile_digest(profile, user_root),
        "template_choice": chat_template,
    }


def _tokenizer_digest(model: Path) -> str:
    digest = hashlib.sha256()
    for path in tokenizer_files(model):
        digest.update(f"{path.name}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    try:
        kind = read_json(model / "config.json").get("model_type")
    except (OSError, ValueError, AttributeError):
        kind = None  # the tokenizer's own files decide then
    return digest.hexdigest() + str(kind)


def _profile_digest(name: str | None, user_root: str | None) -> str:
    """A hash of the profile's source: our package, whose files share helpers, and a user's own file."""
    if name is None:
        return ""
    sources = sorted(Path(profiles.__file__).parent.glob("*.py"))
    own = Path(user_root) / f"{name}.json" if user_root else None
    if own is not None and own.is_file():
        sources.append(own)
    digest = hashlib.sha256()
    for path in sources:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()
