"""The Train page's state as one JSON answer: what the script puts in place, made from form, facts and gate.

Called by `ui/routes_train.py` on a worker thread, once every few seconds for each open page.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import profiles
from trainer.config import Config, as_text, backups, fields, get
from trainer.launch import auto_name
from ui.derived import derived_line
from ui.drafts import Draft
from ui.facts import gather, plan_for
from ui.form import OPEN_GROUPS, PICKED, choice_labels, elem_id, picker_choices
from ui.form_state import FormState, base_path, changed_titles, form_state, problem_list, saved_names
from ui.gate import blocking, gate_lines
from ui.gate_facts import Facts, GateLine
from ui.guard import Caller
from ui.pages import train_html
from ui.site import Site
from ui.suggest import suggest
from ui.train_try import try_state

_KEYS = {elem_id(info.key): info.key for info in fields()}
_PICKED = [info.key for info in fields() if info.key in PICKED or info.kind == "choice"]


@dataclass(frozen=True)
class _Now:
    """Everything one answer is made of."""

    draft: Draft
    form: FormState
    facts: Facts
    lines: list[GateLine]


def _now(site: Site, caller: Caller) -> _Now:
    draft = site.drafts.read(caller.session)
    form = form_state(site.workspace, site.config_path, draft)
    facts = gather(site, form, draft)
    return _Now(draft, form, facts, gate_lines(form.config, problem_list(form), facts))


def state_of(site: Site, caller: Caller) -> dict[str, Any]:
    """The whole state for the page's script; see `show` in assets/train.js."""
    now = _now(site, caller)
    draft, form = now.draft, now.form
    smoke_running = now.facts.smoke is not None and now.facts.smoke.state == "running"
    stops = blocking(now.lines)
    trying = try_state(site, caller)
    pending = (
        smoke_running
        or bool(trying and trying["running"])
        or any(line.status == "not-run" and line.code in ("model", "data") for line in now.lines)
    )
    return {
        "form_revision": draft.revision,
        "keys": _KEYS,
        "choices": _choices(site),
        "texts": {key: form.texts[key] for key in _PICKED},
        "base": draft.base,
        "configs": _configs(site),
        "base_problem": form.problems.get("", ""),
        "changes": len(form.changes),
        "undone": bool(draft.undone),
        "diff_html": train_html.changes_html(form.changes, draft.automatic, form.retired, len(draft.undone)),
        "backups_html": _backups(site, draft),
        "problems": {key: _sentence(text) for key, text in form.problems.items() if key},
        "notes": _notes(now),
        "summaries": _summaries(form),
        "head_html": train_html.head_html(now.lines),
        "lines_html": train_html.lines_html(now.lines),
        "fit_html": train_html.fit_html(now.facts.memory),
        "plan_html": train_html.plan_html(_plan_line(now)),
        "can_start": not stops and not smoke_running,
        "start_label": "Start anyway" if not stops and _has_problem(now.lines) else "Start training",
        "can_smoke": smoke_running or not stops,
        "smoke_label": "Stop the smoke test" if smoke_running else "Smoke test",
        "smoke_running": smoke_running,
        "name": draft.name,
        "auto_name": auto_name(form.config) if form.config is not None else "",
        "why": draft.why,
        "view_mark": _view_mark(form.config),
        "empty": _is_empty(site, form),
        "try_it": trying,
        "pending": pending,
    }


def suggestions_of(site: Site, caller: Caller) -> dict[str, Any]:
    """The suggested settings as markup."""
    now = _now(site, caller)
    if now.form.config is None:
        return {"html": train_html.suggestions_html([])}
    chosen = now.draft.values.keys() - now.draft.automatic.keys()
    return {"html": train_html.suggestions_html(suggest(now.form.config, chosen, now.facts))}


def _configs(site: Site) -> list[tuple[str, str]]:
    return [("", f"{site.config_path.name} (starting values)"), *((name, name) for name in saved_names(site.workspace))]


def _choices(site: Site) -> dict[str, list[tuple[str, str]]]:
    """What each dropdown offers, as (what is read, value): the script turns the one into the other."""
    fixed = {info.key: choice_labels(info) for info in fields() if info.kind == "choice"}
    return fixed | picker_choices(site.workspace, profiles.names(site.workspace.profiles))


def _backups(site: Site, draft: Draft) -> str:
    if not draft.base:
        return ""
    path = base_path(site.workspace, site.config_path, draft.base)
    kept = [(backup, _made_at(backup)) for backup in backups(path)]
    return train_html.backups_html(draft.base, kept, time.time())


def _made_at(backup: Path) -> float:
    stamp = backup.name.removesuffix(".json").rpartition(".")[2]
    return datetime.strptime(stamp, "%Y%m%d-%H%M%S-%f").timestamp()


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _notes(now: _Now) -> dict[str, str]:
    """What stands under a field in place of its help, where there is something to say about its value."""
    notes = dict(now.draft.automatic)
    for code, key in (("model", "model_path"), ("data", "data.dataset_path")):
        passed = next((line for line in now.lines if line.code == code and line.status == "pass"), None)
        if passed is not None:
            notes[key] = f"✓ {passed.text.partition(': ')[2]}"
    return notes


def _summaries(form: FormState) -> dict[str, str]:
    """What a closed group says beside its name: the values of its basic settings, or the number of changes."""
    if form.config is None:
        return {}
    said: dict[str, list[str]] = {}
    for info in fields():
        if info.group not in OPEN_GROUPS and (info.basic or any(c.field == info.key for c in form.changes)):
            text = as_text(info, get(form.config, info.key))
            value = {"true": "on", "false": "off"}.get(text, text)
            said.setdefault(info.group, []).append(f"{info.name} {value}" if "\n" not in value else info.name)
    return {group: ", ".join(parts) for group, parts in said.items()}


def _plan_line(now: _Now) -> str:
    config = now.form.config
    if config is None:
        return ""
    smoke = now.facts.smoke
    speed = None
    if smoke is not None and smoke.state == "done" and not changed_titles(smoke.judged, config):
        speed = smoke.seconds_a_step
    return derived_line(config, plan_for(config, now.facts.data), speed)


def _has_problem(lines: list[GateLine]) -> bool:
    return any(line.status == "problem" for line in lines)


def _view_mark(config: Config | None) -> str:
    """Changes when the row view would look different."""
    if config is None:
        return "none"
    parts = [config.model_path, [f.path for f in config.data.files[:1]], config.profile.model_dump()]
    parts += [config.hyperparams.max_length, config.data.too_long, config.data.chat_template, config.data.columns]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def _is_empty(site: Site, form: FormState) -> bool:
    """Nothing chosen and nothing to choose from: the first screen is shown instead of the form."""
    config = form.config
    chosen = config is not None and (config.model_path or config.data.files)
    return not chosen and not form.changes and not site.workspace.models() and not site.workspace.datasets()
