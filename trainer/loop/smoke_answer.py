"""The smoke test's one answer: written with the profile's processors, within its limits, and able to end by itself."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import profiles
from trainer.launch import Prompt
from trainer.loop.prepare import Model, Tokens
from trainer.loop.sample import answer, ends
from trainer.loop.sampler import default_questions
from trainer.report import Report
from trainer.schema import Config
from trainer.worker import Worker

MOST_TOKENS = 32
SLACK_S = 2.0
"""Beyond its own limit of time a generation may finish the token it is at; after that it is cut off from here."""
ROWS_LOOKED_AT = 200


class _Endless(Exception):
    """Generation went past a limit that should have ended it."""


class _Meter:
    """Stands last among the processors: counts tokens, and ends what its own limits did not end."""

    def __init__(self, max_tokens: int, max_s: float) -> None:
        self.tokens, self._max_tokens, self._max_s = 0, max_tokens, max_s
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the generation began."""
        return time.monotonic() - self._started

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.tokens >= self._max_tokens or self.seconds > self._max_s + SLACK_S:
            raise _Endless()
        self.tokens += 1
        return scores


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
    """One answer to a real row's prompt, with the profile's processors, limited in tokens and seconds."""
    (question,) = default_questions(config, prompt, tokens, model.tokenizer, worker, user_profiles, 1)
    profile = profiles.load(prompt.profile, user_profiles) if prompt.profile is not None else None
    processors: list[Any] = profile.logits_processors(model.tokenizer) if profile else []
    max_tokens, max_s = min(MOST_TOKENS, config.eval.sample_max_tokens), config.eval.sample_max_s
    meter = _Meter(max_tokens, max_s)
    try:
        text = answer(
            model.trained,
            model.tokenizer,
            question.ids,
            [*processors, meter],
            device=device,
            max_tokens=max_tokens,
            max_s=max_s,
            autocast=model.precision.autocast,
            interrupt=interrupt,
        )
    except _Endless:
        text = ""
    took = f"{meter.tokens} tokens in {meter.seconds:.1f} s"
    report.fact(sample=text[:500])
    with_them = f" with {len(processors)} processors of the profile" if processors else ""
    if meter.seconds > max_s:
        report.add(
            "generation",
            "problem",
            f"Writing an answer{with_them} does not end in time: {took}, at most {max_tokens} tokens or {max_s:g} s are set. It "
            "was cut off; training is not touched by it. Raise eval.sample_max_s, or set eval.sample_steps to 0.",
            took,
        )
    elif not text and meter.tokens >= max_tokens:
        report.add(
            "generation",
            "problem",
            f"Writing an answer{with_them} does not stop at its limit of {max_tokens} tokens. It was cut off; training is not "
            "touched by it. Set eval.sample_steps to 0 and report the model's family.",
            took,
        )
    else:
        report.add("generation", "pass", f"The model writes an answer{with_them}: {took}.", took)


def answers_end(report: Report, model: Model, tokens: Tokens) -> None:
    """A token that ends a generation is among those trained: a model never shown one never stops."""
    own = ends(model.trained, model.tokenizer) or []
    rows = tokens.trained_rows[:ROWS_LOOKED_AT]
    whole = [int(row) for row in rows if int(tokens.cache.cut[row]) == 0]
    taught = sum(bool(np.isin(_labels(tokens, row), own).any()) for row in whole)
    names = ", ".join(f"'{model.tokenizer.convert_ids_to_tokens(token)}'" for token in own) or "none"
    if taught or not whole:
        text = f"Answers can end: {taught:,} of {len(whole):,} whole rows train a token that stops them ({names})."
        report.add("answers_end", "pass", text, f"{taught:,}")
        return
    report.add(
        "answers_end",
        "problem",
        f"Answers would never end: no row trains a token that stops a generation ({names}). Nothing was changed. Put the "
        "template's own end of turn into eos_token_id of generation_config.json.",
    )


def _labels(tokens: Tokens, row: int) -> np.ndarray:
    return np.asarray(tokens.cache.ids(row))[np.asarray(tokens.cache.labels(row)) > 0]
