"""Held-out loss: the same forward as training, without gradients, dropout or a touch on the training's random draws."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from trainer.data.loader import Rows, assemble
from trainer.loop.forward import Path, losses
from trainer.loop.team import ALONE, Team


def micro_groups(rows: np.ndarray, lengths: np.ndarray, budget_tokens: int) -> list[np.ndarray]:
    """Rows grouped so that each group has at most `budget_tokens` tokens (one long row may stand alone)."""
    groups: list[np.ndarray] = []
    group: list[int] = []
    tokens = 0
    for row in rows[np.argsort(lengths[rows], kind="stable")]:
        length = int(lengths[row])
        if group and tokens + length > budget_tokens:
            groups.append(np.array(group))
            group, tokens = [], 0
        group.append(row)
        tokens += length
    return groups + ([np.array(group)] if group else [])


def groups_without(groups: list[np.ndarray], rows: frozenset[int]) -> list[np.ndarray]:
    """The groups as they are but for `rows`: the others keep their places, so that every life sums them in one order."""
    if not rows:
        return groups
    kept = [group[~np.isin(group, list(rows))] for group in groups]
    return [group for group in kept if len(group)]


def held_out_loss(
    model: PreTrainedModel,
    trained: nn.Module,
    cache: Rows,
    groups: list[np.ndarray],
    path: Path,
    device: str,
    interrupt: Callable[[], bool] = lambda: False,
    team: Team = ALONE,
) -> float | None:
    """Mean loss of a label over all rows, in nats; None when `interrupt()` said so in between, in any process of the team."""
    was_training = trained.training
    trained.eval()
    total = torch.zeros((), dtype=torch.float64 if not device.startswith("mps") else torch.float32, device=device)
    labels, left = 0, False
    try:
        with torch.no_grad():
            for _, rows in team.share(groups):
                if left := interrupt():
                    break
                batch = assemble(cache, rows, device)
                total += losses(model, batch, path).sum().to(total.dtype)
                labels += batch.labels
    finally:
        trained.train(was_training)
    sums = torch.cat([total.reshape(1), total.new_tensor([labels, left])])
    team.sum(sums)
    loss_sum, label_count, interrupted = sums.tolist()
    return None if interrupted else loss_sum / max(1.0, label_count)
