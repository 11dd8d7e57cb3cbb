"""Reads single files of a foreign model folder without trusting them: plain files inside the folder only, bounded
sizes.

A link is followed when it stays inside the folder, a model root, or the blob store of a hub cache the folder lies in.
Used by the parts of `trainer.models.inspect`; what is wrong with a file is noted once in the findings.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trainer.models.findings import Findings

MAX_JSON_BYTES = 64_000_000
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1"


class ModelFolder:
    """The files of one folder; `names` are its entries, sorted."""

    def __init__(self, path: Path, roots: Sequence[Path], findings: Findings) -> None:
        self.path = path
        self.findings = findings
        self.names = sorted(os.listdir(path))
        self._entries = set(self.names)
        self._judged: dict[str, Path | None] = {}
        own = path.resolve()
        self._allowed = [own, *(root.resolve() for root in roots)]
        if own.parent.name == "snapshots":  # a hub cache keeps the files in blobs/ beside snapshots/
            self._allowed.append(own.parent.parent / "blobs")

    def has(self, name: str) -> bool:
        """Whether the folder has an entry of that name, of whatever kind."""
        return name in self._entries

    def matching(self, accept: Callable[[str], Any]) -> list[str]:
        """The entries that `accept` takes, sorted."""
        return [name for name in self.names if accept(name)]

    def file(self, name: str) -> Path | None:
        """The path of a usable file; None, with a problem noted, when it is not one."""
        if name not in self._judged:
            self._judged[name] = self._judge(name)
        return self._judged[name]

    def size_bytes(self, name: str) -> int:
        """The size of a file that `file` has accepted."""
        return (self.path / name).stat().st_size

    def _judge(self, name: str) -> Path | None:
        path = self.path / name
        problem = self.findings.problem
        again = f"Download {name} again."
        try:
            target = path.resolve(strict=True)
            if not any(target.is_relative_to(root) for root in self._allowed):
                problem(
                    "link_out", name, f"{name} is a link to a place outside the folder", "Put the file itself there."
                )
                return None
            status = target.stat()
            if not stat.S_ISREG(status.st_mode):
                problem("not_a_file", name, f"{name} is not a plain file", "Put the file itself there.")
                return None
            if status.st_size == 0:
                problem("empty_file", name, f"{name} is empty (0 bytes)", again)
                return None
            with target.open("rb") as file:
                start = file.read(len(LFS_POINTER))
        except (FileNotFoundError, RuntimeError):  # RuntimeError: links that lead in a circle
            problem("broken_link", name, f"{name} is a link to nothing", again)
            return None
        except OSError as error:
            problem(
                "unreadable", name, f"{name} cannot be read ({error.strerror})", "Give this user the right to read it."
            )
            return None
        if start == LFS_POINTER:
            message = f"{name} is only a Git LFS pointer ({status.st_size} bytes), not the file itself"
            problem("lfs_pointer", name, message, "Run `git lfs pull` in that folder, or download the file itself.")
            return None
        return target

    def json(self, name: str, limit_bytes: int = MAX_JSON_BYTES, hook: Any = None) -> dict[str, Any] | None:
        """The JSON object in a file; None, with a problem noted, when there is none. `hook` sees each object's
        pairs."""
        path = self.file(name)
        if path is None:
            return None
        if path.stat().st_size > limit_bytes:
            message = f"{name} has {path.stat().st_size:,} bytes; the limit is {limit_bytes:,}"
            self.findings.problem("file_too_large", name, message, f"Download {name} again.")
            return None
        try:
            content = json.loads(path.read_bytes().decode("utf-8"), object_pairs_hook=hook, parse_constant=_constant)
        except (ValueError, RecursionError) as error:
            cause = "nested too deep" if isinstance(error, RecursionError) else str(error)
            self.findings.problem(
                "bad_json", name, f"{name} is not readable as JSON ({cause[:160]})", f"Download {name} again."
            )
            return None
        if not isinstance(content, dict):
            message = f"{name} is not a JSON object"
            self.findings.problem("bad_json", name, message, f"Download {name} again.")
            return None
        return content


def _constant(text: str) -> float:
    # some real configs hold Infinity (a time limit); NaN is never meant
    if text == "NaN":
        raise ValueError("it holds NaN")
    return float(text)
