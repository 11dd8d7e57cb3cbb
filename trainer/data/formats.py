"""The one reader of data files: whatever a file is, its rows come out as messages, as a text, or as a problem by line.

JSON Lines, JSON, CSV, TSV, Parquet (trainer.data.containers), rows as messages, ShareGPT, Alpaca, prompt and completion,
texts or through a column mapping (trainer.data.shapes). A .txt file is one document as it stands.

Owns how a data file is opened, hashed and turned into rows. Streaming: one row of bounded size is in memory. Called by the
doctor, the token cache and the worker's previews; nothing behind it knows formats. pyarrow is imported for Parquet alone.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

from trainer.data import containers
from trainer.data.containers import BOM, MAX_LINE_BYTES, Container, Record, foreign_start
from trainer.data.conversation import parse_document
from trainer.data.mapping import Mapping, mapping_of
from trainer.data.problems import Fault, excerpt
from trainer.data.shapes import Found, detect
from trainer.data.strict import parse
from trainer.refusal import Refusal

__all__ = ["MAX_LINE_BYTES", "Format", "Problem", "Row", "Scan", "Tally", "open_data", "read_rows", "scan"]

MAX_TEXT_BYTES = 64 * 1024 * 1024
FIRST_ROWS = 50
FIRST_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a row cannot be used: a code of PROBLEM_NAMES, a sentence that names the line, and a piece of the row."""

    code: str
    message: str
    excerpt: str = ""


@dataclass(slots=True)
class Row:
    """One row of a file, or a whole .txt file. `line` is where it begins, from 1; `index` counts rows from 0.

    In a Parquet file `line` is the row's number. `payload` is what the row was made of, where that was asked for. Exactly
    one of `messages` (dicts with "role" and "content"), `text` (a document) and `problem` is set.
    """

    line: int
    index: int
    messages: list[dict[str, str]] | None
    problem: Problem | None
    text: str | None = None
    payload: bytes | dict[str, Any] | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Format:
    """What a file was found to be: its container, the shape of its rows, and the reasons for both in words."""

    container: str
    reason: str
    shape: str
    mark: str
    unit: str
    mapping: Mapping | None = None
    suggested: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()


class Tally:
    """Size and hash of a file's bytes, complete once the reader is exhausted; and what the file was found to be."""

    def __init__(self) -> None:
        self.bytes = 0
        self.format: Format | None = None
        self._sha256 = sha256()

    def add(self, chunk: bytes | memoryview) -> None:
        """Count `chunk` in."""
        self.bytes += len(chunk)
        self._sha256.update(chunk)

    def hexdigest(self) -> str:
        """The sha256 of all bytes so far, in hex."""
        return self._sha256.hexdigest()


class _Counted(io.RawIOBase):
    """A file whose bytes go into a tally as they are read."""

    def __init__(self, file: BinaryIO, tally: Tally) -> None:
        self._file = file
        self._tally = tally
        self.is_done = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self.is_done:
            return 0
        view = memoryview(buffer).cast("B")
        size = self._file.readinto(view)  # type: ignore[attr-defined]
        self._tally.add(view[:size])
        return size


def open_data(path: Path) -> BinaryIO:
    """Open a data file for reading; raises Refusal unless it is a regular file reached without a link.

    The opened descriptor is what is checked, so a swap in between cannot win; a FIFO does not block.
    """
    wanted = ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY")  # Windows lacks all but the last
    flags = os.O_RDONLY | sum(getattr(os, name, 0) for name in wanted)
    try:
        fd = os.open(path, flags)
    except OSError as error:
        if os.path.islink(path):
            raise Refusal(f"{path.name} is a link. Choose the file it points to.") from None
        raise Refusal(f"{path.name} cannot be opened: {error.strerror}.") from None
    except ValueError:
        raise Refusal("The name of the data file contains a NUL character.") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise Refusal(f"{path.name} is not a regular file. Choose a data file.")
    return os.fdopen(fd, "rb", buffering=0)


def read_rows(
    path: Path | str,
    *,
    start: int = 0,
    tally: Tally | None = None,
    columns: Sequence[str] | None = None,
    keep_payload: bool = False,
) -> Iterator[Row]:
    """Read the rows of a data file one by one, from row `start` on (earlier ones are counted, not parsed).

    `columns` is the mapping to read it with (None or empty: what was saved with the dataset, else what the rows are).
    Every row of the file gives exactly one Row, usable or with its problem, except that a file of a foreign format gives
    one Row with the code "wrong_format", "damaged" or "too_large" and ends. Raises Refusal when it cannot be read.
    """
    path, tally = Path(path), tally or Tally()
    mapping = mapping_of(path, columns)
    with open_data(path) as raw:
        try:
            yield from _rows(path, raw, start, tally, mapping, keep_payload)
        except OSError as error:
            raise Refusal(f"{path.name} could not be read: {error.strerror or error}.") from None


def _rows(path: Path, raw: BinaryIO, start: int, tally: Tally, mapping: Mapping | None, keep: bool) -> Iterator[Row]:
    counted: Any = io.BufferedReader(_Counted(raw, tally), containers.HEAD_BYTES)
    line = 1
    try:
        container = _container(path, raw, counted, tally, mapping)
        if container.prose:
            tally.format = Format(container.name, container.reason, "texts", "one text", container.unit)
            document = _document(container)
            if document is not None and start == 0:
                yield document
        else:
            for row in _shaped(container, start, tally, mapping, keep):
                line = row.line
                yield row
    except Fault as fault:
        # what ends a file early: nothing was given of it yet, or the archive broke behind the row given last
        yield Row(line, 0, None, Problem(fault.code, f"Line {line:,}: {fault.text}."))
    while counted.read(containers.HEAD_BYTES):  # the rest counts for the tally alone
        pass


def _container(path: Path, raw: Any, counted: Any, tally: Tally, mapping: Mapping | None) -> Container:
    mapped = [column for _, column in mapping.columns] if mapping else []
    if not counted.peek(4).startswith(b"PAR1"):
        return containers.find(path.name, counted, mapped)
    # Parquet is read from its end: the bytes are hashed in one go, then the file is read again without the tally
    while counted.read(containers.HEAD_BYTES):
        pass
    counted.raw.is_done = True
    raw.seek(0)
    again: Any = os.fdopen(os.dup(raw.fileno()), "rb")
    return containers.find(path.name, again, mapped)


def _shaped(container: Container, start: int, tally: Tally, mapping: Mapping | None, keep: bool) -> Iterator[Row]:
    """The records as rows; the first ones are looked at before any is given, so that the file's shape is known."""
    records = container.records(0)
    first: list[Record] = []
    ended: Fault | None = None
    try:
        size = 0
        for record in records:
            first.append(record)
            size += len(record[1]) if isinstance(record[1], bytes) else 0
            if len(first) >= FIRST_ROWS or size > FIRST_BYTES:
                break
    except Fault as fault:
        ended = fault
    found = detect([value for record in first if (value := _value_or_none(record)) is not None], mapping)
    tally.format = Format(
        container.name, container.reason, found.name, found.mark, container.unit, found.mapping, found.suggested,
        found.columns,
    )  # fmt: skip
    index, line = 0, 1
    unit = container.unit
    if container.rows is not None and start >= len(first):  # a container that can jump
        first, records, index = [], container.records(start), start
    try:
        for record in first:
            line = record[0]
            if index >= start:
                row = _row(record, index, found, unit)
                if keep:
                    row.payload = record[1]
                yield row
            index += 1
        if ended is not None:
            raise ended
        for record in records:
            line = record[0]
            if index >= start:
                row = _row(record, index, found, unit)
                if keep:
                    row.payload = record[1]
                yield row
            index += 1
    except Fault as fault:
        yield Row(line, index, None, Problem(fault.code, f"{unit.capitalize()} {line:,}: {fault.text}."))


def _value_or_none(record: Record) -> Any:
    _, payload, fault = record
    if fault is not None or not isinstance(payload, bytes):
        return None if fault is not None else payload
    try:
        return parse(payload)
    except Fault:
        return None


def _row(record: Record, index: int, found: Found, unit: str) -> Row:
    line, payload, fault = record
    try:
        if fault is not None:
            raise fault
        content = found.content(parse(payload) if type(payload) is bytes else _decoded_columns(payload))
        return Row(line, index, None, None, content) if type(content) is str else Row(line, index, content, None)  # type: ignore[arg-type]
    except Fault as problem:
        message = f"{unit.capitalize()} {line:,}: {problem.text}."
        return Row(line, index, None, Problem(problem.code, message, excerpt(payload, problem.at)))


def _decoded_columns(payload: bytes | dict[str, Any]) -> Any:
    """A row of columns, in which lists of turns may stand as JSON texts: CSV has no other way."""
    if not isinstance(payload, dict):
        return payload
    for key in ("messages", "conversations"):
        value = payload.get(key)
        if isinstance(value, str) and value.lstrip()[:1] == "[":
            return payload | {key: parse(value.encode("utf-8", "surrogatepass"))}
    return payload


@dataclass(frozen=True, slots=True)
class Scan:
    """What one pass tells without parsing: rows as `read_rows` counts them, size, sha256 in hex."""

    rows: int
    bytes: int
    sha256: str


def scan(path: Path | str) -> Scan:
    """Count and hash a data file; raises Refusal when it cannot be read."""
    path, tally = Path(path), Tally()
    rows = 0
    with open_data(path) as raw:
        counted: Any = io.BufferedReader(_Counted(raw, tally), containers.HEAD_BYTES)
        try:
            container = _container(path, raw, counted, tally, None)
            if container.rows is not None:
                rows = container.rows
            elif container.prose:
                rows = int(_document(container) is not None)
            else:
                for _ in container.records(0):
                    rows += 1
            while counted.read(containers.HEAD_BYTES):
                pass
        except Fault:  # the row that says so
            rows += 1
            while counted.read(containers.HEAD_BYTES):
                pass
        except OSError as error:
            raise Refusal(f"{path.name} could not be read: {error.strerror or error}.") from None
    return Scan(rows, tally.bytes, tally.hexdigest())


def _document(container: Container) -> Row | None:
    """A whole file as one row; None where there is nothing but white space in it."""
    assert container.file is not None
    raw = bytearray()
    too_long = False
    while chunk := container.file.read(1024 * 1024):
        too_long = too_long or len(raw) + len(chunk) > MAX_TEXT_BYTES
        if not too_long:
            raw += chunk
    try:
        if foreign := foreign_start(bytes(raw[:8])):
            raise Fault("wrong_format", f"the file is {foreign}")
        if too_long:
            raise Fault("text_too_long", f"the text is larger than {MAX_TEXT_BYTES // 1024**2} MiB")
        content = bytes(raw).removeprefix(BOM)
        return Row(1, 0, None, None, parse_document(content)) if content.strip() else None
    except Fault as fault:
        return Row(1, 0, None, Problem(fault.code, f"Line 1: {fault.text}.", excerpt(bytes(raw[:400]), fault.at)))
