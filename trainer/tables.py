"""A run's numbers as a table of rows: for the command line, the CSV download and the table beside the charts."""

from __future__ import annotations

from trainer.metrics import COLUMNS, read_metrics
from trainer.run import RunDir

SHOWN = ("step", "loss", "grad_norm", "learning_rate", "labels", "tokens", "seconds", "elapsed_s", "peak_gib")


def metrics_rows(run: RunDir) -> tuple[tuple[str, ...], list[tuple[float, ...]]]:
    """(column names, one row a step). Memory in GiB: the device's where there is one, else the process's."""
    curve = read_metrics(run.metrics)
    names = (*SHOWN, "memory_gib")
    assert set(SHOWN) <= set(COLUMNS)
    rows = []
    for record in curve:
        allocated, process = float(record["allocated_gib"]), float(record["process_gib"])
        memory = allocated if allocated == allocated else process
        rows.append((*(float(record[name]) for name in SHOWN), memory))
    return names, rows
