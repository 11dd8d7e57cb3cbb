"""Logits processors of the profiles: what generation may not say, and when it has to end.

They work in `model.generate(logits_processor=[...])` on batches, beams and any float dtype. Each row is
judged from its own tokens; the one thing remembered is the prompt, so a list serves ONE generate call (or
`reset()` between two).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from profiles.emoji_think import STOP_POOL, Sign, stop_asked

if TYPE_CHECKING:
    import torch

TAG_PENALTY = 80.0
# (first step, multiplier): the habit of opening a think block is strongest at the start of an answer
TAG_SCHEDULE = ((0, 8.0), (4, 2.0), (8, 1.5), (12, 1.0))
STOP_PENALTY = 100.0
STOP_ESCALATION = 10.0
# 100 * 10^n leaves float16 at n = 3 and float32 near n = 37; from here on a larger penalty changes nothing
# anyway
STOP_PENALTY_LIMIT = 10_000.0
END_REWARD = 50.0
MOST_STOPS = 4
# four emojis of two code points, each at most three tokens a byte-level vocabulary could split further
_TAIL_TOKENS = 64
_UNFINISHED = "\ufffd"


def single_token_ids(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    """The ids of those `texts` that are one token; the pieces of the others also occur in ordinary text."""
    encoded = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    return [ids[0] for ids in encoded if len(ids) == 1]


def end_ids(tokenizer: Any) -> list[int]:
    """The ids that end a turn: the tokenizer's eos and ChatML's <|im_end|>. Raises ValueError when there is
    neither."""
    ids = {tokenizer.eos_token_id, tokenizer.get_vocab().get("<|im_end|>")} - {None}
    if not ids:
        raise ValueError(
            "This tokenizer has no end-of-turn token, so an answer could never end after its stop emojis. "
            "Set eos_token in tokenizer_config.json."
        )
    return sorted(ids)


class Prompt:
    """Remembers the prompt of a generate call and tells how many tokens were generated since."""

    def __init__(self) -> None:
        self._ids: torch.Tensor | None = None  # (rows, prompt tokens)

    def reset(self) -> None:
        """Forget the prompt: the next call starts a new generation."""
        self._ids = None

    def starts(self, input_ids: torch.Tensor) -> bool:
        """Whether `input_ids` (rows, tokens) is a new prompt; it is then the one that is remembered."""
        known = self._ids
        if (
            known is not None
            and known.shape[0] == input_ids.shape[0]
            and known.shape[1] <= input_ids.shape[1]
            and bool((input_ids[:, : known.shape[1]] == known).all())
        ):
            return False
        self._ids = input_ids.clone()
        return True

    @property
    def length_tokens(self) -> int:
        """Tokens in the prompt, padding included."""
        assert self._ids is not None, "starts() comes first"
        return self._ids.shape[1]


class TagPenalty:
    """Lowers the scores of think tags, most at the start of an answer."""

    label = "think-tag penalty"

    def __init__(self, ids: Sequence[int]) -> None:
        self._ids = list(ids)
        self._prompt = Prompt()

    def reset(self) -> None:
        """Start a new generation."""
        self._prompt.reset()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """`scores` (rows, vocabulary) with the tags lowered; `input_ids` is (rows, tokens) with the
        prompt."""
        self._prompt.starts(input_ids)
        step = input_ids.shape[1] - self._prompt.length_tokens
        multiplier = [factor for first, factor in TAG_SCHEDULE if step >= first][-1]
        result = scores.clone()
        result[:, self._ids] = _lowered(scores[:, self._ids], TAG_PENALTY * multiplier)
        return result


class StopPenalty:
    """After the stop emojis the answer has to end: all else sinks tenfold a token, the end of the turn rises.

    The stop is the one that the prompt's last instruction asks for, written as often as asked. Without an
    instruction it is any stop emoji written 2 to 4 times, once something else follows (or at 4, the most
    there is).
    """

    label = "end after the stop emojis"

    def __init__(self, tokenizer: Any, ends: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ends = list(ends)
        self._prompt = Prompt()
        self._rows: list[_Row] = []

    def reset(self) -> None:
        """Start a new generation."""
        self._prompt.reset()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """`scores` (rows, vocabulary), changed in the rows that have stopped; `input_ids` is (rows,
        tokens)."""
        import torch

        if self._prompt.starts(input_ids):
            self._rows = [_Row(self._tokenizer, stop_asked(self._text(ids))) for ids in input_ids.tolist()]
        generated = input_ids[:, self._prompt.length_tokens :].tolist()
        past = [row.tokens_past_stop(ids) for row, ids in zip(self._rows, generated, strict=True)]
        result = scores.clone()
        highest = torch.finfo(scores.dtype).max
        for place, tokens in enumerate(past):
            if tokens is not None:
                result[place] = _lowered(scores[place], stop_penalty(tokens))
                result[place, self._ends] = (scores[place, self._ends] + END_REWARD).clamp(max=highest)
        return result

    def _text(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def stop_penalty(tokens_past: int) -> float:
    """What is taken off the scores `tokens_past` tokens after the stop: 100, 1,000, then 10,000 for good."""
    return min(STOP_PENALTY * STOP_ESCALATION ** min(tokens_past, 8), STOP_PENALTY_LIMIT)


def _lowered(scores: torch.Tensor, penalty: float) -> torch.Tensor:
    # a forbidden token (-inf) stays forbidden; a finite score stays finite, so that no inf - inf can follow
    import torch

    lowest = torch.finfo(scores.dtype).min
    return torch.where(torch.isinf(scores), scores, (scores - penalty).clamp(min=lowest))


class _Row:
    """Where one row of a batch has its stop. Told tokens that do not continue the last ones (beams), it
    starts over."""

    def __init__(self, tokenizer: Any, asked: Sign | None) -> None:
        self._tokenizer = tokenizer
        self._asked = asked
        self._ids: list[int] = []
        self._stop_end: int | None = None

    def tokens_past_stop(self, ids: list[int]) -> int | None:
        """How many of the generated `ids` lie after the stop, or None when there is none yet."""
        if ids[: len(self._ids)] != self._ids:
            self._ids, self._stop_end = [], None
        while len(self._ids) < len(ids):
            self._ids.append(ids[len(self._ids)])
            if self._stop_end is None and self._stopped():
                self._stop_end = len(self._ids)
        return None if self._stop_end is None else len(ids) - self._stop_end

    def _stopped(self) -> bool:
        tail = self._tokenizer.decode(
            self._ids[-_TAIL_TOKENS:], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        if self._asked is not None:
            return self._asked.text in tail
        return any(_ends_unasked(tail.rstrip(_UNFINISHED), emoji) for emoji in STOP_POOL)


def _ends_unasked(text: str, emoji: str) -> bool:
    """Whether `text` ends with `emoji` four times, or two or three times and then something that is not the
    emoji."""
    if text.endswith(emoji * MOST_STOPS):
        return True
    before, run, after = text.rpartition(emoji * 2)
    return bool(run) and bool(after) and not emoji.startswith(after)
