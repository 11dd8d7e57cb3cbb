"""One row of the chosen data as the model will see it: tokens by kind, text before and after the profile.

The worker reads the row, so that no foreign byte is parsed in the server. Called by `ui/routes_train.py`.
"""

from __future__ import annotations

import datetime
from typing import Any

import profiles
from trainer import launch
from trainer.config import Config
from trainer.refusal import Refusal
from ui.form_state import form_state
from ui.guard import Caller
from ui.numbers import percent
from ui.site import Site

TOKENS_SHOWN = 4000
PATIENCE_S = 30.0


def row_of(site: Site, caller: Caller, query: dict[str, Any]) -> dict[str, Any]:
    """Row `n` (from 1) of the main data file; a sentence under "said" where there is none to show."""
    state = form_state(site.workspace, site.config_path, site.drafts.read(caller.session))
    config = state.config
    number = str(query.get("n", "1"))
    row = max(1, int(number)) if number.isdecimal() and len(number) < 10 else 1
    if config is None:
        return _nothing("Mend the settings to see a row.")
    profile = profile_facts(site, config)
    if not config.data.files or not config.model_path:
        missing = "data" if config.model_path else "a model" if config.data.files else "a model and data"
        return _nothing(f"Choose {missing} to see what the model will see.", profile)
    try:
        view = site.worker.call("view_row", timeout_s=PATIENCE_S, row=row - 1, **row_request(site, config))
    except Refusal as refusal:
        return _nothing(refusal.message, profile)
    answer = {"row": row, "rows": view["rows"], "profile": profile, "said": "", "facts": _facts(view)}
    if view["problem"]:
        return answer | {"said": view["problem"]["message"], "tokens": [], "before": [], "after": []}
    tokens = [[token["text"], token["kind"]] for token in view["tokens"][:TOKENS_SHOWN]]
    return answer | {"tokens": tokens, "before": view["before"], "after": view["after"]}


def row_request(site: Site, config: Config) -> dict[str, Any]:
    """What the worker needs to show a row of this config's main file."""
    return {
        "path": config.data.files[0].path,
        "model_path": config.model_path,
        "profile": config.profile.name,
        "system_prompt": config.profile.system_prompt,
        "date": datetime.date.today().isoformat(),
        "max_length": config.hyperparams.max_length,
        "too_long": config.data.too_long,
        "chat_template": config.data.chat_template,
        "columns": list(config.data.columns),
        "profiles_root": str(site.workspace.profiles),
    }


def profile_facts(site: Site, config: Config) -> dict[str, str] | None:
    """Name, description and filled-in system prompt of the chosen profile; None where none is chosen or usable."""
    try:
        prompt = launch.prompt_of(config, site.workspace.profiles)
        if config.profile.name is None:
            if not prompt.text:
                return None
            text = "the rows as they are, with the config's system prompt where a row has none"
            return {"name": "No profile", "description": text, "system_prompt": prompt.text}
        description = profiles.load(config.profile.name, site.workspace.profiles).description
    except (Refusal, ValueError):
        return None  # the gate names what is wrong with it
    return {"name": config.profile.name, "description": description, "system_prompt": prompt.text}


def _nothing(said: str, profile: dict[str, str] | None = None) -> dict[str, Any]:
    return {"row": 1, "rows": None, "profile": profile, "said": said}


def _facts(view: dict[str, Any]) -> str:
    parts = [f"Line {view['line']:,}, {view['rows']:,} {'row' if view['rows'] == 1 else 'rows'} in the file"]
    counts = view["counts"]
    if counts:
        share = percent(counts["label"], counts["tokens"]) if counts["tokens"] else "0 %"
        parts.append(f"{counts['tokens']:,} tokens, {counts['label']:,} labels ({share})")
    parts += [view["note"]] if view["note"] else []
    return " · ".join(parts)
