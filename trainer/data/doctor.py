"""The doctor of a data file: which rows can be trained, what is wrong with the others, how long they are in tokens.

One streaming pass; lengths come from a seeded sample of bounded size with its error, or from the token cache where that
is made. Called by `trainer check-data` and the worker; imports no torch.
"""

from __future__ import annotations

import heapq
import os
import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trainer.data.build import refuse_profile
from trainer.data.duplicates import ROWS_WATCHED, Leakage, Marks
from trainer.data.formats import Format, Row, Tally, read_rows
from trainer.data.lengths import Conversation, Lengths, Sampled, exact_lengths, measure_talks, measure_texts
from trainer.data.plain_text import TextEncoder
from trainer.data.problems import FIXES, PROBLEM_NAMES
from trainer.data.render import Renderer, own_template, template_for
from trainer.data.shape import Shaper
from trainer.data.tokens import identity

PROBLEMS_LISTED = 200
SAMPLE_ROWS = 2000
SAMPLE_CHARACTERS = 32 * 1024 * 1024
# rows with these problems were not recognised as rows of the file's shape
_SHAPELESS = ("bad_json", "bad_csv", "columns", "other_shape", "no_messages", "not_utf8", "line_too_long")
_WHOLE_FILE = ("wrong_format", "damaged", "too_large")


def check_data(
    path: Path | str,
    *,
    tokenizer: Any = None,
    model_path: str = "",
    profile: str | None = None,
    profiles_root: str | None = None,
    system_prompt: str = "",
    date: str = "1970-01-01",
    max_length: int | None = None,
    chat_template: str = "model",
    columns: Sequence[str] | None = None,
    held_out: str | None = None,
    caches: str | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Examine a data file; the result is what `check-data --json` prints.

    "valid" is False when any row has a problem or none is usable; "problems" lists the first 200 of them, "counts"
    has all by code, "fixes" what to do about each code. With a tokenizer, "lengths" (tokens) and "label_share" come from
    at most 2,000 rows, shaped and rendered as training would, or from every row where `caches` has the tokens of
    `model_path`; "pieces" says in how many rows of training plain texts are parted. `columns` is the column mapping,
    `held_out` a file whose rows are looked for in this one. `date` is YYYY-MM-DD. Raises Refusal when the file cannot be
    read, or the mapping, profile or template not be used. `progress(bytes read, bytes of the file)`.
    """
    shaper = Shaper(profile, profiles_root, system_prompt, date)
    tally = Tally()
    checkup = _Checkup(seed, wants_sample=tokenizer is not None)
    leakage = Leakage(held_out, list(columns or [])) if held_out else None
    size = os.path.getsize(path) if os.path.exists(path) else 0
    for row in read_rows(path, tally=tally, columns=columns):
        if row.text is not None:
            refuse_profile(profile, Path(path).name, row.line)
        checkup.take(row)
        if leakage is not None and row.problem is None:
            leakage.add(row)
        if progress is not None and checkup.rows % 1000 == 0:
            progress(tally.bytes, max(tally.bytes, size))
    result = checkup.result(tally.format) | {"bytes": tally.bytes, "sha256": tally.hexdigest()}
    if leakage is not None:
        result["warnings"] += leakage.warnings()
    if tokenizer is not None and checkup.usable:
        result |= _lengths(checkup, result, shaper, tokenizer, chat_template, max_length)
        if caches and model_path and max_length is not None:
            wanted: dict[str, Any] = dict(identity(model_path, profile, profiles_root, chat_template))
            wanted |= {"max_length": max_length, "system_prompt": shaper.system_prompt}
            result |= exact_lengths(Path(caches), result["sha256"], _mapping_texts(tally.format), wanted) or {}
    return result


def _mapping_texts(found: Format | None) -> list[str]:
    return found.mapping.texts() if found is not None and found.mapping is not None else []


def _lengths(
    checkup: _Checkup, result: dict[str, Any], shaper: Shaper, tokenizer: Any, kind: str, max_length: int | None
) -> dict[str, Any]:
    """The part of the report that needs a tokenizer, from the sample; adds its warnings to those of `result`."""
    found, note = Lengths(max_length), ""
    sample = checkup.sample()
    talks = [(index, line, content) for index, line, content in sample if not isinstance(content, str)]
    if checkup.turns:
        template, note = template_for(tokenizer, shaper.profile, kind)
        result["warnings"] += measure_talks(found, talks, shaper, Renderer(tokenizer, template, shaper.date))
    texts = [content for _, _, content in sample if isinstance(content, str)]
    if texts:
        result["warnings"] += measure_texts(found, texts, TextEncoder(tokenizer, own_template(tokenizer)))
    pieces = round(found.pieces / found.documents * checkup.documents) if found.documents and max_length else None
    share = found.labels / sum(found.lengths) if found.lengths else None
    rows = checkup.usable - checkup.documents + (pieces or checkup.documents)
    return {"lengths": found.result(rows), "label_share": share, "pieces": pieces, "template_note": note}


class _Checkup:
    """What one pass over the rows collects."""

    def __init__(self, seed: int, wants_sample: bool) -> None:
        self.rows = 0
        self.usable = 0
        self.counts: Counter[str] = Counter()
        self.problems: list[dict[str, Any]] = []
        self.documents = 0
        self.turns: Counter[int] = Counter()
        self.with_system = 0
        self._marks = Marks()
        self._draw = random.Random(seed)
        self._wants_sample = wants_sample
        self._heap: list[tuple[float, int, int, Conversation | str]] = []
        self._characters = 0

    def take(self, row: Row) -> None:
        """Count one row in."""
        self.rows += 1
        priority = self._draw.random()  # drawn for every row, so that a row's luck hangs on its place alone
        if row.problem is not None:
            self.counts[row.problem.code] += 1
            if len(self.problems) < PROBLEMS_LISTED:
                found = {"line": row.line, "code": row.problem.code, "message": row.problem.message}
                self.problems.append(found | {"excerpt": row.problem.excerpt})
            return
        self.usable += 1
        if row.messages is None:
            self.documents += 1
        else:
            self.turns[sum(message["role"] != "system" for message in row.messages)] += 1
            self.with_system += row.messages[0]["role"] == "system"
        self._marks.add(row)
        if self._wants_sample:
            self._offer(priority, row)

    def sample(self) -> Sampled:
        """(row of the file, line, messages or text) of the sampled rows, in file order."""
        return sorted(((index, line, content) for _, index, line, content in self._heap), key=lambda found: found[0])

    def result(self, found: Format | None) -> dict[str, Any]:
        """The part of the report that needs no tokenizer."""
        return {
            "valid": self.usable > 0 and self.usable == self.rows,
            **self._format(found),
            "rows": self.rows,
            "usable": self.usable,
            "summary": self._summary(),
            "problems": self.problems,
            "counts": dict(self.counts.most_common()),
            "fixes": {code: FIXES[code] for code in self.counts},
            "warnings": self._duplicates(),
            "turns": {str(turns): count for turns, count in sorted(self.turns.items())},
            "with_system": self.with_system,
            "documents": self.documents,
        }

    def _duplicates(self) -> list[dict[str, Any]]:
        count, pairs = self._marks.repeated()
        if not count:
            return []
        watched = "" if self.usable <= ROWS_WATCHED else f" among the first {ROWS_WATCHED:,}"
        text = f"{count:,} of {self.usable:,} rows say the same as an earlier one{watched}."
        lines = [f"Line {line:,} says the same as line {first:,}." for line, first in pairs]
        return [{"code": "duplicates", "count": count, "message": text, "lines": lines}]

    def _format(self, found: Format | None) -> dict[str, Any]:
        """What the file is and why, and the mapping that is used or suggested."""
        if found is None or (self.rows == 1 and any(self.counts[code] for code in _WHOLE_FILE)):
            reason = "its first bytes are of no kind that is read" if self.rows else "there is nothing in it"
            return {"format": "unknown", "format_reason": reason, "columns": [], "mapping": [], "suggested": []}
        if not found.shape:
            shape, why = "rows of unknown shape", "no row has the keys of a shape that is known"
        elif found.container == "plain text":
            shape, why = found.container, found.reason
        else:
            fitting = self.rows - sum(self.counts[code] for code in _SHAPELESS)
            who = "every row has" if fitting == self.rows else f"{fitting:,} of {self.rows:,} rows have"
            why = f"{who} {found.mark}" if found.mapping is None else found.mark
            shape = found.shape
        is_prose = found.container == "plain text"
        return {
            "format": shape if is_prose else f"{shape}, {found.container}",
            "format_reason": why
            if is_prose
            else f"{shape[:1].upper()}{shape[1:]}: {why}. {found.container}: {found.reason}",
            "columns": list(found.columns[:100]),
            "mapping": _mapping_texts(found),
            "suggested": list(found.suggested),
        }

    def _summary(self) -> str:
        if not self.rows:
            return "The file has no rows."
        text = f"{self.usable:,} of {self.rows:,} rows are usable."
        if self.usable == self.rows:
            return text
        kinds = " · ".join(f"{count:,} {PROBLEM_NAMES[code]}" for code, count in self.counts.most_common())
        bad = self.rows - self.usable
        return f"{text} {bad:,} {'has a problem' if bad == 1 else 'have problems'}: {kinds}."

    def _offer(self, priority: float, row: Row) -> None:
        """Keep the rows with the smallest draws, as many as the two limits allow: each row has the same chance."""
        content: Conversation | str = row.messages if row.messages is not None else row.text or ""
        if len(self._heap) >= SAMPLE_ROWS and -self._heap[0][0] < priority:
            return
        heapq.heappush(self._heap, (-priority, row.index, row.line, content))
        self._characters += _characters(content)
        while len(self._heap) > SAMPLE_ROWS or (self._characters > SAMPLE_CHARACTERS and len(self._heap) > 1):
            self._characters -= _characters(heapq.heappop(self._heap)[3])


def _characters(row: Conversation | str) -> int:
    return len(row) if isinstance(row, str) else sum(len(message["content"]) for message in row)
