"""Checks of the smoke test on what will be trained: rows, labels, and the prompt in the tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from trainer.data.packing import Plan
from trainer.data.tokens import TokenCache, load_tokenizer
from trainer.launch import Prompt
from trainer.loop.prepare import Tokens
from trainer.loop.sampler import messages_as_trained
from trainer.report import Report
from trainer.schema import Config
from trainer.worker import Worker


def data(report: Report, cache: TokenCache, plan: Plan) -> None:
    """There are rows, they have labels, and a plan of steps came out."""
    meta = cache.meta
    share = 100 * meta["labels"] / max(1, meta["tokens"])
    text = (
        f"Data: {meta['rows']:,} rows, {meta['tokens']:,} tokens, {share:.0f} % answer tokens; "
        f"{plan.total_steps:,} steps planned."
    )
    report.add("data", "pass", text, f"{share:.0f} %")
    unseen = meta["rows_skipped"] + meta["rows_dropped"] + meta["rows_without_labels"]
    if unseen:
        report.add(
            "rows_left_out",
            "problem" if unseen > meta["rows"] else "pass",
            f"{unseen:,} rows are left out: {meta['rows_skipped']:,} with problems, {meta['rows_dropped']:,} too long, "
            f"{meta['rows_without_labels']:,} without an answer inside the maximum length.",
            f"{unseen:,}",
        )


def prompt_in_tokens(
    report: Report, config: Config, prompt: Prompt, tokens: Tokens, worker: Worker, user_profiles: Path
) -> None:
    """The system prompt stands in the tokens of a real row, decoded from what will be trained."""
    row = int(tokens.trained_rows[0])
    files = [file.path for file in config.data.files]
    file, line, index, piece = tokens.cache.place(row)
    if piece is not None:
        _text_in_tokens(report, tokens.cache, row)
        return
    messages = messages_as_trained(config, prompt, worker, user_profiles, files[file], index)
    system = next((message["content"] for message in messages if message["role"] == "system"), "")
    if not system.strip():
        report.add("prompt", "pass", "No system prompt is set and the rows have none; the model sees none.")
        return
    text = load_tokenizer(Path(config.model_path)).decode(tokens.cache.ids(row).tolist())
    if system.strip() in text:
        report.add("prompt", "pass", f"The system prompt is in the tokens of the row in line {line:,}.")
    else:
        report.add(
            "prompt",
            "problem",
            "The model does not see your prompt. The chat template drops or changes the system message.",
        )


def _text_in_tokens(report: Report, cache: TokenCache, row: int) -> None:
    """A plain text has no prompt; every token of it but the first must be a label."""
    labels = np.asarray(cache.labels(row))
    if labels[1:].all() and not labels[0]:
        report.add("prompt", "pass", "The first row is plain text: no prompt, every token but the first is trained.")
    else:
        report.add("prompt", "problem", "Tokens of a plain text are left out of training.")
