"""A run is a directory: its paths, how it is made, and its status, derived from what the trainer wrote."""

from __future__ import annotations

import secrets
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainer import bad_rows, clock, locks
from trainer.bad_rows import LeftOut
from trainer.events import read_events
from trainer.files import make_private_dir, read_json, write_json
from trainer.metrics import RECORD, read_records
from trainer.refusal import Refusal
from trainer.states import LIVE_STATES, State, allowed, derive, following
from trainer.time_left import Asides, TokenMarks, asides_s, last_write_s, steps_s

WINDOW_STEPS = 100  # the newest steps, for speed and time left


@dataclass(frozen=True)
class RunDir:
    """The paths of one run."""

    path: Path

    @property
    def run_id(self) -> str:
        """The directory's name."""
        return self.path.name

    @property
    def config(self) -> Path:
        """Resolved snapshot, written once."""
        return self.path / "config.json"

    @property
    def plan(self) -> Path:
        """The tokens of the plan by step, for the time left."""
        return self.path / "plan.json"

    @property
    def metrics(self) -> Path:
        """One record a step."""
        return self.path / "metrics.bin"

    @property
    def rows(self) -> Path:
        """Row ids, loss sums and label counts of each step."""
        return self.path / "rows.bin"

    @property
    def telemetry(self) -> Path:
        """Memory, heat and power, once a second."""
        return self.path / "telemetry.bin"

    @property
    def events(self) -> Path:
        """Rare things, numbered."""
        return self.path / "events.jsonl"

    @property
    def control(self) -> Path:
        """Commands waiting for the trainer."""
        return self.path / "control"

    @property
    def notes(self) -> Path:
        """Name and purpose, written by the page only."""
        return self.path / "notes.json"

    @property
    def checkpoints(self) -> Path:
        """Saved states of the run."""
        return self.path / "checkpoints"

    @property
    def lock(self) -> Path:
        """Held while the trainer lives."""
        return self.path / "lock"

    def snapshot(self) -> dict[str, Any]:
        """What the run was started with; Refusal when this is no run directory."""
        try:
            content = read_json(self.config)
        except (FileNotFoundError, ValueError):
            content = None
        if not isinstance(content, dict) or "run_id" not in content:
            raise Refusal(f"{self.path.name} is not a run: it has no config.json of one.")
        return content

    def token_marks(self) -> TokenMarks | None:
        """The tokens planned by step; None before there is a plan, and in runs of a version that kept none."""
        try:
            kept = read_json(self.plan)
            return TokenMarks(kept["steps"], kept["tokens"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def read_notes(self) -> dict[str, Any]:
        """Name and purpose as the page left them."""
        return read_json(self.notes) if self.notes.exists() else {}


def new_run_id(now_s: float | None = None) -> str:
    """YYYYMMDD-HHMMSS-xxxx: sorts by time, unique by chance."""
    return time.strftime("%Y%m%d-%H%M%S-", time.localtime(now_s)) + secrets.token_hex(2)


def create_run(
    runs: Path, snapshot: dict[str, Any], output: Path | None = None, notes: dict[str, Any] | None = None
) -> RunDir:
    """Make the directory of a new run and write its snapshot. A non-empty `output` is refused, nothing is overwritten."""
    path = output if output is not None else runs / new_run_id()
    try:
        if path.exists() and any(path.iterdir()):
            raise Refusal(f"{path} is not empty. Choose an empty folder for the run, or leave --output out.")
        make_private_dir(path)
        run = RunDir(path.resolve())
        for folder in (run.control, run.checkpoints):
            make_private_dir(folder)
        if notes:
            write_json(run.notes, notes)
        write_json(run.config, {"run_id": run.run_id, "created": clock.now(), **snapshot})
    except OSError as error:
        raise Refusal(f"Cannot write the run to {path}: {error.strerror or error}. Choose another folder.") from None
    return run


@dataclass
class Status:
    """What a person wants to know of a run; None where it is not known (never 0 instead)."""

    run_id: str
    state: State
    phase: str | None = None
    phase_done: int | None = None
    phase_total: int | None = None
    current_step: int = 0
    total_steps: int | None = None
    epoch: float | None = None
    loss: float | None = None
    learning_rate: float | None = None
    held_out_loss: float | None = None
    best_held_out: float | None = None
    best_step: int | None = None
    tokens_per_s: float | None = None
    seconds_a_step: float | None = None
    eta_s: float | None = None
    peak_gib: float | None = None
    model_display_name: str = ""
    model_path: str = ""
    profile: str | None = None
    method: str = ""
    current_file: str = ""
    name: str = ""
    why: str = ""
    owner: str = ""
    started_at: float | None = None
    ended_at: float | None = None
    last_sign: float | None = None
    cause: str | None = None
    cause_step: int | None = None
    resumed_itself: int = 0
    resumes_allowed: int = 0
    last_checkpoint_step: int | None = None
    gen: int = 0
    steps_per_epoch: int | None = None
    rows_left_out: int = 0
    processes: int = 1

    @property
    def allowed(self) -> tuple[str, ...]:
        """The commands that mean something now, given from a server or a terminal: `trainer.states.allowed`.

        A run of several processes goes on by torchrun alone.
        """
        can = allowed(self.state)
        return can if self.processes == 1 else tuple(command for command in can if not command.startswith("resume"))

    def as_json(self) -> dict[str, Any]:
        """All fields, for `status --json`."""
        return asdict(self)


def only_by_torchrun(processes: int) -> str:
    """Why a run of several processes is resumed by none of a server's buttons, and what does resume it."""
    return (
        f"This run is one of {processes} processes, and its curve is theirs: resume it with "
        f"`torchrun --nproc-per-node {processes} -m trainer resume RUN_DIR`."
    )


class StatusReader:
    """Reads a run's status again and again at the cost of what is new; one reader for each run, any thread, one at a time."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._cursor = 0
        self._last: str | None = None
        self._life_began: float | None = None
        self._left_out = LeftOut()
        self._asides = Asides()
        self._marks: TokenMarks | None = None
        self._saved_bytes: float | None = None
        self._status = Status(run.run_id, "queued")
        self._from_snapshot()

    def _from_snapshot(self) -> None:
        snapshot = self._run.snapshot()
        config = self._config = snapshot.get("config", {})
        status = self._status
        status.model_display_name = snapshot.get("model", {}).get("display_name", "")
        status.model_path = config.get("model_path", "")
        status.profile = snapshot.get("profile", {}).get("name")
        status.method = config.get("hyperparams", {}).get("method", "")
        files = snapshot.get("data", {}).get("files", [])
        status.current_file = files[0]["name"] if files else ""
        status.resumes_allowed = config.get("output", {}).get("resume_interrupted", 0)

    def read(self) -> Status:
        """The status now."""
        status = self._status
        self._read_events()
        status.state = derive(is_trained(self._run), self._last)
        if status.state == "interrupted":
            # the run may have ended, or been taken up, between the events and the probe: look at both once more
            held = is_trained(self._run)
            self._read_events()
            status.state = derive(held, self._last)
        notes = self._run.read_notes()
        status.name, status.why = notes.get("name", ""), notes.get("why", "")
        self._from_metrics()
        return status

    def _read_events(self) -> None:
        while True:
            events, cursor = read_events(self._run.events, self._cursor)
            for event in events:
                self._apply(event)
            if cursor == self._cursor:
                return
            self._cursor = cursor

    def _apply(self, event: dict[str, Any]) -> None:
        status, kind, at = self._status, event["kind"], event.get("t")
        status.last_sign = at
        self._last = following(self._last, kind)
        if kind in ("started", "resumed"):
            status.started_at = status.started_at or at
            self._life_began = at
            self._asides = Asides()
            status.ended_at = status.cause = status.cause_step = None
            status.owner = event.get("owner", "")
            status.gen += 1
            status.resumed_itself = status.resumed_itself + 1 if event.get("auto") else 0
        elif kind == "cut_off":
            status.cause = event.get("cause") or None
        elif kind == "running" and status.last_checkpoint_step is not None:
            # begun from the newest that is whole: one beyond it was found damaged
            status.last_checkpoint_step = min(status.last_checkpoint_step, event.get("step", 0)) or None
        elif kind == "rewind":
            status.gen += 1
        elif kind == "phase":
            status.phase = event.get("name")
            self._asides.phase(status.phase, at or 0.0)
            status.phase_done, status.phase_total = event.get("done"), event.get("total")
        elif kind == "plan":
            status.total_steps, status.steps_per_epoch = event.get("total_steps"), event.get("steps_per_epoch")
            status.processes = event.get("processes", 1)
            self._marks = self._run.token_marks()
        elif kind == bad_rows.KIND:
            self._left_out.add(int(event["row"]), int(event["step"]), held_out=bool(event.get("held_out")))
            status.rows_left_out = self._left_out.count
        elif kind == "eval":
            status.held_out_loss = _number(event.get("loss"))
            if event.get("best"):
                status.best_held_out, status.best_step = status.held_out_loss, event.get("step")
        elif kind == "checkpoint":
            status.last_checkpoint_step = event.get("step")
            self._saved_bytes = event.get("bytes")
            self._asides.written_s.append(float(event.get("seconds") or 0.0))
        elif kind in ("paused", "stopped", "finished", "failed", "diverged"):
            status.ended_at, status.phase = at, None
            status.cause, status.cause_step = event.get("cause"), event.get("step")

    def _from_metrics(self) -> None:
        status = self._status
        count = self._run.metrics.stat().st_size // RECORD.itemsize if self._run.metrics.exists() else 0
        recent = read_records(self._run.metrics, max(0, count - WINDOW_STEPS))
        recent = recent[recent["step"] > 0]
        if len(recent) == 0:
            return
        last = recent[-1]
        status.current_step = int(last["step"])
        status.loss, status.learning_rate = float(last["loss"]), float(last["learning_rate"])
        status.last_sign = max(status.last_sign or 0.0, float(last["t"]))
        status.peak_gib = float(last["peak_gib"])
        status.seconds_a_step = float(np.median(recent["seconds"]))
        status.tokens_per_s = float(recent["tokens"].sum() / max(recent["seconds"].sum(), 1e-9))
        if status.steps_per_epoch:
            status.epoch = status.current_step / status.steps_per_epoch
        status.eta_s = None
        mine = recent[_begin_of_life(recent["t"], self._life_began or 0.0) :]
        if status.total_steps and status.state in LIVE_STATES and status.current_step >= 20 and len(mine) >= 5:
            status.eta_s = self._seconds_left(mine, status.current_step, status.total_steps)

    def _seconds_left(self, mine: np.ndarray, step: int, total: int) -> float:
        """Seconds from `step` to the end, by the records of this life; the first step warms up and is left out."""
        left = steps_s(self._marks, step, total, mine[1:])
        left += asides_s(self._config, step, total, self._status.steps_per_epoch, self._asides)
        return left + last_write_s(self._saved_bytes, self._asides)


def is_trained(run: RunDir) -> bool:
    """Whether a trainer holds the run's lock; whoever takes it for a moment to write or delete says so in its note."""
    note = locks.holder(run.lock)
    return note is not None and note.get("kind", "train") == "train"


def status(run: RunDir) -> Status:
    """The status of `run`, read from nothing; Refusal when this is no run directory."""
    return StatusReader(run).read()


def _begin_of_life(times: np.ndarray, began: float) -> int:
    """Index of the first record of this life: behind the last one that is older than it or newer than its follower.

    A clock that was put back between two lives leaves records that seem to come from the future.
    """
    outside = np.flatnonzero((times < began) | np.append(np.diff(times) < 0, False))
    return int(outside[-1]) + 1 if len(outside) else 0


def _number(value: Any) -> float | None:
    """A number off the wire; the strings nan, inf and -inf are numbers too."""
    return None if value is None else float(value)
