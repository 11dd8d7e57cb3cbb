"""The four faults of the first processors, each as a property: batches, half formats, stop counts, tags of several tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from profiles.emoji_think import STOP_POOL, STOP_WORDS, Sign
from profiles.processors import StopPenalty, TagPenalty, end_ids, single_token_ids
from tests.test_processors import encode, question
from tests.tiny import tiny_tokenizer

MANY = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
signs = st.builds(Sign, st.sampled_from(STOP_POOL), st.sampled_from(sorted(STOP_WORDS)))
bodies = st.text("abc \n.🤔", max_size=12)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A byte-level tokenizer: every emoji is several tokens."""
    return AutoTokenizer.from_pretrained(tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def padded(rows: list[list[int]]) -> torch.Tensor:
    """Rows ending together, as generation holds them, padding in front."""
    length = max(map(len, rows))
    return torch.tensor([[0] * (length - len(row)) + row for row in rows])


@MANY
@given(rows=st.lists(st.tuples(signs, signs, bodies, st.integers(0, 6)), min_size=2, max_size=5))
def test_a_row_gets_the_scores_in_a_batch_that_it_gets_alone(rows, tokenizer) -> None:
    prompts = [question(tokenizer, asked) for asked, _, _, _ in rows]
    answers = [encode(tokenizer, body + said.emoji * times) for _, said, body, times in rows]
    width = max(map(len, answers))
    answers = [(answer + encode(tokenizer, " and") * width)[:width] for answer in answers]
    together = StopPenalty(tokenizer, end_ids(tokenizer))
    alone = [StopPenalty(tokenizer, end_ids(tokenizer)) for _ in rows]
    scores = torch.randn(len(rows), 384, generator=torch.Generator().manual_seed(len(rows)))
    for length in range(width + 1):
        whole = together(padded([p + a[:length] for p, a in zip(prompts, answers, strict=True)]), scores.clone())
        for place, processor in enumerate(alone):
            mine = processor(
                torch.tensor([prompts[place] + answers[place][:length]]), scores[place : place + 1].clone()
            )
            assert torch.equal(whole[place], mine[0]), (place, length)


@MANY
@given(
    sign=signs,
    past=st.integers(0, 12),
    seed=st.integers(0, 2**16),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    spread=st.sampled_from([1.0, 1e3, 6e4]),
)
def test_no_format_overflows_whatever_the_scores(sign, past, seed, dtype, spread, tokenizer) -> None:
    prompt, stop = question(tokenizer, sign), encode(tokenizer, sign.text)
    generator = torch.Generator().manual_seed(seed)
    scores = (torch.randn(1, 384, generator=generator) * spread).clamp(-6.5e4, 6.5e4).to(dtype)
    forbidden = torch.randperm(384, generator=generator)[:40]
    scores[0, forbidden[forbidden != tokenizer.eos_token_id]] = -torch.inf
    processor, tags = StopPenalty(tokenizer, end_ids(tokenizer)), TagPenalty([5, 6])
    processor(torch.tensor([prompt]), torch.zeros(1, 384, dtype=dtype))
    ids = torch.tensor([prompt + stop + [9] * past])
    changed = processor(ids, tags(ids, scores))
    assert changed.dtype == dtype and not changed.isnan().any() and not (changed == torch.inf).any()
    assert torch.equal(changed == -torch.inf, scores == -torch.inf), "what is forbidden stays so, and nothing else is"
    assert changed.float().softmax(-1).isfinite().all()


@MANY
@given(sign=signs, body=bodies, after=st.text("abc ", min_size=1, max_size=4))
def test_every_stop_that_can_be_asked_for_is_reached_before_it_ends_the_answer(sign, body, after, tokenizer) -> None:
    prompt = question(tokenizer, sign)
    answer = encode(tokenizer, body) + encode(tokenizer, sign.text)
    processor = StopPenalty(tokenizer, end_ids(tokenizer))
    for length in range(len(answer)):
        free = processor(torch.tensor([prompt + answer[:length]]), torch.zeros(1, 384))
        assert not free.any(), f"stepped in {len(answer) - length} tokens before the stop of {sign.count} was whole"
    rest = encode(tokenizer, after)
    for length in range(len(rest) + 1):
        held = processor(torch.tensor([prompt + answer + rest[:length]]), torch.zeros(1, 384))[0]
        assert int(held.argmax()) == tokenizer.eos_token_id


@MANY
@given(
    tags=st.lists(st.text("<>/thinkabc", min_size=2, max_size=8), min_size=1, max_size=4, unique=True), data=st.data()
)
def test_a_tag_is_punished_as_one_token_or_not_at_all(tags, data, tokenizer, tmp_path_factory) -> None:
    """Punishing the first piece of a tag would punish every word that begins with it."""
    own = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    known = set(own.get_vocab())
    added = data.draw(st.lists(st.sampled_from(tags), unique=True))
    own.add_tokens([tag for tag in added if tag not in known])
    found = single_token_ids(own, tuple(tags))
    assert found == [
        own.convert_tokens_to_ids(tag) for tag in tags if len(own.encode(tag, add_special_tokens=False)) == 1
    ]
    assert all(own.decode([token]) in tags for token in found)
    assert {own.convert_tokens_to_ids(tag) for tag in added} <= set(found)
