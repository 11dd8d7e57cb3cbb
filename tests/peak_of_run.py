"""Trains one run in a process of its own and prints the most memory that process ever held, as the kernel counted it.

`python -m tests.peak_of_run SETTINGS.json WORKSPACE`: one thread, glibc's malloc set as a run sets it where memory is short,
nothing but the run in the process. Linux alone has VmHWM.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests import runs
from trainer import process_peak
from trainer.config import resolve
from trainer.events import all_events
from trainer.run import status
from trainer.worker import Worker
from trainer.workspace import Workspace


def main(settings: Path, root: Path) -> None:
    """Train, then say how it ended and what it took."""
    import trainer.loop.train  # noqa: F401  # the libraries are there before the first look

    process_peak.give_large_blocks_back()  # as a run does where memory is short
    before = process_peak.now_gib()
    workspace, worker = Workspace(root).create(), Worker()
    run = runs.new(workspace, resolve(json.loads(settings.read_text())))
    state = runs.train(run, workspace, worker)
    worker.close()
    facts = [event for event in all_events(run.events) if event["kind"] == "memory"]
    print(
        json.dumps(
            {
                "state": state,
                "cause": status(run).cause,
                "before_gib": before,
                "peak_gib": process_peak.peak_gib(),
                "run": str(run.path),
                "memory": facts[-1] if facts else None,
            }
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
