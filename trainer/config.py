"""Config files: reading, layering, comparing and saving; the one place where sources of settings meet.

Owns the precedence of sources (`resolve`), the reading of today's and the old system's files
(`load_sparse`), and the backups made before each overwrite. Called by the command line, the page and the
engine. Torch-free.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from trainer import files
from trainer.fields import (
    PATH_FIELDS,
    ConfigError,
    FieldInfo,
    FieldProblem,
    broken_text,
    field,
    fields,
    refused,
    sections,
    shown,
    shown_group,
    unknown,
)
from trainer.legacy import modern
from trainer.refusal import Refusal
from trainer.schema import Config
from trainer.values import as_text, nested, parse_set, parse_value

__all__ = [
    "Change",
    "Config",
    "ConfigError",
    "ConfigLoader",
    "FieldInfo",
    "FieldProblem",
    "as_text",
    "backups",
    "diff",
    "field",
    "fields",
    "flatten",
    "get",
    "load_sparse",
    "merged",
    "parse_set",
    "parse_value",
    "resolve",
    "restore",
    "retired",
    "save",
    "unflatten",
]
_MAX_BYTES = 4 * 2**20
_STAMP = "%Y%m%d-%H%M%S-%f"


class ConfigLoader:
    """Reads a config file into settings; the name scripts of the old system's plan call."""

    @staticmethod
    def load(path: str | Path) -> Config:
        """The settings of a file over the defaults; ConfigError names file, key, value and allowed values."""
        return resolve(load_sparse(path), source=Path(path).name)


def load_sparse(path: str | Path) -> dict[str, Any]:
    """What a config file says and nothing else: nested, old keys mapped, relative paths made absolute.

    Raises ConfigError when the file cannot be read, is not JSON, or names one setting twice with different
    values. Values are checked by `resolve`.
    """
    return _read(Path(path))[0]


def retired(path: str | Path) -> list[str]:
    """The keys of a config file that belong to parts of the old system that are gone; they have no effect."""
    return _read(Path(path))[1]


def _read(path: Path) -> tuple[dict[str, Any], list[str]]:
    raw = _parsed(path)
    try:
        sparse, gone = modern(raw)
        _make_absolute(sparse, path.absolute().parent)
    except ConfigError as error:
        raise ConfigError(error.problems, source=path.name) from None
    return sparse, gone


def _parsed(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise _unreadable(path, f"it is larger than {_MAX_BYTES >> 20} MiB, so it is not a config")
        # utf-8-sig: editors on Windows put a byte order mark in front
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a path with a zero byte
        reason = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else getattr(error, "strerror", "")
        text = reason or str(error)
        raise _unreadable(path, text[0].lower() + text[1:]) from None
    try:
        raw = json.loads(text, object_pairs_hook=_no_key_twice)
    except ConfigError as error:
        raise ConfigError(error.problems, source=path.name) from None
    except json.JSONDecodeError as error:
        raise _unreadable(path, f"line {error.lineno} is not JSON: {error.msg.lower()}") from None
    except RecursionError:
        raise _unreadable(path, "it is nested too deeply") from None
    except ValueError:  # a whole number with thousands of digits
        raise _unreadable(path, "a number in it has thousands of digits") from None
    if not isinstance(raw, dict):
        raise _unreadable(path, "line 1: a config is a group of settings in { }")
    return raw


def _unreadable(path: Path, reason: str) -> ConfigError:
    return ConfigError([FieldProblem("", f"Cannot read the config {path}: {reason}.")])


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError([FieldProblem(twice, "this key stands twice in the same group. Keep one of them.")])
    return found


def _make_absolute(sparse: dict[str, Any], folder: Path) -> None:
    """Turn relative paths of a file into absolute ones; what is no text is left for the schema to refuse."""

    def absolute(text: Any) -> Any:
        if not isinstance(text, str) or not text:
            return text
        try:
            return str(folder / Path(text).expanduser())
        except (RuntimeError, ValueError):  # "~nobody/x": there is no such user, or no such name could be
            return str(folder / text)

    for key in PATH_FIELDS:
        *section, name = key.split(".")
        group = sparse.get(section[0], {}) if section else sparse
        if name in group:
            group[name] = absolute(group[name])
    more = sparse.get("data", {}).get("dataset_paths")
    for entry in more if isinstance(more, list) else []:
        if isinstance(entry, dict) and "path" in entry:
            entry["path"] = absolute(entry["path"])


def resolve(*layers: dict[str, Any], source: str = "") -> Config:
    """The settings of several sources; a later layer wins, and what none of them names keeps its default.

    The order callers use is: config file, then `--profile/--model/--dataset` or the form, then `--set`.
    Raises ConfigError with one problem a field; `source` names the file in its message.
    """
    try:
        config = Config.model_validate(merged(*layers))
    except (ValidationError, OverflowError) as error:
        details = error.errors(include_url=False) if isinstance(error, ValidationError) else []
        problems = {p.field: p for p in map(_problem, reversed(details))}
        fallback = FieldProblem("", "a number is too large to be a setting.")
        raise ConfigError(list(problems.values())[::-1] or [fallback], source) from None
    broken = [p for info in fields() if (p := broken_text(info, get(config, info.key)))]
    if broken:
        raise ConfigError(broken, source)
    return config


def merged(*layers: dict[str, Any]) -> dict[str, Any]:
    """One sparse layer from several; groups are merged key by key, lists are replaced."""
    result: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            if isinstance(value, dict) and isinstance(result.get(key), dict) and key in sections():
                result[key] = result[key] | deepcopy(value)
            else:
                result[key] = deepcopy(value)
    return result


def _problem(detail: Any) -> FieldProblem:
    """One of pydantic's findings in our words: which setting, its value, what is allowed."""
    location = [str(part) for part in detail["loc"]]
    if not location:  # a rule over several settings; its sentence starts with the key it belongs to
        key, _, text = str(detail["ctx"]["error"]).partition(": ") if "ctx" in detail else ("", "", "")
        return (
            FieldProblem(key, text + ".") if text else FieldProblem("", f"a config cannot be {shown(detail['input'])}.")
        )
    known = {info.key: info for info in fields()}
    for length in (2, 1):
        info = known.get(".".join(location[:length]))
        if info:
            inner = location[length:]
            return _entry_problem(info, inner, detail) if inner else refused(info, detail["input"])
    key = ".".join(location)
    if detail["type"] == "extra_forbidden":
        return FieldProblem(key, unknown(key))
    return FieldProblem(key, f"{key} is {shown_group(key, detail['input'])}. Allowed: a group of settings in {{ }}.")


def _entry_problem(info: FieldInfo, inner: list[str], detail: Any) -> FieldProblem:
    """A problem inside a list: which entry, and for a file which of its two keys."""
    entry = f"{info.name}, entry {int(inner[0]) + 1}" if inner[0].isdigit() else info.name
    value = shown(detail["input"])
    if detail["type"] == "missing":
        return FieldProblem(info.key, f"{entry} has no {inner[-1]}. Allowed: {info.allowed}.")
    if detail["type"] == "extra_forbidden":
        return FieldProblem(info.key, f"{entry} has the unknown key {shown(inner[-1])}. Allowed: path and weight.")
    allowed = {"path": "text", "weight": "more than 0, up to 100"}
    if inner[-1] in allowed:
        return FieldProblem(info.key, f"{entry}: {inner[-1]} is {value}. Allowed: {allowed[inner[-1]]}.")
    return FieldProblem(info.key, f"{entry} is {value}. Allowed: {info.allowed}.")


def get(config: Config, key: str) -> Any:
    """The value of a dotted key."""
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def flatten(sparse: dict[str, Any]) -> dict[str, Any]:
    """Dotted keys and values of a sparse layer."""
    flat: dict[str, Any] = {}
    for key, value in sparse.items():
        if key in sections() and isinstance(value, dict):
            flat |= {f"{key}.{name}": inner for name, inner in value.items()}
        else:
            flat[key] = value
    return flat


def unflatten(flat: dict[str, Any]) -> dict[str, Any]:
    """The sparse layer of dotted keys and values."""
    return merged(*(nested(key, value) for key, value in flat.items()))


@dataclass(frozen=True)
class Change:
    """One setting that two configs have different values for."""

    field: str
    title: str
    before: Any
    after: Any


def diff(a: Config, b: Config) -> list[Change]:
    """What changed from `a` to `b`, in the order of the schema."""
    pairs: Iterable[tuple[FieldInfo, Any, Any]] = ((info, get(a, info.key), get(b, info.key)) for info in fields())
    return [Change(info.key, info.title, before, after) for info, before, after in pairs if before != after]


def save(path: Path, sparse: dict[str, Any]) -> Config:
    """Write a config file, after a backup of the one it replaces; returns the settings it stands for.

    Raises ConfigError, and leaves the file as it was, when the settings cannot be used; Refusal when the disk refuses.
    """
    config = resolve(sparse)
    with _in_words(path):
        _back_up(path)
        files.write_json(path, sparse)
    return config


@contextmanager
def _in_words(path: Path) -> Iterator[None]:
    """A disk that refuses becomes a Refusal; a config is replaced in one step, so the one before is still there or backed up."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise Refusal(
            f"{path.stem} could not be saved: {reason}. The version before is kept. Mend that, then save again."
        ) from None


def backups(path: Path) -> list[Path]:
    """The backups of a config file, newest first; their names carry the time of the overwrite."""
    found = [p for p in _backup_folder(path).glob("*.json") if _backed_up_at(path, p)]
    return sorted(found, key=lambda p: p.name, reverse=True)


def restore(backup: Path, path: Path) -> None:
    """Put a backup back in place; what it replaces is backed up first, so that nothing is lost."""
    if backup not in backups(path):
        raise ConfigError([FieldProblem("", f"{backup.name} is not a backup of {path.name}.")])
    with _in_words(path):
        content = backup.read_bytes()
        _back_up(path)
        files.write_bytes(path, content)


def _backup_folder(path: Path) -> Path:
    return path.parent / "backups"


def _backed_up_at(path: Path, backup: Path) -> datetime | None:
    """When a backup of `path` was made; None for a file that is no backup of it."""
    stem, _, stamp = backup.name.removesuffix(".json").rpartition(".")
    try:
        return datetime.strptime(stamp, _STAMP) if stem == path.name.removesuffix(".json") else None
    except ValueError:
        return None


def _back_up(path: Path) -> None:
    if path.exists():
        folder = files.make_private_dir(_backup_folder(path))
        stamp = datetime.now().strftime(_STAMP)
        files.write_bytes(folder / f"{path.name.removesuffix('.json')}.{stamp}.json", path.read_bytes())
