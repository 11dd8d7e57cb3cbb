"""The first real batch of a run, from the collated tensors themselves: what is trained, where documents begin and end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from trainer.data.loader import assemble
from trainer.data.render import token_texts
from trainer.data.tokens import load_tokenizer
from trainer.launch import Prompt
from trainer.loop import prepare
from trainer.schema import Config
from trainer.worker import Worker
from trainer.workspace import Workspace


def first_batch(config: Config, prompt: Prompt, workspace: Workspace, worker: Worker) -> dict[str, Any]:
    """{"documents": [{row, file, line, tokens, labels, pieces: [{text, id, position, trained}]}], "summary"}."""
    files = [file.path for file in config.data.files]
    tokens = prepare.all_tokens(config, prompt, (workspace.tokens, workspace.profiles), worker)
    cache, plan = tokens.cache, prepare.plan_of(config, tokens)
    tokenizer = load_tokenizer(Path(config.model_path))
    batch = assemble(cache, plan.micro_batches(1, config.hyperparams.batch_size)[0], "cpu")
    trained = set((batch.label_at + 1).tolist())
    ids, positions, borders = batch.ids[0].tolist(), batch.positions[0].tolist(), batch.documents.borders
    documents = []
    for number, row in enumerate(batch.rows):
        file, line, _ = (int(value) for value in np.asarray(cache.source)[row])
        places = range(borders[number], borders[number + 1])
        texts = token_texts(tokenizer, [ids[at] for at in places])
        pieces = [
            {"text": text, "id": ids[at], "position": positions[at], "trained": at in trained}
            for at, text in zip(places, texts, strict=True)
        ]
        documents.append(
            {
                "row": row,
                "file": Path(files[file]).name,
                "line": line,
                "tokens": len(pieces),
                "labels": batch.labels_of_row[number],
                "pieces": pieces,
            }
        )
    summary = (
        f"First micro-batch: {len(documents)} rows, {batch.tokens:,} tokens, {batch.labels:,} labels; "
        f"{plan.total_steps:,} steps planned."
    )
    return {"documents": documents, "summary": summary}
