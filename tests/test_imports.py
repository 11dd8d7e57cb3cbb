"""The import rule: the page and the readers of runs never pull in torch, and app.py not even Gradio."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

HEAVY = ("torch", "transformers", "peft")
TRAINER = (
    "config", "fields", "schema", "run", "events", "metrics", "engine", "control", "jobs", "telemetry", "states",
    "workspace", "worker", "hub", "machine", "models.inspect", "data.formats", "data.doctor", "loop.memory",
)  # fmt: skip


def modules(part: str) -> list[Path]:
    """The source files of one part of the house."""
    return sorted((ROOT / part).rglob("*.py"))


def dotted(path: Path) -> str:
    """A source file's name as a module."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def loaded_by(module: str) -> set[str]:
    """Which heavy packages a fresh interpreter holds after importing `module`."""
    code = f"import {module}, sys; print(*[n for n in {(*HEAVY, 'gradio')!r} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_page_the_profiles_and_the_readers_of_runs_load_no_torch() -> None:
    pages = [dotted(path) for part in ("ui", "profiles") for path in modules(part)]
    readers = [f"trainer.{name}" for name in TRAINER]
    assert len(pages) > 20 and "ui.pages.train" in pages
    assert loaded_by(", ".join(["app", *pages, *readers])) & set(HEAVY) == set()


def test_the_command_line_of_the_page_loads_neither_gradio_nor_torch() -> None:
    assert loaded_by("app") == set()


def test_the_check_sees_torch_where_it_is() -> None:
    assert "torch" in loaded_by("torch")


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
