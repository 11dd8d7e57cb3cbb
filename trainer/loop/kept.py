"""What one block keeps of each token for its backward pass, in bytes, by family of models: counted, then written down.

Every number here was read off the tensors that are alive after a forward pass (`tests/live_bytes.py` counts them at the
dispatcher; `tests/test_kept.py` holds this table to them). D hidden size, A heads x head size, K key-value heads x head
size, I inner size of the MLP, R rank of LoRA. "wide" numbers are float32, "narrow" ones of the computation. Torch-free.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Format = Literal["fp32", "mixed", "half"]
"""All in fp32; fp32 weights under autocast; weights of 16 bits."""


@dataclass(frozen=True)
class Widths:
    """The sizes of one block."""

    hidden: int
    attention: int
    keys: int
    inner: int
    heads: int
    rank: int = 0


@dataclass(frozen=True)
class Count:
    """How many tensors of each width a block keeps."""

    d: float = 0
    a: float = 0
    k: float = 0
    i: float = 0
    r: float = 0

    def elements(self, w: Widths) -> float:
        """Numbers for each token."""
        return self.d * w.hidden + self.a * w.attention + self.k * w.keys + self.i * w.inner + self.r * w.rank

    def __add__(self, other: Count) -> Count:
        return Count(self.d + other.d, self.a + other.a, self.k + other.k, self.i + other.i, self.r + other.r)


@dataclass(frozen=True)
class Kept:
    """Wide and narrow numbers of each token, and scores (heads x length of the row) of attention that is no fused kernel."""

    wide: Count = Count()
    narrow: Count = Count()
    scores_bytes: int = 0

    def bytes_each(self, widths: Widths, narrow_bytes: int, longest: int) -> float:
        """Bytes of each token; `longest` tokens has the longest row."""
        fixed = 4 * (2 + widths.heads)  # of norms, and attention's normalisers
        scores = self.scores_bytes * widths.heads * longest
        return 4 * self.wide.elements(widths) + narrow_bytes * self.narrow.elements(widths) + fixed + scores


# RMS norm, rotary positions, gated MLP: (LoRA?, format) -> what is kept
_GATED = {
    (False, "fp32"): Kept(Count(6, 3, 2, 4)),
    (False, "mixed"): Kept(Count(4), Count(5, 3, 2, 4)),
    (False, "half"): Kept(Count(2), Count(4, 3, 2, 4)),
    (True, "fp32"): Kept(Count(4, 3, 2, 4, 7)),
    (True, "half"): Kept(Count(2), Count(5, 3, 2, 4, 7)),
}
# norms of queries and keys besides (Qwen 3)
_QUERY_NORM = {
    (False, "fp32"): (Count(0, 2, 2), Count()),
    (False, "mixed"): (Count(0, 1, 1), Count(0, 1, 1)),
    (False, "half"): (Count(0, 1, 1), Count(0, 1, 1)),
    (True, "fp32"): (Count(0, 1, 1), Count()),
    (True, "half"): (Count(0, 1, 1), Count()),
}
# GPT-2 drops out scores while training, so that no fused kernel takes them: three score matrices are kept
_GPT2 = {
    (False, "fp32"): Kept(Count(12, 0, 0, 5), Count(), 12),
    (False, "mixed"): Kept(Count(5), Count(5, 0, 0, 5), 12),
    (False, "half"): Kept(Count(3), Count(7, 0, 0, 5), 12),
    (True, "fp32"): Kept(Count(12, 0, 0, 5, 4), Count(), 12),
    (True, "half"): Kept(Count(3), Count(7, 0, 0, 5, 4), 12),
}
_NEOX = {
    (False, "fp32"): Kept(Count(10, 0, 0, 2)),
    (False, "mixed"): Kept(Count(1), Count(9, 0, 0, 2)),
    (False, "half"): Kept(Count(), Count(10, 0, 0, 2)),
    (True, "fp32"): Kept(Count(10, 0, 0, 2, 4)),
    (True, "half"): Kept(Count(), Count(10, 0, 0, 2, 4)),
}
# four norms a block, and scores pressed together by tanh, which no fused kernel does (Gemma 2)
_GEMMA2_MORE = {
    (False, "fp32"): Kept(Count(4, 1, -2), Count(), 8),
    (False, "mixed"): Kept(Count(4), Count(0, 1, -2), 8),
    (False, "half"): Kept(Count(6), Count(-2, 1, -2), 8),
    (True, "fp32"): Kept(Count(2, 1, -2), Count(), 8),
    (True, "half"): Kept(Count(2), Count(0, 1, -2), 8),
}
PLAIN_GATED = frozenset({"llama", "mistral", "qwen2", "granite", "gemma", "phi3", "smollm3", "olmo"})
COUNTED = PLAIN_GATED | {"qwen3", "gemma2", "gpt2", "gpt_neox"}
"""The model types whose blocks were counted; others are taken for Qwen 3's, and the error stated is wider."""
_DROPPED = {  # inputs of the added matrices, each with its noise: (MLP gated?, format)
    (True, "fp32"): Count(8, 1, 0, 1),
    (True, "half"): Count(5, 1, 0, 1),
    (False, "fp32"): Count(3, 0, 0, 1),
    (False, "half"): Count(3, 0, 0, 1),
}


def kept(model_type: str | None, format_: Format, *, lora: bool, dropout: bool = False) -> Kept:
    """What a block of this family keeps when nothing is recomputed. LoRA's base is never "mixed"."""
    key = (lora, "half" if lora and format_ == "mixed" else format_)
    if model_type in ("gpt2", "gpt_neox"):
        found = (_GPT2 if model_type == "gpt2" else _NEOX)[key]
    else:
        found = _GATED[key]
        if model_type == "gemma2":
            more = _GEMMA2_MORE[key]
            found = Kept(found.wide + more.wide, found.narrow + more.narrow, more.scores_bytes)
        elif model_type == "phi3":  # one matrix for queries, keys and values, which stays whole; one for gate and up
            whole = Count(-3 if key in ((False, "mixed"), (True, "half")) else 0, 1, 1, 0, -3 if lora else 0)
            wide, narrow = (whole, Count()) if key[1] == "fp32" else (Count(), whole)
            found = Kept(found.wide + wide, found.narrow + narrow)
        elif model_type not in PLAIN_GATED:
            wide, narrow = _QUERY_NORM[key]
            found = Kept(found.wide + wide, found.narrow + narrow)
    if lora and dropout:
        found = Kept(
            found.wide + _DROPPED[model_type not in ("gpt2", "gpt_neox"), key[1]], found.narrow, found.scores_bytes
        )
    return found


def products(widths: Widths, *, gated: bool, lora: bool) -> float:
    """Numbers of each token that the selective policy keeps of a block: what comes out of every matrix product."""
    w = widths
    out = w.attention + 2 * w.keys + 2 * w.hidden + (2 if gated else 1) * w.inner
    return out * (2 if lora else 1) + (7 if gated else 4) * w.rank * lora


def is_gated(model_type: str | None) -> bool:
    """Whether the MLP has a gate, as all but the oldest families have."""
    return model_type not in ("gpt2", "gpt_neox")
