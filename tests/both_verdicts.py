"""Both verdicts on a model folder in this process: what `check-model` and the Models page get from the worker."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.models.full_report import full_report
from trainer.models.inspect import inspect_model
from trainer.models.shapes import check_shapes
from trainer.models.tokenizer_trial import try_tokenizer


def ask_here(op: str, *, timeout_s: float, path: str, **args: Any) -> dict[str, Any]:
    """The worker's operation `op`, in this process, without its limits."""
    assert timeout_s > 0
    if op == "try_tokenizer":
        return try_tokenizer(Path(path), **args)
    args["model_roots"] = [Path(root) for root in args["model_roots"]]
    args["layouts"] = Path(args["layouts"]) if args["layouts"] else None
    return {"check_model": inspect_model, "check_shapes": check_shapes}[op](Path(path), **args)


def judged(
    path: Path, *, deep: bool = False, model_roots: Sequence[Path] = (), layouts: Path | None = None
) -> dict[str, Any]:
    """The whole report on `path`."""
    return full_report(ask_here, path, deep=deep, model_roots=model_roots, layouts=layouts)


def contents(path: Path) -> dict[str, str]:
    """Every file below `path` with the sha256 of its bytes, and every link with its target."""
    return {
        str(file.relative_to(path)): f"-> {file.readlink()}"
        if file.is_symlink()
        else hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(path.rglob("*"))
        if file.is_symlink() or file.is_file()
    }
