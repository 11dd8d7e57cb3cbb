"""Training speed beside its peers: `python -m benchmarks.train --peers hf,trl`.

Each arm is a process of its own, the arms take turns, and what is compared stood in the same round. Every result is on
the disk as soon as it is there. No torch here: the driver would be a guest on the device it measures.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.training.conditions import conditions, describe
from benchmarks.training.figures import summary
from benchmarks.training.suites import NEEDS, PEERS, Arm, Suite, suite
from benchmarks.training.table import compared, text
from trainer.machine import machine

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
LONGEST_ARM_S = 600.0


@dataclass
class Bench:
    """One command: what is measured, where it is written, and what came out so far."""

    suite: Suite
    peers: tuple[str, ...]
    folder: Path
    output: Path
    device: str
    threads: int
    results: list[dict[str, Any]] = field(default_factory=list)
    rows: dict[str, Any] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)
    load_at_start: float = field(default_factory=lambda: os.getloadavg()[0])

    def left_s(self) -> float:
        """Seconds of the suite's time that are left."""
        return self.suite.minutes * 60 - (time.monotonic() - self.started)

    def run(self) -> dict[str, Any]:
        """Make rows and models, let the arms take turns, and return all that is written to `output`."""
        self._prepare()
        took_s: dict[tuple[str, str], float] = {}
        for number in range(1, self.suite.rounds + 1):
            for group, arm in self.suite.turns(number, self.peers):
                began = time.monotonic()
                self._one(arm, group, number, took_s.get((group, arm.name), 0.0))
                took_s[group, arm.name] = time.monotonic() - began
                self._write()
        return self._write()

    def _prepare(self) -> None:
        cases = [vars(case) for case in self.suite.cases]
        out = self.folder / "rows.json"
        done, last = self._child("data", {"cases": cases, "folder": str(self.folder), "out": str(out)}, LONGEST_ARM_S)
        if done != 0:
            raise SystemExit(f"The rows or the model could not be made: {last}")
        self.rows = json.loads(out.read_text())

    def _one(self, arm: Arm, group: str, number: int, expected_s: float) -> None:
        """Measure all cases of `group` with `arm`, unless the time that is left is less than the round before took."""
        cases = self.suite.cases_of(group, arm)
        if not cases:
            return
        if (why := impossible(arm, self.device)) is not None:
            self.results += [{"case": c.name, "arm": arm.name, "status": why, "round": number} for c in cases]
            return
        out = self.folder / f"{number}-{len(self.results)}.jsonl"
        out.unlink(missing_ok=True)
        request = {
            "arm": vars(arm),
            "cases": [vars(case) for case in cases],
            "folder": str(self.folder),
            "device": self.device,
            "threads": self.threads,
            "out": str(out),
        }
        left = self.left_s()
        status, why = "no time left", None
        if left > max(10.0, expected_s):
            print(f"round {number}: {group}, {arm.name}", file=sys.stderr, flush=True)
            code, last = self._child("arm", request, min(left, LONGEST_ARM_S))
            if code is not None:
                status, why = "broken", last
        found = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
        have = {result["case"] for result in found}
        missing = [{"case": case.name, "arm": arm.name, "status": status, "why": why} for case in cases]
        found += [each for each in missing if each["case"] not in have]
        self.results += [{**result, "round": number} for result in found]

    def _child(self, module: str, request: dict[str, Any], limit_s: float) -> tuple[int | None, str]:
        """Run a module of the benchmark on a request: (exit code, last line it wrote); code None when time ran out."""
        file = self.folder / "request.json"
        file.write_text(json.dumps(request))
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(self.threads),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "TRANSFORMERS_VERBOSITY": "error",
        }
        if self.device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        log = self.folder / "child.log"
        with log.open("wb") as stream:
            process = subprocess.Popen(
                [sys.executable, "-m", f"benchmarks.training.{module}", str(file)],
                cwd=ROOT,
                env=environment,
                stdout=stream,
                stderr=stream,
            )
            try:
                code: int | None = process.wait(limit_s)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                code = None
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        return code, lines[-1][:300] if lines else "it wrote nothing"

    def _write(self) -> dict[str, Any]:
        """Write all that is known by now; a command that is cut off leaves the last of these."""
        device = describe(self.device)
        everything = {
            "suite": self.suite.name,
            "device": device,
            "versions": device.pop("versions"),
            "conditions": conditions(self.suite, self.device, self.threads, self.load_at_start, self.rows),
            "summary": summary(self.results, device["name"]),
            "ratios": compared(self.suite, self.peers, self.results),
            "results": self.results,
        }
        staging = self.output.with_suffix(".tmp")
        staging.write_text(json.dumps(everything, indent=1) + "\n")
        staging.replace(self.output)
        return everything


def impossible(arm: Arm, device: str) -> str | None:
    """Why this arm cannot be measured here, or None."""
    if arm.peer == "liger" and device == "cpu":
        return "not possible on a CPU"
    package = NEEDS.get(arm.peer)
    return "not installed" if package is not None and importlib.util.find_spec(package) is None else None


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--suite", choices=("cpu", "gpu", "rehearsal"), help="default: gpu where there is one, else cpu"
    )
    parser.add_argument("--peers", default="hf,trl", help=f"comma-separated, of: {', '.join(PEERS)}")
    parser.add_argument("--cases", default="", help="only cases whose name contains this")
    parser.add_argument("--rounds", type=int, help="how often every arm has its turn")
    parser.add_argument("--minutes", type=float, help="time for everything; what does not fit is said to be missing")
    parser.add_argument("--threads", type=int, help="default: the machine's cores, as the product takes them")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/train-DATE-SUITE.json")
    given = parser.parse_args()
    unknown = [name for name in given.peers.split(",") if name and name not in PEERS]
    if unknown:
        parser.error(f"--peers: '{unknown[0]}' is not known. Known: {', '.join(PEERS)}.")
    return given


def main() -> None:
    """Measure, write and print."""
    given, here = _arguments(), machine()
    chosen = suite(given.suite or ("gpu" if here.gpu else "cpu"))
    cases = tuple(case for case in chosen.cases if given.cases in case.name)
    if not cases:
        raise SystemExit(f"--cases: no case of {chosen.name} contains '{given.cases}'.")
    if chosen.name == "gpu" and not here.gpu:
        raise SystemExit("The suite gpu needs a GPU that torch can use. --suite rehearsal goes through it on a CPU.")
    chosen = replace(chosen, cases=cases, rounds=given.rounds or chosen.rounds, minutes=given.minutes or chosen.minutes)
    output = given.output or RESULTS / f"train-{time.strftime('%Y-%m-%d')}-{chosen.name}.json"
    folder = Path(tempfile.mkdtemp(prefix="signalbox-train-bench-"))
    try:
        device = "cuda:0" if chosen.name == "gpu" else "cpu"
        peers = tuple(name for name in given.peers.split(",") if name)
        print(text(Bench(chosen, peers, folder, output, device, given.threads or here.cores).run()))
        print(f"\nWritten to {output}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
