"""The settings that each line of the gate judges; it greys from the moment one of them is touched. Pure."""

from __future__ import annotations

FIT_KEYS = (
    "model_path", "data.dataset_path", "data.dataset_paths", "data.too_long", "data.chat_template", "profile.name",
    "hyperparams.method", "hyperparams.batch_size", "hyperparams.gradient_accumulation", "hyperparams.auto_micro_batch",
    "hyperparams.optimizer", "hyperparams.fp_precision", "hyperparams.master_weights", "hyperparams.max_length",
    "hyperparams.packing", "hyperparams.use_gradient_checkpointing", "hyperparams.gradient_checkpointing_policy",
    "lora.r", "lora.dropout", "lora.target_modules", "output.save_steps", "eval.eval_strategy", "data.columns",
)  # fmt: skip
"""The settings that a forecast of memory judges."""

DATA_KEYS = [
    "data.dataset_path", "data.dataset_paths", "model_path", "profile.name", "profile.system_prompt", "data.chat_template",
    "hyperparams.max_length", "data.columns", "data.validation_dataset_path",
]  # fmt: skip
"""The settings that a check of the data is made with."""
DISK_KEYS = (
    "model_path", "hyperparams.method", "hyperparams.fp_precision", "hyperparams.master_weights", "hyperparams.optimizer",
    "lora.r", "lora.target_modules", "output.save_steps", "output.save_total_limit", "eval.eval_strategy",
    "hyperparams.max_steps", "hyperparams.num_epochs",
)  # fmt: skip
"""The settings that the room for checkpoints follows from."""
EVERYTHING = ("*",)
"""Of a line that any change puts out of date."""
