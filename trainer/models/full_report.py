"""Both verdicts on a model folder in one report: headers first, then names and shapes. No torch here.

The verdicts are made in the worker; this asks for them in turn, so that the first can be shown while the second is
made. Called by `check-model`, the Models page and the gate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trainer.worker import WorkerDied

Report = dict[str, Any]
HEADERS_S = 3600.0
TRIAL_S = 30.0
SHAPES_S = 180.0


def full_report(
    ask: Callable[..., Any],
    path: Path,
    *,
    deep: bool = False,
    model_roots: Sequence[Path] = (),
    layouts: Path | None = None,
    on_headers: Callable[[Report], None] | None = None,
    **options: Any,
) -> Report:
    """The report on the folder `path` by `ask` (Worker.call); `on_headers` hears of the first verdict.

    `layouts` is where layouts of architectures are kept, `options` go to every call (on_progress, cancelled). As
    `trainer.models.inspect.inspect_model` has it; "facts" also holds "shapes" (as expected, differ, unknown) and
    "shapes_why". Raises what `ask` raises; a shape verdict that cannot be had is "unknown".
    """
    judged: dict[str, Any] = {"path": str(path), "model_roots": [str(root) for root in model_roots]}
    judged["layouts"] = str(layouts) if layouts is not None else None
    report: Report = ask("check_model", timeout_s=HEADERS_S, deep=deep, **judged, **options)
    facts = report["facts"]
    file = _tokenizer_to_try(report)
    if on_headers is not None and (file or facts.get("shapes") == "due"):
        on_headers(report)
    if file:
        rows = facts.get("embedding_rows") or facts.get("vocab_size")
        place = str(facts.get("base_path") or path)
        trial = _or_warning(_stuck, ask, "try_tokenizer", TRIAL_S, path=place, rows=rows, file=file, **options)
        report = _joined(report, trial)
    if facts.get("shapes") == "due":
        if any(problem["file"] == "config.json" for problem in report["problems"]):
            return report | {
                "facts": report["facts"] | {"shapes": "unknown", "shapes_why": "config.json is not usable"}
            }
        report = _joined(report, _or_warning(_not_had, ask, "check_shapes", SHAPES_S, **judged, **options))
    return report


def _or_warning(
    instead: Callable[[str], Report], ask: Callable[..., Any], op: str, limit_s: float, **args: Any
) -> Report:
    """A verdict, or a warning in its place when the child that made it ended: too long, too much memory."""
    try:
        return ask(op, timeout_s=limit_s, **args)
    except WorkerDied as error:
        return instead(error.message.removesuffix(" Nothing was changed.").rstrip("."))


def _joined(report: Report, more: Report) -> Report:
    problems = report["problems"] + more["problems"]
    return report | {
        "valid": not problems,
        "problems": problems,
        "warnings": report["warnings"] + more["warnings"],
        "facts": report["facts"] | more["facts"],
    }


def _tokenizer_to_try(report: Report) -> str | None:
    """The file to name for the tokenizer; None where there is none, or it or config.json is known to be broken."""
    files = report["facts"].get("tokenizer_files") or []
    broken = {problem["file"] for problem in report["problems"]}
    return files[0] if files and not broken & {*files, "config.json", "tokenizer.json", "merges.txt"} else None


def _stuck(why: str) -> Report:
    """In place of a trial that did not end: a template is a program and may run for ever."""
    message = f"the tokenizer or its chat template did not come to an end ({why})"
    fix = "Choose plain ChatML, or take tokenizer and template of the original model."
    warning = {"code": "template_never_ends", "file": "chat_template.jinja", "message": message, "fix": fix}
    return {"problems": [], "warnings": [warning], "facts": {}}


def _not_had(why: str) -> Report:
    """The shape verdict in place of one that took too long or too much."""
    message = f"names and shapes of the tensors could not be compared ({why})"
    fix = "Compare config.json with the original; a missing tensor is still refused when training loads the model."
    warning = {"code": "shapes_unknown", "file": "config.json", "message": message, "fix": fix}
    return {"problems": [], "warnings": [warning], "facts": {"shapes": "unknown", "shapes_why": why}}
