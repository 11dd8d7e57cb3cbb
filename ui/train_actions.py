"""What buttons of the Train page do to a draft: undo, revert, pick another config, take over suggested values.

Pure but for looking at saved configs. Called by the handlers of `ui/pages/train.py`; what comes from the browser is
checked here before it touches a draft.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trainer.config import as_text, parse_value
from trainer.config import field as setting
from trainer.fields import PATH_FIELDS, masked
from trainer.files import NAME
from trainer.refusal import Refusal
from ui.drafts import Draft
from ui.form_state import form_state, found_path, saved_names
from ui.guard import Caller
from ui.site import Site

# learning rates that each method usually wants; a change of method brings its own unless the user chose one
METHOD_RATES = {"full": 1e-5, "lora": 2e-4, "qlora": 2e-4}
RATE = "hyperparams.learning_rate"
METHOD = "hyperparams.method"


@dataclass(frozen=True)
class Act:
    """One act: `kind` is a key of ACTS, or "refresh", which changes nothing and shows the draft again."""

    kind: str
    key: str = ""
    name: str = ""
    values: dict[str, str] = field(default_factory=dict)


def act_of(data: Any) -> Act:
    """An act from what the page's script sent; Refusal for anything that is none."""
    if not isinstance(data, dict) or data.get("act") not in (*ACTS, "refresh"):
        raise Refusal("The page sent something that is not understood. Reload it.")
    raw = data.get("values") or {}
    values = {setting(str(key)).key: str(text) for key, text in raw.items()} if isinstance(raw, dict) else {}
    return Act(str(data["act"]), str(data.get("key") or ""), str(data.get("name") or ""), values)


def check_rights(site: Site, caller: Caller, values: dict[str, str]) -> None:
    """Refuse secrets, and paths outside the workspace and its roots, to everybody but the owner."""
    if not caller.may("webhook") and any(setting(key).secret for key in values):
        raise Refusal("Only the owner may set the webhook. Nothing was changed.", "notify.webhook_url")
    if caller.may("paths"):
        return
    for key, text in values.items():
        info = setting(key)
        if key in PATH_FIELDS:
            named = [str(found_path(site.workspace, key, text))] if text else []
        elif info.kind == "files":
            named = [entry["path"] for entry in parse_value(key, text)]
        else:
            continue
        if any(not site.workspace.knows(Path(name)) for name in named):
            raise Refusal(f"{info.title}: only the owner may name a path outside the workspace and its roots.", key)


def apply(site: Site, draft: Draft, act: Act) -> Draft:
    """The draft after an act."""
    return draft if act.kind == "refresh" else ACTS[act.kind](site, draft, act)


def changed_by_hand(site: Site, draft: Draft, key: str, text: str) -> Draft:
    """The draft after a person changed a field; a text equal to the base's is no change, a secret's mask neither."""
    base = form_state(site.workspace, site.config_path, replace(draft, values={}))
    if setting(key).secret and key in draft.values and text == masked(draft.values[key]):
        return draft
    changed = draft.without(key) if base.texts[key] == text else draft.with_value(key, text)
    return _with_rate(base.texts, changed) if key == METHOD else changed


def _with_rate(base: dict[str, str], draft: Draft) -> Draft:
    """Bring the learning rate of a newly chosen method, where the user has not set one."""
    if RATE in draft.values and RATE not in draft.automatic:
        return draft
    method, before = draft.values.get(METHOD, base[METHOD]), base[METHOD]
    wanted = METHOD_RATES.get(method)
    if wanted is None or METHOD_RATES.get(before) == wanted:
        return draft.without(RATE)
    text = as_text(setting(RATE), wanted)
    if base[RATE] != as_text(setting(RATE), METHOD_RATES.get(before, 0.0)):
        return draft  # the config itself chose another rate than the method's usual one
    word = {"full": "full training", "lora": "LoRA", "qlora": "QLoRA"}[method]
    return draft.with_value(RATE, text, f"Set to {text} with the method: {word} usually wants that.")


def _set(site: Site, draft: Draft, act: Act) -> Draft:
    for key, text in act.values.items():
        draft = changed_by_hand(site, draft, key, text)
    return draft


def _undo(site: Site, draft: Draft, act: Act) -> Draft:
    base = form_state(site.workspace, site.config_path, replace(draft, values={}))
    undone = draft.without(act.key)
    return _with_rate(base.texts, undone) if act.key == METHOD else undone


def _revert(site: Site, draft: Draft, act: Act) -> Draft:
    return draft.reverted()


def _restore(site: Site, draft: Draft, act: Act) -> Draft:
    return draft.restored()


def _pick(site: Site, draft: Draft, act: Act) -> Draft:
    if act.name and (not NAME.fullmatch(act.name) or act.name not in saved_names(site.workspace)):
        raise Refusal(f"There is no saved config '{act.name[:80]}'.")
    return replace(draft.reverted(), base=act.name)


ACTS: dict[str, Callable[[Site, Draft, Act], Draft]] = {
    "set": _set,
    "undo": _undo,
    "revert": _revert,
    "restore": _restore,
    "pick": _pick,
}
