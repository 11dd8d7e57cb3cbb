"""Attention inside documents: several rows stand in one line of tokens and none sees another.

Registered with transformers as "signalbox_documents"; the loop passes `documents=Documents(...)` to the model, which hands it
to every layer. Shapes: H heads, T tokens of the micro-batch, D head size.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "signalbox_documents"


@dataclass(frozen=True)
class Documents:
    """Where the documents of a micro-batch begin and end: `borders` = (0, end of first, ..., T), also as int32 on the device."""

    borders: tuple[int, ...]
    cumulative: torch.Tensor  # (documents + 1,)
    longest: int


class DocumentAttention:
    """The attention function, with a count of the kernels it really called (`calls`)."""

    def __init__(self, kernel: str) -> None:
        self.kernel = kernel
        self.calls: Counter[str] = Counter()

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        documents: Documents | None = None,
        s_aux: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """query (1, H, T, D), key and value (1, H or fewer, T, D), s_aux (H,): attention sinks -> (1, T, H, D)."""
        sinks = s_aux
        if documents is None:  # generation and single rows: one sequence with a cache, transformers' own path
            self._count("sdpa")
            if softcap is not None or sinks is not None:
                scaled = scaling if scaling is not None else query.shape[-1] ** -0.5
                out = _by_hand(query, key, value, dropout, scaled, sliding_window, softcap, sinks)
                return out.transpose(1, 2), None
            return sdpa_attention_forward(
                module,
                query,
                key,
                value,
                attention_mask,
                dropout=dropout,
                scaling=scaling,
                **kwargs,
            )
        scaling = scaling if scaling is not None else query.shape[-1] ** -0.5
        if torch.is_autocast_enabled(query.device.type):
            # rotary embeddings give float32 while the values are half: one format, or no fast kernel takes them
            format_ = torch.get_autocast_dtype(query.device.type)
            query, key, value = query.to(format_), key.to(format_), value.to(format_)
        half = query.dtype in (torch.bfloat16, torch.float16)
        if self.kernel != "sdpa" and half and softcap is None and sinks is None and dropout == 0.0:
            self._count(self.kernel)
            function = _varlen if self.kernel == "varlen" else _flash
            return function(query, key, value, documents, scaling, sliding_window), None
        self._count("sdpa per document")
        return _each_document(query, key, value, documents, dropout, scaling, sliding_window, softcap, sinks), None

    def _count(self, kernel: str) -> None:
        if not torch.compiler.is_compiling():  # a changing number in the graph would compile it again at every call
            self.calls[kernel] += 1


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    documents: Documents,
    scaling: float,
    window: int | None,
) -> torch.Tensor:
    """FlashAttention-2 (Dao 2023) as torch ships it; needs CUDA and a half format."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # (T, H, D)
    out = varlen_attn(
        q,
        k,
        v,
        documents.cumulative,
        documents.cumulative,
        documents.longest,
        documents.longest,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out.unsqueeze(0)  # type: ignore[union-attr]  # a tuple only where aux values are asked for


def _flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    documents: Documents,
    scaling: float,
    window: int | None,
) -> torch.Tensor:
    """The same kernel from the flash-attn package, for a torch whose own has another signature."""
    from flash_attn import flash_attn_varlen_func

    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    borders, longest = documents.cumulative, documents.longest
    out = flash_attn_varlen_func(
        q,
        k,
        v,
        borders,
        borders,
        longest,
        longest,
        softmax_scale=scaling,
        causal=True,
        window_size=(-1 if window is None else window - 1, 0),
    )
    return out.unsqueeze(0)


def _each_document(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    documents: Documents,
    dropout: float,
    scaling: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Exact everywhere: plain causal attention, one document after the other."""
    parts = []
    grouped = query.shape[1] != key.shape[1]
    for start, end in zip(documents.borders, documents.borders[1:], strict=False):
        q, k, v = (tensor[:, :, start:end] for tensor in (query, key, value))
        if softcap is not None or sinks is not None:
            parts.append(_by_hand(q, k, v, dropout, scaling, window, softcap, sinks))
            continue
        mask = None if window is None or end - start <= window else _band(end - start, window, query.device)
        parts.append(
            F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                is_causal=mask is None,
                dropout_p=dropout,
                scale=scaling,
                enable_gqa=grouped,
            )
        )
    return torch.cat(parts, dim=2).transpose(1, 2)


def _band(length: int, window: int, device: torch.device) -> torch.Tensor:
    """(length, length), True where a token sees another: itself and the `window` - 1 before it."""
    ones = torch.ones(length, length, dtype=torch.bool, device=device)
    return ones.tril() & ones.triu(1 - window)


def _by_hand(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout: float,
    scaling: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """What no fused kernel here does: scores pressed into +-softcap by tanh before the softmax (Gemma 2,
    arXiv:2408.00118, section 2), or a learnt score of each head that takes its share and gives no value (sinks, gpt-oss).

    q (1, H, Q, D), k and v (1, H or fewer, K, D) with K >= Q: the queries are the last of the sequence; sinks (H,).
    -> (1, H, Q, D)
    """
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.transpose(2, 3) * scaling  # (1, H, Q, K)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    seen = _band(k.shape[2], window or k.shape[2], q.device)[-q.shape[2] :]
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        column = sinks.to(scores.dtype).reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], -1)
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype)[..., : k.shape[2]]
    return F.dropout(weights, dropout) @ v


def _mask(*args: Any, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor | None:
    """No mask tensor for our own function; a caller with padding gets transformers' own."""
    if attention_mask is None:
        return None
    return sdpa_mask(*args, attention_mask=attention_mask, **kwargs)  # type: ignore[misc]


def choose_kernel(device: str) -> str:
    """The fastest exact kernel this device and this installation have: "varlen", "flash_attn" or "sdpa"."""
    if not device.startswith("cuda") or torch.cuda.get_device_capability()[0] < 8:
        return "sdpa"
    if importlib.util.find_spec("torch.nn.attention.varlen") is not None:
        import inspect

        from torch.nn.attention.varlen import varlen_attn

        if {"scale", "window_size", "enable_gqa"} <= set(inspect.signature(varlen_attn).parameters):
            return "varlen"
    return "flash_attn" if importlib.util.find_spec("flash_attn") is not None else "sdpa"


def register(kernel: str) -> DocumentAttention:
    """Make a fresh attention function known to transformers under NAME and return it."""
    attention = DocumentAttention(kernel)
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, _mask)
    return attention
