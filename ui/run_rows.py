"""The rows that one step of a run trained on: their own loss, where they stand in the data, and their text.

Losses and row numbers come from rows.bin, lines from the token cache of the run, texts from the worker, which alone
reads foreign files. Called by `ui.runs_api` for people who may see rows.
"""

from __future__ import annotations

from typing import Any

from trainer import checkpoint, metrics
from trainer.data.tokens import TokenCache
from trainer.events import read_events, wire
from trainer.files import read_json
from trainer.refusal import Refusal
from trainer.run import RunDir
from trainer.worker import Worker
from trainer.workspace import Workspace

MOST_ROWS = 512
TEXT_TIMEOUT_S = 20.0


def rows_of_step(workspace: Workspace, run: RunDir, step: int) -> dict[str, Any]:
    """{"step", "rows": [{"row", "loss", "labels", "where"?}], "note"?}: loss is the mean of a row's labels, in nats."""
    found = metrics.read_rows(run.rows, step)
    if not found:
        return {
            "step": step,
            "rows": [],
            "note": f"Step {step:,} is not written down: not trained yet, or dropped by a stop.",
        }
    cache = token_cache(workspace, run)
    rows = []
    for row, loss_sum, labels in found[:MOST_ROWS]:
        entry = {"row": row, "loss": loss_sum / labels if labels else None, "labels": labels}
        rows.append(wire(entry | ({"where": cache.place_words(row)} if cache else {})))
    notes = [] if cache else ["Lines and texts are not known: the token cache of this run is gone."]
    if len(found) > MOST_ROWS:
        notes.append(f"{MOST_ROWS} of {len(found):,} rows are shown.")
    return {"step": step, "rows": rows} | ({"note": " ".join(notes)} if notes else {})


def text_of_row(workspace: Workspace, worker: Worker, run: RunDir, row: int) -> dict[str, Any]:
    """{"messages": [{"role", "content"}]}: the row as it is trained. Refusal when it cannot be read any more."""
    cache = token_cache(workspace, run)
    if cache is None or not 0 <= row < len(cache.source):
        raise Refusal(f"Row {row:,} is not known: the token cache of this run is gone.")
    snapshot = run.snapshot()
    config, prompt = snapshot["config"], snapshot["profile"]
    file, _, index, piece = cache.place(row)
    view = worker.call(
        "view_row",
        timeout_s=TEXT_TIMEOUT_S,
        path=cache.meta["files"][file]["path"],
        row=index,
        model_path=config["model_path"],
        profile=prompt["name"],
        system_prompt=config["profile"]["system_prompt"],
        date=prompt["date"],
        max_length=config["hyperparams"]["max_length"],
        too_long=config["data"]["too_long"],
        profiles_root=str(workspace.profiles),
        piece=piece,
        chat_template=config["data"].get("chat_template", "model"),
    )
    return {"messages": [{"role": message["role"], "content": message["content"]} for message in view["after"]]}


def token_cache(workspace: Workspace, run: RunDir) -> TokenCache | None:
    """The token cache that the run was trained from, or None when nobody knows it or it was cleared away."""
    key = _token_key(run)
    if key is None:
        return None
    try:
        return TokenCache.open(workspace.tokens / key)
    except Refusal:
        return None


def _token_key(run: RunDir) -> str | None:
    """The cache's name: from the plan event, or for a run of an older version from its newest checkpoint."""
    events, _ = read_events(run.events, limit_bytes=1 << 20)
    for event in events:
        if event["kind"] == "plan" and isinstance(event.get("token_key"), str):
            return event["token_key"]
    for _, path in checkpoint.listed(run.checkpoints):
        try:
            return str(read_json(path / checkpoint.STATE)["facts"]["token_key"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None
