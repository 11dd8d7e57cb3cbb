"""The one renderer: a conversation becomes token ids and label marks, for training, samples and previews.

Labels are the assistants' contents and the tokens that close their turns, nothing else; what a template
writes before a content is context. Called by trainer.data.tokens, the doctor, the smoke test and the samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from trainer.data.encode import PieceEncoder
from trainer.data.template import PLAIN_CHATML, Messages, Pieces, Template
from trainer.refusal import Refusal

# part of the cache key of tokens: raise it with every change that can move one token or label
RENDERER_VERSION = 2

Kind = Literal["label", "context", "special"]

_THINK_WORDS = ("<think>", "enable_thinking", "reasoning_content")
_STAND_IN = "Yes."
_LONGEST_CHARACTER = 4  # bytes of UTF-8, so tokens at most


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens start..stop of a rendered row and the text they come from; `message` as in Piece."""

    text: str
    start: int
    stop: int
    message: int | None


@dataclass(frozen=True, slots=True)
class Rendered:
    """One conversation as tokens; `labels[i]` is True where token i is trained.

    `notes` as in Pieces, and no_end_token where no token closes an answer: a model tuned on it cannot stop.
    """

    ids: list[int]
    labels: list[bool]
    segments: tuple[Segment, ...]
    notes: tuple[str, ...]
    special_ids: frozenset[int]

    @property
    def kinds(self) -> list[Kind]:
        """What each token is: trained, or a control token of the template, or other context."""
        return [
            "label" if label else "special" if number in self.special_ids else "context"
            for number, label in zip(self.ids, self.labels, strict=True)
        ]


class Renderer:
    """Renders conversations of one tokenizer, template and date (YYYY-MM-DD, what a template gets for today).

    `chat_template` None: the tokenizer's own. Raises Refusal when there is none or it does not compile. Not
    for two threads at once: a tokenizer carries state from call to call.
    """

    def __init__(self, tokenizer: Any, chat_template: str | None, date: str) -> None:
        source = chat_template if chat_template is not None else own_template(tokenizer)
        if source is None:
            raise Refusal("The model has no chat template. Choose plain ChatML.")
        self.template = Template(source, date, tokenizer.special_tokens_map)
        self._encoder = PieceEncoder(tokenizer)
        self._closing: dict[tuple[str, str | None], int] = {}

    def render(self, messages: Messages) -> Rendered:
        """The tokens and labels of one conversation; raises Refusal when the contents cannot be kept."""
        rendered = self.render_many([messages])[0]
        if isinstance(rendered, Refusal):
            raise rendered
        return rendered

    def render_many(self, rows: Sequence[Messages]) -> list[Rendered | Refusal]:
        """Render many rows together, which is much faster; a row that is refused stands as its Refusal."""
        cut: list[Pieces | Refusal] = []
        for messages in rows:
            try:
                pieces = self.template.pieces(messages)
                for place, piece in enumerate(pieces.pieces[::2]):
                    self._encoder.scaffold(piece.text, first=place == 0)
                cut.append(pieces)
            except Refusal as refusal:
                cut.append(refusal)
        texts = [piece.text for row in cut if isinstance(row, Pieces) for piece in row.pieces[1::2]]
        contents = iter(self._encoder.contents(texts))
        rendered: list[Rendered | Refusal] = []
        for messages, row in zip(rows, cut, strict=True):
            if isinstance(row, Pieces):
                own = [next(contents) for _ in row.pieces[1::2]]
                rendered.append(self._assemble(messages, row, own))
            else:
                rendered.append(row)
        return rendered

    def prompt(self, messages: Messages, answer: str = _STAND_IN) -> list[int]:
        """The tokens before the answer to `messages` (last turn: the user), exactly as training has them.

        `answer` is an answer of the kind trained on: some templates write something else before an answer
        that thinks than before one that does not. Raises Refusal as `render` does.
        """
        if not messages or messages[-1]["role"] == "assistant":
            raise Refusal("A prompt ends with a turn of the user.")
        whole = self.template.pieces([*messages, {"role": "assistant", "content": answer}])
        place = next(at for at, piece in enumerate(whole.pieces) if piece.message == len(messages))
        row = Pieces(whole.pieces[:place], whole.notes)
        rendered = self._assemble(messages, row, self._encoder.contents([p.text for p in row.pieces[1::2]]))
        if isinstance(rendered, Refusal):
            raise rendered
        return rendered.ids

    def _assemble(self, messages: Messages, row: Pieces, contents: list[list[int] | None]) -> Rendered | Refusal:
        final = row.pieces[-1].text if messages[-1]["role"] == "assistant" else None
        ids: list[int] = []
        labels: list[bool] = []
        segments: list[Segment] = []
        after_answer = endless = False
        for place, piece in enumerate(row.pieces):
            if piece.message is None:
                own = self._encoder.scaffold(piece.text, first=place == 0)
                trained = self._closing_tokens(piece.text, final) if after_answer else 0
                endless = endless or (after_answer and trained == 0)
            else:
                found = contents[place // 2]
                if found is None:
                    return Refusal(f"The tokenizer does not give the text of message {piece.message + 1} back.")
                own = found
                after_answer = messages[piece.message]["role"] == "assistant"
                trained = len(own) if after_answer else 0
            segments.append(Segment(piece.text, len(ids), len(ids) + len(own), piece.message))
            labels += [True] * trained + [False] * (len(own) - trained)
            ids += own
        if labels:
            labels[0] = False  # nothing stands before the first token that could predict it
        notes = (*row.notes, "no_end_token") if endless else row.notes
        return Rendered(ids, labels, tuple(segments), notes, self._encoder.added_ids)

    def _closing_tokens(self, scaffold: str, final: str | None) -> int:
        """How many tokens at the start of the template's text after an answer close its turn.

        These are the control tokens that follow at once (or after white space, which must be learnt to reach
        them), as far as the end of the whole conversation has them too: what is more opens the next turn.
        """
        key = (scaffold, final)
        if key not in self._closing:
            ids = self._encoder.scaffold(scaffold, first=False)
            added = self._encoder.added_ids
            start = 0
            while start < len(ids) and ids[start] not in added and self._encoder.is_blank(ids[start]):
                start += 1
            stop = start
            while stop < len(ids) and ids[stop] in added:
                stop += 1
            if final is not None and final != scaffold:
                last = self._encoder.scaffold(final, first=False)
                while stop > start + 1 and ids[:stop] != last[:stop]:
                    stop -= 1
            elif final is None:
                stop = min(stop, start + 1)
            self._closing[key] = stop if stop > start else 0
        return self._closing[key]


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text; they join to the whole.

    Where several tokens make one character, it stands with the first of them and the others are empty.
    """
    texts: list[str] = []
    before: list[int] = []
    group: list[int] = []
    for number in ids:
        group.append(number)
        known = tokenizer.decode(before, skip_special_tokens=False)
        text = tokenizer.decode(before + group, skip_special_tokens=False)[len(known) :]
        if text.endswith("\ufffd") and len(group) < _LONGEST_CHARACTER:
            continue
        texts += [text] + [""] * (len(group) - 1)
        before, group = group, []
    if group:
        known = tokenizer.decode(before, skip_special_tokens=False)
        rest = tokenizer.decode(before + group, skip_special_tokens=False)[len(known) :]
        texts += [rest] + [""] * (len(group) - 1)
    return texts


def own_template(tokenizer: Any) -> str | None:
    """The tokenizer's chat template, the one called "default" where it has several, or None."""
    template = tokenizer.chat_template
    return template.get("default") if isinstance(template, dict) else template


def template_for(tokenizer: Any, profile: Any | None, choice: str = "model") -> tuple[str, str]:
    """(chat template to render with, a sentence about it or ""); `profile` as in profiles.contract, or None.

    Plain ChatML where `choice` says "chatml", and where the model's template writes thinking blocks while the
    profile brings signs of its own. Raises Refusal when there is no template, or no token to end a turn with.
    """
    if choice == "chatml":
        return _plain_chatml(tokenizer), ""
    own = own_template(tokenizer)
    if own is None:
        raise Refusal(
            "The model has no chat template, so it is not known how its conversations are put together. "
            "Use plain ChatML (--set data.chat_template=chatml), or choose a model that has one.",
            "data.chat_template",
        )
    if profile is not None and profile.plain_template and any(word in own for word in _THINK_WORDS):
        use = f"with the profile {profile.name}, plain ChatML is used"
        return _plain_chatml(tokenizer), f"The model's chat template writes thinking blocks; {use}."
    return own, ""


def _plain_chatml(tokenizer: Any) -> str:
    if "<|im_end|>" in tokenizer.added_tokens_encoder:
        return PLAIN_CHATML
    if tokenizer.eos_token is None:
        raise Refusal("The tokenizer has neither <|im_end|> nor an end token, so an answer could not end.")
    return PLAIN_CHATML.replace("'<|im_end|>'", "eos_token")
