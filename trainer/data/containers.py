"""What a data file is, seen from its first bytes: JSON Lines, JSON, CSV, TSV, Parquet or prose, packed by gzip or not.

Owns the order in which that is decided and the reason that is told. A container gives records: (line, the row's bytes or
its values by column, fault or None). Called by trainer.data.formats.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, BinaryIO

from trainer.data import csv_text, json_list, mapping, parquet
from trainer.data.gunzip import Gunzip
from trainer.data.problems import Fault
from trainer.data.shapes import shape_of

MAX_LINE_BYTES = 8 * 1024 * 1024
HEAD_BYTES = 1024 * 1024

Record = tuple[int, bytes | dict[str, Any], Fault | None]
Records = Callable[[int], Iterator[Record]]

FOREIGN_STARTS = (
    (b"\xff\xfe", "UTF-16 text; save it as UTF-8, or use the repaired copy"),
    (b"\xfe\xff", "UTF-16 text; save it as UTF-8, or use the repaired copy"),
    (b"\x1f\x8b", "a gzip archive inside another; unpack it once"),
    (b"PK\x03\x04", "a zip archive; unpack it first"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive; unpack it first"),
    (b"BZh", "a bzip2 archive; unpack it first"),
    (b"\xfd7zXZ", "an xz archive; unpack it first"),
    (b"ARROW1", "an Arrow file; export it as Parquet or JSON Lines"),
    (b"PAR1", "a Parquet file inside an archive; unpack it first"),
)
BOM = b"\xef\xbb\xbf"
# keys and columns that rows of the shapes we know are made of
ROW_KEYS = (
    "messages", "conversations", "text", "instruction", "input", "output", "system", "history", "prompt", "completion",
    "tools", "functions",
)  # fmt: skip
_FIRST_KEY = re.compile(rb'\s*\{\s*"((?:[^"\\]|\\.)*)"\s*:')


@dataclass(frozen=True)
class Container:
    """A file's outer form: its name ("JSON Lines, gzip"), why it is that, and its records from a row on (from 0).

    `unit` is what a record's number counts: a line of the file, or a row. `prose` is True for one plain text.
    """

    name: str
    reason: str
    records: Records
    unit: str = "line"
    prose: bool = False
    rows: int | None = None
    file: BinaryIO | None = field(default=None, compare=False)


def find(name: str, file: io.BufferedReader, mapped: Sequence[str] = ()) -> Container:
    """What `file`, called `name`, is; it stands at its beginning. `mapped` are columns that a mapping names.

    Raises Fault with the code "wrong_format", "damaged" or "too_large" for what cannot be read at all.
    """
    path = PurePath(name.lower())
    packed = file.peek(2).startswith(b"\x1f\x8b")
    if packed:
        file = io.BufferedReader(Gunzip(file), HEAD_BYTES)
        path = path.with_suffix("") if path.suffix in (".gz", ".gzip") else path
    head = file.peek(HEAD_BYTES)
    if head.startswith(b"PAR1") and not packed:
        return _parquet(file, mapped)
    if foreign := foreign_start(head):
        raise Fault("wrong_format", f"the file is {foreign}")
    if head.startswith(BOM):
        file.read(len(BOM))
        head = head.removeprefix(BOM)
    found = _text(path.suffix, head, file)
    return _named(found, packed)


def _named(found: Container, packed: bool) -> Container:
    if not packed:
        return found
    reason = f"packed by gzip; inside, {found.reason}"
    return Container(f"{found.name}, gzip", reason, found.records, found.unit, found.prose, found.rows, found.file)


def _text(suffix: str, head: bytes, file: io.BufferedReader) -> Container:
    first = _first_line(head)
    if suffix == ".txt" and _is_prose(first):
        return Container(
            "plain text", "the name ends in .txt and the first line is no row", _none, prose=True, file=file
        )
    start = head.lstrip()[:1]
    if start == b"[" and (suffix == ".json" or re.match(rb"\[\s*(\{|$)", first)):
        return _json(file, "the file is one list in square brackets")
    if start == b"{" and (reason := _one_object(suffix, head, first)):
        if _first_key(head) in ROW_KEYS:
            return Container("JSON", "the file is one object, which is a row", lambda skip: _one_row(file, skip))
        return _json(file, reason)
    if start not in (b"{", b"["):
        if reason := _csv_reason(suffix, first):
            return _csv(file, csv_text.delimiter_of(first.decode("utf-8", "replace"), suffix), reason)
    return Container("JSON Lines", "each line is an object of its own", lambda skip: _lines(file, skip))


def foreign_start(head: bytes) -> str | None:
    """What a file that begins so is, where it is of a kind that is not read; None where it may be text."""
    if what := next((what for start, what in FOREIGN_STARTS if head.startswith(start)), None):
        return what
    if head[:2] in (b"{\x00", b"[\x00", b"\x00{", b"\x00["):
        return "UTF-16 text; save it as UTF-8, or use the repaired copy"
    return None


def _none(skip: int) -> Iterator[Record]:
    return iter(())


def _first_line(head: bytes) -> bytes:
    """The first line that is not blank, or what of it stands in `head`."""
    return next((line for line in head.split(b"\n", 64) if line.strip()), b"").strip()


def _is_prose(first: bytes) -> bool:
    try:
        value = json.loads(first) if first.startswith(b"{") else None
    except (ValueError, RecursionError):
        return True
    return shape_of(value) is None


def _one_object(suffix: str, head: bytes, first: bytes) -> str | None:
    """Why a file that begins with { is one object, not lines of objects; None where it is lines."""
    if first == b"{":
        return "the file is one object over several lines"
    if suffix != ".json" or (b"\n" not in head.lstrip() and _first_key(head) in ROW_KEYS):
        return None  # one line, which is a row
    try:
        whole = isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        whole = False
    rest = head[head.find(first) + len(first) :]
    if whole and (rest.strip() or _first_key(first) in ROW_KEYS):
        return None
    return "the file is one object"


def _first_key(head: bytes) -> str:
    found = _FIRST_KEY.match(head)
    return found[1].decode("utf-8", "replace") if found else ""


def _csv_reason(suffix: str, first: bytes) -> str | None:
    """Why a file is CSV: its name says so, or its first line names columns that rows are made of; None for no CSV."""
    if suffix in (".csv", ".tsv"):
        return f"the name ends in {suffix}"
    try:
        line = first.decode("utf-8")
        names = {name.strip().lower() for name in next(csv.reader([line], delimiter=csv_text.delimiter_of(line)))}
    except (UnicodeDecodeError, csv.Error, StopIteration):
        return None
    known = {*ROW_KEYS, *(name for part in mapping.NAMES.values() for name in part)}
    return "the first line names columns" if len(names) > 1 and len(names & known) > 1 else None


def _csv(file: BinaryIO, delimiter: str, reason: str) -> Container:
    name = "TSV" if delimiter == "\t" else "CSV"
    told = f"{reason}; columns are parted by {csv_text.DELIMITERS[delimiter]}"

    def records(skip: int) -> Iterator[Record]:
        rows = csv_text.Rows(file, delimiter, MAX_LINE_BYTES)
        return (record for number, record in enumerate(rows) if number >= skip)

    return Container(name, told, records)


def _json(file: BinaryIO, reason: str) -> Container:
    def records(skip: int) -> Iterator[Record]:
        for number, (line, raw, fault) in enumerate(json_list.elements(file, MAX_LINE_BYTES)):
            if number >= skip:
                yield line, raw, fault

    return Container("JSON", reason, records)


def _one_row(file: BinaryIO, skip: int) -> Iterator[Record]:
    if skip:
        return
    raw = file.read(MAX_LINE_BYTES + 1)
    line = 1 + raw[: len(raw) - len(raw.lstrip())].count(b"\n")
    limit = MAX_LINE_BYTES // 1024**2
    yield (
        line,
        raw,
        Fault("line_too_long", f"the row is longer than {limit} MiB") if len(raw) > MAX_LINE_BYTES else None,
    )


def _parquet(file: BinaryIO, mapped: Sequence[str]) -> Container:
    rows = parquet.Rows(file, MAX_LINE_BYTES, [*ROW_KEYS, *mapped])
    return Container("Parquet", "the file begins and ends with PAR1", rows.from_row, unit="row", rows=rows.rows)


def _lines(file: BinaryIO, skip: int) -> Iterator[Record]:
    """Every line that is not blank; a longer one than allowed comes as its beginning with a fault."""
    line = index = 0
    limit = MAX_LINE_BYTES
    while raw := file.readline(limit + 1):
        line += 1
        too_long = len(raw) > limit and not raw.endswith(b"\n")
        rest = raw
        while too_long and rest and not rest.endswith(b"\n"):
            rest = file.readline(1024 * 1024)
        if not raw.strip():
            continue
        if index >= skip:
            fault = Fault("line_too_long", f"the line is longer than {limit // 1024**2} MiB") if too_long else None
            yield line, raw[:1024] if too_long else raw, fault
        index += 1
