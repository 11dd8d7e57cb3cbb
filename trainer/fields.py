"""The settings as a flat list: one entry per dotted key with its bounds, choices, unit and help.

Derived from `trainer/schema.py`. Used by `trainer/config.py`, `trainer/values.py`, the form and
docs/settings.md, so that no bound, unit or help text is written twice.
"""

from __future__ import annotations

import difflib
import functools
import json
import math
import types
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo as SchemaField

from trainer.refusal import Refusal
from trainer.schema import Config, Section, WeightedFile
from trainer.setting import host_of

Kind = Literal["text", "choice", "whole", "real", "switch", "list", "files"]
PATH_FIELDS = ("model_path", "data.dataset_path", "data.validation_dataset_path")
_SHOWN_CHARACTERS = 60


@dataclass(frozen=True)
class FieldProblem:
    """One value that cannot be used: the dotted key and a sentence that names value and allowed values."""

    field: str
    message: str


class ConfigError(Refusal):
    """Settings that cannot be used: `problems` has one entry a field, `message` all of them."""

    def __init__(self, problems: Iterable[FieldProblem], source: str = "") -> None:
        self.problems = list(problems)
        lines = [f"{p.field}: {p.message}" if p.field else p.message for p in self.problems]
        text = " · ".join(lines)
        super().__init__(f"{source}: {text}" if source else text, self.problems[0].field or None)


@dataclass(frozen=True)
class FieldInfo:
    """One setting as the form, the command line and the docs see it.

    `low` and `high` are None where there is no bound; `low_open` means that `low` itself is not allowed.
    """

    key: str
    title: str
    help: str
    group: str
    basic: bool
    unit: str
    kind: Kind
    optional: bool
    choices: tuple[str, ...]
    low: float | None
    high: float | None
    low_open: bool
    high_open: bool
    default: Any
    secret: bool
    schema: SchemaField

    @property
    def name(self) -> str:
        """The title as it stands inside a sentence."""
        return (
            self.title
            if self.title[:2].isupper() or self.title.startswith("LoRA")
            else self.title[0].lower() + self.title[1:]
        )

    @property
    def allowed(self) -> str:
        """What may stand here, for the end of a refusal: "0 to 1", "full, lora or qlora"."""
        words = {
            "choice": _either(self.choices),
            "switch": "true or false",
            "text": "an address that begins with https:// or http://, or nothing" if self.secret else "text",
            "list": "a list of texts",
            "files": "a list of files, each with a path and a weight",
        }
        text = words.get(self.kind) or self._range()
        return f"{text}, or nothing" if self.optional else text

    def _range(self) -> str:
        prefix = "whole numbers, " if self.kind == "whole" else ""
        if self.low is None and self.high is None:
            return prefix + "any number"
        if self.high is None:
            return f"{prefix}{'more than ' if self.low_open else 'from '}{figure(self.low)}"
        start = f"more than {figure(self.low)}, up to" if self.low_open else f"{figure(self.low)} to"
        return f"{prefix}{start} {'less than ' if self.high_open else ''}{figure(self.high)}"


def figure(value: float | None) -> str:
    """A bound as a person writes it: 1,024 and 0.5, never 1024.0."""
    if value is None:
        return ""
    return f"{int(value):,}" if float(value).is_integer() else f"{value:g}"


def _either(words: tuple[str, ...]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}" if words else ""


def shown(value: Any) -> str:
    """A refused value as it stands in the file, short enough for a sentence."""
    if isinstance(value, str):
        text = json.dumps(value, ensure_ascii=False)
    elif isinstance(value, float) and not math.isfinite(value):
        text = "NaN" if math.isnan(value) else ("infinity" if value > 0 else "-infinity")
    elif isinstance(value, float):
        text = f"{value:g}"
    else:
        try:
            text = json.dumps(value, ensure_ascii=False, default=str)
        except (ValueError, RecursionError):  # a whole number with thousands of digits
            return "a value that is too large"
    text = text.encode("utf-8", "replace").decode()
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "…"


def without_secrets(dumped: dict[str, Any]) -> dict[str, Any]:
    """A dumped config (nested) with every secret setting at its default, as it may be written down and shown."""
    kept = {key: dict(value) if isinstance(value, dict) else value for key, value in dumped.items()}
    for info in fields():
        section, _, name = info.key.rpartition(".")
        if info.secret and section in kept:
            kept[section][name] = info.default
    return kept


def masked(value: Any) -> str:
    """What of a secret value may be shown: the scheme and the host of an address, of anything else nothing."""
    if not value:
        return ""
    host = host_of(value) if isinstance(value, str) else ""
    return f"{value.split(':', 1)[0]}://{host}/…" if host else "…"


def _unwrapped(annotation: Any, metadata: list[Any]) -> tuple[Any, list[Any], bool]:
    """The plain type behind `Annotated[...]` and `... | None`, its constraints, and if None is allowed."""
    optional = False
    found = list(metadata)
    while True:
        if get_origin(annotation) is Annotated:
            annotation, *more = get_args(annotation)
            found += more
        elif get_origin(annotation) in (Union, types.UnionType):
            inner = [part for part in get_args(annotation) if part is not type(None)]
            optional, annotation = True, inner[0]
        else:
            return annotation, found, optional


def _kind(annotation: Any) -> tuple[Kind, tuple[str, ...]]:
    if get_origin(annotation) is Literal:
        return "choice", get_args(annotation)
    if get_origin(annotation) is list:
        return ("files" if get_args(annotation)[0] is WeightedFile else "list"), ()
    kinds: dict[Any, Kind] = {str: "text", int: "whole", float: "real", bool: "switch"}
    return kinds[annotation], ()


def _describe(key: str, field: SchemaField) -> FieldInfo:
    annotation, metadata, optional = _unwrapped(field.annotation, field.metadata)
    kind, choices = _kind(annotation)
    bounds: dict[str, float] = {}
    for constraint in metadata:
        bounds |= {n: getattr(constraint, n) for n in ("ge", "gt", "le", "lt") if hasattr(constraint, n)}
    extra = field.json_schema_extra
    assert isinstance(extra, dict) and field.title and field.description, f"{key} lacks its title, help or group"
    return FieldInfo(
        key=key,
        title=field.title,
        help=field.description,
        group=str(extra["group"]),
        basic=bool(extra["basic"]),
        unit=str(extra["unit"]),
        kind=kind,
        optional=optional,
        choices=choices,
        low=bounds.get("ge", bounds.get("gt")),
        high=bounds.get("le", bounds.get("lt")),
        low_open="gt" in bounds,
        high_open="lt" in bounds,
        default=field.get_default(call_default_factory=True),
        secret=bool(extra["secret"]),
        schema=field,
    )


@functools.cache
def fields() -> tuple[FieldInfo, ...]:
    """Every setting, in the order of the schema."""

    def walk(section: type[Section], prefix: str) -> Iterable[FieldInfo]:
        for name, field in section.model_fields.items():
            annotation = field.annotation
            if isinstance(annotation, type) and issubclass(annotation, Section):
                yield from walk(annotation, f"{prefix}{name}.")
            else:
                yield _describe(f"{prefix}{name}", field)

    return tuple(walk(Config, ""))


@functools.cache
def _by_key() -> dict[str, FieldInfo]:
    return {info.key: info for info in fields()}


def field(key: str) -> FieldInfo:
    """The setting of a dotted key; raises ConfigError naming the closest known one."""
    info = _by_key().get(key)
    if info is None:
        raise ConfigError([FieldProblem(key, unknown(key))])
    return info


def sections() -> tuple[str, ...]:
    """The names of the groups a config file is divided into."""
    return tuple(dict.fromkeys(info.key.split(".")[0] for info in fields() if "." in info.key))


def shown_group(key: str, value: Any) -> str:
    """A refused value in place of a whole group; hidden where a secret could have been meant."""
    return shown("…" if any(info.secret and info.key.startswith(f"{key}.") for info in fields()) else value)


def unknown(key: str) -> str:
    """The sentence about a key that no setting has, with the closest one that exists."""
    known = [*_by_key(), *sections()]
    last = key.rsplit(".", 1)[-1]
    by_name = difflib.get_close_matches(last, [k.rsplit(".", 1)[-1] for k in known], n=1, cutoff=0.6)
    close = [k for k in known if by_name and k.rsplit(".", 1)[-1] == by_name[0]] or difflib.get_close_matches(
        key, known, n=1, cutoff=0.5
    )
    hint = f" Closest: {close[0]}." if close else " See docs/settings.md for all settings."
    return f"there is no setting {shown(key)}.{hint}"


def refused(info: FieldInfo, value: Any) -> FieldProblem:
    """The problem of a value that its field does not allow: names value and allowed values."""
    text = shown(masked(value) if info.secret else value)
    return FieldProblem(info.key, f"{info.name} is {text}. Allowed: {info.allowed}.")


def broken_text(info: FieldInfo, value: Any) -> FieldProblem | None:
    """The problem of a text that holds what no file name and no UTF-8 file can hold; None if fine."""
    if info.kind not in ("text", "list", "files"):
        return None
    texts = [value or ""] if info.kind == "text" else [getattr(entry, "path", entry) for entry in value]
    for text in texts:
        if "\0" in text or any("\ud800" <= c <= "\udfff" for c in text):
            seen = shown(masked(text) if info.secret else text)
            said = f"{info.name} is {seen}. Allowed: text without zero bytes and halved characters."
            return FieldProblem(info.key, said)
    return None
