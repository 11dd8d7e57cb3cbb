"""A report card that grows: lines of pass, problem or not possible here, in a JSON file that a page can read meanwhile."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Literal

from trainer.events import wire
from trainer.files import write_json

Verdict = Literal["pass", "problem", "not_possible"]


class Report:
    """Lines of a check, written to `path` after each; `judged` are the settings it is true for."""

    def __init__(self, path: Path, judged: dict[str, Any]) -> None:
        self._path = path
        self._started = time.monotonic()
        self._content: dict[str, Any] = {
            "state": "running",
            "doing": "",
            "started": time.time(),
            "judged": judged,
            "lines": [],
            "passed": 0,
            "failed": 0,
            "not_possible": 0,
            "seconds": 0.0,
            "summary": "",
        }
        self._write()

    def doing(self, what: str) -> None:
        """Say what is going on now."""
        self._content["doing"] = what
        self._write()

    def add(self, code: str, status: Verdict, text: str, figure: str = "") -> None:
        """One finished line."""
        self._content["lines"].append({"code": code, "status": status, "text": text, "figure": figure})
        for verdict, key in (("pass", "passed"), ("problem", "failed"), ("not_possible", "not_possible")):
            self._content[key] = sum(line["status"] == verdict for line in self._content["lines"])
        self._write()

    def fact(self, **facts: Any) -> None:
        """Figures others calculate with (peak_gib, seconds_a_step, total_steps, forecast_s)."""
        self._content.update(wire(facts))

    def get(self, name: str) -> float | None:
        """A figure told by `fact`; None where it was not."""
        value = self._content.get(name)
        return float(value) if isinstance(value, (int, float)) else None

    def end(self, state: Literal["done", "stopped"], figures: str = "") -> dict[str, Any]:
        """The last write; returns the whole report. `figures` are sentences that follow the summary of a pass."""
        content = self._content
        lines, passed, failed, left = (
            content["lines"],
            content["passed"],
            content["failed"],
            content["not_possible"],
        )
        if state == "stopped":
            summary = f"Stopped after {len(lines)} checks."
        elif failed:
            summary = f"Failed {failed} of {len(lines)}: " + next(
                line["text"] for line in lines if line["status"] == "problem"
            )
        else:
            summary = f"Passed {passed} of {len(lines)} in {max(1, round(time.monotonic() - self._started))} s."
            if left:
                summary = f"Passed {passed}; {left} not possible on this machine."
            summary = f"{summary} {figures}".strip()
        content.update(state=state, doing="", summary=summary)
        self._write()
        return content

    def _write(self) -> None:
        self._content["seconds"] = round(time.monotonic() - self._started, 2)
        write_json(self._path, self._content)
