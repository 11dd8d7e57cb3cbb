"""From what the arms measured to figures: speeds, ratios within a round, and the share of the device's peak.

Pure arithmetic on plain data.
"""

from __future__ import annotations

import re
import statistics
from dataclasses import dataclass
from typing import Any

from benchmarks.training.suites import Shape

# Dense bf16 with fp32 sums, TFLOP/s, from NVIDIA's data sheets (the figures "with sparsity" halved). First match counts.
PEAKS_TFLOPS = (
    (r"H200", 989.0),
    (r"H100.*PCIe", 756.0),
    (r"H100.*NVL", 835.0),
    (r"H100", 989.0),
    (r"A100", 312.0),
    (r"L40S", 362.0),
    (r"\bL4\b", 121.0),
    (r"RTX 4090(?! [DL])", 165.0),
)


@dataclass(frozen=True)
class Timed:
    """The timed part of a run: tokens, labels, and the sum of the squared lengths of its rows."""

    tokens: int
    labels: int
    squares: int


def peak_tflops(device: str) -> float | None:
    """The device's dense bf16 peak, None where it is not known (a processor, a GPU that is not in the list)."""
    return next((peak for pattern, peak in PEAKS_TFLOPS if re.search(pattern, device)), None)


def model_flops(shape: Shape, timed: Timed, *, frozen: bool) -> float:
    """Floating-point operations that these tokens and labels need, the same for every arm.

    2 a weight and token forward, 2 for the inputs' gradients, 2 for the weights' own unless they are `frozen` (LoRA; its
    small matrices are left out). The head is counted for labels alone: what is computed for other tokens,
    for padding or a second time under checkpointing is no progress and lowers the share. Attention: causal, so half of
    4 x length^2 x heads x head size a layer forward, twice that backward.
    """
    passes = 4 if frozen else 6
    attention = 3 * 2 * timed.squares * shape.heads * shape.head_size * shape.layers
    return float(passes * (shape.body * timed.tokens + shape.head * timed.labels) + attention)


def speeds(result: dict[str, Any], peak: float | None) -> dict[str, float | None]:
    """Real tokens/s, label tokens/s, MFU (share of the peak, None where that is not known) of one measured result."""
    total = result["total_s"]
    return {
        "tokens_per_s": result["tokens"] / total,
        "labels_per_s": result["labels"] / total,
        "mfu": result["flops"] / total / (peak * 1e12) if peak is not None else None,
    }


def summary(results: list[dict[str, Any]], device: str) -> list[dict[str, Any]]:
    """One line for each case and arm: medians over the rounds, or why there is nothing to say."""
    peak = peak_tflops(device)
    lines = []
    for case, arm in dict.fromkeys((result["case"], result["arm"]) for result in results):
        mine = [result for result in results if (result["case"], result["arm"]) == (case, arm)]
        good = [result for result in mine if result["status"] == "measured"]
        line: dict[str, Any] = {"case": case, "arm": arm, "status": "measured" if good else mine[0]["status"]}
        line["rounds"] = len(good)
        if len(good) < len(mine):
            line["not_measured"] = [result["status"] for result in mine if result["status"] != "measured"]
        if not good:
            lines.append(line | {"why": mine[0].get("why")})
            continue
        each = [speeds(result, peak) for result in good]
        for key in ("tokens_per_s", "labels_per_s", "mfu"):
            line[key] = None if each[0][key] is None else statistics.median(one[key] for one in each)  # type: ignore[type-var]
        line["peak_gib"] = max(result["peak_gib"] for result in good)
        line["reserved_gib"] = None if good[0]["reserved_gib"] is None else max(r["reserved_gib"] for r in good)
        steps = sorted(second for result in good for second in result["step_s"])
        line["step_s"] = {"median": statistics.median(steps), "shortest": steps[0], "longest": steps[-1]}
        line["first_loss"], line["last_loss"] = good[0]["losses"][0], good[0]["losses"][-1]
        line["attention"] = good[0]["attention"]
        lines.append(line)
    return lines


def ratios(results: list[dict[str, Any]], ours: str, peer: str) -> list[dict[str, Any]]:
    """How many times as fast as `peer` our arm is, case by case: median, least and greatest of the rounds' own ratios."""
    lines = []
    for case in dict.fromkeys(result["case"] for result in results):
        by_round: dict[int, dict[str, dict[str, Any]]] = {}
        for result in results:
            if result["case"] == case and result["status"] == "measured":
                by_round.setdefault(result["round"], {})[result["arm"]] = result
        pairs = [(each[ours], each[peer]) for each in by_round.values() if ours in each and peer in each]
        if not pairs:
            continue
        on_cpu = [(a["tokens"] / a["cpu_s"]) / (b["tokens"] / b["cpu_s"]) for a, b in pairs]
        values = [speeds(a, None)["tokens_per_s"] / speeds(b, None)["tokens_per_s"] for a, b in pairs]  # type: ignore[operator]
        lines.append(
            {
                "case": case,
                "ours": ours,
                "peer": peer,
                "ratio": statistics.median(values),
                "least": min(values),
                "greatest": max(values),
                "rounds": len(values),
                "processor_ratio": statistics.median(on_cpu),
                "memory_ratio": statistics.median(a["peak_gib"] / b["peak_gib"] for a, b in pairs),
                "first_loss_difference": max(_relative(a["losses"][0], b["losses"][0]) for a, b in pairs),
                "largest_loss_difference": max(
                    _relative(x, y) for a, b in pairs for x, y in zip(a["losses"], b["losses"], strict=True)
                ),
            }
        )
    return lines


def _relative(a: float, b: float) -> float:
    return abs(a - b) / max(abs(b), 1e-12)
