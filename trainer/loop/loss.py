"""Cross-entropy of the labels alone, in chunks, gradients formed in the forward pass; the whole logits never exist.

n labels, D hidden size, V vocabulary. Sums are float32. Reference: the same numbers from logits and F.cross_entropy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

CHUNK_BYTES = 256 << 20  # of float32 logits at a time


@dataclass(frozen=True)
class Head:
    """A head that is a plain matrix, with what some families do to its logits: `logits = cap(scale * (W h + b))`."""

    linear: nn.Linear
    scale: float = 1.0
    softcap: float | None = None


class _LinearCrossEntropy(torch.autograd.Function):
    """Loss of each label, and the gradients of their sum for hidden states and head."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        scale: float,
        softcap: float | None,
        compute: torch.dtype,
    ) -> torch.Tensor:
        """hidden (n, D), weight (V, D), bias (V,) or None, targets (n,) -> losses (n,) float32."""
        losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        w = weight.to(compute)
        # float32 until the factor is known: 1 / labels rounded to bf16 would scale every step by up to 0.4 %
        d_hidden = torch.empty_like(hidden, dtype=torch.float32)
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if weight.requires_grad else None
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and bias.requires_grad else None
        for piece in _chunks(len(targets), weight.shape[0]):
            h = hidden[piece].to(compute)
            d_logits = _chunk_losses(h, w, bias, targets[piece], scale, softcap, losses[piece])
            d_logits_c = d_logits.to(compute)
            d_hidden[piece] = (d_logits_c @ w).float()
            if d_weight is not None and compute == torch.float32:
                d_weight.addmm_(d_logits_c.t(), h)  # no second matrix as large as the head
            elif d_weight is not None:
                d_weight += (d_logits_c.t() @ h).float()
            if d_bias is not None:
                d_bias += d_logits.sum(0)
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.dtypes = (hidden.dtype, weight.dtype, bias.dtype if bias is not None else None)
        return losses

    @staticmethod
    def backward(ctx: Any, *d_losses: torch.Tensor) -> tuple[Any, ...]:
        """The gradients were formed for a loss that sums all labels with one factor, so that factor is all that is needed."""
        d_hidden, d_weight, d_bias = ctx.saved_tensors
        factor = d_losses[0][0]
        hidden_dtype, weight_dtype, bias_dtype = ctx.dtypes
        return (
            (d_hidden * factor).to(hidden_dtype),
            None if d_weight is None else (d_weight * factor).to(weight_dtype),
            None if d_bias is None else (d_bias * factor).to(bias_dtype),
            None,
            None,
            None,
            None,
        )


def _chunks(labels: int, vocabulary: int) -> list[slice]:
    rows = max(1, CHUNK_BYTES // (4 * vocabulary))
    return [slice(start, start + rows) for start in range(0, labels, rows)]


def _chunk_losses(
    h: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    scale: float,
    softcap: float | None,
    losses: torch.Tensor,
) -> torch.Tensor:
    """Fill `losses` (n,) and return d(sum of losses)/d(W h + b), (n, V) float32."""
    logits = (h @ w.t()).float()
    if bias is not None:
        logits += bias.float()
    if scale != 1.0:
        logits *= scale
    capped = torch.tanh(logits / softcap) if softcap is not None else None
    if capped is not None and softcap is not None:
        logits = capped * softcap
    # one kernel for normaliser and difference, then in place: each pass over n x V numbers costs as much as a small layer
    log_probabilities = torch.log_softmax(logits, 1)
    at = targets.unsqueeze(1)
    torch.neg(log_probabilities.gather(1, at).squeeze(1), out=losses)
    d_logits = log_probabilities.exp_()
    d_logits.scatter_add_(1, at, d_logits.new_full((1, 1), -1.0).expand_as(at))
    if capped is not None:
        d_logits *= 1.0 - capped * capped
    return d_logits * scale if scale != 1.0 else d_logits


def label_losses(hidden: torch.Tensor, head: Head, targets: torch.Tensor, compute: torch.dtype) -> torch.Tensor:
    """Loss of each label, (n,) float32, in nats; differentiable as long as all labels share one factor (a sum).

    hidden (n, D) are the states one before each trained token; `compute` is the format of the matrix products.
    """
    weight, bias = head.linear.weight, head.linear.bias
    if torch.is_grad_enabled():
        # autocast would turn the float32 sums inside back into half a format
        with torch.autocast(hidden.device.type, enabled=False):
            return _LinearCrossEntropy.apply(hidden, weight, bias, targets, head.scale, head.softcap, compute)
    losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):
        w = weight.to(compute)
        for piece in _chunks(len(targets), weight.shape[0]):
            _chunk_losses(hidden[piece].to(compute), w, bias, targets[piece], head.scale, head.softcap, losses[piece])
    return losses


def losses_from_logits(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Loss of each label from whole logits (n, V): the way for heads that are no plain matrix."""
    return F.cross_entropy(logits.float(), targets, reduction="none")
