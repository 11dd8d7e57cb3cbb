"""Lengths of rows in tokens: of a sample with the error that a sample has, or of every row where its tokens are made.

Called by the doctor. The intervals are of 95 %: Student's for the mean is taken as normal (2,000 rows), Wilson's for shares,
both narrowed where much of the file was sampled (finite population).
"""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from trainer.data.plain_text import TextEncoder, pieces_of
from trainer.data.render import Rendered, Renderer
from trainer.data.shape import Shaper
from trainer.data.tokens import TokenCache
from trainer.files import read_json
from trainer.refusal import Refusal

HISTOGRAM_BINS = 24
LINES_KEPT = 200
Z = 1.959964

Conversation = list[dict[str, str]]
Sampled = list[tuple[int, int, Conversation | str]]

NOTES = {
    "system_dropped": "The chat template drops the system message",
    "thinking_dropped": "The chat template takes the thinking out of answers",
    "whitespace_changed": "The chat template changes white space around texts",
    "no_end_token": "No token ends an answer, so the tuned model cannot stop by itself",
}


class Lengths:
    """Lengths and labels of rows. What is over the limit counts for conversations; texts are parted, not cut."""

    def __init__(self, max_length: int | None) -> None:
        self.max_length = max_length
        self.lengths: list[int] = []
        self.labels = 0
        self.over = 0
        self.unanswered = 0
        self.documents = 0
        self.pieces = 0
        self.too_long: list[dict[str, int]] = []

    def talk(self, line: int, rendered: Rendered) -> None:
        """Count a conversation in."""
        self.lengths.append(len(rendered.ids))
        self.labels += sum(rendered.labels)
        if self.max_length is not None:
            self.unanswered += not any(rendered.labels[: self.max_length])
            if len(rendered.ids) > self.max_length:
                self.over += 1
                if len(self.too_long) < LINES_KEPT:
                    self.too_long.append({"line": line, "tokens": len(rendered.ids)})

    def text(self, ids: list[int]) -> None:
        """Count a document in, piece by piece."""
        pieces = pieces_of(ids, self.max_length) if self.max_length else [ids]
        self.lengths += [len(piece) for piece in pieces]
        self.labels += len(ids) - len(pieces)
        self.documents += 1
        self.pieces += len(pieces)

    def result(self, rows: int) -> dict[str, Any] | None:
        """Figures of a sample out of `rows`; None where nothing was measured."""
        if not self.lengths:
            return None
        over = self.over if self.max_length else None
        return figures(np.array(self.lengths), over, self.max_length, rows, self.too_long)


def figures(
    lengths: np.ndarray, over: int | None, max_length: int | None, rows: int, too_long: list[dict[str, int]]
) -> dict[str, Any]:
    """Quantiles, a histogram with bins of equal width, and the error of both mean and share over the limit.

    `lengths` (sampled,) of a population of `rows`. "mean_error" is half the interval in tokens; "over_rows" the interval
    in rows of the file; "exact" says that every row was measured, and then both have no width.
    """
    sampled = len(lengths)
    rows = max(rows, sampled)
    counts, edges = np.histogram(lengths, bins=HISTOGRAM_BINS, range=(0, int(lengths.max()) + 1))
    marks = np.quantile(lengths, [0.5, 0.95, 0.99], method="inverted_cdf")
    shrink = math.sqrt((rows - sampled) / (rows - 1)) if rows > 1 else 0.0
    spread = float(lengths.std(ddof=1)) if sampled > 1 else 0.0
    return {
        "sampled": sampled,
        "rows": rows,
        "exact": sampled == rows,
        "mean": float(lengths.mean()),
        "mean_error": Z * spread / math.sqrt(sampled) * shrink,
        "median": int(marks[0]),
        "p95": int(marks[1]),
        "p99": int(marks[2]),
        "longest": int(lengths.max()),
        "over": over,
        "over_rows": None if over is None else [round(rows * share) for share in share_interval(over, sampled, rows)],
        "too_long": too_long,
        "max_length": max_length,
        "histogram": {"edges": [float(edge) for edge in edges], "counts": [int(count) for count in counts]},
    }


def share_interval(hits: int, sampled: int, rows: int) -> tuple[float, float]:
    """Wilson's 95 % interval for a share of `rows`, of which `sampled` were drawn without putting back."""
    share = hits / sampled
    if sampled >= rows:
        return share, share
    n = sampled * (rows - 1) / (rows - sampled)  # so many draws with putting back would tell as much
    middle = (share + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n)) / (1 + Z * Z / n)
    # what was seen is a bound of its own: so many rows are over, and so many are not
    return max(middle - half, hits / rows), min(middle + half, 1 - (sampled - hits) / rows)


def measure_talks(
    found: Lengths, talks: list[tuple[int, int, Conversation]], shaper: Shaper, renderer: Renderer
) -> list[dict[str, Any]]:
    """Count sampled conversations into `found`; returns warnings on what the template does to them."""
    refused: list[str] = []
    notes: Counter[str] = Counter()
    for start in range(0, len(talks), 128):
        shaped, lines = [], []
        for index, line, messages in talks[start : start + 128]:
            try:
                shaped.append(shaper.shape(messages, index))
                lines.append(line)
            except Refusal as refusal:
                refused.append(refusal.message)
        for line, rendered in zip(lines, renderer.render_many(shaped), strict=True):
            if isinstance(rendered, Rendered):
                found.talk(line, rendered)
                notes.update(rendered.notes)
            else:
                refused.append(rendered.message)
    warnings = []
    if refused:
        text = f"{len(refused):,} of {len(talks):,} sampled rows cannot be rendered. The first: {refused[0]}"
        warnings.append({"code": "template", "count": len(refused), "message": text})
    warnings += [
        {"code": code, "count": count, "message": f"{NOTES[code]} ({count:,} of {len(talks):,} sampled rows)."}
        for code, count in notes.items()
    ]
    if found.unanswered:
        text = f"No answer begins within {found.max_length:,} tokens, so the row is left out"
        text += f" ({found.unanswered:,} of {len(talks):,} sampled rows)."
        warnings.append({"code": "answers_cut_away", "count": found.unanswered, "message": text})
    return warnings


def measure_texts(found: Lengths, texts: list[str], encoder: TextEncoder) -> list[dict[str, Any]]:
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


def exact_lengths(caches: Path, sha256: str, columns: list[str], wanted: dict[str, Any]) -> dict[str, Any] | None:
    """What the token cache knows of every row of the file with this hash: {"lengths", "label_share", "pieces"}.

    `columns` is the mapping that the file is read with, `wanted` are entries that cache.json must have with these values:
    the same tokenizer, profile, prompt and limit. None where no such cache is there, or where it left rows out for their length.
    """
    for path in sorted(caches.glob("*/cache.json")):
        try:
            meta = read_json(path)
            number = next(at for at, file in enumerate(meta["files"]) if file["sha256"] == sha256)
            if meta["rows_dropped"] or meta["columns"][number] != columns:
                continue
            if any(meta.get(key) != value for key, value in wanted.items()):
                continue
            cache = TokenCache.open(path.parent)
        except (OSError, ValueError, KeyError, TypeError, StopIteration):  # Refusal is a ValueError
            continue
        own = np.asarray(cache.source)[:, 0] == number
        if not own.any():
            continue
        cut = np.asarray(cache.cut)[own]
        lengths = np.asarray(cache.lengths)[own] + cut
        over = np.flatnonzero(cut)
        lines = np.asarray(cache.source)[own, 1]
        kept = [{"line": int(lines[at]), "tokens": int(lengths[at])} for at in over[:LINES_KEPT]]
        pieces = int((np.asarray(cache.pieces)[own] >= 0).sum())
        return {
            "lengths": figures(lengths, len(over), meta["max_length"], len(lengths), kept),
            "label_share": float(np.asarray(cache.label_counts)[own].sum() / (lengths - cut).sum()),
            "pieces": pieces or None,
        }
    return None
