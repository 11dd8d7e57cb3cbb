"""From a model directory to a model and a tokenizer in memory. Model code of the directory is never run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from trainer.launch import base_of
from trainer.models import attention
from trainer.models.bits import import_bitsandbytes, keep_layout
from trainer.packages import has_bitsandbytes
from trainer.refusal import Refusal

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# what a model's config.json may set to choose a kernel, which could make transformers ask a hub for it, or other weight
# files than those that were checked
KERNEL_KEYS = ("attn_implementation", "experts_implementation", "transformers_weights")
KERNEL_CHOICES = ("_attn_implementation_internal", "_experts_implementation_internal")


@dataclass(frozen=True)
class Loaded:
    """A model on its device with the attention function it calls."""

    model: PreTrainedModel
    attention: attention.DocumentAttention
    base_path: Path


def is_adapter(path: Path) -> bool:
    """Whether the directory holds LoRA matrices instead of a whole model."""
    return (path / "adapter_config.json").exists()


def load_model(path: Path, *, dtype: torch.dtype, device: str, quantise: bool = False) -> Loaded:
    """Load the full model at `path`, or the base of the adapter at `path`, with document attention.

    Raises Refusal in words when the directory does not load; run `check-model` for the whole report.
    """
    base = base_of(path) if is_adapter(path) else path
    function = attention.register(attention.choose_kernel(device))
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    extra: dict[str, Any] = {}
    if has_bitsandbytes():
        import_bitsandbytes()  # peft imports it for every adapter: ours has to be the first time
    if quantise:
        extra = {"quantization_config": _four_bits(dtype), "device_map": {"": device}}
    try:
        loaded: Any = _with_own_attention(base, dtype, extra)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        told = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
        reason = told.splitlines()[0][:300]
        raise Refusal(
            f"Cannot load the model {base.name}: {reason}. `python -m trainer check-model` names the file.",
            "model_path",
        ) from error
    model, report = loaded
    missing = sorted(report.get("missing_keys") or [])
    if missing:  # transformers fills these with random numbers and goes on
        raise Refusal(
            f"Cannot train {base.name}: {len(missing)} tensors are missing, first {missing[0]}. Download it again.",
            "model_path",
        )
    if quantise:
        keep_layout(model)
    else:
        model = model.to(device)
    refuse_non_finite(model, "model")
    return Loaded(model, function, base)


def _with_own_attention(base: Path, dtype: torch.dtype, extra: dict[str, Any]) -> Any:
    """(model, loading report) with document attention, or with the family's own where it takes no other.

    Older families choose among attentions of their own (Falcon, GPT-J) or only ask for the mask that goes with the name
    (Bloom, MPT: ours is none, so that they would see ahead). Their own is exact, and mostly one row at a time.
    """
    try:
        loaded = _from_files(base, dtype, attention.NAME, extra)
    except KeyError as error:
        if error.args != (attention.NAME,):
            raise
    else:
        if loaded[0]._can_set_attn_implementation():
            return loaded
    return _from_files(base, dtype, "eager", extra)


def _from_files(base: Path, dtype: torch.dtype, attention_name: str, extra: dict[str, Any]) -> Any:
    """(model, loading report) from the files alone."""
    config = AutoConfig.from_pretrained(base, local_files_only=True, trust_remote_code=False)
    _forget_kernels(config)
    return AutoModelForCausalLM.from_pretrained(
        base,
        config=config,
        dtype=dtype,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        attn_implementation=attention_name,
        output_loading_info=True,
        **extra,
    )


def refuse_non_finite(model: torch.nn.Module, what: str) -> None:
    """Raise Refusal that names the tensor: a NaN in a weight trains nothing but NaN, and nothing else would say so."""
    checked = [(name, tensor) for name, tensor in model.named_parameters() if tensor.is_floating_point()]
    if not checked:
        return
    finite = torch.stack([torch.isfinite(tensor).all() for _, tensor in checked]).tolist()
    bad = [name for (name, _), good in zip(checked, finite, strict=True) if not good]
    if bad:
        more = f" and {len(bad) - 1} more tensors" if len(bad) > 1 else ""
        raise Refusal(f"The {what} has NaN or infinite weights: {bad[0]}{more}. Download it again.", "model_path")


def _forget_kernels(config: PreTrainedConfig) -> None:
    for key in KERNEL_KEYS:
        config.__dict__.pop(key, None)
    for choice in KERNEL_CHOICES:
        setattr(config, choice, None)
    for inner in vars(config).values():
        if isinstance(inner, PreTrainedConfig):
            _forget_kernels(inner)


def _four_bits(compute: torch.dtype) -> Any:
    """NF4 with double quantisation (Dettmers et al. 2023, arXiv:2305.14314); products in `compute`."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )
