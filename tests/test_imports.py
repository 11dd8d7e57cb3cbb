"""The import rule: the page and the readers of runs never pull in torch, and app.py not even Gradio."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

HEAVY = ("torch", "transformers", "peft")
TORCH_FREE = (
    "app", "ui.site", "ui.server", "ui.guard", "ui.frame", "ui.theme", "ui.numbers", "ui.glyphs", "ui.routes",
    "ui.process", "ui.feed", "ui.routes_train", "ui.drafts", "ui.pages.train", "ui.pages.live", "ui.pages.runs",
    "ui.pages.data", "ui.pages.models", "profiles", "trainer.config", "trainer.schema", "trainer.run",
    "trainer.events", "trainer.metrics", "trainer.engine", "trainer.control", "trainer.jobs", "trainer.telemetry",
    "trainer.states", "trainer.workspace", "trainer.models.inspect", "trainer.data.formats", "trainer.data.doctor",
    "trainer.loop.memory",
)  # fmt: skip


def loaded_by(module: str) -> set[str]:
    """Which heavy packages a fresh interpreter holds after importing `module`."""
    code = f"import {module}, sys; print(*[n for n in {(*HEAVY, 'gradio')!r} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_all_torch_free_modules_together_load_no_torch() -> None:
    assert loaded_by(", ".join(TORCH_FREE)) & set(HEAVY) == set()


def test_the_command_line_of_the_page_loads_neither_gradio_nor_torch() -> None:
    assert loaded_by("app") == set()


def test_the_check_sees_torch_where_it_is() -> None:
    assert "torch" in loaded_by("torch")


def modules(part: str) -> list[Path]:
    """The source files of one part of the house."""
    return sorted((ROOT / part).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """First names of everything a file imports anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize(
    ("part", "never"),
    [("trainer", {"ui", "gradio", "app"}), ("ui", {"app", *HEAVY}), ("profiles", {"ui", "trainer", "gradio", "app"})],
)
def test_imports_go_one_way(part: str, never: set[str]) -> None:
    found = {str(path.relative_to(ROOT)): imported(path) & never for path in modules(part)}
    assert {name: names for name, names in found.items() if names} == {}
