"""Rows that turned bad while a run trained, and are left out where the settings say so (`data.bad_row` = skip).

What was left out, and from which step on, stands in the run's events, its one home: any later life of the run leaves out the
same rows at the same steps, whether or not the row was mended meanwhile. Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

KIND = "bad_row"
MANY_SHARE, MANY, HALF = 0.01, 20, 0.5
"""More bad rows than this share of all are no accident: the disk or the cache is broken. Of few rows, 20 or half."""


@dataclass
class LeftOut:
    """The rows left out of a run: of each the step it was found at, for trained and held-out rows apart.

    A row is left out from that step on. In the steps before it was sound, and a resume that comes by them again trains it
    there as before.
    """

    trained: dict[int, int] = field(default_factory=dict)
    held_out: dict[int, int] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """How many rows are left out."""
        return len(self.trained) + len(self.held_out)

    def at(self, step: int) -> frozenset[int]:
        """The trained rows that `step` (from 1) goes without."""
        return frozenset(row for row, since in self.trained.items() if since <= step)

    def held_out_at(self, step: int) -> frozenset[int]:
        """The held-out rows that a check after `step` goes without."""
        return frozenset(row for row, since in self.held_out.items() if since <= step)

    def add(self, row: int, step: int, *, held_out: bool) -> None:
        """Leave `row` out from `step` on; an earlier step that is known stays."""
        rows = self.held_out if held_out else self.trained
        rows[row] = min(step, rows.get(row, step))

    def too_many(self, rows: int) -> bool:
        """Whether so many of the run's `rows` are bad that going on would train something else than what was asked for."""
        return self.count > max(MANY_SHARE * rows, min(MANY, HALF * rows))


def left_out_of(events: Iterable[dict[str, Any]]) -> LeftOut:
    """What the run's events say of rows that were left out."""
    found = LeftOut()
    for event in events:
        if event["kind"] == KIND:
            found.add(int(event["row"]), int(event["step"]), held_out=bool(event.get("held_out")))
    return found


def sentence(place: str, reason: str, step: int, left_out: LeftOut, *, held_out: bool) -> str:
    """What a person is told of one row: `place` is "chats.jsonl, line 8,113", `reason` a clause."""
    where = f"the held-out check of step {step:,}" if held_out else f"step {step:,}"
    count = f"{left_out.count:,} row{'' if left_out.count == 1 else 's'} of this run so far"
    return f"Left out of {where} and all after it: {place}, since {reason}. {count}."
