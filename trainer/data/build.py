"""One pass over a run's files: rows are shaped, rendered, cut and written, texts parted; what is left out is counted.

Called by trainer.data.tokens, which owns the name, the place and the locking of what is written here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.data.arrays import GrowingArray
from trainer.data.formats import Row, Scan, Tally, read_rows
from trainer.data.plain_text import TextEncoder, labels_of, pieces_of
from trainer.data.render import Rendered, Renderer, own_template, template_for
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

    def __init__(
        self, request: TokenRequest, tokenizer: Any, folder: Path, scans: list[Scan], about: dict[str, Any]
    ) -> None:
        self.about = about
        self.request = request
        self.folder = folder
        self.scans = scans
        self.shaper = Shaper(request.profile, request.profiles_root, request.system_prompt, request.date)
        self.tokenizer = tokenizer
        self.template: str | None = None  # none is needed where there is no conversation
        self.template_note = ""
        self.ids = GrowingArray(folder / "ids.npy", np.int32)
        self.labels = GrowingArray(folder / "labels.npy", np.uint8)
        self.offsets = GrowingArray(folder / "offsets.npy", np.int64)
        self.source = GrowingArray(folder / "source.npy", np.int64, width=3)
        self.pieces = GrowingArray(folder / "pieces.npy", np.int32)
        self.cut = GrowingArray(folder / "cut.npy", np.int32)
        self.count: Counter[str] = Counter()
        self.problem_counts: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()
        self.problems: list[dict[str, Any]] = []
        self.units: list[
            str
        ] = []  # what the number of a place counts, by file: lines, or rows where there are no lines
        self.longest = 0
        self.longest_uncut = 0
        self.largest_id = 0
        self.too_long: list[str] = []

    def run(self, key: str, progress: Progress) -> None:
        """Write the arrays and cache.json; raises Refusal."""
        total = sum(each.rows for each in self.scans)
        self.offsets.append([0])
        try:
            for number, path in enumerate(self.request.files):
                tally = Tally()
                for batch in _batches(read_rows(path, tally=tally, columns=self.request.columns)):
                    self._take(number, batch)
                    progress(self.count["seen"], total)
                self.units.append(tally.format.unit if tally.format is not None else "line")
                if tally.hexdigest() != self.scans[number].sha256:
                    raise Refusal(f"{Path(path).name} was changed while it was read. Start again.")
            self._refuse_what_cannot_be_trained()
            for array in self._arrays:
                array.finish()
        finally:
            for array in self._arrays:
                array.discard()
        write_json(self.folder / "cache.json", self._meta(key))

    @property
    def _arrays(self) -> tuple[GrowingArray, ...]:
        return self.ids, self.labels, self.offsets, self.source, self.pieces, self.cut

    @cached_property
    def renderer(self) -> Renderer:
        """The renderer of conversations, made for the first of them."""
        self.template, self.template_note = template_for(
            self.tokenizer, self.shaper.profile, self.request.chat_template
        )
        return Renderer(self.tokenizer, self.template, self.request.date)

    @cached_property
    def encoder(self) -> TextEncoder:
        """The encoder of plain text, made for the first document."""
        return TextEncoder(self.tokenizer, own_template(self.tokenizer))

    def _take(self, file_number: int, batch: list[Row]) -> None:
        shaped: list[tuple[Row, list[dict[str, str]] | None]] = []
        for row in batch:
            self.count["seen"] += 1
            if row.problem is not None:
                self._problem(file_number, row.line, row.problem.code, row.problem.message)
            elif row.messages is None:
                shaped.append((row, None))
            else:
                try:
                    shaped.append((row, self.shaper.shape(row.messages, row.index)))
                except Refusal as refusal:
                    self._problem(file_number, row.line, "profile", line_sentence(row.line, refusal))
        conversations = [messages for _, messages in shaped if messages is not None]
        rendered = iter(self.renderer.render_many(conversations) if conversations else ())
        for row, messages in shaped:
            if messages is None:
                self._keep_document(file_number, row)
                continue
            result = next(rendered)
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
        if not any(labels):
            self.count["rows_without_labels"] += 1
            return
        self._write(file_number, row, ids, labels, piece=-1, cut=cut)
        self.count.update(rows_cut=int(cut > 0), tokens_cut=cut)
        self.notes.update(rendered.notes)

    def _keep_document(self, file_number: int, row: Row) -> None:
        """A document in as many pieces as it needs: `too_long` is for conversations, nothing of a text vanishes."""
        assert row.text is not None
        refuse_profile(self.request.profile, Path(self.request.files[file_number]).name, row.line)
        try:
            ids = self.encoder.document(row.text)
        except Refusal as refusal:
            if refusal.field is not None:
                raise
            self._problem(file_number, row.line, "template", line_sentence(row.line, refusal))
            return
        if len(ids) < 2:  # an end alone, which nothing predicts
            text = f"Line {row.line:,}: the tokenizer makes no token of this text."
            self._problem(file_number, row.line, "template", text)
            return
        pieces = pieces_of(ids, self.request.max_length)
        for number, piece in enumerate(pieces):
            self._write(file_number, row, piece, labels_of(piece), piece=number, cut=0)
        self.count.update(documents=1, pieces=len(pieces))

    def _write(self, file_number: int, row: Row, ids: list[int], labels: list[bool], *, piece: int, cut: int) -> None:
        self.ids.append(ids)
        self.labels.append(labels)
        self.source.append([file_number, row.line, row.index])
        self.pieces.append([piece])
        self.cut.append([cut])
        self.count.update(rows=1, tokens=len(ids), labels=sum(labels))
        self.offsets.append([self.count["tokens"]])
        self.longest = max(self.longest, len(ids))
        self.largest_id = max(self.largest_id, max(ids))

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
            "rows_without_labels", "documents", "pieces",
        )  # fmt: skip
        return {
            "key": key,
            **self.about,
            **{name: self.count[name] for name in names},
            "longest": self.longest,
            "longest_uncut": self.longest_uncut,
            "largest_id": self.largest_id,
            "problems": self.problems,
            "problem_counts": dict(self.problem_counts),
            "notes": dict(self.notes),
            "files": [
                {"path": path, "sha256": each.sha256, "rows": each.rows, "unit": unit}
                for path, each, unit in zip(self.request.files, self.scans, self.units, strict=True)
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


def refuse_profile(profile: str | None, file: str, line: int) -> None:
    """Raise Refusal where a profile is chosen for plain text: it would do nothing to it."""
    if profile is not None:
        raise Refusal(
            f"{file}, line {line:,} is plain text, and the profile {profile} is made for conversations. "
            "Choose no profile to train on text (--set profile.name=none).",
            "profile.name",
        )


def _batches(rows: Iterator[Row]) -> Iterator[list[Row]]:
    """Rows in groups that bound the memory of encoding them together."""
    batch: list[Row] = []
    characters = 0
    for row in rows:
        batch.append(row)
        characters += sum(len(message["content"]) for message in row.messages or []) + len(row.text or "")
        if len(batch) >= BATCH_ROWS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
