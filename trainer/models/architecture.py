"""config.json of a model folder: sane sizes, a type that can be loaded, and weights that fit it. No torch, no
transformers.

Loading fills missing tensors with random numbers and builds whatever sizes the config names, so both are checked
here. Called by `trainer.models.inspect`.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from typing import Any

from trainer.models import known
from trainer.models.findings import Findings, listed
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
KERNEL_KEYS = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
# every block holds the same tensors in the same shapes
UNIFORM_TYPES = frozenset(
    "llama mistral qwen2 qwen3 gemma gemma2 phi phi3 gpt2 gpt_neox mixtral olmo olmo2 granite starcoder2 stablelm opt "
    "bloom cohere smollm3".split()
)
LLAMA_LIKE = frozenset("llama mistral qwen2 qwen3 gemma gemma2 granite".split())
OUTPUT_LAYERS = ("lm_head.weight", "embed_out.weight", "output.weight")
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight", "tok_embeddings.weight")
_BLOCK = re.compile(r"(?:.*\.)?(?:layers|h|blocks)\.(\d+)\.(.+)")
DAMAGE = ("missing_shard", "tensor_not_in_shard")
# constants that old releases saved beside the weights
_BUFFER = re.compile(r".*(rotary_emb\.inv_freq|attn\.(masked_)?bias|attention\.(masked_)?bias)")


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
    findings.facts["architectures"] = [str(name) for name in config.get("architectures") or []]
    findings.facts["model_type"] = config.get("model_type")
    _check_heads(findings, text)
    _check_type(findings, config)
    _check_code_and_kernels(findings, config)
    _check_quantisation(findings, config)
    return config


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


def _check_heads(findings: Findings, config: Config) -> None:
    hidden, heads, kv_heads = (findings.facts[fact] for fact in ("hidden_size", "heads", "kv_heads"))
    if config.get("model_type") not in UNIFORM_TYPES or not heads:
        return
    fix = "Download config.json again."
    if hidden and not findings.facts["head_dim"] and hidden % heads:
        message = f"config.json gives hidden size {hidden}, which {heads} heads do not divide"
        findings.problem("config_bad_value", "config.json", message, fix)
    if kv_heads and heads % kv_heads:
        message = f"config.json gives {heads} heads, which {kv_heads} key-value heads do not divide"
        findings.problem("config_bad_value", "config.json", message, fix)


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
    """Hold the tensors of safetensors weights against the config: missing ones, other shapes, too few blocks."""
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
    damaged = len(weights.headers) < len(weights.files) or any(item["code"] in DAMAGE for item in findings.problems)
    if config.get("model_type") not in UNIFORM_TYPES or damaged or not tensors:
        return  # other types may differ from block to block; what lies in a broken shard is already a problem
    if facts["embedding_rows"] is None:
        _missing(findings, ["the embedding of the tokens"])
    if config.get("tie_word_embeddings") is False and not has_output:
        _missing(findings, ["lm_head.weight"])
    blocks = _blocks(tensors)
    _check_blocks(findings, blocks)
    if not config.get("quantization_config"):
        _check_shapes(findings, config, tensors, blocks)


def _missing(findings: Findings, names: list[str]) -> None:
    count = "a tensor is" if len(names) == 1 else f"{len(names):,} tensors are"
    message = f"{count} missing ({listed(names)}); loading would fill it with random numbers"
    findings.problem("missing_tensor", "", message, "Download the weights again.")


def _blocks(tensors: Tensors) -> dict[int, dict[str, tuple[str, TensorInfo]]]:
    """Block number -> the rest of the name -> full name and tensor."""
    blocks: dict[int, dict[str, tuple[str, TensorInfo]]] = defaultdict(dict)
    for name, info in tensors.items():
        match = _BLOCK.fullmatch(name)
        if match and not _BUFFER.fullmatch(name):
            blocks[int(match[1])][match[2]] = (name, info)
    return blocks


def _check_blocks(findings: Findings, blocks: dict[int, dict[str, tuple[str, TensorInfo]]]) -> None:
    layers = findings.facts["layers"]
    if not layers:
        return
    absent = [number for number in range(layers) if number not in blocks]
    if absent:
        _missing(findings, [f"all of block {number}" for number in absent])
    extra = [number for number in blocks if number >= layers]
    if extra:
        message = f"the weights hold {len(extra)} blocks more than the {layers} that config.json names"
        findings.warn(
            "extra_blocks", "config.json", message, "They are not loaded. Compare with the original config.json."
        )
    usual = {
        rest
        for rest, count in Counter(r for block in blocks.values() for r in block).items()
        if count * 2 > len(blocks)
    }
    stem = next((name[: -len(rest)] for block in blocks.values() for rest, (name, _) in block.items()), "")
    stem = stem.rstrip(".0123456789")
    gone = [f"{stem}.{number}.{rest}" for number in sorted(blocks) for rest in sorted(usual - set(blocks[number]))]
    if gone:
        _missing(findings, gone)


def _check_shapes(
    findings: Findings, config: Config, tensors: Tensors, blocks: dict[int, dict[str, tuple[str, TensorInfo]]]
) -> None:
    wrong: list[str] = []
    vocabulary, rows = findings.facts["vocab_size"], findings.facts["embedding_rows"]
    if vocabulary and rows and rows != vocabulary:
        wrong.append(f"the embedding has {rows:,} rows where config.json names vocab_size {vocabulary:,}")
    expected = _expected_shapes(findings.facts, config) if config.get("model_type") in LLAMA_LIKE else {}
    first: dict[str, tuple[int, ...]] = {}
    for number in sorted(blocks):
        for rest, (name, info) in blocks[number].items():
            shape = expected.get(rest) or first.setdefault(rest, info.shape)
            if info.shape != shape:
                wrong.append(f"{name} has the shape {list(info.shape)} instead of {list(shape)}")
    if wrong:
        more = f" (and {len(wrong) - 1:,} more)" if len(wrong) > 1 else ""
        fix = "Weights and config.json belong to different models: download both again."
        findings.problem("shape_mismatch", "config.json", wrong[0] + more, fix)


def _expected_shapes(facts: dict[str, Any], config: Config) -> dict[str, tuple[int, ...]]:
    """The shapes that follow from the config's own numbers; what it leaves to defaults is not guessed."""
    hidden, heads, kv_heads, inner = (facts[key] for key in ("hidden_size", "heads", "kv_heads", "intermediate_size"))
    head = facts["head_dim"]
    if not head and hidden and heads and config.get("model_type") in ("llama", "mistral", "qwen2", "granite"):
        head = hidden // heads
    shapes: dict[str, tuple[int, ...]] = {}
    if hidden:
        shapes |= {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
    if hidden and inner:
        shapes |= {"mlp.gate_proj.weight": (inner, hidden), "mlp.up_proj.weight": (inner, hidden)}
        shapes |= {"mlp.down_proj.weight": (hidden, inner)}
    if hidden and head and heads:
        shapes |= {"self_attn.q_proj.weight": (heads * head, hidden), "self_attn.o_proj.weight": (hidden, heads * head)}
    if hidden and head and kv_heads:
        shapes |= {f"self_attn.{letter}_proj.weight": (kv_heads * head, hidden) for letter in "kv"}
    return shapes
