"""Going on after a divergence: back to the newest whole checkpoint, without the rows of the bad step, at a lower rate.

What was decided stands in the run's events, its one home: any later life of the run skips the same rows at the same rate.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from trainer import checkpoint
from trainer.events import EventLog, all_events
from trainer.refusal import Refusal
from trainer.run import RunDir

MOST = 3  # a run that diverges again and again has another fault than its rows
FACTOR = 0.5


@dataclass(frozen=True)
class Rewinds:
    """All rewinds of a run together."""

    count: int = 0
    skip: frozenset[int] = frozenset()  # rows that are trained no more
    rate_factor: float = 1.0


def rewinds_of(events: Iterable[dict[str, Any]]) -> Rewinds:
    """What the run's events say of its rewinds."""
    found = [event for event in events if event["kind"] == "rewind" and not event.get("memory")]
    rows = frozenset(int(row) for event in found for row in event["rows"])
    factor = 1.0
    for event in found:
        factor *= float(event["factor"])
    return Rewinds(len(found), rows, factor)


def rewind(run: RunDir, events: EventLog, step: int, rows: list[dict[str, Any]]) -> checkpoint.Found | None:
    """Write the rewind and return the checkpoint to go back to; None where there is none, or too many were made.

    `rows` are those of the step that diverged, as the `diverged` event names them.
    """
    before = rewinds_of(all_events(run.events))
    if before.count >= MOST or not checkpoint.listed(run.checkpoints):
        return None
    try:
        found = checkpoint.newest_verified(run.checkpoints)
    except Refusal:  # none is whole; the run ends as diverged, and a resume says which are damaged
        return None
    note(events, step, found.step, rows, before)
    return found


def go_around(run: RunDir, events: EventLog, past: list[dict[str, Any]]) -> int:
    """Write the same for a run that ended as diverged and is resumed by a person; returns the rewinds written (0 or 1)."""
    ended = next((event for event in reversed(past) if event["kind"] == "diverged"), None)
    if ended is None:
        return 0
    # what the resume will find; without a checkpoint it starts over, without the rows all the same
    whole = next((step for step, folder in checkpoint.listed(run.checkpoints) if checkpoint.looks_whole(folder)), 0)
    note(events, int(ended["step"]), whole, ended.get("rows", []), rewinds_of(past))
    return 1


def note(events: EventLog, step: int, to: int, rows: list[dict[str, Any]], before: Rewinds) -> None:
    """Write the event: the rows of `step` are skipped from now on and the rate is lowered, from step `to` on."""
    rate = before.rate_factor * FACTOR
    names = "1 row is" if len(rows) == 1 else f"{len(rows):,} rows are"
    text = (
        f"Step {step} diverged: back to step {to}. {names} skipped from now on, and the learning rate is "
        f"{rate:.3g} times what it was set to."
    )
    events.append("rewind", step=step, to=to, rows=[row["row"] for row in rows], factor=FACTOR, text=text)


def note_memory(events: EventLog, step: int, to: int) -> None:
    """Write that memory ran out in the update of `step` and the run goes on from step `to`: no row is skipped for that."""
    why = "since its weights may be of two steps"
    text = f"Out of memory in the update of step {step}: back to step {to}, {why}. Nothing is skipped."
    events.append("rewind", memory=True, step=step, to=to, rows=[], factor=1.0, text=text)
