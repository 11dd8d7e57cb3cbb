"""Stop, pause and checkpoint in every phase of a run: answered within a second, told in a receipt, and resumed to the same bits.

The places are in tests/stop_places.py, each held open by a barrier. A phase of the product that stands in no place fails.
`make test` asks in twelve places for one end in turn, with a checkpoint before it; `make torture` in all for each.
"""

from __future__ import annotations

import ast
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

import ui.feed
from tests import runs
from tests.conftest import ROOT
from tests.figures import Line, lines_of
from tests.lives import assert_same
from tests.stop_places import AT, PLACES, STEPS, Barrier, Place
from tests.tiny import tiny_model_dir
from trainer import checkpoint, cli, control, lease
from trainer.engine import Engine
from trainer.events import all_events
from trainer.machine import machine
from trainer.run import RunDir, status
from trainer.schema import Config
from trainer.states import LIFECYCLE, allowed
from trainer.worker import Worker
from trainer.workspace import Workspace
from ui.guard import Guard, Rules
from ui.site import Site

ANSWER_S = 1.0
DISK_S = 5.0  # so long an fsync takes where the disk is slow
COMMANDS = ("stop", "pause", "checkpoint", "stop-now")
ENDS = {"stop": "stopped", "pause": "paused", "stop-now": "stopped"}
LORA = {"method": "lora", "lora": {"r": 4, "dropout": 0.1, "target_modules": ["q_proj", "down_proj"]}}


@dataclass
class Rig:
    """A server's engine and its routes, without a socket; `wholes` are unbroken runs, `times` how long answers took."""

    workspace: Workspace
    engine: Engine
    client: TestClient
    model: Path
    rows: Path
    wholes: dict[str, RunDir] = field(default_factory=dict)
    times: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def config(self, settings: dict[str, Any]) -> Config:
        """Six steps of 2 x 2 rows with a held-out check before the first, after the third and at the end."""
        given = dict(settings)
        held_out = {"eval_steps": AT, **given.pop("eval", {})}
        base = {"max_steps": STEPS, "max_length": 64, "output": {"save_steps": 0}, "data": {"validation_split": 0.3}}
        return runs.settings(self.model, self.rows, **LORA, **(base | given), eval=held_out)

    def start(self, settings: dict[str, Any]) -> RunDir:
        """Start a run."""
        return self.workspace.run(self.engine.start_run(self.config(settings), "test"))

    def free(self) -> None:
        """Wait until the engine is done and the device is free."""
        runs.wait_for(lambda: self.engine._accepted is None and self.engine.holder() is None)

    def whole(self, place: Place, with_always: bool) -> RunDir:
        """The run of these settings that nobody asks anything."""
        key = f"{place.settings} {place.always if with_always else None}"
        if key not in self.wholes:
            with pytest.MonkeyPatch.context() as patch:
                if place.always is not None and with_always:
                    place.always(patch)
                run = self.start(place.settings)
                self.free()
            assert status(run).state == "finished", status(run).cause
            self.wholes[key] = run
        return self.wholes[key]

    def post(self, run: RunDir, command: str) -> int:
        """The status of the answer; a refusal is a sentence that says what is safe."""
        reply = self.client.post(f"/api/runs/{run.run_id}/command", json={"command": command})
        assert reply.status_code == 202 or "Nothing was changed." in reply.json()["error"], reply.json()
        return reply.status_code

    def ask(self, place: str, run: RunDir, command: str) -> None:
        """Ask for `command`; it is refused or acknowledged by an event within ANSWER_S, whichever its state allows."""
        good, seen = command in allowed(status(run).state), len(all_events(run.events))
        began = time.monotonic()
        assert self.post(run, command) == (202 if good else 409)
        if good:
            runs.wait_for(lambda: any(answers(event, command) for event in all_events(run.events)[seen:]))
        took_s = time.monotonic() - began
        self.times[place].append(took_s)
        assert took_s < ANSWER_S, f"{command}: {took_s:.2f} s"


def answers(event: dict[str, Any], command: str) -> bool:
    """Whether `event` acknowledges `command`."""
    if command == "checkpoint":
        return event["kind"] == "log" and event["text"].startswith("Checkpoint asked by owner")
    wanted = "pausing" if command == "pause" else "stopping"
    return event["kind"] == wanted and event["by"] == "owner" and event["now"] == (command == "stop-now")


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Rig]:
    root, began = tmp_path_factory.mktemp("places"), time.monotonic()
    workspace, worker = Workspace(root / "ws").create(), Worker()
    engine = Engine(workspace, worker)
    site = Site(workspace, engine, worker, None, None, root)  # type: ignore[arg-type]
    client = TestClient(Guard(Starlette(routes=ui.feed.routes(site)), Rules()), base_url="http://localhost")
    model, rows = tiny_model_dir(root / "model", hidden=32, layers=1), runs.write_rows(root / "rows.jsonl", 30)
    made = Rig(workspace, engine, client, model, rows)
    yield made
    engine.shutdown(30)
    for place, took in made.times.items():
        said = f"answered after {1000 * statistics.median(took):.0f} ms (median), {1000 * max(took):.0f} ms (worst)"
        print(place, len(took), said)
        lines_of(request.config).append(Line(f"Asked in: {place}", said, len(took), 0, 0, 0, 0.0))
    lines_of(request.config).append(
        Line("All of these", f"the worst of {made_worst(made):.0f} ms", 0, 0, 0, 0, time.monotonic() - began)
    )


def made_worst(rig: Rig) -> float:
    """The longest that anything took to be answered, in ms; 0 where nothing was asked."""
    return 1000 * max((max(took) for took in rig.times.values()), default=0.0)


def hold(rig: Rig, place: Place, patch: pytest.MonkeyPatch) -> tuple[RunDir, Barrier]:
    """A run that is held at `place`."""
    barrier = Barrier()
    if place.always is not None:
        place.always(patch)
    place.arrange(barrier, patch, rig.workspace)
    run = rig.start(place.settings)
    try:
        assert barrier.reached.wait(30), f"it never came to {place.name}: {status(run)}"
        # beside a thread of its own the loop may be a moment behind
        runs.wait_for(lambda: (status(run).state, status(run).phase) == (place.state, place.phase), 5)
    except BaseException:
        barrier.release()
        rig.free()
        raise
    return run, barrier


def ask_again(rig: Rig, place: Place, run: RunDir, command: str) -> None:
    """Ask a second time; it ends already."""
    # refused in words, but stop-now, which means something for as long as a step could be dropped
    assert rig.post(run, command) in ((202, 409) if command == "stop-now" else (409,))
    if not place.leaves:
        control.drop(run.control, command, "a script")  # one that asks nobody whether it may
        runs.wait_for(lambda: not list(run.control.glob("*.json")))


def receipt_of(run: RunDir) -> dict[str, Any]:
    """The last lifecycle event."""
    return [event for event in all_events(run.events) if event["kind"] in LIFECYCLE][-1]


def meet(rig: Rig, place: Place, commands: list[str], patch: pytest.MonkeyPatch, disk_s: float) -> RunDir:
    """Ask a held run for `commands`, twice for the last one; then let it go on to its end."""
    run, barrier = hold(rig, place, patch)
    began = time.monotonic()
    try:
        for command in commands:
            rig.ask(place.name, run, command)
        if (last := commands[-1]) != "checkpoint" and status(run).state != place.state:
            ask_again(rig, place, run, last)
        time.sleep(max(0.0, disk_s - (time.monotonic() - began)))
    finally:
        barrier.release()
        rig.free()
    kinds = [event["kind"] for event in all_events(run.events)]
    assert kinds.count("stopping") + kinds.count("pausing") <= 1, "asked twice, acknowledged once"
    return run


def assert_receipt(place: Place, command: str, run: RunDir) -> None:
    """What the last event says: how it ended, where, what is saved, the memory before and after."""
    receipt = receipt_of(run)
    assert receipt["kind"] == ("finished" if place.ends else ENDS[command]), receipt
    assert receipt["memory_before_gib"] > 0 and receipt["memory_after_gib"] > 0
    assert place.ends or receipt["by"] == "owner"
    if command == "stop-now" and not place.ends:
        return  # it may drop the step it meets; what that costs is seen at the resume
    assert receipt["step"] == place.stops_at
    if place.stops_at:
        assert receipt["saved_step"] == checkpoint.newest_verified(run.checkpoints).step == place.stops_at
    else:
        assert receipt.get("saved_step") is None and checkpoint.listed(run.checkpoints) == []


def ask_the_ended(rig: Rig, run: RunDir) -> None:
    """With nothing running a stop is refused in words, and one that is left all the same ends no later life."""
    before = run.events.read_bytes()
    for command in ("stop", "pause", "checkpoint", "stop-now"):
        assert rig.post(run, command) == 409
    assert cli.main(["stop", str(run.path)]) == 2
    assert run.events.read_bytes() == before
    control.drop(run.control, "stop", "a script that came too late")
    lock = lease.acquire(
        machine().device, kind="smoke", owner="another", run_id="", name=""
    )  # raises where it is not free
    lock.release()


def go_on(rig: Rig, run: RunDir) -> None:
    """Resume to the end."""
    rig.engine.resume_run(run.run_id, "test")
    rig.free()
    assert status(run).state == "finished", status(run)


def check(rig: Rig, place: Place, commands: list[str], patch: pytest.MonkeyPatch, disk_s: float = 0.0) -> None:
    """Ask in `place`, look at the end, resume, compare."""
    command = commands[-1]
    ended = place.state != "preparing" or command in allowed("preparing")  # type: ignore[arg-type]
    whole = rig.whole(place, with_always=command not in place.forgets)
    run = meet(rig, place, commands, patch, disk_s)
    if command == "checkpoint" or not ended:
        assert receipt_of(run)["kind"] == "finished"
        saved = [event["step"] for event in all_events(run.events) if event["kind"] == "checkpoint"]
        assert place.saves_at is None or place.saves_at in saved, saved
    else:
        assert_receipt(place, command, run)
        ask_the_ended(rig, run)
        if not place.ends:
            go_on(rig, run)
    assert_same(run, whole, f"{command} while {place.name}")


def phases_of_the_source() -> set[str]:
    """Every phase that the product writes: `events.append("phase", name=…)` and `curve.aside(…)`."""
    found = set()
    for file in (ROOT / "trainer").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute) or not node.args:
                continue
            first = getattr(node.args[0], "value", None)
            if node.func.attr == "aside":
                assert isinstance(first, str), f"{file.name}:{node.lineno}: a phase that cannot be read from the source"
                found.add(first)
            elif node.func.attr == "append" and first == "phase":
                name = next(word.value for word in node.keywords if word.arg == "name")
                assert isinstance(name, (ast.Constant, ast.Name))
                found.add(name.value if isinstance(name, ast.Constant) else f"<{name.id}>")
    return found - {"<phase>"}  # the argument of aside


def test_every_phase_of_the_product_stands_in_the_table() -> None:
    found = phases_of_the_source()
    assert len(found) >= 6 and {place.phase for place in PLACES} == found


# what another place of the same phase shows as well is left to the long suite
LONG = {"in a step: forward", "in a step: update", "out of memory in the update", "ending: memory"}
QUICK = [number for number, place in enumerate(PLACES) if place.name not in LONG]


@pytest.mark.parametrize("number", QUICK, ids=lambda number: PLACES[number].name)
def test_asked_in_any_phase_it_answers_within_a_second_and_resumes_to_the_same_bits(
    rig: Rig, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = PLACES[number]
    end = "stop" if place.state == "preparing" or number % 2 else "pause"
    check(rig, place, ["checkpoint", end], monkeypatch)


@pytest.mark.slow
@pytest.mark.torture
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.name)
def test_each_command_in_each_phase_is_answered_within_a_second_and_resumed_to_the_same_bits(
    rig: Rig, place: Place, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(rig, place, [command], monkeypatch, DISK_S if place.name == "a save: files" else 0.0)


def test_a_run_that_waits_in_the_queue_refuses_in_words_and_is_trained_all_the_same(rig: Rig) -> None:
    plain = next(place for place in PLACES if place.name == "between steps")
    whole = rig.whole(plain, with_always=True)
    run = rig.workspace.run(rig.engine.enqueue_new(rig.config({}), "test"))
    for command in COMMANDS:
        rig.ask("queued", run, command)
    assert status(run).state == "queued" and not run.events.exists() and list(run.control.iterdir()) == []
    assert rig.workspace.queue.remove(run.run_id) and not rig.workspace.queue.remove(run.run_id)
    assert rig.engine.start_next() is None, "it does not wait any more"
    rig.engine.enqueue(run.run_id, "test")
    assert rig.engine.start_next() == run.run_id
    rig.free()
    assert status(run).state == "finished"
    assert_same(run, whole, "after it waited in the queue")
