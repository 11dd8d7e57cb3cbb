"""A run made ready: tokens, plan and model, and where a checkpoint left off. What stands here happens once, before step 1."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from trainer import checkpoint
from trainer.bad_rows import LeftOut, left_out_of
from trainer.data.packing import Plan, waste
from trainer.events import EventLog, all_events
from trainer.files import write_json
from trainer.launch import Prompt, fingerprint, versions
from trainer.loop import optim, prepare
from trainer.loop.fit import Fit
from trainer.loop.fit_start import fit_before_start
from trainer.loop.sampler import Sampler
from trainer.loop.save import Promoted, Saver, load_optimizer
from trainer.loop.team import ALONE, Team
from trainer.models.activations import recompute
from trainer.refusal import Refusal
from trainer.rewind import Rewinds, rewinds_of
from trainer.run import RunDir
from trainer.schema import Config
from trainer.signals import Signals
from trainer.telemetry import Telemetry
from trainer.time_left import marks_of
from trainer.worker import Worker

# what must be the same for a resume to be the same run; everything else may change
MUST_MATCH = ("token_key", "held_out", "plan", "seed", "threads", "processes", "model")
# settings that make the curve and that none of these shows: nobody is offered to change them, but a file can be edited
OF_THE_CURVE = (
    "method", "learning_rate", "lr_schedule", "warmup_steps", "weight_decay", "max_grad_norm", "optimizer",
    "fp_precision", "master_weights",
)  # fmt: skip


@dataclass(frozen=True)
class Surroundings:
    """What a run finds around it: where it is written, who may end it, what parses foreign bytes, which device."""

    run: RunDir
    events: EventLog
    signals: Signals
    telemetry: Telemetry
    worker: Worker
    tokens_root: Path
    profiles_root: Path
    device: str
    device_name: str
    threads: int
    life: int
    say: Callable[[str], None]
    team: Team = ALONE
    promoted: Promoted = lambda: nullcontext(set())
    tell: Callable[[str], None] = lambda text: None  # the run's webhook, of something that needs a look
    root: Path | None = None  # the workspace, whose history of measurements the forecast goes by
    before_gib: float = 0.0  # memory of the process before anything was loaded


@dataclass
class Progress:
    """Where a run stands; what a checkpoint keeps besides tensors."""

    step: int = 0
    packs_each: int = 1
    checkpointing: bool = False
    best_loss: float | None = None
    best_step: int | None = None
    measured_loss: float | None = None  # held-out loss at `measured_step`, the newest measured
    measured_step: int | None = None
    best_saved_loss: float | None = None  # the best among checkpoints whose step was measured: pinned
    best_saved_step: int | None = None
    checks_without_better: int = 0
    elapsed_s: float = 0.0


@dataclass(frozen=True)
class Ready:
    """All that the loop needs. `held_out_groups` is empty when held-out loss is not measured."""

    tokens: prepare.Tokens
    plan: Plan
    model: prepare.Model
    saver: Saver
    sampler: Sampler | None
    held_out_groups: list[np.ndarray]
    progress: Progress
    saved_step: int | None
    facts: dict[str, Any]
    rewinds: Rewinds
    left_out: LeftOut = field(default_factory=LeftOut)
    fit: Fit | None = None


def get_ready(around: Surroundings, config: Config, prompt: Prompt, found: checkpoint.Found | None) -> Ready:
    """Tokenise, plan, load; with `found` take up the state of that checkpoint. Raises Left when a stop was asked for."""
    around.say(prompt.line)
    tokens = _tokens(around, config, prompt)
    plan = prepare.plan_of(config, tokens)
    write_json(around.run.plan, asdict(marks_of(plan, np.asarray(tokens.cache.lengths))))
    _announce(around, config, tokens, plan)
    leave_if_asked(around)
    around.events.append("phase", name="load")
    _same_model(around, config)
    converted = around.tokens_root.parent / "converted"
    folder = prepare.safetensors_folder(Path(config.model_path), converted, around.worker, around.say)
    past = list(all_events(around.run.events))
    rewinds, left_out = rewinds_of(past), left_out_of(past)
    around.team.tell(
        {
            "skip": sorted(rewinds.skip),
            "left_out": [list(left_out.trained.items()), list(left_out.held_out.items())],
            "run": str(around.run.path),
            "folder": str(folder),
            "cache": str(tokens.cache.path),
            "held_out": str(tokens.held_out.path),
            "checkpoint": str(found.path) if found else None,
        }
    )
    model = prepare.build_model(
        config,
        folder,
        tokens.cache,
        around.device,
        around.device_name,
        around.say,
        resume_from=found.path / checkpoint.MODEL if found else None,
        team=around.team,
    )
    prepare.refuse_foreign_ids(model.loaded, tokens.held_out, Path(config.model_path))
    facts = _facts(around, config, tokens, plan)
    groups = prepare.held_out_groups(config, tokens)
    fit = fit_before_start(around, config, model, tokens, plan, groups)
    progress = _progress(config, fit) if found is None else _take_up(around, config, model, facts, found)
    # the checkpoint's tokenizer carries the template that was really trained, not one that was replaced
    if tokens.cache.meta["chat_template"] is not None:
        model.tokenizer.chat_template = tokens.cache.meta["chat_template"]
    saver = Saver(
        around.run.checkpoints,
        around.events,
        model.trained,
        model.tokenizer,
        model.loaded.base_path,
        config.output.save_total_limit,
        found.damaged_steps if found else frozenset(),
        around.promoted,
        found.step if found else None,
    )
    sampler = Sampler(config, prompt, model, tokens, around) if config.eval.sample_steps else None
    leave_if_asked(around)
    saved_step = found.step if found else None
    return Ready(tokens, plan, model, saver, sampler, groups, progress, saved_step, facts, rewinds, left_out, fit)


def _progress(config: Config, fit: Fit | None) -> Progress:
    """Where a run stands that begins."""
    h = config.hyperparams
    packs_each = fit.packs_each if fit is not None else h.batch_size
    return Progress(packs_each=packs_each, checkpointing=h.use_gradient_checkpointing)


def _same_model(around: Surroundings, config: Config) -> None:
    """The model folder must still be what the run was started with: an adapter on other weights is another model."""
    started_with = around.run.snapshot()["model"]["fingerprint"]
    now = fingerprint(Path(config.model_path))
    if now != started_with:
        raise Refusal(
            f"Cannot go on: the model folder {Path(config.model_path).name} changed since the run was made "
            f"({started_with}, now {now}). Put it back, or make a new run.",
            "model_path",
        )


def leave_if_asked(around: Surroundings) -> None:
    """Raise Left when a stop or a pause was asked for."""
    if around.signals.interrupt():
        raise prepare.Left()


def _tokens(around: Surroundings, config: Config, prompt: Prompt) -> prepare.Tokens:
    last_s = [0.0]

    def progress(done: int, total: int) -> None:
        if time.monotonic() - last_s[0] > 0.5 or done == total:
            last_s[0] = time.monotonic()
            around.events.append("phase", name="tokenise", done=done, total=total)

    around.events.append("phase", name="tokenise", done=0, total=None)
    roots = (around.tokens_root, around.profiles_root)
    tokens = prepare.all_tokens(config, prompt, roots, around.worker, around.signals.interrupt, progress)
    meta = tokens.cache.meta
    share = 100 * meta["labels"] / max(1, meta["tokens"])
    unanswered, limit = meta["rows_without_labels"], config.hyperparams.max_length
    late = f", {unanswered:,} without an answer in the first {limit:,} tokens" if unanswered else ""
    around.say(
        f"Data: {meta['rows']:,} rows, {meta['tokens']:,} tokens, {share:.0f} % answer tokens; "
        f"{meta['rows_cut']:,} rows cut, {meta['rows_dropped']:,} dropped, {meta['rows_skipped']:,} unusable{late}."
    )
    if meta["documents"]:
        around.say(
            f"Plain text: {meta['documents']:,} documents in {meta['pieces']:,} rows of at most {limit:,} tokens, none cut."
        )
        if prompt.text:
            around.say("The system prompt is not used for plain text.")
    if meta.get("template_note"):
        around.say(f"Template: {meta['template_note']}")
    return tokens


def _announce(around: Surroundings, config: Config, tokens: prepare.Tokens, plan: Plan) -> None:
    if plan.total_steps == 0:
        raise Refusal("The plan has no step: there is no row to train on.", "data.dataset_path")
    h = config.hyperparams
    lost = waste(plan, np.asarray(tokens.cache.lengths), h.max_length) if h.packing else None
    around.events.append(
        "plan",
        total_steps=plan.total_steps,
        token_key=tokens.cache.meta["key"],
        steps_per_epoch=plan.steps_per_epoch,
        rows=len(tokens.trained_rows),
        held_out_rows=len(plan.held_out),
        rows_per_step=h.rows_per_step,
        waste=lost,
        processes=around.team.size,
    )
    if config.eval.eval_strategy != "no" and config.data.validation_split > 0 and not len(plan.held_out):
        around.say("Nothing is held out, since there is only one row: there will be no held-out loss.")
    packed = f", packs {100 * (1 - lost):.1f} % full" if lost is not None else ""
    around.say(
        f"Plan: {plan.total_steps:,} steps of {h.rows_per_step} {'packs' if packed else 'rows'}, "
        f"{len(plan.held_out):,} rows held out{packed}."
    )


def _facts(around: Surroundings, config: Config, tokens: prepare.Tokens, plan: Plan) -> dict[str, Any]:
    digest = hashlib.sha256()
    for part in (plan.rows, plan.pack_starts, plan.step_packs, plan.held_out):
        digest.update(np.ascontiguousarray(part).tobytes())
    return {
        "token_key": tokens.cache.meta["key"],
        "plan": digest.hexdigest()[:16],
        "seed": config.data.seed,
        "threads": around.threads,
        "processes": around.team.size,
        "model": around.run.snapshot()["model"]["fingerprint"],
        "held_out": tokens.held_out.meta["key"],
        **{key: getattr(config.hyperparams, key) for key in OF_THE_CURVE},
        "lora": config.lora.model_dump(mode="json"),
    }


def _take_up(
    around: Surroundings, config: Config, model: prepare.Model, facts: dict[str, Any], found: checkpoint.Found
) -> Progress:
    state = checkpoint.read_state(found.path)
    # checkpoints of the first versions do not hold the settings
    for key in (*MUST_MATCH, *(key for key in (*OF_THE_CURVE, "lora") if key in state["facts"])):
        if state["facts"].get(key) != facts[key]:
            raise Refusal(
                f"Cannot resume: {key.replace('_', ' ')} was {state['facts'].get(key)} and is now {facts[key]}; the rest "
                "of the curve would be another run's. Put it back, or start a new run from this checkpoint's model."
            )
    progress = restore(config, model, found.path)
    _sane(progress, state, found)
    for line in changed_versions(config, around.run.snapshot().get("versions", {})):
        around.say(line)
    for name, why in found.passed_over:
        text = f"{name} was passed over: {why}. It is kept."
        around.events.append("alert", code="checkpoint", step=found.step, text=text)
    around.say(f"Resuming from step {found.step}.")
    return progress


def _sane(progress: Progress, state: dict[str, Any], found: checkpoint.Found) -> None:
    """Refuse a state whose step is not that of its folder: sealed or not, somebody has changed it."""
    whole = all(type(number) is int for number in (progress.step, progress.packs_each, state.get("step")))
    if not whole or not progress.step == state["step"] == found.step or progress.packs_each < 1:
        raise Refusal(
            f"Cannot resume: {found.path.name} says that it is of step {progress.step!r} with micro-batches of "
            f"{progress.packs_each!r}. Its state was changed; move that folder away to resume from the one before."
        )


def changed_versions(config: Config, then: dict[str, str]) -> list[str]:
    """A warning for each library that is not the one the run was started with."""
    now = versions(config)
    return [
        f"Warning: {name} was {then[name]} and is now {version}. The run goes on; that it is the unbroken run's curve to the "
        "last bit is no longer claimed."
        for name, version in now.items()
        if name in then and then[name] != version
    ]


def restore(config: Config, model: prepare.Model, directory: Path) -> Progress:
    """Optimizer states, scaler and progress of the verified checkpoint in `directory`, its weights being loaded already."""
    state = checkpoint.read_state(directory)
    stepper = model.stepper
    optim.restore(stepper.optimizer, stepper.named, load_optimizer(directory))
    if state.get("scaler"):
        stepper.scaler.load_state_dict(state["scaler"])
    try:
        progress = Progress(**state["progress"])
    except (TypeError, KeyError):
        raise Refusal(f"{directory.name} cannot be resumed from: its state is not one that a run writes.") from None
    if progress.checkpointing and not config.hyperparams.use_gradient_checkpointing:
        recompute(model.loaded.model, config.hyperparams.gradient_checkpointing_policy)
    return progress
