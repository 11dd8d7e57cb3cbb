"""The repaired copy of a data file: every row that can be trained, as JSON Lines, and a list of the rows that were left out.

Rows are only ever shortened, at whole turns: an unanswered last turn goes, or first turns of the assistant that no question
stands before. No word is invented and none is guessed. The original is only read.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from trainer.data.conversation import checked
from trainer.data.duplicates import Marks
from trainer.data.formats import Row, Tally, open_data, read_rows
from trainer.data.mapping import mapping_of
from trainer.data.problems import PROBLEM_NAMES, Fault
from trainer.data.shapes import turns_of
from trainer.data.strict import parse
from trainer.refusal import Refusal

CHANGES = {
    "trimmed_end": "an unanswered last turn was taken off",
    "trimmed_start": "first turns without a question were taken off",
    "duplicate": "a row that says what an earlier one says was left out",
}
# what a UTF-16 file begins with: its mark, or the first bracket of its JSON
_UTF16 = {
    b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16", b"{\x00": "utf-16-le", b"[\x00": "utf-16-le", b"\x00{": "utf-16-be",
    b"\x00[": "utf-16-be",
}  # fmt: skip
_EXAMPLES = 5


def repair(
    path: Path | str,
    out: Path,
    rejects: Path,
    *,
    columns: Sequence[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write the repaired copy to `out` and the rows left out to `rejects`, one JSON object a line with its reason.

    Both files must be new. Returns {"rows", "kept", "changed", "left_out", "changes": {kind: rows}, "reasons": {code: rows},
    "examples": [sentence], "summary"}. Raises Refusal when nothing can be kept, when nothing needs repair, or when a file
    cannot be written.
    """
    path = Path(path)
    for file in (out, rejects):
        if file.exists() or file.is_symlink():
            raise Refusal(
                f"{file.name} is there already. Choose another name for the repaired copy. Nothing was changed."
            )
    mapping = mapping_of(path, columns)  # before a copy in UTF-8 stands elsewhere, without the dataset's manifest
    columns = mapping.texts() if mapping is not None else []
    source = path
    try:
        with open(out, "xb") as kept, open(rejects, "xb") as left:
            try:
                encoding = _utf16_kind(path)
                source = _utf8_copy(path, out, encoding) if encoding else path
                copy = _Copy(kept, left)
                tally = Tally()
                size = source.stat().st_size
                for row in read_rows(source, tally=tally, columns=columns, keep_payload=True):
                    copy.take(row)
                    if progress is not None and copy.counts["rows"] % 1000 == 0:
                        progress(tally.bytes, max(size, tally.bytes))
                result = copy.result(utf16=source != path)
                for written in (kept, left):
                    written.flush()
                    os.fsync(written.fileno())
            except BaseException:
                out.unlink(missing_ok=True)
                rejects.unlink(missing_ok=True)
                raise
    except OSError as error:
        raise Refusal(
            f"The repaired copy could not be written: {error.strerror or error}. Nothing was changed."
        ) from None
    finally:
        if source != path:
            source.unlink(missing_ok=True)
    return result | {"summary": summary(result)}


class _Copy:
    """The two files as they are written, and the counts of what became of the rows."""

    def __init__(self, kept: BinaryIO, left: BinaryIO) -> None:
        self.counts: Counter[str] = Counter()
        self._reasons: Counter[str] = Counter()
        self._examples: list[str] = []
        self._marks: set[int] = set()
        self._kept, self._left = kept, left

    def take(self, row: Row) -> None:
        """Write one row where it belongs."""
        self.counts["rows"] += 1
        change = _mended(row)
        if row.problem is None and (mark := Marks.of(row)) in self._marks:
            change = "duplicate"
        elif row.problem is None:
            self._marks.add(mark)
            self._kept.write(_line(row))
            self.counts["kept"] += 1
            if change and len(self._examples) < _EXAMPLES:
                self._examples.append(f"Line {row.line:,}: {CHANGES[change]}.")
        if row.problem is not None or change == "duplicate":
            self._left.write(_reject(row, change))
            self.counts["left_out"] += 1
            self._reasons[row.problem.code if row.problem else change] += 1
        if change:
            self.counts[change] += 1

    def result(self, utf16: bool) -> dict[str, Any]:
        """What was done; raises Refusal where there is nothing to keep or nothing to repair."""
        counts = self.counts
        changes = {kind: counts[kind] for kind in CHANGES if counts[kind]} | ({"utf8": counts["rows"]} if utf16 else {})
        if not counts["kept"]:
            raise Refusal(
                "No row of this file can be kept, so there is no repaired copy. The lines with problems say why."
            )
        if not counts["left_out"] and not changes:
            raise Refusal("There is nothing to repair: every row can be used as it is.")
        return {
            "rows": counts["rows"],
            "kept": counts["kept"],
            "changed": sum(number for kind, number in changes.items() if kind.startswith("trimmed")),
            "left_out": counts["left_out"],
            "changes": changes,
            "reasons": dict(self._reasons.most_common()),
            "examples": self._examples,
        }


def summary(result: dict[str, Any]) -> str:
    """What the repaired copy is, in sentences."""
    text = f"Kept {result['kept']:,} of {result['rows']:,} rows."
    told = [f"{number:,} trimmed ({CHANGES[kind]})" for kind, number in result["changes"].items() if "trimmed" in kind]
    if told:
        text += f" {' · '.join(told)}."
    if result["left_out"]:
        names = {**PROBLEM_NAMES, "duplicate": "said twice"}
        kinds = " · ".join(f"{number:,} {names[code]}" for code, number in result["reasons"].items())
        text += f" {result['left_out']:,} left out: {kinds}."
    if "utf8" in result["changes"]:
        text += " UTF-16 became UTF-8."
    return f"{text} No text was added; the original is as it was."


def _mended(row: Row) -> str:
    """Shorten a row with a problem until it can be trained; the kind of change, "" for none. Changes `row`."""
    if row.problem is None or row.problem.code not in ("no_answer", "order"):
        return ""
    try:
        turns = turns_of(parse(row.payload) if isinstance(row.payload, bytes) else row.payload)
    except Fault:
        return ""
    if turns is None:
        return ""
    roles = [turn.get("role") if isinstance(turn, dict) else None for turn in turns]
    if row.problem.code == "no_answer":
        last = max((at for at, role in enumerate(roles) if role == "assistant"), default=-1)
        shorter, change = turns[: last + 1], "trimmed_end"
    else:
        head = turns[:1] if roles[0] == "system" else []
        first = next((at for at, role in enumerate(roles) if role == "user"), len(roles))
        shorter, change = head + turns[max(first, len(head)) :], "trimmed_start"
    try:
        row.messages, row.problem = checked(shorter), None
    except Fault:
        return ""
    return change


def _line(row: Row) -> bytes:
    value = {"text": row.text} if row.messages is None else {"messages": row.messages}
    return json.dumps(value, ensure_ascii=False).encode() + b"\n"


def _reject(row: Row, change: str) -> bytes:
    payload = row.payload
    reason = row.problem.message if row.problem else f"Line {row.line:,}: an earlier row says the same."
    raw = payload.decode("utf-8", "backslashreplace").rstrip("\r\n") if isinstance(payload, bytes) else payload
    code = row.problem.code if row.problem else change
    found = {"line": row.line, "code": code, "reason": reason, "row": raw}
    return json.dumps(found, ensure_ascii=True, default=str).encode() + b"\n"


def _utf16_kind(path: Path) -> str | None:
    with open_data(path) as file:
        return _UTF16.get(file.read(2))


def _utf8_copy(path: Path, out: Path, encoding: str) -> Path:
    """The text of a UTF-16 file as UTF-8 beside `out`, under the name that tells its format; raises Refusal."""
    copy = out.with_name(f"{out.stem}-utf8{path.suffix}")
    try:
        with (
            open(path, encoding=encoding, newline="") as source,
            open(copy, "x", encoding="utf-8", newline="") as target,
        ):
            while chunk := source.read(1 << 20):
                target.write(chunk)
    except UnicodeError:
        copy.unlink(missing_ok=True)
        raise Refusal(f"{path.name} begins as UTF-16 and is not UTF-16 throughout. It cannot be repaired.") from None
    return copy
