"""The state table of docs/architecture.md once more, written by hand, and what it makes of a house with two people.

Nothing here is read from the product: tests/test_states_model.py holds the product, and the page's own words, to it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from tests.conftest import ROOT

TABLE: dict[str, set[str]] = {
    "queued": {"move", "remove"},
    "preparing": {"stop", "stop-now"},
    "running": {"pause", "checkpoint", "stop", "stop-now"},
    "pausing": {"stop-now"},
    "stopping": {"stop-now"},
    "paused": {"resume", "discard"},
    "stopped": {"resume", "use", "try"},
    "finished": {"use", "try"},
    "failed": {"resume"},
    "diverged": {"resume", "resume-around"},
    "interrupted": {"resume", "leave"},
}
LIVE = {"preparing", "running", "pausing", "stopping"}
CAN_WAIT = {"queued", "paused", "stopped", "failed", "diverged", "interrupted"}
STRENGTH = {"pause": 1, "stop": 1, "stop-now": 2}
TOTAL, EVERY = 4, 2


@dataclass
class Run:
    """What the model knows of one run; a run begins as queued and is begun by `Model.begin`."""

    owner: str
    resumes: int
    name: str
    state: str = "queued"
    step: int = 0
    saved: set[int] = field(default_factory=set)
    at_steps: bool = False  # past the preparation
    dropped: list[tuple[str, str]] = field(default_factory=list)  # commands that no trainer has read yet, by whom
    wish: tuple[str, str] | None = None
    save_asked: bool = False
    by_itself: int = 0
    touched: int = 0
    around: bool = False  # resumed around its bad rows: it may take steps that train nothing
    path: list[str] = field(default_factory=lambda: ["[*]", "queued"])  # every state it was in

    def enter(self, state: str) -> None:
        """Be in `state` from now on."""
        self.state = state
        self.path.append(state)


class Model:
    """The house as the table says that it must be."""

    def __init__(self) -> None:
        self.runs: dict[str, Run] = {}
        self.queue: list[tuple[str, str]] = []
        self.held_by = ""
        self.history: list[tuple[str, int]] = []
        self.uploads: set[bytes] = set()
        self.now = 0

    @property
    def live(self) -> str | None:
        """The run that has the device."""
        return next((run_id for run_id, run in self.runs.items() if run.state in LIVE), None)

    def begin(self, run_id: str, owner: str, by_itself: bool = False) -> None:
        """A life begins: at the newest checkpoint, with no command left of an earlier one."""
        run = self.runs[run_id]
        run.enter("preparing")
        run.owner, run.step = owner, max(run.saved, default=0)
        run.at_steps, run.dropped, run.wish, run.save_asked = False, [], None, False
        run.by_itself = run.by_itself + 1 if by_itself else 0
        self.unqueue(run_id)
        self._touch(run)

    def unqueue(self, run_id: str) -> None:
        """The run waits no more."""
        self.queue = [entry for entry in self.queue if entry[0] != run_id]

    def look(self, run: Run) -> None:
        """The trainer reads its commands: the first end counts, a stronger one replaces it."""
        for command, by in run.dropped:
            if command == "checkpoint":
                run.save_asked = True
            elif run.wish is None or STRENGTH[command] > STRENGTH[run.wish[0]]:
                run.wish = command, by
                run.enter("pausing" if command == "pause" else "stopping")
        run.dropped = []

    def go(self, run_id: str) -> None:
        """The trainer goes on to its next gate, or to its end."""
        run = self.runs[run_id]
        self._touch(run)
        wish = run.wish[0] if run.wish else ""
        if not run.at_steps and not wish:
            run.at_steps = True
            run.enter("running")
        elif not run.at_steps or wish == "stop-now":  # nothing to save, or told not to
            self._end(run, wish)
        else:
            run.step += 1
            if run.step < TOTAL and (run.save_asked or run.step % EVERY == 0):
                self._save(run_id)
            if run.step == TOTAL or wish:
                self._save(run_id)
                self._end(run, "finish" if run.step == TOTAL else wish)

    def fail(self, run_id: str, state: str) -> None:
        """The life ends as failed or diverged; what was saved stays."""
        self.runs[run_id].enter(state)
        self._touch(self.runs[run_id])

    def server_went(self) -> str | None:
        """The server is gone and comes up again: what was live is cut off; returns the run that goes on by itself."""
        if (live := self.live) is not None:
            self.runs[live].enter("interrupted")
            self._touch(self.runs[live])
        return self.server_comes()

    def server_comes(self) -> str | None:
        """The newest run that was cut off and may go on by itself, with its life begun."""
        able = [
            (run.touched, run_id)
            for run_id, run in self.runs.items()
            if run.state == "interrupted" and run.by_itself < run.resumes
        ]
        if not able:
            return None
        newest = max(able)[1]
        self.begin(newest, self.runs[newest].owner, by_itself=True)
        return newest

    def _touch(self, run: Run) -> None:
        self.now += 1
        run.touched = self.now

    def _save(self, run_id: str) -> None:
        """One checkpoint is kept, the newest, and with it whatever is the current model or was."""
        run = self.runs[run_id]
        pinned = {step for owner, step in self.history if owner == run_id}
        run.saved = {step for step in run.saved if step in pinned} | {run.step}
        run.save_asked = False

    def _end(self, run: Run, how: str) -> None:
        """The life is over; a pause holds the queue back where somebody waits."""
        run.enter({"pause": "paused", "finish": "finished"}.get(how, "stopped"))
        if how == "pause" and self.queue and run.wish is not None:
            self.held_by = run.wish[1]


def section() -> str:
    """What the documentation says of states."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    return text.split("## States")[1].split("\n## ")[0]


def diagram() -> list[tuple[str, str, str]]:
    """(state, next state, what leads there) of the documentation's picture."""
    arrow = re.compile(r"^ {4}(\S+) --> (\S+): (.+)$", re.MULTILINE)
    return [(found[1], found[2], found[3]) for found in arrow.finditer(section().split("```")[1])]
