"""What is new in one run since a reader's cursor: points, telemetry, events, status.

Owns no state but byte positions; `ui.feed` keeps one Follower for each run that somebody looks at.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from trainer import clock, metrics, telemetry
from trainer.events import read_events, wire
from trainer.launch import approximations
from trainer.run import RunDir, Status, StatusReader

LOSS_POINTS = 2000
"""Most points of one series in a whole history; a screen is about this many pixels wide."""
SIDE_POINTS = 1000
"""Most points of every other series."""
CATCH_UP_POINTS = 2000
"""A reader further behind than this gets the thinned history instead of every point."""
TEXT_LIMIT = 20_000
"""Characters of one event's text that go to a browser; the whole text is in events.jsonl."""

KEPT = {"eval": 2000, "checkpoint": 500, "phase": 400, "log": 300, "sample": 60}
"""Newest events of a kind in a whole history; 200 of any other kind."""
PRIVATE_KINDS = frozenset({"log", "sample"})
"""Events that hold rows or their like: a viewer sees them only where the owner allows."""
LONG = ("text", "prompt", "base", "detail")
CURSOR = re.compile(r"([0-9]{1,12})-([0-9]{1,12})-([0-9]{1,15})")
MEMORY_COLUMNS = ("allocated_gib", "reserved_gib", "process_gib", "device_gib", "limit_gib")


@dataclass(frozen=True)
class Cursor:
    """How far a reader is: metrics records, telemetry records, bytes of events."""

    metrics: int
    telemetry: int
    events: int

    @staticmethod
    def parse(text: str) -> Cursor | None:
        """A cursor from `M-T-E`; None for anything else, which is answered with the whole history."""
        match = CURSOR.fullmatch(text)
        return Cursor(*(int(part) for part in match.groups())) if match else None

    def __str__(self) -> str:
        return f"{self.metrics}-{self.telemetry}-{self.events}"


@dataclass(frozen=True)
class Reader:
    """What the asking person may see and do, as far as an update depends on it."""

    sees_rows: bool
    may_command: bool
    may_note: bool


class Follower:
    """Answers readers of one run. Any thread; requests for one run take turns, a millisecond each."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._status = StatusReader(run)
        self._turn = threading.Lock()
        snapshot = run.snapshot()
        self._created = float(snapshot.get("created", 0.0))
        self._facts = _facts(snapshot)

    def status(self) -> Status:
        """The run's status now."""
        with self._turn:
            return replace(self._status.read())  # the reader's own object changes with its next read

    def reply(self, cursor: Cursor | None, gen: int, seen: str, reader: Reader) -> dict[str, Any]:
        """The JSON of one update: everything when `cursor` or `gen` does not fit, else only what is new.

        `seen` is the hash of the slow part of the status that the reader already has. Times are seconds since
        the run was created (`s.t0`), memory in GiB, speed in tokens a second; NaN and infinity are strings.
        """
        with self._turn:
            status = self._status.read()
            fast, slow = self._split(status, reader)
            counts = _count(self._run.metrics, metrics.RECORD), _count(self._run.telemetry, telemetry.RECORD)
            reset = cursor is None or gen != status.gen or not self._fits(cursor, counts)
            if reset or cursor is None:
                points = self._history(counts)
                events, position = self._all_events(reader)
            else:
                points = self._news(cursor, counts)
                events, position = self._new_events(cursor, reader)
        answer: dict[str, Any] = {"gen": status.gen, "reset": reset, "next": str(Cursor(*counts, position))}
        answer |= {"now": round(clock.now() - self._created, 1)} | fast
        mark = hashlib.blake2s(json.dumps(slow, sort_keys=True).encode(), digest_size=4).hexdigest()
        if reset or mark != seen:
            answer |= {"h": mark, "s": slow}
        return answer | points | ({"e": events} if events else {})

    def _fits(self, cursor: Cursor, counts: tuple[int, int]) -> bool:
        behind = counts[0] - cursor.metrics, counts[1] - cursor.telemetry
        return all(0 <= n <= CATCH_UP_POINTS for n in behind) and _starts_a_line(self._run.events, cursor.events)

    def _split(self, status: Status, reader: Reader) -> tuple[dict[str, Any], dict[str, Any]]:
        """What changes with every step, and what a reader needs only once in a while."""
        fast: dict[str, Any] = {
            "state": status.state,
            "phase": status.phase,
            "done": status.phase_done,
            "of": status.phase_total,
            "step": status.current_step,
            "total": status.total_steps,
            "eta_s": None if status.eta_s is None else round(status.eta_s),
            "speed": _digits(status.tokens_per_s, 4),
        }
        slow = {
            "run_id": status.run_id,
            "t0": round(self._created, 1),
            "name": status.name,
            "why": status.why,
            "owner": status.owner,
            "model": status.model_display_name or status.model_path.rstrip("/").rsplit("/", 1)[-1],
            "method": status.method,
            "profile": status.profile,
            "started_at": status.started_at,
            "ended_at": status.ended_at,
            "cause": status.cause,
            "cause_step": status.cause_step,
            "resumed_itself": status.resumed_itself,
            "resumes_allowed": status.resumes_allowed,
            "held_out": _digits(status.held_out_loss, 6),
            "best": _digits(status.best_held_out, 6),
            "best_step": status.best_step,
            "processes": status.processes,
            "saved_step": status.last_checkpoint_step,
            "allowed": list(status.allowed) if reader.may_command else [],
            "seen": self._run.read_notes().get("seen", []),
            "may_note": reader.may_note,
        }
        known = {name: wire(value) for name, value in fast.items() if value is not None}
        return known, wire(slow | self._facts)

    def _news(self, cursor: Cursor, counts: tuple[int, int]) -> dict[str, Any]:
        # cut to the counts that `next` names: what the trainer adds meanwhile belongs to the next update
        records = metrics.read_records(self._run.metrics, cursor.metrics)[: counts[0] - cursor.metrics]
        samples = read_telemetry(self._run, cursor.telemetry)[: counts[1] - cursor.telemetry]
        news: dict[str, Any] = {}
        if len(records):
            columns = self._columns(metrics.latest_of_each_step(records))
            news["m"] = {name: _list(values) for name, values in columns.items()}
        if len(samples):
            news["t"] = {name: _list(values) for name, values in self._samples(samples).items()}
        return news

    def _new_events(self, cursor: Cursor, reader: Reader) -> tuple[list[dict[str, Any]], int]:
        events, position = read_events(self._run.events, cursor.events)
        return [_trim(event, reader) for event in events if _is_open(event, reader)], position

    def _history(self, counts: tuple[int, int]) -> dict[str, Any]:
        records = metrics.read_records(self._run.metrics)[: counts[0]]
        columns = self._columns(metrics.latest_of_each_step(records))
        steps = columns.pop("step")
        drawn: dict[str, Any] = {"clock": _pair(*metrics.thin(steps, columns.pop("t"), SIDE_POINTS))}
        drawn["mean"] = _pair(*bin_means(steps, columns["loss"], SIDE_POINTS))
        for name, values in columns.items():
            drawn[name] = _pair(*metrics.thin(steps, values, LOSS_POINTS if name == "loss" else SIDE_POINTS))
        samples = self._samples(read_telemetry(self._run, 0)[: counts[1]])
        times = samples.pop("t")
        heat = {name: _pair(*metrics.thin(times, values, SIDE_POINTS)) for name, values in samples.items()}
        return {"history": {"m": drawn, "t": heat}}

    def _columns(self, records: np.ndarray) -> dict[str, np.ndarray]:
        with np.errstate(divide="ignore", invalid="ignore"):
            speed = records["tokens"] / records["seconds"]
        columns = {"step": records["step"], "t": np.round(records["t"] - self._created, 1)}
        columns |= {name: records[name] for name in ("loss", "grad_norm", "learning_rate")}
        return columns | {"speed": speed}

    def _samples(self, samples: np.ndarray) -> dict[str, np.ndarray]:
        """Telemetry by column; a column nobody could measure here is left out, never sent as 0."""
        columns = {"t": np.round(samples["t"] - self._created, 1)}
        for name in telemetry.COLUMNS[1:]:
            if len(samples) and not np.isnan(samples[name]).all():
                columns[name] = np.round(samples[name], 3 if name in MEMORY_COLUMNS else 0)
        return columns

    def _all_events(self, reader: Reader) -> tuple[list[dict[str, Any]], int]:
        kept: dict[str, deque[dict[str, Any]]] = {}
        position = 0
        while True:
            events, after = read_events(self._run.events, position)
            for event in events:
                if _is_open(event, reader):
                    kind = event["kind"]
                    kept.setdefault(kind, deque(maxlen=KEPT.get(kind, 200))).append(_trim(event, reader))
            if after == position:
                break
            position = after
        return sorted((event for kind in kept.values() for event in kind), key=lambda event: event["n"]), position


def read_telemetry(run: RunDir, since: int) -> np.ndarray:
    """Telemetry records from number `since` on; none where the file is not there yet."""
    return metrics.map_records(run.telemetry, telemetry.RECORD, since)


def bin_means(x: np.ndarray, y: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Means of the finite values in bins of a power-of-two width, each at its bin's last x.

    The smoothed line is made of these: made of minima and maxima it would show the noise's middle.
    """
    width = 1
    while -(-len(y) // width) > limit:
        width *= 2
    if width == 1:
        return x, y
    starts = np.arange(0, len(y), width)
    finite = np.isfinite(y)
    total, count = (
        np.add.reduceat(np.where(finite, y, 0.0), starts),
        np.add.reduceat(finite.astype(float), starts),
    )
    ends = np.minimum(starts + width, len(y)) - 1
    with np.errstate(invalid="ignore"):
        return x[ends], total / count


def _facts(snapshot: dict[str, Any]) -> dict[str, Any]:
    """What the snapshot says of the run for the title and its details."""
    config = snapshot.get("config", {})
    files = snapshot.get("data", {}).get("files", [])
    device = snapshot.get("device", {})
    return {
        "data": [file["name"] for file in files],
        "rank": config.get("lora", {}).get("r"),
        "device": str(device.get("summary", "")).split(" · ")[0],
        "on_gpu": device.get("name", "cpu") != "cpu",
        "approximate": ", ".join(approximations(config, device.get("name", "cpu") != "cpu")),
    }


def _starts_a_line(path: Path, position: int) -> bool:
    """Whether byte `position` begins an event: a made-up cursor must not make half an event look like one."""
    if position == 0:
        return True
    try:
        with open(path, "rb") as file:
            file.seek(position - 1)
            return file.read(1) == b"\n"
    except FileNotFoundError:
        return False


def _count(path: Path, record: np.dtype) -> int:
    return path.stat().st_size // record.itemsize if path.exists() else 0


def _digits(value: float | None, digits: int) -> float | None:
    return None if value is None else float(f"{value:.{digits}g}")


def _list(values: np.ndarray) -> list[Any]:
    """Numbers for the wire: six significant digits, whole ones without a point, NaN and infinity as words."""
    short = (float(f"{value:.6g}") if abs(value) < 1e5 else round(value, 1) for value in values.tolist())
    return [int(value) if value.is_integer() else wire(value) for value in short]


def _pair(x: np.ndarray, y: np.ndarray) -> list[list[Any]]:
    return [_list(x), _list(y)]


def _is_open(event: dict[str, Any], reader: Reader) -> bool:
    return reader.sees_rows or event["kind"] not in PRIVATE_KINDS


def _trim(event: dict[str, Any], reader: Reader) -> dict[str, Any]:
    """The event as it goes to a browser: long texts cut; tracebacks, which hold paths, as private as rows."""
    cut = {name: text for name in LONG if isinstance(text := event.get(name), str) and len(text) > TEXT_LIMIT}
    event = event | {name: text[:TEXT_LIMIT] + " …" for name, text in cut.items()}
    return event if reader.sees_rows else {name: value for name, value in event.items() if name != "detail"}
