"""Try it now: the starter model and data are made, taken into the form, and a run is started with them.

Called by `ui/routes_train.py`; the making is a job, so that the page shows how far it is and a closed tab loses
nothing.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from trainer.config import Config, as_text, get, merged, resolve, unflatten
from trainer.config import field as setting
from trainer.jobs import JobHandle
from trainer.refusal import Refusal
from ui.drafts import Draft
from ui.guard import Caller
from ui.site import Site

KIND = "try-it"
MAKE_LIMIT_S = 300.0
# small enough for a processor: a falling curve within a minute of the click
SETTINGS: dict[str, Any] = {
    "hyperparams.method": "full",
    "hyperparams.learning_rate": 4e-3,
    "hyperparams.batch_size": 16,
    "hyperparams.gradient_accumulation": 1,
    "hyperparams.max_length": 256,
    "hyperparams.max_steps": 200,
    "hyperparams.warmup_steps": 10,
    "hyperparams.use_gradient_checkpointing": False,
    "output.save_steps": 100,
    "eval.eval_steps": 50,
    "eval.sample_steps": 100,
}


def try_it(site: Site, caller: Caller) -> dict[str, Any]:
    """Start the job, unless it runs already; `try_state` shows how far it is."""
    holder = site.engine.holder()
    if holder is not None:
        raise Refusal(holder.sentence)
    if any(job["state"] == "running" for job in site.jobs.recent(KIND)[:1]):
        return {}

    def work(handle: JobHandle) -> dict[str, Any]:
        handle.progress(0, 3, "Making a small model and sample data.")
        made = site.worker.call(
            "starter",
            timeout_s=MAKE_LIMIT_S,
            models_root=str(site.workspace.models_dir),
            datasets_root=str(site.workspace.datasets_dir),
        )
        handle.progress(2, 3, "Starting the run.")
        config = starter_config(site, Path(made["model"]), Path(made["dataset"]))
        site.drafts.change(caller.session, lambda draft: _into(draft, config))
        run_id = site.engine.start_run(config, owner=caller.role, name="First try", why="small model, sample data")
        return {"run_id": run_id}

    site.jobs.start(KIND, work)
    return {}


def starter_config(site: Site, model: Path, dataset: Path) -> Config:
    """The settings of the first try."""
    chosen = {"model_path": str(model), "data.dataset_path": str(dataset), "profile.name": "plain"}
    return resolve(merged(unflatten(SETTINGS), unflatten(chosen)))


def _into(draft: Draft, config: Config) -> Draft:
    """The draft with every setting of the first try, so that the form shows what is running."""
    keys = [*SETTINGS, "model_path", "data.dataset_path", "profile.name"]
    values = {key: as_text(setting(key), get(config, key)) for key in keys}
    return replace(draft, values=draft.values | values)


def try_state(site: Site, caller: Caller) -> dict[str, Any] | None:
    """How far the newest try is; None where there was none."""
    jobs = site.jobs.recent(KIND)
    if not jobs:
        return None
    job = jobs[0]
    done, total = job["progress"] or (0, 1)
    failed = job["state"] not in ("running", "done")
    return {
        "running": job["state"] == "running",
        "progress": done / total,
        "text": job["error"] if failed else job["text"],
        "failed": failed,
        "go": f"live?run={job['result']['run_id']}" if job["state"] == "done" else "",
    }
