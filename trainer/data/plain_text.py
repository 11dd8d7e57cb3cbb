"""Plain text for continued pretraining: a document becomes token ids, its end included, and pieces of bounded length.

Every token is trained but the first of each piece, which nothing predicts. Text stays text: what looks like a control
token does not become one. Called by trainer.data.build, the doctor, the worker's views and the samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from trainer.data.encode import THINK_TAGS, PieceEncoder
from trainer.refusal import Refusal

# encoding costs up to 200 bytes of memory a character while it goes on, so a long text is encoded part by part
WINDOW_CHARACTERS = 1 << 20
_BORDER_CHARACTERS = 400
_BORDERS_TRIED = 20


class TextEncoder:
    """Encodes documents with one tokenizer: as `tokenizer(text)` would, then its end token.

    `chat_template` names what must not come out of a text even where the tokenizer does not flag it as special.
    Raises Refusal when the tokenizer has no end token.
    """

    def __init__(self, tokenizer: Any, chat_template: str | None = None) -> None:
        if tokenizer.eos_token_id is None:
            what = "The tokenizer has no end token (eos_token), so a document of plain text could not end."
            raise Refusal(what, "model_path")
        self._tokenizer = tokenizer
        self._careful: PieceEncoder | None = None
        added = tokenizer.added_tokens_decoder
        template = chat_template or ""
        self._control = {number for number, token in added.items() if token.special} | set(tokenizer.all_special_ids)
        self._control |= {n for n, token in added.items() if str(token) in template and str(token) not in THINK_TAGS}
        self.start, end = self._frame()
        self.end = end if tokenizer.eos_token_id in end else [*end, tokenizer.eos_token_id]

    def document(self, text: str) -> list[int]:
        """All ids of a document: what the tokenizer puts first, the text, its end. Raises Refusal."""
        ids = list(self.start)
        for part in self.parts(text):
            ids += part
        return ids + self.end

    def parts(self, text: str) -> Iterator[list[int]]:
        """The ids of the text alone, part by part; together they are those of the whole. Raises Refusal."""
        at = 0
        while at < len(text):
            stop = self._border(text, at + WINDOW_CHARACTERS)
            yield self._ids(text[at:stop])
            at = stop

    def _ids(self, text: str) -> list[int]:
        ids = self._plainly(text)
        if self._control.isdisjoint(ids):
            return ids
        if self._careful is None:
            self._careful = PieceEncoder(self._tokenizer, self._control)
        found = self._careful.contents([text])[0]
        if found is None:
            raise Refusal(
                "The tokenizer does not give this text back without turning a part of it into control tokens."
            )
        return found

    def _plainly(self, text: str) -> list[int]:
        return self._tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
        )["input_ids"]

    def _frame(self) -> tuple[list[int], list[int]]:
        """What the tokenizer puts before and behind a text by itself."""
        bare = self._plainly("a")
        whole = self._tokenizer("a", verbose=False)["input_ids"]
        for start in range(len(whole) - len(bare) + 1):
            if whole[start : start + len(bare)] == bare:
                return whole[:start], whole[start + len(bare) :]
        return [], []

    def _border(self, text: str, wanted: int) -> int:
        """Where to part a long text, near `wanted`: behind a line's end where both sides encode as they do together."""
        if wanted >= len(text):
            return len(text)
        at = wanted
        for _ in range(_BORDERS_TRIED):
            at = text.rfind("\n", wanted - WINDOW_CHARACTERS // 2, at) + 1
            if at == 0:
                break
            before, after = text[max(0, at - _BORDER_CHARACTERS) : at], text[at : at + _BORDER_CHARACTERS]
            if self._plainly(before + after) == self._plainly(before) + self._plainly(after):
                return at
            at -= 1
        raise Refusal(
            f"This tokenizer cannot encode a text of {len(text):,} characters in parts. "
            f"Split it into files or rows of at most {WINDOW_CHARACTERS:,} characters."
        )


def pieces_of(ids: list[int], limit: int) -> list[list[int]]:
    """`ids` in consecutive pieces of at most `limit` tokens (at least 2): nothing lost, nothing twice.

    A last token that would stand alone takes one from the piece before: alone, nothing would predict it.
    """
    starts = list(range(0, len(ids), limit))
    if len(starts) > 1 and len(ids) - starts[-1] == 1:
        starts[-1] -= 1
    return [ids[start:stop] for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True)]


def labels_of(piece: list[int]) -> list[bool]:
    """True for every token of a piece but its first."""
    return [False] + [True] * (len(piece) - 1)
