"""When memory runs out: the rungs of the ladder, each an event, and none of them loses a step or trains one twice.

Called by the loop, outside the except block: the frames, and the tensors in them, are gone by then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from trainer.loop.ready import Progress
from trainer.models.activations import recompute
from trainer.refusal import Refusal

if TYPE_CHECKING:
    from trainer.loop.train import Training


def smaller(training: Training, step: int) -> None:
    """One rung down the ladder: half the micro-batch with twice the accumulation, at one row checkpointing.

    Raises Refusal below the last rung, and in a team.
    """
    if training.around.team.size > 1:
        raise Refusal(
            f"Out of memory at step {step}. With {training.around.team.size} processes the micro-batch is not lowered by "
            "itself: resume with a smaller hyperparams.batch_size and more hyperparams.gradient_accumulation."
        )
    training.stepper.optimizer.zero_grad(set_to_none=True)
    if training.around.device.startswith("cuda"):
        torch.cuda.empty_cache()
    progress = training.progress
    if progress.packs_each > 1:
        before, progress.packs_each = progress.packs_each, progress.packs_each // 2
        did = f"Micro-batch now {progress.packs_each} instead of {before}: each step trains the same tokens. Nothing lost."
    elif not progress.checkpointing:
        recompute(training.model.loaded.model, training.config.hyperparams.gradient_checkpointing_policy)
        progress.checkpointing = True
        did = "Gradient checkpointing is now on. Nothing lost; about a quarter slower."
    else:
        rows = training.plan.micro_batches(step, 1)
        longest = max(int(training.tokens.cache.lengths[row]) for group in rows for row in group)
        raise Refusal(
            f"Out of memory at step {step} with one row at a time and checkpointing on (longest row {longest:,} tokens). "
            "Lower the maximum length, or use LoRA."
        )
    training.around.events.append("oom_rung", step=step, text=f"Out of memory at step {step}. {did}")
    training.around.say(f"Out of memory at step {step}. {did}")


def go_on_smaller(training: Training, step: int, before: Progress) -> None:
    """Take up the ladder where the training `before` stood on it, and go one rung down."""
    training.progress.packs_each = min(training.progress.packs_each, before.packs_each)
    if before.checkpointing and not training.progress.checkpointing:
        recompute(training.model.loaded.model, training.config.hyperparams.gradient_checkpointing_policy)
        training.progress.checkpointing = True
    smaller(training, step)


def smaller_groups(training: Training) -> bool:
    """Halve the groups of held-out rows, which no weight depends on; False where each is one row already."""
    if training.around.device.startswith("cuda"):
        torch.cuda.empty_cache()
    step, groups = training.progress.step, training.ready.held_out_groups
    if max(map(len, groups)) == 1:
        text = f"Held-out loss of step {step} was not measured: out of memory with one row at a time. Training goes on."
        training.around.events.append("alert", code="memory", step=step, text=text)
        return False
    groups[:] = [half for group in groups for half in np.array_split(group, 2) if len(half)]
    text = (
        f"Out of memory in the held-out check of step {step}. It goes on with half as many rows at once. Nothing lost."
    )
    training.around.events.append("oom_rung", step=step, text=text)
    training.around.say(text)
    return True
