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

ROUTERS = {"router", "gate", "shared_expert_gate"}
# in models with stacked experts peft (0.21) reads these names as the experts' weights of an older layout, whatever
# layer they name: it would leave the dense layers out and widen others without a word
EXPERT_NAMES = {"gate_proj", "up_proj", "down_proj", "gate_up_proj", "w1", "w2", "w3"}
# kernels of state-space layers read these weights themselves, past the matrices added to them; out_proj in these families
# alone (peft refuses it there)
PAST_MATRICES = {"x_proj", "dt_proj", "conv1d"}
MAMBA = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}


def is_linear(module: nn.Module) -> bool:
    """Whether matrices can be added to this layer's product; GPT-2's layers are Conv1D, 4-bit ones have own types."""
    return isinstance(module, (nn.Linear, Conv1D)) or type(module).__name__ in ("Linear4bit", "Linear8bitLt")


def has_stacked_experts(model: nn.Module) -> bool:
    """Whether the experts are one block of parameters instead of layers (transformers 5), which get no matrices."""
    for path, module in model.named_modules():
        if "experts" in path.split(".") and not is_linear(module):
            if any(parameter.dim() >= 2 for parameter in module.parameters(recurse=False)):
                return True
    return False


def _past_matrices(model: PreTrainedModel) -> set[str]:
    return PAST_MATRICES | ({"out_proj"} if model.config.model_type in MAMBA else set())


def sensible_targets(model: PreTrainedModel) -> list[str]:
    """Names of all linear layers inside the blocks; never the head, the embeddings, experts or a router of experts.

    A router decides which expert sees a token: matrices added there change the routing of all of them. With stacked
    experts the dense and shared MLPs are left out as well, see EXPERT_NAMES.
    """
    head = model.get_output_embeddings()
    left_out = _past_matrices(model) | (EXPERT_NAMES if has_stacked_experts(model) else set())
    names = set()
    for path, module in model.named_modules():
        if is_linear(module) and module is not head and not ROUTERS & set(path.split(".")):
            names.add(path.rsplit(".", 1)[-1])
    return sorted(names - left_out)


def _refuse(target: str, why: str, model: PreTrainedModel) -> Refusal:
    known = ", ".join(sensible_targets(model))
    return Refusal(f"LoRA target '{target}' {why}. Its linear layers: {known}.", "lora.target_modules")


def check_targets(model: PreTrainedModel, targets: list[str]) -> None:
    """Refuse, by name and in words, a target that names no layer, or one that cannot get matrices."""
    tied = bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
    ends = (model.get_output_embeddings(), model.get_input_embeddings())
    for target in targets:
        named = [module for path, module in model.named_modules() if f".{path}".endswith(f".{target}")]
        if not target or not named:
            raise _refuse(target, "is no layer of this model", model)
        if tied and any(module is end for module in named for end in ends):
            raise _refuse(target, "is tied to the embeddings: matrices on one of the two would part them", model)
        if not all(is_linear(module) for module in named):
            raise _refuse(target, "is no linear layer of this model", model)
        last = target.rsplit(".", 1)[-1]
        if last in EXPERT_NAMES and has_stacked_experts(model):
            raise _refuse(target, "belongs to the MLPs of a model with experts, which LoRA leaves as they are", model)
        if last in _past_matrices(model):
            raise _refuse(target, "is read past its matrices by this family's kernels", model)


def add_lora(
    model: PreTrainedModel, *, rank: int, alpha: float, dropout: float, targets: list[str], seed: int
) -> PeftModel:
    """Freeze `model` and add trainable matrices in fp32; same seed, same starting matrices. Refusal for bad targets."""
    check_targets(model, targets)
    chosen = targets or sensible_targets(model)
    if not chosen:
        raise Refusal("This model has no linear layer that LoRA could train. Use full training.", "hyperparams.method")
    named = [module for path, module in model.named_modules() if any(f".{path}".endswith(f".{t}") for t in chosen)]
    torch.manual_seed(seed)
    settings = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # peft takes any number, its hint says int
        lora_dropout=dropout,
        target_modules=chosen,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in named),
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


def targets_line(trained: PeftModel) -> str:
    """For the log: the layers that got matrices, and what of a model with experts did not."""
    names = {path.rsplit(".", 1)[-1] for path, module in trained.named_modules() if hasattr(module, "lora_A")}
    line = f"LoRA matrices on: {', '.join(sorted(names))}."
    if has_stacked_experts(trained.get_base_model()):
        line += " The experts, their router and the MLPs beside them stay as they are."
    return line
