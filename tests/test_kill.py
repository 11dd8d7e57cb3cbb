"""SIGKILL at random moments of real runs: nothing acknowledged is lost, every resume goes on, the end is the unbroken run's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.figures import Note

# columns of the table, and the word by which tests/kill_loop.py tells such a violation
KINDS = {"lost": " is lost", "failed_resumes": "resume failed", "differences": "differs from the unbroken run"}


def kill(place: Path, kills: int, seed: int) -> dict[str, Any]:
    """The report of tests/kill_loop.py; its directory is kept where it found something."""
    command = [sys.executable, "-m", "tests.kill_loop", str(place), "--kills", str(kills), "--seed", str(seed)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads(done.stdout)
    print(json.dumps(report, indent=2))
    return report


def test_fifty_kills_lose_no_acknowledged_checkpoint_and_fail_no_resume(tmp_path: Path) -> None:
    report = kill(tmp_path, 50, seed=1)
    assert report["violations"] == []
    assert report["kills"] >= 50 and report["resumed_and_went_on"] >= 10 and report["in_a_save"] >= 3, report


@pytest.mark.slow
@pytest.mark.torture
@pytest.mark.parametrize("seed", [2, 3])
def test_five_hundred_kills_lose_no_acknowledged_checkpoint_and_fail_no_resume(
    tmp_path: Path, seed: int, figures: Note
) -> None:
    report = kill(tmp_path, 500, seed=seed)
    done = (
        f"`kill -9`, {report['in_a_save']} of them into a save; {report['runs']} runs, {report['lives']} lives, "
        f"{report['acknowledged']:,} checkpoints acknowledged, {report['damaged']} damaged by us"
    )
    broken = report["violations"]
    counts = {name: sum(word in text for text in broken) for name, word in KINDS.items()}
    figures(f"Kill, 500 (seed {seed})", done, tried=report["kills"], **counts)
    assert report["violations"] == []
    assert report["kills"] >= 500 and report["in_a_save"] >= 50 and report["damaged"] >= 20, report
