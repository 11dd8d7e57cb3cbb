"""What a person is told when loss or gradient stopped being numbers: the step, and its rows by file and line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from trainer.data.tokens import TokenCache
from trainer.loop.step import StepRecord
from trainer.schema import Config

NAMED = 3  # rows that stand in the sentence


def cause_of(
    record: StepRecord, sums: list[float], cache: TokenCache, config: Config
) -> tuple[str, list[dict[str, Any]]]:
    """The sentence, and [{"row", "file", "line"}] of the rows it is about, all of them.

    `sums` are the loss sums of the step's rows: those rows whose own loss is no number, or every row of the step where
    the gradient alone is none, since a gradient is of them all.
    """
    finite = np.isfinite(sums)
    bad = [row for row, good in zip(record.rows, finite, strict=True) if not good]
    files = [Path(file.path).name for file in config.data.files]
    found = [_place(row, cache, files) for row in bad or record.rows]
    what = "loss became NaN or infinite" if bad else "gradient became NaN or infinite"
    which = _these(found, "the loss of" if bad else "every row's loss is a number; the step's rows are")
    rate = config.hyperparams.learning_rate
    common = f"Common cause: learning rate too high ({rate:.2g})"
    common += ", or something odd in these rows." if bad else "."
    return f"{what} at step {record.step}: {which}. Those weights are not saved. {common}", found


def _place(row: int, cache: TokenCache, files: list[str]) -> dict[str, Any]:
    file, line, _ = (int(value) for value in np.asarray(cache.source)[row])
    return {"row": int(row), "file": files[file], "line": line}


def _these(found: list[dict[str, Any]], lead: str) -> str:
    """`lead` rows.jsonl line 3, line 9, other.jsonl line 2 and 4 more."""
    parts: list[str] = []
    file = None
    for place in found[:NAMED]:
        parts.append(f"line {place['line']:,}" if place["file"] == file else f"{place['file']} line {place['line']:,}")
        file = place["file"]
    more = f" and {len(found) - NAMED:,} more" if len(found) > NAMED else ""
    return f"{lead} {', '.join(parts)}{more}"
