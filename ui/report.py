"""Reports for people: what the doctor found in a file, what the inspector found in a model folder.

Pure functions from the worker's JSON to one small shape that `assets/shelf.js` draws for both pages: {"status",
"word", "headline", "facts": [[name, text]], "groups": [{"status", "title", "fix", "lines", "excerpts", "more"}], "bars"}.
"""

from __future__ import annotations

from typing import Any

from trainer.data.problems import FIXES, PROBLEM_NAMES
from trainer.models.inspect import sentence
from ui.numbers import count, disk, percent

LINES_SHOWN = 20

KINDS = {
    "full": "a whole model",
    "lora": "a LoRA adapter",
    "gguf": "a GGUF file",
    "diffusers": "an image model",
    "checkpoint": "a training checkpoint",
    "lfs": "pointers to files that were not downloaded",
    "nothing": "no model",
}

SHAPES = {
    "as expected": "every tensor of the architecture, in its shape",
    "differ": "other than the architecture's, see below",
    "unknown": "not compared",
    "due": "being compared",
}


def data_view(report: dict[str, Any]) -> dict[str, Any]:
    """The doctor's report on a data file (trainer.data.doctor.check_data) for a person."""
    facts = [
        ["Format", report["format_reason"]],
        ["Rows", f"{count(report['rows'])}, usable {count(report['usable'])}"],
        ["Size", disk(report["bytes"])],
    ]
    if report["turns"]:
        facts.append(["Turns a row", _turns(report["turns"])])
        facts.append(["With a system message", f"{count(report['with_system'])} of {count(report['usable'])} rows"])
    if report.get("documents"):
        facts.append(["Plain texts", _documents(report)])
    facts += _lengths(report)
    groups = [
        _group("problem", f"{count(number)} {PROBLEM_NAMES[code]}", FIXES[code], *_lines(report, code), number)
        for code, number in report["counts"].items()
    ]
    groups += [_warning(warning) for warning in report["warnings"]]
    groups += _too_long(report.get("lengths"))
    if report.get("template_note"):
        groups.append(_group("warning", report["template_note"], "", [], [], 0))
    status = "pass" if not groups else "problem" if not report["usable"] else "warning"
    bad = report["rows"] - report["usable"]
    return {
        "status": status,
        "word": f"{count(bad)} with problems" if bad else "good" if report["rows"] else "no rows",
        "headline": report["summary"],
        "counted": count(report["rows"]),
        "facts": facts,
        "groups": groups,
        "bars": _bars(report),
        "suggested": report["suggested"],
        "mapping": report["mapping"],
        "columns": report["columns"],
        "repairable": _repairable(report),
    }


def _repairable(report: dict[str, Any]) -> bool:
    """Whether a repaired copy could differ from the file: rows with problems, rows said twice, or UTF-16."""
    if not report["usable"]:
        return any("UTF-16" in problem["message"] for problem in report["problems"])
    return report["usable"] < report["rows"] or any(found["code"] == "duplicates" for found in report["warnings"])


def _warning(found: dict[str, Any]) -> dict[str, Any]:
    lines = found.get("lines", [])
    return _group("warning", found["message"], "", lines, [], found["count"] if lines else 0)


def _too_long(lengths: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The rows over the maximum length that were measured, by line."""
    found = lengths["too_long"] if lengths else []
    if not lengths or not found:
        return []
    limit, over = count(lengths["max_length"]), lengths["over"]
    who = "row is" if over == 1 else "rows are"
    sampled = "" if lengths["exact"] else f" of the {count(lengths['sampled'])} sampled"
    text = f"{count(over)} {who} longer than {limit} tokens{sampled}."
    cure = "Raise the maximum length, or choose on the Train page whether such rows are cut, dropped or refused."
    lines = [f"Line {count(row['line'])}: {count(row['tokens'])} tokens." for row in found]
    return [_group("warning", text, cure, lines, [], over)]


def model_view(report: dict[str, Any]) -> dict[str, Any]:
    """The report on a model folder (trainer.models.full_report) for a person; of the headers alone while that is all."""
    groups = [_finding("problem", found) for found in report["problems"]]
    groups += [_finding("warning", found) for found in report["warnings"]]
    status = "problem" if not report["valid"] else "warning" if report["warnings"] else "pass"
    return {
        "status": status,
        "word": {"problem": "cannot be trained", "warning": "can be trained", "pass": "good"}[status],
        "headline": sentence(report),
        "facts": _model_facts(report),
        "groups": groups,
        "bars": None,
    }


def _turns(turns: dict[str, int]) -> str:
    commonest = max(turns, key=lambda key: (turns[key], -int(key)))
    longest = max(int(key) for key in turns)
    return commonest if len(turns) == 1 else f"mostly {commonest}, at most {longest}"


def _lengths(report: dict[str, Any]) -> list[list[str]]:
    lengths = report.get("lengths")
    if not lengths:
        return []
    median, p95, longest = (count(lengths[key]) for key in ("median", "p95", "longest"))
    mean = f"mean {count(round(lengths['mean']))}"
    if lengths["exact"]:
        source = f"{mean}; all {count(lengths['rows'])} rows measured"
    else:
        error = count(max(1, round(lengths["mean_error"])))
        source = f"{mean} ± {error} (95 % sure); {count(lengths['sampled'])} of {count(lengths['rows'])} rows sampled"
    facts = [["Length", f"half up to {median} tokens, 95 % up to {p95}, longest {longest}; {source}"]]
    if lengths["over"] is not None:
        facts.append(["Too long", _over(lengths)])
    what = "Trained tokens" if report.get("documents") else "Answer tokens"
    facts.append([what, f"{percent(report['label_share'])} of all tokens are trained"])
    return facts


def _over(lengths: dict[str, Any]) -> str:
    limit = f"{count(lengths['max_length'])} tokens"
    low, high = lengths["over_rows"]
    if lengths["exact"]:
        return f"{count(lengths['over'])} over {limit}" if lengths["over"] else f"none over {limit}"
    if not lengths["over"]:
        return f"none seen over {limit}; at most {count(high)} of {count(lengths['rows'])} rows (95 % sure)"
    share = percent(lengths["over"], lengths["sampled"])
    return f"{share} are over {limit}: {count(low)} to {count(high)} of {count(lengths['rows'])} rows (95 % sure)"


def _bars(report: dict[str, Any]) -> dict[str, Any] | None:
    """Row counts by length in tokens: bin edges, counts, and where the maximum length is."""
    lengths = report.get("lengths")
    if not lengths:
        return None
    return {**lengths["histogram"], "limit": lengths["max_length"]}


def _documents(report: dict[str, Any]) -> str:
    documents = f"{count(report['documents'])} document{'s' if report['documents'] != 1 else ''}, every token trained"
    if not report.get("pieces"):
        return documents
    limit = report["lengths"]["max_length"]
    return f"{documents}, in about {count(report['pieces'])} rows of at most {count(limit)} tokens; none is cut"


def _lines(report: dict[str, Any], code: str) -> tuple[list[str], list[str]]:
    """The sentences of one kind of problem, and a piece of each row."""
    found = [problem for problem in report["problems"] if problem["code"] == code]
    return [problem["message"] for problem in found], [problem["excerpt"] for problem in found]


def _group(status: str, title: str, fix: str, lines: list[str], excerpts: list[str], number: int) -> dict[str, Any]:
    shown = lines[:LINES_SHOWN]
    more = max(number - len(shown), 0)
    return {
        "status": status, "title": title, "fix": fix, "lines": shown, "excerpts": excerpts[:LINES_SHOWN], "more": more,
    }  # fmt: skip


def _finding(status: str, found: dict[str, Any]) -> dict[str, Any]:
    text = f"{found['file']}: {found['message']}" if found["file"] else found["message"]
    return _group(status, text[:1].upper() + text[1:] if not found["file"] else text, found["fix"], [], [], 0)


def _model_facts(report: dict[str, Any]) -> list[list[str]]:
    facts = report["facts"]
    pairs = [["Kind", KINDS.get(report["kind"], report["kind"])]]
    names = facts.get("architectures") or []
    if names:
        pairs.append(["Architecture", ", ".join(names)])
    if facts.get("lora_rank"):
        base = facts.get("base_model") or "not named"
        pairs.append(["LoRA", f"rank {count(facts['lora_rank'])}, made for {base}"])
    if facts.get("parameters"):
        types = ", ".join(facts.get("dtypes") or [])
        pairs.append(["Parameters", f"{count(facts['parameters'])} ({types})" if types else count(facts["parameters"])])
    if facts.get("size_bytes"):
        files = facts.get("shards") or 1
        pairs.append(["Weights", f"{disk(facts['size_bytes'])} in {count(files)} {'file' if files == 1 else 'files'}"])
    if facts.get("shapes") in SHAPES:
        why = facts.get("shapes_why")
        pairs.append(["Names and shapes", SHAPES[facts["shapes"]] + (f": {why.rstrip('.')}" if why else "")])
    if facts.get("layers") and facts.get("hidden_size"):
        pairs.append(["Size", f"{count(facts['layers'])} layers, {count(facts['hidden_size'])} wide"])
    for name, key in (("Longest row", "max_positions"), ("Vocabulary", "tokens")):
        if facts.get(key):
            pairs.append([name, f"{count(facts[key])} tokens"])
    if "has_chat_template" in facts:
        pairs.append(
            ["Chat template", "yes" if facts["has_chat_template"] else "none: for conversations choose plain ChatML"]
        )
    if facts.get("eos_token"):
        pairs.append(["End of an answer", str(facts["eos_token"])])
    return pairs
