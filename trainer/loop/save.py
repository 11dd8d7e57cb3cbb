"""Saving a run: a copy off the device while training waits, then files written by a thread of their own."""

from __future__ import annotations

import errno
import re
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trainer import checkpoint
from trainer.disk_need import file_size
from trainer.events import EventLog
from trainer.files import write_json
from trainer.loop import optim
from trainer.refusal import Refusal

MARGIN = 1.05  # tokenizer, manifest and headers beside the tensors
Promoted = Callable[[], AbstractContextManager[set[int]]]
"""Steps of the run that are, or were, somebody's current model; none is promoted while the context is open."""


@dataclass(frozen=True)
class Snapshot:
    """Everything of one step, in host memory of its own."""

    step: int
    weights: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    state: dict[str, Any]

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors; the files need little more."""
        tensors = {t.data_ptr(): t.nbytes for t in [*self.weights.values(), *self.optimizer.values()]}
        return sum(tensors.values())


def copy_to_host(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies that share nothing with the model; tensors tied to each other stay tied. (`.cpu()` would alias on a CPU.)"""
    copies: dict[int, torch.Tensor] = {}
    host = {}
    for name, tensor in tensors.items():
        key = tensor.data_ptr() if tensor.numel() else id(tensor)
        if key not in copies:
            copies[key] = tensor.detach().to("cpu", copy=True)
        host[name] = copies[key]
    return host


def snapshot(
    step: int,
    trained: nn.Module,
    named: list[tuple[str, nn.Parameter]],
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
) -> Snapshot:
    """Copy weights (of an adapter: its matrices alone) and optimizer states off the device."""
    weights = get_peft_model_state_dict(trained) if isinstance(trained, PeftModel) else trained.state_dict()
    # states of the 8-bit optimizer share their tables; files must not, so these copies are each their own
    states = {name: t.detach().to("cpu", copy=True) for name, t in optim.state_by_name(optimizer, named).items()}
    return Snapshot(step, copy_to_host(weights), states, state)


class Saver:
    """Writes checkpoints of one run, one at a time; a second save waits for the first and is never dropped."""

    def __init__(
        self,
        checkpoints: Path,
        events: EventLog,
        trained: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        base_path: Path,
        keep: int,
        damaged: frozenset[int] = frozenset(),
        promoted: Promoted = lambda: nullcontext(set()),
        whole_step: int | None = None,
    ) -> None:
        self._checkpoints = checkpoints
        self.whole_step = whole_step  # the newest that is known to be whole: resumed from, or written since
        self._events = events
        self._trained = trained
        self._tokenizer = tokenizer
        self._base_path = base_path
        self._keep = keep
        self._damaged = damaged  # steps that the resume passed over: they count for nothing among those kept
        self._promoted = promoted  # asked at each pruning
        self._thread: threading.Thread | None = None
        self._failure: str | None = None  # what `wait` raises: why the newest save is not on the disk
        self.wants_room = False  # the newest save failed for want of room on the disk
        self.newest_step, self.needed_bytes = 0, 0  # the newest that was to be saved, and the room it needs
        self.last_seconds: float | None = None

    @property
    def failed(self) -> bool:
        """Whether the newest save is known to have gone wrong."""
        return self._failure is not None

    @property
    def writing(self) -> bool:
        """Whether a checkpoint is being written now."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def has_room(self) -> bool:
        """Whether the disk has room for a checkpoint of the size of the newest one."""
        return checkpoint.free_bytes(self._checkpoints) >= self.needed_bytes

    def save(self, shot: Snapshot, pinned: set[int], sync_curve: Callable[[], None] = lambda: None) -> bool:
        """Start writing; returns at once unless the one before is still being written. False where there is no room for it.

        `sync_curve` puts the metrics of all steps up to this one on the disk, where a resume from it needs them. That the
        save before could not be written was told as an alert; what counts now is this one.
        """
        self.join()
        self._failure, self.wants_room = None, False
        self.newest_step, self.needed_bytes = shot.step, int(shot.size_bytes * MARGIN)
        if not self.has_room:  # what a save that was cut off left takes some
            with suppress(OSError):  # of a folder that is closed the writing will tell
                checkpoint.put_back(self._checkpoints)
                checkpoint.sweep(self._checkpoints)
        if not self.has_room:
            self.wants_room, self._failure = True, f"{self.room_words()} The checkpoints before it are whole."
            return False
        self._thread = threading.Thread(target=self._write, args=(shot, pinned, sync_curve), name="saver")
        self._thread.start()
        return True

    def room_words(self) -> str:
        """That the disk has no room for the checkpoint of the newest step that was to be saved, with both figures."""
        free, step = checkpoint.free_bytes(self._checkpoints), self.newest_step
        return f"The disk is full: the checkpoint of step {step} needs {file_size(self.needed_bytes)}, {file_size(free)} is free."

    def refuse(self, step: int, why: str) -> None:
        """Tell that `step` could not be saved; `wait` raises it, unless a later save goes well."""
        self.join()
        self._fail(step, why)

    def _fail(self, step: int, why: str) -> None:
        self._failure = f"The checkpoint could not be written: {why}. The ones before it are whole."
        self._events.append("alert", code="save", step=step, text=f"Saving step {step} went wrong: {why}.")

    def join(self) -> None:
        """Until nothing is being written, whatever came of it."""
        if self._thread is not None:
            self._thread.join()

    def wait(self) -> None:
        """Until nothing is being written; raises Refusal when the writing went wrong."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            why, self._failure = self._failure, None
            raise Refusal(why)

    def _write(self, shot: Snapshot, pinned: set[int], sync_curve: Callable[[], None]) -> None:
        started = time.monotonic()
        self._sync(shot.step, sync_curve)
        staging = None
        try:
            staging = checkpoint.new_staging(self._checkpoints, shot.step)
            self._write_model(staging / checkpoint.MODEL, shot.weights)
            save_file(shot.optimizer, staging / checkpoint.OPTIMIZER)
            write_json(staging / checkpoint.STATE, {"format": checkpoint.FORMAT, **shot.state})
            size = checkpoint.seal(staging, shot.step)
            self.last_seconds, self.whole_step = time.monotonic() - started, shot.step
            best = shot.state.get("best_step") == shot.step
            self._events.append(
                "checkpoint", step=shot.step, bytes=size, seconds=round(self.last_seconds, 3), best=best
            )
        except Exception as error:  # a thread's edge: safetensors and transformers raise types of their own
            why = getattr(error, "strerror", None) or (str(error).strip() or type(error).__name__).splitlines()[0][:300]
            if staging is not None:  # what is there of it takes room that the next try needs
                shutil.rmtree(staging, ignore_errors=True)
            self.wants_room = _is_want_of_room(error)
            if self.wants_room:
                free = checkpoint.free_bytes(self._checkpoints)
                why += f"; it needs {file_size(self.needed_bytes)}, {file_size(free)} is free"
            self._fail(shot.step, why.rstrip("."))
        else:
            self._prune(shot.step, pinned)

    def _sync(self, step: int, sync_curve: Callable[[], None]) -> None:
        """A curve that may be lost with the power is said, and stands in the way of no checkpoint."""
        try:
            sync_curve()
        except OSError as error:
            text = f"The curve up to step {step} may not survive power loss: {error.strerror or error}."
            self._events.append("alert", code="curve", step=step, text=text)

    def _prune(self, step: int, pinned: set[int]) -> None:
        """Remove old checkpoints; what stands in the way of that is said and never costs the run or the one just saved."""
        self._damaged -= {step}
        try:
            with self._promoted() as promoted:
                checkpoint.prune(self._checkpoints, self._keep, pinned | {step} | promoted, self._damaged)
        except (OSError, Refusal) as error:
            why = getattr(error, "strerror", None) or str(error)
            text = (
                f"An old checkpoint could not be removed: {why}. Step {step} is saved; more disk is taken than wished."
            )
            self._events.append("alert", code="prune", step=step, text=text)

    def _write_model(self, target: Path, weights: dict[str, torch.Tensor]) -> None:
        target.mkdir()
        if isinstance(self._trained, PeftModel):
            settings = self._trained.peft_config["default"]
            settings.base_model_name_or_path = str(self._base_path)
            settings.inference_mode = True
            settings.save_pretrained(str(target))
            settings.inference_mode = False
            save_file(weights, target / "adapter_model.safetensors", metadata={"format": "pt"})
        else:
            assert isinstance(self._trained, PreTrainedModel)
            self._trained.save_pretrained(str(target), state_dict=weights)
        self._tokenizer.save_pretrained(str(target))


def _is_want_of_room(error: Exception) -> bool:
    """Whether the disk, a quota or a limit on file sizes stood in the way; safetensors tells the number in its text alone."""
    number = error.errno if isinstance(error, OSError) else None
    told = re.search(r"\(os error (\d+)\)", str(error))
    return (int(told[1]) if number is None and told else number) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def load_optimizer(directory: Path) -> dict[str, torch.Tensor]:
    """The optimizer states of a verified checkpoint, by parameter name."""
    from safetensors.torch import load_file

    return load_file(directory / checkpoint.OPTIMIZER)
