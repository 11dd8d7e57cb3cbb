"""Judges one safetensors file by its header and size alone: no weights are read, no torch is imported.

The verdict equals that of the safetensors library (0.8, `safetensors/src/tensor.rs`,
`SafeTensors::read_metadata`) on every file, with one difference: duplicate JSON keys are refused here, since
the library silently takes the last of them. Called by `trainer.models.weights`; `tests/test_headers.py`
compares both on thousands of damaged files.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

MAX_HEADER_BYTES = 100_000_000
LENGTH_BYTES = 8
MAX_DEPTH = 127
U64_MAX = 2**64 - 1
DTYPE_BITS: dict[str, int] = {
    "F4": 4,
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("C64", "F64", "I64", "U64"), 64),
}
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


class BadHeader(ValueError):
    """A file that the library would not load. `code` is a stable word; the text is a clause for a
    sentence."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.text = text


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `begin` and `end` are bytes from the start of the data, not of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def elements(self) -> int:
        """How many numbers the tensor holds."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """A header that was judged good; `data_start` is the byte of the file at which the data begins."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    data_start: int
    file_bytes: int


def open_regular(path: Path) -> BinaryIO:
    """Open a plain file for reading; raises BadHeader for a pipe, device or folder instead of waiting on
    it."""
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise BadHeader("not_a_file", "is not a plain file")
        return os.fdopen(fd, "rb")
    except BaseException:
        os.close(fd)
        raise


def read_header(path: Path) -> Header:
    """Read and judge the header of `path`; raises BadHeader with its cause, OSError when it cannot be
    read."""
    with open_regular(path) as file:
        file_bytes = os.fstat(file.fileno()).st_size
        start = file.read(LENGTH_BYTES)
        if file_bytes == 0:
            raise BadHeader("empty_file", "is empty (0 bytes)")
        if len(start) < LENGTH_BYTES:
            raise BadHeader("too_short", f"has only {len(start)} bytes, too few for a safetensors file")
        length = int.from_bytes(start, "little")
        if length > MAX_HEADER_BYTES:
            raise BadHeader(
                "header_too_large", f"names a header of {length:,} bytes; the limit is {MAX_HEADER_BYTES:,}"
            )
        if length > file_bytes - LENGTH_BYTES:
            raise BadHeader("truncated", f"ends inside its header ({file_bytes:,} bytes of {length + LENGTH_BYTES:,})")
        raw = file.read(length)
    return judge(raw, file_bytes)


def judge(raw: bytes, file_bytes: int) -> Header:
    """Judge the header's bytes `raw` of a file that is `file_bytes` long; raises BadHeader."""
    entries = _parse(raw)
    metadata = _metadata(entries.pop("__metadata__", None))
    tensors = {name: _tensor(name, value) for name, value in entries.items()}
    data_start = LENGTH_BYTES + len(raw)
    data_bytes = _layout(tensors)
    missing = data_start + data_bytes - file_bytes
    if missing > 0:
        raise BadHeader("truncated", f"is cut off: {missing:,} of {data_start + data_bytes:,} bytes are missing")
    if missing < 0:
        raise BadHeader("trailing_bytes", f"has {-missing:,} bytes that belong to no tensor")
    return Header(tensors, metadata, data_start, file_bytes)


def _parse(raw: bytes) -> dict[str, Any]:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadHeader("bad_utf8", f"has a header that is not UTF-8 (byte {error.start})") from None
    try:
        entries = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_int=_integer,
            parse_float=_real,
            parse_constant=_constant,
        )
    except RecursionError:
        raise BadHeader("bad_json", "has a header nested too deep") from None
    except json.JSONDecodeError as error:
        raise BadHeader("bad_json", f"has a header that is not JSON ({error.msg}, character {error.pos})") from None
    if not isinstance(entries, dict):
        raise BadHeader("bad_json", "has a header that is not a JSON object")
    if _SURROGATE_ESCAPE.search(text) and _has_lone_surrogate(entries):
        raise BadHeader("bad_json", "has half a character (a lone surrogate) in its header")
    if _depth(entries) > MAX_DEPTH:
        raise BadHeader("bad_json", f"has a header nested deeper than {MAX_DEPTH} levels")
    return entries


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise BadHeader("duplicate_key", f"names '{twice[:120]}' twice in its header")
    return result


def _integer(text: str) -> int | float:
    # serde_json reads -0 and whatever exceeds 64 bits as a real number, which no size or offset may be
    if text == "-0" or len(text) > 20 or abs(int(text)) > U64_MAX:
        return _real(text)
    return int(text)


def _real(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise BadHeader("bad_json", "has a number out of range in its header")
    return value


def _constant(text: str) -> Any:
    raise BadHeader("bad_json", f"has {text} in its header, which is not JSON")


def _children(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level:
        level = [item for item in level if isinstance(item, dict | list)]
        depth += bool(level)
        level = [child for item in level for child in _children(item)]
    return depth


def _has_lone_surrogate(value: Any) -> bool:
    pending = [value]
    while pending:
        item = pending.pop()
        texts = list(item) if isinstance(item, dict) else [item] if isinstance(item, str) else []
        if any("\ud800" <= character <= "\udfff" for text in texts for character in text):
            return True
        pending.extend(_children(item))
    return False


def _metadata(value: Any) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise BadHeader("bad_metadata", "has '__metadata__' that is not a table of texts")
    return value


def _tensor(name: str, value: Any) -> TensorInfo:
    fields = ("dtype", "shape", "data_offsets")
    if isinstance(value, list) and len(value) == len(fields):  # the library takes the positional form too
        value = dict(zip(fields, value, strict=True))
    if not isinstance(value, dict) or any(field not in value for field in fields):
        raise BadHeader("bad_tensor", f"describes tensor '{name[:120]}' without dtype, shape and data_offsets")
    dtype, shape, offsets = (value[field] for field in fields)
    if isinstance(dtype, dict) and len(dtype) == 1 and next(iter(dtype.values())) is None:
        dtype = next(iter(dtype))  # {"F32": null}: serde's long form of a plain variant
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise BadHeader("unknown_dtype", f"gives tensor '{name[:120]}' the unknown dtype {str(dtype)[:40]!r}")
    if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2:
        raise BadHeader("bad_tensor", f"describes tensor '{name[:120]}' with a shape or offsets that are not sizes")
    return TensorInfo(dtype, tuple(shape), offsets[0], offsets[1])


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _layout(tensors: dict[str, TensorInfo]) -> int:
    """Check that the tensors lie one after the other without hole or overlap; returns the bytes they
    cover."""
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        label = f"tensor '{name[:120]}'"
        if tensor.begin < end:
            raise BadHeader("overlap", f"has {label} lying over another one (bytes {tensor.begin:,} to {end:,})")
        if tensor.begin > end:
            raise BadHeader("hole", f"has {tensor.begin - end:,} unclaimed bytes before {label}")
        if tensor.end < tensor.begin:
            raise BadHeader("bad_offsets", f"has {label} ending before it begins")
        if tensor.end - tensor.begin != _tensor_bytes(label, tensor):
            size = tensor.end - tensor.begin
            raise BadHeader("shape_bytes", f"gives {label} {size:,} bytes; its shape needs another number")
        end = tensor.end
    return end


def _tensor_bytes(label: str, tensor: TensorInfo) -> int:
    elements = 1
    for size in tensor.shape:
        elements *= size
        if elements > U64_MAX:
            raise BadHeader("overflow", f"has {label} whose shape exceeds 64 bits")
    bits = elements * DTYPE_BITS[tensor.dtype]
    if bits > U64_MAX:
        raise BadHeader("overflow", f"has {label} whose size exceeds 64 bits")
    if bits % 8:
        raise BadHeader("shape_bytes", f"has {label} that does not end on a whole byte")
    return bits // 8
