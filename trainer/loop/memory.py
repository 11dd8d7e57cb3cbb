"""What a run needs of memory at its peak, by part, from the model's sizes and the settings: plain arithmetic, without torch.

It follows what the loop allocates, moment by moment: the end of a forward pass, the two ends of a backward pass, a save, a
held-out check; the peak is the largest. What blocks keep is in `trainer.loop.kept`, what the loss makes in `trainer.loop.loss`.
Called by the page and by `trainer.loop.fit`. On a processor it is the process's own memory, and a save's copy counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trainer.fit_history import Calibration
from trainer.loop.kept import COUNTED, Format, Widths, is_gated, kept, products
from trainer.machine import GIB
from trainer.schema import Config

LOGIT_CHUNK_BYTES = 256 * 2**20
LIBRARIES_GIB = {"gpu": 0.7, "cpu": 0.40}
"""CUDA context and libraries, or Python with torch and transformers (CPU build, measured)."""
GPU_RESERVE = 0.03
"""Of what changes in a step: torch's allocator hands out blocks of 2 MiB and more, and rounds up."""
FOUR_BITS = 0.516
"""Bytes of an NF4 weight, with its share of the doubly quantised scales (arXiv:2305.14314, section 3)."""
ERROR = {"cpu": 0.15, "gpu": 0.25}
ERROR_UNKNOWN = 0.35
"""Of models whose blocks were never counted, as long as nothing was measured."""
MOVING = ("activations", "logits")
PARTS = ("weights", "gradients", "optimiser states", "activations", "logits")
NEEDED = ("hidden_size", "layers", "vocab_size")
SCALES = {  # input and output of the layers that get LoRA matrices
    "q_proj": "da", "k_proj": "dk", "v_proj": "dk", "o_proj": "ad", "gate_proj": "di", "up_proj": "di", "down_proj": "id",
}  # fmt: skip


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
    heads: int = 1
    model_type: str | None = None
    tied: bool = True
    adapter: int | None = None  # weights of the adapter that is trained on

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
            heads=heads,
            model_type=base.get("model_type"),
            tied=base.get("tied") is not False,
            adapter=facts.get("parameters") if facts.get("base_facts") else None,
        )

    @property
    def matrices(self) -> int:
        """Weights of the matrices of one block."""
        ends = 2 * self.attention + 2 * self.keys
        return self.hidden * (ends + (3 if is_gated(self.model_type) else 2) * self.inner)

    @property
    def head(self) -> int:
        """Weights of the head."""
        return self.vocabulary * self.hidden

    def widths(self, rank: int) -> Widths:
        """The sizes of one block."""
        return Widths(self.hidden, self.attention, self.keys, self.inner, self.heads, rank)


@dataclass(frozen=True)
class Work:
    """What a run computes at once where it is heaviest.

    `tokens` of the heaviest micro-batch, `labels` among them, `longest` its longest row; `micro_batches` of a step;
    `held_out_tokens` at once in a held-out check (0: none). `saves_between`: training goes on beside a save.
    """

    tokens: int
    labels: int
    longest: int
    micro_batches: int = 1
    held_out_tokens: int = 0
    saves_between: bool = False


@dataclass(frozen=True)
class Forecast:
    """The peak, GiB by part, when it is reached, and how far off it may be (a share).

    `fixed_gib` follows from the weights and the libraries, `moving_gib` from the work of a step; `words` say what the
    figures were calibrated by. `step_gib` is the peak of the steps alone, saves left out.
    """

    parts: dict[str, float]
    moment: str
    error: float
    fixed_gib: float
    moving_gib: float
    step_fixed_gib: float
    step_moving_gib: float
    words: str = ""

    @property
    def total_gib(self) -> float:
        """The whole peak."""
        return sum(self.parts.values())


def adapter_weights(sizes: Sizes, rank: int, targets: tuple[str, ...] = ()) -> int:
    """Weights of LoRA matrices of `rank` on all linear layers of the blocks, or on `targets` alone."""
    wide = {"d": sizes.hidden, "a": sizes.attention, "k": sizes.keys, "i": sizes.inner}
    if not is_gated(sizes.model_type):
        each = 4 * sizes.hidden + 2 * sizes.hidden + 2 * (sizes.hidden + sizes.inner)
        return sizes.layers * rank * each
    named = {target.rsplit(".", 1)[-1] for target in targets} or set(SCALES)
    unknown = len(named - set(SCALES)) * (sizes.hidden + sizes.inner)
    return sizes.layers * rank * (sum(wide[end] for name in named & set(SCALES) for end in SCALES[name]) + unknown)


def trained_weights(sizes: Sizes, config: Config) -> int:
    """How many weights the optimizer moves."""
    if config.hyperparams.method == "full":
        return sizes.parameters
    return sizes.adapter or adapter_weights(sizes, config.lora.r, tuple(config.lora.target_modules))


def format_of(config: Config, on_gpu: bool) -> Format:
    """In which formats weights and computation are, as `trainer.loop.prepare.pick_precision` decides."""
    h = config.hyperparams
    short = h.fp_precision in ("bf16", "fp16") or (on_gpu and h.fp_precision == "auto")
    if not short:
        return "fp32"
    pure = h.method == "full" and h.master_weights == "none" and h.fp_precision != "fp16"
    return "half" if pure or h.method != "full" else "mixed"


@dataclass(frozen=True)
class _Static:
    """Bytes that are there from the first step to the last."""

    weights: float
    gradients: float
    states: float
    trained: float  # bytes of the weights that are trained

    @classmethod
    def of(cls, config: Config, sizes: Sizes, format_: Format) -> _Static:
        h, count = config.hyperparams, trained_weights(sizes, config)
        narrow = 2 if format_ == "half" else 4
        each = narrow if h.method == "full" else 4
        if h.method == "full":
            weights: float = sizes.parameters * narrow
        else:
            packed = sizes.matrices * sizes.layers if h.method == "qlora" else 0
            weights = packed * FOUR_BITS + (sizes.parameters - packed) * narrow + count * 4
        states = count * (2 * 1.04 if h.optimizer == "adamw_8bit" else 2 * each)
        return cls(weights, count * each, states, count * each)


def forecast(
    config: Config, sizes: Sizes, work: Work, on_gpu: bool, calibration: Calibration | None = None
) -> Forecast:
    """The peak of a run with these settings, in GiB by part."""
    device, format_ = "gpu" if on_gpu else "cpu", format_of(config, on_gpu)
    static = _Static.of(config, sizes, format_)
    known = calibration or Calibration()
    stay = {"weights": static.weights, "optimiser states": static.states}
    step = _step(config, sizes, work, format_, static)
    moments = {"step": step, "held-out check": _held_out(sizes, work, format_)}
    if not on_gpu:
        copy = {"save copy": static.trained + static.states}
        moments["save"] = copy
        if work.saves_between:
            moments["step beside a save"] = step | copy
    scaled = {name: _scaled(parts, known.ratio) for name, parts in moments.items()}
    moment = max(scaled, key=lambda name: sum(scaled[name].values()))
    at_peak = dict.fromkeys(PARTS, 0.0) | stay | scaled[moment]
    found = {name: size / GIB for name, size in at_peak.items()}
    moving, step_moving = (sum(parts.get(name, 0.0) for name in MOVING) / GIB for parts in (moments[moment], step))
    if on_gpu:
        found["reserve"] = GPU_RESERVE * moving * known.ratio
    found["libraries"] = LIBRARIES_GIB[device]
    error = ERROR[device] if sizes.model_type in COUNTED else ERROR_UNKNOWN
    fixed = sum(found.values()) - moving * known.ratio
    step_fixed = (static.weights + static.states + step["gradients"]) / GIB + LIBRARIES_GIB[device]
    spread = error if known.spread is None else min(error, known.spread)
    return Forecast(found, moment, spread, fixed, moving, step_fixed, step_moving, known.words)


def memory_text(gib: float) -> str:
    """ "18.4 GiB", under 1 GiB whole MiB."""
    return f"{gib:.1f} GiB" if gib >= 1 else f"{gib * 1024:.0f} MiB"


def _scaled(parts: dict[str, float], ratio: float) -> dict[str, float]:
    return {name: size * ratio if name in MOVING else size for name, size in parts.items()}


def _step(config: Config, sizes: Sizes, work: Work, format_: Format, static: _Static) -> dict[str, float]:
    """Bytes of gradients, activations and logits at the worst of three moments: head, first block back, last block back."""
    full = config.hyperparams.method == "full"
    stored, block, copies = _activations(config, sizes, work, format_)
    before = static.gradients if work.micro_batches > 1 else 0.0
    own = static.gradients * sizes.matrices / max(1, sizes.parameters)  # the first block's come as its tensors go
    d_head = sizes.head * (2 if format_ == "half" else 4) if full else 0.0
    moments = [
        {"gradients": before, "activations": stored + copies, "logits": _head(sizes, work, format_, full)},
        {"gradients": before, "activations": stored + block, "logits": 2 * sizes.head * 4 * full},
        # the head's gradient waits for that of the embedding, which is as large, where the two are tied
        {"gradients": static.gradients - own, "activations": block, "logits": d_head if sizes.tied else 0.0},
        {
            "gradients": static.gradients,
            "activations": 0.0,
            "logits": d_head * (2 if sizes.tied else work.micro_batches > 1),
        },
    ]
    return max(moments, key=lambda parts: sum(parts.values()))


def _activations(config: Config, sizes: Sizes, work: Work, format_: Format) -> tuple[float, float, float]:
    """Bytes kept from forward to backward; of one block while it is recomputed; of 16-bit copies at the forward's end."""
    h, lora = config.hyperparams, config.hyperparams.method != "full"
    narrow, stream = (4, 4) if format_ == "fp32" else (2, 2 if format_ == "half" else 4)
    widths = sizes.widths(config.lora.r if lora else 0)
    each = kept(sizes.model_type, format_, lora=lora, dropout=config.lora.dropout > 0)
    one = work.tokens * each.bytes_each(widths, narrow, work.longest)
    # autocast makes a 16-bit copy of each matrix and keeps it while the pass lasts
    copies = 2.0 * sizes.matrices * sizes.layers if format_ == "mixed" else 0.0
    if lora and format_ == "half":
        copies = 2.0 * trained_weights(sizes, config)
    around = work.tokens * sizes.hidden * 3 * 4  # what goes into the first block, and the last norm
    if not h.use_gradient_checkpointing:
        return one * sizes.layers + around + copies, 0.0, 0.0
    saved = 0.0
    if h.gradient_checkpointing_policy == "selective":
        saved = narrow * products(widths, gated=is_gated(sizes.model_type), lora=lora)
    # what is kept of a block is not made again; its products' gradients stand beside the rest
    again = one - work.tokens * (saved - narrow * (2 * sizes.inner + 2 * sizes.hidden))
    stored = work.tokens * (stream * sizes.hidden + saved) * sizes.layers + around
    return stored, again + copies / sizes.layers, copies


def _head(sizes: Sizes, work: Work, format_: Format, full: bool) -> float:
    """Bytes of the loss of `trainer.loop.loss`: states of the labels, the head in the computation's format, one chunk."""
    narrow = 4 if format_ == "fp32" else 2
    chunk = min(work.labels, max(1, LOGIT_CHUNK_BYTES // (4 * sizes.vocabulary))) * sizes.vocabulary
    cast = sizes.head * narrow if format_ == "mixed" else 0.0
    states = work.labels * sizes.hidden * (4 + 4 + (narrow if narrow < 4 else 0))
    d_weight = sizes.head * 4.0 if full else 0.0
    capped = 8 * chunk if sizes.model_type == "gemma2" else 0
    product = (narrow + 4) * sizes.head if full and narrow < 4 else 0
    return states + cast + d_weight + max(8 * chunk + capped, (4 + (narrow if narrow < 4 else 0)) * chunk + product)


def _held_out(sizes: Sizes, work: Work, format_: Format) -> dict[str, float]:
    """Bytes of a pass without gradients: one block's widest tensors and the logits of a chunk."""
    if not work.held_out_tokens:
        return {"activations": 0.0}
    narrow = 4 if format_ == "fp32" else 2
    copies = 2.0 * (sizes.head + sizes.matrices * sizes.layers) if format_ == "mixed" else 0.0
    wide = work.held_out_tokens * (4 * 3 * sizes.hidden + narrow * 3 * sizes.inner)
    chunk = min(work.held_out_tokens, max(1, LOGIT_CHUNK_BYTES // (4 * sizes.vocabulary))) * sizes.vocabulary
    return {"activations": float(wide), "logits": 8.0 * chunk + copies}
