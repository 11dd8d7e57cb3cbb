"""Samples while a run goes on: the same prompts each time, base and tuned beside each other for LoRA, as events."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftModel

import profiles
from trainer.data.loader import BadRow, read_row
from trainer.data.plain_text import TextEncoder
from trainer.data.render import Renderer, own_template
from trainer.launch import Prompt
from trainer.loop.prepare import Model, Tokens
from trainer.loop.sample import answer
from trainer.schema import Config
from trainer.worker import Worker

if TYPE_CHECKING:
    from trainer.loop.ready import Surroundings

DEFAULT_PROMPTS = 3
OPENING_TOKENS = 32
FOLLOWING_TOKENS = 96
ANY_ID = 2**31  # these tokens are read by a person, and by the model no sooner than it asks its own bound of them


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
        chat_template=config.data.chat_template,
        columns=list(config.data.columns),
        profiles_root=str(user_profiles),
    )
    return view["after"]


def default_questions(
    config: Config,
    prompt: Prompt,
    tokens: Tokens,
    tokenizer: Any,
    worker: Worker,
    user_profiles: Path,
    count: int = DEFAULT_PROMPTS,
) -> list[Question]:
    """Questions from the first `count` held-out rows (or trained ones where none are held out), as they are trained.

    A conversation is asked its last answer; a plain text is to be continued from its first tokens.
    """
    cache, rows = (
        (tokens.held_out, tokens.held_out_rows) if len(tokens.held_out_rows) else (tokens.cache, tokens.trained_rows)
    )
    # the paths as they are now: the cache may have been made from another copy of the same bytes
    own = config.data.validation_dataset_path
    files = [own] if own and cache is not tokens.cache else [file.path for file in config.data.files]
    found: list[Question] = []
    for row in rows:
        if len(found) == count:
            break
        file, _, index, piece = cache.place(int(row))
        if piece is not None:
            try:
                ids, _ = read_row(cache, int(row), ANY_ID)
            except BadRow:  # training says so when it comes by; a sample needs some row, not this one
                continue
            found.append(continuation(tokenizer, ids.tolist()))
            continue
        messages = messages_as_trained(config, prompt, worker, user_profiles, files[file], index)
        renderer = Renderer(tokenizer, cache.meta["chat_template"], prompt.date)
        found.append(asked(renderer, messages[:-1], messages[-1]["content"]))
    return found


def asked(renderer: Renderer, messages: list[dict[str, Any]], wanted: str | None) -> Question:
    """The question that the last turn of `messages` asks; `wanted` is the answer the data has."""
    ids = renderer.prompt(messages) if wanted is None else renderer.prompt(messages, wanted)
    return Question(ids, messages[-1]["content"], wanted)


def continuation(tokenizer: Any, ids: list[int]) -> Question:
    """The first tokens of a plain text, at most OPENING_TOKENS and at most half, and what really follows them."""
    opening = min(OPENING_TOKENS, max(1, len(ids) // 2))
    told = tokenizer.decode(ids[:opening], skip_special_tokens=True)
    return Question(ids[:opening], told, tokenizer.decode(ids[opening : opening + FOLLOWING_TOKENS]))


def typed_question(
    text: str, index: int, config: Config, prompt: Prompt, tokens: Tokens, tokenizer: Any, user_profiles: Path
) -> Question:
    """A person's own prompt: a turn of the user, or where the data is plain text alone, a text to continue."""
    template = tokens.cache.meta["chat_template"]
    if template is None:
        encoder = TextEncoder(tokenizer, own_template(tokenizer))
        return Question([*encoder.start, *(n for part in encoder.parts(text) for n in part)], text, None)
    messages = compose(text, index, config, prompt, user_profiles)
    return asked(Renderer(tokenizer, template, prompt.date), messages, None)


class Sampler:
    """Holds the questions of a run and writes the answers of a step as `sample` events."""

    def __init__(self, config: Config, prompt: Prompt, model: Model, tokens: Tokens, around: Surroundings) -> None:
        self._config, self._model, self._around = config, model, around
        self._profile = profiles.load(prompt.profile, around.profiles_root) if prompt.profile is not None else None
        tokenizer = model.tokenizer
        self._questions = [
            typed_question(text, index, config, prompt, tokens, tokenizer, around.profiles_root)
            for index, text in enumerate(config.eval.sample_prompts)
        ] or default_questions(config, prompt, tokens, tokenizer, around.worker, around.profiles_root)

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
            if self._around.signals.interrupt():
                return  # cut off by the stop: half an answer is no sample
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
