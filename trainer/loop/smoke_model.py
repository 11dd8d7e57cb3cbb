"""Checks of the smoke test on the model that was loaded: weights, its own loss, activations kept, the tokenizer it knows."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from trainer.data.loader import MicroBatch, assemble
from trainer.loop.forward import losses, reference_losses, row_means
from trainer.loop.prepare import Model, Tokens
from trainer.models import activations
from trainer.models.load import refuse_non_finite
from trainer.report import Report
from trainer.schema import Config

ROW_TOKENS = 1024
"""Rows up to this length are put through the model's own loss, which makes whole logits and an attention matrix."""
ROW_LOGITS = 1 << 26
ROWS_READ = 4
WORSE_THAN_CHANCE = 0.5
"""Nats above the loss of a guess among all tokens. Random weights are at most σ²/2 above it (0.15 for GPT-2's size); a
model that reads ids of another vocabulary is sure and wrong."""


def finite_weights(report: Report, model: Model) -> None:
    """Every weight is a number: looked at here, adapter and all. Raises Refusal that names the tensor."""
    refuse_non_finite(model.trained, "model")
    count = sum(1 for _ in model.trained.parameters())
    report.add("weights", "pass", f"Model loaded, all {count:,} tensors finite; {model.precision.name}.", f"{count:,}")


def own_loss(report: Report, model: Model, tokens: Tokens) -> None:
    """Our loss is the model's own on a long row, in the weights' format; the start itself looks at the shortest rows."""
    choice, inner = model.choice, model.loaded.model
    batch = assemble(tokens.cache, np.array([_long_row(model, tokens)]), model.stepper.device)
    dtype = next(inner.parameters()).dtype
    inner.eval()
    try:
        with torch.no_grad():
            (wanted,) = reference_losses(inner, batch)
            got = row_means(inner, batch, replace(choice.path, compute=dtype, autocast=None))
    finally:
        inner.train()
    passed_over = "; ".join(reason for _, reason in choice.passed_over)
    slower = f" Faster ways passed over: {passed_over}." if passed_over else ""
    difference = math.inf if isinstance(got, str) else abs(got[0] - wanted) / max(abs(wanted), 1e-6)
    if difference <= (1e-4 if dtype == torch.float32 else 3e-2):
        text = f"Our loss equals the model's own, also on a row of {batch.tokens:,} tokens ({choice.path.way}).{slower}"
        report.add("loss", "pass", text, f"{max(difference, choice.difference):.1e}")
        return
    ours = got if isinstance(got, str) else f"{got[0]:.4f}"
    report.add(
        "loss",
        "problem",
        f"The loss that would be trained is not the model's own: {ours} instead of {wanted:.4f} on a row of "
        f"{batch.tokens:,} tokens. Nothing was changed. Do not train with this: report the model's family.",
    )


def _long_row(model: Model, tokens: Tokens) -> int:
    """The longest trained row whose whole logits are affordable; the shortest where none is."""
    lengths = np.asarray(tokens.cache.lengths)[tokens.trained_rows]
    most = min(ROW_TOKENS, ROW_LOGITS // model.stepper.vocabulary)
    fitting = np.flatnonzero(lengths <= most)
    at = fitting[np.argmax(lengths[fitting])] if len(fitting) else np.argmin(lengths)
    return int(tokens.trained_rows[at])


def knows_the_tokens(report: Report, model: Model, tokens: Tokens) -> None:
    """The model reads the data better than a guess among all its tokens; one with another's tokenizer is sure and wrong."""
    rows = tokens.trained_rows[np.linspace(0, len(tokens.trained_rows) - 1, ROWS_READ).astype(int)]
    inner, total, labels = model.loaded.model, 0.0, 0
    inner.eval()
    try:
        with torch.no_grad():
            for row in np.unique(rows):
                batch = assemble(tokens.cache, np.array([row]), model.stepper.device)
                total += float(losses(inner, batch, model.choice.path).sum())
                labels += batch.labels
    finally:
        inner.train()
    loss, chance = total / max(1, labels), math.log(model.stepper.vocabulary)
    figures = f"loss {loss:.2f} before training, {chance:.2f} is a guess among {model.stepper.vocabulary:,} tokens"
    if loss <= chance + WORSE_THAN_CHANCE:
        report.add("tokenizer", "pass", f"Tokenizer and model go together: {figures}.", f"{loss:.2f}")
        return
    report.add(
        "tokenizer",
        "problem",
        f"The model knows these tokens worse than a guess would: {figures}. The tokenizer is another model's, or the weights "
        "are damaged. Nothing was changed. Download the model's folder again, tokenizer and weights together.",
        f"{loss:.2f}",
    )


def saved_bytes(bench_model: Model, batch: MicroBatch) -> int:
    """Bytes of activations that the forward pass of `batch` keeps for the backward pass."""
    total = 0
    own = {parameter.data_ptr() for parameter in bench_model.loaded.model.parameters()}

    def pack(tensor: torch.Tensor) -> None:
        # the tensor itself would be kept by the node that it came from, for ever, and the whole model with it
        nonlocal total
        if tensor.data_ptr() not in own:
            total += tensor.nbytes

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda nothing: nothing):
        losses(bench_model.loaded.model, batch, bench_model.choice.path).sum()
    return total


def checkpointing(report: Report, config: Config, model: Model, tokens: Tokens) -> None:
    """Gradient checkpointing is really on (or off): seen in the activations kept by one forward pass, both ways."""
    lengths = np.asarray(tokens.cache.lengths)[tokens.trained_rows]
    row = tokens.trained_rows[np.argsort(lengths, kind="stable")[len(lengths) // 2]]
    batch = assemble(tokens.cache, np.array([row]), model.stepper.device)
    inner: Any = model.loaded.model
    wanted = config.hyperparams.use_gradient_checkpointing
    as_set = saved_bytes(model, batch)
    activations.keep(inner)
    plain = saved_bytes(model, batch)
    if wanted:
        activations.recompute(inner, config.hyperparams.gradient_checkpointing_policy)
    less, share = as_set < 0.9 * plain, f"{as_set / max(1, plain):.0%}"
    kept = f"one row keeps {as_set / 2**20:.2f} MiB of activations"
    if less == wanted:
        text = f"on: {kept} instead of {plain / 2**20:.2f}" if wanted else f"off, as set: {kept}"
        report.add("checkpointing", "pass", f"Gradient checkpointing is {text}.", share)
        return
    cause = (
        f"Gradient checkpointing is set, but as many activations are kept as without it: {kept}. Training is right and needs "
        "the memory of a run without. Choose by the figures without it, or lower the micro-batch."
        if wanted
        else f"Gradient checkpointing is off in the settings, but it is on: {kept} instead of {plain / 2**20:.2f}. Training is "
        "right and about a quarter slower. Switch it on in the settings if memory is short, or report the model's family."
    )
    report.add("checkpointing", "problem", cause, share)
