"""One forward pass of a micro-batch to the loss of each label, and the proof that it is the model's own loss.

Three ways, fastest first; `choose_path` takes the first whose losses equal transformers' own on two real rows.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from trainer.data.loader import MicroBatch
from trainer.loop import router
from trainer.loop.loss import Head, label_losses, losses_from_logits
from trainer.models import attention
from trainer.refusal import Refusal

Way = Literal["fused", "own head", "one row at a time"]
LEAK = {torch.float32: 3e-4}
LEAK_IN_HALF = 1e-3
"""Nats. A way that is right moves a loss by nothing where all shapes stay the same; where experts get other numbers of tokens, by
rounding: up to 5e-5 in fp32 (on the processor, 12 layers of sharp weights). The smallest real leak was 1.1e-3 in fp32 and 2.0e-3
in bf16 (tiny random models; convolution and ALiBi)."""
WAYS: tuple[Way, ...] = ("fused", "own head", "one row at a time")


@dataclass(frozen=True)
class Path:
    """How losses are computed: which way, with which head, in which format, and the weight of router losses if any."""

    way: Way
    head: Head | None
    compute: torch.dtype
    autocast: torch.dtype | None
    router: float | None = None

    def context(self, device_type: str) -> AbstractContextManager:
        """Autocast where the weights are wider than the computation."""
        return torch.autocast(device_type, self.autocast) if self.autocast is not None else nullcontext()


@dataclass(frozen=True)
class Choice:
    """The path taken, and why faster ones were passed over (way, reason)."""

    path: Path
    passed_over: tuple[tuple[str, str], ...]
    difference: float  # largest difference of a label's loss to transformers' own, relative


def plain_head(model: PreTrainedModel) -> Head | None:
    """The head as matrix, scale and cap, or None where it is something else.

    Scales: Cohere multiplies by `logit_scale`, Granite divides by `logits_scaling`; Gemma 2 caps with tanh.
    """
    linear = model.get_output_embeddings()
    if type(linear) is not nn.Linear:
        return None
    config = model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    return Head(linear, scale, getattr(config, "final_logit_softcapping", None))


@dataclass(frozen=True)
class Found:
    """What one pass gives: the loss of each label (N,) in nats, and of each row its router loss (rows,), both float32."""

    labels: torch.Tensor
    router: torch.Tensor | None


def losses(model: PreTrainedModel, batch: MicroBatch, path: Path) -> torch.Tensor:
    """Loss of each label of the micro-batch, (N,) float32 in nats, in the order of `batch.targets`; no router loss."""
    return forward(model, batch, replace(path, router=None)).labels


def forward(model: PreTrainedModel, batch: MicroBatch, path: Path) -> Found:
    """One pass over the micro-batch: label losses in the order of `batch.targets`, router losses where `path` asks."""
    asked = {"output_router_logits": True} if path.router is not None else {}
    with path.context(batch.ids.device.type):
        if path.way == "one row at a time":
            return _row_by_row(model, batch, asked)
        whole: dict[str, Any] = {
            "input_ids": batch.ids,
            "position_ids": batch.positions,
            "documents": batch.documents,
            "use_cache": False,
            **asked,
        }
        # a router loss of the model's own counts tokens in the mask, and an attention of its own reads it
        if not asked and model._supports_attention_backend:
            # four dimensions mean a mask that is made already: transformers would look for documents in the positions
            # else, and the host would wait for the device in every forward pass. Our attention goes by `documents` and
            # reads no mask.
            whole["attention_mask"] = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=batch.ids.device)
        if path.way == "fused":
            assert path.head is not None
            out = model.base_model(**whole)
            hidden = out.last_hidden_state[0]
            found = label_losses(hidden[batch.label_at], path.head, batch.targets, path.compute)
        else:
            out = model(**whole, logits_to_keep=batch.label_at)
            found = losses_from_logits(out.logits[0], batch.targets)
        if not asked:
            return Found(found, None)
        return Found(found, router.of_rows(model, out.router_logits, batch.documents.borders))


def _row_by_row(model: PreTrainedModel, batch: MicroBatch, asked: dict[str, bool]) -> Found:
    parts, routed = [], []
    for start, end in zip(batch.documents.borders, batch.documents.borders[1:], strict=False):
        inside = (batch.label_at >= start) & (batch.label_at < end)
        row = batch.ids[:, start:end]
        # a mask of ones makes transformers build its own masks, sliding windows included
        out = model(input_ids=row, attention_mask=torch.ones_like(row), use_cache=False, **asked)
        parts.append(losses_from_logits(out.logits[0][batch.label_at[inside] - start], batch.targets[inside]))
        if asked:
            routed.append(out.aux_loss.float())
    return Found(torch.cat(parts), torch.stack(routed) if asked else None)


def reference_losses(model: PreTrainedModel, batch: MicroBatch) -> list[float]:
    """Transformers' own mean loss of each row alone, through `labels=` and its own attention."""
    found = []
    capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    try:
        try:
            model.set_attn_implementation("eager" if capped else "sdpa")
        except ValueError:  # some families have no sdpa
            model.set_attn_implementation("eager")
        for number, (start, end) in enumerate(zip(batch.documents.borders, batch.documents.borders[1:], strict=False)):
            labels = torch.full((1, end - start), -100, device=batch.ids.device)
            mine = batch.label_row == number
            labels[0, batch.label_at[mine] + 1 - start] = batch.targets[mine]
            row = batch.ids[:, start:end]
            # families that keep our attention whatever is set (MPT) build their mask from one of ones alone
            mask = torch.ones_like(row)
            found.append(float(model(input_ids=row, attention_mask=mask, labels=labels, use_cache=False).loss))
    finally:
        model.set_attn_implementation(attention.NAME)
    return found


def choose_path(
    model: PreTrainedModel, batch: MicroBatch, *, compute: torch.dtype, autocast: torch.dtype | None
) -> Choice:
    """Compare each way with the reference on `batch` (two short rows) in the weights' own format; take the first that agrees."""
    head, weight = plain_head(model), router.coefficient(model)
    dtype = next(model.parameters()).dtype
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    was_training = model.training
    model.eval()
    passed_over = []
    try:
        with torch.no_grad():
            wanted = reference_losses(model, batch)
            for way in WAYS if head is not None else WAYS[1:]:
                path = Path(way, head, dtype, None, weight)
                got = row_means(model, batch, path)
                if isinstance(got, str):
                    passed_over.append((way, got))
                    continue
                if (seen := _sees_too_much(model, batch, path)) is not None:
                    passed_over.append((way, seen))
                    continue
                difference = max(abs(a - b) / max(abs(b), 1e-6) for a, b in zip(got, wanted, strict=True))
                if difference <= tolerance:
                    return Choice(Path(way, head, compute, autocast, weight), tuple(passed_over), difference)
                passed_over.append((way, f"its loss differs by {difference:.1e} from the model's own"))
    finally:
        model.train(was_training)
    raise Refusal(
        f"Cannot train this model: no way of computing its loss is exact ({passed_over[-1][1]}).",
        "model_path",
    )


def _sees_too_much(model: PreTrainedModel, batch: MicroBatch, path: Path) -> str | None:
    """In words what a label sees that it must not: another row, or what comes after it."""
    limit = LEAK.get(next(model.parameters()).dtype, LEAK_IN_HALF)
    leak = 0.0 if path.way == "one row at a time" else leakage(model, batch, path)
    if not leak <= limit:
        return f"rows of a micro-batch see each other (a loss moves by {leak:.1e})"
    ahead = foresight(model, batch, path)
    return None if ahead <= limit else f"a label sees tokens that come after it (a loss moves by {ahead:.1e})"


def leakage(model: PreTrainedModel, batch: MicroBatch, path: Path) -> float:
    """How far the losses of the last row move when the tokens of the rows before it change; 0 where none sees another.

    The shapes stay the same, so that a correct way gives the same bits. Convolutions, recurrent layers and attention
    without positions of its own (ALiBi) carry one row into the next.
    """
    if len(batch.rows) < 2:
        return 0.0
    border = batch.documents.borders[-2]
    changed = batch.ids.clone()
    changed[:, :border] = batch.ids[:, :border].flip(1)
    last = batch.label_row == len(batch.rows) - 1
    before = forward(model, batch, path)
    after = forward(model, replace(batch, ids=changed), path)
    moved = float((before.labels - after.labels)[last].abs().max())
    if before.router is None or after.router is None:
        return moved
    return max(moved, float((before.router - after.router)[-1].abs()))


def foresight(model: PreTrainedModel, batch: MicroBatch, path: Path) -> float:
    """How far losses move when tokens after them change; 0 where attention looks back alone.

    Transformers' own loss is no witness here: a mask that is missing is missing for both.
    """
    changed = batch.ids.clone()
    before = torch.zeros_like(batch.label_at, dtype=torch.bool)
    for number, (start, end) in enumerate(zip(batch.documents.borders, batch.documents.borders[1:], strict=False)):
        mine = (batch.label_row == number).nonzero().flatten()
        if len(mine) == 0:
            continue
        early = mine[: (len(mine) + 1) // 2]
        cut = int(batch.label_at[early[-1]]) + 1
        before[early] = True
        changed[0, cut:end] = batch.ids[0, start:end].flip(0)[cut - start :]
    first = forward(model, batch, path).labels
    second = forward(model, replace(batch, ids=changed), path).labels
    moved = (first - second).abs()[before]
    return float(moved.max()) if len(moved) else 0.0


def row_means(model: PreTrainedModel, batch: MicroBatch, path: Path) -> list[float] | str:
    """Mean loss of each row with its router loss, or in words why this way does not work for the model."""
    try:
        found = forward(model, batch, path)
    except torch.OutOfMemoryError:
        raise
    except (TypeError, NotImplementedError, AttributeError, ValueError, IndexError, RuntimeError) as error:
        return f"the model does not take it ({type(error).__name__}: {str(error)[:120]})"
    means = [float(found.labels[batch.label_row == number].mean()) for number in range(len(batch.rows))]
    if found.router is None or path.router is None:
        return means
    return [mean + path.router * float(own) for mean, own in zip(means, found.router, strict=True)]
