"""What the gate looks at and what it says: plain records, filled by `ui/facts.py`, judged by `ui/gate.py`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from trainer.config import Change

Status = Literal["problem", "warning", "pass", "not-possible", "not-run"]


@dataclass(frozen=True)
class Action:
    """A button or link of a line: go to a field, set values (dotted key to text), open a page of ours, wait in the queue."""

    text: str
    kind: Literal["field", "set", "link", "queue"]
    goto: str = ""
    values: dict[str, str] = field(default_factory=dict)
    href: str = ""


@dataclass(frozen=True)
class GateLine:
    """One line: what was judged, how it stands, what could be done, and the settings it judged.

    `blocks` is set only where training cannot happen. `more` holds sentences that open on demand.
    """

    code: str
    status: Status
    text: str
    actions: tuple[Action, ...] = ()
    fields: tuple[str, ...] = ()
    blocks: bool = False
    more: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelFact:
    """The report on the chosen model; `state` "checking" while the worker reads it."""

    state: Literal["checking", "ready"]
    name: str = ""
    valid: bool = False
    summary: str = ""
    problems: tuple[tuple[str, str], ...] = ()  # (sentence, what to do)
    warnings: tuple[str, ...] = ()
    is_adapter: bool = False
    fault: str = ""
    max_positions: int | None = None


@dataclass(frozen=True)
class DataFact:
    """The report on the chosen data, all files together; `judged` holds the settings it was made with."""

    state: Literal["checking", "ready"]
    rows: int = 0
    usable: int = 0
    kinds: tuple[tuple[str, int], ...] = ()
    first_problem: str = ""
    labels: int | None = None
    label_share: float | None = None
    too_long: int | None = None
    longest: int | None = None
    p99: int | None = None
    tokens: int | None = None
    sampled: bool = False
    notes: tuple[str, ...] = ()
    refusal: str = ""
    refusal_field: str = ""
    fault: str = ""
    trained_rows: int | None = None  # rows of training: conversations, and the pieces of plain texts
    done: float | None = None
    judged: dict[str, Any] = field(default_factory=dict)
    lengths: tuple[tuple[float, float, float], ...] = ()  # (from, to, rows): tokens of all rows, by a sample


@dataclass(frozen=True)
class Offer:
    """One way to need less memory: its label, the values it sets, GiB saved, and what it costs."""

    text: str
    values: dict[str, str]
    saves_gib: float
    cost: str


@dataclass(frozen=True)
class MemoryFact:
    """The memory estimate beside what is free, in GiB; without room for `weights_gib` nothing trains."""

    needs_gib: float
    free_gib: float
    total_gib: float
    weights_gib: float
    parts: tuple[tuple[str, float], ...] = ()
    offers: tuple[Offer, ...] = ()
    spread: float = 0.1
    moment: str = ""  # when the peak is reached
    words: str = ""  # what the figures are calibrated by
    faster: tuple[Offer, ...] = ()  # what costs memory, fits all the same, and saves time
    micro_batch: int | None = None  # the one that would be chosen by itself

    @property
    def fits(self) -> bool:
        """Whether it fits even where the forecast is too low by its stated error."""
        return self.needs_gib * (1 + self.spread) <= self.free_gib


@dataclass(frozen=True)
class DiskFact:
    """Where the run is written: bytes of one checkpoint and of the run, bytes free, whether we may write."""

    one_bytes: float
    needed_bytes: float
    free_bytes: float
    writable: bool
    refused: str = ""  # why Start would refuse


@dataclass(frozen=True)
class SmokeFact:
    """A smoke test's report: state "running", "done", "stopped" or "interrupted"; lines are (status, sentence)."""

    state: str
    lines: tuple[tuple[str, str], ...] = ()
    passed: int = 0
    failed: int = 0
    not_possible: int = 0
    seconds: float | None = None
    peak_gib: float | None = None
    seconds_a_step: float | None = None
    doing: str = ""
    judged: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Facts:
    """Everything outside the form that the gate looks at; None where it is not known."""

    device_name: str = ""
    on_gpu: bool = False
    gpus: int = 0
    bitsandbytes: bool = True
    advice: str | None = None
    model: ModelFact | None = None
    data: DataFact | None = None
    memory: MemoryFact | None = None
    disk: DiskFact | None = None
    smoke: SmokeFact | None = None
    busy: str = ""
    busy_run: str = ""
    profiles: tuple[str, ...] = ()
    last_good: str = ""
    last_changes: tuple[Change, ...] = ()
    steps: int | None = None
