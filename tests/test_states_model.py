"""Two people, one server: everything they can do, in random order, against the state table of docs/architecture.md.

The acts are in tests/states_people.py, the table once more, by hand, in tests/states_table.py.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from tests import runs
from tests.figures import Note
from tests.states_people import COMMANDS, TwoPeople
from tests.states_table import TABLE, diagram, section
from tests.tiny import tiny_model_dir
from trainer import lease, states
from trainer.current import Current
from trainer.engine import Engine
from trainer.locks import FileLock
from trainer.queue import Queue, Waitings


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("states")
    return tiny_model_dir(root / "model", hidden=16, layers=1), runs.write_rows(root / "rows.jsonl", 24)


def play(sources: tuple[Path, Path], sequences: int, acts: int, *, real: bool = False, fixed: bool = False) -> str:
    """Play that many sequences of at most `acts` acts; returns what was done."""
    TwoPeople.sources, TwoPeople.real, TwoPeople.counts = sources, real, {}
    rules = settings(
        max_examples=sequences,
        stateful_step_count=acts,
        deadline=None,
        database=None,
        derandomize=fixed,
        phases=[Phase.generate, *([Phase.shrink] if "STATES_SHRINK" in os.environ else [])],
        suppress_health_check=list(HealthCheck),
    )
    began = time.monotonic()
    run_state_machine_as_test(TwoPeople, settings=rules)
    return f"{TwoPeople.counts}, {time.monotonic() - began:.0f} s"


def test_the_table_and_the_picture_of_the_documentation_are_those_of_the_product() -> None:
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in section().splitlines() if line[:2] == "| "
    ]
    said: dict[str, set[str]] = {}
    for events, held, free, commands in rows[2:]:
        for number, event in enumerate(events.split(", ")):
            of = [
                held.split(", ")[number] if ", " in held else held,
                free.split(", ")[number] if ", " in free else free,
            ]
            last = None if event == "none" else event
            of = [event if cell == "the same" else cell for cell in of]
            assert [states.derive(True, last), states.derive(False, last)] == of, event
            for state, lock in zip(of, ("held", "free"), strict=True):
                if state != "interrupted" and not (event == "none" and lock == "held"):
                    said.setdefault(state, set()).update(commands.split(" (")[0].split(", "))
    said["interrupted"] = {"resume", "leave"}
    assert said == TABLE == {state: set(states.allowed(state)) for state in TABLE}  # type: ignore[arg-type]
    assert {state for before, after, _ in diagram() for state in (before, after)} == {*TABLE, "[*]"}
    drawn = {state: {c for at, _, why in diagram() if at == state for c in why.split(", ")} for state in TABLE}
    for state, words in drawn.items():
        assert words & set(COMMANDS) == TABLE[state] & set(COMMANDS), state


def noted(figures: Note, suite: str, did: str) -> None:
    """Put what was played into the table of `make torture`."""
    figures(suite, did, tried=TwoPeople.counts["sequences"], lost=0, failed_resumes=0, differences=0)


def test_two_people_in_random_order_find_the_table_kept(sources: tuple[Path, Path]) -> None:
    print(play(sources, 12, 30, fixed=True))
    assert (
        TwoPeople.counts["deletions after a promotion"] and TwoPeople.counts["deletions of the current model refused"]
    )


@pytest.mark.slow
@pytest.mark.torture
def test_a_thousand_random_sequences_find_the_table_kept(sources: tuple[Path, Path], figures: Note) -> None:
    did = play(sources, 1050, 25)
    print(did)
    assert TwoPeople.counts["sequences"] >= 1000
    assert TwoPeople.counts["deletions after a promotion"] >= 50
    assert TwoPeople.counts["deletions of the current model refused"] >= 50
    assert TwoPeople.counts["resumes refused"] >= 10
    noted(figures, "Two people in random order", did)


@pytest.mark.slow
@pytest.mark.torture
def test_random_sequences_with_real_training_find_the_table_kept(sources: tuple[Path, Path], figures: Note) -> None:
    noted(figures, "The same with real training", play(sources, 30, 25, real=True))


# -- planted faults, each of which must be found


def forgets_when_it_goes_on(queue: Queue, resumed_run: str | None = None) -> None:
    """`Queue.release`, but the last entry is gone afterwards."""
    with queue._locked():
        now = queue.read()
        if now.held_by and resumed_run in (None, now.held_for):
            queue._write(Waitings(now.entries[:-1]))


_begin, _acquire = Engine._begin, lease.acquire


def begins_without_the_lease(engine: Engine, *given: Any, **named: Any) -> None:
    """`Engine._begin`, but a device that somebody has is no reason to wait."""

    def taken_or_not(device: str, **note: Any) -> FileLock:
        try:
            return _acquire(device, **note)
        except lease.Busy:
            return FileLock(Path("never taken"))

    with patch.object(lease, "acquire", taken_or_not):
        _begin(engine, *given, **named)


FAULTS: dict[str, tuple[type, str, Callable[..., Any]]] = {
    "a deletion removes the current model": (Current, "is_of", lambda current, run_id: False),
    "a queue that goes on forgets an entry": (Queue, "release", forgets_when_it_goes_on),
    "a resume ignores the lease": (Engine, "_begin", begins_without_the_lease),
}


@pytest.mark.slow
@pytest.mark.torture
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(
    sources: tuple[Path, Path], fault: str, monkeypatch: pytest.MonkeyPatch, figures: Note
) -> None:
    monkeypatch.setattr(*FAULTS[fault])
    sequences = 0
    with pytest.raises(AssertionError):
        for _ in range(10):  # drawn anew each time: one draw may leave an act out
            try:
                play(sources, 40, 25)
            finally:
                sequences += TwoPeople.counts["sequences"]
    figures("Planted fault", f"{fault}: found", tried=sequences)
