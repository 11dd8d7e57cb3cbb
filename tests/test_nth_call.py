"""Every file call of a save, a resume, a prune, an upload and a saved config, failed or made the last; and again in the recovery.

After each: what was acknowledged is whole and unchanged, nothing half-written stands under a final name, the error is words,
and the same thing done again, on a disk that works, succeeds. `make test` fails each call in one of the ways, `make long` in all.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from tests.figures import Note
from tests.sweeps import Case, Root, compound, sweep
from trainer import checkpoint, config, session
from trainer.events import EventLog, all_events
from trainer.files import read_json, write_bytes, write_json
from trainer.metrics import COLUMNS, MetricsWriter, read_records
from trainer.refusal import Refusal
from trainer.run import RunDir, create_run
from trainer.session import open_life
from trainer.telemetry import Telemetry
from trainer.workspace import Workspace


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """fsync is counted and failed here, and need not take its time: what it is for is shown by tests/test_power_loss.py."""
    monkeypatch.setattr(os, "fsync", os.fstat)


# -- checkpoints: small files in place of tensors, the code around them is the product's


def save(root: Root, step: int, keep: int = 2, pinned: tuple[int, ...] = ()) -> None:
    """One save as the saver does it: staged, sealed, acknowledged by an event, the old ones pruned."""
    folder = root / "checkpoints"
    staging = checkpoint.new_staging(folder, step)
    (staging / "model").mkdir()
    for name in ("model/model.safetensors", "model/config.json", "optimizer.safetensors"):
        (staging / name).write_bytes(f"{name} of {step}".encode() * 40)
    write_json(staging / "state.json", {"format": 1, "step": step})
    size = checkpoint.seal(staging, step)
    events = EventLog(root / "events.jsonl")
    events.append("checkpoint", step=step, bytes=size)
    events.close()
    checkpoint.prune(folder, keep, {step, *pinned})


def three_saved(root: Root) -> None:
    for step in (1, 2, 3):
        save(root, step, keep=9)


def checkpoints_held(root: Root, keep: int = 2, pinned: tuple[int, ...] = ()) -> None:
    """The newest `keep` of what was acknowledged are whole, and so is the pinned one and all that has a final name."""
    checkpoint.put_back(root / "checkpoints")
    acknowledged = [event["step"] for event in all_events(root / "events.jsonl") if event["kind"] == "checkpoint"]
    assert acknowledged[:3] == [1, 2, 3], "events of before"
    there = dict(checkpoint.listed(root / "checkpoints"))
    for step, path in there.items():
        assert checkpoint.verify(path) == [], f"step {step} is visible and not whole"
        assert (path / "optimizer.safetensors").read_bytes() == f"optimizer.safetensors of {step}".encode() * 40
    kept = sorted(there)[-keep:]  # one that was saved and not yet acknowledged counts: it is as good
    lost = {
        step for step in acknowledged if step not in there and (step in pinned or step > kept[0] or len(kept) < keep)
    }
    assert not lost, f"lost: {lost} of {acknowledged}, there: {sorted(there)}"
    assert checkpoint.newest_verified(root / "checkpoints").step >= max(acknowledged)


def swept(root: Root, *steps: int) -> None:
    assert sorted(path.name for path in (root / "checkpoints").iterdir()) == [f"step_{step:08d}" for step in steps]


def prune(root: Root) -> None:
    checkpoint.prune(root / "checkpoints", 1, {1})


def keep_three(root: Root) -> None:
    checkpoints_held(root, 3)


def keep_newest_and_first(root: Root) -> None:
    checkpoints_held(root, 1, (1,))


def next_life(root: Root, keep: int = 2, pinned: tuple[int, ...] = ()) -> None:
    """What the life after a fault does: put back, find the newest, go on to the next save."""
    checkpoint.put_back(root / "checkpoints")
    found = checkpoint.newest_verified(root / "checkpoints")
    save(root, found.step + 1, keep, pinned)


SAVE = Case(
    "save", three_saved, lambda root: save(root, 4), checkpoints_held, lambda root: swept(root, 3, 4), recover=next_life
)
AGAIN = Case(
    "save again",
    three_saved,
    lambda root: save(root, 3, 3),
    keep_three,
    lambda root: swept(root, 1, 2, 3),
    recover=lambda root: next_life(root, 3),
)
PRUNE = Case(
    "prune",
    three_saved,
    prune,
    keep_newest_and_first,
    keep_newest_and_first,
    recover=lambda root: next_life(root, 1, (1,)),
)


# -- a resume, as far as it touches files before the model is loaded


def cut_off_run(root: Root) -> None:
    """A run that was killed: two good checkpoints, one that stands aside, a torn event, two and a half records."""
    run = create_run(root, {"config": {}, "model": {}}, output=root / "run")
    three_saved(run.path)
    final = checkpoint.directory_of(run.checkpoints, 3)
    final.rename(final.with_name(f"{checkpoint.REPLACED}{final.name}"))
    writer = MetricsWriter(run.metrics, run.rows)
    for step in (1, 2, 3):
        writer.step({**dict.fromkeys(COLUMNS, 0.0), "step": step}, [(step, 1.0, 1)])
    writer.close()
    with open(run.metrics, "r+b") as file:
        file.truncate(run.metrics.stat().st_size - 9)
    with open(run.events, "ab") as file:
        file.write(b'{"n":4,"kind":"lo')


def take_up(root: Root) -> checkpoint.Found | None:
    run = RunDir(root / "run")
    try:
        life = open_life(run, "test", resumed=True)
    except OSError as error:
        raise AssertionError("the page's handler must get a Refusal") from error
    try:
        found = session._where_to_go_on(run, lambda text: None)
        if found is not None:
            checkpoint.read_state(found.path)
        Telemetry(run.telemetry, None, None)._sample()
        writer = MetricsWriter(run.metrics, run.rows, life.number)
        writer.step({**dict.fromkeys(COLUMNS, 0.0), "step": 4}, [(4, 1.0, 1)])
        writer.close()
        life.events.append("running", step=3)
    finally:
        life.close()
    return found


def run_held(root: Root) -> None:
    run = RunDir(root / "run")
    checkpoints_held(run.path, 3)
    steps = [int(record["step"]) for record in read_records(run.metrics)]
    assert steps[:2] == [1, 2] and set(steps[2:]) <= {4}
    numbers = [event["n"] for event in all_events(run.events)]
    assert numbers == sorted(set(numbers)) and numbers[:3] == [1, 2, 3]


def taken_up(root: Root) -> None:
    found = take_up(root)
    assert found is not None and found.step == 3 and found.passed_over == ()
    assert all_events(RunDir(root / "run").events)[-1]["kind"] == "running"


RESUME = Case("resume", cut_off_run, take_up, run_held, taken_up)


# -- the page's files


ROWS = b'{"messages": []}\n' * 3000


def workspace_with_data(root: Root) -> None:
    Workspace(root).create()
    (root / "old.jsonl").write_bytes(ROWS[:400])
    Workspace(root).add_dataset(root / "old.jsonl", "old.jsonl")
    (root / "uploads" / "new.part").write_bytes(ROWS)


def upload(root: Root) -> None:
    Workspace(root).add_dataset(root / "uploads" / "new.part", "new.jsonl")


def data_held(root: Root) -> None:
    known = {info.name: info for info in Workspace(root).datasets()}
    assert known["old.jsonl"].path.read_bytes() == ROWS[:400]
    assert known.keys() <= {"old.jsonl", "new.jsonl"}
    if "new.jsonl" in known:
        assert known["new.jsonl"].path.read_bytes() == ROWS


def uploaded(root: Root) -> None:
    data_held(root)
    assert len(Workspace(root).datasets()) == 2


UPLOAD = Case("upload", workspace_with_data, upload, data_held, uploaded, refuses=True)


def with_config(root: Root) -> None:
    config.save(root / "mine.json", {"hyperparams": {"learning_rate": 1e-4}})
    config.save(root / "mine.json", {"hyperparams": {"learning_rate": 2e-4}})


def save_config(root: Root) -> None:
    config.save(root / "mine.json", {"hyperparams": {"learning_rate": 3e-4}})


def rates(root: Root) -> list[float]:
    """Learning rates of the config and of its versions, newest first."""
    files = [root / "mine.json", *config.backups(root / "mine.json")]
    return [read_json(file)["hyperparams"]["learning_rate"] for file in files]


def config_held(root: Root) -> None:
    now, *before = rates(root)
    assert now in (2e-4, 3e-4) and before[-1] == 1e-4
    assert now == 2e-4 or 2e-4 in before


CONFIG = Case("config", with_config, save_config, config_held, config_held, refuses=True)

CASES = (SAVE, AGAIN, PRUNE, RESUME, UPLOAD, CONFIG)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_each_file_call_failed_once_loses_nothing(case: Case, tmp_path: Path) -> None:
    assert sweep(case, tmp_path, thorough=False) > 10


@pytest.mark.slow
@pytest.mark.torture
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_each_file_call_failed_in_every_way_loses_nothing(case: Case, tmp_path: Path, figures: Note) -> None:
    tries = sweep(case, tmp_path, thorough=True)
    figures(
        f"Each file call, failed: {case.name}", "kill, ENOSPC, EIO, EACCES, once and from there on", tried=tries, lost=0
    )


# one call in so many, first and second, that the default suite tries: all of them together are hours
STRIDES = {
    "save": (9, 13),
    "save again": (9, 13),
    "prune": (4, 13),
    "resume": (7, 9),
    "upload": (5, 5),
    "config": (2, 3),
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_fault_in_the_recovery_from_a_fault_loses_nothing(case: Case, tmp_path: Path) -> None:
    _, tries = compound(case, tmp_path, *STRIDES[case.name])
    assert tries > 20


@pytest.mark.slow
@pytest.mark.torture
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_fault_at_any_call_of_the_recovery_from_a_fault_at_any_call_loses_nothing(
    case: Case, tmp_path: Path, figures: Note
) -> None:
    firsts, tries = compound(case, tmp_path)
    done = f"a fault at each of {firsts} calls, then at every call of the recovery, four ways in turn for both"
    figures(f"A fault in the recovery from a fault: {case.name}", done, tried=tries, lost=0, failed_resumes=0)


# -- the sweeps themselves: a recovery that is only safe when nothing goes wrong in it


def old_text(root: Root) -> None:
    (root / "text").write_text("old", encoding="utf-8")


def put_text(root: Root) -> None:
    try:
        write_bytes(root / "text", b"new")
    except OSError as error:
        raise Refusal(f"The text cannot be written: {error.strerror}. The old one is whole.") from None


def put_text_carelessly(root: Root) -> None:
    """After a write that was cut off: write over the only copy."""
    left = [path for path in root.iterdir() if path.name != "text"]
    if not left:
        return put_text(root)
    try:
        with open(root / "text", "w", encoding="utf-8") as file:
            file.write("new")
        for path in left:
            path.unlink()
    except OSError as error:
        raise Refusal(f"The text cannot be written: {error.strerror}. The old one is whole.") from None


def text_held(root: Root) -> None:
    assert (root / "text").read_text(encoding="utf-8") in ("old", "new")


def test_only_the_second_fault_finds_a_recovery_that_writes_over_the_only_copy(tmp_path: Path) -> None:
    careless = Case("careless", old_text, put_text, text_held, text_held, refuses=True, recover=put_text_carelessly)
    (tmp_path / "once").mkdir()
    assert sweep(careless, tmp_path / "once", thorough=True) > 5
    for folder in ("good", "bad"):
        (tmp_path / folder).mkdir()
    assert compound(replace(careless, recover=put_text), tmp_path / "good")[1] > 5
    with pytest.raises(AssertionError):
        compound(careless, tmp_path / "bad")
