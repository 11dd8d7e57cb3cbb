"""metrics.bin and rows.bin: fixed-width records, one a step, appended by the trainer and memory-mapped by readers."""

from __future__ import annotations

import math
import os
import struct
from pathlib import Path

import numpy as np

from trainer.files import write_json, write_whole

COLUMNS = (
    "step",
    "t",
    "elapsed_s",
    "loss",
    "grad_norm",
    "learning_rate",
    "labels",
    "tokens",
    "rows",
    "seconds",
    "data_s",
    "forward_backward_s",
    "optimizer_s",
    "allocated_gib",
    "reserved_gib",
    "process_gib",
    "device_gib",
    "peak_gib",
)
RECORD = np.dtype([(name, "<f8") for name in COLUMNS])
# life counts the starts of a run: a step trained again after a resume has its own block of rows
ROW_RECORD = np.dtype([("life", "<i8"), ("step", "<i8"), ("row", "<i8"), ("loss_sum", "<f8"), ("labels", "<i8")])


class RecordFile:
    """An append-only file of fixed-width records whose first number is never 0.

    Opening it cuts off what a killed writer or power loss left at its end: a torn record, and records of zeros, which are
    room that the file had got and data that never came.
    """

    def __init__(self, path: Path, width_bytes: int) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            size = os.fstat(self._fd).st_size
            whole = width_bytes * whole_records(self._fd, size, width_bytes)
            if whole < size:
                os.ftruncate(self._fd, whole)
        except BaseException:
            os.close(self._fd)
            raise

    def append(self, records: bytes) -> None:
        """Append whole records in one write."""
        write_whole(self._fd, records)

    def sync(self) -> None:
        """Return when all that was appended survives power loss."""
        os.fsync(self._fd)

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self._fd)


def whole_records(fd: int, size_bytes: int, width_bytes: int) -> int:
    """How many records the file holds up to the last one that was really written."""
    count = size_bytes // width_bytes
    while count and os.pread(fd, 8, (count - 1) * width_bytes) == bytes(8):
        count -= 1
    return count


class MetricsWriter:
    """Writes one metrics record and the row records of each step."""

    def __init__(self, metrics_path: Path, rows_path: Path, life: int = 1) -> None:
        self._life = life
        self._metrics = RecordFile(metrics_path, RECORD.itemsize)
        self._rows = RecordFile(rows_path, ROW_RECORD.itemsize)
        columns = metrics_path.with_suffix(".json")
        if not columns.exists():
            write_json(columns, {"columns": list(COLUMNS), "type": "float64 little-endian"})

    def step(self, values: dict[str, float], rows: list[tuple[int, float, int]]) -> None:
        """Append one step; `values` holds every column, `rows` holds (row, loss sum in nats, labels) of each row."""
        self._metrics.append(struct.pack(f"<{len(COLUMNS)}d", *(values[name] for name in COLUMNS)))
        step = int(values["step"])
        packed = np.array(
            [(self._life, step, row, loss_sum, labels) for row, loss_sum, labels in rows], dtype=ROW_RECORD
        )
        self._rows.append(packed.tobytes())

    def nothing(self, step: int, at: float, elapsed_s: float) -> None:
        """Note that `step` was passed with no row left to train: what an earlier life recorded for it counts no more."""
        values = dict.fromkeys(COLUMNS, math.nan) | {"step": -step, "t": at, "elapsed_s": elapsed_s}
        self._metrics.append(struct.pack(f"<{len(COLUMNS)}d", *values.values()))

    def sync(self) -> None:
        """Return when all steps so far survive power loss: a resume trains only those after its checkpoint again."""
        self._metrics.sync()
        self._rows.sync()

    def close(self) -> None:
        """Close both files."""
        self._metrics.close()
        self._rows.close()


def map_records(path: Path, dtype: np.dtype, since: int = 0) -> np.ndarray:
    """The whole records from number `since` on, memory-mapped; an absent file has none, and zeros at the end are none."""
    try:
        with open(path, "rb", buffering=0) as file:
            count = whole_records(file.fileno(), os.fstat(file.fileno()).st_size, dtype.itemsize)
    except FileNotFoundError:
        count = 0
    if since >= count:
        return np.empty(0, dtype)
    return np.memmap(path, dtype, mode="r", offset=since * dtype.itemsize, shape=(count - since,))


def read_records(path: Path, since: int = 0) -> np.ndarray:
    """Metrics records in the order written, from record number `since` on (cheap at any length)."""
    return map_records(path, RECORD, since)


def latest_of_each_step(records: np.ndarray) -> np.ndarray:
    """The curve: of records with the same step the later one, since a resume trains those steps again.

    A negative step is one that was passed with nothing to train: it takes earlier records away and is none itself.
    """
    if len(records) and (records["step"] == 0).any():  # a page in the middle that power loss left empty
        records = np.asarray(records)[records["step"] != 0]
    if len(records) == 0:
        return records
    steps = np.abs(records["step"])
    following_minimum = np.minimum.accumulate(steps[::-1])[::-1]
    keep = np.empty(len(records), bool)
    keep[-1] = True
    keep[:-1] = steps[:-1] < following_minimum[1:]
    return np.asarray(records)[keep & (records["step"] > 0)]


def read_metrics(path: Path) -> np.ndarray:
    """The whole curve, one record a step, as a structured array with COLUMNS."""
    return latest_of_each_step(read_records(path))


def read_rows(path: Path, step: int) -> list[tuple[int, float, int]]:
    """(row, loss sum, labels) of each row of `step`, as its newest life trained it."""
    records = map_records(path, ROW_RECORD)
    found = records[np.flatnonzero(records["step"] == step)]
    if len(found) == 0:
        return []
    newest = found[found["life"] == found["life"].max()]
    return [(int(r["row"]), float(r["loss_sum"]), int(r["labels"])) for r in newest]


def thin(x: np.ndarray, y: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """At most `limit` points that keep every extreme: minimum and maximum of bins whose width is a power of two.

    Bins start at index 0, so that they stay where they are while points arrive and the line does not shimmer.
    """
    count = len(y)
    if count <= limit:
        return x, y
    width = 2
    while 2 * -(-count // width) > limit:
        width *= 2
    whole = count // width * width
    blocks = y[:whole].reshape(-1, width)
    starts = np.arange(0, whole, width)
    # a NaN is an extreme too: argmin and argmax of a block that holds one both point at it
    picked = np.concatenate([starts + np.argmin(blocks, 1), starts + np.argmax(blocks, 1)])
    if whole < count:
        tail = y[whole:]
        picked = np.concatenate([picked, [whole + int(np.argmin(tail)), whole + int(np.argmax(tail))]])
    picked = np.unique(picked)
    return x[picked], y[picked]
