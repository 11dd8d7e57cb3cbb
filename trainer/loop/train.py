"""The training loop: phases of a run from its tokens to its last checkpoint. Runs on the engine's thread or in a command line.

The loop never waits for a page: it writes the run directory and looks at two flags.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from trainer import checkpoint, clock
from trainer.data.loader import BadRow, read_row
from trainer.data.tokens import TokenCache
from trainer.loop import shortage
from trainer.loop.diverged import cause_of
from trainer.loop.evaluate import held_out_loss
from trainer.loop.ready import Ready, Surroundings
from trainer.loop.save import snapshot
from trainer.loop.schedule import learning_rate
from trainer.loop.step import StepRecord, UpdateOutOfMemory
from trainer.loop.team import Order, Word
from trainer.metrics import MetricsWriter, read_metrics
from trainer.refusal import Refusal
from trainer.schema import Config

IN_FLIGHT_STEPS = 2


@dataclass(frozen=True)
class Outcome:
    """How the loop ended; the session adds what it measured and writes the last event."""

    kind: str  # finished, stopped, paused, diverged; "memory": go back to a checkpoint, and on from there with less
    step: int
    fields: dict[str, Any] = field(default_factory=dict)


class Training:
    """One life of a run, from the first token to the last checkpoint."""

    def __init__(self, around: Surroundings, config: Config, ready: Ready) -> None:
        self.around, self.config, self.ready = around, config, ready
        self.plan, self.tokens, self.model = ready.plan, ready.tokens, ready.model
        self.stepper, self.saver, self.sampler = ready.model.stepper, ready.saver, ready.sampler
        self.progress = ready.progress
        self.saved_step = ready.saved_step
        self.best_before: tuple[float | None, int | None] = (None, None)  # the best saved one before the newest save
        self.waiting: deque[StepRecord] = deque()
        # what a spike is measured against: with the steps of earlier lives, so that a resume marks what it would have
        past = read_metrics(around.run.metrics)
        self.recent: deque[float] = deque(past["loss"][past["step"] <= ready.progress.step].tolist(), maxlen=50)
        self.last_arrival = time.perf_counter()
        self.diverged: tuple[StepRecord, list[float]] | None = None  # the first bad step and its rows' loss sums
        self.update_broke = False  # memory ran out between the weights of two steps
        self.skip_said = False
        self.disk_checked = 0.0
        self.disk_is_low = False

    def loop(self) -> Outcome:
        """Train until the plan ends or an end is asked for; the last state is saved either way."""
        outcome = self._steps()
        self.around.team.order(Order(Word.END))
        return outcome

    def _steps(self) -> Outcome:
        around, plan = self.around, self.plan
        self.metrics = MetricsWriter(around.run.metrics, around.run.rows, around.life)
        around.events.append("running", step=self.progress.step)
        try:
            # before the first step, and after a resume where a stop cut the check short
            if self._check_due():
                measured = self.progress.measured_step == self.progress.step
                if self._enough() if measured else self._checked_enough():
                    return self._without_better()
            around.events.append("phase", name="train")
            self.last_arrival = time.perf_counter()
            while self.progress.step < plan.total_steps:
                if (wish := around.signals.wish).end is not None:
                    return self._ended(
                        "paused" if wish.end == "pause" else "stopped", by=wish.by, now=wish.end == "stop-now"
                    )
                if not self._one_step():
                    if self.update_broke:
                        return self._out_of_memory_in_update()
                    continue
                self._arrivals(IN_FLIGHT_STEPS)
                if self.diverged is not None:
                    return self._diverged()
                if (ended := self._after_step()) is not None:
                    return ended
            return self._ended("finished")
        finally:
            self.saver.join()  # a file still being written must not outlive the run's lock
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
        rate *= self.ready.rewinds.rate_factor
        record = None
        out_of_memory = False
        team = self.around.team
        packs_each = self.plan.packs_each(number, self.progress.packs_each, team.size)
        try:
            groups = self.plan.micro_batches(number, packs_each, without=self.ready.rewinds.skip)
            if not groups:  # every row of it is skipped since a rewind: a step of nothing leaves no record
                self.progress.step = number
                return True
            team.order(Order(Word.STEP, number, packs_each, rate))
            # the others of a team are inside the step by now and would wait for this one's gradients
            interrupt = self.around.signals.now if team.size == 1 else None
            record = self.stepper.step(number, groups, self.tokens.cache, rate, interrupt)
        except BadRow as bad:
            raise self._refuse_row(bad, self.tokens.cache) from None
        except torch.OutOfMemoryError:
            out_of_memory = True  # the frames, and the tensors in them, are gone only after this block is left
        except UpdateOutOfMemory:
            self.update_broke = True
            return False
        if out_of_memory:
            shortage.smaller(self, number)
            return False
        if record is None:
            return False
        self.waiting.append(record)
        self.progress.step = number
        return True

    def _refuse_row(self, bad: BadRow, cache: TokenCache) -> Refusal:
        """Save what is trained so far, and say which row stopped the run and what mends it."""
        self._arrivals(0)
        if self.progress.step and self.diverged is None:
            self._save()
        self.saver.wait()
        return Refusal(
            f"Row {bad.row:,} ({cache.place_words(bad.row)}) stopped step {self.progress.step + 1}: {bad.reason}. "
            f"The token cache {cache.path.name} is damaged. Delete that folder in cache/tokens and resume: it is made again.",
            "data.dataset_path",
        )

    def _out_of_memory_in_update(self) -> Outcome:
        """Some weights may be of this step and some of the one before: only a checkpoint is sure to be of one step."""
        self._arrivals(0)
        if self.diverged is not None:
            return self._diverged()
        self.saver.join()
        return Outcome("memory", self.progress.step + 1, {"progress": self.progress})

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
        values = {
            "step": record.step,
            "t": clock.now(),
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
        }
        try:
            self.metrics.step(values, list(zip(record.rows, sums, record.labels_of_row, strict=True)))
        except OSError as error:  # a full disk leaves a gap in the curve; the training goes on
            if not self.disk_is_low:
                self.disk_is_low = True
                self.around.say(
                    f"Step {record.step} could not be recorded: {error.strerror or error}. Training goes on."
                )
        if bad and self.diverged is None:
            self.diverged = record, sums
        elif not np.isfinite(norm) and not self.skip_said:
            self.skip_said = True
            self.around.say(
                f"The gradient of step {record.step} did not fit into fp16: the step was skipped and the loss scale halved, "
                "as fp16 does now and then. Said once."
            )
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

    def _watch_disk(self) -> None:
        """Mark the run when the disk runs low, once each time it falls below the limit; looked at every 10 s."""
        if time.monotonic() - self.disk_checked < 10:
            return
        self.disk_checked = time.monotonic()
        free_gb = checkpoint.free_bytes(self.around.run.path) / 1e9
        low = free_gb < self.config.alerts.disk_free_gb
        if low and not self.disk_is_low:
            limit = self.config.alerts.disk_free_gb
            text = f"{free_gb:.1f} GB of disk is free, less than {limit:g} GB. Free some, or saving will stop."
            self.around.events.append("alert", code="disk", step=self.progress.step, text=text)
        self.disk_is_low = low

    # -- between steps

    def _after_step(self) -> Outcome | None:
        step, config = self.progress.step, self.config
        last = step == self.plan.total_steps
        if self._check_due():
            self._arrivals(0)
            if self._checked_enough():
                return self._without_better()
        if self.sampler and step % config.eval.sample_steps == 0:
            self._arrivals(0)
            sampler = self.sampler
            self._aside("sample", lambda: sampler.write(step))
        self._watch_disk()
        asked = self.around.signals.save_asked.is_set()
        if not last and (asked or config.output.save_steps and step % config.output.save_steps == 0):
            self.around.signals.save_asked.clear()
            self._arrivals(0)
            if self.diverged is None:
                self._save()
        return None

    def _aside(self, phase: str, work: Callable[[], Any]) -> Any:
        """Do something that is not a step; its time is not counted to the next step."""
        self.around.events.append("phase", name=phase)
        result = work()
        self.around.events.append("phase", name="train")
        self.last_arrival = time.perf_counter()
        return result

    def _check_due(self) -> bool:
        """Whether held-out loss is measured at the step reached: before the first, where the settings say, at the end."""
        step, settings = self.progress.step, self.config.eval
        if not self.ready.held_out_groups:
            return False
        if step in (0, self.plan.total_steps):
            return True
        return step in self.plan.epoch_ends if settings.eval_strategy == "epoch" else step % settings.eval_steps == 0

    def _checked_enough(self) -> bool:
        """Measure held-out loss; True when that was the last check that early stopping waits for."""
        return self._check_held_out() and self._enough()

    def _enough(self) -> bool:
        """Whether early stopping waits no longer, by the checks made so far."""
        patience = self.config.hyperparams.early_stopping_patience
        return bool(patience) and self.progress.checks_without_better >= patience

    def _without_better(self) -> Outcome:
        return self._ended("finished", cause=f"no better held-out loss in {self.progress.checks_without_better} checks")

    def _check_held_out(self) -> bool:
        """Measure held-out loss; True when it was measured (and not left for a stop)."""
        if self.diverged is not None:
            return False
        self.around.team.order(Order(Word.HELD_OUT))
        loss = self._aside("eval", self._held_out_loss)
        if loss is None:
            return False
        progress = self.progress
        best = progress.best_loss is None or loss < progress.best_loss
        progress.measured_loss, progress.measured_step = loss, progress.step
        if best:
            progress.best_loss, progress.best_step, progress.checks_without_better = loss, progress.step, 0
        else:
            progress.checks_without_better += 1
        self.around.events.append("eval", step=progress.step, loss=loss, rows=len(self.plan.held_out), best=best)
        if best and self.config.hyperparams.early_stopping_patience and progress.step:
            self._save()  # the best weights must exist when the run stops for want of better ones
        return True

    def _held_out_loss(self) -> float | None:
        try:
            for group in self.ready.held_out_groups:
                for row in group:
                    read_row(self.tokens.held_out, int(row), self.stepper.vocabulary)
        except BadRow as bad:
            raise self._refuse_row(bad, self.tokens.held_out) from None
        while True:
            try:
                return held_out_loss(
                    self.model.loaded.model,
                    self.model.trained,
                    self.tokens.held_out,
                    self.ready.held_out_groups,
                    self.model.choice.path,
                    self.around.device,
                    self.around.signals.interrupt,
                    self.around.team,
                )
            except torch.OutOfMemoryError:
                if self.around.team.size > 1:  # the others wait for this one's sums
                    raise
            if not shortage.smaller_groups(self):
                return None

    def _save(self) -> None:
        """Copy the state off the device and let it be written; training goes on meanwhile."""
        progress = self.progress
        self.saver.join()
        if progress.best_saved_step == self.saved_step != self.saver.whole_step:  # that one was never written after all
            progress.best_saved_loss, progress.best_saved_step = self.best_before
        self.best_before = progress.best_saved_loss, progress.best_saved_step
        loss = progress.measured_loss if progress.measured_step == progress.step else None
        if loss is not None and (progress.best_saved_loss is None or loss < progress.best_saved_loss):
            progress.best_saved_loss, progress.best_saved_step = loss, progress.step
        if progress.step == self.saved_step:  # also one that was saved first and measured after a resume
            return
        state = {
            "step": progress.step,
            "progress": dict(vars(progress)),  # a copy: the loop goes on while the files are written
            "best_step": progress.best_saved_step,
            "facts": self.ready.facts,
            "scaler": self.stepper.scaler.state_dict() or None,
        }
        pinned = {progress.best_saved_step} if progress.best_saved_step is not None else set()
        if self._aside("save", lambda: self._copy_and_write(state, pinned)):
            self.saved_step = progress.step
        else:
            progress.best_saved_loss, progress.best_saved_step = self.best_before

    def _copy_and_write(self, state: dict[str, Any], pinned: set[int]) -> bool:
        """False where there is no memory for the copy: that is told, and costs this save, not the run."""
        stepper, step = self.stepper, self.progress.step
        try:
            shot = snapshot(step, self.model.trained, stepper.named, stepper.optimizer, state)
        except (MemoryError, torch.OutOfMemoryError):
            pass
        except RuntimeError as error:  # what torch's own allocator on the host raises
            if "allocate memory" not in str(error):
                raise
        else:
            self.saver.save(shot, pinned, self.metrics.sync)
            return True
        self.saver.refuse(step, "there is not enough memory for a copy of the weights")
        return False

    # -- ends

    def _ended(self, kind: str, **fields: Any) -> Outcome:
        self._arrivals(0)
        if self.diverged is not None:
            return self._diverged()
        if self.progress.step and not fields.get("now"):
            self._save()
        self.saver.wait()
        step = self.saver.whole_step  # the newest on the disk may be a damaged one that was passed over
        folder = checkpoint.directory_of(self.around.run.checkpoints, step) if step is not None else None
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder else None
        fields |= {
            "saved_step": step,
            "saved_bytes": size,
            "save_s": self.saver.last_seconds,
        }
        return Outcome(kind, self.progress.step, fields)

    def _diverged(self) -> Outcome:
        assert self.diverged is not None
        record, sums = self.diverged
        self.saver.join()  # a save that went wrong was told as an alert; the end is this divergence
        cause, rows = cause_of(record, sums, self.tokens.cache, self.config)
        return Outcome(
            "diverged",
            record.step,
            {"cause": cause, "rows": rows, "saved_step": self.saver.whole_step},
        )
