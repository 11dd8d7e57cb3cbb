"""transformers.Trainer as it is measured, with and without Liger's kernels, and what it shares with TRL's trainer.

Their own defaults, but for what has to be equal: rows, order, steps, learning rate, precision, checkpointing; no saving,
no reports. Losses are kept as tensors and read after the last step, so that nothing waits for them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

from benchmarks.training.clock import Clock, Peak
from benchmarks.training.data import SEED
from benchmarks.training.work import LEARNING_RATE, LORA_ALPHA, LORA_RANK, Trained, Work
from trainer.data.tokens import load_tokenizer
from trainer.models.lora import add_lora


class StepEnds(TrainerCallback):
    """Tells the clock of each optimiser step."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """After the optimizer, before the next batch is fetched."""
        self._clock.step_ended()


def load(work: Work, **extra: Any) -> tuple[Any, Any]:
    """(model, what is trained of it): fp32 weights for full training, the base of LoRA in the computation's format."""
    bf16 = work.case.precision == "bf16"
    dtype = torch.bfloat16 if bf16 and work.case.method == "lora" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(
        work.model_path, dtype=dtype, local_files_only=True, trust_remote_code=False, **extra
    )
    if work.case.method == "full":
        return model, model
    # the product's own call of peft: the same layers, fp32 matrices and starting values
    return model, add_lora(model, rank=LORA_RANK, alpha=LORA_ALPHA, dropout=0.0, targets=[], seed=SEED)


def arguments(work: Work, *, micro: int, accumulation: int) -> dict[str, Any]:
    """Settings that transformers' and TRL's arguments share."""
    return {
        "output_dir": str(work.scratch / "peer"),
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": accumulation,
        "max_steps": work.case.steps,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "bf16": work.case.precision == "bf16",
        "gradient_checkpointing": work.case.checkpointing,
        "use_cpu": work.device == "cpu",
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": SEED,
    }


def example(work: Work, rows: np.ndarray) -> dict[str, list[int]]:
    """Rows end to end as one example: `labels` are the ids where an answer's token is trained, else -100."""
    ids = np.concatenate([work.cache.ids(int(row)) for row in rows]).astype(np.int64)
    marks = np.concatenate([work.cache.labels(int(row)) for row in rows])
    return {"input_ids": ids.tolist(), "labels": np.where(marks > 0, ids, -100).tolist()}


def run(trainer: Any, work: Work, clock: Clock, peak: Peak) -> list[float]:
    """Train with the plan's order and return the loss of each step."""
    losses: list[torch.Tensor] = []
    step = trainer.training_step

    def kept(*args: Any, **kwargs: Any) -> torch.Tensor:
        loss = step(*args, **kwargs)
        losses.append(loss.detach())
        return loss

    trainer.training_step = kept
    trainer._get_train_sampler = lambda *args, **kwargs: SequentialSampler(trainer.train_dataset)
    trainer.add_callback(StepEnds(clock))
    peak.start()
    trainer.train()
    each = len(losses) // work.case.steps
    if each * work.case.steps != len(losses):
        raise RuntimeError(f"{len(losses)} micro-batches in {work.case.steps} steps")
    # each micro-batch's loss is its label losses over the labels of the whole step (num_items_in_batch): they add up
    return torch.stack(losses).float().reshape(-1, each).sum(1).tolist()


def train(work: Work, clock: Clock, peak: Peak) -> Trained:
    """transformers.Trainer with its padding collator; every step has the rows of our unpacked plan."""
    model, trained = load(work)
    tokenizer = load_tokenizer(work.model_path)
    case = work.case
    settings = arguments(work, micro=case.micro_rows, accumulation=case.accumulation)
    trainer = Trainer(
        model=trained,
        args=TrainingArguments(**settings, use_liger_kernel=work.arm.peer == "liger"),
        train_dataset=[example(work, work.plan.rows[at : at + 1]) for at in range(len(work.plan.rows))],
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True, label_pad_token_id=-100),
    )
    losses = run(trainer, work, clock, peak)
    return Trained(losses, model.config._attn_implementation, defaults(trainer))


def defaults(trainer: Any) -> dict[str, Any]:
    """What the peer decided itself."""
    args = trainer.args
    return {
        "optimizer": str(args.optim.value if hasattr(args.optim, "value") else args.optim),
        "average_tokens_across_devices": args.average_tokens_across_devices,
        "loss over the labels of the whole step": bool(trainer.model_accepts_loss_kwargs),
        "logging_nan_inf_filter": args.logging_nan_inf_filter,
    }
