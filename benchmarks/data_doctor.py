"""How fast the doctor reads a million rows, beside the least that anybody could do: a plain json.loads of every line.

`python -m benchmarks.data_doctor [--rows N] [--peers datasets]` writes about 1 GB of conversations into a temporary folder,
lets every arm read it in a process of its own, in turns, and writes times and peak memory to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
WORDS = "the signal box stands by line and its levers move points bells speak to next é “quoted” x\n".split(" ")
BAD_EVERY = 5000


def write_rows(path: Path, rows: int) -> None:
    """Conversations of about 1 KB a line, none like another; one row in 5,000 has a problem."""
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(30, 130))) for _ in range(5000)]
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            turns = [{"role": "user", "content": f"{number} {draw.choice(texts)}"}]
            if number % BAD_EVERY:
                turns.append({"role": "assistant", "content": draw.choice(texts)})
            file.write(json.dumps({"messages": turns}, ensure_ascii=False) + "\n")


def loop(path: Path) -> int:
    """The floor: every line parsed, nothing looked at."""
    with path.open("rb") as file:
        return sum(1 for line in file if json.loads(line))


def doctor(path: Path) -> int:
    """Structure, problems by line, repeats."""
    from trainer.data.doctor import check_data

    report = check_data(path)
    assert sum(report["counts"].values()) == -(-report["rows"] // BAD_EVERY), report["summary"]
    return report["rows"]


def worker(path: Path) -> int:
    """The same as the page asks for it: in the limited worker process. Peak memory is the worker's."""
    from trainer.worker import Worker

    asked = Worker()
    try:
        return asked.call("check_data", timeout_s=3600, path=str(path))["rows"]
    finally:
        asked.close()


def datasets(path: Path) -> int:
    """Hugging Face datasets: the file into its own tables. It names no problem; rows without an answer are rows."""
    from datasets import load_dataset

    with tempfile.TemporaryDirectory() as cache:
        return len(load_dataset("json", data_files=str(path), cache_dir=cache, split="train"))


ARMS = {"json.loads loop": loop, "doctor": doctor, "doctor in the worker": worker, "datasets": datasets}


def measure(arm: str, path: Path) -> dict[str, Any]:
    """One arm in a process of its own: seconds on the clock and of the processor, peak memory in MiB."""
    command = [sys.executable, "-m", "benchmarks.data_doctor", "--arm", arm, "--file", str(path)]
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return json.loads(out.stdout.splitlines()[-1])


def _one(arm: str, path: Path) -> None:
    started = time.monotonic()
    rows = ARMS[arm](path)
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime
    peak = max(own.ru_maxrss, children.ru_maxrss) / 1024
    print(json.dumps({"rows": rows, "wall_s": time.monotonic() - started, "cpu_s": seconds, "peak_mib": peak}))


def main() -> None:
    """Measure all arms in turns and write the result."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", default="", help="datasets, where it is installed")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.arm:
        _one(arguments.arm, arguments.file)
        return
    arms = [arm for arm in ARMS if arm != "datasets" or "datasets" in arguments.peers]
    found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        write_rows(path, arguments.rows)
        size = path.stat().st_size
        loads = [os.getloadavg()[0]]
        for number in range(arguments.rounds):
            for arm in arms:
                if arm == "datasets" and number:  # it takes minutes; once tells its order of size
                    continue
                found[arm].append(measure(arm, path))
                print(f"{arm}: {found[arm][-1]}", flush=True)
        loads.append(os.getloadavg()[0])
    conditions = {"rows": arguments.rows, "bytes": size, "cores": os.cpu_count(), "load_average": loads}
    conditions |= {"python": platform.python_version(), "day": time.strftime("%Y-%m-%d")}
    RESULTS.mkdir(exist_ok=True)
    target = RESULTS / f"data-doctor-{time.strftime('%Y-%m-%d')}.json"
    target.write_text(json.dumps({"conditions": conditions, "arms": found}, indent=1) + "\n")
    print(target.name)


if __name__ == "__main__":
    main()
