"""Loss and gradients against transformers' own, one row at a time, for every family the head and the attention must know."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import (
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
)

from tests.exact import SIZES, VOCABULARY, build, reference, relative_difference
from tests.memory_rows import random_rows
from trainer.data.loader import assemble
from trainer.loop.forward import choose_path, losses
from trainer.models import attention

FAMILIES = {
    "llama": LlamaConfig(**SIZES),
    "qwen3 tied": Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=True),
    "mistral with a window of 16": MistralConfig(**SIZES, sliding_window=16),
    "gemma2 with caps": Gemma2Config(
        **SIZES, head_dim=8, attn_logit_softcapping=2.0, final_logit_softcapping=3.0, sliding_window=16
    ),
    "cohere with a logit scale": CohereConfig(**SIZES, logit_scale=0.0625),
    "granite with a logit scaling": GraniteConfig(**SIZES, logits_scaling=8.0),
    "gpt2": GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=256,
        resid_pdrop=0,
        attn_pdrop=0,
        embd_pdrop=0,
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_loss_and_gradients_equal_one_row_at_a_time(family: str) -> None:
    loaded = build(FAMILIES[family])
    cache = random_rows(7, VOCABULARY, seed=3)
    rows = np.arange(7)
    wanted, gradients = reference(loaded.model, cache, rows)
    choice = choose_path(loaded.model, assemble(cache, rows[:2], "cpu"), compute=torch.float32, autocast=None)
    assert choice.path.way == "fused", choice.passed_over
    loaded.model.train()
    count = sum(int(cache.labels(r)[1:].sum()) for r in rows)
    total = 0.0
    for group in (rows[:4], rows[4:6], rows[6:]):
        loss = losses(loaded.model, assemble(cache, group, "cpu"), choice.path).sum() / count
        loss.backward()
        total += float(loss.detach())
    mine = {name: p.grad for name, p in loaded.model.named_parameters() if p.grad is not None}
    assert abs(total - wanted) <= 2e-6 * abs(wanted)
    assert relative_difference(mine, gradients) <= 1e-6


def test_a_head_that_is_no_plain_matrix_falls_back_and_says_so() -> None:
    loaded = build(FAMILIES["llama"])

    class Odd(torch.nn.Module):
        def __init__(self, inner: torch.nn.Linear) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) * 1.5

    loaded.model.lm_head = Odd(loaded.model.lm_head)
    cache = random_rows(2, VOCABULARY, seed=1)
    choice = choose_path(loaded.model, assemble(cache, np.arange(2), "cpu"), compute=torch.float32, autocast=None)
    assert choice.path.way == "own head"


def test_a_hidden_scale_on_a_plain_head_is_found_by_the_check_of_every_start() -> None:
    loaded = build(FAMILIES["llama"])
    head = loaded.model.lm_head
    head.register_forward_hook(lambda module, args, out: out * 1.01)  # the fused way multiplies by the matrix alone
    cache = random_rows(2, VOCABULARY, seed=1)
    choice = choose_path(loaded.model, assemble(cache, np.arange(2), "cpu"), compute=torch.float32, autocast=None)
    assert choice.path.way == "own head"
    assert "differs" in dict(choice.passed_over)["fused"]


def test_attention_that_sees_across_documents_is_found_and_passed_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded = build(FAMILIES["llama"])
    cache = random_rows(2, VOCABULARY, seed=1)
    whole = attention._each_document

    def leaking(q, k, v, documents, *rest):
        one = attention.Documents((0, documents.borders[-1]), documents.cumulative, documents.borders[-1])
        return whole(q, k, v, one, *rest)

    monkeypatch.setattr(attention, "_each_document", leaking)
    choice = choose_path(loaded.model, assemble(cache, np.arange(2), "cpu"), compute=torch.float32, autocast=None)
    assert choice.path.way == "one row at a time"


def test_a_document_does_not_change_when_its_neighbour_does() -> None:
    loaded = build(FAMILIES["mistral with a window of 16"])
    cache, other = random_rows(3, VOCABULARY, seed=5), random_rows(3, VOCABULARY, seed=6)
    path = choose_path(loaded.model, assemble(cache, np.arange(2), "cpu"), compute=torch.float32, autocast=None).path
    mixed = type(cache)([(other._rows[0][0], other._rows[0][1]), (cache._rows[1][0], cache._rows[1][1])])
    with torch.no_grad():
        first = losses(loaded.model, assemble(cache, np.arange(2), "cpu"), path)
        second = losses(loaded.model, assemble(mixed, np.arange(2), "cpu"), path)
    count = int(cache.labels(1)[1:].sum())
    torch.testing.assert_close(first[-count:], second[-count:], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_forward_pass_looks_for_documents_in_the_positions(family, monkeypatch):
    """Transformers does that with a branch on a value of the device: the host would wait for it in every forward pass."""
    loaded = build(FAMILIES[family])
    batch = assemble(random_rows(3, VOCABULARY, seed=1), np.arange(3), "cpu")
    path = choose_path(loaded.model, batch, compute=torch.float32, autocast=None).path
    assert path.way == "fused"
    looked = []
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", looked.append)
    losses(loaded.model, batch, path)
    assert not looked
