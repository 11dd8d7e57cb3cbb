"""Reports for people: what the doctor found in a file, what the inspector found in a model folder.

Pure functions from the worker's JSON to one small shape that `assets/shelf.js` draws for both pages:
`{"status", "word", "headline", "facts": [[name, text]], "groups": [{"status", "title", "fix", "lines", "more"}], "bars"}`.
"""

from __future__ import annotations

from typing import Any

from trainer.data.conversation import PROBLEM_NAMES
from ui.numbers import count, disk, percent

LINES_SHOWN = 20

# what to do about each kind of problem; the message of a row says what is wrong with it
FIXES = {
    "no_answer": "Add the assistant's answer as the last message, or delete the line.",
    "empty_answer": "Write the answer, or delete the line.",
    "bad_json": "Each line must be one whole JSON object; an object may not go over several lines.",
    "unknown_role": "The role of a message is system, user or assistant.",
    "order": "After an optional system message, user and assistant take turns.",
    "wrong_type": "The role and the content of a message are texts in double quotes.",
    "no_messages": 'Each line needs "messages": a list of {"role": …, "content": …}.',
    "not_trained": "Tool calls, images and separate thinking are not trained. Move them into the content, or remove them.",
    "characters": "Remove control characters and broken halves of characters.",
    "not_utf8": "Save the file as UTF-8.",
    "line_too_long": "A line may have 8 MiB at most. Split the conversation.",
    "wrong_format": "Save the data as JSON Lines: UTF-8 text, one conversation a line.",
}


def data_view(report: dict[str, Any]) -> dict[str, Any]:
    """The doctor's report on a data file (trainer.data.doctor.check_data) for a person."""
    facts = [
        ["Format", _format(report)],
        ["Rows", f"{count(report['rows'])}, usable {count(report['usable'])}"],
        ["Size", disk(report["bytes"])],
    ]
    if report["turns"]:
        facts.append(["Turns a row", _turns(report["turns"])])
        facts.append(["With a system message", f"{count(report['with_system'])} of {count(report['usable'])} rows"])
    facts += _lengths(report)
    groups = [
        _group("problem", f"{count(number)} {PROBLEM_NAMES[code]}", FIXES[code], _lines(report, code), number)
        for code, number in report["counts"].items()
    ]
    groups += [_group("warning", warning["message"], "", [], 0) for warning in report["warnings"]]
    if report.get("template_note"):
        groups.append(_group("warning", report["template_note"], "", [], 0))
    status = "pass" if not groups else "problem" if not report["usable"] else "warning"
    bad = report["rows"] - report["usable"]
    return {
        "status": status,
        "word": f"{count(bad)} with problems" if bad else "good" if report["rows"] else "no rows",
        "headline": report["summary"],
        "facts": facts,
        "groups": groups,
        "bars": _bars(report),
    }


def model_view(report: dict[str, Any]) -> dict[str, Any]:
    """The inspector's report on a model folder (trainer.models.inspect) for a person."""
    groups = [_finding("problem", found) for found in report["problems"]]
    groups += [_finding("warning", found) for found in report["warnings"]]
    kind = {"full": "a whole model", "adapter": "a LoRA adapter", "lora": "a LoRA adapter"}.get(
        report["kind"], report["kind"]
    )
    if report["valid"]:
        headline = f"Can be trained: {kind}."
    else:
        number = len(report["problems"])
        headline = f"Cannot be trained yet: {count(number)} {'problem' if number == 1 else 'problems'}."
    status = "problem" if not report["valid"] else "warning" if groups else "pass"
    word = "good" if status == "pass" else "can be trained" if report["valid"] else "cannot be trained"
    facts = _model_facts(report)
    return {"status": status, "word": word, "headline": headline, "facts": facts, "groups": groups, "bars": None}


def _format(report: dict[str, Any]) -> str:
    if report["format"] == "unknown":
        return "not known: it is not JSON Lines"
    return f'{report["format"]}: each line holds "messages" with role and content'


def _turns(turns: dict[str, int]) -> str:
    commonest = max(turns, key=lambda key: (turns[key], -int(key)))
    longest = max(int(key) for key in turns)
    return commonest if len(turns) == 1 else f"mostly {commonest}, at most {longest}"


def _lengths(report: dict[str, Any]) -> list[list[str]]:
    lengths = report.get("lengths")
    if not lengths:
        return []
    text = f"half up to {count(lengths['median'])} tokens, 95 % up to {count(lengths['p95'])}, longest {count(lengths['longest'])}"
    facts = [["Length", f"{text} (of {count(lengths['sampled'])} sampled)"]]
    if lengths["over"] is not None:
        over, limit = lengths["over"], count(lengths["max_length"])
        share = percent(over, lengths["sampled"])
        facts.append(
            [
                "Too long",
                f"{share} of the sampled rows are over {limit} tokens" if over else f"none over {limit} tokens",
            ]
        )
    facts.append(["Answer tokens", f"{percent(report['label_share'])} of all tokens are trained"])
    return facts


def _bars(report: dict[str, Any]) -> dict[str, Any] | None:
    """Row counts by length in tokens: bin edges, counts, and where the maximum length is."""
    lengths = report.get("lengths")
    if not lengths:
        return None
    return {**lengths["histogram"], "limit": lengths["max_length"]}


def _lines(report: dict[str, Any], code: str) -> list[str]:
    return [problem["message"] for problem in report["problems"] if problem["code"] == code]


def _group(status: str, title: str, fix: str, lines: list[str], number: int) -> dict[str, Any]:
    shown = lines[:LINES_SHOWN]
    return {"status": status, "title": title, "fix": fix, "lines": shown, "more": max(number - len(shown), 0)}


def _finding(status: str, found: dict[str, Any]) -> dict[str, Any]:
    title = f"{found['file']}: {found['message']}" if found.get("file") else found["message"]
    return _group(status, title, found.get("fix") or "", [], 0)


def _model_facts(report: dict[str, Any]) -> list[list[str]]:
    return []
