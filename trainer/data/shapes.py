"""The shapes that rows come in (messages, ShareGPT, Alpaca, prompt and completion, texts), and how each becomes a Row's content.

A file has one shape, which its first rows tell; a row of another is a problem, never a row that is left out unsaid.
Called by trainer.data.formats. Standard library only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.data.conversation import checked, document, refuse_tools
from trainer.data.mapping import Mapping, suggest
from trainer.data.problems import Fault, kind, shown

Content = list[dict[str, str]] | str
Reader = Callable[[dict[str, Any]], Content]

# the roles of ShareGPT files and of the tools that write them
_SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant",
    "model": "assistant", "bot": "assistant", "system": "system",
}  # fmt: skip
_UNTRAINED_TURNS = ("function_call", "observation", "tool", "tool_call", "tool_response", "function_response")


@dataclass(frozen=True)
class Shape:
    """One way of writing a row: its name, what every row of it has, and how it is read (raises Fault)."""

    name: str
    mark: str
    read: Reader


@dataclass(frozen=True)
class Found:
    """What the first rows of a file tell: its shape, the mapping in use, and one that its columns suggest."""

    shape: Shape | None
    name: str
    mark: str
    mapping: Mapping | None = None
    suggested: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()

    def content(self, row: Any) -> Content:
        """A row's messages or its text; raises Fault."""
        if not isinstance(row, dict):
            needed = "an object with 'messages' or 'text' is needed"
            raise Fault("wrong_type", f"the row is {kind(row)}; {needed}")
        if self.mapping is not None:
            return _mapped(row, self.mapping)
        own = shape_of(row)
        if own is self.shape and own is not None:
            return own.read(row)
        if own is not None and self.shape is not None:
            name, mark = _own_words([row]) if own is MESSAGES else (own.name, own.mark)
            raise Fault("other_shape", f"the row is {name} ({mark}); the file is {self.name}")
        raise _no_shape(row, self.shape)


def shape_of(row: Any) -> Shape | None:
    """The shape that a row's keys speak of; None for none."""
    if not isinstance(row, dict):
        return None
    if row.get("messages") is not None:
        return MESSAGES
    if row.get("conversations") is not None:
        return SHAREGPT
    if "instruction" in row and "output" in row:
        return ALPACA
    if "prompt" in row and "completion" in row:
        return COMPLETION
    return MESSAGES if row.get("text") is not None else None


def turns_of(row: Any) -> list[Any] | None:
    """The turns of a row of messages or ShareGPT as {"role", "content"}, unchecked; None for other shapes. Raises Fault."""
    shape = shape_of(row)
    if shape not in (MESSAGES, SHAREGPT):
        return None
    turns = row.get("messages") if shape is MESSAGES else row["conversations"]
    if not isinstance(turns, list) or not turns or row.get("tools") or row.get("functions"):
        return None
    own = [_turn(number, turn) for number, turn in enumerate(turns, 1)] if shape is SHAREGPT else turns
    return [*_said("system", row.get("system")), *own] if shape is SHAREGPT else own


def detect(rows: Sequence[Any], mapping: Mapping | None) -> Found:
    """The shape of a file from its first rows: the commonest, the first one of equals; None where no row has one."""
    objects = [row for row in rows if isinstance(row, dict)]
    columns = tuple(dict.fromkeys(str(key) for row in objects for key in row))
    counts = Counter(shape.name for row in objects if (shape := shape_of(row)) is not None)
    if mapping is not None and (not counts or any(mapping.fits(row) for row in objects)):
        return Found(None, "mapped columns", mapping.words(), mapping, columns=columns)
    if not counts:
        return Found(None, "", "", suggested=tuple(suggest(objects)), columns=columns)
    name = counts.most_common(1)[0][0]
    shape = next(shape for shape in SHAPES if shape.name == name)
    if shape is MESSAGES:
        return Found(shape, *_own_words(objects), columns=columns)
    return Found(shape, shape.name, shape.mark, columns=columns)


def _own_words(rows: list[dict[str, Any]]) -> tuple[str, str]:
    """Name and mark of our own shape: of conversations, of texts, or of both in one file."""
    talks = any(row.get("messages") is not None for row in rows)
    texts = any(row.get("messages") is None and row.get("text") is not None for row in rows)
    if talks and texts:
        return "messages and texts", "'messages' with 'role' and 'content', or a 'text'"
    return ("texts", "a 'text'") if texts else (MESSAGES.name, MESSAGES.mark)


def _no_shape(row: dict[str, Any], shape: Shape | None) -> Fault:
    keys = ", ".join(shown(str(key)) for key in list(row)[:5]) or "none"
    if shape is None or shape is MESSAGES:
        return Fault("no_messages", f"there is no 'messages' list and no 'text' (keys found: {keys})")
    return Fault("no_messages", f"there is no {shape.mark}, as in the file's other rows (keys found: {keys})")


def _messages(row: dict[str, Any]) -> Content:
    messages = row.get("messages")
    if messages is None:
        return document(row["text"])
    if isinstance(messages, list) and messages:
        refuse_tools(row)
    return checked(messages)


def _sharegpt(row: dict[str, Any]) -> Content:
    refuse_tools(row)
    return _turns(row["conversations"], "conversations", row.get("system"))


def _turns(turns: Any, key: str, system: Any = None) -> Content:
    """A list of turns that are either {"from", "value"} or {"role", "content"}; raises Fault."""
    if not isinstance(turns, list):
        raise Fault("wrong_type", f"'{key}' is {kind(turns)}; a list is needed")
    return checked([*_said("system", system), *(_turn(number, turn) for number, turn in enumerate(turns, 1))], key)


def _turn(number: int, turn: Any) -> Any:
    if not isinstance(turn, dict) or ("from" not in turn and "value" not in turn):
        return turn  # the check of messages says what is wrong with it
    role = turn.get("from")
    if isinstance(role, str) and role in _UNTRAINED_TURNS:
        raise Fault("not_trained", f"message {number} is of the kind {shown(role)}; tool calls are not trained")
    if isinstance(role, str) and role not in _SHAREGPT_ROLES:
        raise Fault("unknown_role", f"message {number} is from {shown(role)}; allowed: system, human, gpt")
    more = {key: value for key, value in turn.items() if key not in ("from", "value")}
    return more | {
        "role": _SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role,
        "content": turn.get("value"),
    }


def _alpaca(row: dict[str, Any]) -> Content:
    refuse_tools(row)
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise Fault("wrong_type", "'history' is not a list of pairs of a question and its answer")
    talk = _said("system", row.get("system"))
    for question, answer in history:
        talk += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    asked = _joined(row.get("instruction"), row.get("input"), ("instruction", "input"))
    return checked([*talk, {"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]}])


def _completion(row: dict[str, Any]) -> Content:
    refuse_tools(row)
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list):  # both are lists of messages; only the completion is meant to be learned
        if any(isinstance(turn, dict) and turn.get("role") == "assistant" for turn in prompt):
            raise Fault(
                "not_trained", "the prompt has answers, which this shape does not train; write it as 'messages'"
            )
        more = completion if isinstance(completion, list) else [{"role": "assistant", "content": completion}]
        return checked([*prompt, *more], "prompt")
    talk = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    return checked([*_said("system", row.get("system")), *talk])


def _mapped(row: dict[str, Any], mapping: Mapping) -> Content:
    refuse_tools(row)
    parts: dict[str, Any] = {}
    for part, column in mapping.columns:
        if column not in row:
            keys = ", ".join(shown(str(key)) for key in list(row)[:5]) or "none"
            raise Fault("columns", f"there is no column {shown(column)} for {part} (columns found: {keys})")
        parts[part] = row[column]
    names = dict(mapping.columns)
    if "text" in parts:
        return document(parts["text"], names["text"])
    if "messages" in parts:
        return _turns(parts["messages"], names["messages"])
    asked = _joined(parts["user"], parts.get("input"), (names["user"], names.get("input", "")))
    answer = parts["assistant"]
    if not isinstance(answer, str):
        raise Fault("wrong_type", f"the column {shown(names['assistant'])} is {kind(answer)}; text is needed")
    talk = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    return checked([*_said("system", parts.get("system")), *talk])


def _joined(asked: Any, more: Any, names: tuple[str, str]) -> str:
    """A question and the material it is about, on lines of their own; raises Fault."""
    for value, name in ((asked, names[0]), (more, names[1])):
        if not isinstance(value, str) and not (value is None and name == names[1]):
            raise Fault("wrong_type", f"'{name}' is {kind(value)}; text is needed")
    return "\n".join(part for part in (asked, more) if part)


def _said(role: str, content: Any) -> list[dict[str, Any]]:
    """The message of an optional part; none where it is missing or empty."""
    return [{"role": role, "content": content}] if content not in (None, "") else []


MESSAGES = Shape("messages", "'messages' with 'role' and 'content'", _messages)
SHAREGPT = Shape("ShareGPT", "'conversations' with 'from' and 'value'", _sharegpt)
ALPACA = Shape("Alpaca", "'instruction' and 'output'", _alpaca)
COMPLETION = Shape("prompt and completion", "'prompt' and 'completion'", _completion)
SHAPES = (MESSAGES, SHAREGPT, ALPACA, COMPLETION)
