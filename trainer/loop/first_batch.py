"""The first real batch of a run, from the collated tensors themselves: what is trained, where documents begin and end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.data.loader import assemble
from trainer.launch import Prompt
from trainer.loop import prepare
from trainer.refusal import Refusal
from trainer.schema import Config
from trainer.worker import Worker
from trainer.workspace import Workspace

TEXTS_LIMIT_S = 120.0


def first_batch(
    config: Config, prompt: Prompt, workspace: Workspace, worker: Worker, interrupt: Callable[[], bool] = lambda: False
) -> dict[str, Any]:
    """The first micro-batch: {"documents": [{row, file, line, piece, tokens, labels, cut, pieces: [{text, id, position,
    trained, special}]}], "summary", "max_length"}.

    `piece` counts from 1 in a plain text, None for a conversation; `cut` is how many tokens of the row do not fit.
    Raises Refusal as a run would, Left when `interrupt()` said so.
    """
    files = [file.path for file in config.data.files]
    tokens = prepare.all_tokens(config, prompt, (workspace.tokens, workspace.profiles), worker, interrupt)
    cache, plan = tokens.cache, prepare.plan_of(config, tokens)
    if not plan.total_steps:
        raise Refusal("The plan has no step: there is no row to train on.", "data.dataset_path")
    batch = assemble(cache, plan.micro_batches(1, config.hyperparams.batch_size)[0], "cpu")
    trained = set((batch.label_at + 1).tolist())
    ids, positions, borders = batch.ids[0].tolist(), batch.positions[0].tolist(), batch.documents.borders
    rows = [ids[start:stop] for start, stop in zip(borders, borders[1:], strict=False)]
    read = worker.call("token_texts", timeout_s=TEXTS_LIMIT_S, model_path=config.model_path, rows=rows)
    special = set(read["special"])
    documents = []
    for number, row in enumerate(batch.rows):
        file, line, _, piece = cache.place(row)
        places = range(borders[number], borders[number + 1])
        pieces = [
            {
                "text": text,
                "id": ids[at],
                "position": positions[at],
                "trained": at in trained,
                "special": ids[at] in special,
            }
            for at, text in zip(places, read["texts"][number], strict=True)
        ]
        documents.append(
            {
                "row": row,
                "file": Path(files[file]).name,
                "line": line,
                "piece": None if piece is None else piece + 1,
                "tokens": len(pieces),
                "labels": batch.labels_of_row[number],
                "cut": int(cache.cut[row]),
                "pieces": pieces,
            }
        )
    summary = (
        f"First micro-batch: {_count(len(documents), 'row')}, {batch.tokens:,} tokens, {batch.labels:,} labels, "
        f"nothing padded; {_count(plan.total_steps, 'step')} planned."
    )
    return {"documents": documents, "summary": summary, "max_length": config.hyperparams.max_length}


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
