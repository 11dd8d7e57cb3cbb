"""The doctor of a data file: which rows can be trained, what is wrong with the others, how long they are in tokens.

One streaming pass; lengths come from a seeded sample of bounded size. Called by `trainer check-data` and the
worker; imports no torch.
"""

from __future__ import annotations

import heapq
import os
import random
from collections import Counter
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from trainer.data.build import refuse_profile
from trainer.data.conversation import PROBLEM_NAMES
from trainer.data.formats import Row, Tally, read_rows
from trainer.data.plain_text import TextEncoder, pieces_of
from trainer.data.render import Rendered, Renderer, own_template, template_for
from trainer.data.shape import Shaper
from trainer.refusal import Refusal

PROBLEMS_LISTED = 200
SAMPLE_ROWS = 2000
SAMPLE_CHARACTERS = 32 * 1024 * 1024
DUPLICATES_WATCHED = 2_000_000
HISTOGRAM_BINS = 24

Conversation = list[dict[str, str]]
Sampled = list[tuple[int, Conversation | str]]


def check_data(
    path: Path | str,
    *,
    tokenizer: Any = None,
    profile: str | None = None,
    profiles_root: str | None = None,
    system_prompt: str = "",
    date: str = "1970-01-01",
    max_length: int | None = None,
    chat_template: str = "model",
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Examine a data file; the result is what `check-data --json` prints.

    "valid" is False when any row has a problem or none is usable; "problems" lists the first 200 of them, "counts"
    has all by code. With a tokenizer, "lengths" (tokens) and "label_share" come from at most 2,000 rows, shaped and
    rendered as training would; "pieces" says in how many rows of training plain texts are parted. `date` is
    YYYY-MM-DD. Raises Refusal when the file cannot be read, or the profile or template not be used.
    `progress(bytes read, bytes of the file)`.
    """
    shaper = Shaper(profile, profiles_root, system_prompt, date)
    tally = Tally()
    checkup = _Checkup(seed, wants_sample=tokenizer is not None)
    size = os.path.getsize(path) if os.path.exists(path) else 0
    for row in read_rows(path, tally=tally):
        if row.text is not None:
            refuse_profile(profile, Path(path).name, row.line)
        checkup.take(row)
        if progress is not None and checkup.rows % 1000 == 0:
            progress(tally.bytes, max(tally.bytes, size))
    result = checkup.result() | {"bytes": tally.bytes, "sha256": tally.hexdigest()}
    if tokenizer is not None and checkup.usable:
        if checkup.turns:
            template, note = template_for(tokenizer, shaper.profile, chat_template)
            renderer = Renderer(tokenizer, template, date)
        else:
            renderer, note = None, ""
        measured = _measured(checkup.sample(), checkup.documents, shaper, tokenizer, renderer, max_length)
        result["warnings"] += measured.pop("warnings")
        result |= measured | {"template_note": note}
    return result


def _measured(
    sample: Sampled, documents: int, shaper: Shaper, tokenizer: Any, renderer: Renderer | None, max_length: int | None
) -> dict[str, Any]:
    """The part of the report that needs a tokenizer; `documents` in the whole file, `renderer` None without any talk."""
    found = _Lengths(max_length)
    warnings: list[dict[str, Any]] = []
    talks = [(index, row) for index, row in sample if not isinstance(row, str)]
    if talks and renderer is not None:
        warnings += _measure_talks(found, talks, shaper, renderer)
    texts = [row for _, row in sample if isinstance(row, str)]
    if texts:
        warnings += _measure_texts(found, texts, TextEncoder(tokenizer, own_template(tokenizer)))
    pieces = round(found.pieces / found.documents * documents) if found.documents and max_length else None
    share = found.labels / sum(found.lengths) if found.lengths else None
    return {"lengths": found.result(), "label_share": share, "pieces": pieces, "warnings": warnings}


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
        self.duplicates = 0
        self._seen: set[bytes] = set()
        self._draw = random.Random(seed)
        self._wants_sample = wants_sample
        self._heap: list[tuple[float, int, Conversation | str]] = []
        self._characters = 0

    def take(self, row: Row) -> None:
        """Count one row in."""
        self.rows += 1
        priority = self._draw.random()  # drawn for every row, so that a row's luck hangs on its place alone
        if row.problem is not None:
            self.counts[row.problem.code] += 1
            if len(self.problems) < PROBLEMS_LISTED:
                found = {"line": row.line, "code": row.problem.code, "message": row.problem.message}
                self.problems.append(found)
            return
        self.usable += 1
        if row.messages is None:
            self.documents += 1
        else:
            self.turns[sum(message["role"] != "system" for message in row.messages)] += 1
            self.with_system += row.messages[0]["role"] == "system"
        self._watch_duplicates(row.messages or [{"role": "text", "content": row.text or ""}])
        if self._wants_sample:
            self._offer(priority, row)

    def sample(self) -> Sampled:
        """(row of the file, messages or text) of the sampled rows, in file order."""
        return sorted(((index, row) for _, index, row in self._heap), key=lambda pair: pair[0])

    def result(self) -> dict[str, Any]:
        """The part of the report that needs no tokenizer."""
        warnings = []
        if self.duplicates:
            watched = "" if self.usable <= DUPLICATES_WATCHED else f" among the first {DUPLICATES_WATCHED:,}"
            text = f"{self.duplicates:,} of {self.usable:,} rows say the same as an earlier one{watched}."
            warnings.append({"code": "duplicates", "count": self.duplicates, "message": text})
        return {
            "valid": self.usable > 0 and self.usable == self.rows,
            "format": self._format(),
            "rows": self.rows,
            "usable": self.usable,
            "summary": self._summary(),
            "problems": self.problems,
            "counts": dict(self.counts.most_common()),
            "warnings": warnings,
            "turns": {str(turns): count for turns, count in sorted(self.turns.items())},
            "with_system": self.with_system,
            "documents": self.documents,
        }

    def _format(self) -> str:
        if self.counts["wrong_format"]:
            return "unknown"
        if not self.documents:
            return "chat JSON Lines"
        return "conversations and texts, JSON Lines" if self.turns else "plain text"

    def _summary(self) -> str:
        if not self.rows:
            return "The file has no rows."
        text = f"{self.usable:,} of {self.rows:,} rows are usable."
        if self.usable == self.rows:
            return text
        kinds = " · ".join(f"{count:,} {PROBLEM_NAMES[code]}" for code, count in self.counts.most_common())
        bad = self.rows - self.usable
        return f"{text} {bad:,} {'has a problem' if bad == 1 else 'have problems'}: {kinds}."

    def _watch_duplicates(self, messages: Conversation) -> None:
        digest = blake2b(digest_size=8)
        for message in messages:
            content = message["content"].encode()
            digest.update(b"%s %d " % (message["role"].encode(), len(content)) + content)
        mark = digest.digest()
        if mark in self._seen:
            self.duplicates += 1
        elif len(self._seen) < DUPLICATES_WATCHED:
            self._seen.add(mark)

    def _offer(self, priority: float, row: Row) -> None:
        """Keep the rows with the smallest draws, as many as the two limits allow: each row has the same chance."""
        content: Conversation | str = row.messages if row.messages is not None else row.text or ""
        if len(self._heap) >= SAMPLE_ROWS and -self._heap[0][0] < priority:
            return
        heapq.heappush(self._heap, (-priority, row.index, content))
        self._characters += _characters(content)
        while len(self._heap) > SAMPLE_ROWS or (self._characters > SAMPLE_CHARACTERS and len(self._heap) > 1):
            self._characters -= _characters(heapq.heappop(self._heap)[2])


class _Lengths:
    """Lengths and labels of sampled rows. What is over the limit counts for conversations; texts are parted, not cut."""

    def __init__(self, max_length: int | None) -> None:
        self.max_length = max_length
        self.lengths: list[int] = []
        self.labels = 0
        self.over = 0
        self.unanswered = 0
        self.documents = 0
        self.pieces = 0

    def talk(self, rendered: Rendered) -> None:
        """Count a conversation in."""
        self.lengths.append(len(rendered.ids))
        self.labels += sum(rendered.labels)
        if self.max_length is not None:
            self.over += len(rendered.ids) > self.max_length
            self.unanswered += not any(rendered.labels[: self.max_length])

    def text(self, ids: list[int]) -> None:
        """Count a document in, piece by piece."""
        pieces = pieces_of(ids, self.max_length) if self.max_length else [ids]
        self.lengths += [len(piece) for piece in pieces]
        self.labels += len(ids) - len(pieces)
        self.documents += 1
        self.pieces += len(pieces)

    def result(self) -> dict[str, Any] | None:
        """Quantiles and a histogram with bins of equal width; None where nothing was measured."""
        if not self.lengths:
            return None
        lengths = np.array(self.lengths)
        counts, edges = np.histogram(lengths, bins=HISTOGRAM_BINS, range=(0, int(lengths.max()) + 1))
        marks = np.quantile(lengths, [0.5, 0.95, 0.99], method="inverted_cdf")
        return {
            "sampled": len(lengths),
            "mean": float(lengths.mean()),
            "median": int(marks[0]),
            "p95": int(marks[1]),
            "p99": int(marks[2]),
            "longest": int(lengths.max()),
            "over": self.over if self.max_length else None,
            "max_length": self.max_length,
            "histogram": {"edges": [float(edge) for edge in edges], "counts": [int(count) for count in counts]},
        }


def _measure_talks(
    found: _Lengths, talks: list[tuple[int, Conversation]], shaper: Shaper, renderer: Renderer
) -> list[dict[str, Any]]:
    """Count sampled conversations into `found`; returns warnings on what the template does to them."""
    refused: list[str] = []
    notes: Counter[str] = Counter()
    for start in range(0, len(talks), 128):
        shaped = []
        for index, messages in talks[start : start + 128]:
            try:
                shaped.append(shaper.shape(messages, index))
            except Refusal as refusal:
                refused.append(refusal.message)
        for rendered in renderer.render_many(shaped):
            if isinstance(rendered, Rendered):
                found.talk(rendered)
                notes.update(rendered.notes)
            else:
                refused.append(rendered.message)
    warnings = []
    if refused:
        text = f"{len(refused):,} of {len(talks):,} sampled rows cannot be rendered. The first: {refused[0]}"
        warnings.append({"code": "template", "count": len(refused), "message": text})
    warnings += [
        {"code": code, "count": count, "message": f"{_NOTES[code]} ({count:,} of {len(talks):,} sampled rows)."}
        for code, count in notes.items()
    ]
    if found.unanswered:
        text = f"No answer begins within {found.max_length:,} tokens, so the row is left out"
        text += f" ({found.unanswered:,} of {len(talks):,} sampled rows)."
        warnings.append({"code": "answers_cut_away", "count": found.unanswered, "message": text})
    return warnings


def _measure_texts(found: _Lengths, texts: list[str], encoder: TextEncoder) -> list[dict[str, Any]]:
    """Count sampled documents into `found`; returns a warning where some cannot be encoded."""
    refused: list[str] = []
    for text in texts:
        try:
            found.text(encoder.document(text))
        except Refusal as refusal:
            refused.append(refusal.message)
    if not refused:
        return []
    told = f"{len(refused):,} of {len(texts):,} sampled texts cannot be encoded. The first: {refused[0]}"
    return [{"code": "template", "count": len(refused), "message": told}]


_NOTES = {
    "system_dropped": "The chat template drops the system message",
    "thinking_dropped": "The chat template takes the thinking out of answers",
    "whitespace_changed": "The chat template changes white space around texts",
    "no_end_token": "No token ends an answer, so the tuned model cannot stop by itself",
}


def _characters(row: Conversation | str) -> int:
    return len(row) if isinstance(row, str) else sum(len(message["content"]) for message in row)
