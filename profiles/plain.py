"""The profile `plain`: the rows as they are, with a system message only where the row has none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from profiles.contract import copy_row


@dataclass(frozen=True)
class Plain:
    """Trains the rows as they are."""

    name: str = "plain"
    description: str = "Rows as they are; a short system message only where the row has none."
    overwrites_system: bool = False
    plain_template: bool = False

    def system_prompt(self, date: str) -> str:
        """The usual short prompt; the date is not in it."""
        return "You are a helpful assistant."

    def transform(self, row: dict[str, Any], index: int) -> dict[str, Any]:
        """A copy of `row`."""
        return copy_row(row)

    def logits_processors(self, tokenizer: Any) -> list[Any]:
        """None: generation is not constrained."""
        return []


PROFILE = Plain()
