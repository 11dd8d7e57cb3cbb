"""The problems of rows: their codes, the words for them, what to do about each, and foreign text made fit for a sentence.

Read by every part of the reader, the doctor, the command line and the page. Standard library only.
"""

from __future__ import annotations

from typing import Any

# one short name for each code, as the summary says it: "38 no answer · 2 bad JSON"
PROBLEM_NAMES = {
    "no_answer": "no answer",
    "empty_answer": "empty answer",
    "bad_json": "bad JSON",
    "bad_csv": "bad CSV",
    "columns": "columns that do not fit",
    "other_shape": "another shape",
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
    "too_large": "unpacks to too much",
    "damaged": "damaged file",
    "wrong_format": "format not known",
}

# what to do about each kind of problem; the message of a row says what is wrong with it
FIXES = {
    "no_answer": "Add the assistant's answer as the last message, or delete the row.",
    "empty_answer": "Write the answer, or delete the row.",
    "bad_json": "Each line of JSON Lines must be one whole JSON object. Write the file with a JSON library, not by hand.",
    "bad_csv": 'Put fields with commas, quotes or line breaks into double quotes, and write a quote inside as "".',
    "columns": "Give every row as many fields as the first line names, each name once.",
    "other_shape": "Bring all rows of a file into one shape, or put each shape into a file of its own.",
    "unknown_role": "The role of a message is system, user or assistant (in ShareGPT: system, human or gpt).",
    "order": "After an optional system message, user and assistant take turns.",
    "wrong_type": "The role and the content of a message are texts in double quotes.",
    "no_messages": "Name the columns that hold question and answer (column mapping), or bring the rows into a known shape.",
    "empty_text": "Write the text, or delete the row.",
    "text_too_long": "A text may have 64 MiB at most. Split it into several files; each is a document of its own.",
    "not_trained": "Tool calls, images and separate thinking are not trained. Move them into the content or remove them.",
    "characters": "Remove control characters and broken halves of characters.",
    "not_utf8": "Save the file as UTF-8.",
    "line_too_long": "A row may have 8 MiB at most. Split the conversation.",
    "too_large": "Unpack the archive yourself and look at what is in it before you train on it.",
    "damaged": "Make or download the file again.",
    "wrong_format": "Save the data as JSON Lines, JSON, CSV, Parquet or, for prose, as a .txt file, in UTF-8.",
}

EXCERPT_CHARACTERS = 90
_BEFORE = 30


class Fault(Exception):
    """A row's problem on its way out: a code of PROBLEM_NAMES and a clause without the line number.

    `at` is the place of the fault in the row's text, in characters from 0, where there is one.
    """

    def __init__(self, code: str, text: str, at: int | None = None) -> None:
        super().__init__(text)
        self.code = code
        self.text = text
        self.at = at


def printable(text: str, limit: int) -> str:
    """At most `limit` characters of foreign text, control and direction characters escaped."""
    safe = "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text[:limit])
    return safe if len(text) <= limit else safe + "…"


def shown(text: str) -> str:
    """Foreign text inside a sentence: short and quoted."""
    return f"'{printable(text, 40)}'"


def excerpt(payload: bytes | dict[str, Any], at: int | None) -> str:
    """A short piece of the row that a problem is about: what stands around `at`, else how the row begins."""
    start = max(0, (at or 0) - _BEFORE)
    if isinstance(payload, bytes):
        # four bytes hold any character, so this is enough of the line without decoding a giant one
        text = payload[: 4 * (start + EXCERPT_CHARACTERS) + 4].decode("utf-8", "replace").strip("\r\n")
    else:
        text = ", ".join(f"{key}: {str(value)[:EXCERPT_CHARACTERS]}" for key, value in list(payload.items())[:4])
        start = 0
    return ("…" if start else "") + printable(text[start:], EXCERPT_CHARACTERS)


def kind(value: Any) -> str:
    """What a JSON value is, for a sentence: "a list"."""
    if value is None:
        return "missing or null"
    if isinstance(value, bool):
        return "true or false"
    names = {int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), f"a value of the type {type(value).__name__}")
