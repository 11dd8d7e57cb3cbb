"""The file calls of this process below one folder, counted, recorded, and the n-th of them failed or made the last.

Python's own calls are wrapped where the modules look them up (`os`, `open`); the libraries that write in native code
(safetensors, tokenizers) are covered at their call: fail before, or leave half of the file as a kill would.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

KILLED = 9
# a full disk still lets files be read, renamed and removed
NEEDS_ROOM = frozenset({"create", "write", "fsync", "mkdir", "native"})


@dataclass(frozen=True)
class Op:
    """One call that succeeded: `kind`, the path it named, and what replaying needs (data and offset, target, inode)."""

    kind: str
    path: str
    inode: int = 0
    offset: int = 0
    data: bytes = b""
    target: str = ""


class Raw(io.RawIOBase):
    """A file whose reads and writes go through the wrapped `os`, so that each of them counts when it happens."""

    def __init__(self, fd: int, mode: str, close_fd: bool) -> None:
        self._fd, self._mode, self._close_fd = fd, mode, close_fd
        self.name = fd

    def readable(self) -> bool:
        return "r" in self._mode or "+" in self._mode

    def writable(self) -> bool:
        return "r" not in self._mode or "+" in self._mode

    def seekable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._fd

    def readinto(self, buffer: Any) -> int:
        data = os.read(self._fd, len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def write(self, data: Any) -> int:
        return os.write(self._fd, data)

    def seek(self, offset: int, whence: int = 0) -> int:
        return os.lseek(self._fd, offset, whence)

    def truncate(self, size: int | None = None) -> int:
        size = self.tell() if size is None else size
        os.ftruncate(self._fd, size)
        return size

    def close(self) -> None:
        if not self.closed:
            super().close()
            if self._close_fd:
                os.close(self._fd)


class FileCalls:
    """Counts calls on paths below `root` while installed; call number `at` fails in the way `how`.

    `kill` ends the process there (use it in a forked child), the others raise OSError; a write writes half first. With
    `persist` every later call fails too. `ops` holds what succeeded, for replaying a power loss.
    """

    def __init__(self, root: Path, at: int | None = None, how: str = "kill", persist: bool = False) -> None:
        self._root = os.path.abspath(root)
        self._at, self._how, self._persist = at, how, persist
        self._paths: dict[int, str] = {}
        self.seen = 0
        self.kinds: list[str] = []
        self.ops: list[Op] = []
        self.real = {name: getattr(os, name) for name in CALLS}
        self._real_open = io.open

    @contextmanager
    def installed(self) -> Iterator[FileCalls]:
        """Wrap the calls inside the block."""
        with (
            patch.multiple(os, **{name: getattr(self, f"_{name}") for name in CALLS}),
            patch.object(builtins, "open", self._open_file),
            patch.object(io, "open", self._open_file),
            self._libraries() if "torch" in sys.modules else nullcontext(),
        ):
            yield self

    @contextmanager
    def _libraries(self) -> Iterator[None]:
        """What writes in native code."""
        import safetensors.torch
        from tokenizers import Tokenizer
        from transformers.tokenization_utils_tokenizers import TokenizersBackend

        serialize, save_tokenizer = safetensors.torch.serialize_file, TokenizersBackend._save_pretrained

        def serialize_file(tensors: Any, filename: Any, **more: Any) -> None:
            self._native(os.fspath(filename), lambda path: serialize(tensors, path, **more))

        def save_pretrained(tokenizer: Any, save_directory: Any, **more: Any) -> Any:
            target = os.path.join(save_directory, "tokenizer.json")
            self._native(target, lambda path: Tokenizer.save(tokenizer.backend_tokenizer, path))
            return save_tokenizer(tokenizer, save_directory=save_directory, **more)

        with (
            patch.object(safetensors.torch, "serialize_file", serialize_file),
            patch.object(TokenizersBackend, "_save_pretrained", save_pretrained),
        ):
            yield

    # -- counting and failing

    def _inside(self, path: str | None) -> bool:
        return path is not None and (path == self._root or path.startswith(self._root + os.sep))

    def _place(self, path: Any, dir_fd: int | None = None) -> str | None:
        if isinstance(path, int):
            return self._paths.get(path)
        path = os.fsdecode(path)
        if dir_fd is not None and not os.path.isabs(path):
            base = self._paths.get(dir_fd)
            return os.path.join(base, path) if base is not None else None
        return os.path.abspath(path)

    def _call(self, kind: str, path: str | None, half: Callable[[], None] = lambda: None) -> bool:
        """Count one call; where it is the one to fail, do `half` of it and fail. True where it is to be recorded."""
        if not self._inside(path):
            return False
        self.seen += 1
        self.kinds.append(kind)
        if self._at is None or self.seen < self._at or (self.seen > self._at and not self._persist):
            return True
        if self._how == "ENOSPC" and self.seen > self._at and kind not in NEEDS_ROOM:
            return True
        half()
        if self._how == "kill":
            os._exit(KILLED)
        code = getattr(errno, self._how)
        if kind == "native":  # what safetensors raises; tokenizers raises the bare Exception with the same words
            from safetensors import SafetensorError

            raise SafetensorError(f"Error while serializing: I/O error: {os.strerror(code)} (os error {code})")
        raise OSError(code, os.strerror(code), path)

    def _native(self, path: str, write: Callable[[str], None]) -> None:
        """A library's own write of `path`: whole, or half of it and an error of the library's."""

        def half() -> None:
            write(path)
            self.real["truncate"](path, os.stat(path).st_size // 2)

        if self._call("native", os.path.abspath(path), half):
            write(path)
            content = Path(path).stat()
            with self._real_open(path, "rb") as file:
                data = file.read()
            self.ops += [Op("create", path, content.st_ino), Op("write", path, content.st_ino, 0, data)]
        else:
            write(path)

    # -- the calls

    def _open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        place = self._place(path, dir_fd)
        new = bool(flags & os.O_CREAT) and place is not None and not os.path.lexists(place)
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        recorded = self._call("create" if new else "open" if writes else "open to read", place)
        fd = self.real["open"](path, flags, mode, dir_fd=dir_fd)
        if self._inside(place):
            self._paths[fd] = str(place)
        if recorded and (new or flags & os.O_TRUNC):
            kind = "create" if new else "truncate"
            self.ops.append(Op(kind, str(place), os.fstat(fd).st_ino))
        return fd

    def _close(self, fd: int) -> None:
        self._paths.pop(fd, None)
        self.real["close"](fd)

    def _read(self, fd: int, count: int) -> bytes:
        self._call("read", self._place(fd))
        return self.real["read"](fd, count)

    def _write(self, fd: int, data: Any) -> int:
        content = bytes(data)
        recorded = self._call("write", self._place(fd), lambda: self.real["write"](fd, content[: len(content) // 2]))
        written = self.real["write"](fd, content)
        if recorded:
            end = os.lseek(fd, 0, os.SEEK_CUR)  # after an appending write too
            self.ops.append(Op("write", self._paths[fd], os.fstat(fd).st_ino, end - written, content[:written]))
        return written

    def _ftruncate(self, fd: int, size: int) -> None:
        recorded = self._call("truncate", self._place(fd))
        self.real["ftruncate"](fd, size)
        if recorded:
            self.ops.append(Op("resize", self._paths[fd], os.fstat(fd).st_ino, size))

    def _truncate(self, path: Any, size: int) -> None:
        self._call("truncate", self._place(path))
        self.real["truncate"](path, size)

    def _fsync(self, fd: int) -> None:
        recorded = self._call("fsync", self._place(fd))
        self.real["fsync"](fd)
        if recorded:
            self.ops.append(Op("fsync", self._paths[fd], os.fstat(fd).st_ino))

    def _rename(self, source: Any, target: Any, **more: Any) -> None:
        old, new = self._place(source), self._place(target)
        recorded = self._call("rename", new if self._inside(new) else old)
        self.real["rename"](source, target, **more)
        if recorded:
            self.ops.append(Op("rename", str(old), target=str(new)))

    _replace = _rename

    def _unlink(self, path: Any, *, dir_fd: int | None = None) -> None:
        place = self._place(path, dir_fd)
        recorded = self._call("unlink", place)
        self.real["unlink"](path, dir_fd=dir_fd)
        if recorded:
            self.ops.append(Op("unlink", str(place)))

    _remove = _unlink

    def _mkdir(self, path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        place = self._place(path, dir_fd)
        recorded = self._call("mkdir", place)
        self.real["mkdir"](path, mode, dir_fd=dir_fd)
        if recorded:
            self.ops.append(Op("mkdir", str(place)))

    def _rmdir(self, path: Any, *, dir_fd: int | None = None) -> None:
        place = self._place(path, dir_fd)
        recorded = self._call("rmdir", place)
        self.real["rmdir"](path, dir_fd=dir_fd)
        if recorded:
            self.ops.append(Op("rmdir", str(place)))

    def _listdir(self, path: Any = ".") -> list[str]:
        self._call("list", self._place(path))
        return self.real["listdir"](path)

    def _open_file(
        self,
        file: Any,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        closefd: bool = True,
        opener: Any = None,
    ) -> Any:
        """`open`, on top of the wrapped calls for files inside the folder."""
        if opener is not None or not self._inside(self._place(file)):
            return self._real_open(file, mode, buffering, encoding, errors, newline, closefd, opener)
        plain = mode.replace("b", "").replace("t", "")
        flags = os.O_RDWR if "+" in plain else os.O_RDONLY if plain == "r" else os.O_WRONLY
        more = {"r": 0, "w": os.O_CREAT | os.O_TRUNC, "a": os.O_CREAT | os.O_APPEND, "x": os.O_CREAT | os.O_EXCL}
        fd = file if isinstance(file, int) else os.open(file, flags | more[plain[0]] | os.O_CLOEXEC, 0o666)
        raw = Raw(fd, plain, closefd)
        if buffering == 0:
            return raw
        both: Any = io.BufferedRandom if "+" in plain else io.BufferedReader if plain == "r" else io.BufferedWriter
        buffered = both(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)


CALLS = tuple(
    name.removeprefix("_")
    for name in (
        "_open", "_close", "_read", "_write", "_ftruncate", "_truncate", "_fsync", "_rename", "_replace", "_unlink",
        "_remove", "_mkdir", "_rmdir", "_listdir",
    )
)  # fmt: skip
