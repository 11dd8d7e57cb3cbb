"""The facts behind the gate: model, data, memory, disk, device, smoke test and the last good run, as they are now.

Reports of the worker are turned into the records of `ui/gate_facts.py`; the slow ones are jobs, so nothing here
waits. Called by `ui/train_state.py` and `ui/train_do.py`.
"""

from __future__ import annotations

import datetime
import os
import shutil
from collections import Counter
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import profiles
from trainer import disk_need
from trainer.config import Change, Config, diff, field, resolve
from trainer.data.mapping import saved_columns
from trainer.data.problems import PROBLEM_NAMES
from trainer.disk_forecast import one_checkpoint
from trainer.files import child, read_json
from trainer.jobs import JobHandle
from trainer.packages import has_bitsandbytes
from trainer.refusal import Refusal
from trainer.run import RunDir, status
from ui import numbers
from ui.checks import Check, Question, check, stamp
from ui.derived import Plan, plan_of
from ui.drafts import Draft
from ui.fit import memory_fact
from ui.form_state import FormState, judged_values
from ui.gate_facts import DataFact, DiskFact, Facts, ModelFact, SmokeFact
from ui.judged_keys import DATA_KEYS
from ui.site import Site

CHECK_LIMIT_S = 3600.0
RUNS_LOOKED_AT = 30


def gather(site: Site, state: FormState, draft: Draft) -> Facts:
    """All facts for the form as it is; starts the checks that nobody has made yet."""
    config = state.config
    here = site.engine.machine()
    holder = site.engine.holder()
    names = tuple(profiles.names(site.workspace.profiles))
    known: dict[str, Any] = {
        "device_name": here.summary,
        "on_gpu": here.gpu is not None,
        "gpus": 0 if here.gpu is None else len(here.gpus),
        "bitsandbytes": has_bitsandbytes(),
        "advice": here.advice,
    }
    known["profiles"] = names
    smoke = smoke_fact(site, draft.smoke_id)
    if holder is not None and not (holder.kind == "smoke" and smoke is not None and holder.run_id == draft.smoke_id):
        known |= {"busy": holder.sentence, "busy_run": holder.run_id if holder.kind == "train" else ""}
    if config is None:
        return Facts(**known, smoke=smoke)
    report = model_report(site, config)
    data = data_fact(site, config)
    plan = plan_for(config, data)
    known_model = report.result if report and report.state == "done" else None
    memory = memory_fact(config, known_model, data, here, site.workspace.root, plan.steps)
    last_good, changes = last_good_run(site, config)
    return Facts(
        **known, model=_model_fact(config, report), data=data, memory=memory, smoke=smoke, steps=plan.steps,
        disk=disk_fact(site, config, report, plan), last_good=last_good, last_changes=changes,
    )  # fmt: skip


def plan_for(config: Config, data: DataFact | None) -> Plan:
    """Steps and rows of a run, as far as the data is known."""
    ready = data is not None and data.state == "ready" and not data.refusal
    usable = data.trained_rows if data is not None and ready else None
    tokens = data.tokens if data is not None and ready else None
    return plan_of(config, usable, tokens, bool(config.data.validation_dataset_path))


def model_report(site: Site, config: Config) -> Check | None:
    """The inspector's report on the chosen model; None where no folder is chosen."""
    path = Path(config.model_path)
    if not config.model_path or not path.is_dir():
        return None

    def work(handle: JobHandle) -> Any:
        return site.worker.call("check_model", timeout_s=CHECK_LIMIT_S, cancelled=handle.cancelled, path=str(path))

    about = {"path": str(path), "stamp": stamp(path)}
    return check(site, Question("gate-model", str(path), about, {}), work)


def _model_fact(config: Config, report: Check | None) -> ModelFact | None:
    if not config.model_path:
        return None
    name = Path(config.model_path).name
    if report is None:
        return ModelFact(
            "ready", name, problems=((f"There is no folder {config.model_path}.", "Choose another model."),)
        )
    if report.state == "running":
        return ModelFact("checking", name)
    if report.state == "failed":
        return ModelFact("ready", name, fault=report.error)
    found = report.result
    problems = tuple((_told(entry), entry["fix"]) for entry in found["problems"])
    warnings = tuple(f"{_told(entry)} {entry['fix']}" for entry in found["warnings"])
    facts = found["facts"]
    clash = _quantised_against_method(facts.get("quantised"), config.hyperparams.method)
    if clash:
        problems += ((clash, "Choose LoRA, or download the original weights."),)
    adapter = found["kind"] == "lora"
    summary = _summary(name, facts, adapter)
    return ModelFact(
        "ready",
        name,
        bool(found["valid"]) and not clash,
        summary,
        problems,
        warnings,
        adapter,
        max_positions=facts.get("max_positions"),
    )


def _quantised_against_method(quantised: str | None, method: str) -> str:
    """Why weights quantised that way cannot be trained by that method; "" where they can."""
    if quantised is None or method == "lora":
        return ""
    if method == "full":
        return f"The weights are quantised ({quantised}), and numbers of a few bits cannot be trained in full."
    if quantised != "bitsandbytes":
        return f"QLoRA quantises the weights itself, and these are quantised already ({quantised})."
    return ""


def _told(entry: dict[str, Any]) -> str:
    """A finding as a sentence that names its file."""
    message = entry["message"]
    told = f"{entry['file']}: {message}" if entry["file"] and entry["file"] not in message else message
    return f"{told[:1].upper()}{told[1:]}."


def _summary(name: str, facts: dict[str, Any], adapter: bool) -> str:
    """ "tiny, qwen3, 98,688 weights, 397 kB" from what is known."""
    parts = [name, "LoRA adapter" if adapter else str(facts.get("model_type") or "")]
    if facts.get("parameters"):
        parts.append(f"{numbers.count(facts['parameters'])} weights")
    if facts.get("size_bytes"):
        parts.append(numbers.disk(facts["size_bytes"]))
    return ", ".join(part for part in parts if part)


def data_fact(site: Site, config: Config) -> DataFact | None:
    """What the doctor says of all chosen files together; None where none is chosen."""
    files = [Path(file.path) for file in config.data.files]
    if not files:
        return None
    for path in files:
        if not path.is_file():
            return DataFact("ready", refusal=f"The data file {path} does not exist.")
    request = {
        "model_path": config.model_path if Path(config.model_path).is_dir() and config.model_path else None,
        "profile": config.profile.name,
        "profiles_root": str(site.workspace.profiles),
        "system_prompt": config.profile.system_prompt,
        "chat_template": config.data.chat_template,
        "date": datetime.date.today().isoformat(),
        "max_length": config.hyperparams.max_length,
        "columns": list(config.data.columns),
        "held_out": config.data.validation_dataset_path
        if Path(config.data.validation_dataset_path).is_file()
        else None,
        "caches": str(site.workspace.tokens),
    }
    about = request | {"files": [[str(path), stamp(path)] for path in files]}
    about |= {"saved_columns": [saved_columns(path) for path in files]}
    about |= {"held_out_stamp": stamp(Path(request["held_out"])) if request["held_out"] else None}
    about["model_stamp"] = stamp(Path(config.model_path)) if request["model_path"] else None

    def work(handle: JobHandle) -> list[dict[str, Any]]:
        reports = []
        for number, path in enumerate(files):
            handle.progress(number, len(files))
            reports.append(
                site.worker.call(
                    "check_data", timeout_s=CHECK_LIMIT_S, cancelled=handle.cancelled, path=str(path), **request
                )
            )
        return reports

    subject = "\n".join(str(path) for path in files)
    found = check(site, Question("gate-data", subject, about, judged_values(config, DATA_KEYS)), work)
    if found.state == "running" and found.last is not None:
        return replace(_together(found.last.result, found.last.judged), state="checking", done=found.progress)
    if found.state == "running":
        return DataFact("checking", done=found.progress)
    if found.state == "failed":
        if found.is_fault:
            return DataFact("ready", fault=found.error)
        return DataFact("ready", refusal=found.error, refusal_field=found.error_field)
    return _together(found.result, found.judged)


def _together(reports: list[dict[str, Any]], judged: dict[str, Any]) -> DataFact:
    """One fact from the reports of several files; lengths are of a sample, scaled to all rows."""
    counts: Counter[str] = Counter()
    for report in reports:
        counts.update(report["counts"])
    first = next((report["problems"][0]["message"] for report in reports if report["problems"]), "")
    measured = [(report, report["lengths"]) for report in reports if report.get("lengths")]
    usable = sum(report["usable"] for report in reports)
    tokens = sum(_rows_of(report) * lengths["mean"] for report, lengths in measured)
    labels = sum(_rows_of(report) * lengths["mean"] * report["label_share"] for report, lengths in measured)
    over = sum(_rows_of(report) * (lengths["over"] or 0) / lengths["sampled"] for report, lengths in measured)
    unrendered = any(w["code"] == "template" for report in reports for w in report["warnings"]) and not measured
    return DataFact(
        "ready",
        rows=sum(report["rows"] for report in reports),
        usable=usable,
        kinds=tuple((PROBLEM_NAMES[code], number) for code, number in counts.most_common()),
        first_problem=first,
        labels=round(labels) if measured else 0 if unrendered else None,
        label_share=labels / tokens if tokens else None,
        too_long=round(over) or (1 if over else 0) if measured else None,
        longest=max((lengths["longest"] for _, lengths in measured), default=None),
        p99=max((lengths["p99"] for _, lengths in measured), default=None),
        tokens=round(tokens) if measured else None,
        sampled=any(not lengths["exact"] for _, lengths in measured),
        trained_rows=sum(_rows_of(report) for report in reports),
        notes=tuple(
            warning["message"]
            for report in reports
            for warning in report["warnings"]
            if warning["code"] != "duplicates"
        ),
        judged=judged,
        lengths=tuple(each for report, lengths in measured for each in _bins(report, lengths)),
    )


def _bins(report: dict[str, Any], lengths: dict[str, Any]) -> list[tuple[float, float, float]]:
    """(from, to, rows) of the doctor's histogram, scaled from its sample to all rows of the file."""
    edges, counts = lengths["histogram"]["edges"], lengths["histogram"]["counts"]
    scale = _rows_of(report) / max(1, lengths["sampled"])
    return [(low, high, count * scale) for low, high, count in zip(edges, edges[1:], counts, strict=False) if count]


def _rows_of(report: dict[str, Any]) -> int:
    """Rows of training in a report: its conversations, and the pieces of its texts where they are known."""
    documents = report.get("documents", 0)
    return report["usable"] - documents + (report.get("pieces") or documents)


def smoke_fact(site: Site, smoke_id: str) -> SmokeFact | None:
    """The report of a smoke test; None where there is none (yet)."""
    if not smoke_id:
        return None
    try:
        report = read_json(child(site.workspace.smoke, smoke_id) / "report.json")
    except (OSError, ValueError):  # not begun yet; Refusal is a ValueError
        return SmokeFact("running") if _holds_smoke(site, smoke_id) else None
    state = report["state"]
    if state == "running" and not _holds_smoke(site, smoke_id):
        state = "interrupted"
    words = {"pass": "pass", "problem": "problem", "not_possible": "not-possible"}
    return SmokeFact(
        state,
        tuple((words[line["status"]], line["text"]) for line in report["lines"]),
        report["passed"],
        report["failed"],
        report["not_possible"],
        report["seconds"],
        _number(report.get("peak_gib")),
        _number(report.get("seconds_a_step")),
        str(report.get("doing") or ""),
        report["judged"],
    )


def _holds_smoke(site: Site, smoke_id: str) -> bool:
    holder = site.engine.holder()
    return holder is not None and holder.kind == "smoke" and holder.run_id == smoke_id


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def disk_fact(site: Site, config: Config, report: Check | None, plan: Plan) -> DiskFact | None:
    """Room for the run's checkpoints; None while the model's size is not known."""
    root = site.workspace.runs
    free = float(shutil.disk_usage(root).free)
    writable = os.access(root, os.W_OK | os.X_OK)
    one = checkpoint_bytes(config, report.result if report and report.state == "done" else None)
    if one is None:
        return None if writable else DiskFact(0, 0, free, writable)
    kept = disk_need.checkpoints_at_once(config, plan.steps)
    refused = ""
    if one * kept > free and writable:  # what Start would say; it reads every header, so only where it may matter
        try:
            disk_need.refuse_a_full_disk(config, root)
        except Refusal as refusal:
            refused = refusal.message
    return DiskFact(one, one * kept, free, writable, refused)


def checkpoint_bytes(config: Config, report: dict[str, Any] | None) -> float | None:
    """Bytes of one checkpoint, all its files; None where the model's headers do not tell, or are still being checked."""
    if report is None:
        return None
    try:
        found = one_checkpoint(config, repr(stamp(Path(config.model_path))))
    except OSError:  # the folder is being taken away
        return None
    return float(found[1]) if found else None


def last_good_run(site: Site, config: Config) -> tuple[str, tuple[Change, ...]]:
    """Name of the newest finished run of this workspace and what has changed since; ("", ()) where there is none."""
    for run in site.workspace.list_runs()[:RUNS_LOOKED_AT]:
        found = _if_finished(run, tuple(stamp(run.events)), tuple(stamp(run.notes)))
        if found is not None:
            return found[0], tuple(change for change in diff(found[1], config) if not field(change.field).secret)
    return "", ()


@lru_cache(maxsize=256)
def _if_finished(run: RunDir, events: tuple[int, ...], notes: tuple[int, ...]) -> tuple[str, Config] | None:
    """Name and settings of a run that has finished, else None; read again only when its files have changed."""
    try:
        now = status(run)
        return (now.name or run.run_id, resolve(run.snapshot()["config"])) if now.state == "finished" else None
    except (Refusal, KeyError, ValueError, OSError):
        return None  # a run of an older version, or one that somebody is deleting
