"""What a run needs of memory, by part, from the model's sizes alone: plain arithmetic, in GiB, without torch.

The formulas follow what the loop allocates (fp32 masters, gradients, two AdamW states; logits of labels in chunks of
256 MiB). Called by the page's gate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trainer.machine import GIB
from trainer.schema import Config

LOGIT_CHUNK_BYTES = 256 * 2**20
CONTEXT_GIB = {"gpu": 0.7, "cpu": 0.9}
"""CUDA context and libraries, or Python with torch and transformers."""
NEEDED = ("hidden_size", "layers", "vocab_size")


@dataclass(frozen=True)
class Sizes:
    """The sizes of a decoder that its memory follows from; `parameters` counts all weights."""

    parameters: int
    hidden: int
    layers: int
    vocabulary: int
    inner: int
    attention: int  # heads x head size
    keys: int  # key-value heads x head size

    @classmethod
    def of(cls, facts: dict[str, Any]) -> Sizes | None:
        """Sizes from an inspector's report (an adapter's base first); None where one that matters is not known."""
        base = facts.get("base_facts") or facts
        if not base.get("parameters") or any(not base.get(name) for name in NEEDED):
            return None
        hidden, heads = base["hidden_size"], base.get("heads") or 1
        head_size = base.get("head_dim") or hidden // heads
        return cls(
            parameters=base["parameters"],
            hidden=hidden,
            layers=base["layers"],
            vocabulary=base["vocab_size"],
            inner=base.get("intermediate_size") or 4 * hidden,
            attention=heads * head_size,
            keys=(base.get("kv_heads") or heads) * head_size,
        )


def adapter_weights(sizes: Sizes, rank: int) -> int:
    """Weights of LoRA matrices of `rank` on all linear layers of the blocks."""
    h, inner = sizes.hidden, sizes.inner
    attention = 2 * (h + sizes.attention) + 2 * (h + sizes.keys)
    return sizes.layers * rank * (attention + 3 * (h + inner))


def trained_weights(sizes: Sizes, config: Config) -> int:
    """How many weights the optimizer moves."""
    return sizes.parameters if config.hyperparams.method == "full" else adapter_weights(sizes, config.lora.r)


def parts(config: Config, sizes: Sizes, longest: int | None, on_gpu: bool) -> dict[str, float]:
    """GiB by part at the peak of a step: weights, gradients, optimiser states, activations, logits, the rest."""
    h = config.hyperparams
    short = on_gpu and h.fp_precision != "fp32" or h.fp_precision in ("bf16", "fp16")
    compute = 2 if short else 4
    trained = trained_weights(sizes, config)
    if h.method == "full":
        pure = short and h.master_weights == "none"
        # autocast keeps a 16-bit copy of each fp32 matrix while a micro-batch is computed
        weights: float = sizes.parameters * (2 if pure else 6 if short else 4)
        gradients = trained * (2 if pure else 4)
    else:
        base = 0.56 if h.method == "qlora" else compute
        weights = sizes.parameters * base + trained * 4
        gradients = trained * 4
    states = trained * (2 if h.optimizer == "adamw_8bit" else gradients // trained * 2 if trained else 0)
    length = h.max_length if h.packing or not longest else min(longest, h.max_length)
    tokens = h.batch_size * length
    bytes_by_part = {
        "weights": weights,
        "gradients": gradients,
        "optimiser states": states,
        "activations": _activations(config, sizes, tokens, compute),
        "logits": min(tokens * sizes.vocabulary * 4, LOGIT_CHUNK_BYTES) * 2.5,
    }
    found = {name: size / GIB for name, size in bytes_by_part.items()}
    return found | {"libraries": CONTEXT_GIB["gpu" if on_gpu else "cpu"]}


def _activations(config: Config, sizes: Sizes, tokens: int, compute: int) -> float:
    """Bytes saved for the backward pass of one micro-batch."""
    h, inner, wide = sizes.hidden, sizes.inner, sizes.attention + 2 * sizes.keys
    # inputs of norms in fp32 too, q k v, attention's output, residuals; gate, up, activation and product of the MLP
    one = tokens * (compute * (6 * h + wide + sizes.attention + 4 * inner) + 4 * 2 * h)
    if config.hyperparams.method != "full":
        one += tokens * compute * (2 * h + sizes.attention + inner)  # inputs of the added matrices
    if not config.hyperparams.use_gradient_checkpointing:
        return one * sizes.layers
    kept = tokens * compute * h
    if config.hyperparams.gradient_checkpointing_policy == "selective":
        kept += tokens * compute * (2 * h + wide + 2 * inner)
    return kept * sizes.layers + one
