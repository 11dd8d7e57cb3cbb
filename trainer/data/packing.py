"""The plan of a whole run before its first step: which rows stand in which micro-batch of which step, in every epoch.

Pure numpy. Same lengths, weights and seed give the same plan; the resume cursor is the number of the next step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

# one random stream for each purpose, so that a change in one cannot shift another
_SPLIT, _ORDER, _WEIGHT, _PACKS = 1, 2, 3, 4


@dataclass(frozen=True)
class Plan:
    """Packs in training order and the packs of each step.

    `rows[pack_starts[p]:pack_starts[p + 1]]` are the rows of pack p; a pack is one row unless packing is on.
    `step_packs[s]` = (first pack, pack after the last) of step s + 1. `held_out` rows are in no pack.
    """

    rows: np.ndarray  # int64 (rows over all epochs,)
    pack_starts: np.ndarray  # int64 (packs + 1,)
    step_packs: np.ndarray  # int64 (steps, 2)
    epoch_ends: np.ndarray  # int64 (epochs,): the last step of each epoch
    held_out: np.ndarray  # int64
    steps_per_epoch: int  # of a whole first epoch, also where the plan holds less than one

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run."""
        return len(self.step_packs)

    def packs_each(self, step: int, most: int, processes: int) -> int:
        """Packs in a micro-batch of `step` (1-based): at most `most`, and few enough that every process gets some."""
        first, end = (int(value) for value in self.step_packs[step - 1])
        return min(most, -(-(end - first) // processes))

    def micro_batches(self, step: int, packs_each: int, without: frozenset[int] = frozenset()) -> list[np.ndarray]:
        """Rows of each micro-batch of `step` (1-based), `packs_each` packs at a time, the rows `without` left out."""
        first, end = (int(value) for value in self.step_packs[step - 1])
        groups = []
        for start in range(first, end, packs_each):
            stop = min(start + packs_each, end)
            rows = self.rows[self.pack_starts[start] : self.pack_starts[stop]]
            groups.append(rows[~np.isin(rows, list(without))] if without else rows)
        return [rows for rows in groups if len(rows)]


def split(rows: int, share: float, most: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers (trained, held out): `share` of the rows, at most `most`, at least one of each where two rows exist."""
    wanted = min(math.ceil(rows * share), most, rows - 1) if share > 0 else 0
    order = np.random.default_rng([seed, _SPLIT]).permutation(rows)
    return np.sort(order[wanted:]), np.sort(order[:wanted])


def weighted(rows: np.ndarray, weights: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """The rows of one epoch: a row of weight 2.5 comes twice, and a third time in half of the epochs (by seeded draw)."""
    if np.all(weights == 1.0):
        return rows
    whole = np.floor(weights).astype(np.int64)
    draws = np.random.default_rng([seed, _WEIGHT, epoch]).random(len(rows))
    return np.repeat(rows, whole + (draws < weights - whole))


def fill_packs(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Best-fit decreasing: each row goes into the fullest pack that still has room for it (Johnson 1974, section 2).

    `lengths` (rows,) in tokens, each at most `capacity`. Returns positions into `lengths`, pack by pack.
    """
    packs: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0  # bit r is set while some pack has exactly r tokens of room
    for position in np.argsort(-lengths, kind="stable"):
        length = int(lengths[position])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            pack = by_room[room].pop()
            if not by_room[room]:
                rooms &= ~(1 << room)
        else:
            pack, room = len(packs), capacity
            packs.append([])
        packs[pack].append(int(position))
        left = room - length
        if left > 0:
            by_room[left].append(pack)
            rooms |= 1 << left
    return packs


def _epoch_packs(
    rows: np.ndarray, lengths: np.ndarray, capacity: int | None, seed: int, epoch: int
) -> list[np.ndarray]:
    """One epoch's packs in a seeded random order; `capacity` None: one row each."""
    rows = np.random.default_rng([seed, _ORDER, epoch]).permutation(rows)
    if capacity is None:
        return [rows[i : i + 1] for i in range(len(rows))]
    packs = fill_packs(lengths[rows], capacity)
    order = np.random.default_rng([seed, _PACKS, epoch]).permutation(len(packs))
    return [rows[np.sort(packs[pack])] for pack in order]


def make_plan(
    lengths: np.ndarray,
    trained: np.ndarray,
    held_out: np.ndarray,
    weights: np.ndarray,
    *,
    seed: int,
    epochs: float,
    max_steps: int | None,
    packs_per_step: int,
    capacity: int | None,
) -> Plan:
    """Plan every epoch. `lengths` (all rows,) tokens; `weights` one for each of `trained`; `capacity` tokens, None unpacked.

    A step never crosses an epoch's border, so the last step of an epoch may be smaller. `max_steps` wins over `epochs`.
    """
    packs: list[np.ndarray] = []
    whole_epoch = 0
    steps: list[tuple[int, int]] = []
    epoch_ends: list[int] = []
    epoch = 0
    while (max_steps is not None and len(steps) < max_steps) or (max_steps is None and epoch < epochs):
        chosen = weighted(trained, weights, seed, epoch)
        if len(chosen) == 0 and epoch > 1000:  # weights so small that no draw picks a row
            break
        new = _epoch_packs(chosen, lengths, capacity, seed, epoch)
        whole_epoch = whole_epoch or -(-len(new) // packs_per_step)
        if max_steps is None and epochs - epoch < 1:
            new = new[: max(1, round(len(new) * (epochs - epoch)))]
        base = len(packs)
        packs.extend(new)
        starts = range(base, base + len(new), packs_per_step)
        steps.extend((start, min(start + packs_per_step, base + len(new))) for start in starts)
        epoch_ends.append(len(steps))
        epoch += 1
    if max_steps is not None:
        steps = steps[:max_steps]
        epoch_ends = [end for end in epoch_ends if end <= max_steps]
    used = packs[: steps[-1][1]] if steps else []
    return Plan(
        rows=np.concatenate(used) if used else np.empty(0, np.int64),
        pack_starts=np.concatenate([[0], np.cumsum([len(pack) for pack in used])]).astype(np.int64),
        step_packs=np.array(steps, np.int64).reshape(-1, 2),
        epoch_ends=np.array(epoch_ends, np.int64),
        held_out=held_out,
        steps_per_epoch=max(1, whole_epoch),
    )


def waste(plan: Plan, lengths: np.ndarray, capacity: int) -> float:
    """Share of the packs' room that holds no token."""
    packs = len(plan.pack_starts) - 1
    return 1.0 - float(lengths[plan.rows].sum()) / (packs * capacity) if packs else 0.0
