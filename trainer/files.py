"""Durable small files: write beside, fsync, rename, fsync the directory. Nothing is edited in place."""

from __future__ import annotations

import json
import os
import re
import secrets
from pathlib import Path
from typing import Any

from trainer.refusal import Refusal

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def fsync_dir(path: Path) -> None:
    """Make a rename or unlink inside `path` survive power loss."""
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_whole(fd: int, content: bytes) -> None:
    """Write all of `content`; where the disk fills up in the middle, cut the piece off again and raise OSError."""
    start = os.fstat(fd).st_size
    written = 0
    try:
        while written < len(content):
            written += os.write(fd, content[written:])
    except OSError:
        if written:
            os.ftruncate(fd, start)
        raise


def write_bytes(path: Path, content: bytes) -> None:
    """Replace `path` by `content` in one step; a reader sees the old or the new file, never half of one."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_dir(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as readable JSON; NaN and infinity are refused, since no other reader would take them."""
    text = json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False) + "\n"
    write_bytes(path, text.encode("utf-8", "surrogatepass"))


def read_json(path: Path) -> Any:
    """Read a JSON file of ours; raises FileNotFoundError, or ValueError when it is not JSON."""
    try:
        return json.loads(path.read_bytes())
    except (UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path.name} is not readable as JSON: {error}") from None


def make_private_dir(path: Path) -> Path:
    """Create `path` and its parents, to survive power loss; `path` itself is readable by its owner alone."""
    if not path.is_dir():
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        fsync_dir(path.parent)
    return path


def child(root: Path, name: str) -> Path:
    """`root/name` for a plain name given by a person; anything that could leave `root` raises Refusal."""
    if not NAME.fullmatch(name):
        raise Refusal(f"'{name[:80]}' is not a usable name. Use letters, digits, dot, dash and underscore, 64 at most.")
    return root / name
