"""The training loop: phases of a run from its tokens to its last checkpoint. Runs on the engine's thread or in a command line.

The loop never waits for a page: it writes the run directory and looks at two flags.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer import bad_rows, checkpoint
from trainer.data.loader import BadRow, read_row
from trainer.data.tokens import TokenCache
from trainer.loop import shortage
from trainer.loop.curve import Curve
from trainer.loop.diverged import cause_of
from trainer.loop.evaluate import groups_without, held_out_loss
from trainer.loop.ready import Ready, Surroundings
from trainer.loop.saves import Saves
from trainer.loop.schedule import learning_rate
from trainer.loop.step import UpdateOutOfMemory
from trainer.loop.team import Order, Word
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
        self.update_broke = False  # memory ran out between the weights of two steps

    def loop(self) -> Outcome:
        """Train until the plan ends or an end is asked for; the last state is saved either way."""
        outcome = self._steps()
        self.around.team.order(Order(Word.END))
        return outcome

    def _steps(self) -> Outcome:
        around, plan = self.around, self.plan
        self.curve = Curve(around, self.progress, self.config.alerts.loss_spike)
        self.saves = Saves(around, self.ready, self.curve, self.config.alerts.disk_free_gb)
        around.events.append("running", step=self.progress.step)
        try:
            # before the first step, and after a resume where a stop cut the check short
            if self._check_due():
                measured = self.progress.measured_step == self.progress.step
                if self._enough() if measured else self._checked_enough():
                    return self._without_better()
            around.events.append("phase", name="train")
            self.curve.last_arrival = time.perf_counter()
            while self.progress.step < plan.total_steps:
                if (wish := around.signals.wish).end is not None:
                    return self._ended(
                        "paused" if wish.end == "pause" else "stopped", by=wish.by, now=wish.end == "stop-now"
                    )
                if not self._one_step():
                    if self.update_broke:
                        return self._out_of_memory_in_update()
                    continue
                self.curve.arrivals(IN_FLIGHT_STEPS)
                if self.curve.diverged is not None:
                    return self._diverged()
                if (ended := self._after_step()) is not None:
                    return ended
            return self._ended("finished")
        finally:
            self.saver.join()  # a file still being written must not outlive the run's lock
            self.curve.close()

    def _one_step(self) -> bool:
        """Take the next step; False when a stop left it half done or it has to be played again smaller."""
        number = self.progress.step + 1
        rate = self._rate(number)
        record = None
        out_of_memory = ordered = False
        team = self.around.team
        packs_each = self.plan.packs_each(number, self.progress.packs_each, team.size)
        without = self.ready.rewinds.skip | self.ready.left_out.at(number)
        try:
            groups = self.plan.micro_batches(number, packs_each, without=without)
            if not groups:  # all of its rows are skipped since a rewind, or bad: a step of nothing leaves no record
                self.curve.nothing(number)
                self.progress.step = number
                return True
            if team.size > 1:  # once ordered, the others are inside the step and wait for this one
                self._look_at(groups, self.tokens.cache)
            team.order(Order(Word.STEP, number, packs_each, rate))
            ordered = team.size > 1
            # the others of a team are inside the step by now and would wait for this one's gradients
            interrupt = self.around.signals.now if team.size == 1 else None
            record = self.stepper.step(number, groups, self.tokens.cache, rate, interrupt)
        except BadRow as bad:
            if ordered:  # it turned bad since it was looked at; the others are in the step, with or without it
                raise self._refuse_row(bad, self.tokens.cache) from None
            self._leave_out(bad, held_out=False)
            return False
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
        self.curve.expect(record)
        self.progress.step = number
        return True

    def _rate(self, step: int) -> float:
        h = self.config.hyperparams
        planned = learning_rate(
            step,
            peak=h.learning_rate,
            warmup_steps=h.warmup_steps,
            total_steps=self.plan.total_steps,
            schedule=h.lr_schedule,
        )
        return planned * self.ready.rewinds.rate_factor

    def _look_at(self, groups: list[np.ndarray], cache: TokenCache) -> None:
        """Raise BadRow for the first row that cannot be trained or measured."""
        for group in groups:
            for row in group:
                read_row(cache, int(row), self.stepper.vocabulary)

    def _leave_out(self, bad: BadRow, *, held_out: bool) -> None:
        """Go on without a bad row, if the settings say so and it is not one of too many; else raise Refusal."""
        left_out, team = self.ready.left_out, self.around.team
        cache = self.tokens.held_out if held_out else self.tokens.cache
        step = self.progress.step + (not held_out)
        left_out.add(bad.row, step, held_out=held_out)
        if self.config.data.bad_row == "stop" or left_out.too_many(len(cache.lengths)):
            raise self._refuse_row(bad, cache)
        place = cache.place_words(bad.row)
        text = bad_rows.sentence(place, bad.reason, step, left_out, held_out=held_out)
        file, line, *_ = cache.place(bad.row)
        name = Path(cache.meta["files"][file]["path"]).name
        # on the disk before anything is trained without it: a later life must leave out the same
        self.around.events.append(
            bad_rows.KIND, step=step, row=bad.row, file=name, line=line, held_out=held_out, cause=bad.reason, text=text
        )
        self.around.say(text)
        team.order(Order(Word.BAD_HELD_OUT if held_out else Word.BAD_ROW, step, row=bad.row))

    def _refuse_row(self, bad: BadRow, cache: TokenCache) -> Refusal:
        """Save what is trained so far, and say which row stopped the run and what mends it."""
        self.curve.arrivals(0)
        unsaved = ""
        try:
            if self.progress.step and self.curve.diverged is None:
                self.saves.save(last=True)
            self.saver.wait()
        except Refusal as refusal:
            unsaved = f" {refusal.message}"
        before = self.ready.left_out.count - 1
        many = f"{before:,} bad rows were left out before, and more are no accident. " if before > 0 else ""
        return Refusal(
            f"{many}Row {bad.row:,} ({cache.place_words(bad.row)}) stopped step {self.progress.step + 1}: {bad.reason}. "
            f"The token cache {cache.path.name} is damaged. Delete that folder in cache/tokens and resume: it is made again."
            + unsaved,
            "data.dataset_path",
        )

    def _out_of_memory_in_update(self) -> Outcome:
        """Some weights may be of this step and some of the one before: only a checkpoint is sure to be of one step."""
        self.curve.arrivals(0)
        if self.curve.diverged is not None:
            return self._diverged()
        self.saver.join()
        return Outcome("memory", self.progress.step + 1, {"progress": self.progress})

    # -- between steps

    def _after_step(self) -> Outcome | None:
        step, config = self.progress.step, self.config
        last = step == self.plan.total_steps
        if self._check_due():
            self.curve.arrivals(0)
            if self._checked_enough():
                return self._without_better()
        if self.sampler and step % config.eval.sample_steps == 0:
            self.curve.arrivals(0)
            sampler = self.sampler
            self.curve.aside("sample", lambda: sampler.write(step))
        self.saves.watch_disk()
        self.saves.look()
        asked = self.around.signals.save_asked.is_set()
        if not last and (asked or config.output.save_steps and step % config.output.save_steps == 0):
            self.around.signals.save_asked.clear()
            self.curve.arrivals(0)
            if self.curve.diverged is None:
                self.saves.save(asked=asked)
        return None

    def _check_due(self) -> bool:
        """Whether held-out loss is measured at the step reached: before the first, where the settings say, at the end."""
        step, settings = self.progress.step, self.config.eval
        if not self._held_out_groups():
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
        if self.curve.diverged is not None:
            return False
        loss = self.curve.aside("eval", self._held_out_loss)
        if loss is None:
            return False
        progress = self.progress
        best = progress.best_loss is None or loss < progress.best_loss
        progress.measured_loss, progress.measured_step = loss, progress.step
        if best:
            progress.best_loss, progress.best_step, progress.checks_without_better = loss, progress.step, 0
        else:
            progress.checks_without_better += 1
        self.around.events.append(
            "eval", step=progress.step, loss=loss, rows=sum(map(len, self._held_out_groups())), best=best
        )
        if best and self.config.hyperparams.early_stopping_patience and progress.step:
            self.saves.save()  # the best weights must exist when the run stops for want of better ones
        return True

    def _held_out_groups(self) -> list[np.ndarray]:
        """The rows that are measured now."""
        return groups_without(self.ready.held_out_groups, self.ready.left_out.held_out_at(self.progress.step))

    def _readable_held_out(self) -> bool:
        """Leave out held-out rows that turned bad, or raise Refusal; False when none is left to be measured."""
        while groups := self._held_out_groups():
            try:
                self._look_at(groups, self.tokens.held_out)
            except BadRow as bad:
                self._leave_out(bad, held_out=True)
            else:
                return True
        return False

    def _held_out_loss(self) -> float | None:
        if not self._readable_held_out():
            return None
        self.around.team.order(Order(Word.HELD_OUT, self.progress.step))
        while True:
            try:
                return held_out_loss(
                    self.model.loaded.model,
                    self.model.trained,
                    self.tokens.held_out,
                    self._held_out_groups(),
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

    # -- ends

    def _ended(self, kind: str, **fields: Any) -> Outcome:
        self.curve.arrivals(0)
        if self.curve.diverged is not None:
            return self._diverged()
        if fields.get("now"):
            self.saver.join()  # what could not be saved before was told then, and nothing is to be saved now
        else:
            self._save_last(fields.get("by", ""))
        step = self.saver.whole_step  # the newest on the disk may be a damaged one that was passed over
        folder = checkpoint.directory_of(self.around.run.checkpoints, step) if step is not None else None
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder else None
        fields |= {
            "saved_step": step,
            "saved_bytes": size,
            "save_s": self.saver.last_seconds,
        }
        return Outcome(kind, self.progress.step, fields)

    def _save_last(self, by: str) -> None:
        """Save the step reached and wait for it; Refusal when it cannot be, which names who waits for it."""
        try:
            if self.progress.step:
                self.saves.save(last=True)
            self.saver.wait()
        except Refusal as refusal:
            word = "pause" if self.around.signals.wish.end == "pause" else "stop"
            asked = f"A {word} was asked by {by}, but what was to be saved is not. " if by else ""
            raise Refusal(asked + refusal.message) from None
        self.saves.look()

    def _diverged(self) -> Outcome:
        assert self.curve.diverged is not None
        record, sums = self.curve.diverged
        self.saver.join()  # a save that went wrong was told as an alert; the end is this divergence
        cause, rows = cause_of(record, sums, self.tokens.cache, self.config)
        return Outcome(
            "diverged",
            record.step,
            {"cause": cause, "rows": rows, "saved_step": self.saver.whole_step},
        )
