"""What one line must hold to be trained on: strict JSON, then a conversation whose last turn is an answer, or a text.

Owns the codes of problems and the words for them. Called by trainer.data.formats for every line; standard
library only.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

ROLES = ("system", "user", "assistant")
MAX_NUMBER_DIGITS = 400

# one short name for each code, as the summary says it: "38 no answer · 2 bad JSON"
PROBLEM_NAMES = {
    "no_answer": "no answer",
    "empty_answer": "empty answer",
    "bad_json": "bad JSON",
    "unknown_role": "unknown role",
    "order": "turns out of order",
    "wrong_type": "wrong type",
    "no_messages": "no messages and no text",
    "empty_text": "empty text",
    "text_too_long": "text too long",
    "not_trained": "parts that are not trained",
    "characters": "characters that are not text",
    "not_utf8": "not UTF-8",
    "line_too_long": "line too long",
    "wrong_format": "not JSON Lines",
}

# keys that change what a message means; passing over them in silence would train something nobody wrote
_MEANINGFUL = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking", "images", "audio")
_UNWANTED = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
_UNWANTED_IN_TEXT = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f\ud800-\udfff]")  # books have page breaks (U+000C)


class Fault(Exception):
    """A row's problem on its way out: a code of PROBLEM_NAMES and a clause without the line number."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.text = text


def parse_row(raw: bytes) -> list[dict[str, str]] | str:
    """What one line holds: messages, each with "role" and "content" only, or a document of plain text. Raises Fault."""
    value = _value(raw)
    if isinstance(value, dict) and value.get("messages") is None and value.get("text") is not None:
        if not isinstance(value["text"], str):
            raise Fault("wrong_type", f"'text' is {_kind(value['text'])}; text is needed")
        return _document(value["text"])
    return _conversation(value)


def parse_document(raw: bytes) -> str:
    """A whole file of plain text as it stands; raises Fault."""
    return _document(_decoded(raw))


def _document(text: str) -> str:
    if not text.strip():
        raise Fault("empty_text", "the text is empty; there is nothing to learn")
    if unwanted := _UNWANTED_IN_TEXT.search(text):
        raise Fault("characters", f"the text contains {_named(unwanted)}")
    return text


def _decoded(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Fault("not_utf8", f"byte {error.start + 1:,} is not UTF-8 text") from None


def _value(raw: bytes) -> Any:
    text = _decoded(raw)
    if "\x00" in text:
        raise Fault("characters", "the line contains a NUL character")
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        what = error.msg[:1].lower() + error.msg[1:]
        raise Fault("bad_json", f"bad JSON at character {error.pos + 1:,}: {what}") from None
    except RecursionError:
        raise Fault("bad_json", "the JSON is nested too deeply") from None


def printable(text: str, limit: int) -> str:
    """At most `limit` characters of foreign text, control and direction characters escaped."""
    safe = "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text[:limit])
    return safe if len(text) <= limit else safe + "…"


def shown(text: str) -> str:
    """Foreign text inside a sentence: short and quoted."""
    return f"'{printable(text, 40)}'"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise Fault("bad_json", f"the key {shown(twice)} stands twice in one object")
    return found


def _no_constant(text: str) -> NoReturn:
    raise Fault("bad_json", f"{text} is not JSON")


def _integer(text: str) -> int:
    if len(text) > MAX_NUMBER_DIGITS:
        raise Fault("bad_json", f"a number has {len(text):,} digits")
    return int(text)


def _real(text: str) -> float:
    if len(text) > MAX_NUMBER_DIGITS or not math.isfinite(value := float(text)):
        raise Fault("bad_json", f"the number {shown(text)} is out of range")
    return value


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_constant=_no_constant, parse_int=_integer, parse_float=_real
)


def _conversation(value: Any) -> list[dict[str, str]]:
    if not isinstance(value, dict):
        raise Fault("wrong_type", f"the row is {_kind(value)}; an object with 'messages' or 'text' is needed")
    messages = value.get("messages")
    if messages is None:
        keys = ", ".join(shown(key) for key in list(value)[:5]) or "none"
        raise Fault("no_messages", f"there is no 'messages' list and no 'text' (keys found: {keys})")
    if not isinstance(messages, list):
        raise Fault("wrong_type", f"'messages' is {_kind(messages)}; a list is needed")
    if not messages:
        raise Fault("no_messages", "the 'messages' list is empty")
    if value.get("tools") or value.get("functions"):
        raise Fault("not_trained", "the row has tools, which are not trained; remove them to train the text")
    checked = [_message(number, message) for number, message in enumerate(messages, 1)]
    _check_order([message["role"] for message in checked])
    for number, message in enumerate(checked, 1):
        if message["role"] == "assistant" and not message["content"].strip():
            raise Fault("empty_answer", f"message {number} is an empty answer; there is nothing to learn")
    return checked


def _message(number: int, message: Any) -> dict[str, str]:
    if not isinstance(message, dict):
        raise Fault("wrong_type", f"message {number} is {_kind(message)}; an object is needed")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        raise Fault("wrong_type", f"the role of message {number} is {_kind(role)}; text is needed")
    if role not in ROLES:
        allowed = ", ".join(ROLES)
        raise Fault("unknown_role", f"message {number} has the role {shown(role)}; allowed: {allowed}")
    if len(message) > 2:
        _check_extras(number, message)
    if not isinstance(content, str):
        raise Fault("wrong_type", f"the content of message {number} is {_kind(content)}; text is needed")
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


def _kind(value: Any) -> str:
    if value is None:
        return "missing or null"
    if isinstance(value, bool):
        return "true or false"
    return {int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}[type(value)]
