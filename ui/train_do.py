"""What the Train page's buttons do: start, smoke test, save, put back, try it now. Each answers at once or refuses.

Called by `ui/routes_train.py` on a worker thread; the engine and the jobs do the long part.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from trainer import config as configs
from trainer.config import Config
from trainer.files import child
from trainer.refusal import Refusal
from ui.drafts import Draft
from ui.facts import gather
from ui.form_state import FormState, form_state, problem_list, saved_names
from ui.gate import blocking, gate_lines
from ui.guard import Caller
from ui.site import Site
from ui.train_actions import act_of, apply, check_rights

_NAME_CHARACTERS = 120
_WHY_CHARACTERS = 400


def typed(site: Site, caller: Caller, body: dict[str, Any]) -> dict[str, Any]:
    """Take texts typed or picked in fields into the draft, usable or not.

    "others" in the answer says that this put values into other fields too.
    """
    values = body.get("values")
    if not isinstance(values, dict):
        raise Refusal("The page sent something that is not understood. Reload it.")
    act = act_of({"act": "set", "values": values})
    check_rights(site, caller, act.values)
    before = site.drafts.read(caller.session).automatic
    after = site.drafts.change(caller.session, lambda draft: apply(site, draft, act)).automatic
    return {"others": any(key not in act.values for key in before.keys() ^ after.keys())}


def note(site: Site, caller: Caller, body: dict[str, Any]) -> dict[str, Any]:
    """Keep the name and the purpose of the next run in the draft."""
    name, why = str(body.get("name", ""))[:_NAME_CHARACTERS], str(body.get("why", ""))[:_WHY_CHARACTERS]
    site.drafts.change(caller.session, lambda draft: replace(draft, name=name, why=why))
    return {}


def start(site: Site, caller: Caller) -> dict[str, Any]:
    """Start a run from the form; the answer names the page to go to. Refusal where the gate has a blocking line."""
    draft, _, config = _ready(site, caller)
    run_id = site.engine.start_run(config, owner=caller.role, name=draft.name, why=draft.why)
    # a name and a purpose belong to one run; the settings stay for the next
    site.drafts.change(caller.session, lambda draft: replace(draft, name="", why=""))
    return {"go": f"live?run={run_id}", "run_id": run_id}


def enqueue(site: Site, caller: Caller) -> dict[str, Any]:
    """Put a run of the form's settings at the end of the queue. Refusal where the gate has a line that would block it then."""
    draft, _, config = _ready(site, caller, waits=True)
    run_id = site.engine.enqueue_new(config, owner=caller.role, name=draft.name, why=draft.why)
    site.drafts.change(caller.session, lambda draft: replace(draft, name="", why=""))
    place = len(site.workspace.queue.read().entries)
    return {"said": f"In the queue, place {place}. It starts by itself.", "run_id": run_id}


def smoke(site: Site, caller: Caller) -> dict[str, Any]:
    """Start a smoke test of the form's settings; its report shows up in the gate."""
    _, _, config = _ready(site, caller)
    smoke_id = site.engine.start_smoke(config, owner=caller.role)
    site.drafts.change(caller.session, lambda draft: replace(draft, smoke_id=smoke_id))
    return {"smoke_id": smoke_id}


def smoke_stop(site: Site) -> dict[str, Any]:
    """End the smoke test in progress at its next check."""
    holder = site.engine.holder()
    if holder is None or holder.kind != "smoke":
        raise Refusal("No smoke test is running.")
    site.engine.stop_smoke()
    return {"said": "Stopping the smoke test at its next check."}


def _ready(site: Site, caller: Caller, waits: bool = False) -> tuple[Draft, FormState, Config]:
    """The form when nothing blocks; the same lines as on the page decide, so that page and server never differ.

    What `waits` is not blocked by the run that has the device now.
    """
    draft = site.drafts.read(caller.session)
    state = form_state(site.workspace, site.config_path, draft)
    lines = gate_lines(state.config, problem_list(state), gather(site, state, draft))
    stops = [line for line in blocking(lines) if not (waits and line.code == "busy")]
    if stops or state.config is None:
        text = stops[0].text if stops else "the settings cannot go together."
        key = stops[0].fields[0] if stops and stops[0].fields else None
        raise Refusal(f"Cannot start yet: {text[:1].lower() + text[1:]}", key)
    return draft, state, state.config


def save(site: Site, caller: Caller, body: dict[str, Any]) -> dict[str, Any]:
    """Save the form's settings under a name; an existing config of that name is backed up first."""
    name = str(body.get("name", "")).strip().removesuffix(".json")
    if not name:
        raise Refusal("A name is needed.")
    path = child(site.workspace.configs, f"{name}.json")
    draft = site.drafts.read(caller.session)
    state = form_state(site.workspace, site.config_path, draft)
    if state.problems:
        first = problem_list(state)[0]
        raise Refusal(f"Cannot save yet: {first.message}", first.field or None)
    existed = path.exists()
    configs.save(path, state.sparse)
    site.drafts.change(caller.session, lambda d: replace(d, base=name, values={}, automatic={}, undone={}))
    return {"said": f"Saved as {name}.{' The version before is kept.' if existed else ''}"}


def restore(site: Site, caller: Caller, body: dict[str, Any]) -> dict[str, Any]:
    """Put an earlier version of a saved config back; what it replaces becomes a version of its own."""
    name = str(body.get("name", ""))
    if name not in saved_names(site.workspace):
        raise Refusal(f"There is no saved config '{name[:80]}'.")
    path = child(site.workspace.configs, f"{name}.json")
    wanted = str(body.get("backup", ""))
    found = next((backup for backup in configs.backups(path) if backup.name == wanted), None)
    if found is None:
        raise Refusal("That version is no longer there.")
    configs.restore(found, path)
    site.drafts.change(caller.session, lambda d: replace(d, revision=d.revision + 1))
    return {"said": f"{name} is again as it was. What it replaced is kept."}
