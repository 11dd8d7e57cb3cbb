"""What every profile offers, and the three pure helpers that profiles and the data pipeline share.

A profile is a frozen object without state: the same row and index give the same text in every process.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Protocol

Message = dict[str, Any]

# {name}, {0}, {a.b}, {a[0]}, {a!r}, {a:>5} and {}: whatever str.format or a template engine would have filled
_PLACEHOLDER = re.compile(r"\{(?:\s*[\w-]+(?:[.\[!][^{}]*|:(?!\s)[^{}]*|\s*))?\}")
_LATEX_COMMAND = re.compile(r"\\[A-Za-z]+(?:\{[^{}]*\})+")


class Profile(Protocol):
    """How a row becomes training text. All methods are pure; none changes its arguments."""

    @property
    def name(self) -> str:
        """The word in the config."""
        ...

    @property
    def description(self) -> str:
        """One line for a person."""
        ...

    @property
    def overwrites_system(self) -> bool:
        """True: the profile's system prompt replaces the row's own. False: only where the row has none."""
        ...

    @property
    def plain_template(self) -> bool:
        """True: where the model's chat template injects think blocks, plain ChatML is used instead."""
        ...

    def system_prompt(self, date: str) -> str:
        """The system prompt with `date` (YYYY-MM-DD) filled in; empty when the profile has none."""
        ...

    def transform(self, row: dict[str, Any], index: int) -> dict[str, Any]:
        """A new row with changed turns. `index` is the row's 0-based place in its source file. Raises
        ValueError."""
        ...

    def logits_processors(self, tokenizer: Any) -> list[Any]:
        """New processors for ONE call of `model.generate(logits_processor=...)`; may be empty."""
        ...


def copy_row(row: dict[str, Any]) -> dict[str, Any]:
    """A copy of `row` whose messages may be changed freely; raises ValueError when it has no list of
    messages."""
    messages = row.get("messages")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError("The row has no 'messages': a list of {role, content} is needed.")
    return {**row, "messages": [dict(message) for message in messages]}


def text_of(message: Message, place: int) -> str:
    """The text of turn number `place` (0-based); raises ValueError when its content is not text."""
    content = message.get("content")
    if not isinstance(content, str):
        role = str(message.get("role"))[:40]
        raise ValueError(
            f"Message {place + 1} ({role}) has content of type {type(content).__name__}; this profile needs "
            "plain text. Write the content as one text, or choose the profile plain."
        )
    return content


def with_system(messages: Sequence[Message], prompt: str, overwrite: bool) -> list[Message]:
    """New messages with `prompt` as the system message; an empty prompt adds and replaces nothing.

    `overwrite` True: a leading system message is replaced, else one is put first. False: one is put first
    only where the conversation has no system message at all.
    """
    copies = [dict(message) for message in messages]
    if not prompt:
        return copies
    system = {"role": "system", "content": prompt}
    leads = bool(copies) and copies[0].get("role") == "system"
    if overwrite:
        return [system, *copies[1:]] if leads else [system, *copies]
    if any(message.get("role") == "system" for message in copies):
        return copies
    return [system, *copies]


def fill_date(template: str, date: str) -> str:
    """`template` with every literal {date} replaced; raises ValueError on any other placeholder.

    Braces that are no placeholder (JSON such as {"a": 1}, a LaTeX command such as \\boxed{x}) stay as they
    are.
    """
    rest = _LATEX_COMMAND.sub("", template.replace("{date}", ""))
    unknown = _PLACEHOLDER.search(rest)
    if unknown:
        raise ValueError(
            f"The system prompt has the placeholder {unknown.group()[:60]}, which nothing fills in: the "
            "model would see it as it stands. The only one known is {date}."
        )
    return template.replace("{date}", date)
