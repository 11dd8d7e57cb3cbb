"""What the long suites counted, as the table of docs/reliability.md: printed at the end of `make torture`.

A test calls `figures(suite, done, tried=...)` with what it counted. One that ends at the first broken promise has no line and is
named below the table. tests/conftest.py takes the fixture and the hook from here.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any, Protocol

import pytest


@dataclass(frozen=True)
class Line:
    """One line of the table; None is a count that the suite does not make."""

    suite: str
    done: str
    tried: int
    lost: int | None
    failed_resumes: int | None
    differences: int | None
    seconds: float

    @property
    def cells(self) -> list[str]:
        """As the table shows them."""
        counts = (self.lost, self.failed_resumes, self.differences)
        minutes = f"{self.seconds / 60:.1f}"
        return [
            self.suite,
            self.done,
            f"{self.tried:,}",
            *("" if count is None else f"{count:,}" for count in counts),
            minutes,
        ]

    def __add__(self, other: Line) -> Line:
        counts = {
            name: None if getattr(self, name) is None else getattr(self, name) + getattr(other, name)
            for name in ("lost", "failed_resumes", "differences")
        }
        return replace(self, tried=self.tried + other.tried, seconds=self.seconds + other.seconds, **counts)


class Note(Protocol):
    """Adds a line: the suite, what was done, how often, and what was found (0 where a promise held each time)."""

    def __call__(
        self,
        suite: str,
        done: str,
        *,
        tried: int,
        lost: int | None = None,
        failed_resumes: int | None = None,
        differences: int | None = None,
    ) -> None: ...


LINES = pytest.StashKey[list[Line]]()
HEAD = ["Suite", "What was done", "Tried", "Lost", "Failed resumes", "Differences", "Minutes"]


def lines_of(config: pytest.Config) -> list[Line]:
    """All lines so far, to be added to."""
    return config.stash.setdefault(LINES, [])


@pytest.fixture
def figures(request: pytest.FixtureRequest) -> Note:
    """Notes a line of the table; the minutes are those since the test began."""
    began, lines = time.monotonic(), lines_of(request.config)

    def note(suite: str, done: str, *, tried: int, **found: int | None) -> None:
        counts = {name: found.get(name) for name in ("lost", "failed_resumes", "differences")}
        lines.append(Line(suite, done, tried, seconds=time.monotonic() - began, **counts))

    return note


def merged(lines: list[Line]) -> list[Line]:
    """Lines of the same suite that did the same are one, with their sums."""
    found: dict[tuple[str, str], Line] = {}
    for line in lines:
        key = line.suite, line.done
        found[key] = line + found[key] if key in found else line
    return list(found.values())


def table(lines: list[Line]) -> str:
    """The lines as Markdown."""
    rows = [HEAD, ["---"] * len(HEAD), *(line.cells for line in merged(lines))]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int, config: pytest.Config) -> None:
    """Print the table where a suite has counted something, and say whether all of them kept their promises."""
    lines = config.stash.get(LINES, [])
    if not lines or not config.getoption("markexpr", "").startswith("torture"):
        return
    terminalreporter.write_sep("=", "figures")
    terminalreporter.write_line(table(lines))
    broken = [report.nodeid for how in ("failed", "error") for report in terminalreporter.stats.get(how, [])]
    terminalreporter.write_line("")
    terminalreporter.write_line(
        f"NOT KEPT, see above: {', '.join(broken)}" if broken else "Every promise was kept, each time."
    )
