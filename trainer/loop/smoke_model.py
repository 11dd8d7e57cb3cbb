"""Checks of the smoke test on the model that was loaded: weights, loss, activations kept, attention called, an answer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import profiles
from trainer.data.loader import assemble
from trainer.launch import Prompt
from trainer.loop.forward import losses
from trainer.loop.prepare import Model, Tokens
from trainer.loop.sample import answer
from trainer.loop.sampler import default_questions
from trainer.models import activations
from trainer.report import Report
from trainer.schema import Config
from trainer.worker import Worker


def finite_weights(report: Report, model: Model) -> None:
    """Loading refuses NaN and infinity by the tensor's name, so a model that is here has none."""
    report.add("weights", "pass", f"Model loaded, every weight finite; {model.precision.name}.")


def loss_path(report: Report, model: Model) -> None:
    """Our loss is the model's own."""
    choice = model.choice
    slower = (
        f" Faster ways passed over: {'; '.join(reason for _, reason in choice.passed_over)}."
        if choice.passed_over
        else ""
    )
    report.add(
        "loss",
        "pass",
        f"Our loss equals the model's own on two rows ({choice.path.way}).{slower}",
        f"{choice.difference:.1e}",
    )


def saved_bytes(bench_model: Model, batch: Any) -> int:
    """Bytes of activations that the forward pass of `batch` keeps for the backward pass."""
    total = 0
    own = {parameter.data_ptr() for parameter in bench_model.loaded.model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal total
        if tensor.data_ptr() not in own:
            total += tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses(bench_model.loaded.model, batch, bench_model.choice.path).sum()
    return total


def checkpointing(report: Report, config: Config, model: Model, tokens: Tokens) -> None:
    """Gradient checkpointing is really on (or off): seen in the activations kept by one forward pass, both ways."""
    lengths = np.asarray(tokens.cache.lengths)[tokens.trained_rows]
    row = tokens.trained_rows[np.argsort(lengths, kind="stable")[len(lengths) // 2]]
    batch = assemble(tokens.cache, np.array([row]), model.stepper.device)
    wanted = config.hyperparams.use_gradient_checkpointing
    as_set = saved_bytes(model, batch)
    inner = model.loaded.model
    if wanted:
        activations.keep(inner)
        plain = saved_bytes(model, batch)
        activations.recompute(inner, config.hyperparams.gradient_checkpointing_policy)
        text = (
            f"Gradient checkpointing is on: one row keeps {as_set / 2**20:.1f} MiB of activations "
            f"instead of {plain / 2**20:.1f}."
        )
        report.add(
            "checkpointing",
            "pass" if as_set < 0.9 * plain else "problem",
            text
            if as_set < 0.9 * plain
            else "Gradient checkpointing is set, but as many activations are kept as without it.",
            f"{as_set / max(1, plain):.0%}",
        )
        return
    on = activations.recomputes(inner)
    report.add(
        "checkpointing",
        "problem" if on else "pass",
        f"Gradient checkpointing is off, as set: one row keeps {as_set / 2**20:.1f} MiB of activations.",
    )


def attention_called(report: Report, model: Model) -> None:
    """Which attention kernel was really called, counted at the call."""
    calls = {kernel: count for kernel, count in model.loaded.attention.calls.items() if kernel != "sdpa"}
    if not calls:
        report.add("attention", "pass", "Attention: the model's own; no row sees another.")
        return
    kernel = max(calls, key=lambda name: calls[name])
    report.add(
        "attention",
        "pass",
        f"Attention really called: {kernel}, {calls[kernel]:,} times; no row sees another.",
        kernel,
    )


def generation(
    report: Report,
    config: Config,
    prompt: Prompt,
    model: Model,
    tokens: Tokens,
    worker: Worker,
    user_profiles: Path,
    device: str,
    interrupt: Callable[[], bool],
) -> None:
    """One answer to a real row's prompt, with the profile's processors."""
    (question,) = default_questions(config, prompt, tokens, model.tokenizer, worker, user_profiles, 1)
    profile = profiles.load(prompt.profile, user_profiles) if prompt.profile is not None else None
    processors = profile.logits_processors(model.tokenizer) if profile else []
    text = answer(
        model.trained,
        model.tokenizer,
        question.ids,
        processors,
        device=device,
        max_tokens=min(32, config.eval.sample_max_tokens),
        max_s=config.eval.sample_max_s,
        autocast=model.precision.autocast,
        interrupt=interrupt,
    )
    with_them = f" with {len(processors)} processors of the profile" if processors else ""
    report.fact(sample=text[:500])
    report.add("generation", "pass", f"The model writes an answer{with_them}.", f"{len(text):,} characters")
