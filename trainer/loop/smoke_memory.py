"""The smoke test's look at memory: whether the longest rows may be tried, what they took, and whether it was given back.

Facts are those of torch's allocator on a GPU, of the kernel's count for this process elsewhere, and of the tensors alive.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trainer.fit_history import Measured
from trainer.loop.fit import Fit
from trainer.loop.memory import memory_text
from trainer.loop.prepare import Left, Model
from trainer.loop.smoke_steps import Enough
from trainer.machine import GIB
from trainer.report import Report
from trainer.session import free_memory, used_gib

MAY_KEEP_GIB = 0.1  # of a GPU's memory reserved; the context itself is not torch's to count
MAY_KEEP_TENSORS_GIB = 0.25 / 1024
MAY_KEEP_OF_PROCESS_GIB, MAY_KEEP_SHARE = 0.5, 0.25
"""Libraries that a first test loads, and pages that the C library keeps of what a test took at its peak."""


def refuse_what_cannot_fit(fit: Fit, device: str, room_gib: float) -> None:
    """On a processor the system ends the whole server where memory runs out: Enough where the longest rows cannot fit.

    They are tried wherever the forecast, less its own error, leaves room; a GPU only raises an error, and is always tried.
    """
    plain = fit.forecast
    taken = sum(plain.parts[name] for name in ("weights", "optimiser states", "libraries"))
    least = plain.total_gib * (1 - plain.error) - taken
    if device == "cpu" and least > room_gib:
        raise Enough(
            "memory",
            f"Too little memory for the longest rows ({fit.work.longest:,} tokens): they need at least {memory_text(least)} more "
            f"and {memory_text(room_gib)} is free. They were not tried, since the system would end the server; the remaining "
            "checks were left out. Lower the micro-batch or the maximum length, switch gradient checkpointing on, or use LoRA.",
        )


def peak(report: Report, fit: Fit, measured: Measured | None, began: bool) -> None:
    """What the longest rows took at their peak, beside the forecast; `began` is whether the kernel counted anew."""
    where = f"at the longest rows ({fit.work.longest:,} tokens, micro-batch {fit.packs_each})"
    if measured is None or not (began or fit.device != "cpu"):
        report.add("memory", "not_possible", f"Peak memory {where}: this system does not tell it.")
        return
    gib, expected = measured.measured_gib, measured.forecast_gib
    what = "Peak process memory" if fit.device == "cpu" else "Peak memory"
    text = f"{what} {memory_text(gib)} {where}; the estimate was {memory_text(expected)}."
    report.add("memory", "pass", text, memory_text(gib))


@dataclass(frozen=True)
class Before:
    """What was in use when the test began, GiB: of the device (the process on a processor), and in tensors alive."""

    gpu: bool
    used_gib: float
    tensors_gib: float

    @classmethod
    def now(cls, gpu: bool) -> Before:
        """Measured now."""
        return cls(gpu, used_gib(gpu), tensors_gib())


def tensors_gib() -> float:
    """GiB of the storages of all tensors that Python holds in this process, each storage once."""
    found: dict[int, int] = {}
    objects = gc.get_objects()
    kinds = {
        kind for kind in set(map(type, objects)) if issubclass(kind, torch.Tensor)
    }  # half a million objects, few kinds
    for item in objects:
        if type(item) in kinds:
            try:
                storage = item.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
            except (RuntimeError, NotImplementedError):  # no storage of its own: a fake or sparse tensor
                continue
    return sum(found.values()) / GIB


def given_back(report: Report, before: Before, peak_gib: float | None) -> None:
    """Collect, give memory back, measure: no tensor of the test may be alive, and the memory must be free again."""
    after = float(free_memory(before.gpu, None)["memory_after_gib"] or 0.0)
    kept, tensors = after - before.used_gib, tensors_gib() - before.tensors_gib
    what = "GPU memory" if before.gpu else "Process memory"
    text = f"{what} {before.used_gib:.2f} GiB before, {after:.2f} GiB after; {memory_text(max(0.0, tensors))} of tensors left."
    took = max(0.0, (peak_gib or after) - before.used_gib)
    limit = MAY_KEEP_GIB if before.gpu else MAY_KEEP_OF_PROCESS_GIB + MAY_KEEP_SHARE * took
    if kept < limit and tensors < MAY_KEEP_TENSORS_GIB:
        report.add("memory_back", "pass", f"Memory given back. {text}", f"{kept:+.2f} GiB")
        return
    report.add(
        "memory_back",
        "problem",
        f"Memory was not given back. {text} Nothing was changed on the disk. Restart the server before you start a run: it would "
        "have that much less.",
        f"{kept:+.2f} GiB",
    )


@contextmanager
def stoppable_inside(model: Model, interrupt: Callable[[], bool]) -> Iterator[None]:
    """While this is open, a stop ends a forward pass, a generation or a recomputation at its next layer (raises Left)."""

    def look(module: nn.Module, arguments: Any) -> None:
        if interrupt():
            raise Left()

    # a compiled layer would be compiled again with the hook in it; a stop waits for the end of its step
    lists = [m for m in model.loaded.model.modules() if isinstance(m, nn.ModuleList) and len(m)]
    layers = [layer for layer in (lists[0] if lists else []) if layer._compiled_call_impl is None]
    hooks = [layer.register_forward_pre_hook(look) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
