"""The reference of the exactness tests: plain transformers, one row at a time; and how far a gradient is from it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from trainer.data.loader import Rows
from trainer.models import attention
from trainer.models.load import Loaded

VOCABULARY = 211
SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)


def build(config: Any) -> Loaded:
    """A model of `config` with seeded weights twice as large as fresh ones and our attention."""
    torch.manual_seed(0)
    function = attention.register("sdpa")
    try:
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME)
        takes_ours = model._can_set_attn_implementation()
    except KeyError:
        takes_ours = False
    if not takes_ours:  # as load_model does
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for parameter in model.parameters():  # larger than fresh weights, so that caps and windows matter
        if parameter.dim() > 1:
            parameter.data.mul_(2)
    return Loaded(model, function, None)


def reference(model: Any, cache: Rows, rows: Iterable[int]) -> tuple[float, dict[str, torch.Tensor]]:
    """Sum of label losses over label count from plain transformers: one row at a time, labels= and its own attention."""
    model.set_attn_implementation("eager")
    model.zero_grad()
    labels_of = []
    total = 0.0
    count = sum(int(cache.labels(r)[1:].sum()) for r in rows)
    for row in rows:
        ids = torch.tensor(cache.ids(row).astype(np.int64))[None]
        labels = torch.where(torch.tensor(cache.labels(row).astype(bool))[None], ids, -100)
        labels[0, 0] = -100
        mine = int((labels != -100).sum())
        loss = model(input_ids=ids, labels=labels).loss * mine / count
        loss.backward()
        total += float(loss.detach())
        labels_of.append(mine)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.set_attn_implementation(attention.NAME)
    return total, gradients


def relative_difference(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Norm of the difference over the norm of `theirs`, over all tensors together, in float64."""
    assert mine.keys() == theirs.keys()
    difference = sum(float((mine[n].double() - theirs[n].double()).pow(2).sum()) for n in mine)
    size = sum(float(theirs[n].double().pow(2).sum()) for n in theirs)
    return (difference / size) ** 0.5
