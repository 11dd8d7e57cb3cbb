"""One JSON list of rows, however large: cut into its elements as it streams by, each with the line where it begins.

The list may be the file itself or the one list of rows inside an object. Only the structure (quotes and brackets) is
looked at here; what an element holds is parsed by trainer.data.strict. One element of bounded size is in memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import BinaryIO

from trainer.data.problems import Fault, shown

Element = tuple[int, bytes, Fault | None]

_CHUNK_BYTES = 256 * 1024
_IN_TEXT = re.compile(rb'[^"\\]*(?:\\.[^"\\]*)*', re.DOTALL)
_STRUCTURE = re.compile(rb'["{}\[\]]')
_BLANK = re.compile(rb"[ \t\r\n]*")
_SCALAR = re.compile(rb"[^,\]} \t\r\n]*")
_OPEN, _CLOSE = b"{[", b"}]"


class JsonText:
    """A stream of JSON with a place in it. `limit` bounds what is kept of one value, in bytes."""

    def __init__(self, file: BinaryIO, limit: int) -> None:
        self._file = file
        self._limit = limit
        self._buffer = b""
        self._at = 0
        self.line = 1

    def peek(self) -> bytes:
        """The next byte that is no white space; b"" at the end."""
        while True:
            self._step(_BLANK.match(self._buffer, self._at).end())  # type: ignore[union-attr]
            if self._at < len(self._buffer):
                return self._buffer[self._at : self._at + 1]
            if not self._more(self._at):
                return b""

    def take(self) -> None:
        """Pass over one byte."""
        self._step(self._at + 1)

    def value(self, keep: bool = True) -> tuple[int, bytes, bool]:
        """(line, the text of the value that begins here, whether it was larger than the limit). Raises Fault."""
        line, first = self.line, self.peek()
        line = self.line
        if first in (b"{", b"["):
            text, too_long = self._to_end(depth=0, keep=keep)
        elif first == b'"':
            text, too_long = self._to_end(depth=None, keep=keep)
        else:
            return line, self._scalar(), False
        return line, text, too_long

    def _scalar(self) -> bytes:
        end = _SCALAR.match(self._buffer, self._at).end()  # type: ignore[union-attr]
        while end == len(self._buffer) and end - self._at < 4096 and self._more(self._at):
            end = _SCALAR.match(self._buffer, self._at).end()  # type: ignore[union-attr]
        end = max(end, self._at + 1)  # a bracket that closes nothing
        text = self._buffer[self._at : end]
        self._step(end)
        return text

    def _to_end(self, depth: int | None, keep: bool) -> tuple[bytes, bool]:
        """Go to the end of an object, list or (depth None) text; its bytes unless they are too many or not wanted."""
        place, in_text, levels = self._at, False, depth or 0
        dropped = not keep
        too_long = False
        while True:
            if in_text:
                place = _IN_TEXT.match(self._buffer, place).end()  # type: ignore[union-attr]
                found = place < len(self._buffer) and self._buffer[place : place + 1] == b'"'
                if found:
                    place, in_text = place + 1, False
            else:
                levels, place, found = self._brackets(levels, place)
                in_text = found and self._buffer[place - 1 : place] == b'"'
            if found:
                if not in_text and levels <= 0:
                    break
                continue
            if place - self._at > self._limit:
                dropped = too_long = True
            before = self._at
            if dropped:
                self._step(place)
            if not self._more(self._at):
                raise Fault("damaged", "the file ends inside a row")
            place = 0 if dropped else place - before
        text = b"" if dropped else self._buffer[self._at : place]
        too_long = too_long or len(text) > self._limit
        self._step(place)
        return (b"" if too_long else text), too_long

    def _brackets(self, levels: int, place: int) -> tuple[int, int, bool]:
        """(levels, place, whether a quote or the last closing bracket stands before it) for what is outside of texts."""
        quote = self._buffer.find(b'"', place)
        end = len(self._buffer) if quote < 0 else quote
        count = self._buffer.count
        closing = count(b"}", place, end) + count(b"]", place, end)
        if closing < levels:  # this cannot be the end: no need to look at each bracket
            levels += count(b"{", place, end) + count(b"[", place, end) - closing
            return levels, min(end + 1, len(self._buffer)), quote >= 0
        while (match := _STRUCTURE.search(self._buffer, place)) is not None:
            mark, place = match.group(), match.end()
            levels += (mark in _OPEN) - (mark in _CLOSE)
            if mark == b'"' or levels <= 0:
                return levels, place, True
        return levels, len(self._buffer), False

    def _step(self, place: int) -> None:
        self.line += self._buffer.count(b"\n", self._at, place)
        self._at = place

    def _more(self, keep_from: int) -> bool:
        """Read on; the buffer then begins with what stood at `keep_from`. False at the end of the file."""
        chunk = self._file.read(_CHUNK_BYTES)
        self._buffer = self._buffer[keep_from:] + chunk
        self._at = 0
        return bool(chunk)


def elements(file: BinaryIO, limit: int) -> Iterator[Element]:
    """(line, raw JSON, fault or None) of every element of the file's list; what is wrong around them comes as a fault."""
    text = JsonText(file, limit)
    try:
        if text.peek() == b"[":
            yield from _list(text)
        else:
            yield from _object(text)
        if text.peek():
            yield text.line, b"", Fault("bad_json", "something stands behind the end of the JSON")
    except Fault as fault:
        yield text.line, b"", fault


def _list(text: JsonText) -> Iterator[Element]:
    text.take()
    if text.peek() == b"]":
        text.take()
        return
    while True:
        line, raw, too_long = text.value()
        yield line, raw, _too_long(text) if too_long else None
        mark = text.peek()
        if mark == b"]":
            text.take()
            return
        if not mark:
            raise Fault("damaged", "the file ends before its list does; rows may be missing")
        if mark == b",":
            text.take()
            if text.peek() == b"]":
                raise Fault("bad_json", "a comma stands behind the last row")
        else:
            yield text.line, b"", Fault("bad_json", "a comma is missing between two rows")


def _object(text: JsonText) -> Iterator[Element]:
    """The elements of the one list of objects in an object; other values are passed over."""
    text.take()
    name = ""
    while (mark := text.peek()) != b"}":
        if mark == b",":
            text.take()
            continue
        if mark != b'"':
            raise Fault("damaged" if not mark else "bad_json", "the object around the rows is not whole")
        key = text.value()[1][1:-1].decode("utf-8", "replace")
        if text.peek() != b":":
            raise Fault("bad_json", f"no value belongs to the key {shown(key)}")
        text.take()
        if text.peek() != b"[":
            text.value(keep=False)
            continue
        rows = _list(text)
        first = next(rows, None)
        if first is None or not first[1].startswith(b"{"):
            for _ in rows:  # a list of something else
                pass
        elif name:
            told = f"there are two lists of rows, {shown(name)} and {shown(key)}; which one is meant is not known"
            raise Fault("wrong_format", told)
        else:
            name = key
            yield first
            yield from rows
    text.take()
    if not name:
        raise Fault("wrong_format", "the JSON object holds no list of rows")


def _too_long(text: JsonText) -> Fault:
    return Fault("line_too_long", f"the row is longer than {text._limit // 1024**2} MiB")
