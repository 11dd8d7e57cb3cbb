"""Checks of the smoke test on what will be trained: rows, labels, and the prompt in the tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from trainer.data.conversation import printable
from trainer.data.loader import assemble
from trainer.data.packing import Plan
from trainer.data.tokens import TokenCache, load_tokenizer
from trainer.launch import Prompt
from trainer.loop.prepare import Tokens
from trainer.loop.sampler import messages_as_trained
from trainer.refusal import Refusal
from trainer.report import Report
from trainer.schema import Config
from trainer.worker import Worker


def data(report: Report, cache: TokenCache, plan: Plan) -> None:
    """There are rows, they have labels, and a plan of steps came out."""
    meta = cache.meta
    counts, tokens = np.asarray(cache.label_counts), int(np.asarray(cache.lengths).sum())
    if not counts.any():
        raise Refusal(
            "No token of the data is trained: every label is masked away. Nothing was changed. Empty cache/tokens of the "
            "workspace, then look at the rows on the Data page.",
            "data.dataset_path",
        )
    share = 100 * int(counts.sum()) / max(1, tokens)
    text = (
        f"Data: {len(counts):,} rows, {tokens:,} tokens, {share:.0f} % answer tokens; "
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
    tokenizer = load_tokenizer(Path(config.model_path))
    messages = messages_as_trained(config, prompt, worker, user_profiles, files[file], index)
    _answers_trained(report, tokens.cache, row, messages, tokenizer)
    system = next((message["content"] for message in messages if message["role"] == "system"), "")
    if not system.strip():
        report.add("prompt", "pass", "No system prompt is set and the rows have none; the model sees none.")
        return
    text = tokenizer.decode(tokens.cache.ids(row).tolist())
    if system.strip() in text:
        report.add("prompt", "pass", f"The system prompt is in the tokens of the row in line {line:,}.")
    else:
        report.add(
            "prompt",
            "problem",
            f"The model does not see your prompt: the chat template drops or changes the system message (line {line:,}). "
            "Nothing was changed. Look at that row on the Train page, or use a template that keeps it (plain ChatML).",
        )


def _answers_trained(
    report: Report, cache: TokenCache, row: int, messages: list[dict[str, Any]], tokenizer: Any
) -> None:
    """The labels of a row as the loop gets them, decoded, are words of its answers and of nothing else.

    Each stretch of labels may have two words of its own: what closes the turn, and a word that the maximum length cut.
    """
    batch = assemble(cache, np.array([row]), "cpu")
    at = batch.label_at.numpy()
    stretches = np.split(batch.targets.numpy(), np.flatnonzero(np.diff(at) != 1) + 1) if len(at) else []
    words = [word for part in stretches for word in tokenizer.decode(part.tolist(), skip_special_tokens=True).split()]
    answers = {word for message in messages if message["role"] == "assistant" for word in message["content"].split()}
    foreign = [word for word in words if word not in answers]
    where = cache.place_words(row)
    if len(foreign) <= 2 * len(stretches) and len(foreign) <= len(words) / 2 and len(at):
        report.add(
            "labels", "pass", f"Trained are the answer and its end, {len(at):,} tokens in {where}.", f"{len(at):,}"
        )
        return
    what = (
        f"{len(foreign):,} of {len(words):,} trained words are not of an answer, such as '{printable(foreign[0], 40)}'"
        if foreign
        else "none of its tokens is trained"
    )
    report.add(
        "labels",
        "problem",
        f"The wrong tokens are trained in {where}: {what}. Nothing was changed. Empty cache/tokens of the workspace and try "
        "again; if it stays so, the template moves contents: choose another.",
    )


def _text_in_tokens(report: Report, cache: TokenCache, row: int) -> None:
    """A plain text has no prompt; every token of it but the first must be a label."""
    labels = np.asarray(cache.labels(row))
    if labels[1:].all() and not labels[0]:
        report.add("prompt", "pass", "The first row is plain text: no prompt, every token but the first is trained.")
    else:
        report.add(
            "prompt",
            "problem",
            "Tokens of a plain text are left out of training. Nothing was changed. Empty cache/tokens of the workspace and "
            "try again.",
        )
