"""What a row must hold to be trained on: a conversation whose last turn is an answer, or a text.

Called by trainer.data.shapes for every row, whatever file it stood in; standard library only.
"""

from __future__ import annotations

import re
from typing import Any

from trainer.data.problems import PROBLEM_NAMES, Fault, kind, printable, shown
from trainer.data.strict import decoded

__all__ = [
    "PROBLEM_NAMES", "ROLES", "Fault", "checked", "document", "parse_document", "printable", "refuse_tools", "shown",
]  # fmt: skip

ROLES = ("system", "user", "assistant")

# keys that change what a message means; passing over them in silence would train something nobody wrote
_MEANINGFUL = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking", "images", "audio")
_UNWANTED = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
_UNWANTED_IN_TEXT = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f\ud800-\udfff]")  # books have page breaks (U+000C)
_PLAIN = {"role", "content"}


def parse_document(raw: bytes) -> str:
    """A whole file of plain text as it stands; raises Fault."""
    return document(decoded(raw))


def document(text: Any, key: str = "text") -> str:
    """A text that can be trained; raises Fault. `key` is where it stood."""
    if not isinstance(text, str):
        raise Fault("wrong_type", f"'{key}' is {kind(text)}; text is needed")
    if not text.strip():
        raise Fault("empty_text", "the text is empty; there is nothing to learn")
    if unwanted := _UNWANTED_IN_TEXT.search(text):
        raise Fault("characters", f"the text contains {_named(unwanted)}", unwanted.start())
    return text


def refuse_tools(row: dict[str, Any]) -> None:
    """Raise Fault where a row has what would change its meaning and is not trained."""
    if row.get("tools") or row.get("functions"):
        raise Fault("not_trained", "the row has tools, which are not trained; remove them to train the text")


def checked(messages: Any, key: str = "messages") -> list[dict[str, str]]:
    """The messages with "role" and "content" alone, in an order that can be trained. Raises Fault."""
    if not isinstance(messages, list):
        raise Fault("wrong_type", f"'{key}' is {kind(messages)}; a list is needed")
    if not messages:
        raise Fault("no_messages", f"the '{key}' list is empty")
    found = [_message(number, message) for number, message in enumerate(messages, 1)]
    _check_order([message["role"] for message in found])
    for number, message in enumerate(found, 1):
        if message["role"] == "assistant" and not message["content"].strip():
            raise Fault("empty_answer", f"message {number} is an empty answer; there is nothing to learn")
    return found


def _message(number: int, message: Any) -> dict[str, str]:
    if not isinstance(message, dict):
        raise Fault("wrong_type", f"message {number} is {kind(message)}; an object is needed")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        raise Fault("wrong_type", f"the role of message {number} is {kind(role)}; text is needed")
    if role not in ROLES:
        allowed = ", ".join(ROLES)
        raise Fault("unknown_role", f"message {number} has the role {shown(role)}; allowed: {allowed}")
    if message.keys() != _PLAIN:
        _check_extras(number, message)
    if not isinstance(content, str):
        raise Fault("wrong_type", f"the content of message {number} is {kind(content)}; text is needed")
    if unwanted := _UNWANTED.search(content):
        raise Fault("characters", f"message {number} contains {_named(unwanted)}")
    return {"role": role, "content": content}


def _named(unwanted: re.Match[str]) -> str:
    code = ord(unwanted[0])
    what = "half of a surrogate pair" if code >= 0xD800 else "a control character"
    return f"{what} (U+{code:04X}) at character {unwanted.start() + 1:,}"


def _check_extras(number: int, message: dict[str, Any]) -> None:
    for key in _MEANINGFUL:
        if message.get(key):
            cure = "remove it or write it into the content"
            raise Fault("not_trained", f"message {number} has '{key}', which is not trained; {cure}")
    if message.get("weight") not in (None, 1):
        raise Fault("not_trained", f"message {number} has a weight other than 1, which is not supported")


def _check_order(roles: list[str]) -> None:
    if roles[-1] != "assistant":
        raise Fault("no_answer", f"the last turn is from the {roles[-1]}; there is nothing to learn")
    first = 1 if roles[0] == "system" else 0
    if "system" in roles[first:]:
        raise Fault("order", "a system message stands after the first message; it belongs at the start")
    if roles[first] != "user":
        raise Fault("order", "the first turn is from the assistant; a user turn is needed before it")
    for number in range(first + 1, len(roles)):
        if roles[number] == roles[number - 1]:
            which = f"messages {number} and {number + 1} are both from the {roles[number]}"
            raise Fault("order", f"{which}; join them or add the turn between")
