"""The model that a config describes, without numbers: built by transformers on the meta device, and what loading the
given tensors into it would find. Imports torch; runs in the worker child only.

No table of ours: tied weights, renamed keys, fused experts and buffers of old releases are judged by the very code that
loads weights. Model code of a folder is never run and no hub is asked. Called by `trainer.models.shapes`.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.initialization import meta_device_safe_creation_ops, no_init_weights
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as transformers_logging

from trainer.models.headers import TensorInfo
from trainer.models.layout import Layout, bare_config

Shape = tuple[int, ...]
REFUSED = (
    ValueError, TypeError, AttributeError, LookupError, ImportError, RuntimeError, ArithmeticError, AssertionError,
    OSError, StrictDataclassError,
)  # fmt: skip
"""What transformers raises for a config that it cannot build; loading builds the same way and would end the same."""


class Unbuildable(Exception):
    """transformers or peft cannot build this; `reason` is the first sentence that it says."""

    def __init__(self, error: BaseException) -> None:
        told = str(error).strip() or type(error).__name__
        self.reason = " ".join(told.split()).split(". ")[0][:240].rstrip(".:")
        super().__init__(self.reason)


@dataclass
class Difference:
    """What loading would find, in the names of the files where these have one: see `difference`."""

    missing: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    misshapen: list[tuple[str, Shape, Shape]] = field(default_factory=list)
    """(name, shape found, shape expected)."""
    broken: list[str] = field(default_factory=list)
    """Tensors that cannot be put together from their parts."""

    def __bool__(self) -> bool:
        return bool(self.missing or self.extra or self.misshapen or self.broken)


def build(config: dict[str, Any]) -> PreTrainedModel:
    """The model of a config.json's content, on the meta device; raises Unbuildable."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        # from a file, so that all of the library's own readings of old configs apply
        (Path(folder) / "config.json").write_text(json.dumps(bare_config(config)), "utf-8")
        try:
            made = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            with torch.device("meta"), meta_device_safe_creation_ops(), no_init_weights():
                model: PreTrainedModel = AutoModelForCausalLM.from_config(
                    made, trust_remote_code=False, attn_implementation="eager", dtype=torch.float32
                )
        except REFUSED as error:
            raise Unbuildable(error) from error
    return model


def layout_of(model: PreTrainedModel) -> Layout:
    """The tensors as `save_pretrained` would write them."""
    written = revert_weight_conversion(model, model.state_dict())
    tied = frozenset(model.all_tied_weights_keys) & written.keys()
    return Layout({name: tuple(tensor.shape) for name, tensor in written.items()}, frozenset(tied))


def difference(model: PreTrainedModel, layout: Layout, tensors: dict[str, TensorInfo]) -> Difference:
    """Load the shapes of `tensors` into `model` and tell what is missing, left over or of another shape.

    The model is spoilt by it. Names are those of the files: a fused tensor that lacks one expert names that expert.
    """
    mapping: Any = get_model_conversion_mapping(model)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    targets = _targets(model, mapping, set(expected))
    state, odd = _as_meta(tensors)
    config = LoadStateDictConfig(
        device_map={"": torch.device("meta")}, dtype=torch.float32, weight_mapping=mapping
    )  # fmt: skip
    info, _ = convert_and_load_state_dict_in_model(model, state, config, None)
    model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
    model._adjust_missing_and_unexpected_keys(info)
    other = {key: (tuple(found), tuple(wanted)) for key, found, wanted in info.mismatched_keys}
    bad = info.missing_keys | other.keys() | info.conversion_errors.keys()
    # constants that older releases saved and this one makes anew; a single number is no layer's weight either
    constants = {name for name, _ in model.named_buffers()}
    constants |= {name for name, info in tensors.items() if info.elements == 1}
    found = Difference(extra=sorted(info.unexpected_keys - constants | set(odd)))
    explained: set[str] = set()
    for name, shape in layout.tensors.items():
        hit = targets(name) & bad if bad else set()
        if not hit or (name in tensors and tensors[name].shape == shape):
            continue
        explained |= hit
        if name in tensors:
            found.misshapen.append((name, tensors[name].shape, shape))
        elif name not in layout.tied:
            found.missing.append(name)
    found.missing += sorted(info.missing_keys - explained - info.conversion_errors.keys())
    found.misshapen += [(key, *other[key]) for key in sorted(other.keys() - explained)]
    found.broken = sorted(info.conversion_errors.keys() - explained)
    return found


def input_embedding(model: PreTrainedModel) -> str | None:
    """The name of the tensor with a row for each token; None where the model has no such matrix."""
    try:
        matrix = model.get_input_embeddings().weight
    except (AttributeError, NotImplementedError):
        return None
    return next((name for name, parameter in model.named_parameters() if parameter is matrix), None)


def _as_meta(tensors: dict[str, TensorInfo]) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The tensors' shapes on the meta device, and the names of those that torch cannot have."""
    state, odd = {}, []
    for name, info in tensors.items():
        try:
            state[name] = torch.empty(info.shape, device="meta")
        except (RuntimeError, OverflowError, TypeError):
            odd.append(name)
    return state, odd


def _targets(model: PreTrainedModel, mapping: list[Any], expected: set[str]) -> Any:
    """A function from a tensor's name in a file to the model's tensors that are made of it."""
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    keys = dict.fromkeys(expected, True)

    def targets(name: str) -> set[str]:
        renamed, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, keys)
        if pattern is None:
            return {renamed, name} & expected
        patterns = by_pattern[pattern].target_patterns
        return {renamed.replace(patterns[0], other) for other in patterns} & expected

    return targets
