"""The training loop: phases of a run from its tokens to its last checkpoint. Runs on the engine's thread or in a command line.

The loop never waits for a page: it writes the run directory and looks at two flags.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer import checkpoint
from trainer.data.packing import Plan, waste
from trainer.data.tokens import TokenCache
from trainer.events import EventLog
from trainer.launch import Prompt
from trainer.loop import optim, prepare
from trainer.loop.evaluate import held_out_loss, micro_groups
from trainer.loop.sampler import Sampler
from trainer.loop.save import Saver, load_optimizer, snapshot
from trainer.loop.schedule import learning_rate
from trainer.loop.step import StepRecord
from trainer.metrics import MetricsWriter
from trainer.refusal import Refusal
from trainer.run import RunDir
from trainer.schema import Config
from trainer.signals import Signals
from trainer.telemetry import Telemetry
from trainer.worker import Worker

IN_FLIGHT_STEPS = 2
MUST_MATCH = ("token_key", "plan", "seed", "threads", "model_fingerprint")


@dataclass(frozen=True)
class Outcome:
    """How the loop ended; the session adds what it measured and writes the last event."""

    kind: str  # finished, stopped, paused, diverged
    step: int
    fields: dict[str, Any] = field(default_factory=dict)


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


@dataclass
class Progress:
    """Where a run stands; what a checkpoint keeps besides tensors."""

    step: int = 0
    packs_each: int = 1
    checkpointing: bool = False
    best_loss: float | None = None
    best_step: int | None = None
    checks_without_better: int = 0
    elapsed_s: float = 0.0


class Training:
    """One life of a run, from the first token to the last checkpoint."""

    def __init__(self, around: Surroundings, config: Config, prompt: Prompt, skip_eval: bool) -> None:
        self.around, self.config, self.prompt = around, config, prompt
        self.evaluating = not skip_eval and config.eval.eval_strategy != "no"
        self.progress = Progress(
            packs_each=config.hyperparams.batch_size,
            checkpointing=config.hyperparams.use_gradient_checkpointing,
        )
        self.facts: dict[str, Any] = {}
        self.waiting: deque[StepRecord] = deque()
        self.recent: deque[float] = deque(maxlen=50)
        self.last_arrival = time.perf_counter()
        self.diverged_at: int | None = None
        self.saved_step: int | None = None

    # -- phases before the first step

    def prepare(self, found: checkpoint.Found | None) -> None:
        """Tokens, plan, model; with `found` also the state of that checkpoint."""
        around, config = self.around, self.config
        around.say(self.prompt.line)
        self.tokens = self._tokens()
        self.plan = prepare.plan_of(config, self.tokens)
        self._announce_plan()
        self._leave_if_asked()
        around.events.append("phase", name="load")
        self.model = prepare.build_model(
            config,
            Path(config.model_path),
            self.tokens.cache,
            around.device,
            around.device_name,
            around.say,
            resume_from=found.path / checkpoint.MODEL if found else None,
        )
        self.stepper = self.model.stepper
        self.facts = self._facts()
        if found is not None:
            self._take_up(found)
        self._keep_template()
        self.saver = Saver(
            around.run.checkpoints,
            around.events,
            self.model.trained,
            self.model.tokenizer,
            self.model.loaded.base_path,
            config.output.save_total_limit,
        )
        lengths = np.asarray(self.tokens.held_out.lengths)
        self.groups = (
            micro_groups(self.tokens.held_out_rows, lengths, config.hyperparams.max_length * 2)
            if self.evaluating
            else []
        )
        self.sampler = (
            Sampler(config, self.prompt, self.model, self.tokens, around)
            if config.eval.sample_steps
            else None
        )
        self._leave_if_asked()

    def _tokens(self) -> prepare.Tokens:
        around, config = self.around, self.config
        model_path = Path(config.model_path)
        last = [0.0]

        def progress(done: int, total: int) -> None:
            if time.monotonic() - last[0] > 0.5 or done == total:
                last[0] = time.monotonic()
                around.events.append("phase", name="tokenise", done=done, total=total)

        def cached(files: list[str]) -> TokenCache:
            roots = (around.tokens_root, around.profiles_root)
            return prepare.tokenise(
                config,
                self.prompt,
                model_path,
                roots,
                around.worker,
                around.signals.interrupt,
                progress,
                files,
            )

        around.events.append("phase", name="tokenise", done=0, total=None)
        cache = cached([file.path for file in config.data.files])
        held_out = (
            cached([config.data.validation_dataset_path])
            if config.data.validation_dataset_path and self.evaluating
            else None
        )
        meta = cache.meta
        around.say(
            f"Data: {meta['rows']:,} rows, {meta['tokens']:,} tokens, {100 * meta['labels'] / max(1, meta['tokens']):.0f} % answer "
            f"tokens; {meta['rows_cut']:,} rows cut, {meta['rows_dropped']:,} dropped, {meta['rows_skipped']:,} unusable."
        )
        if meta.get("template_note"):
            around.say(f"Template: {meta['template_note']}")
        return prepare.split_rows(config if self.evaluating else _without_held_out(config), cache, held_out)

    def _announce_plan(self) -> None:
        plan, config = self.plan, self.config
        if plan.total_steps == 0:
            raise Refusal("The plan has no step: there is no row to train on.", "data.dataset_path")
        per_epoch = int(plan.epoch_ends[0]) if len(plan.epoch_ends) else plan.total_steps
        lost = (
            waste(plan, np.asarray(self.tokens.cache.lengths), config.hyperparams.max_length)
            if config.hyperparams.packing
            else None
        )
        self.around.events.append(
            "plan",
            total_steps=plan.total_steps,
            steps_per_epoch=per_epoch,
            rows=len(self.tokens.trained_rows),
            held_out_rows=len(plan.held_out),
            rows_per_step=config.hyperparams.rows_per_step,
            waste=lost,
        )
        packed = f", packs {100 * (1 - lost):.1f} % full" if lost is not None else ""
        self.around.say(
            f"Plan: {plan.total_steps:,} steps of {config.hyperparams.rows_per_step} {'packs' if packed else 'rows'}, "
            f"{len(plan.held_out):,} rows held out{packed}."
        )

    def _facts(self) -> dict[str, Any]:
        """What must be the same for a resume to be the same run."""
        snapshot_ = self.around.run.snapshot()
        return {
            "token_key": self.tokens.cache.meta["key"],
            "plan": _plan_hash(self.plan),
            "seed": self.config.data.seed,
            "threads": self.around.threads,
            "model_fingerprint": snapshot_["model"]["fingerprint"],
        }

    def _take_up(self, found: checkpoint.Found) -> None:
        state = checkpoint.read_state(found.path)
        for key in MUST_MATCH:
            if state["facts"].get(key) != self.facts[key]:
                raise Refusal(
                    f"Cannot resume: {key.replace('_', ' ')} was {state['facts'].get(key)} and is now {self.facts[key]}; "
                    "the rest of the curve would be another run's. Put it back, or start a new run from this checkpoint's model."
                )
        optim.restore(self.stepper.optimizer, self.stepper.named, load_optimizer(found.path))
        if state.get("scaler"):
            self.stepper.scaler.load_state_dict(state["scaler"])
        kept = dict(state["progress"])
        if kept["checkpointing"] and not self.progress.checkpointing:
            prepare.switch_checkpointing(
                self.model.loaded, self.config.hyperparams.gradient_checkpointing_policy
            )
        self.progress = Progress(**kept)
        self.saved_step = found.step
        for name, why in found.passed_over:
            self.around.events.append(
                "alert",
                code="checkpoint",
                step=found.step,
                text=f"{name} was passed over: {why}. It is kept.",
            )
        self.around.say(f"Resuming from step {found.step}.")

    def _keep_template(self) -> None:
        """The checkpoint's tokenizer carries the template that was really trained, not one that was replaced."""
        self.model.tokenizer.chat_template = self.tokens.cache.meta["chat_template"]

    def _leave_if_asked(self) -> None:
        if self.around.signals.interrupt():
            raise prepare.Left()

    # -- the loop

    def loop(self) -> Outcome:
        """Train until the plan ends or an end is asked for; the last state is saved either way."""
        around, plan = self.around, self.plan
        self.metrics = MetricsWriter(around.run.metrics, around.run.rows, around.life)
        around.events.append("running", step=self.progress.step)
        try:
            if self.progress.step == 0:
                self._check_held_out()
            around.events.append("phase", name="train")
            self.last_arrival = time.perf_counter()
            while self.progress.step < plan.total_steps:
                if (wish := around.signals.wish).end is not None:
                    return self._ended(
                        "paused" if wish.end == "pause" else "stopped", by=wish.by, now=wish.end == "stop-now"
                    )
                if not self._one_step():
                    continue
                self._arrivals(IN_FLIGHT_STEPS)
                if self.diverged_at is not None:
                    return self._diverged()
                if (ended := self._after_step()) is not None:
                    return ended
            return self._ended("finished")
        finally:
            self.metrics.close()

    def _one_step(self) -> bool:
        """Take the next step; False when a stop left it half done or it has to be played again smaller."""
        number = self.progress.step + 1
        h = self.config.hyperparams
        rate = learning_rate(
            number,
            peak=h.learning_rate,
            warmup_steps=h.warmup_steps,
            total_steps=self.plan.total_steps,
            schedule=h.lr_schedule,
        )
        record = None
        out_of_memory = False
        try:
            groups = self.plan.micro_batches(number, self.progress.packs_each)
            record = self.stepper.step(number, groups, self.tokens.cache, rate, self.around.signals.now)
        except torch.OutOfMemoryError:
            out_of_memory = (
                True  # the frames, and the tensors in them, are gone only after this block is left
            )
        if out_of_memory:
            self._smaller(number)
            return False
        if record is None:
            return False
        self.waiting.append(record)
        self.progress.step = number
        return True

    def _smaller(self, step: int) -> None:
        """One rung down the ladder: half the micro-batch with twice the accumulation, at one row checkpointing."""
        self.stepper.optimizer.zero_grad(set_to_none=True)
        if self.around.device.startswith("cuda"):
            torch.cuda.empty_cache()
        progress = self.progress
        if progress.packs_each > 1:
            before, progress.packs_each = progress.packs_each, progress.packs_each // 2
            did = f"Micro-batch now {progress.packs_each} instead of {before}: each step trains the same tokens. Nothing lost."
        elif not progress.checkpointing:
            prepare.switch_checkpointing(
                self.model.loaded, self.config.hyperparams.gradient_checkpointing_policy
            )
            progress.checkpointing = True
            did = "Gradient checkpointing is now on. Nothing lost; about a quarter slower."
        else:
            rows = self.plan.micro_batches(step, 1)
            longest = max(int(self.tokens.cache.lengths[row]) for group in rows for row in group)
            raise Refusal(
                f"Out of memory at step {step} with one row at a time and checkpointing on (longest row {longest:,} tokens). "
                "Lower the maximum length, or use LoRA."
            )
        self.around.events.append("oom_rung", step=step, text=f"Out of memory at step {step}. {did}")
        self.around.say(f"Out of memory at step {step}. {did}")

    def _arrivals(self, leave: int) -> None:
        """Write the metrics of steps whose values have arrived; wait while more than `leave` are still on their way."""
        while self.waiting and (len(self.waiting) > leave or self.waiting[0].marks.passed()):
            self._write(self.waiting.popleft())

    def _write(self, record: StepRecord) -> None:
        loss, norm, bad, sums = record.arrive()
        now = time.perf_counter()
        seconds, self.last_arrival = now - self.last_arrival, now
        self.progress.elapsed_s += seconds
        forward_backward_s, optimizer_s = record.marks.seconds()
        memory = self.around.telemetry.latest
        self.metrics.step(
            {
                "step": record.step,
                "t": time.time(),
                "elapsed_s": self.progress.elapsed_s,
                "loss": loss,
                "grad_norm": norm,
                "learning_rate": record.rate,
                "labels": record.labels,
                "tokens": record.tokens,
                "rows": len(record.rows),
                "seconds": seconds,
                "data_s": record.data_s,
                "forward_backward_s": forward_backward_s,
                "optimizer_s": optimizer_s,
                "allocated_gib": memory["allocated_gib"],
                "reserved_gib": memory["reserved_gib"],
                "process_gib": memory["process_gib"],
                "device_gib": memory["device_gib"],
                "peak_gib": self._peak_gib(),
            },
            list(zip(record.rows, sums, record.labels_of_row, strict=True)),
        )
        if bad and self.diverged_at is None:
            self.diverged_at = record.step
        self._mark_spike(record.step, loss)

    def _peak_gib(self) -> float:
        if self.around.device.startswith("cuda"):
            return torch.cuda.max_memory_allocated() / 1024**3
        return self.around.telemetry.peak_process_gib

    def _mark_spike(self, step: int, loss: float) -> None:
        limit = self.config.alerts.loss_spike
        if limit and len(self.recent) >= 20 and loss > limit * float(np.median(self.recent)):
            median = float(np.median(self.recent))
            self.around.events.append(
                "alert",
                code="spike",
                step=step,
                text=f"Loss {loss:.3f} at step {step}: {loss / median:.1f} times the median of the last 50.",
            )
        self.recent.append(loss)

    # -- between steps

    def _after_step(self) -> Outcome | None:
        step, config = self.progress.step, self.config
        last = step == self.plan.total_steps
        epoch_end = step in self.plan.epoch_ends
        strategy = config.eval.eval_strategy
        due = strategy == "epoch" and epoch_end or strategy == "steps" and step % config.eval.eval_steps == 0
        if self.evaluating and (due or last):
            self._arrivals(0)
            if self._check_held_out() and self._patience_gone():
                return self._ended(
                    "finished",
                    cause=f"no better held-out loss in {self.progress.checks_without_better} checks",
                )
        if self.sampler and step % config.eval.sample_steps == 0:
            self._arrivals(0)
            self._aside("sample", lambda: self.sampler.write(step))
        asked = self.around.signals.save_asked.is_set()
        if not last and (asked or config.output.save_steps and step % config.output.save_steps == 0):
            self.around.signals.save_asked.clear()
            self._arrivals(0)
            if self.diverged_at is None:
                self._save()
        return None

    def _aside(self, phase: str, work: Callable[[], Any]) -> Any:
        """Do something that is not a step; its time is not counted to the next step."""
        self.around.events.append("phase", name=phase)
        result = work()
        self.around.events.append("phase", name="train")
        self.last_arrival = time.perf_counter()
        return result

    def _check_held_out(self) -> bool:
        """Measure held-out loss; True when it was measured (and not left for a stop)."""
        if not self.groups or self.diverged_at is not None:
            return False
        loss = self._aside(
            "eval",
            lambda: held_out_loss(
                self.model.loaded.model,
                self.model.trained,
                self.tokens.held_out,
                self.groups,
                self.model.choice.path,
                self.around.device,
                self.around.signals.interrupt,
            ),
        )
        if loss is None:
            return False
        progress = self.progress
        best = progress.best_loss is None or loss < progress.best_loss
        if best:
            progress.best_loss, progress.best_step, progress.checks_without_better = loss, progress.step, 0
        else:
            progress.checks_without_better += 1
        self.around.events.append(
            "eval", step=progress.step, loss=loss, rows=len(self.plan.held_out), best=best
        )
        if best and self.config.hyperparams.early_stopping_patience and progress.step:
            self._save()  # the best weights must exist when the run stops for want of better ones
        return True

    def _patience_gone(self) -> bool:
        patience = self.config.hyperparams.early_stopping_patience
        return bool(patience) and self.progress.checks_without_better >= patience

    def _save(self) -> None:
        """Copy the state off the device and let it be written; training goes on meanwhile."""
        progress = self.progress
        state = {
            "step": progress.step,
            "progress": vars(progress),
            "best_step": progress.best_step,
            "facts": self.facts,
            "scaler": self.stepper.scaler.state_dict() or None,
        }
        pinned = {progress.best_step} if progress.best_step is not None else set()
        self._aside(
            "save",
            lambda: self.saver.save(
                snapshot(
                    progress.step, self.model.trained, self.stepper.named, self.stepper.optimizer, state
                ),
                pinned,
            ),
        )
        self.saved_step = progress.step

    # -- ends

    def _ended(self, kind: str, **fields: Any) -> Outcome:
        self._arrivals(0)
        if self.diverged_at is not None:
            return self._diverged()
        if self.progress.step not in (0, self.saved_step) and not fields.get("now"):
            self._save()
        self.saver.wait()
        saved = checkpoint.listed(self.around.run.checkpoints)
        size = (
            sum(file.stat().st_size for file in saved[0][1].rglob("*") if file.is_file()) if saved else None
        )
        fields |= {
            "saved_step": saved[0][0] if saved else None,
            "saved_bytes": size,
            "save_s": self.saver.last_seconds,
        }
        return Outcome(kind, self.progress.step, fields)

    def _diverged(self) -> Outcome:
        self.saver.wait()
        saved = checkpoint.listed(self.around.run.checkpoints)
        rate = self.config.hyperparams.learning_rate
        cause = (
            f"loss or gradient became NaN or infinite at step {self.diverged_at}. Those weights are not saved. "
            f"Common cause: learning rate too high ({rate:.2g})."
        )
        return Outcome(
            "diverged",
            int(self.diverged_at or 0),
            {"cause": cause, "saved_step": saved[0][0] if saved else None},
        )


def _without_held_out(config: Config) -> Config:
    return config.model_copy(update={"eval": config.eval.model_copy(update={"eval_strategy": "no"})})


def _plan_hash(plan: Plan) -> str:
    import hashlib

    digest = hashlib.sha256()
    for part in (plan.rows, plan.pack_starts, plan.step_packs, plan.held_out):
        digest.update(np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()[:16]
