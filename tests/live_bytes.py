"""Every tensor that is alive while something computes, counted at the dispatcher: what a memory forecast is held against."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages made inside the context and still alive (`now`), and the most there were at once (`peak`).

    What existed before is not counted. `shapes()` says which tensors they are; a storage is counted once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, tuple[int, tuple[int, ...], str, str]] = {}
        self._before: set[int] = set()

    def leave_out(self, tensors: Any) -> None:
        """Do not count these tensors' storages, should an operation hand them out again."""
        self._before |= {tensor.untyped_storage()._cdata for tensor in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                self._see(tensor, before, str(func))
        return out

    def _see(self, tensor: torch.Tensor, arguments: set[int], func: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known or key in self._before or key in arguments:
            return
        size = storage.nbytes()
        self._known[key] = (size, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), func)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self._known.pop(key)[0]

    def shapes(self) -> Counter[tuple[tuple[int, ...], str, str]]:
        """How many living storages there are of each shape and format, with the operation that made them."""
        return Counter((shape, dtype, func) for _, shape, dtype, func in self._known.values())
