"""What a check of a model folder found: problems (it cannot be trained), warnings, facts. Filled by
`trainer.models.inspect` and its parts; messages are clauses without a full stop, so that they fit into a sentence and
into a table."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Finding = dict[str, str]


@dataclass
class Findings:
    """The growing report of one check. Each finding is {"code", "file", "message", "fix"}."""

    problems: list[Finding] = field(default_factory=list)
    warnings: list[Finding] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def problem(self, code: str, file: str, message: str, fix: str) -> None:
        """Note what makes the folder unusable; `file` is empty when it is the folder itself."""
        self.problems.append({"code": code, "file": file, "message": message, "fix": fix})

    def warn(self, code: str, file: str, message: str, fix: str) -> None:
        """Note what a person should know although the folder can be trained."""
        self.warnings.append({"code": code, "file": file, "message": message, "fix": fix})


def listed(names: list[str], most: int = 3) -> str:
    """The first names for a sentence: "a, b, c and 4 more"."""
    more = len(names) - most
    shown = ", ".join(name[:120] for name in names[:most])
    return f"{shown} and {more:,} more" if more > 0 else shown
