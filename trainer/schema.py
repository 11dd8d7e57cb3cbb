"""The one schema of a run's settings: type, bound, unit, default and help stand here and nowhere else.

What a run keeps, measures and tells while it goes on stands in `trainer/schema_watch.py` beside it.

The form, the command line and docs/settings.md are derived from it. `trainer/config.py` reads files into it.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from trainer.schema_watch import AlertSettings, EvalSettings, NotifySettings, OutputSettings
from trainer.setting import Count, Group, Real, Section, setting

__all__ = ["Config", "Count", "Group", "NotifySettings", "Real", "Section", "WeightedFile", "setting"]


class ProfileSettings(Section):
    """Which profile turns a row into training text."""

    name: str | None = setting(
        None,
        "Profile",
        "How a row becomes training text. None: the rows as they are, and for plain text.",
        "What",
        basic=True,
    )
    system_prompt: str = setting(
        "", "System prompt", "Used when no profile is chosen and the row has no system message.", "What"
    )


class WeightedFile(Section):
    """A dataset file and how often each of its rows is seen in an epoch."""

    path: str
    weight: Real = Field(1.0, gt=0, le=100)


class DataSettings(Section):
    """What is trained on and what is held out."""

    dataset_path: str = setting(
        "",
        "Data",
        "What to train on: JSON Lines, JSON, CSV or Parquet of conversations or texts, or prose as .txt.",
        "What",
        basic=True,
    )
    dataset_paths: list[WeightedFile] = setting(
        [], "More data", "Further files, each with a weight: 0.5 shows half its rows an epoch.", "What"
    )
    validation_dataset_path: str = setting(
        "", "Held-out file", "A file of its own for held-out loss; empty: a part of the data.", "Held-out"
    )
    validation_split: Real = setting(
        0.05, "Held-out share", "Share of the rows kept out to measure held-out loss.", "Held-out", ge=0, le=0.5
    )
    validation_max_rows: Count = setting(
        200,
        "Held-out rows",
        "At most this many held-out rows are measured each time.",
        "Held-out",
        ge=1,
        le=100_000,
        unit="rows",
    )
    too_long: Literal["cut", "drop", "refuse"] = setting(
        "cut",
        "Rows too long",
        "Conversations over the maximum length: cut, drop, or refuse. Plain text is split, never cut.",
        "What",
    )
    bad_row: Literal["stop", "skip"] = setting(
        "stop",
        "If a row turns bad",
        "In mid-run: stop and name it, or leave it out from there on, marked as an alert.",
        "What",
    )
    columns: list[str] = setting(
        [],
        "Columns",
        "For rows named otherwise: user=question, assistant=answer, one a line. Empty: as saved with the data.",
        "What",
    )
    chat_template: Literal["model", "chatml"] = setting(
        "model", "Chat template", "The model's own, or plain ChatML for models that have none.", "What"
    )
    seed: Count = setting(
        42, "Seed", "Fixes the order of rows and all random draws; same seed, same run.", "How", ge=0, le=2**31 - 1
    )

    @property
    def files(self) -> list[WeightedFile]:
        """All training files in order, the main one first with weight 1."""
        first = [WeightedFile(path=self.dataset_path, weight=1.0)] if self.dataset_path else []
        return first + list(self.dataset_paths)


class HyperparamSettings(Section):
    """How the weights are moved."""

    method: Literal["full", "lora", "qlora"] = setting(
        "lora",
        "Method",
        "LoRA trains small added matrices; full trains every weight; QLoRA is LoRA on 4 bits.",
        "How",
        basic=True,
    )
    batch_size: Count = setting(
        4,
        "Micro-batch",
        "Rows computed together. Smaller needs less memory and trains the same.",
        "Memory",
        basic=True,
        ge=1,
        le=1024,
        unit="rows",
    )
    gradient_accumulation: Count = setting(
        4,
        "Gradient accumulation",
        "Micro-batches summed before each step; rows per step = this x micro-batch.",
        "Memory",
        basic=True,
        ge=1,
        le=4096,
    )
    auto_micro_batch: bool = setting(
        False, "Automatic micro-batch", "Takes the largest that the memory forecast fits; rows per step stay.", "Memory"
    )
    learning_rate: Real = setting(
        2e-4,
        "Learning rate",
        "Size of each step. Full training usually wants 1e-5, LoRA 2e-4.",
        "How",
        basic=True,
        ge=0,
        le=1,
    )
    num_epochs: Real = setting(
        1, "Epochs", "How often the whole dataset is seen.", "How", basic=True, gt=0, le=1000, unit="epochs"
    )
    max_steps: Count | None = setting(
        None,
        "Maximum steps",
        "Stops after this many steps, whatever the epochs say. Empty: epochs decide.",
        "How",
        ge=1,
        le=10_000_000,
        unit="steps",
    )
    warmup_steps: Count = setting(
        10,
        "Warm-up",
        "Steps over which the learning rate rises from 0.",
        "How",
        ge=0,
        le=1_000_000,
        unit="steps",
    )
    lr_schedule: Literal["linear", "cosine", "constant"] = setting(
        "cosine", "Schedule", "How the learning rate falls after warm-up.", "How"
    )
    max_grad_norm: Real = setting(
        1.0,
        "Gradient clip",
        "Gradients with a larger norm are scaled down to this; 0 switches clipping off.",
        "How",
        ge=0,
        le=1e6,
    )
    weight_decay: Real = setting(
        0.0,
        "Weight decay",
        "Pulls weights towards zero each step; norms and biases are left out.",
        "How",
        ge=0,
        le=1,
    )
    optimizer: Literal["adamw", "adamw_8bit"] = setting(
        "adamw",
        "Optimizer",
        "AdamW; the 8-bit one holds its states approximately and needs bitsandbytes.",
        "Memory",
    )
    fp_precision: Literal["auto", "bf16", "fp16", "fp32"] = setting(
        "auto",
        "Precision",
        "Number format of the computation; auto takes bf16 where the device is fast at it.",
        "Memory",
    )
    master_weights: Literal["fp32", "none"] = setting(
        "fp32",
        "Master weights",
        "fp32 keeps exact weights beside bf16; none saves memory in full training, approximate.",
        "Memory",
    )
    max_length: Count = setting(
        2048,
        "Maximum length",
        "Longest row in tokens. Longer rows follow 'Rows too long'.",
        "What",
        basic=True,
        ge=8,
        le=1_048_576,
        unit="tokens",
    )
    packing: bool = setting(
        False,
        "Packing",
        "Fills each micro-batch row with several short rows; attention never crosses them.",
        "Memory",
    )
    use_gradient_checkpointing: bool = setting(
        False,
        "Gradient checkpointing",
        "Recomputes activations in the backward pass: less memory, about a quarter slower.",
        "Memory",
        basic=True,
    )
    gradient_checkpointing_policy: Literal["full", "selective"] = setting(
        "full",
        "Checkpointing policy",
        "Selective keeps matrix products and recomputes the rest: faster, more memory.",
        "Memory",
    )
    compile: bool = setting(
        False, "Compile", "Compiles each layer with torch: a slow first step, then faster ones.", "Memory"
    )
    on_divergence: Literal["stop", "rewind"] = setting(
        "stop",
        "If it diverges",
        "Stop, or go back to the last checkpoint, skip the step's rows and halve the rate.",
        "Saving",
    )
    early_stopping_patience: Count = setting(
        0,
        "Early stopping",
        "Stops after this many held-out checks without a better loss; 0 never stops.",
        "Held-out",
        ge=0,
        le=10_000,
        unit="checks",
    )

    @property
    def rows_per_step(self) -> int:
        """Rows (or packs, with packing) behind each optimiser step."""
        return self.batch_size * self.gradient_accumulation


class LoraSettings(Section):
    """The added matrices of LoRA (Hu et al. 2021, arXiv:2106.09685)."""

    r: Count = setting(
        16,
        "LoRA rank",
        "Width of the added matrices; more can learn more and costs memory.",
        "How",
        basic=True,
        ge=1,
        le=1024,
    )
    alpha: Real = setting(32, "LoRA alpha", "Scales the added matrices by alpha / rank.", "How", gt=0, le=4096)
    dropout: Real = setting(
        0.0,
        "LoRA dropout",
        "Share of inputs to the added matrices dropped while training.",
        "How",
        ge=0,
        lt=1,
    )
    target_modules: list[str] = setting(
        [],
        "LoRA targets",
        "Names of the layers that get matrices; empty: all linear layers of the blocks.",
        "How",
    )


class Config(Section):
    """Everything a run is made of."""

    model_name: str = setting("", "Model name", "A short name, shown where no display name is set.", "What")
    model_display_name: str = setting("", "Display name", "How the model is called on the page.", "What")
    model_path: str = setting("", "Model", "The folder of the model to train.", "What", basic=True)
    profile: ProfileSettings = ProfileSettings()
    data: DataSettings = DataSettings()
    hyperparams: HyperparamSettings = HyperparamSettings()
    lora: LoraSettings = LoraSettings()
    output: OutputSettings = OutputSettings()
    eval: EvalSettings = EvalSettings()
    alerts: AlertSettings = AlertSettings()
    notify: NotifySettings = NotifySettings()

    @model_validator(mode="after")
    def _precision_and_masters_agree(self) -> Config:
        if self.hyperparams.fp_precision == "fp16" and self.hyperparams.master_weights == "none":
            raise ValueError("hyperparams.master_weights: fp16 needs fp32 master weights; 'none' works with bf16 only")
        return self

    @property
    def display_name(self) -> str:
        """The model's name for a person."""
        return self.model_display_name or self.model_name or self.model_path.rstrip("/").rsplit("/", 1)[-1]
