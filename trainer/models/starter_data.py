"""The starter dataset: questions and answers made from the documentation that every Python installation carries.

The docstrings of the standard library are read with `ast`, in a fixed order; no module is imported, nothing is
downloaded, no path of the machine gets in. The same Python gives the same bytes. Called by `trainer.models.starter`.
"""

from __future__ import annotations

import ast
import inspect
import json
import random
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MOST_ROWS = 6000
MOST_ANSWER_CHARACTERS = 1600
SYSTEM = "You explain Python's standard library briefly and exactly."
# parts of the library that are tests, toys or tables
_SKIPPED = {
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "turtledemo",
    "encodings",
    "idle_test",
    "pydoc_data",
    "antigravity",
    "this",
}
_QUESTIONS = {
    "module": ("What is the module `{}` for?", "What do I find in `{}`?", "Tell me about Python's `{}` module."),
    "class": ("What is `{}`?", "What is the class `{}` for?", "When do I use `{}`?"),
    "function": ("What does `{}` do?", "Explain `{}`.", "What is `{}` good for?", "How does `{}` work?"),
}


@dataclass(frozen=True)
class Entry:
    """One documented thing: its dotted name, its kind, its prose, how it is called, and its documented methods."""

    name: str
    kind: str
    prose: str
    call: str = ""
    methods: tuple[Entry, ...] = ()


def starter_rows() -> list[dict[str, Any]]:
    """Several thousand chat rows in a fixed mixed order: single and several turns, with and without a system
    message."""
    rng = random.Random(2024)
    rows = [row for entry in _entries() for row in _rows_of(entry, rng)]
    rng.shuffle(rows)
    return rows[:MOST_ROWS]


def as_jsonl(rows: list[dict[str, Any]]) -> bytes:
    """The rows as JSON Lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8")


def _entries() -> Iterator[Entry]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for name in sorted(sys.stdlib_module_names - _SKIPPED):
        single, package = root / f"{name}.py", root / name
        files = [single] if single.is_file() else sorted(package.rglob("*.py")) if package.is_dir() else []
        for file in files:
            parts = file.relative_to(root).with_suffix("").parts
            if not _SKIPPED.intersection(parts) and not any(
                part.startswith("_") for part in parts if part != "__init__"
            ):
                yield from _documented(file, ".".join(part for part in parts if part != "__init__"))


def _documented(file: Path, module: str) -> Iterator[Entry]:
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return  # a template or a sample of broken code inside the library
    prose = _prose(tree)
    if prose:
        yield Entry(module, "module", prose)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_") and _prose(node):
            yield _entry(node, f"{module}.{node.name}")


def _entry(node: ast.FunctionDef | ast.ClassDef, name: str) -> Entry:
    if isinstance(node, ast.FunctionDef):
        return Entry(name, "function", _prose(node), f"{name}({ast.unparse(node.args)})")
    methods = [
        _entry(part, f"{name}.{part.name}")
        for part in node.body
        if isinstance(part, ast.FunctionDef) and not part.name.startswith("_") and _prose(part)
    ]
    return Entry(name, "class", _prose(node), methods=tuple(methods))


def _prose(node: ast.Module | ast.ClassDef | ast.FunctionDef) -> str:
    """The docstring's paragraphs up to the first example session; empty when there is too little to learn from."""
    text = inspect.cleandoc(ast.get_docstring(node) or "")
    paragraphs: list[str] = []
    for paragraph in text.split("\n\n"):
        if ">>>" in paragraph or sum(map(len, paragraphs)) + len(paragraph) > MOST_ANSWER_CHARACTERS:
            break
        if not paragraph.lstrip().startswith(("Copyright", "Licensed")):
            paragraphs.append(_unwrapped(paragraph.strip()))
    prose = "\n\n".join(paragraphs).strip()
    return prose if len(prose) >= 24 else ""


def _unwrapped(paragraph: str) -> str:
    """Running text on one line; lists and tables keep their lines."""
    lines = paragraph.split("\n")
    is_text = not any(line.startswith((" ", "-", "*", "+", "|")) for line in lines)
    return " ".join(lines) if is_text else paragraph


def _rows_of(entry: Entry, rng: random.Random) -> Iterator[dict[str, Any]]:
    yield _row(rng, [(_question(entry, rng), entry.prose if rng.random() < 0.4 else _first_paragraph(entry.prose))])
    if entry.call:
        yield _row(rng, [(f"How is `{entry.name}` called?", f"`{entry.call}`")])
    for method in entry.methods:
        yield _row(rng, [(_question(method, rng), _first_paragraph(method.prose))])
    if len(entry.methods) > 1:
        chosen = rng.sample(entry.methods, min(len(entry.methods), rng.choice((2, 2, 3, 4))))
        turns = [(_question(entry, rng), _first_paragraph(entry.prose))]
        turns += [(f"And its method `{_last(method.name)}`?", _first_paragraph(method.prose)) for method in chosen]
        yield _row(rng, turns)


def _question(entry: Entry, rng: random.Random) -> str:
    before, after = rng.choice(_QUESTIONS[entry.kind]).split("{}")
    return before + entry.name + after


def _first_paragraph(prose: str) -> str:
    return prose.split("\n\n")[0]


def _last(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _row(rng: random.Random, turns: list[tuple[str, str]]) -> dict[str, Any]:
    messages = [{"role": "system", "content": SYSTEM}] if rng.random() < 0.12 else []
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages}
