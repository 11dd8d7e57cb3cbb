"""What every page works with: one workspace, one engine, one worker, one set of jobs and drafts.

`app.py` makes the one Site of a server; the pages and routes get it as their argument, so nothing is global.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.engine import Engine
    from trainer.jobs import Jobs
    from trainer.worker import Worker
    from trainer.workspace import Workspace
    from ui.drafts import Drafts


@dataclass(frozen=True)
class Site:
    """The parts of one running server. `config_path` is absolute: the file of starting values."""

    workspace: Workspace
    engine: Engine
    worker: Worker
    jobs: Jobs
    drafts: Drafts
    config_path: Path
