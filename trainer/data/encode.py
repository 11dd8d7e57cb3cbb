"""Text to token ids, piece by piece: the template's pieces with special tokens, contents without.

A person who types <|im_end|> must never end a turn with it, and every content must decode to itself. Owns
the tricks that this needs with tokenizers that put a space before whatever they encode. Called by
trainer.data.render.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from trainer.data.conversation import shown
from trainer.refusal import Refusal

# some tokenizers put a space before their first token: an anchor takes it, and its ids are cut off again
ANCHORS = ("\n", "|", "1", "。")
# tags that answers are made of: they may stand in contents even where a template writes them too
THINK_TAGS = ("<think>", "</think>")


class PieceEncoder:
    """Encodes scaffolds and contents of one tokenizer so that their ids can be put end to end.

    `control`: ids that must not come out of a content, besides those that the tokenizer flags as special.
    """

    def __init__(self, tokenizer: Any, control: Iterable[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        added = tokenizer.added_tokens_decoder
        self.added_ids = frozenset(added) | frozenset(tokenizer.all_special_ids)
        self._names = {number: str(token) for number, token in added.items()}
        self._control = {number for number, token in added.items() if token.special}
        self._control.update(tokenizer.all_special_ids, control)
        self._scaffolds: dict[tuple[str, bool], list[int]] = {}
        self._anchor = "" if self._joins() else ANCHORS[0]
        self._fold = self._folding()

    def scaffold(self, text: str, first: bool) -> list[int]:
        """The ids of a template's piece; `first` where it starts the conversation. Raises Refusal."""
        if (text, first) not in self._scaffolds:
            if len(self._scaffolds) >= 4096:
                self._scaffolds.clear()
            ids = self._ids([text], "" if first else self._anchor, split=False)[0]
            if ids is None:
                raise Refusal(f"The tokenizer cannot encode the chat template's text {shown(text)} on its own.")
            self._scaffolds[text, first] = ids
            # whatever token a template builds its turns from must not come out of a content
            added = self.added_ids.intersection(ids)
            self._control |= {n for n in added if self._names.get(n) not in THINK_TAGS}
        return self._scaffolds[text, first]

    def contents(self, texts: Sequence[str]) -> list[list[int] | None]:
        """The ids of each content, without control tokens; None where they do not decode to the text."""
        found = self._ids(texts, self._anchor, split=True)
        return [
            ids if ids is not None and self._control.isdisjoint(ids) else self._carefully(text)
            for text, ids in zip(texts, found, strict=True)
        ]

    def is_blank(self, number: int) -> bool:
        """Whether a token is white space alone."""
        return not self._tokenizer.decode([number], skip_special_tokens=False).strip()

    def _carefully(self, text: str) -> list[int] | None:
        """Encode a content that did not go through: with other anchors, and cut inside look-alike tokens."""
        for anchor in dict.fromkeys((self._anchor, *ANCHORS)):
            ids: list[int] = []
            for part in self._cut_look_alikes(text):
                more = self._ids([part], anchor, split=True)[0]
                if more is None:
                    break
                ids += more
            else:
                if self._control.isdisjoint(ids):
                    return ids
        return None

    def _cut_look_alikes(self, text: str) -> list[str]:
        names = sorted((self._names[n] for n in self._control if self._names.get(n)), key=len, reverse=True)
        if not names:
            return [text]
        cuts = [found.start() + 1 for found in re.finditer("|".join(map(re.escape, names)), text)]
        borders = [0, *cuts, len(text)]
        return [text[start:stop] for start, stop in zip(borders, borders[1:], strict=False)]

    def _ids(self, texts: Sequence[str], anchor: str, split: bool) -> list[list[int] | None]:
        """Ids of each text behind `anchor`, without those of the anchor; None where it does not come back.

        `split` True: special tokens in the text become ordinary tokens.
        """
        if not texts:
            return []
        encoded = self._encode([anchor + text for text in texts] + [anchor], split)
        head = encoded.pop()
        ids = [own[len(head) :] if own[: len(head)] == head else None for own in encoded]
        if not split:
            return ids
        decoded = self._decode([head + (own or []) for own in ids] + [head])
        start = decoded.pop()
        return [
            own if own is not None and self._same(back, start + text) else None
            for own, back, text in zip(ids, decoded, texts, strict=True)
        ]

    def _same(self, back: str, text: str) -> bool:
        return back == text or self._fold(back) == self._fold(text)

    def _encode(self, texts: list[str], split: bool) -> list[list[int]]:
        return self._tokenizer(
            texts,
            add_special_tokens=False,
            split_special_tokens=split,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]

    def _decode(self, ids: list[list[int]]) -> list[str]:
        if self._backend is not None:  # the same without a type check of every single id
            return self._backend.decode_batch(ids, skip_special_tokens=False)
        decode = self._tokenizer.batch_decode
        return decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _joins(self) -> bool:
        """Whether texts encode to the same ids behind others as on their own."""
        together, head, own = self._encode(["\na", "\n", "a"], split=True)
        return together == head + own

    def _folding(self) -> Callable[[str], str]:
        """The Unicode normal form that the tokenizer puts all text into, as a function (often: none)."""
        samples = ["e\u0301", "\ufb01"]
        ids = self._encode([self._anchor + sample for sample in samples], split=True)
        decomposed, ligature = (text[len(self._anchor) :] for text in self._decode(ids))
        if ligature.endswith("fi"):
            return lambda text: unicodedata.normalize("NFKC", text)
        if decomposed.endswith("\u00e9"):
            return lambda text: unicodedata.normalize("NFC", text)
        return lambda text: text
