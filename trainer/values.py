"""Values as people type them: text from the form or `--set` to a checked value, and back.

Called by `trainer/config.py`, which hands its functions on, and by the form.
"""

from __future__ import annotations

import functools
import json
import re
from decimal import Decimal
from typing import Annotated, Any

from pydantic import TypeAdapter, ValidationError

from trainer.fields import ConfigError, FieldInfo, FieldProblem, broken_text, field, masked, refused, shown
from trainer.schema import WeightedFile


@functools.cache
def _adapter(key: str) -> TypeAdapter[Any]:
    schema = field(key).schema
    annotation: Any = Annotated[schema.annotation, schema] if schema.metadata else schema.annotation
    return TypeAdapter(annotation)


def parse_value(key: str, text: str) -> Any:
    """The value of a setting from what a person typed; raises ConfigError with the one problem.

    Nothing typed means None where that is allowed, an empty text or an empty list; a number cannot be empty.
    """
    info = field(key)
    raw = _raw(info, text.strip() if info.kind != "text" else text)
    try:
        value = _adapter(key).validate_python(raw)
    except (ValidationError, OverflowError):
        raise ConfigError([refused(info, _as_typed(info, text))]) from None
    broken = broken_text(info, value)
    if broken:
        raise ConfigError([broken])
    return [entry.model_dump() for entry in value] if info.kind == "files" else value


def _as_typed(info: FieldInfo, text: str) -> Any:
    # "learning rate is 5", not "is "5"", when what was typed is a number
    try:
        return json.loads(text) if info.kind in ("whole", "real") else text
    except (ValueError, RecursionError):
        return text


def _raw(info: FieldInfo, text: str) -> Any:
    if info.optional and text.strip().lower() in ("", "none", "null"):
        return None
    if info.kind == "switch":
        return {
            "true": True,
            "on": True,
            "yes": True,
            "1": True,
            "false": False,
            "off": False,
            "no": False,
            "0": False,
        }.get(text.lower(), text)
    if info.kind == "whole" and re.fullmatch(r"[+-]?[0-9.]+[eE][+]?[0-9]{1,2}", text):
        try:
            number = float(text)
        except ValueError:
            return text
        return int(number) if number.is_integer() else number
    if info.kind == "list":
        return _list_of_texts(text)
    return _list_of_files(text) if info.kind == "files" else text


def _list_of_texts(text: str) -> Any:
    if text.startswith("["):
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            return text
    # one a line, since a sample prompt may hold commas
    return [line.strip() for line in text.splitlines() if line.strip()]


def _list_of_files(text: str) -> Any:
    """Files from one line each, `path` or `path * weight`, or from a JSON list as the config file has it."""
    if text.startswith("["):
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            return text
    entries = []
    for line in filter(None, (line.strip() for line in text.splitlines())):
        path, star, weight = line.rpartition(" * ")
        entries.append({"path": path.strip(), "weight": weight.strip()} if star else {"path": line})
    return entries


def as_text(info: FieldInfo, value: Any) -> str:
    """The value as the form shows it; `parse_value` reads it back to the same value. Of a secret its host alone."""
    if info.secret:
        return masked(value)
    if value is None:
        return ""
    if info.kind == "switch":
        return "true" if value else "false"
    if info.kind == "list":
        lines = "\n".join(value)
        return lines if _list_of_texts(lines) == value else json.dumps(value, ensure_ascii=False)
    if info.kind == "files":
        return _files_as_text([e if isinstance(e, WeightedFile) else WeightedFile(**e) for e in value])
    return figure_text(value) if info.kind == "real" else str(value)


def _files_as_text(files: list[WeightedFile]) -> str:
    lines = "\n".join(f.path if f.weight == 1 else f"{f.path} * {figure_text(f.weight)}" for f in files)
    try:
        if [WeightedFile(**entry) for entry in _list_of_files(lines)] == files:
            return lines
    except (ValidationError, TypeError):
        pass  # a path that reads as something else on a line of its own
    return json.dumps([f.model_dump() for f in files], ensure_ascii=False)


def figure_text(value: float) -> str:
    """A real number as short as it can be without losing anything: 2e-4, 0.05, 1."""
    exact = Decimal(repr(float(value))).normalize()
    if exact == 0 or -3 < exact.adjusted() < 16:
        return f"{exact:f}"
    digits = "".join(str(d) for d in exact.as_tuple().digits)
    mantissa = digits[0] + ("." + digits[1:] if digits[1:] else "")
    return f"{'-' if exact < 0 else ''}{mantissa}e{exact.adjusted()}"


def nested(key: str, value: Any) -> dict[str, Any]:
    """`{"hyperparams": {"learning_rate": value}}` for the key hyperparams.learning_rate."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def parse_set(text: str) -> dict[str, Any]:
    """A layer from `key=value` as given to `--set`; ConfigError for an unknown key or refused value."""
    key, equals, value = text.partition("=")
    if not equals:
        raise ConfigError([FieldProblem("", f"--set {shown(text)} has no '='. Write --set key=value.")])
    return nested(key.strip(), parse_value(key.strip(), value))
