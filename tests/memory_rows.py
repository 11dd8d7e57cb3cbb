"""Rows held in memory, for tests that need token ids and labels without a dataset."""

from __future__ import annotations

import numpy as np


class MemoryRows:
    """The two methods of a token cache that the loader calls."""

    def __init__(self, rows: list[tuple[list[int], list[int]]]) -> None:
        self._rows = [(np.array(ids, np.int32), np.array(labels, np.uint8)) for ids, labels in rows]
        self.lengths = np.array([len(ids) for ids, _ in rows], np.int64)

    def ids(self, row: int) -> np.ndarray:
        """Token ids of a row."""
        return self._rows[row][0]

    def labels(self, row: int) -> np.ndarray:
        """1 where the token is trained."""
        return self._rows[row][1]


def random_rows(count: int, vocabulary: int, seed: int, longest: int = 60) -> MemoryRows:
    """`count` rows of random tokens with about half of them labels, at least one label each."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        length = int(rng.integers(4, longest))
        labels = (rng.random(length) < 0.5).astype(int)
        labels[-1] = 1
        rows.append((rng.integers(0, vocabulary, length).tolist(), labels.tolist()))
    return MemoryRows(rows)
