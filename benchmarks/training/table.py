"""The figures for a person: one table a case, and how many times as fast ours is."""

from __future__ import annotations

from typing import Any

from benchmarks.training.figures import ratios
from benchmarks.training.suites import Suite

HEAD = "| arm | real tokens/s | label tokens/s | MFU | peak GiB | s a step (shortest - longest) | loss, first -> last | rounds |"


def compared(suite: Suite, peers: tuple[str, ...], results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every arm of ours beside every peer's, group by group; `same_steps` where both trained the same rows in each step."""
    lines = []
    for group in suite.groups:
        names = {case.name: case.full_rows for case in suite.cases if case.group == group}
        mine = [result for result in results if result["case"] in names]
        arms = suite.arms(group, peers)
        for ours in (arm for arm in arms if arm.peer == "ours"):
            for peer in (arm for arm in arms if arm.peer != "ours"):
                for line in ratios(mine, ours.name, peer.name):
                    same = ours.form == peer.form or names[line["case"]]
                    if not same:
                        line["first_loss_difference"] = line["largest_loss_difference"] = None
                    lines.append(line | {"same_steps": same})
    return lines


def text(everything: dict[str, Any]) -> str:
    """The tables in Markdown."""
    device, parts = everything["device"], []
    parts.append(f"{device['name']}, torch {everything['versions']['torch']}, suite {everything['suite']}")
    for case in dict.fromkeys(line["case"] for line in everything["summary"]):
        parts += ["", f"{case}", "", HEAD, "| " + "--- | " * (HEAD.count("|") - 1)]
        parts += [_line(line) for line in everything["summary"] if line["case"] == case]
        parts += [_ratio(line) for line in everything["ratios"] if line["case"] == case]
    return "\n".join(parts)


def _line(line: dict[str, Any]) -> str:
    if line["status"] != "measured":
        why = f" ({line['why']})" if line.get("why") else ""
        return f"| {line['arm']} | {line['status']}{why} |" + " |" * 6
    step, mfu = line["step_s"], line["mfu"]
    share = "not known" if mfu is None else f"{100 * mfu:.1f} %"
    return (
        f"| {line['arm']} | {line['tokens_per_s']:,.0f} | {line['labels_per_s']:,.0f} | {share} | {line['peak_gib']:.2f} "
        f"| {step['median']:.3g} ({step['shortest']:.3g} - {step['longest']:.3g}) "
        f"| {line['first_loss']:.4f} -> {line['last_loss']:.4f} | {line['rounds']} |"
    )


def _ratio(line: dict[str, Any]) -> str:
    said = f"  {line['ours']} / {line['peer']}: {line['ratio']:.2f}x [{line['least']:.2f} - {line['greatest']:.2f}]"
    said += f", by processor time {line['processor_ratio']:.2f}x, memory {line['memory_ratio']:.2f}x"
    if line["same_steps"]:
        said += (
            f"; losses differ by {line['first_loss_difference']:.1e} at the first step, at most "
            f"{line['largest_loss_difference']:.1e}"
        )
    return said + ("" if line["same_steps"] else "; same rows in all, other rows in each step")
