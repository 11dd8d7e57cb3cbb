"""The settings that a forecast judges; the gate greys its line from the moment one of them is touched."""

from __future__ import annotations

FIT_KEYS = (
    "model_path", "data.dataset_path", "data.dataset_paths", "data.too_long", "data.chat_template", "profile.name",
    "hyperparams.method", "hyperparams.batch_size", "hyperparams.gradient_accumulation", "hyperparams.auto_micro_batch",
    "hyperparams.optimizer", "hyperparams.fp_precision", "hyperparams.master_weights", "hyperparams.max_length",
    "hyperparams.packing", "hyperparams.use_gradient_checkpointing", "hyperparams.gradient_checkpointing_policy",
    "lora.r", "lora.dropout", "lora.target_modules", "output.save_steps", "eval.eval_strategy",
)  # fmt: skip
"""The settings that a forecast of memory judges."""
