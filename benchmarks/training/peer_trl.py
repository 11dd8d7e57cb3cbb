"""TRL's SFTTrainer with packing as it is measured. The only module that imports trl."""

from __future__ import annotations

import importlib.util

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from benchmarks.training.clock import Clock, Peak
from benchmarks.training.peers import arguments, defaults, example, load, run
from benchmarks.training.work import Trained, Work
from trainer.data.tokens import load_tokenizer


def train(work: Work, clock: Clock, peak: Peak) -> Trained:
    """Train on the packs of our plan, given in TRL's own packed form (ids, labels, lengths), so that steps compare.

    On a GPU its attention is FlashAttention-2 where flash-attn is installed, as TRL asks for; else transformers' default
    with a mask that keeps documents apart.
    """
    flash = work.device != "cpu" and importlib.util.find_spec("flash_attn") is not None
    model, trained = load(work, **({"attn_implementation": "flash_attention_2"} if flash else {}))
    case, plan = work.case, work.plan
    packs = [plan.rows[start:end] for start, end in zip(plan.pack_starts, plan.pack_starts[1:], strict=False)]
    examples = [example(work, rows) | {"seq_lengths": work.cache.lengths[rows].tolist()} for rows in packs]
    trainer = SFTTrainer(
        model=trained,
        args=SFTConfig(
            **arguments(work, micro=case.micro_packs, accumulation=case.packs // case.micro_packs),
            packing=True,
            packing_strategy="bfd",
            max_length=case.max_length,
            dataset_kwargs={"skip_prepare_dataset": True},
        ),
        train_dataset=Dataset.from_list(examples),
        processing_class=load_tokenizer(work.model_path),
    )
    losses = run(trainer, work, clock, peak)
    return Trained(losses, model.config._attn_implementation, defaults(trainer))
