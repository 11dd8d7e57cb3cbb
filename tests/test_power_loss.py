"""Power loss at every file call of a run's life: whatever the disk kept of what was not fsynced, nothing acknowledged is gone.

kill -9 does not show this, since the page cache outlives the process: the calls are recorded and replayed (tests/power_loss.py).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.figures import Note
from tests.file_faults import FileCalls
from tests.power_loss import Disk
from trainer import checkpoint, config
from trainer.events import EventLog, all_events
from trainer.files import read_json, write_json
from trainer.metrics import COLUMNS, MetricsWriter, read_metrics, read_records, read_rows
from trainer.run import RunDir, create_run
from trainer.workspace import Workspace

# (number of calls after which it was told, what): what a person was told is safe
Told = list[tuple[int, object]]
BROKEN = 2  # the step that is damaged before a run is taken up, and saved again


def staged(run: RunDir, step: int) -> Path:
    staging = checkpoint.new_staging(run.checkpoints, step)
    (staging / "model").mkdir()
    for name in ("model/model.safetensors", "optimizer.safetensors"):
        (staging / name).write_bytes(f"{name} of {step}; ".encode() * 30)
    write_json(staging / "state.json", {"format": 1, "step": step})
    return staging


def life(root: Path, saves: tuple[int, ...], tell: Callable[[object], None], new: bool) -> None:
    """What a life of a run does with files: events, a record a step, saves as the saver's thread does them, pruning."""
    run = create_run(root, {"config": {}}, output=root / "run") if new else RunDir(root / "run")
    events = EventLog(run.events)
    events.append("started" if new else "resumed")
    tell("started")
    checkpoint.put_back(run.checkpoints)
    writer = MetricsWriter(run.metrics, run.rows, 1 if new else 2)
    events.append("log", text="not of the kind that is kept at all costs")
    for step in range(1 if new else saves[0], saves[-1] + 1):
        writer.step({**dict.fromkeys(COLUMNS, 0.0), "step": step, "loss": 1 / step}, [(step, 1 / step, 1)])
        if step in saves:
            writer.sync()
            checkpoint.seal(staged(run, step), step)
            events.append("checkpoint", step=step)
            tell(step)
            checkpoint.prune(run.checkpoints, 2, {step})
    writer.close()
    events.append("finished")
    tell("finished")
    events.close()


def held(root: Path, told: set[object]) -> None:
    """What was told is there, nothing raises, and the run can go on."""
    run = RunDir(root / "run")
    steps = {step for step in told if isinstance(step, int)}
    if told:
        events = all_events(run.events)
        numbers = [event["n"] for event in events]
        assert numbers == sorted(set(numbers))
        assert {event["step"] for event in events if event["kind"] == "checkpoint"} >= steps
        assert "started" in {event["kind"] for event in events} and run.snapshot()["run_id"] == "run"
        assert "finished" not in told or events[-1]["kind"] == "finished"
    elif not run.path.exists():
        return
    checkpoint.put_back(run.checkpoints)
    problems = {step: checkpoint.verify(path) for step, path in checkpoint.listed(run.checkpoints)}
    good = [step for step, found in problems.items() if not found]
    assert {step for step, found in problems.items() if found} <= {BROKEN}, f"visible and not whole: {problems}"
    if steps:
        assert checkpoint.newest_verified(run.checkpoints).step >= max(steps)
        assert len(good) >= min(2, len(steps)), f"kept: {good}, told: {steps}"
        curve = read_metrics(run.metrics)
        losses = {int(record["step"]): float(record["loss"]) for record in curve}
        assert all(losses.get(step) == 1 / step for step in range(1, max(steps) + 1)), "the curve up to the checkpoint"
        assert all(read_rows(run.rows, step) == [(step, 1 / step, 1)] for step in range(1, max(steps) + 1))
    if not run.events.parent.exists() or not run.config.exists():
        return
    log = EventLog(run.events)  # and a life that opens it goes on
    log.append("resumed")
    log.close()
    numbers = [event["n"] for event in all_events(run.events)]
    assert numbers == sorted(set(numbers))
    writer = MetricsWriter(run.metrics, run.rows)
    writer.step({**dict.fromkeys(COLUMNS, 0.0), "step": 50, "loss": 0.5}, [])
    writer.close()
    assert read_records(run.metrics)[-1]["step"] == 50
    checkpoint.seal(staged(run, 60), 60)
    assert checkpoint.newest_verified(run.checkpoints).step == 60


def replay(
    tmp_path: Path,
    work: Callable[[Path, Callable[[object], None]], None],
    check: Callable[[Path, set[object]], None],
    stride: int,
) -> int:
    """Record `work` on the folder `before`, crash after every `stride`th call in every way, `check` each; returns how many."""
    before, place, after = tmp_path / "before", tmp_path / "place", tmp_path / "after"
    shutil.copytree(before, place)
    disk, calls = Disk(place), FileCalls(place)
    told: Told = []
    with calls.installed():
        work(place, lambda what: told.append((len(calls.ops), what)))
    tries = 0
    for done, op in enumerate(calls.ops, 1):
        disk.apply(op)
        if done % stride and not any(at == done for at, _ in told):  # right after something was told, always
            continue
        for what, crash in disk.crashes():
            shutil.rmtree(after, ignore_errors=True)
            crash(after)
            try:
                check(after, {each for at, each in told if at <= done})
            except BaseException:
                print(f"after call {done} of {len(calls.ops)} ({op.kind} {op.path}): {what}")
                raise
            tries += 1
    return tries


@pytest.fixture(params=["a new run", "a run taken up"])
def run_replay(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[int], int]:
    """Replays the first life of a run, or the next of one with two checkpoints, one of whose steps is saved again."""
    before = tmp_path / "before"
    before.mkdir()
    if request.param == "a new run":
        return lambda stride: replay(tmp_path, lambda root, tell: life(root, (1, 2, 3), tell, True), held, stride)
    life(before, (1, 2), lambda what: None, True)
    # step 2 is damaged and trained again: the new one takes its name
    broken = checkpoint.directory_of(before / "run" / "checkpoints", BROKEN) / "optimizer.safetensors"
    broken.write_bytes(broken.read_bytes()[:-1] + b"!")
    return lambda stride: replay(tmp_path, lambda root, tell: life(root, (2, 4), tell, False), held, stride)


def test_power_loss_in_a_run_loses_nothing_acknowledged(
    run_replay: Callable[[int], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.fsync", lambda fd: None)  # counted and modelled; the real disk need not be waited for
    assert run_replay(7) > 60


@pytest.mark.slow
@pytest.mark.torture
def test_power_loss_at_every_file_call_of_a_run_loses_nothing_acknowledged(
    run_replay: Callable[[int], int], monkeypatch: pytest.MonkeyPatch, figures: Note, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setattr("os.fsync", lambda fd: None)
    tries = run_replay(1)
    done = "every file call of a life x what the disk may have kept of what was not fsynced"
    figures(f"Power loss, {request.node.callspec.id}", done, tried=tries, lost=0)


def test_power_loss_in_an_upload_leaves_it_whole_or_absent(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "before").create()
    (workspace.uploads / "new.part").write_bytes(b'{"messages": []}\n' * 500)

    def upload(root: Path, tell: Callable[[object], None]) -> None:
        Workspace(root).add_dataset(root / "uploads" / "new.part", "new.jsonl")
        tell("added")

    def check(root: Path, told: set[object]) -> None:
        found = Workspace(root).datasets()
        assert all(info.path.read_bytes() == b'{"messages": []}\n' * 500 for info in found)
        assert found or "added" not in told

    assert replay(tmp_path, upload, check, 1) > 40


def test_power_loss_in_saving_a_config_keeps_the_one_before_or_the_new_one(tmp_path: Path) -> None:
    (tmp_path / "before").mkdir()
    config.save(tmp_path / "before" / "mine.json", {"hyperparams": {"learning_rate": 1e-4}})

    def save(root: Path, tell: Callable[[object], None]) -> None:
        config.save(root / "mine.json", {"hyperparams": {"learning_rate": 2e-4}})
        tell("saved")

    def check(root: Path, told: set[object]) -> None:
        now = read_json(root / "mine.json")["hyperparams"]["learning_rate"]
        kept = [read_json(path)["hyperparams"]["learning_rate"] for path in config.backups(root / "mine.json")]
        assert now == 2e-4 if "saved" in told else now in (1e-4, 2e-4)
        assert now == 1e-4 or kept == [1e-4], "what it replaced is kept"

    assert replay(tmp_path, save, check, 1) > 30
