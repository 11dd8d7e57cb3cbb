"""bitsandbytes, imported so that it stays on this machine, and kept trainable on a processor."""

from __future__ import annotations

import importlib
import logging
import sys
from typing import Any

from torch import nn


def import_bitsandbytes() -> Any:
    """The package, without its search for a faster kernel: it would run native code that a hub sends.

    That search is made once, at the first import, where the package `kernels` is installed; its complaint otherwise
    would stand in the log of a healthy run.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    before = sys.modules.get("kernels")
    sys.modules["kernels"] = None  # type: ignore[assignment]  # importing a module that stands as None fails
    try:
        return importlib.import_module("bitsandbytes")
    finally:
        if before is None:
            del sys.modules["kernels"]
        else:
            sys.modules["kernels"] = before


def keep_layout(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights at the first pass without gradients (AVX-512 with bf16).

    A repacked layer has no backward pass: after one held-out check the gradient would be wrong without a word.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010  # nn.Module's hints know tensors alone
