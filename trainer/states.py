"""The state table of a run, as data, and the one function that derives a state. Pure; design table in docs/architecture.md."""

from __future__ import annotations

from typing import Literal

State = Literal[
    "queued",
    "preparing",
    "running",
    "pausing",
    "stopping",
    "paused",
    "stopped",
    "finished",
    "failed",
    "diverged",
    "interrupted",
]
Command = Literal["pause", "stop", "stop-now", "checkpoint"]
Settling = Literal["leave", "discard"]
"""Commands to a run that no trainer holds: they are written into its events by whoever gives them."""

# last lifecycle event -> state while the run's lock is held
_LIVE: dict[str, State] = {
    "started": "preparing",
    "resumed": "preparing",
    "running": "running",
    "pausing": "pausing",
    "stopping": "stopping",
}
# last lifecycle event -> state, whoever holds the lock (the writer releases it a moment after the event)
_ENDED: dict[str, State] = {
    "queued": "queued",
    "paused": "paused",
    "stopped": "stopped",
    "finished": "finished",
    "failed": "failed",
    "diverged": "diverged",
}
LIFECYCLE = frozenset(_LIVE) | frozenset(_ENDED)
LIVE_STATES: frozenset[State] = frozenset(_LIVE.values())

_ALLOWED: dict[State, tuple[str, ...]] = {
    "queued": ("remove", "move"),
    "preparing": ("stop", "stop-now"),
    "running": ("pause", "checkpoint", "stop", "stop-now"),
    "pausing": ("stop-now",),
    "stopping": ("stop-now",),
    "paused": ("resume", "discard"),
    "stopped": ("resume", "use", "try"),
    "finished": ("use", "try"),
    "failed": ("resume",),
    "diverged": ("resume", "resume-around"),
    "interrupted": ("resume", "leave"),
}


def derive(lock_held: bool, last_lifecycle: str | None) -> State:
    """The state that follows from the lock and the last lifecycle event; a live event without a lock was cut off."""
    if last_lifecycle is None:
        return "preparing" if lock_held else "queued"
    if last_lifecycle in _ENDED:
        return _ENDED[last_lifecycle]
    return _LIVE[last_lifecycle] if lock_held else "interrupted"


def following(last: str | None, kind: str) -> str | None:
    """The last lifecycle event once `kind` was read: what is no lifecycle event changes nothing.

    A stop or a pause is answered by a thread of its own, so `running` may come a moment behind it: what was asked for holds.
    """
    if kind not in LIFECYCLE or (kind == "running" and last in ("pausing", "stopping")):
        return last
    return kind


def allowed(state: State) -> tuple[str, ...]:
    """The commands that mean something in `state`; any other is refused in words."""
    return _ALLOWED[state]
