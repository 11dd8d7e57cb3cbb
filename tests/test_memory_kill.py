"""The kernel ends a server for want of memory, really: the run says so, reads as interrupted and is resumed to the same bits."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT, free_port
from tests.figures import Note
from tests.lives import assert_same
from tests.runs import wait_for
from tests.test_night import post
from trainer.checkpoint import newest_verified
from trainer.ends import read_ends
from trainer.events import all_events
from trainer.run import RunDir, status

MOUNT = Path("/sys/fs/cgroup")
ROOM_BYTES = 1536 << 20  # what the server may take beyond what it has when it is up: torch, the worker, the run


def parent_group() -> Path | None:
    """Where a control group with a limit on memory may be made, inside ours; None where there is no such place."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    for number, controllers, path in (line.split(":", 2) for line in lines):
        if "memory" in controllers.split(","):
            return MOUNT / "memory" / path.lstrip("/")
        if number == "0" and not controllers and (MOUNT / "cgroup.controllers").exists():
            here = MOUNT / path.lstrip("/")
            for folder in (here, *here.parents):  # version 2: processes and groups do not stand side by side
                control = folder / "cgroup.subtree_control"
                if control.exists() and "memory" in control.read_text().split():
                    return folder
    return None


@pytest.fixture
def group() -> Iterator[Path]:
    """A control group of our own, removed at the end; where none can be made the test is skipped in words."""
    parent = parent_group()
    made = parent / f"signalbox-test-{os.getpid()}" if parent is not None else None
    try:
        assert made is not None
        made.mkdir()
    except (AssertionError, OSError) as error:
        pytest.skip(f"No control group with a limit on memory can be made here ({error or 'no such controller'}).")
    yield made
    for _ in range(100):  # its last process may just be going
        with contextlib.suppress(OSError):
            made.rmdir()
            return
        time.sleep(0.1)


def limit(group: Path) -> None:
    """Let the group take ROOM_BYTES more than it has now."""
    v1 = (group / "memory.limit_in_bytes").exists()
    now = int((group / ("memory.usage_in_bytes" if v1 else "memory.current")).read_text())
    (group / ("memory.limit_in_bytes" if v1 else "memory.max")).write_text(str(now + ROOM_BYTES))
    swap = group / ("memory.memsw.limit_in_bytes" if v1 else "memory.swap.max")
    with contextlib.suppress(OSError):  # a kernel without swap accounting, or no swap
        swap.write_text(str(now + ROOM_BYTES if v1 else 0))


@contextlib.contextmanager
def server(folder: Path, group: Path, port: int) -> Iterator[str]:
    """The supervisor with its server, both in the group; ended as a person ends it."""
    (folder / "app.py").symlink_to(ROOT / "tests" / "memory_app.py")
    words = [sys.executable, "app.py", "--no-browser", "--port", str(port), "--workspace", "w", "--config", "mine.json"]
    enter = ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(group / "cgroup.procs"), *words]
    with open(folder / "said.txt", "wb") as said:
        process = subprocess.Popen(enter, cwd=folder, stdout=said, stderr=said, stdin=subprocess.DEVNULL)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def is_up(url: str) -> bool:
    """Whether the server answers."""
    with contextlib.suppress(OSError):
        urllib.request.urlopen(f"{url}/api/health", timeout=2).close()
        return True
    return False


def started(workspace: Path, url: str) -> RunDir:
    """Start a run, as soon as the server answers and the device is free."""
    before = {path.name for path in (workspace / "runs").iterdir()} if (workspace / "runs").exists() else set()
    wait_for(lambda: post(f"{url}/api/train/start", {}) == 200, 90)
    return RunDir(next(path for path in (workspace / "runs").iterdir() if path.name not in before))


@pytest.mark.slow
@pytest.mark.torture
def test_a_server_that_the_kernel_ends_for_want_of_memory_says_so_and_its_run_is_resumed_to_the_same_bits(
    tmp_path: Path, tiny_model: Path, tiny_dataset: Path, group: Path, figures: Note
) -> None:
    config = {
        "model_path": str(tiny_model),
        "data": {"dataset_path": str(tiny_dataset)},
        "hyperparams": {"max_steps": 8, "batch_size": 1, "gradient_accumulation": 2},
        "output": {"save_steps": 2},
    }
    (tmp_path / "mine.json").write_text(json.dumps(config))
    (tmp_path / "hoard").touch()
    workspace = tmp_path / "w"
    with server(tmp_path, group, free_port()) as url:
        wait_for(lambda: is_up(url), 90)
        limit(group)
        run = started(workspace, url)
        wait_for(lambda: status(run).state == "interrupted" and status(run).cause, 90)
        (tmp_path / "hoard").unlink()
        cut = next(event for event in all_events(run.events) if event["kind"] == "cut_off")
        assert cut["cause"].startswith("signal 9 (SIGKILL), the kernel ended it for want of memory"), cut
        assert read_ends(workspace)[-1].out_of_memory
        assert newest_verified(run.checkpoints).step in (2, 4) and status(run).current_step == 5
        wait_for(lambda: post(f"{url}/api/runs/{run.run_id}/command", {"command": "resume"}) == 202, 90)
        wait_for(lambda: status(run).state == "finished", 90)
        whole = started(workspace, url)
        wait_for(lambda: status(whole).state == "finished", 90)
    lives = [event["kind"] for event in all_events(run.events) if event["kind"] in ("started", "resumed")]
    assert lives == ["started", "resumed"], "nobody resumed it but us"
    assert_same(run, whole, "ended by the kernel for want of memory, and resumed")
    did = f"a real kill by the kernel in a control group: '{cut['cause']}'; resumed"
    figures("Out of memory, killed", did, tried=1, lost=0, failed_resumes=0, differences=0)
