"""The strict reader of data files: JSON Lines, or one plain text in a file that ends in .txt.

A line holds a conversation, `{"messages": [{"role", "content"}, ...]}`, or a document, `{"text": "..."}`. A .txt file
is one document as it stands, unless its first line is such a JSON object: then it is read as JSON Lines.

Owns how a data file is opened and cut into rows. Streaming: one line, or one text, of bounded size is in memory. Called
by the doctor, the token cache and the worker's previews. Standard library only.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO

from trainer.data.conversation import Fault, parse_document, parse_row
from trainer.refusal import Refusal

MAX_LINE_BYTES = 8 * 1024 * 1024
MAX_TEXT_BYTES = 64 * 1024 * 1024

_FOREIGN_STARTS = (
    (b"\xff\xfe", "UTF-16 text; save it as UTF-8"),
    (b"\xfe\xff", "UTF-16 text; save it as UTF-8"),
    (b"\x1f\x8b", "a gzip archive; unpack it first"),
    (b"PK\x03\x04", "a zip archive; unpack it first"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive; unpack it first"),
    (b"PAR1", "a Parquet file; export it as JSON Lines"),
    (b"ARROW1", "an Arrow file; export it as JSON Lines"),
)


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a row cannot be used: a code of PROBLEM_NAMES and a sentence that names the line."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Row:
    """One non-blank line, or a whole .txt file. `line` counts from 1 over all lines, `index` from 0 over non-blank ones.

    Exactly one of `messages` (dicts with "role" and "content"), `text` (a document) and `problem` is set.
    """

    line: int
    index: int
    messages: list[dict[str, str]] | None
    problem: Problem | None
    text: str | None = None


class Tally:
    """Size and hash of the bytes a reader took in, complete once the reader is exhausted."""

    def __init__(self) -> None:
        self.bytes = 0
        self._sha256 = sha256()

    def add(self, chunk: bytes) -> None:
        """Count `chunk` in."""
        self.bytes += len(chunk)
        self._sha256.update(chunk)

    def hexdigest(self) -> str:
        """The sha256 of all bytes so far, in hex."""
        return self._sha256.hexdigest()


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
    return os.fdopen(fd, "rb", buffering=1024 * 1024)


def read_rows(path: Path | str, *, start: int = 0, tally: Tally | None = None) -> Iterator[Row]:
    """Read the rows of a data file one by one, from row `start` on (earlier ones are counted, not parsed).

    Every non-blank line gives exactly one Row, usable or with its problem, except that a file of a foreign
    format gives one Row with the code "wrong_format" and ends. Raises Refusal when it cannot be read.
    """
    path = Path(path)
    with open_data(path) as file:
        if _is_prose(path, file):
            document = _read_document(file, path.name, tally)
            if document is not None and start == 0:
                yield document
            return
        index = 0
        lines = _lines(file, path.name, tally)
        for line, raw, too_long in lines:
            if line == 1 and (foreign := _foreign_format(raw)):
                yield Row(1, 0, None, Problem("wrong_format", f"Line 1: the file is {foreign}."))
                for _ in lines:  # the rest counts for the tally alone
                    pass
                return
            if not raw.strip():
                continue
            if index >= start:
                yield _row(line, index, raw, too_long)
            index += 1


@dataclass(frozen=True, slots=True)
class Scan:
    """What one pass tells without parsing: rows as `read_rows` counts them, size, sha256 in hex."""

    rows: int
    bytes: int
    sha256: str


def scan(path: Path | str) -> Scan:
    """Count and hash a data file; raises Refusal when it cannot be read."""
    path = Path(path)
    tally = Tally()
    rows = 0
    foreign = False
    with open_data(path) as file:
        if _is_prose(path, file):
            rows = sum(1 for _ in read_rows(path, tally=tally))
            return Scan(rows, tally.bytes, tally.hexdigest())
        for line, raw, _ in _lines(file, path.name, tally):
            foreign = foreign or (line == 1 and _foreign_format(raw) is not None)
            rows += bool(raw.strip())
    return Scan(1 if foreign else rows, tally.bytes, tally.hexdigest())


def _is_prose(path: Path, file: BinaryIO) -> bool:
    """Whether a file is one plain text: it ends in .txt and its first line is no row of JSON Lines."""
    if path.suffix.lower() != ".txt":
        return False
    first = b""
    try:
        while not first.strip() and (first := file.readline(MAX_LINE_BYTES + 1)):
            pass
        file.seek(0)
        value = (
            json.loads(first.removeprefix(b"\xef\xbb\xbf"))
            if first.lstrip(b"\xef\xbb\xbf \t").startswith(b"{")
            else None
        )
    except OSError as error:
        raise Refusal(f"{path.name} could not be read: {error.strerror}.") from None
    except (ValueError, RecursionError):
        return True
    return not (isinstance(value, dict) and ("messages" in value or "text" in value))


def _read_document(file: BinaryIO, name: str, tally: Tally | None) -> Row | None:
    """The whole file as one row; None where there is nothing but white space in it."""
    raw = bytearray()
    too_long = False
    try:
        while chunk := file.read(1024 * 1024):
            if tally:
                tally.add(chunk)
            too_long = too_long or len(raw) + len(chunk) > MAX_TEXT_BYTES
            if not too_long:
                raw += chunk
    except OSError as error:
        raise Refusal(f"{name} could not be read: {error.strerror}.") from None
    if foreign := _foreign_start(bytes(raw[:8])):
        return Row(1, 0, None, Problem("wrong_format", f"Line 1: the file is {foreign}."))
    try:
        if too_long:
            raise Fault("text_too_long", f"the text is larger than {MAX_TEXT_BYTES // 1024**2} MiB")
        content = bytes(raw).removeprefix(b"\xef\xbb\xbf")
        return Row(1, 0, None, None, parse_document(content)) if content.strip() else None
    except Fault as fault:
        return Row(1, 0, None, Problem(fault.code, f"Line 1: {fault.text}."))


def _lines(file: BinaryIO, name: str, tally: Tally | None) -> Iterator[tuple[int, bytes, bool]]:
    """(line number, the line or its first MAX_LINE_BYTES + 1 bytes, whether it was longer than allowed)."""
    line = 0
    try:
        while raw := file.readline(MAX_LINE_BYTES + 1):
            line += 1
            if tally:
                tally.add(raw)
            too_long = len(raw) > MAX_LINE_BYTES and not raw.endswith(b"\n")
            rest = raw
            while too_long and rest and not rest.endswith(b"\n"):
                rest = file.readline(1024 * 1024)
                if tally:
                    tally.add(rest)
            # the mark that Windows editors put before UTF-8 is no part of the text
            yield line, raw.removeprefix(b"\xef\xbb\xbf") if line == 1 else raw, too_long
    except OSError as error:
        raise Refusal(f"{name} could not be read after line {line:,}: {error.strerror}.") from None


def _foreign_start(content: bytes) -> str | None:
    return next((what for start, what in _FOREIGN_STARTS if content.startswith(start)), None)


def _foreign_format(first_line: bytes) -> str | None:
    if what := _foreign_start(first_line):
        return what
    if first_line[:2] in (b"{\x00", b"[\x00", b"\x00{", b"\x00["):
        return "UTF-16 text; save it as UTF-8"
    if first_line.strip() == b"[" or re.match(rb"\s*\[\s*\{", first_line):
        return "one JSON list; JSON Lines is needed, with one conversation on each line"
    return None


def _row(line: int, index: int, raw: bytes, too_long: bool) -> Row:
    try:
        if too_long:
            raise Fault("line_too_long", f"the line is longer than {MAX_LINE_BYTES // 1024**2} MiB")
        found = parse_row(raw)
        return Row(line, index, None, None, found) if isinstance(found, str) else Row(line, index, found, None)
    except Fault as fault:
        return Row(line, index, None, Problem(fault.code, f"Line {line:,}: {fault.text}."))
