"""Which state of a run is saved and which stays: its best checkpoint is pinned, and a copy that finds no memory costs a save."""

from __future__ import annotations

import time
from typing import Any

import torch

from trainer import checkpoint
from trainer.loop.curve import Curve
from trainer.loop.ready import Ready, Surroundings
from trainer.loop.save import snapshot

DISK_LOOK_S = 10.0
RETRY_S, LONGEST_RETRY_S = 60.0, 3600.0
"""A save that found no room is tried again after this time, when there is room; each one that then fails doubles it."""


class Saves:
    """Copies the state of a run off the device and hands it to the thread that writes it."""

    def __init__(self, around: Surroundings, ready: Ready, curve: Curve, disk_free_gb: float) -> None:
        self._around, self._ready, self._curve = around, ready, curve
        self._saver, self._progress = ready.saver, ready.progress
        self._saved_step = ready.saved_step
        self._best_before: tuple[float | None, int | None] = (None, None)  # the best saved one before the newest save
        self._disk_free_gb = disk_free_gb
        self._disk_checked_s = 0.0
        self._disk_is_low = False
        self._owed_since: int | None = None  # the first step of those that found no room
        self._tried_s, self._retry_s = 0.0, RETRY_S

    def save(self, *, last: bool = False, asked: bool = False) -> None:
        """Copy the state off the device and let it be written; training goes on meanwhile.

        A disk without room costs the save and not the run: an alert, and `look` tries again. `last`: nothing comes after
        this one, so whoever waits for it is told. `asked`: a person waits for the answer.
        """
        progress, saver = self._progress, self._saver
        saver.join()
        if self._owed_since is not None and not last and not saver.has_room:
            saver.newest_step = progress.step
            self._found_no_room(asked)
            return  # known already, and not worth a copy
        if progress.best_saved_step == self._saved_step != saver.whole_step:  # that one was never written after all
            progress.best_saved_loss, progress.best_saved_step = self._best_before
        if saver.failed:  # also of this very step: there may be room by now
            self._saved_step = None
        self._best_before = progress.best_saved_loss, progress.best_saved_step
        loss = progress.measured_loss if progress.measured_step == progress.step else None
        if loss is not None and (progress.best_saved_loss is None or loss < progress.best_saved_loss):
            progress.best_saved_loss, progress.best_saved_step = loss, progress.step
        if progress.step == self._saved_step:  # also one that was saved first and measured after a resume
            return
        state = {
            "step": progress.step,
            "progress": dict(vars(progress)),  # a copy: the loop goes on while the files are written
            "best_step": progress.best_saved_step,
            "facts": self._ready.facts,
            "scaler": self._ready.model.stepper.scaler.state_dict() or None,
        }
        pinned = {progress.best_saved_step} if progress.best_saved_step is not None else set()
        if self._curve.aside("save", lambda: self._copy_and_write(state, pinned)):
            self._saved_step = progress.step
        else:
            progress.best_saved_loss, progress.best_saved_step = self._best_before
            if saver.wants_room and not last:
                self._found_no_room(asked)

    def look(self) -> None:
        """Once a step: try a save again that found no room, when there is some, and say when one is on the disk."""
        saver = self._saver
        if saver.writing or (self._owed_since is None and not saver.wants_room):
            return
        if not saver.failed:
            text = f"Saving works again: step {saver.whole_step} is on the disk. None was saved from {self._owed_since} on."
            self._around.say(text)
            self._owed_since, self._retry_s = None, RETRY_S
        elif self._owed_since is None:  # the disk was filled while it was written: an alert of the saver's own says so
            self._owe()
        elif time.monotonic() - self._tried_s >= self._retry_s:
            self._tried_s = time.monotonic()
            if saver.has_room:
                self._retry_s = min(2 * self._retry_s, LONGEST_RETRY_S)
                self._curve.arrivals(0)
                if self._curve.diverged is None:
                    self.save()

    def _found_no_room(self, asked: bool) -> None:
        """Mark the run at the first of the saves that found no room, and at each that a person asked for."""
        if self._owed_since is None or asked:
            self._around.events.append("alert", code="save", step=self._progress.step, text=self._no_room())
        self._owe()

    def _owe(self) -> None:
        """Note that a save found no room; the first one is told to whoever is away."""
        self._tried_s = time.monotonic()
        if self._owed_since is None:
            self._owed_since = self._saver.newest_step
            self._around.say(self._no_room())
            self._around.tell(self._no_room())

    def _no_room(self) -> str:
        safe = self._saver.whole_step
        stands = f"Safe: step {safe}." if safe is not None else "Nothing of this run is saved yet."
        return f"{self._saver.room_words()} {stands} Training goes on, and saves as soon as there is room."

    def _copy_and_write(self, state: dict[str, Any], pinned: set[int]) -> bool:
        """False where there is no memory for the copy: that is told, and costs this save, not the run."""
        model, step = self._ready.model, self._progress.step
        try:
            shot = snapshot(step, model.trained, model.stepper.named, model.stepper.optimizer, state)
        except (MemoryError, torch.OutOfMemoryError):
            pass
        except RuntimeError as error:  # what torch's own allocator on the host raises
            if "allocate memory" not in str(error):
                raise
        else:
            return self._saver.save(shot, pinned, self._curve.metrics.sync)
        self._saver.refuse(step, "there is not enough memory for a copy of the weights")
        return False

    def watch_disk(self) -> None:
        """Mark the run when the disk runs low, once each time it falls below the limit; looked at every 10 s."""
        if time.monotonic() - self._disk_checked_s < DISK_LOOK_S:
            return
        self._disk_checked_s = time.monotonic()
        free_gb = checkpoint.free_bytes(self._around.run.path) / 1e9
        low = free_gb < self._disk_free_gb
        if low and not self._disk_is_low:
            text = f"{free_gb:.1f} GB of disk is free, less than {self._disk_free_gb:g} GB. Free some, or saving will stop."
            self._around.events.append("alert", code="disk", step=self._progress.step, text=text)
        self._disk_is_low = low
