"""Logits processors: every asked stop is reachable, rows are judged alone, no dtype overflows, generate ends
in time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

import profiles
from profiles.emoji_think import STOP_POOL, STOP_WORDS, Sign, draw, instruct
from profiles.processors import StopPenalty, TagPenalty, end_ids, single_token_ids, stop_penalty
from tests.tiny import tiny_model_dir

EMOJI = profiles.load("emoji_think")
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SIGNS = [Sign(emoji, count) for emoji in STOP_POOL for count in STOP_WORDS]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a byte-level tokenizer: every emoji is several tokens."""
    return tiny_model_dir(tmp_path_factory.mktemp("processors") / "model")


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> Any:
    """The tiny model's tokenizer."""
    return AutoTokenizer.from_pretrained(model_dir)


def question(tokenizer: Any, stop: Sign | None, text: str = "Hello") -> list[int]:
    """Token ids of a ChatML prompt that asks for `stop`, or for nothing."""
    content = text if stop is None else instruct(text, draw(0)[0], stop)
    chat = [{"role": "user", "content": content}]
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return tokenizer.encode(prompt, add_special_tokens=False)


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of plain text."""
    return tokenizer.encode(text, add_special_tokens=False)


def verdicts(processor: StopPenalty, prompt: list[int], answer: list[int], vocab: int) -> list[bool]:
    """Whether the processor stepped in before each next token, for a growing answer."""
    result = []
    for length in range(len(answer) + 1):
        ids = torch.tensor([prompt + answer[:length]])
        changed = processor(ids, torch.zeros(1, vocab))
        result.append(bool((changed != 0).any()))
    return result


@pytest.mark.parametrize("sign", SIGNS, ids=lambda sign: f"{sign.emoji}x{sign.count}")
def test_each_asked_stop_is_reached_and_then_ends_the_answer(sign: Sign, tokenizer: Any) -> None:
    body, stop = encode(tokenizer, "🤔🤔\nIt is four.\n"), encode(tokenizer, sign.text)
    processor = StopPenalty(tokenizer, end_ids(tokenizer))
    seen = verdicts(processor, question(tokenizer, sign), body + stop + encode(tokenizer, " and so"), 384)
    assert seen.index(True) == len(body) + len(stop)
    assert all(seen[len(body) + len(stop) :])


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("emoji", STOP_POOL)
def test_without_an_instruction_the_stop_waits_for_what_follows(emoji: str, count: int, tokenizer: Any) -> None:
    body, stop = encode(tokenizer, "Fine.\n"), encode(tokenizer, emoji * count)
    processor = StopPenalty(tokenizer, end_ids(tokenizer))
    prompt = question(tokenizer, None)
    assert not any(verdicts(processor, prompt, body + stop, 384))
    assert verdicts(processor, prompt, body + stop + encode(tokenizer, "\nMore"), 384)[-1]
    four = encode(tokenizer, emoji * 4)
    assert verdicts(processor, prompt, body + four, 384).index(True) == len(body) + len(four)


def test_an_emoji_without_its_variation_selector_is_no_stop(tokenizer: Any) -> None:
    processor = StopPenalty(tokenizer, end_ids(tokenizer))
    bare = encode(tokenizer, "⏹⏹⏹⏹ x")
    assert not any(verdicts(processor, question(tokenizer, Sign("⏹️", 2)), bare, 384))
    assert not any(verdicts(processor, question(tokenizer, None), bare, 384))


def test_another_emoji_than_the_asked_one_is_no_stop(tokenizer: Any) -> None:
    processor = StopPenalty(tokenizer, end_ids(tokenizer))
    other = encode(tokenizer, "🛑🛑🛑🛑 x")
    assert not any(verdicts(processor, question(tokenizer, Sign("⛔", 2)), other, 384))


def test_the_rows_of_a_batch_are_judged_alone(tokenizer: Any) -> None:
    rows = [
        (question(tokenizer, Sign("🛑", 2)), encode(tokenizer, "🛑🛑")),
        (question(tokenizer, Sign("🛑", 4)), encode(tokenizer, "🛑🛑")),
        (question(tokenizer, Sign("🚦", 3), "A much longer question"), encode(tokenizer, "🛑🛑")),
    ]
    length = max(len(prompt) for prompt, _ in rows)
    ids = torch.tensor([[0] * (length - len(prompt)) + prompt + answer for prompt, answer in rows])
    processor = StopPenalty(tokenizer, end_ids(tokenizer))
    processor(ids[:, :length], torch.zeros(3, 384))
    changed = processor(ids, torch.zeros(3, 384))
    assert (changed != 0).any(dim=1).tolist() == [True, False, False]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_score_ever_becomes_nan_and_what_is_forbidden_stays_so(dtype: torch.dtype, tokenizer: Any) -> None:
    prompt, stop = question(tokenizer, Sign("✋", 2)), encode(tokenizer, "✋✋")
    processor = StopPenalty(tokenizer, end_ids(tokenizer))
    tags = TagPenalty([5])
    lowest, highest = torch.finfo(dtype).min, torch.finfo(dtype).max
    processor(torch.tensor([prompt]), torch.zeros(1, 384, dtype=dtype))
    for past in range(60):
        scores = torch.randn(1, 384, generator=torch.Generator().manual_seed(past)).to(dtype)
        scores[0, 5], scores[0, 6], scores[0, 2] = -torch.inf, lowest, highest
        ids = torch.tensor([prompt + stop + [9] * past])
        before = scores.clone()
        changed = processor(ids, tags(ids, scores))
        assert torch.equal(scores, before), "the scores handed in were changed"
        assert not changed.isnan().any() and not (changed == torch.inf).any()
        assert changed.dtype == dtype and changed[0, 5] == -torch.inf
        assert changed[0, 6] == lowest and changed[0, 2] == highest
        probabilities = changed.softmax(-1)
        assert probabilities[0, 2] == 1 and probabilities.isfinite().all()


def test_the_penalty_grows_tenfold_and_is_capped_below_the_largest_half() -> None:
    values = [stop_penalty(tokens) for tokens in range(100_000)]
    assert values[:4] == [100, 1000, 10_000, 10_000]
    assert max(values) <= torch.finfo(torch.float16).max


def test_the_end_is_rewarded_by_fifty(tokenizer: Any) -> None:
    prompt, stop = question(tokenizer, Sign("🔚", 3)), encode(tokenizer, "🔚🔚🔚")
    processor = StopPenalty(tokenizer, end_ids(tokenizer))
    processor(torch.tensor([prompt]), torch.zeros(1, 384))
    changed = processor(torch.tensor([prompt + stop]), torch.zeros(1, 384))
    assert changed[0, tokenizer.eos_token_id] == 50
    others = [token for token in range(384) if token != tokenizer.eos_token_id]
    assert (changed[0, others] == -100).all()


def test_think_tags_sink_by_the_schedule() -> None:
    processor = TagPenalty([7])
    taken = []
    for step in range(16):
        changed = processor(torch.zeros(2, 10 + step, dtype=torch.long), torch.zeros(2, 20))
        assert (changed[0] == changed[1]).all() and changed[0].count_nonzero() == 1
        taken.append(-float(changed[0, 7]))
    assert taken == [640.0] * 4 + [160.0] * 4 + [120.0] * 4 + [80.0] * 4


def test_only_tags_of_a_single_token_are_punished(model_dir: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    assert single_token_ids(tokenizer, ("<think>", "</think>")) == []
    assert [type(item) for item in EMOJI.logits_processors(tokenizer)] == [StopPenalty]
    tokenizer.add_tokens(["<think>"])
    assert single_token_ids(tokenizer, ("<think>", "</think>")) == [384]
    assert [type(item) for item in EMOJI.logits_processors(tokenizer)] == [TagPenalty, StopPenalty]


def test_a_tokenizer_without_an_end_is_refused(model_dir: Path) -> None:
    class Endless:
        eos_token_id = None

        def get_vocab(self) -> dict[str, int]:
            return {"a": 0}

    with pytest.raises(ValueError, match="end-of-turn"):
        end_ids(Endless())
    assert end_ids(AutoTokenizer.from_pretrained(model_dir)) == [2]


def test_the_other_profiles_do_not_constrain(tokenizer: Any) -> None:
    assert profiles.load("plain").logits_processors(tokenizer) == []
    assert profiles.load("regime3").logits_processors(tokenizer) == []


class Script:
    """Makes a model say given tokens: 30 on the next one of each row, above a tiny model's own scores."""

    def __init__(self, prompt_tokens: int, rows: list[list[int]]) -> None:
        self.prompt_tokens = prompt_tokens
        self.rows = rows

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The scores with each row's next scripted token raised; a row at its end repeats its last token."""
        step = input_ids.shape[1] - self.prompt_tokens
        result = scores.clone()
        for place, row in enumerate(self.rows):
            result[place, row[min(step, len(row) - 1)]] += 30
        return result


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_generate_ends_each_row_after_its_own_stop(dtype: str, model_dir: Path, tokenizer: Any) -> None:
    signs = [Sign("⏹️", 2), Sign("🛑", 3), Sign("🛡️", 4)]
    prompts = [question(tokenizer, sign, "Hello " * (1 + place)) for place, sign in enumerate(signs)]
    length = max(map(len, prompts))
    ids = torch.tensor([[0] * (length - len(prompt)) + prompt for prompt in prompts])
    bodies = ["One.\n", "And two.\n", "Three.\n"]
    script = [encode(tokenizer, body + sign.emoji * 6) for body, sign in zip(bodies, signs, strict=True)]
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=getattr(torch, dtype))
    constrain = EMOJI.logits_processors(tokenizer)
    free, constrained = (
        model.generate(
            ids,
            attention_mask=(ids != 0).long(),
            max_new_tokens=60,
            do_sample=False,
            logits_processor=[Script(length, script), *processors],
        )
        for processors in ([], constrain)
    )
    for place, sign in enumerate(signs):
        answer = tokenizer.decode(constrained[place, length:], skip_special_tokens=True)
        assert answer == bodies[place] + sign.text
        assert sign.emoji * 5 in tokenizer.decode(free[place, length:]), "the script itself would have gone on"


def test_beams_and_sampling_run_to_their_end(model_dir: Path, tokenizer: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    ids = torch.tensor([question(tokenizer, Sign("🛑", 2))])
    for how in ({"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}):
        processors = [*EMOJI.logits_processors(tokenizer), TagPenalty([7])]
        out = model.generate(ids, max_new_tokens=12, logits_processor=processors, **how)
        assert out.shape[1] > ids.shape[1]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    answer=st.lists(st.sampled_from([*STOP_POOL, "⏹", "🤔", "\n", "go", "️"]), max_size=14).map("".join),
    sign=st.sampled_from(SIGNS),
    data=st.data(),
)
def test_jumping_about_in_an_answer_gives_the_same_verdicts(answer: str, sign: Sign, data: Any, tokenizer: Any) -> None:
    """Beams and assisted generation hand rows over in any order; each verdict must be that of a fresh
    processor."""
    prompt, tokens = question(tokenizer, sign), encode(tokenizer, answer)
    straight = verdicts(StopPenalty(tokenizer, end_ids(tokenizer)), prompt, tokens, 384)
    text_has_stop = sign.text in answer
    assert any(straight) == text_has_stop
    processor = StopPenalty(tokenizer, end_ids(tokenizer))
    processor(torch.tensor([prompt]), torch.zeros(1, 384))
    for length in data.draw(st.lists(st.integers(0, len(tokens)), max_size=8)):
        ids = torch.tensor([prompt + tokens[:length]])
        assert bool((processor(ids, torch.zeros(1, 384)) != 0).any()) == straight[length]


def test_a_new_prompt_or_a_reset_starts_anew(tokenizer: Any) -> None:
    processor = StopPenalty(tokenizer, end_ids(tokenizer))
    stop = encode(tokenizer, "🛑🛑")
    first = question(tokenizer, Sign("🛑", 2))
    assert verdicts(processor, first, stop, 384)[-1]
    assert not verdicts(processor, question(tokenizer, Sign("🛑", 3)), stop, 384)[-1]
    assert verdicts(processor, first, stop, 384)[-1]
    processor.reset()
    longer = first + stop
    assert verdicts(processor, longer, [9], 384) == [False, False], "the stop lies in the prompt now"
