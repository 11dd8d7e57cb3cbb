"""Column mapping: which column of a file is the question, which the answer, for files that name them their own way.

A mapping is written as texts "part=column" in the setting `data.columns`, in a dataset's manifest, and after
`check-data --column`. Owns the parts, their checks and the suggestion. Standard library only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.data.problems import shown
from trainer.refusal import Refusal

PARTS = ("system", "user", "input", "assistant", "messages", "text")
FIELD = "data.columns"
_DATASET_FOLDER = re.compile(r"[0-9a-f]{16}")
_TOGETHER = "user and assistant (with system and input, if there are any), messages alone, or text alone"
# names seen in the wild, commonest first; compared in lower case
NAMES = {
    "user": ("question", "query", "prompt", "instruction", "user", "human", "problem", "request", "source", "input", "q"),
    "assistant": (
        "answer", "response", "output", "completion", "assistant", "reply", "solution", "target", "bot", "gpt", "a",
    ),
    "system": ("system", "system_prompt", "system_message"),
    "input": ("context", "input", "passage", "background"),
    "text": ("text", "content", "body", "article", "document", "story", "passage"),
}  # fmt: skip


@dataclass(frozen=True)
class Mapping:
    """Parts of a row and the columns they stand in, in the order of PARTS."""

    columns: tuple[tuple[str, str], ...]

    @classmethod
    def parse(cls, texts: Sequence[str]) -> Mapping | None:
        """The mapping that texts such as "user=question" describe, None for none; raises Refusal."""
        found: dict[str, str] = {}
        for text in texts:
            part, equals, column = text.partition("=")
            part, column = part.strip(), column.strip()
            if not equals or not column:
                raise Refusal(f"{shown(text)} is no column mapping. Write part=column, such as user=question.", FIELD)
            if part not in PARTS:
                raise Refusal(f"{shown(part)} is no part of a row. Parts: {', '.join(PARTS)}.", FIELD)
            if part in found:
                raise Refusal(f"The part {part} is mapped twice.", FIELD)
            found[part] = column
        if not found:
            return None
        alone = {"messages", "text"} & found.keys()
        if (alone and len(found) > 1) or (not alone and not {"user", "assistant"} <= found.keys()):
            raise Refusal(f"A column mapping names {_TOGETHER}; this one names {', '.join(sorted(found))}.", FIELD)
        return cls(tuple((part, found[part]) for part in PARTS if part in found))

    def texts(self) -> list[str]:
        """The mapping as it is written down; `parse` reads it back."""
        return [f"{part}={column}" for part, column in self.columns]

    def words(self) -> str:
        """The same for a person: "user from 'question', assistant from 'answer'"."""
        return ", ".join(f"{part} from {shown(column)}" for part, column in self.columns)

    def fits(self, keys: Iterable[str]) -> bool:
        """Whether a row with these columns is one that the mapping is about."""
        return bool({column for _, column in self.columns} & set(keys))


def mapping_of(path: Path, columns: Sequence[str] | None) -> Mapping | None:
    """The mapping to read `path` with: `columns` where any are given, else what was saved with the dataset.

    Raises Refusal for columns that are no mapping.
    """
    return Mapping.parse(columns) if columns else Mapping.parse(saved_columns(path))


def saved_columns(path: Path) -> list[str]:
    """What the manifest beside a dataset's file says; [] for a file that lies in no dataset's own folder."""
    if not _DATASET_FOLDER.fullmatch(path.parent.name):
        return []  # a manifest.json in somebody's data root is not ours
    try:
        with open(path.parent / "manifest.json", "rb") as file:
            manifest = json.loads(file.read(1 << 20))
        kept = manifest["columns"] if manifest["file"] == path.name else []
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []
    return [text for text in kept if isinstance(text, str)] if isinstance(kept, list) else []


def suggest(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A mapping that the columns of these rows suggest; [] where none does."""
    keys = [key for key in dict.fromkeys(key for row in rows for key in row) if isinstance(key, str)]
    turns = next((key for key in keys if _holds_turns(rows, key)), None)
    if turns is not None:
        return [f"messages={turns}"]
    texts = {key.lower(): key for key in reversed(keys) if _holds_text(rows, key)}
    chosen: dict[str, str] = {}
    for part in ("assistant", "user", "system", "input"):
        free = [name for name in NAMES[part] if name in texts and texts[name] not in chosen.values()]
        if free:
            chosen[part] = texts[free[0]]
    if "user" in chosen and "assistant" in chosen:
        return [f"{part}={chosen[part]}" for part in PARTS if part in chosen]
    text = next((texts[name] for name in NAMES["text"] if name in texts), None)
    return [f"text={text}"] if text is not None and "assistant" not in chosen else []


def _holds_text(rows: Sequence[dict[str, Any]], key: str) -> bool:
    values = [row.get(key) for row in rows]
    return any(isinstance(value, str) for value in values) and all(isinstance(v, str | None) for v in values)


def _holds_turns(rows: Sequence[dict[str, Any]], key: str) -> bool:
    values = [row[key] for row in rows if row.get(key)]
    first = [value[0] for value in values if isinstance(value, list)]
    return (
        bool(first)
        and len(first) == len(values)
        and all(
            isinstance(turn, dict) and ({"role", "content"} <= turn.keys() or {"from", "value"} <= turn.keys())
            for turn in first
        )
    )
