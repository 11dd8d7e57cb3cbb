"""A disk without room for a checkpoint in mid-run: an alert and another try, never the run; the last save fails in words."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import runs
from tests.lives import assert_same, one_life
from tests.tiny import tiny_model_dir
from trainer import checkpoint, control
from trainer.events import all_events
from trainer.launch import new_run
from trainer.loop import saves
from trainer.loop.save import _is_want_of_room
from trainer.machine import machine
from trainer.metrics import MetricsWriter
from trainer.notify import Message, payload
from trainer.run import RunDir, status
from trainer.session import open_life, train_to_end
from trainer.states import allowed
from trainer.worker import Worker
from trainer.workspace import Workspace

OFF = {"eval_strategy": "no"}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("room")
    return tiny_model_dir(root / "model", hidden=32, layers=1), runs.write_rows(root / "rows.jsonl", 24)


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(saves, "RETRY_S", 0.0)
    return Workspace(tmp_path / "ws").create()


@pytest.fixture(scope="module")
def straight(sources: Any, worker: Worker, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """The run whose disk has room."""
    place = Workspace(tmp_path_factory.mktemp("straight") / "ws").create()
    run = runs.new(place, settings(sources))
    assert one_life(run, place, worker) == "finished"
    return run


def settings(sources: Any, **changes: Any) -> Any:
    return runs.settings(
        *sources, **{"max_steps": 14, "output": {"save_steps": 5}, "eval": OFF, "alerts": {"disk_free_gb": 0}} | changes
    )


class Disk:
    """What the product is told of the free room: the truth, or `free_bytes` where that is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.free_bytes: int | None = None
        real = checkpoint.free_bytes
        monkeypatch.setattr(
            checkpoint, "free_bytes", lambda path: real(path) if self.free_bytes is None else self.free_bytes
        )


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[int, Callable[[], Any]]], None]:
    """Do something right after a step was recorded."""

    def arrange(acts: dict[int, Callable[[], Any]]) -> None:
        record = MetricsWriter.step

        def step(writer: MetricsWriter, values: dict[str, float], rows: list[tuple[int, float, int]]) -> None:
            record(writer, values, rows)
            if act := acts.pop(int(values["step"]), None):
                no_saver()  # what is being written now is not meant
                act()

        monkeypatch.setattr(MetricsWriter, "step", step)

    return arrange


class Told:
    """A notifier that keeps what it is told."""

    def __init__(self) -> None:
        self.messages: list[Message] = []

    def tell(self, run_id: str, message: Message | None) -> None:
        """Keep it."""
        self.messages += [message] if message else []


def life(run: RunDir, workspace: Workspace, worker: Worker, told: Told) -> str:
    opened = open_life(run, "test", resumed=run.events.exists())
    return train_to_end(opened, workspace, worker, machine(), notifier=told)  # type: ignore[arg-type]


def of(run: RunDir, kind: str) -> list[Any]:
    return [
        event["step"] if kind == "checkpoint" else event["text"]
        for event in all_events(run.events)
        if event["kind"] == kind
    ]


def again(run: RunDir) -> list[str]:
    return [text for text in of(run, "log") if text.startswith("Saving works again")]


def test_a_save_without_room_is_an_alert_with_both_figures_and_made_up_for_when_there_is_room(
    workspace: Workspace, sources: Any, worker: Worker, straight: RunDir, disk: Disk, at_step: Any
) -> None:
    run, told = runs.new(workspace, settings(sources)), Told()
    at_step({6: lambda: setattr(disk, "free_bytes", 1000), 11: lambda: setattr(disk, "free_bytes", None)})
    assert life(run, workspace, worker, told) == "finished", status(run).cause
    (text,) = of(run, "alert")
    assert text.startswith("The disk is full: the checkpoint of step 10 needs 0.") and "MB, 0.0 MB is free." in text
    assert "Safe: step 5. Training goes on" in text and of(run, "checkpoint") == [5, 11, 14]
    (line,) = again(run)  # said when it is seen, by then of the newest
    assert re.fullmatch(r"Saving works again: step 1[1-4] is on the disk\. None was saved from 10 on\.", line), line
    assert [message.kind for message in told.messages] == ["unsaved", "ended"]
    first = told.messages[0]
    assert first.title.endswith("cannot be saved") and first.text == text and payload("ntfy", first)[0]
    assert_same(run, straight, "a save that found no room for a while")


def test_while_there_is_none_it_is_looked_for_at_most_once_a_minute_and_said_once(
    workspace: Workspace, sources: Any, worker: Worker, disk: Disk, at_step: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saves, "RETRY_S", 60.0)
    run = runs.new(workspace, settings(sources, output={"save_steps": 2}))
    at_step({3: lambda: setattr(disk, "free_bytes", 1000), 9: lambda: setattr(disk, "free_bytes", None)})
    assert one_life(run, workspace, worker) == "finished"
    assert len(of(run, "alert")) == 1 and of(run, "checkpoint") == [2, 10, 12, 14], (
        "the next that is due, and no sooner"
    )
    assert len(again(run)) == 1


def fill(folder: Path) -> None:
    """Take all the room of a disk."""
    with open(folder / "ballast", "wb", buffering=0) as file:
        while True:
            try:
                file.write(bytes(4096))
            except OSError:
                return


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
@pytest.mark.parametrize("known", [True, False], ids=["seen before", "in the middle of writing"])
def test_on_a_disk_that_is_really_full_the_run_goes_on_and_saves_when_it_is_emptied(
    workspace: Workspace, sources: Any, worker: Worker, straight: RunDir, tmp_path: Path, at_step: Any, disk: Disk, known: bool
) -> None:  # fmt: skip
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no disk can be mounted here: {mounted.stderr.decode()}")
    try:
        config = settings(sources)
        run, _ = new_run(workspace, config, machine(), owner="test", threads=1, output=small / "run")
        if not known:  # the room that was there when it was looked for is gone when it is needed
            at_step({6: lambda: (fill(small), setattr(disk, "free_bytes", 10**9)), 12: lambda: empty(small, disk)})
        else:
            at_step({6: lambda: fill(small), 12: lambda: empty(small, disk)})
        assert one_life(run, workspace, worker) == "finished", status(run).cause
        said = of(run, "alert")
        assert "step 10" in said[0] and "B is free" in said[0], said
        assert known or "No space left on device" in said[0]
        assert not list(run.checkpoints.glob(".staging_*")) and of(run, "checkpoint")[-1] == 14
        assert all(checkpoint.verify(path) == [] for _, path in checkpoint.listed(run.checkpoints))
        assert len(again(run)) == 1 or known is False
        assert_same(run, straight, "on a full disk")
    finally:
        subprocess.run(["umount", str(small)], check=True)


def empty(folder: Path, disk: Disk) -> None:
    """Give the room back."""
    (folder / "ballast").unlink()
    disk.free_bytes = None


def test_a_limit_on_the_size_of_files_is_want_of_room_too_and_leaves_nothing_half(
    workspace: Workspace, sources: Any, worker: Worker, straight: RunDir, at_step: Any
) -> None:
    run = runs.new(workspace, settings(sources))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))  # noqa: E731
    at_step({6: lambda: limit(40_000), 12: lambda: limit(before[0])})
    try:
        assert one_life(run, workspace, worker) == "finished", status(run).cause
    finally:
        limit(before[0])
    said = of(run, "alert")
    assert "Saving step 10 went wrong" in said[0] and "File too large" in said[0] and "it needs 0." in said[0], said
    assert of(run, "checkpoint")[0] == 5 and of(run, "checkpoint")[-1] == 14
    assert not list(run.checkpoints.glob(".staging_*"))
    assert_same(run, straight, "under a limit on the size of files")


def no_saver() -> None:
    runs.wait_for(lambda: not any(thread.name == "saver" for thread in threading.enumerate()))


@pytest.mark.parametrize("command", ["stop", "pause"])
def test_a_stop_or_a_pause_whose_save_finds_no_room_says_so_and_the_run_can_be_resumed(
    workspace: Workspace, sources: Any, worker: Worker, straight: RunDir, disk: Disk, at_step: Any, command: str
) -> None:
    run = runs.new(workspace, settings(sources))
    at_step({7: lambda: setattr(disk, "free_bytes", 1000)})
    assert one_life(run, workspace, worker, at=8, command=command) == "failed"
    cause = status(run).cause or ""
    assert cause.startswith(
        f"A {command} was asked by test, but what was to be saved is not. The disk is full: the checkpoint"
    )
    assert "MB is free. The checkpoints before it are whole." in cause and of(run, "alert") == []
    assert checkpoint.newest_verified(run.checkpoints).step == 5 and "resume" in allowed(status(run).state)
    disk.free_bytes = None
    assert one_life(run, workspace, worker) == "finished"
    assert_same(run, straight, f"resumed after a {command} without room")


def test_a_stop_that_saves_nothing_is_a_stop_whatever_the_disk_is_like(
    workspace: Workspace, sources: Any, worker: Worker, disk: Disk, at_step: Any
) -> None:
    run = runs.new(workspace, settings(sources))
    at_step({7: lambda: setattr(disk, "free_bytes", 1000)})
    assert one_life(run, workspace, worker, at=12, command="stop-now") == "stopped"
    assert len(of(run, "alert")) == 1 and checkpoint.newest_verified(run.checkpoints).step == 5


def test_a_checkpoint_that_a_person_asks_for_is_answered_each_time(
    workspace: Workspace, sources: Any, worker: Worker, disk: Disk, at_step: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saves, "RETRY_S", 60.0)
    run = runs.new(workspace, settings(sources))
    opened = open_life(run, "test", resumed=False)

    def ask() -> None:
        disk.free_bytes = 1000
        control.drop(run.control, "checkpoint", "me")
        runs.wait_for(opened.signals.save_asked.is_set)

    at_step({6: ask, 8: ask, 13: lambda: setattr(disk, "free_bytes", None)})
    assert train_to_end(opened, workspace, worker, machine()) == "finished"
    assert len(of(run, "alert")) == 2 and "Safe: step 5" in of(run, "alert")[1], of(run, "alert")


def test_what_counts_as_want_of_room() -> None:
    for number in (28, 27, 122):
        assert _is_want_of_room(OSError(number, "x"))
        assert _is_want_of_room(RuntimeError(f"I/O error: No space left on device (os error {number})"))
    for other in (OSError(13, "x"), OSError(28), RuntimeError("(os error 5)"), ValueError("28")):
        assert _is_want_of_room(other) is False
