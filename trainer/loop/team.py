"""The processes that train one run together (`torchrun --nproc-per-node N -m trainer train …`), one for each device.

Rank 0 leads: it alone locks, writes, listens to commands and decides; the others hear an order, take their share of a
step's micro-batches, and add their gradients to its own. Every process holds all weights (data parallelism). A team of one,
which is every run that torchrun did not start, does none of this. One machine only: the processes share its files.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from trainer.refusal import Refusal

BUCKET_ELEMENTS = 16 << 20  # 64 MiB of float32: large enough to be worth a message, small beside a model
PATIENCE = datetime.timedelta(days=7)  # a leader may tokenise for hours; one that dies closes its connection at once
T = TypeVar("T")


class Word(IntEnum):
    """What the leader may order."""

    END = 0
    STEP = 1
    HELD_OUT = 2
    BAD_ROW = 3
    BAD_HELD_OUT = 4


@dataclass(frozen=True)
class Order:
    """One order of the leader; `packs_each` and `rate` belong to STEP, `row` to a row that is left out from `step` on."""

    word: Word
    step: int = 0
    packs_each: int = 0
    rate: float = 0.0
    row: int = 0


class Lost(Refusal):
    """Another process of the team is gone; the run cannot go on without it."""


@dataclass(frozen=True)
class Team:
    """Who this process is among those that train the run."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes and decides."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[tuple[int, T]]:
        """This process's part of `items`, each with its place among all of them."""
        return list(enumerate(items))[self.rank :: self.size]

    # -- the leader's word

    def tell(self, facts: dict[str, Any]) -> None:
        """Give all others `facts` (plain values); they wait for it in `hear_facts`."""
        if self.size > 1:
            text = torch.frombuffer(bytearray(json.dumps(facts).encode()), dtype=torch.uint8)
            self._together(lambda: dist.broadcast(torch.tensor([len(text)]), src=0))
            self._together(lambda: dist.broadcast(text, src=0))

    def hear_facts(self) -> dict[str, Any] | None:
        """What the leader tells; None when it ended before it had anything to tell."""
        size = torch.zeros(1, dtype=torch.int64)
        try:
            self._together(lambda: dist.broadcast(size, src=0))
            text = torch.zeros(int(size), dtype=torch.uint8)
            self._together(lambda: dist.broadcast(text, src=0))
        except Lost:
            return None
        return json.loads(bytes(text.numpy()))

    def order(self, order: Order) -> None:
        """Give all others an order; they wait for it in `hear`."""
        if self.size > 1:
            figures = [order.word, order.step, order.packs_each, order.rate, order.row]
            words = torch.tensor(figures, dtype=torch.float64)
            self._together(lambda: dist.broadcast(words, src=0))

    def hear(self) -> Order:
        """The leader's next order; a leader that is gone gives none any more, which is the end."""
        words = torch.zeros(5, dtype=torch.float64)
        try:
            self._together(lambda: dist.broadcast(words, src=0))
        except Lost:
            return Order(Word.END)
        word, step, packs_each, rate, row = words.tolist()
        return Order(Word(int(word)), int(step), int(packs_each), rate, int(row))

    # -- sums over all processes

    def sum(self, tensor: torch.Tensor) -> None:
        """Add up `tensor` over all processes, in place; the result has the same bits everywhere."""
        if self.size > 1:
            self._together(lambda: dist.all_reduce(tensor))

    def sum_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Add up the gradients, in float32 and in buckets. One that no process has stays None, as in a single process."""
        if self.size == 1:
            return
        present = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.int32)
        self.sum(present)
        used = [parameter for parameter, count in zip(parameters, present.tolist(), strict=True) if count]
        for bucket in _buckets(used):
            flat = torch.cat([_gradient(parameter).float().reshape(-1) for parameter in bucket])
            self.sum(flat)
            parts = flat.split([parameter.numel() for parameter in bucket])
            for parameter, part in zip(bucket, parts, strict=True):
                parameter.grad = part.view_as(parameter).to(parameter.dtype)

    def start_alike(self, parameters: list[nn.Parameter]) -> None:
        """Give every process the leader's trained weights."""
        if self.size > 1:
            for parameter in parameters:
                weights = parameter.data
                self._together(lambda weights=weights: dist.broadcast(weights, src=0))  # type: ignore[misc]

    def _together(self, call: Any) -> None:
        try:
            call()
        except RuntimeError as error:  # gloo and nccl have no type of their own for a peer that is gone
            raise Lost(
                f"Another of the {self.size} processes ended, so the run cannot go on: {str(error).splitlines()[0][:200]}. "
                "The last checkpoint is safe; resume from it."
            ) from error


ALONE = Team()


def _gradient(parameter: nn.Parameter) -> torch.Tensor:
    return parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)


def _buckets(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    bucket: list[nn.Parameter] = []
    elements = 0
    for parameter in parameters:
        if bucket and elements + parameter.numel() > BUCKET_ELEMENTS:
            yield bucket
            bucket, elements = [], 0
        bucket.append(parameter)
        elements += parameter.numel()
    if bucket:
        yield bucket


def join(cuda: bool) -> Team:
    """Meet the processes that torchrun started; a team of one where it started none. `leave` afterwards."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return ALONE
    if int(os.environ.get("LOCAL_WORLD_SIZE", size)) != size:
        raise Refusal("Training over several machines is not possible: the processes must share one machine's files.")
    rank = int(os.environ["RANK"])
    if cuda:
        torch.cuda.set_device(rank)
    # words go over gloo, gradients over nccl where there are GPUs
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=PATIENCE)
    return Team(rank, size)


def leave() -> None:
    """Close the connections; harmless for a team of one."""
    if dist.is_initialized():
        dist.destroy_process_group()
