"""Gradient checkpointing (Chen et al. 2016, arXiv:1604.06174): on, off, and whether it is."""

from __future__ import annotations

import warnings
from typing import Any, Literal

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from trainer.refusal import Refusal

PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}


def recompute(model: PreTrainedModel, policy: Literal["full", "selective"]) -> None:
    """Recompute activations in the backward pass; "selective" keeps the matrix products and recomputes the rest."""
    arguments: dict[str, Any] = {"use_reentrant": False}
    if policy == "selective":
        arguments["context_fn"] = lambda: create_selective_checkpoint_contexts(_keep_products)
    if not model.supports_gradient_checkpointing:
        raise Refusal(
            f"{type(model).__name__} has no gradient checkpointing. Switch it off.",
            "hyperparams.use_gradient_checkpointing",
        )
    with warnings.catch_warnings():
        # renamed to activation_checkpointing_enable in transformers 5.20; ours begins at 5.17, this name ends with 6
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)


def keep(model: PreTrainedModel) -> None:
    """Keep all activations again."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_disable()


def recomputes(model: PreTrainedModel) -> bool:
    """Whether any layer recomputes its activations."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def _keep_products(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE
