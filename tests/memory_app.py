"""`python app.py` that takes memory without end at step 5 of a run, for as long as a file `hoard` lies in its folder.

Everything else is the real thing, the kernel's kill too. Started by tests/test_memory_kill.py in a control group of its own.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import app
from trainer.metrics import MetricsWriter

AT_STEP = 5  # the save of step 4 begins when that of step 2 is through: one checkpoint is safe by now
PIECE_BYTES = 16 << 20
HOARD = Path(sys.argv[0]).absolute().parent / "hoard"
_record = MetricsWriter.step


def _step(writer: MetricsWriter, values: dict[str, float], rows: list[tuple[int, float, int]]) -> None:
    _record(writer, values, rows)
    kept: list[bytes] = []
    while values["step"] == AT_STEP and HOARD.exists():
        kept.append(b"x" * PIECE_BYTES)  # written, so that it is really taken


if __name__ == "__main__":
    app.HERE = (
        Path(sys.argv[0]).absolute().parent
    )  # the supervisor starts HERE/app.py again: a link of that name leads here
    MetricsWriter.step = _step  # type: ignore[method-assign]
    code = app.main()
    if "--foreground" in sys.argv:
        os._exit(code)
    sys.exit(code)
