"""The smoke test's look at attention: the kernel that was announced, those that the steps called, the operators that ran."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.data.loader import assemble
from trainer.loop.forward import losses
from trainer.loop.prepare import Model
from trainer.report import Report

SDPA = "scaled_dot_product_attention"
OPERATORS = {"varlen": ("varlen",), "flash_attn": ("flash_attn",), "sdpa per document": (SDPA,)}
"""What stands in the name of the operator that each of our kernels ends in."""


class _Operators(TorchDispatchMode):
    """Notes each operator of attention that torch runs."""

    def __init__(self, seen: Counter[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if "attn" in name or "attention" in name:
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


class _Calls(TorchFunctionMode):
    """Notes each call of torch's scaled dot product attention, which may take itself apart into plain products."""

    def __init__(self, seen: Counter[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") == SDPA:
            self.seen[SDPA] += 1
        return func(*args, **(kwargs or {}))


def announced(model: Model) -> frozenset[str]:
    """What the start's log line names: the kernels of its trial pass. To be asked before any other pass."""
    return frozenset(model.loaded.attention.calls) - {"sdpa"}


def attention_called(report: Report, model: Model, said: frozenset[str], cache: Any, rows: np.ndarray) -> None:
    """The steps called the kernel that was `said`, and the operators of a pass over `rows` are that kernel's."""
    called = frozenset(name for name in model.loaded.attention.calls if name != "sdpa")
    if not called and not said:
        report.add("attention", "pass", "Attention: the model's own; no row sees another.")
        return
    seen = _operators(model, cache, rows)
    what_ran = ", ".join(sorted(seen)) or "plain products"
    missing = [
        kernel
        for kernel in called
        if not any(part in name for part in OPERATORS.get(kernel, (kernel,)) for name in seen)
    ]
    if called == said and (not missing or (called == {"sdpa per document"} and _by_hand(model))):
        kernel = ", ".join(sorted(called))
        count = sum(model.loaded.attention.calls[name] for name in called)
        text = f"Attention really called: {kernel}, {count:,} times, in torch {what_ran}; no row sees another."
        report.add("attention", "pass", text, kernel)
        return
    report.add(
        "attention",
        "problem",
        f"Another attention kernel ran than was announced: {_list(said)} announced, {_list(called)} counted in the steps, "
        f"{what_ran} seen on {len(rows)} of the longest rows. Losses are checked apart and stay right; memory and speed are "
        "not those forecast. Go by this test's figures, or lower the maximum length.",
        _list(called),
    )


def _list(names: frozenset[str]) -> str:
    return ", ".join(sorted(names)) or "the model's own"


def _by_hand(model: Model) -> bool:
    """Whether the family caps its scores or has sinks, which no operator of torch does: products then, and a softmax."""
    config = model.loaded.model.config.get_text_config()
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    return capped or any(name.endswith("sinks") for name, _ in model.loaded.model.named_parameters())


def _operators(model: Model, cache: Any, rows: np.ndarray) -> Counter[str]:
    """Attention operators of one forward pass over `rows`, as torch itself calls them."""
    seen: Counter[str] = Counter()
    batch = assemble(cache, rows, model.stepper.device)
    counted = model.loaded.attention.calls.copy()
    compiled = any(module._compiled_call_impl is not None for module in model.loaded.model.modules())
    # compiled code calls what it was made from; only there, since this imports the compiler
    plain = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
    with plain, torch.no_grad(), _Calls(seen), _Operators(seen):
        losses(model.loaded.model, batch, model.choice.path)
    model.loaded.attention.calls.clear()
    model.loaded.attention.calls.update(counted)
    return seen
