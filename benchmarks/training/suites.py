"""What is measured: the models, the cases and the arms of each suite. Plain data, no torch.

A case is one workload on one model; an arm is one trainer on that case. "rows" arms train the same rows in each step,
"packed" arms the same rows of the whole run, packed into lines of `max_length` tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Form = Literal["rows", "packed"]


@dataclass(frozen=True)
class Shape:
    """The sizes of a Qwen3 that is built from its config with random weights."""

    hidden: int
    layers: int
    inner: int
    heads: int
    key_heads: int
    head_size: int
    vocabulary: int

    @property
    def body(self) -> int:
        """Weights of the blocks' matrices."""
        wide = self.heads * self.head_size
        attention = 2 * self.hidden * wide + 2 * self.hidden * self.key_heads * self.head_size
        return self.layers * (attention + 3 * self.hidden * self.inner)

    @property
    def head(self) -> int:
        """Weights of the head, which is the embedding too."""
        return self.hidden * self.vocabulary


SHAPES = {
    "tiny": Shape(64, 2, 128, 4, 2, 16, 512),
    "small": Shape(256, 6, 768, 4, 2, 64, 16_384),
    # config.json of Qwen/Qwen3-0.6B
    "qwen3-0.6b": Shape(1024, 28, 3072, 16, 8, 128, 151_936),
}


@dataclass(frozen=True)
class Case:
    """One workload. Rows a step = `micro_rows` x `accumulation`; packs a step = `packs`, `micro_packs` at a time.

    `full_rows`: every row is `max_length` long, so that nothing can be padded or packed; else lengths are drawn.
    """

    name: str
    group: str
    model: str
    method: Literal["full", "lora"]
    checkpointing: bool
    precision: Literal["fp32", "bf16"]
    steps: int
    warmup_steps: int
    max_length: int
    micro_rows: int
    accumulation: int
    packs: int
    micro_packs: int
    full_rows: bool = False

    @property
    def rows_per_step(self) -> int:
        """Rows behind each optimiser step of a "rows" arm."""
        return self.micro_rows * self.accumulation

    @property
    def data(self) -> str:
        """The name of the rows; cases that differ in method or checkpointing alone share them."""
        return f"{self.group}-{self.model}-{self.max_length}-{self.steps}".replace(" ", "-").replace(",", "")


@dataclass(frozen=True)
class Arm:
    """One trainer as it is measured. `peer` is the package behind it: hf, trl, liger or ours."""

    name: str
    peer: str
    form: Form
    compiled: bool = False


HF = Arm("transformers.Trainer", "hf", "rows")
TRL = Arm("TRL SFTTrainer, packing", "trl", "packed")
LIGER = Arm("transformers.Trainer + Liger", "liger", "rows")
OURS = Arm("Signalbox", "ours", "rows")
OURS_PACKED = Arm("Signalbox, packing", "ours", "packed")
OURS_COMPILED = Arm("Signalbox, compile", "ours", "rows", compiled=True)
OURS_PACKED_COMPILED = Arm("Signalbox, packing, compile", "ours", "packed", compiled=True)
PEERS = ("hf", "trl", "liger")
NEEDS = {"hf": "accelerate", "trl": "trl", "liger": "liger_kernel"}
"""The package that a peer needs besides torch and transformers."""


@dataclass(frozen=True)
class Suite:
    """Cases and arms of one command, how often all of it is gone through, and how long that may take."""

    name: str
    cases: tuple[Case, ...]
    rounds: int
    minutes: float

    def arms(self, group: str, peers: tuple[str, ...]) -> list[Arm]:
        """The arms of a group of cases, the asked-for peers and ours."""
        full_rows = next(case for case in self.cases if case.group == group).full_rows
        ours = [OURS] if full_rows else [OURS, OURS_PACKED]
        if self.name != "cpu":
            ours.append(OURS_COMPILED if full_rows else OURS_PACKED_COMPILED)
        return [arm for arm in (HF, TRL, LIGER) if arm.peer in peers] + ours

    def turns(self, number: int, peers: tuple[str, ...]) -> list[tuple[str, Arm]]:
        """(group, arm) in the order of round `number`, the arms of a group in rotation; compiled ones after all others,
        so that minutes of compiling cannot leave the rest unmeasured."""
        found = []
        for group in self.groups:
            arms = self.arms(group, peers)
            first = (number - 1) % len(arms)
            found += [(group, arm) for arm in arms[first:] + arms[:first]]
        return sorted(found, key=lambda turn: turn[1].compiled)

    def cases_of(self, group: str, arm: Arm) -> list[Case]:
        """What one process measures: the group's cases, without checkpointing alone where layers are compiled first."""
        return [case for case in self.cases if case.group == group and not (arm.compiled and case.checkpointing)]

    @property
    def groups(self) -> list[str]:
        """The groups of cases in order; one process measures all cases of a group for one arm."""
        return list(dict.fromkeys(case.group for case in self.cases))


MIXED_CPU = "mixed rows, 4,096 tokens a step"
MIXED = "mixed rows, 8,192 tokens a step"
SEED = "2,048 tokens a step"
_SMALL = Case(
    name=f"{MIXED_CPU}, full", group=MIXED_CPU, model="small", method="full", checkpointing=False, precision="fp32",
    steps=5, warmup_steps=1, max_length=2048, micro_rows=5, accumulation=2, packs=2, micro_packs=1,
)  # fmt: skip


def _variants(case: Case) -> list[Case]:
    """Full and LoRA, each without and with checkpointing."""
    found = []
    for method in ("full", "lora"):
        for checkpointing in (False, True):
            name = f"{case.group}, {'full' if method == 'full' else 'LoRA'}{', checkpointing' if checkpointing else ''}"
            found.append(replace(case, name=name, method=method, checkpointing=checkpointing))
    return found


def _gpu_cases(model: str, max_length: int, steps: int, warmup: int) -> tuple[Case, ...]:
    base = Case(
        name="", group=SEED, model=model, method="full", checkpointing=False, precision="bf16", steps=steps,
        warmup_steps=warmup, max_length=max_length, micro_rows=1, accumulation=1, packs=1, micro_packs=1, full_rows=True,
    )  # fmt: skip
    # 20 rows of 402 tokens in the mean fill 4 packs; in micro-batches of 5, so that the padded logits fit
    mixed = replace(base, group=MIXED, micro_rows=5, accumulation=4, packs=4, micro_packs=4, full_rows=False)
    return (*_variants(base), *_variants(mixed))


def suite(name: str) -> Suite:
    """The suite called "cpu", "gpu" or "rehearsal" (the GPU suite's every arm with a tiny model, on a CPU)."""
    if name == "gpu":
        return Suite(name, _gpu_cases("qwen3-0.6b", 2048, steps=20, warmup=5), rounds=2, minutes=9.0)
    if name == "rehearsal":
        return Suite(name, _gpu_cases("tiny", 128, steps=3, warmup=1), rounds=1, minutes=20.0)
    cases = (_SMALL, replace(_SMALL, name=f"{MIXED_CPU}, LoRA", method="lora"))
    return Suite("cpu", cases, rounds=3, minutes=45.0)
