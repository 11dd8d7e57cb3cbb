"""Profiles that users declare in a file, without code: `NAME.json` with {name, description, system_prompt,
overwrites_system}. The file is read strictly; rows pass through it unchanged."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from profiles.contract import copy_row, fill_date

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
MAX_FILE_BYTES = 65_536
_KINDS = {"name": str, "description": str, "system_prompt": str, "overwrites_system": bool}
_KIND_WORDS = {str: "a text", bool: "true or false"}


@dataclass(frozen=True)
class Declared:
    """A system prompt with a name; everything else is as in `plain`."""

    name: str
    description: str
    prompt: str
    overwrites_system: bool
    plain_template: bool = False

    def system_prompt(self, date: str) -> str:
        """The declared prompt, dated where it says {date}."""
        return fill_date(self.prompt, date)

    def transform(self, row: dict[str, Any], index: int) -> dict[str, Any]:
        """A copy of `row`."""
        return copy_row(row)

    def logits_processors(self, tokenizer: Any) -> list[Any]:
        """None: generation is not constrained."""
        return []


def names(user_root: Path) -> list[str]:
    """The usable names of the files `NAME.json` in `user_root`, sorted; empty when the folder is not
    there."""
    if not user_root.is_dir():
        return []
    return sorted(path.stem for path in user_root.glob("*.json") if NAME.fullmatch(path.stem) and path.is_file())


def read(path: Path) -> Declared:
    """Read one file; raises ValueError that names the file and the fault."""
    where = f"Profile file {path.name}"
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ValueError(f"{where} is larger than {MAX_FILE_BYTES:,} bytes. A profile is a prompt, not data.")
    try:
        content = json.loads(path.read_bytes().decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not usable JSON: {error}.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{where} needs one JSON object with {', '.join(_KINDS)}.")
    _check(where, content)
    if content["name"] != path.stem:
        raise ValueError(f"{where} names itself '{content['name'][:64]}'. Name and file name have to be the same.")
    profile = Declared(
        name=content["name"],
        description=content["description"],
        prompt=content["system_prompt"],
        overwrites_system=content["overwrites_system"],
    )
    try:
        profile.system_prompt("2000-01-01").encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{where}: system_prompt holds half a character (a lone surrogate).") from None
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return profile


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key stands there twice")
    return result


def _check(where: str, content: dict[str, Any]) -> None:
    unknown = sorted(set(content) - set(_KINDS))
    if unknown:
        raise ValueError(f"{where} has the unknown key '{unknown[0][:60]}'. Allowed: {', '.join(_KINDS)}.")
    for key, kind in _KINDS.items():
        if key not in content:
            raise ValueError(f"{where} has no '{key}'. It needs {', '.join(_KINDS)}.")
        if type(content[key]) is not kind:
            raise ValueError(f"{where}: '{key}' has to be {_KIND_WORDS[kind]}.")
