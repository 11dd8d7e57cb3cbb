"""Samples while a run goes on: the same prompts each time, base and tuned beside each other for LoRA, as events."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from peft import PeftModel

import profiles
from trainer.data.render import Renderer
from trainer.launch import Prompt
from trainer.loop.prepare import Model, Tokens
from trainer.loop.sample import answer
from trainer.schema import Config
from trainer.worker import Worker

if TYPE_CHECKING:
    from trainer.loop.ready import Surroundings

DEFAULT_PROMPTS = 3


@dataclass(frozen=True)
class Question:
    """A prompt as tokens, as a person reads it, and the answer the data has, where it is a held-out row."""

    ids: list[int]
    text: str
    wanted: str | None


def compose(text: str, index: int, config: Config, prompt: Prompt, user_profiles: Path) -> list[dict[str, Any]]:
    """The messages of a person's own prompt, with system message and profile as a row would have them."""
    profile = profiles.load(prompt.profile, user_profiles) if prompt.profile is not None else None
    messages = profiles.with_system(
        [{"role": "user", "content": text}], prompt.text, bool(profile and profile.overwrites_system)
    )
    return profile.transform({"messages": messages}, index)["messages"] if profile else messages


def messages_as_trained(
    config: Config, prompt: Prompt, worker: Worker, user_profiles: Path, file: str, index: int
) -> list[dict[str, Any]]:
    """The messages of row `index` (from 0) of `file`, with system message and profile; read by the worker."""
    view = worker.call(
        "view_row",
        timeout_s=120,
        path=file,
        row=index,
        model_path=config.model_path,
        profile=prompt.profile,
        system_prompt=config.profile.system_prompt,
        date=prompt.date,
        max_length=config.hyperparams.max_length,
        too_long=config.data.too_long,
        profiles_root=str(user_profiles),
    )
    return view["after"]


def held_out_messages(
    config: Config, prompt: Prompt, tokens: Tokens, worker: Worker, user_profiles: Path, count: int
) -> list[list[dict[str, Any]]]:
    """The messages of the first `count` held-out rows (or trained ones where none are held out), as they are trained."""
    cache, rows = (
        (tokens.held_out, tokens.held_out_rows) if len(tokens.held_out_rows) else (tokens.cache, tokens.trained_rows)
    )
    # the paths as they are now: the cache may have been made from another copy of the same bytes
    own = config.data.validation_dataset_path
    files = [own] if own and cache is not tokens.cache else [file.path for file in config.data.files]
    found = []
    for row in rows[:count]:
        file, _, index = (int(value) for value in np.asarray(cache.source)[row])
        found.append(messages_as_trained(config, prompt, worker, user_profiles, files[file], index))
    return found


class Sampler:
    """Holds the questions of a run and writes the answers of a step as `sample` events."""

    def __init__(self, config: Config, prompt: Prompt, model: Model, tokens: Tokens, around: Surroundings) -> None:
        self._config, self._model, self._around = config, model, around
        self._renderer = Renderer(model.tokenizer, tokens.cache.meta["chat_template"], prompt.date)
        self._profile = profiles.load(prompt.profile, around.profiles_root) if prompt.profile is not None else None
        self._questions = [
            self._question(compose(text, index, config, prompt, around.profiles_root), None)
            for index, text in enumerate(config.eval.sample_prompts)
        ]
        if not self._questions:
            rows = held_out_messages(config, prompt, tokens, around.worker, around.profiles_root, DEFAULT_PROMPTS)
            self._questions = [self._question(row[:-1], row[-1]["content"]) for row in rows]

    def _question(self, messages: list[dict[str, Any]], wanted: str | None) -> Question:
        ids = self._renderer.prompt(messages) if wanted is None else self._renderer.prompt(messages, wanted)
        return Question(ids, messages[-1]["content"], wanted)

    def write(self, step: int) -> None:
        """Answer every question with the weights of `step`; a question that cannot be answered is named, not hidden."""
        lora = isinstance(self._model.trained, PeftModel)
        for number, question in enumerate(self._questions):
            if self._around.signals.interrupt():
                return
            try:
                text = self._answer(question, base=False)
                base = self._answer(question, base=True) if lora else None
            except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError) as error:
                # a night of training must not end for want of a sample
                text = f"Sample {number + 1} could not be written: {str(error).strip()[:200]}"
                self._around.events.append("alert", code="sample", step=step, text=text)
                continue
            self._around.events.append(
                "sample",
                step=step,
                number=number,
                prompt=question.text,
                text=text,
                base=base,
                wanted=question.wanted,
            )

    def _answer(self, question: Question, base: bool) -> str:
        settings = self._config.eval
        processors = self._profile.logits_processors(self._model.tokenizer) if self._profile else []
        return answer(
            self._model.trained,
            self._model.tokenizer,
            question.ids,
            processors,
            device=self._around.device,
            max_tokens=settings.sample_max_tokens,
            max_s=settings.sample_max_s,
            autocast=self._model.precision.autocast,
            base=base,
            interrupt=self._around.signals.interrupt,
        )
