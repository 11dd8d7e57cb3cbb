"""From row numbers to the tensors of a micro-batch: documents end to end in one line of tokens, nothing padded.

T tokens, N labels, R rows of the micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from trainer.models.attention import Documents


class Rows(Protocol):
    """Where token ids and label marks of a row come from (trainer.data.tokens.TokenCache)."""

    def ids(self, row: int) -> np.ndarray:
        """Token ids of a row, (length,)."""

    def labels(self, row: int) -> np.ndarray:
        """1 where the token is trained, (length,)."""


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass. Position p predicts the token after it, so `label_at` points one before each trained token."""

    rows: tuple[int, ...]
    ids: torch.Tensor  # (1, T) int64
    positions: torch.Tensor  # (1, T) int64, restarting at 0 in each document
    documents: Documents
    label_at: torch.Tensor  # (N,) int64: positions whose next token is trained
    targets: torch.Tensor  # (N,) int64
    label_row: torch.Tensor  # (N,) int64: index into `rows` of each label
    labels_of_row: tuple[int, ...]
    tokens: int

    @property
    def labels(self) -> int:
        """Trained tokens of the micro-batch."""
        return sum(self.labels_of_row)


class BadRow(Exception):
    """A row that cannot be trained: `row` is its number in the cache, `reason` a clause."""

    def __init__(self, row: int, reason: str) -> None:
        super().__init__(f"row {row}: {reason}")
        self.row, self.reason = row, reason


def read_row(cache: Rows, row: int, vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids (length,) and label marks (length,) of a row, looked at before any device sees them.

    `vocabulary` is how many ids the model knows: one beyond them would be a fault in native code on a GPU, after which
    only a new process can train. Raises BadRow.
    """
    try:
        ids, labels = np.asarray(cache.ids(row)), np.asarray(cache.labels(row))
    except (OSError, ValueError, IndexError) as error:
        raise BadRow(row, f"it cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if len(ids) == 0 or len(ids) != len(labels):
        raise BadRow(row, f"it has {len(ids):,} tokens and {len(labels):,} label marks")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocabulary:
        raise BadRow(row, f"its token {low if low < 0 else high:,} is none of the model's {vocabulary:,}")
    return ids, labels


def assemble(cache: Rows, rows: np.ndarray, device: str) -> MicroBatch:
    """Put `rows` end to end. The first token of a document is never a target: nothing before it predicts it."""
    ids, positions, label_at, targets, label_row, borders = [], [], [], [], [], [0]
    for number, row in enumerate(rows):
        tokens = np.asarray(cache.ids(int(row)), np.int64)
        trained = np.flatnonzero(cache.labels(int(row)))
        trained = trained[trained > 0]
        start = borders[-1]
        ids.append(tokens)
        positions.append(np.arange(len(tokens), dtype=np.int64))
        label_at.append(start + trained - 1)
        targets.append(tokens[trained])
        label_row.append(np.full(len(trained), number, np.int64))
        borders.append(start + len(tokens))
    counts = tuple(len(part) for part in targets)
    longest = max(end - start for start, end in zip(borders, borders[1:], strict=False))
    return MicroBatch(
        rows=tuple(int(row) for row in rows),
        ids=_to(np.concatenate(ids), device).unsqueeze(0),
        positions=_to(np.concatenate(positions), device).unsqueeze(0),
        documents=Documents(tuple(borders), _to(np.array(borders, np.int32), device), longest),
        label_at=_to(np.concatenate(label_at), device),
        targets=_to(np.concatenate(targets), device),
        label_row=_to(np.concatenate(label_row), device),
        labels_of_row=counts,
        tokens=borders[-1],
    )


def _to(array: np.ndarray, device: str) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    # pinned memory lets the copy run beside the computation; without it the host would wait here every micro-batch
    return tensor.pin_memory().to(device, non_blocking=True) if device.startswith("cuda") else tensor
