"""config.json of a model folder: sane sizes, a type that can be loaded, and weights that fit it. No torch, no
transformers.

Loading fills missing tensors with random numbers and builds whatever sizes the config names, so both are checked
here. Called by `trainer.models.inspect`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from trainer.models import known
from trainer.models.findings import Findings
from trainer.models.folder import ModelFolder
from trainer.models.headers import TensorInfo
from trainer.models.weights import Weights

Config = dict[str, Any]
Tensors = dict[str, TensorInfo]

# fact -> the names that model types give it, and the largest value that any real model comes near
SIZES: dict[str, tuple[tuple[str, ...], int]] = {
    "vocab_size": (("vocab_size",), 2**24),
    "hidden_size": (("hidden_size", "n_embd", "d_model"), 2**20),
    "layers": (("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 10_000),
    "heads": (("num_attention_heads", "n_head", "n_heads"), 2**16),
    "kv_heads": (("num_key_value_heads", "num_kv_heads"), 2**16),
    "head_dim": (("head_dim",), 2**16),
    "intermediate_size": (("intermediate_size", "n_inner", "ffn_dim", "d_ff"), 2**24),
    "max_positions": (("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"), 2**31),
}
# parts that are built one by one: blocks, experts, heads, stages
_COUNT = re.compile(r"layer|expert|block|depth|stage|head|^n(um)?_")
MOST_PARTS = 2**20
KERNEL_KEYS = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
OUTPUT_LAYERS = ("lm_head.weight", "embed_out.weight", "output.weight")
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight", "tok_embeddings.weight")


def check_config(folder: ModelFolder, findings: Findings) -> Config | None:
    """Read and judge config.json and note its facts; None, with a problem noted, when there is none to read."""
    if not folder.has("config.json"):
        message = "config.json is missing, so the kind of model is not known"
        findings.problem("no_config", "config.json", message, "Download config.json too.")
        return None
    config = folder.json("config.json")
    if config is None:
        return None
    text = text_config(config)
    for fact, (keys, most) in SIZES.items():
        findings.facts[fact] = _size(findings, text, keys, most)
    names = config.get("architectures")
    findings.facts["architectures"] = [str(name) for name in names] if isinstance(names, list) else []
    findings.facts["model_type"] = config.get("model_type")
    _check_counts(findings, config)
    _check_type(findings, config)
    _check_code_and_kernels(findings, config)
    _check_quantisation(findings, config)
    return config


def _check_counts(findings: Findings, config: Config) -> None:
    """Refuse a number of parts, at any depth, that would be built one by one for hours."""
    for key, value in _numbers(config):
        if _COUNT.search(key) and abs(value) > MOST_PARTS:
            message = f"config.json gives {key[:60]} the value {str(value)[:60]}; no model has more than {MOST_PARTS:,}"
            findings.problem("config_bad_value", "config.json", message, "Download config.json again.")
            return


def _numbers(config: Config) -> Iterator[tuple[str, int]]:
    """(key, value) of all whole numbers in a config and its parts; what `SIZES` judges at the top is left out."""
    judged = {key for keys, _ in SIZES.values() for key in keys}
    pending = [(config, True)]
    while pending:
        part, top = pending.pop()
        for key, value in part.items():
            if isinstance(value, dict):
                pending.append((value, False))
            elif type(value) is int and not (top and key in judged):
                yield key, value


def text_config(config: Config) -> Config:
    """The part of a config that describes the language model (a multimodal one nests it)."""
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) and "hidden_size" not in config else config


def _size(findings: Findings, config: Config, keys: tuple[str, ...], most: int) -> int | None:
    key = next((key for key in keys if config.get(key) is not None), None)
    if key is None:
        return None
    value = config[key]
    values = value if isinstance(value, list) and value else [value]  # some types give one size a layer
    if all(type(item) is int and 0 < item <= most for item in values):
        return max(values)
    message = f"config.json gives {key} the value {str(value)[:60]}; allowed are whole numbers from 1 to {most:,}"
    findings.problem("config_bad_value", "config.json", message, "Download config.json again.")
    return None


def _check_type(findings: Findings, config: Config) -> None:
    kind = config.get("model_type")
    if not isinstance(kind, str) or not kind:
        message = "config.json names no model_type, so the kind of model is not known"
        findings.problem("no_model_type", "config.json", message, "Download config.json again.")
        return
    types, causal = known.model_types(), known.causal_types()
    if types is not None and kind not in types and kind not in (causal or ()):
        message = f"the model type '{kind[:60]}' is not known to the installed transformers"
        fix = "Update transformers, or choose another model; code that comes with a model is never run."
        findings.problem("unknown_model_type", "config.json", message, fix)
    elif causal is not None and kind not in causal:
        message = f"a model of type '{kind[:60]}' does not write text token by token (no causal language model)"
        findings.problem("not_causal", "config.json", message, "Choose a text generation model.")
    elif any(name.endswith("ForSequenceClassification") for name in findings.facts["architectures"]):
        message = f"the weights are those of a classifier ({findings.facts['architectures'][0][:80]})"
        findings.problem("not_causal", "config.json", message, "Choose the text generation model it was made from.")


def _check_code_and_kernels(findings: Findings, config: Config) -> None:
    if config.get("auto_map"):
        message = "config.json names code of its own (auto_map)"
        findings.warn(
            "auto_map", "config.json", message, "That code is never run; the built-in model of this type is used."
        )
    named = config.get("transformers_weights")
    if named is not None:
        message = f"config.json chooses other weight files (transformers_weights: {str(named)[:80]})"
        fix = "Remove that entry, so that the files that were checked are those that are loaded."
        findings.problem("other_weights", "config.json", message, fix)
    for part in (config, text_config(config)):
        for key in KERNEL_KEYS:
            if part.get(key) is not None:
                message = f"config.json chooses an attention kernel ({key}: {str(part[key])[:80]})"
                findings.warn(
                    "attn_implementation", "config.json", message, "It is ignored: Signalbox chooses the kernel."
                )
                return


def _check_quantisation(findings: Findings, config: Config) -> None:
    quantisation = config.get("quantization_config")
    if not isinstance(quantisation, dict):
        return
    method = str(quantisation.get("quant_method"))[:60]
    findings.facts["quantised"] = method
    bits = "4bit" if quantisation.get("load_in_4bit") else "8bit"
    methods = known.quantisations()
    if methods is not None and method not in methods and f"{method}_{bits}" not in methods:
        message = f"the weights are quantised by '{method}', which the installed transformers does not know"
        findings.problem("unknown_quantisation", "config.json", message, "Download the original weights.")
    else:
        message = f"the weights are quantised ({method}); full training needs the original ones"
        findings.warn("quantised", "config.json", message, "Download the original weights, or train LoRA.")


def embedding_rows(tensors: Tensors) -> int | None:
    """How many tokens the embedding has a row for; None when no tensor has a known name."""
    for name, info in tensors.items():
        if name.endswith(EMBEDDINGS) and len(info.shape) == 2:
            return info.shape[0]
    return None


def check_tensors(config: Config, weights: Weights, findings: Findings) -> None:
    """Note what the headers tell of the model: parameters, types of numbers, rows of the embedding, tied or not.

    A config that names more layers than there are tensors is refused here, before anybody builds it.
    """
    tensors = weights.tensors
    facts = findings.facts
    facts["parameters"] = sum(info.elements for info in tensors.values())
    dtypes: Counter[str] = Counter()
    for info in tensors.values():
        dtypes[info.dtype] += info.elements
    facts["dtypes"] = dict(dtypes.most_common())
    facts["embedding_rows"] = embedding_rows(tensors)
    has_output = any(name.endswith(OUTPUT_LAYERS) for name in tensors)
    facts["tied"] = config.get("tie_word_embeddings") if "tie_word_embeddings" in config else not has_output
    layers, count = facts.get("layers"), len(tensors)
    whole = len(weights.headers) == len(weights.files)
    if layers and count and layers > count and whole and not findings.problems:
        message = f"config.json names {layers:,} layers, the weights hold {count:,} tensors in all"
        fix = "Weights and config.json belong to different models: download both again."
        findings.problem("shape_mismatch", "config.json", message, fix)
