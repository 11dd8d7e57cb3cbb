"""One pass over a run's files: rows are shaped, rendered, cut and written; what is left out is counted.

Called by trainer.data.tokens, which owns the name, the place and the locking of what is written here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.data.arrays import GrowingArray
from trainer.data.formats import Row, Scan, Tally, read_rows
from trainer.data.render import Rendered, Renderer, template_for
from trainer.data.shape import Shaper
from trainer.files import write_json
from trainer.refusal import Refusal

if TYPE_CHECKING:
    from trainer.data.tokens import TokenRequest

Progress = Callable[[int, int], None]

PROBLEMS_KEPT = 100
BATCH_ROWS = 256
BATCH_CHARACTERS = 2 * 1024 * 1024


class Builder:
    """Writes arrays and cache.json into `folder`; raises Refusal for a bad profile or template."""

    def __init__(self, request: TokenRequest, tokenizer: Any, folder: Path, scans: list[Scan]) -> None:
        self.request = request
        self.folder = folder
        self.scans = scans
        self.shaper = Shaper(request.profile, request.profiles_root, request.system_prompt, request.date)
        self.template, self.template_note = template_for(tokenizer, self.shaper.profile)
        self.renderer = Renderer(tokenizer, self.template, request.date)
        self.ids = GrowingArray(folder / "ids.npy", np.int32)
        self.labels = GrowingArray(folder / "labels.npy", np.uint8)
        self.offsets = GrowingArray(folder / "offsets.npy", np.int64)
        self.source = GrowingArray(folder / "source.npy", np.int64, width=3)
        self.count: Counter[str] = Counter()
        self.problem_counts: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()
        self.problems: list[dict[str, Any]] = []
        self.longest = 0
        self.longest_uncut = 0
        self.too_long: list[str] = []

    def run(self, key: str, progress: Progress) -> None:
        """Write the arrays and cache.json; raises Refusal."""
        total = sum(each.rows for each in self.scans)
        self.offsets.append([0])
        try:
            for number, path in enumerate(self.request.files):
                tally = Tally()
                for batch in _batches(read_rows(path, tally=tally)):
                    self._take(number, batch)
                    progress(self.count["seen"], total)
                if tally.hexdigest() != self.scans[number].sha256:
                    raise Refusal(f"{Path(path).name} was changed while it was read. Start again.")
            self._refuse_what_cannot_be_trained()
            for array in (self.ids, self.labels, self.offsets, self.source):
                array.finish()
        finally:
            for array in (self.ids, self.labels, self.offsets, self.source):
                array.discard()
        write_json(self.folder / "cache.json", self._meta(key))

    def _take(self, file_number: int, batch: list[Row]) -> None:
        shaped: list[tuple[Row, list[dict[str, str]]]] = []
        for row in batch:
            self.count["seen"] += 1
            if row.messages is None:
                assert row.problem is not None
                self._problem(file_number, row.line, row.problem.code, row.problem.message)
                continue
            try:
                shaped.append((row, self.shaper.shape(row.messages, row.index)))
            except Refusal as refusal:
                self._problem(file_number, row.line, "profile", line_sentence(row.line, refusal))
        rendered = self.renderer.render_many([messages for _, messages in shaped])
        for (row, _), result in zip(shaped, rendered, strict=True):
            if isinstance(result, Refusal):
                self._problem(file_number, row.line, "template", line_sentence(row.line, result))
            else:
                self._keep(file_number, row, result)

    def _keep(self, file_number: int, row: Row, rendered: Rendered) -> None:
        ids, labels = rendered.ids, rendered.labels
        limit = self.request.max_length
        self.longest_uncut = max(self.longest_uncut, len(ids))
        cut = max(0, len(ids) - limit)
        if cut and self.request.too_long != "cut":
            self.count["rows_dropped"] += 1
            if len(self.too_long) < 5:
                self.too_long.append(f"{row.line:,}")
            return
        # a cut row ends in mid-sentence: no end token is added, so no false end is learnt
        ids, labels = ids[:limit], labels[:limit]
        trained = sum(labels)
        if not trained:
            self.count["rows_without_labels"] += 1
            return
        self.ids.append(ids)
        self.labels.append(labels)
        self.source.append([file_number, row.line, row.index])
        self.count.update(rows=1, tokens=len(ids), labels=trained, rows_cut=int(cut > 0), tokens_cut=cut)
        self.offsets.append([self.count["tokens"]])
        self.longest = max(self.longest, len(ids))
        self.notes.update(rendered.notes)

    def _problem(self, file_number: int, line: int, code: str, message: str) -> None:
        self.count["rows_skipped"] += 1
        self.problem_counts[code] += 1
        if len(self.problems) < PROBLEMS_KEPT:
            self.problems.append({"file": file_number, "line": line, "code": code, "message": message})

    def _refuse_what_cannot_be_trained(self) -> None:
        limit, dropped = self.request.max_length, self.count["rows_dropped"]
        if self.request.too_long == "refuse" and dropped:
            lines = ", ".join(self.too_long) + (", …" if dropped > len(self.too_long) else "")
            figures = f"{dropped:,} (longest {self.longest_uncut:,}; lines {lines})"
            cure = "Raise the maximum length, or choose to cut or drop them."
            raise Refusal(f"Rows longer than {limit:,} tokens: {figures}. {cure}", "data.too_long")
        if self.count["rows"]:
            return
        found = (
            (self.count["rows_skipped"], "with problems"),
            (dropped, f"longer than {limit:,} tokens"),
            (self.count["rows_without_labels"], f"with no answer in the first {limit:,} tokens"),
        )
        what = ", ".join(f"{number:,} {text}" for number, text in found if number) or "there is none"
        first = f" {self.problems[0]['message']}" if self.problems else ""
        rows = self.count["seen"]
        raise Refusal(f"No row of {rows:,} can be trained: {what}.{first}", "data.dataset_path")

    def _meta(self, key: str) -> dict[str, Any]:
        names = (
            "rows", "tokens", "labels", "rows_cut", "tokens_cut", "rows_dropped", "rows_skipped",
            "rows_without_labels",
        )  # fmt: skip
        return {
            "key": key,
            **{name: self.count[name] for name in names},
            "longest": self.longest,
            "longest_uncut": self.longest_uncut,
            "problems": self.problems,
            "problem_counts": dict(self.problem_counts),
            "notes": dict(self.notes),
            "files": [
                {"path": path, "sha256": each.sha256, "rows": each.rows}
                for path, each in zip(self.request.files, self.scans, strict=True)
            ],
            "chat_template": self.template,
            "template_note": self.template_note,
            "system_prompt": self.shaper.system_prompt,
            "profile": self.request.profile,
            "max_length": self.request.max_length,
            "too_long": self.request.too_long,
            "date": self.request.date,
        }


def line_sentence(line: int, refusal: Refusal) -> str:
    """A refusal of one row as the sentence that names its line."""
    text = refusal.message
    return f"Line {line:,}: {text[:1].lower()}{text[1:]}"


def _batches(rows: Iterator[Row]) -> Iterator[list[Row]]:
    """Rows in groups that bound the memory of encoding them together."""
    batch: list[Row] = []
    characters = 0
    for row in rows:
        batch.append(row)
        characters += sum(len(message["content"]) for message in row.messages or [])
        if len(batch) >= BATCH_ROWS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
