"""A LoRA adapter held against its base model by peft itself, on the meta device: every matrix there, each in its shape.

Imports torch and peft; runs in the worker child only. Called by `trainer.models.shapes`.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import PreTrainedModel

from trainer.models.blueprint import REFUSED, Unbuildable
from trainer.models.findings import Findings, listed
from trainer.models.weights import Weights

FIX = "Choose the base it was made for, or download the adapter again."
_EMBEDDINGS = (".embed_tokens.weight", ".wte.weight", ".embed_in.weight", "lm_head.weight", ".embed_out.weight")


def check_adapter_shapes(base: PreTrainedModel, path: Path, weights: Weights, findings: Findings) -> None:
    """Put the shapes of the adapter in `path` into `base` (on the meta device, spoilt by it) and name what differs."""
    file = weights.files[0]
    try:
        expected, missing, extra = _load(base, path, {name: info.shape for name, info in weights.tensors.items()})
    except Unbuildable as error:
        message = f"peft cannot put the adapter onto this base model ({error.reason})"
        findings.problem("adapter_does_not_fit", file, message, FIX)
        return
    wrong = [
        (name, info.shape, expected[name])
        for name, info in weights.tensors.items()
        if name in expected and info.shape != expected[name]
    ]
    if wrong:
        name, has, wanted = wrong[0]
        message = f"{name[:120]} has the shape {list(has)}, this base model needs {list(wanted)}"
        message += f" (and {len(wrong) - 1:,} more)" if len(wrong) > 1 else ""
        findings.problem("adapter_does_not_fit", file, message, FIX)
    if missing:
        message = f"the adapter lacks {listed(missing)}, which adapter_config.json promises"
        findings.problem("missing_tensor", file, message, "Download the adapter again.")
    # an adapter trained with added tokens brings its embeddings along
    extra = [name for name in extra if not name.endswith(_EMBEDDINGS)]
    if extra:
        message = f"{listed(extra)} belongs to no layer of this base model"
        findings.problem("adapter_does_not_fit", file, message, FIX)


def _load(
    base: PreTrainedModel, path: Path, shapes: dict[str, tuple[int, ...]]
) -> tuple[dict[str, tuple[int, ...]], list[str], list[str]]:
    """(shape by name as peft expects it, names that would be missing, names it has no place for)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config: Any = PeftConfig.from_pretrained(str(path), local_files_only=True)
            config.init_lora_weights = False  # other starts look at the base's numbers, which are not there
            model = get_peft_model(base, config, low_cpu_mem_usage=True)
            state = get_peft_model_state_dict(model, save_embedding_layers=False)
            expected = {name: tuple(tensor.shape) for name, tensor in state.items()}
            given = {
                name: torch.empty(expected.get(name, shape), device="meta")  # shapes are judged by the caller
                for name, shape in shapes.items()
            }
            result: Any = set_peft_model_state_dict(model, given, low_cpu_mem_usage=True)
    except REFUSED as error:
        raise Unbuildable(error) from error
    plain = [name.replace(".default.", ".") for name in result.missing_keys if "lora_" in name]
    return expected, sorted(plain), sorted(name.replace(".default.", ".") for name in result.unexpected_keys)
