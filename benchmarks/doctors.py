"""How long the model doctor takes: the header verdict on 100 shards of more than 1 GB each, and the shape verdict on
architectures at their real sizes.

    python -m benchmarks.doctors [--out FILE]

The shards are sparse files, which cost no disk: a verdict reads headers, not numbers. The layout is the library's own
(`save_pretrained`'s names and shapes of a config), so the shape verdict has nothing to complain of. A CPU, no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from trainer.models.full_report import full_report
from trainer.worker import Worker

REPEATS = 7
SHARDS = 100
# name -> model_type and the sizes of a published model of that kind
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3, 0.6 billion": {
        "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072,
        "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
        "tie_word_embeddings": True,
    },
    "llama, 70 billion": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672,
        "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "tie_word_embeddings": False,
    },
    "mixtral, 141 billion": {
        "model_type": "mixtral", "vocab_size": 32768, "hidden_size": 6144, "intermediate_size": 16384,
        "num_hidden_layers": 56, "num_attention_heads": 48, "num_key_value_heads": 8, "num_local_experts": 8,
        "tie_word_embeddings": False,
    },
    "qwen3_moe, 235 billion": {
        "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288,
        "moe_intermediate_size": 1536, "num_hidden_layers": 94, "num_attention_heads": 64, "num_key_value_heads": 4,
        "head_dim": 128, "num_experts": 128, "tie_word_embeddings": False,
    },
}  # fmt: skip
_MAKE_LAYOUT = """
import json, sys
from trainer.models.blueprint import build, layout_of
layout = layout_of(build(json.load(sys.stdin)))
json.dump({name: shape for name, shape in layout.tensors.items() if name not in layout.tied}, sys.stdout)
"""


def layout_of(config: dict[str, Any]) -> dict[str, list[int]]:
    """Names and shapes of a config's weights, from a process of its own, so that this one stays without torch."""
    command = [sys.executable, "-c", _MAKE_LAYOUT]
    done = subprocess.run(command, input=json.dumps(config), capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def write_shards(folder: Path, config: dict[str, Any], tensors: dict[str, list[int]], shards: int) -> int:
    """Sparse bf16 shards with an index; returns their bytes together."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["Benchmark"]}))
    sizes = {name: 2 * _product(shape) for name, shape in tensors.items()}
    share, held = sum(sizes.values()) / shards, 0.0
    groups: list[list[str]] = [[]]
    for name, size in sizes.items():
        if held >= share and len(groups) < shards:
            groups.append([])
            held -= share
        groups[-1].append(name)
        held += size
    places, total = {}, 0
    for number, names in enumerate(groups, 1):
        file = f"model-{number:05}-of-{len(groups):05}.safetensors"
        header, at = {}, 0
        for name in names:
            header[name] = {"dtype": "BF16", "shape": tensors[name], "data_offsets": [at, at + sizes[name]]}
            at += sizes[name]
            places[name] = file
        raw = json.dumps(header).encode()
        (folder / file).write_bytes(len(raw).to_bytes(8, "little") + raw)
        os.truncate(folder / file, 8 + len(raw) + at)
        total += at
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return total


def _product(shape: list[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def measure(folder: Path, layouts: Path) -> dict[str, float]:
    """Seconds: the header verdict in this process, both verdicts through the worker without and with a kept layout."""
    from trainer.models.inspect import inspect_model

    headers, processor = [], []
    for _ in range(REPEATS):
        start_s, start_cpu_s = time.perf_counter(), time.process_time()
        report = inspect_model(folder)
        headers.append(time.perf_counter() - start_s)
        processor.append(time.process_time() - start_cpu_s)
    assert [problem["code"] for problem in report["problems"]] == ["no_tokenizer"], report["problems"]
    seconds = {"header_s": statistics.median(headers), "header_worst_s": max(headers)}
    seconds["header_cpu_s"] = statistics.median(processor)
    worker = Worker()
    try:
        worker.call("warm", timeout_s=120)
        for name in ("shapes_new_s", "shapes_kept_s"):
            start_s = time.perf_counter()
            report = full_report(worker.call, folder, layouts=layouts)
            seconds[name] = time.perf_counter() - start_s
            assert report["facts"]["shapes"] == "as expected", report
    finally:
        worker.close()
    return seconds


def main() -> int:
    """Measure all configs and print a table; `--out` keeps the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for number, (name, config) in enumerate(CONFIGS.items()):
            tensors = layout_of(config)
            shards = 1 if number == 0 else SHARDS
            folder = Path(scratch) / str(number)
            size = write_shards(folder, config, tensors, shards)
            files = len(list(folder.glob("*.safetensors")))
            row = {"model": name, "shards": files, "gb": size / 1e9, "tensors": len(tensors)}
            row |= measure(folder, Path(scratch) / "layouts")
            rows.append(row)
            print(
                f"{name}: {files} shards, {row['gb']:.0f} GB, {len(tensors):,} tensors; headers {row['header_s']:.3f} s "
                f"(worst {row['header_worst_s']:.3f}, processor {row['header_cpu_s']:.3f}); "
                f"both verdicts {row['shapes_new_s']:.1f} s, "
                f"with the layout kept {row['shapes_kept_s']:.2f} s",
                flush=True,
            )
    if arguments.out:
        machine = {"cores": os.cpu_count(), "python": platform.python_version(), "load": os.getloadavg()[0]}
        arguments.out.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
