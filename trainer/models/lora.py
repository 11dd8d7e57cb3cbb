"""LoRA (Hu et al. 2021, arXiv:2106.09685) through peft: which layers, how wide, and how an adapter is taken up again."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from trainer.refusal import Refusal


def sensible_targets(model: PreTrainedModel) -> list[str]:
    """Names of all linear layers inside the blocks; never the head, the embeddings or a router of experts.

    A router decides which expert sees a token: matrices added there change the routing of all of them.
    """
    head = model.get_output_embeddings()
    names = set()
    for path, module in model.named_modules():
        linear = isinstance(module, (nn.Linear, Conv1D)) or type(module).__name__ in (
            "Linear4bit",
            "Linear8bitLt",
        )
        name = path.rsplit(".", 1)[-1]
        if linear and module is not head and name not in ("router", "gate"):
            names.add(name)
    return sorted(names)


def add_lora(
    model: PreTrainedModel, *, rank: int, alpha: float, dropout: float, targets: list[str], seed: int
) -> PeftModel:
    """Freeze `model` and add trainable matrices in fp32; same seed, same starting matrices."""
    available = {path.rsplit(".", 1)[-1] for path, _ in model.named_modules()}
    unknown = [name for name in targets if name not in available]
    if unknown:
        known = ", ".join(sensible_targets(model))
        raise Refusal(
            f"LoRA target '{unknown[0]}' is no layer of this model. Its linear layers: {known}.",
            "lora.target_modules",
        )
    torch.manual_seed(seed)
    settings = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # peft takes any number, its hint says int
        lora_dropout=dropout,
        target_modules=targets or sensible_targets(model),
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by a name that 5.20 renamed
        return get_peft_model(model, settings)


def continue_lora(model: PreTrainedModel, adapter: Path) -> PeftModel:
    """Put a saved adapter on its base model and make it trainable again."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return PeftModel.from_pretrained(model, str(adapter), is_trainable=True, local_files_only=True)
