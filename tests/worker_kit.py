"""What the tests of the worker share: rows, folders with another template, and the question they ask most."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from trainer.worker import Worker

DATE = "2025-11-22"
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


def chat(question: str, answer: str) -> str:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": turns})


def view(worker: Worker, data: Path, model: Path, row: int, **changes: Any) -> dict[str, Any]:
    args: dict[str, Any] = {
        "profile": None, "system_prompt": "", "date": DATE, "max_length": 128, "too_long": "cut",
        "profiles_root": None,
    }  # fmt: skip
    return worker.call("view_row", path=str(data), row=row, model_path=str(model), **(args | changes))


def with_template(model: Path, to: Path, template: str) -> Path:
    shutil.copytree(model, to)
    (to / "chat_template.jinja").write_text(template)
    return to


def child_pids(worker: Worker) -> list[int]:
    return [child._process.pid for child in worker._idle if child._process is not None]
