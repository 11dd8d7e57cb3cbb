"""Router losses of experts (Fedus et al. 2022, arXiv:2101.03961, equations 4 to 6): each row's own, as transformers has it.

Only where the model's config.json says output_router_logits. The load-balancing loss is no sum over tokens, so a step's
is defined here: the mean over its rows, weighted by their tokens. For one row it is transformers' own to the last term,
and it does not depend on which rows share a micro-batch.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from transformers import PreTrainedModel


def coefficient(model: PreTrainedModel) -> float | None:
    """The weight of the router loss in the model's own `.loss`; None where it adds none."""
    wanted = getattr(model.config.get_text_config(), "output_router_logits", False)
    weight = getattr(model, "router_aux_loss_coef", None)
    return float(weight) if wanted and weight else None


def of_rows(model: PreTrainedModel, router_logits: Any, borders: tuple[int, ...]) -> torch.Tensor:
    """Router loss of each row of a packed pass, (rows,) float32: the model's own function on the row's part alone.

    `router_logits`: one (T, experts) for each layer. Raises NotImplementedError where the family has no such function.
    """
    balance = getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
    if balance is None or not isinstance(router_logits, tuple) or not router_logits:
        raise NotImplementedError("its router loss is not that of a known kind")
    experts, chosen = model.num_experts, model.num_experts_per_tok
    return torch.stack(
        [
            balance(tuple(layer[start:end] for layer in router_logits), experts, chosen).float()
            for start, end in zip(borders, borders[1:], strict=False)
        ]
    )


def weighted_sum(losses: torch.Tensor, cumulative: torch.Tensor) -> torch.Tensor:
    """Sum of the rows' router losses, each times its tokens, 0-dim; `cumulative` (rows + 1,) are the borders."""
    return (losses * cumulative.diff()).sum()
