"""CSV and TSV: rows as the standard library's csv module reads them, each with the line where it begins.

The first row names the columns. A quote that is never closed ends at a limit, not at the end of memory.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator
from typing import BinaryIO

from trainer.data.problems import Fault, shown
from trainer.data.strict import decoded

Record = tuple[int, bytes | dict[str, str], Fault | None]

DELIMITERS = {",": "commas", "\t": "tabs", ";": "semicolons"}
MAX_COLUMNS = 1000


def delimiter_of(first_line: str, suffix: str = "") -> str:
    """What parts the columns: the one that makes most of them in the first line; for one column what the name says."""
    sizes = {mark: len(next(csv.reader([first_line], delimiter=mark), [])) for mark in DELIMITERS}
    best = max(sizes, key=lambda mark: sizes[mark])
    return best if sizes[best] > 1 else "\t" if suffix == ".tsv" else ","


class Rows:
    """The rows of a CSV file; `limit` bounds one row in bytes. `columns` is known once the first row was read."""

    def __init__(self, file: BinaryIO, delimiter: str, limit: int) -> None:
        self.columns: list[str] = []
        self._file = file
        self._delimiter = delimiter
        self._limit = limit
        self._line = 0  # lines read so far
        self._raw: list[bytes] = []  # those of the row that is being read
        self._size = 0
        csv.field_size_limit(max(csv.field_size_limit(), limit))  # the library's own limit is 128 KiB

    def __iter__(self) -> Iterator[Record]:
        reader = self._reader()
        while True:
            begins = self._line + 1
            self._raw, self._size = [], 0
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                reader = self._reader()
                yield begins, b"".join(self._raw)[:1024], Fault("bad_csv", self._words(error, begins))
                continue
            except Fault as fault:
                reader = self._reader()
                yield begins, b"".join(self._raw)[:1024], fault
                continue
            if not fields or (len(fields) == 1 and len(self.columns) != 1 and not fields[0].strip()):
                continue  # a blank line; one of delimiters alone is a row, though an empty one
            if self.columns:
                yield begins, *self._row(fields)
                continue
            try:
                self.columns = self._names(fields)
            except Fault as fault:  # without names no row can be read
                yield begins, b"".join(self._raw)[:1024], fault
                return

    def _reader(self) -> Iterator[list[str]]:
        return csv.reader(self._lines(), delimiter=self._delimiter, strict=True)

    def _lines(self) -> Iterator[str]:
        while raw := self._file.readline(self._limit + 1):
            self._line += 1
            self._size += len(raw)
            self._raw.append(raw)
            if self._size > self._limit:
                ended = raw.endswith(b"\n")
                while not ended and (rest := self._file.readline(1024 * 1024)):
                    ended = rest.endswith(b"\n")
                if len(self._raw) == 1:
                    raise Fault("line_too_long", f"the row is longer than {self._limit // 1024**2} MiB")
                reason = f"a quote is opened and not closed within {self._limit // 1024**2} MiB"
                raise Fault("bad_csv", f"{reason}; lines up to {self._line:,} were passed over with it")
            # a byte that is no UTF-8 becomes half a surrogate, which _row finds
            yield raw.decode("utf-8", "surrogateescape")

    def _words(self, error: csv.Error, begins: int) -> str:
        said = str(error).rstrip(".")
        if "unexpected end of data" in said:
            over = f"; lines up to {self._line:,} were passed over with it" if self._line > begins else ""
            return f"a quote is opened and never closed{over}"
        return f"bad CSV: {said}"

    def _names(self, fields: list[str]) -> list[str]:
        names = [field.strip() for field in fields]
        twice = next((name for name, number in Counter(names).items() if number > 1), None)
        if twice is not None:
            raise Fault("columns", f"the first row names the column {shown(twice)} twice")
        if len(names) > MAX_COLUMNS:
            raise Fault("columns", f"the first row names {len(names):,} columns; {MAX_COLUMNS:,} are allowed")
        return names

    def _row(self, fields: list[str]) -> tuple[bytes | dict[str, str], Fault | None]:
        raw = b"".join(self._raw)
        if len(fields) != len(self.columns):
            named = f"the first row names {len(self.columns):,}"
            return raw[:1024], Fault("columns", f"the row has {len(fields):,} fields; {named}")
        if not raw.isascii():
            try:
                raw.decode("utf-8")  # what is half a surrogate in the fields was no UTF-8 in the file
            except UnicodeDecodeError:
                return raw[:1024], _not_utf8(raw)
        return dict(zip(self.columns, fields, strict=True)), None


def _not_utf8(raw: bytes) -> Fault:
    try:
        decoded(raw)
    except Fault as fault:
        return fault
    raise AssertionError("called for bytes that are no UTF-8")
