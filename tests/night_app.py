"""`python app.py` whose first life of a run breaks the CUDA context at step 4 (in words: this machine needs no GPU) and
whose steps are slow enough to be killed in; everything else is the real thing. Started by tests/test_night.py."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import app
from trainer.metrics import MetricsWriter

STEP_S = 0.05
_record = MetricsWriter.step


def _step(writer: MetricsWriter, values: dict[str, float], rows: list[tuple[int, float, int]]) -> None:
    _record(writer, values, rows)
    if writer._life == 1 and values["step"] == 4:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    time.sleep(STEP_S)


if __name__ == "__main__":
    # the supervisor and --detach start HERE/app.py again: a link of that name leads here
    app.HERE = Path(sys.argv[0]).absolute().parent
    MetricsWriter.step = _step  # type: ignore[method-assign]
    code = app.main()
    if "--foreground" in sys.argv:
        os._exit(code)
    sys.exit(code)
