"""One optimiser step: micro-batches forward and backward, clip, update; nothing in it waits for the device."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from trainer.data.loader import MicroBatch, Rows, assemble, read_row
from trainer.loop import optim, router
from trainer.loop.forward import Path, forward
from trainer.loop.team import ALONE, Team
from trainer.models.load import Loaded


def draw_seed(seed: int, step: int, micro: int) -> int:
    """The seed of one micro-batch's random draws (dropout): a pure function, so that no state needs saving.

    `micro` counts the step's micro-batches over all processes, so that a team draws what one process draws.
    """
    digest = hashlib.sha256(f"{seed}/{step}/{micro}/0".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def seed_draws(seed: int, device: str) -> None:
    """What torch.manual_seed does for the processor and `device`; that also asks every kind of device torch knows (0.3 ms)."""
    torch.default_generator.manual_seed(seed)
    if device.startswith("cuda"):
        index = torch.device(device).index
        torch.cuda.default_generators[torch.cuda.current_device() if index is None else index].manual_seed(seed)


class UpdateOutOfMemory(Exception):
    """Memory ran out while weights and moments were being updated: some may be of this step, some of the one before."""


class Marks:
    """Times between points of a step, in seconds: the host's clock on a CPU, events in the device's stream on a GPU."""

    def __init__(self, device: str) -> None:
        self._cuda = device.startswith("cuda")
        self._marks: list[Any] = []

    def mark(self) -> None:
        """Note this point."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Between one mark and the next; on a GPU only when the last one has completed."""
        if self._cuda:
            return [a.elapsed_time(b) / 1000 for a, b in zip(self._marks, self._marks[1:], strict=False)]
        return [b - a for a, b in zip(self._marks, self._marks[1:], strict=False)]

    def wait(self) -> None:
        """Block until the last mark has been passed."""
        if self._cuda:
            self._marks[-1].synchronize()

    def passed(self) -> bool:
        """Whether the last mark has been passed."""
        return not self._cuda or self._marks[-1].query()


@dataclass
class StepRecord:
    """One step on its way to the metrics: host facts now, device values when their copy has arrived."""

    step: int
    rate: float
    rows: tuple[int, ...]
    labels_of_row: list[int]
    labels: int
    tokens: int
    data_s: float
    marks: Marks
    values: torch.Tensor = field(repr=False)  # (2 + rows,): gradient norm, flag, loss sum of each row

    def arrive(self) -> tuple[float, float, bool, list[float]]:
        """(loss, gradient norm, non-finite, loss sum of each row); waits for the copy on a GPU."""
        self.marks.wait()
        norm, flag, *sums = self.values.tolist()
        return float(np.sum(sums)) / self.labels, norm, flag > 0, sums


class Stepper:
    """Holds model, optimizer and loss path, and takes steps. Used by training and by the smoke test alike."""

    def __init__(
        self,
        loaded: Loaded,
        trained: nn.Module,
        path: Path,
        *,
        device: str,
        max_grad_norm: float,
        weight_decay: float,
        optimizer: str,
        seed: int,
        fp16: bool,
        team: Team = ALONE,
    ) -> None:
        self.model: PreTrainedModel = loaded.model
        self.team = team
        self.trained = trained
        self.path = path
        self.device = device
        embeddings: Any = loaded.model.get_input_embeddings()
        self.vocabulary = int(embeddings.weight.shape[0])
        self.seed = seed
        self.max_grad_norm = max_grad_norm
        self.named = optim.trainable(trained)
        self.optimizer = optim.build(self.named, weight_decay=weight_decay, kind=optimizer)
        optim.allocate(self.optimizer)
        self.guard = optim.StepGuard(device)
        self.scaler = torch.amp.GradScaler(device.split(":")[0], enabled=fp16)
        self._parameters = [parameter for _, parameter in self.named]
        team.start_alike(self._parameters)

    def step(
        self, number: int, micro_rows: list[np.ndarray], cache: Rows, rate: float, interrupt: Any = None
    ) -> StepRecord | None:
        """Train step `number` on the rows of each micro-batch; None when `interrupt()` said so before the update.

        The gradient is that of the summed label losses over the labels of all micro-batches together, and of the router
        losses, where the model adds them, weighted by tokens over all tokens of the step. A team parts the micro-batches
        among its processes, and all of them come to the same weights. Raises BadRow, before anything is computed, for a
        row that cannot be trained, OutOfMemoryError where nothing was updated yet, and UpdateOutOfMemory afterwards.
        """
        started = time.perf_counter()
        rows = np.concatenate(micro_rows)
        trained = [read_row(cache, int(row), self.vocabulary)[1] for row in rows]
        labels_of_row = [int((mask[1:] > 0).sum()) for mask in trained]
        labels, tokens = sum(labels_of_row), sum(len(mask) for mask in trained)
        starts = np.cumsum([0, *(len(group) for group in micro_rows)])
        data_s = time.perf_counter() - started
        marks = Marks(self.device)
        marks.mark()
        sums = torch.zeros(len(rows), dtype=torch.float32, device=self.device)
        for micro, group in self.team.share(micro_rows):
            if interrupt is not None and interrupt():
                self.optimizer.zero_grad(set_to_none=True)
                return None
            started = time.perf_counter()
            batch = assemble(cache, group, self.device)
            data_s += time.perf_counter() - started
            seed_draws(draw_seed(self.seed, number, micro), self.device)
            sums[starts[micro] : starts[micro + 1]] = self._backward(batch, labels, tokens)
        self.team.sum(sums)
        self.team.sum_gradients(self._parameters)
        marks.mark()
        try:
            norm = self._update(rate, sums)
        except torch.OutOfMemoryError:
            raise UpdateOutOfMemory from None
        values = self._to_host(torch.cat([norm.float().reshape(1), self.guard.flag.reshape(1), sums]))
        marks.mark()
        row_ids = tuple(int(row) for row in rows)
        return StepRecord(number, rate, row_ids, labels_of_row, labels, tokens, data_s, marks, values)

    def _backward(self, batch: MicroBatch, labels: int, tokens: int) -> torch.Tensor:
        """Add this micro-batch's gradient; returns the loss sum of each of its rows, (rows,) on the device.

        `labels` and `tokens` are those of the whole step. The sums are of label losses alone.
        """
        found = forward(self.model, batch, self.path)
        loss = found.labels.sum() / labels
        if found.router is not None and self.path.router is not None:
            balance = router.weighted_sum(found.router, batch.documents.cumulative) / tokens
            loss = loss + self.path.router * balance
        self.scaler.scale(loss).backward()
        sums = torch.zeros(len(batch.rows), dtype=torch.float32, device=found.labels.device)
        return sums.index_add_(0, batch.label_row, found.labels.detach())

    def _update(self, rate: float, sums: torch.Tensor) -> torch.Tensor:
        """Clip and update; returns the gradient norm before clipping, 0-dim on the device."""
        fp16 = self.scaler.is_enabled()
        if fp16:
            self.scaler.unscale_(self.optimizer)
        limit = self.max_grad_norm if self.max_grad_norm > 0 else float("inf")
        norm = nn.utils.clip_grad_norm_(self._parameters, limit)
        self.guard.see(sums.sum())
        # an overflowing gradient is everyday in fp16 and costs that step; elsewhere it is the end
        self.guard.see_scaled(norm) if fp16 else self.guard.see(norm)
        self.guard.step(self.optimizer, rate)
        if fp16:
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _to_host(self, values: torch.Tensor) -> torch.Tensor:
        if values.device.type != "cuda":
            return values.clone()
        pinned = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        return pinned.copy_(values, non_blocking=True)
