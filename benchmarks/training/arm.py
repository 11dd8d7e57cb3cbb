"""One arm in a process of its own: `python -m benchmarks.training.arm REQUEST.json`.

The request names the arm and its cases; each result is appended to `out` as soon as it is there, so that a process that
is cut off keeps what it measured.
"""

from __future__ import annotations

import gc
import importlib
import json
import shutil
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from benchmarks.training.clock import Clock, Peak
from benchmarks.training.data import plan_for
from benchmarks.training.figures import Timed, model_flops
from benchmarks.training.suites import SHAPES, Arm, Case
from benchmarks.training.work import Work
from trainer.data.tokens import TokenCache

MODULES = {"hf": "peers", "liger": "peers", "trl": "peer_trl", "ours": "ours"}


def measure(work: Work) -> dict[str, Any]:
    """Train the case once and return its figures."""
    # imported here: what a peer's own modules need of memory is not counted as training, and no arm loads another's
    train = importlib.import_module(f"benchmarks.training.{MODULES[work.arm.peer]}").train
    case = work.case
    started = time.perf_counter()
    clock, peak = Clock(work.device, case.warmup_steps, case.steps), Peak(work.device)
    trained = train(work, clock, peak)
    memory = peak.stop()
    timed = timed_part(work)
    if len(clock.ends) != case.steps or len(trained.losses) != case.steps:
        raise RuntimeError(
            f"{len(clock.ends)} steps were taken and {len(trained.losses)} losses seen, not {case.steps}"
        )
    return {
        "status": "measured",
        "step_s": clock.step_s,
        "total_s": sum(clock.step_s),
        "cpu_s": clock.cpu_s,
        "whole_s": time.perf_counter() - started,
        "tokens": timed.tokens,
        "labels": timed.labels,
        "flops": model_flops(SHAPES[case.model], timed, frozen=case.method == "lora"),
        "losses": trained.losses,
        "attention": trained.attention,
        "notes": trained.notes,
        **memory,
    }


def timed_part(work: Work) -> Timed:
    """Tokens, labels and the sum of squared lengths of the steps after the warm-up."""
    steps = range(work.case.warmup_steps + 1, work.case.steps + 1)
    rows = [row for step in steps for group in work.plan.micro_batches(step, 1) for row in group]
    lengths = work.cache.lengths[rows]
    return Timed(int(lengths.sum()), int(work.cache.label_counts[rows].sum()), int((lengths**2).sum()))


def one(arm: Arm, case: Case, request: dict[str, Any]) -> dict[str, Any]:
    """The result of one case, whatever happens in it: a process's edge."""
    folder, device = Path(request["folder"]), request["device"]
    scratch = folder / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    cache = TokenCache.open(folder / "rows" / case.data)
    work = Work(arm, case, cache, plan_for(case, cache, arm.form), folder / "models" / case.model, device, scratch)
    try:
        return measure(work)
    except torch.OutOfMemoryError:
        return {"status": "out of memory"}
    except Exception as error:  # a peer may raise anything; the other arms go on
        text = traceback.format_exc()
        return {"status": "broken", "why": f"{type(error).__name__}: {error}"[:300], "detail": text[-4000:]}


def main() -> None:
    """Measure the cases of the request in turn."""
    request = json.loads(Path(sys.argv[1]).read_text())
    arm = Arm(**request["arm"])
    torch.set_num_threads(request["threads"])
    with open(request["out"], "a", encoding="utf-8") as out:
        for case in (Case(**each) for each in request["cases"]):
            result = one(arm, case, request)
            out.write(json.dumps({"case": case.name, "arm": arm.name, **result}) + "\n")
            out.flush()
            gc.collect()
            if request["device"] != "cpu":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
