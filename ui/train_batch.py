"""The first batch of the form's settings on the Train page: a job finds it, and it grows old when a setting changes.

What is shown was read from the collated tensors (`trainer.loop.first_batch`), not rendered again. Called by
`ui/routes_train.py`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from trainer.config import Config
from trainer.jobs import JobHandle
from trainer.refusal import Refusal
from ui.checks import stamp
from ui.form_state import changed_titles, form_state, judged_values, problem_list
from ui.guard import Caller
from ui.site import Site

KIND = "first-batch"
DOCUMENTS_SHOWN = 64
TOKENS_SHOWN = 4000
# what decides which rows stand in the first batch, and how they are made
KEYS = [
    "model_path", "profile.name", "profile.system_prompt", "data.dataset_path", "data.dataset_paths",
    "data.validation_dataset_path", "data.validation_split", "data.validation_max_rows", "data.too_long", "data.seed",
    "data.chat_template", "data.columns",
    "hyperparams.batch_size", "hyperparams.gradient_accumulation", "hyperparams.num_epochs", "hyperparams.max_steps",
    "hyperparams.max_length", "hyperparams.packing", "eval.eval_strategy",
]  # fmt: skip


def find_batch(site: Site, caller: Caller) -> dict[str, Any]:
    """Start the search for the first batch of the form's settings; one that this form started before is left."""
    draft = site.drafts.read(caller.session)
    state = form_state(site.workspace, site.config_path, draft)
    config = state.config
    if config is None or state.problems:
        first = problem_list(state)
        raise Refusal(f"Mend the settings to see the first batch{f': {first[0].message}' if first else '.'}")
    if draft.batch_id and _job(site, draft.batch_id) is not None:
        site.jobs.cancel(draft.batch_id)
    about = {"judged": judged_values(config, KEYS), "files": _files(config)}

    def work(handle: JobHandle) -> dict[str, Any]:
        handle.progress(0, 1, "Making the tokens.")
        return about | {"batch": _compact(site.engine.first_batch(config, handle.cancelled))}

    job = site.jobs.start(KIND, work)
    site.drafts.change(caller.session, lambda draft: replace(draft, batch_id=job))
    return {"state": "running"}


def batch_of(site: Site, caller: Caller) -> dict[str, Any]:
    """How the search stands: "state" none, running, done or failed; when done the batch, and what has changed since."""
    draft = site.drafts.read(caller.session)
    job = _job(site, draft.batch_id) if draft.batch_id else None
    if job is None or job["state"] == "cancelled":
        return {"state": "none"}
    if job["state"] == "running":
        return {"state": "running", "text": job["text"]}
    if job["state"] != "done":
        return {"state": "failed", "text": job["error"]}
    found = job["result"]
    config = form_state(site.workspace, site.config_path, draft).config
    changed = changed_titles(found["judged"], config) if config is not None else []
    if config is not None and not changed and _files(config) != found["files"]:
        changed = ["a file"]
    return {"state": "done", "changed": changed, "batch": found["batch"]}


def _job(site: Site, job_id: str) -> dict[str, Any] | None:
    try:
        return site.jobs.read(job_id)
    except Refusal:  # somebody cleared the jobs away
        return None


def _files(config: Config) -> list[Any]:
    """What changes when one of the files behind the batch does."""
    return [stamp(Path(path)) for path in [config.model_path, *(file.path for file in config.data.files)] if path]


def _compact(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch as the page draws it: tokens as [text, kind, position, id], and no more than a page can hold."""
    shown = []
    for document in batch["documents"][:DOCUMENTS_SHOWN]:
        tokens = [
            [token["text"], _kind(token), token["position"], token["id"]] for token in document["pieces"][:TOKENS_SHOWN]
        ]
        facts = {name: value for name, value in document.items() if name != "pieces"}
        shown.append(facts | {"shown": tokens})
    return {
        "summary": batch["summary"],
        "max_length": batch["max_length"],
        "documents": shown,
        "more": len(batch["documents"]) - len(shown),
    }


def _kind(token: dict[str, Any]) -> str:
    return "label" if token["trained"] else "special" if token["special"] else "context"
