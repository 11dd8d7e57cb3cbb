"""Rows that say the same: twice in one file, or in the training data and the held-out file, where they spoil the measure.

Eight bytes of hash and eight of line number a row, so that millions fit. Called by the doctor.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from trainer.data.formats import Row, read_rows

ROWS_WATCHED = 4_000_000
PAIRS_LISTED = 200
_WORD = re.compile(r"\w+")


def _parts(row: Row) -> Iterable[tuple[str, str]]:
    if row.messages is None:
        return (("text", row.text or ""),)
    return ((message["role"], message["content"]) for message in row.messages)


class Marks:
    """The marks of rows and their lines. `loosely`: case, spacing and punctuation make no difference."""

    def __init__(self, loosely: bool = False) -> None:
        self._loosely = loosely
        self._marks = array("Q")
        self._lines = array("Q")

    def add(self, row: Row) -> None:
        """Remember a usable row; beyond ROWS_WATCHED nothing is remembered."""
        if len(self._marks) >= ROWS_WATCHED:
            return
        self._marks.append(self.of(row, self._loosely))
        self._lines.append(row.line)

    @staticmethod
    def of(row: Row, loosely: bool = False) -> int:
        """The mark of a usable row: 64 bits of a hash over roles and contents."""
        digest = blake2b(digest_size=8)
        for role, text in _parts(row):
            content = (" ".join(_WORD.findall(text.casefold())) if loosely else text).encode()
            digest.update(b"%s %d " % (role.encode(), len(content)) + content)
        return int.from_bytes(digest.digest(), "big")

    def repeated(self) -> tuple[int, list[tuple[int, int]]]:
        """(how many rows say what an earlier one says, the first of them as (line, line of the earliest))."""
        marks = np.frombuffer(self._marks, np.uint64)
        if len(marks) < 2:
            return 0, []
        order = np.argsort(marks, kind="stable")
        again = np.flatnonzero(marks[order[1:]] == marks[order[:-1]]) + 1
        count = len(again)
        later = np.sort(order[again])[:PAIRS_LISTED]
        first = {}
        lines = self._lines
        wanted = {self._marks[at] for at in later}
        for at, mark in enumerate(self._marks):
            if mark in wanted:
                first[mark] = lines[at]
                wanted.discard(mark)
                if not wanted:
                    break
        return count, [(lines[at], first[self._marks[at]]) for at in later]

    def shared(self, others: Marks) -> dict[int, int]:
        """{line of the other file: line of this one} for every row of the other that stands here too."""
        here = np.frombuffer(self._marks, np.uint64)
        there = np.frombuffer(others._marks, np.uint64)
        both = np.isin(there, here)
        wanted = {others._marks[at] for at in np.flatnonzero(both)}
        line_of = {mark: self._lines[at] for at, mark in enumerate(self._marks) if mark in wanted}
        return {others._lines[at]: line_of[others._marks[at]] for at in np.flatnonzero(both)}


class Leakage:
    """Which rows of a held-out file stand in the training data; the training rows are added one by one."""

    def __init__(self, held_out: Path | str, columns: list[str] | None) -> None:
        self._name = Path(held_out).name
        self._exact, self._loose = Marks(), Marks(loosely=True)
        self._theirs = Marks(), Marks(loosely=True)
        self._rows = 0
        for row in _usable(read_rows(held_out, columns=columns)):
            self._rows += 1
            for marks in self._theirs:
                marks.add(row)

    def add(self, row: Row) -> None:
        """Remember a usable row of the training data."""
        self._exact.add(row)
        self._loose.add(row)

    def warnings(self) -> list[dict[str, Any]]:
        """One warning where rows are shared, with pairs of lines; none where there are none."""
        exact = self._exact.shared(self._theirs[0])
        loose = self._loose.shared(self._theirs[1])
        if not loose and not exact:
            return []
        both = loose | exact
        same, near = len(exact), len(both) - len(exact)
        kinds = [f"{same:,} word for word"] * bool(same) + [f"{near:,} but for case, spacing or punctuation"] * bool(
            near
        )
        text = (
            f"{len(both):,} of {self._rows:,} held-out rows stand in the training data too ({', '.join(kinds)}): held-out "
            f"loss will look better than it is. Take them out of {self._name}."
        )
        lines = [
            f"Line {here:,} of the training data is line {there:,} of {self._name}"
            + ("." if there in exact else ", but for case, spacing or punctuation.")
            for there, here in sorted(both.items())[:PAIRS_LISTED]
        ]
        return [{"code": "leakage", "count": len(both), "message": text, "lines": lines}]


def _usable(rows: Iterator[Row]) -> Iterator[Row]:
    return (row for row in rows if row.problem is None)
