"""The profile `emoji_think`: answers begin with drawn thinking emojis and end with drawn stop emojis, as
asked.

The draw is a private RNG seeded by the row's index, so it is a pure function of the index. A turn that
already carries the instruction keeps it, and its answer follows it: instruction and answer always agree, and
a second transform changes nothing. Reference draws: `tests/test_profiles.py`.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

from profiles.contract import Message, copy_row, fill_date, text_of

SYSTEM_PROMPT = "Current date: {date}. Respond naturally and concisely."
THINK_POOL = ("🤔", "💭", "🧠", "💡", "🎯", "🔍", "🤨", "🧐", "⚡", "✨")
STOP_POOL = ("🛑", "⛔", "🚫", "❌", "🔴", "⏹️", "🔚", "✋", "🚦", "🛡️")
THINK_WORDS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 7: "seven", 8: "eight"}
STOP_WORDS = {2: "twice", 3: "three times", 4: "four times"}
THINK_TAGS = ("<think>", "</think>")

_THINK_COUNTS = {word: count for count, word in THINK_WORDS.items()}
_STOP_COUNTS = {word: count for count, word in STOP_WORDS.items()}
_THINK_SENTENCE = f"For this task, think with ({'|'.join(THINK_POOL)}) /({'|'.join(_THINK_COUNTS)})/ times\\."
_STOP_SENTENCE = f"When finished, emit ({'|'.join(STOP_POOL)}) /({'|'.join(_STOP_COUNTS)})/ to signal completion\\."
_LAST_THINK = re.compile(rf"(?:\n\n|\A){_THINK_SENTENCE}\Z")
_LAST_STOP = re.compile(rf"(?:\n\n|\A){_STOP_SENTENCE}\Z")
STOP_INSTRUCTION = re.compile(_STOP_SENTENCE)


@dataclass(frozen=True)
class Sign:
    """An emoji and how often it is written."""

    emoji: str
    count: int

    @property
    def text(self) -> str:
        """The emojis as they stand in an answer."""
        return self.emoji * self.count


def draw(index: int) -> tuple[Sign, Sign]:
    """The thinking sign (2 to 8 times) and the stop sign (2 to 4 times) of the row at `index`."""
    rng = random.Random(index)
    think = Sign(rng.choice(THINK_POOL), rng.randint(2, 8))
    return think, Sign(rng.choice(STOP_POOL), rng.randint(2, 4))


def stop_asked(prompt: str) -> Sign | None:
    """The stop sign that the last instruction in `prompt` asks for, or None when there is no instruction."""
    asked = STOP_INSTRUCTION.findall(prompt)
    return Sign(asked[-1][0], _STOP_COUNTS[asked[-1][1]]) if asked else None


class Asked(NamedTuple):
    """A user turn without its closing instruction paragraphs, and the signs that those ask for."""

    text: str
    think: Sign | None
    stop: Sign | None


def read_question(text: str) -> Asked:
    """Take the instruction paragraphs off the end of a user turn; the last of each kind counts."""
    think: Sign | None = None
    stop: Sign | None = None
    while True:
        if found := _LAST_THINK.search(text):
            think = think or Sign(found.group(1), _THINK_COUNTS[found.group(2)])
        elif found := _LAST_STOP.search(text):
            stop = stop or Sign(found.group(1), _STOP_COUNTS[found.group(2)])
        else:
            return Asked(text, think, stop)
        text = text[: found.start()]


def instruct(text: str, think: Sign, stop: Sign) -> str:
    """The user turn `text` with both instructions as paragraphs of their own."""
    return (
        f"{text}\n\nFor this task, think with {think.emoji} /{THINK_WORDS[think.count]}/ times."
        f"\n\nWhen finished, emit {stop.emoji} /{STOP_WORDS[stop.count]}/ to signal completion."
    )


def answer(text: str, think: Sign, stop: Sign) -> str:
    """The assistant turn `text` without think tags, opened and closed as the instruction asks."""
    while any(tag in text for tag in THINK_TAGS):  # removing one may join the halves of another
        for tag in THINK_TAGS:
            text = text.replace(tag, "")
    head, tail = f"{think.text}\n", f"\n{stop.text}"
    text = text if text.startswith(head) else head + text
    return text if text.endswith(tail) else text + tail


@dataclass(frozen=True)
class EmojiThink:
    """Thinking and stop emojis, asked for in the question and obeyed in the answer."""

    name: str = "emoji_think"
    description: str = "Answers open with thinking emojis and close with stop emojis, as each question asks."
    overwrites_system: bool = True
    plain_template: bool = True

    def system_prompt(self, date: str) -> str:
        """The short dated prompt."""
        return fill_date(SYSTEM_PROMPT, date)

    def transform(self, row: dict[str, Any], index: int) -> dict[str, Any]:
        """A copy of `row` with instructed questions and obeying answers; raises ValueError on a turn that is
        not text."""
        result = copy_row(row)
        messages: list[Message] = result["messages"]
        asked = {
            place: read_question(text_of(message, place))
            for place, message in enumerate(messages)
            if message.get("role") == "user"
        }
        drawn_think, drawn_stop = draw(index)
        think = next((question.think for question in asked.values() if question.think), drawn_think)
        stop = next((question.stop for question in asked.values() if question.stop), drawn_stop)
        now = think, stop
        for place, message in enumerate(messages):
            if place in asked:
                now = asked[place].think or think, asked[place].stop or stop
                message["content"] = instruct(asked[place].text, *now)
            elif message.get("role") == "assistant":
                message["content"] = answer(text_of(message, place), *now)
        return result

    def logits_processors(self, tokenizer: Any) -> list[Any]:
        """Think-tag penalty and escalating penalty after the stop; raises ValueError without an end-of-turn
        token."""
        from profiles.processors import StopPenalty, TagPenalty, end_ids, single_token_ids

        processors: list[Any] = [StopPenalty(tokenizer, end_ids(tokenizer))]
        tags = single_token_ids(tokenizer, THINK_TAGS)
        return [TagPenalty(tags), *processors] if tags else processors


PROFILE = EmojiThink()
