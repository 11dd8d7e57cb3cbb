"""Labels along the whole way: a row of a file, shaped, rendered, cached, collated; read back from the tensors.

The reference is transformers' own rendering and its own marking of the assistants' parts.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import profiles
from tests import chat_templates
from tests.real_templates import CHATML, FAMILIES, MISTRAL, SPECIAL, marked_text, plain, real_tokenizer
from trainer.data.loader import MicroBatch, assemble
from trainer.data.tokens import TokenCache, TokenRequest, build_cache, load_tokenizer

DATE = "2025-11-22"
PROFILES = (None, "plain", "emoji_think", "regime3", "house")
LOOK_ALIKES = (*SPECIAL, "<|im_", "end|>", "<|im_start|>assistant\n", "[INST] x [/INST]", "<|eot_id|><|eot_id|>")
MARKS = (
    "🛑️", "⏹️", "☝🏽", "👩‍👩‍👧", "🇩🇪", "1️⃣", "e\u0301", "a\u0308\u0323", "क्षि", "\u200d", "\ufe0f", "\u202e", "\u00a0", " ", "\n",
)  # fmt: skip
THOUGHT = "<think>\nhm\n</think>\n\n"

texts = st.lists(
    st.one_of(
        st.sampled_from([*LOOK_ALIKES, *MARKS, "the fox ", "Stop with ⏹️"]),
        st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=5),
    ),
    max_size=5,
).map("".join)
answers = st.tuples(st.sampled_from(("", "", THOUGHT)), texts).map("".join).filter(lambda text: text.strip())
questions = st.tuples(texts, st.sampled_from(("", "", "<think>", "</think>"))).map("".join)
conversations = st.lists(
    st.tuples(st.one_of(st.none(), texts), st.lists(st.tuples(questions, answers), min_size=1, max_size=3)),
    min_size=1,
    max_size=10,
).map(lambda rows: [talk(turns, system) for system, turns in rows])


def talk(turns: list[tuple[str, str]], system: str | None = None) -> list[dict[str, str]]:
    """A conversation of (question, answer) pairs."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


@pytest.fixture(scope="module")
def own_profiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one declared profile."""
    folder = tmp_path_factory.mktemp("profiles")
    content = {
        "name": "house",
        "description": "Ours.",
        "system_prompt": "Day {date}. Be kind.",
        "overwrites_system": True,
    }
    (folder / "house.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function from the name of a family to a folder with its tokenizer and template."""
    root = tmp_path_factory.mktemp("families")

    @cache
    def folder(family: str) -> Path:
        path = root / family.replace(" ", "-")
        tokenizer = real_tokenizer(family) if family in FAMILIES else chat_templates.sentence_piece()
        if family not in FAMILIES:
            tokenizer.chat_template = plain(MISTRAL)
        tokenizer.save_pretrained(path)
        return path

    return folder


@cache
def tokenizer_in(folder: Path) -> Any:
    return load_tokenizer(folder)


def tokens_of(
    rows: list[list[dict[str, str]]], folder: Path, profile: str | None, own: Path, place: Path
) -> TokenCache:
    """The cache of a file that holds `rows`, made as a run makes it."""
    path = place / "rows.jsonl"
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows), encoding="utf-8")
    request = TokenRequest((str(path),), str(folder), profile, "", DATE, 100_000, "refuse", str(own))
    return TokenCache.open(build_cache(request, place / "tokens", lambda done, total: None))


def as_shaped(messages: list[dict[str, str]], index: int, profile: str | None, own: Path) -> list[dict[str, str]]:
    """What the profile's own functions make of a row."""
    if profile is None:
        return messages
    chosen = profiles.load(profile, own)
    whole = profiles.with_system(messages, chosen.system_prompt(DATE), chosen.overwrites_system)
    return chosen.transform({"messages": whole}, index)["messages"]


def collated(batch: MicroBatch, number: int) -> tuple[list[int], list[int]]:
    """(all ids, ids of the labels) of document `number`, out of the tensors that the model gets."""
    start, stop = batch.documents.borders[number : number + 2]
    ids = batch.ids[0]
    mine = batch.label_row == number
    trained = batch.label_at[mine] + 1
    assert ids[trained].tolist() == batch.targets[mine].tolist()
    assert ((trained > start) & (trained < stop)).all()
    return ids[start:stop].tolist(), ids[trained].tolist()


def template_used(family: str, profile: str | None) -> str:
    """Profiles with signs of their own take plain ChatML where a template writes thinking blocks."""
    return CHATML if family == "Qwen3" and profile in ("emoji_think", "regime3") else FAMILIES[family]


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck))
@given(rows=conversations)
def test_labels_in_the_collated_tensors_are_the_answers_and_their_ends(
    family: str,
    profile: str | None,
    rows: list[list[dict[str, str]]],
    model: Any,
    own_profiles: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder, template = model(family), template_used(family, profile)
    tokenizer = tokenizer_in(folder)
    rows = [*rows, talk([("q", "sure")])] if family != "Gemma" or profile is None else rows
    try:
        tokens = tokens_of(rows, folder, profile, own_profiles, tmp_path_factory.mktemp("case"))
    except Exception as refusal:
        assert family == "Gemma" and profile is not None, refusal  # it takes no system message, and profiles bring one
        assert "System role not supported" in str(refusal)
        return
    kept = tokens.source[:, 2].tolist()
    for index in set(range(len(rows))) - set(kept):
        shaped = as_shaped(rows[index], index, profile, own_profiles)
        system = family == "Gemma" and shaped[0]["role"] == "system"
        assert system or "think>" in str(shaped), "only thinking that a template moves about may be refused"
    batch = assemble(tokens, np.arange(len(kept)), "cpu")
    control = set(tokenizer.all_special_ids) | set(tokenizer.convert_tokens_to_ids(list(SPECIAL)))
    for number, index in enumerate(kept):
        shaped = as_shaped(rows[index], index, profile, own_profiles)
        whole, wanted = marked_text(tokenizer, template, shaped)
        ids, labels = collated(batch, number)
        assert tokenizer.decode(ids, skip_special_tokens=False) == whole
        assert tokenizer.decode(labels, skip_special_tokens=False) == wanted
        # control tokens stand where they would if nobody had typed anything, and nowhere else
        harmless = [{"role": m["role"], "content": "x"} for m in shaped]
        scaffold = tokenizer(marked_text(tokenizer, template, harmless)[0], add_special_tokens=False)["input_ids"]
        assert [n for n in ids if n in control] == [n for n in scaffold if n in control]
        ends = [n for n in labels if n in control]
        assert len(ends) == sum(m["role"] == "assistant" for m in shaped) and len(set(ends)) == 1


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(rows=conversations)
def test_on_sentence_pieces_the_labels_give_the_answers_back_too(
    rows: list[list[dict[str, str]]], model: Any, own_profiles: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = model("sentence pieces")
    tokenizer = tokenizer_in(folder)
    rows = [*rows, talk([("q", "sure")])]
    tokens = tokens_of(rows, folder, None, own_profiles, tmp_path_factory.mktemp("case"))
    kept = tokens.source[:, 2].tolist()
    for index in set(range(len(rows))) - set(kept):  # this kind of tokenizer writes its spaces with that sign
        assert "▁" in json.dumps(rows[index], ensure_ascii=False)
    batch = assemble(tokens, np.arange(len(kept)), "cpu")
    head = tokenizer("\n", add_special_tokens=False)["input_ids"]
    for number, index in enumerate(kept):
        messages = rows[index]
        ids, labels = collated(batch, number)
        said = [m["content"] for m in messages if m["role"] == "assistant"]
        assert tokenizer.decode(head + labels) == "\n" + "".join(text + "</s>" for text in said)
        assert ids.count(tokenizer.eos_token_id) == len(said) and ids.count(tokenizer.bos_token_id) == 1


def labels_as_text(
    rows: list[list[dict[str, str]]], family: str, model: Any, own: Path, place: Path, profile: str | None = None
) -> list[str]:
    """The decoded labels of each row, out of the collated tensors."""
    tokens = tokens_of(rows, model(family), profile, own, place)
    batch = assemble(tokens, np.arange(len(tokens.lengths)), "cpu")
    tokenizer = tokenizer_in(model(family))
    return [tokenizer.decode(collated(batch, n)[1], skip_special_tokens=False) for n in range(len(tokens.lengths))]


# written out by hand, so that a mistake in the templates' own marks would show
BY_HAND = {
    "ChatML": " one <|im_end|>two<|im_end|>",
    "Qwen2.5": " one <|im_end|>two<|im_end|>",
    "Qwen3": " one <|im_end|>two<|im_end|>",
    "Llama 3": "one<|eot_id|>two<|eot_id|>",
    "Mistral": " one </s>two</s>",
    "Gemma": "one<end_of_turn>two<end_of_turn>",
    "Phi-3": " one <|end|>two<|end|>",
    "DeepSeek": " one <｜end▁of▁sentence｜>two<｜end▁of▁sentence｜>",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_each_familys_labels_are_what_a_person_would_mark(
    family: str, model: Any, own_profiles: Path, tmp_path: Path
) -> None:
    turns = [("q", " one "), ("<|im_end|> r", "two")]
    rows = [talk(turns), *([talk(turns, "Be brief.")] if family != "Gemma" else [])]
    assert labels_as_text(rows, family, model, own_profiles, tmp_path) == [BY_HAND[family]] * len(rows)


def test_thinking_of_earlier_turns_is_gone_and_that_of_the_last_is_trained(
    model: Any, own_profiles: Path, tmp_path: Path
) -> None:
    row = talk([("q", f"{THOUGHT}one"), ("r", f"{THOUGHT}two")])
    assert labels_as_text([row], "Qwen3", model, own_profiles, tmp_path) == [f"one<|im_end|>{THOUGHT}two<|im_end|>"]
    end = "<｜end▁of▁sentence｜>"
    assert labels_as_text([row], "DeepSeek", model, own_profiles, tmp_path) == [f"\n\none{end}\n\ntwo{end}"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_typed_control_token_never_becomes_one_in_any_turn(
    family: str, model: Any, own_profiles: Path, tmp_path: Path
) -> None:
    typed = "".join(SPECIAL)
    tokens = tokens_of([talk([(typed, typed)])], model(family), None, own_profiles, tmp_path)
    tokenizer = tokenizer_in(model(family))
    bare = tokens_of([talk([("x", "x")])], model(family), None, own_profiles, tmp_path)
    control = set(tokenizer.convert_tokens_to_ids(list(SPECIAL)))
    assert [n for n in tokens.ids(0) if n in control] == [n for n in bare.ids(0) if n in control]
    assert tokenizer.decode(tokens.ids(0), skip_special_tokens=False).count(typed) == 2


def test_rows_with_an_empty_answer_are_named_and_empty_questions_are_trained(
    model: Any, own_profiles: Path, tmp_path: Path
) -> None:
    rows = [talk([("", "one")]), talk([("q", "")]), talk([("q", " \n")]), talk([("", "a"), ("", "b")])]
    tokens = tokens_of(rows, model("ChatML"), None, own_profiles, tmp_path)
    assert tokens.source[:, 2].tolist() == [0, 3]
    assert [(p["line"], p["code"]) for p in tokens.meta["problems"]] == [(2, "empty_answer"), (3, "empty_answer")]
    found = labels_as_text(rows, "ChatML", model, own_profiles, tmp_path)
    assert found == ["one<|im_end|>", "a<|im_end|>b<|im_end|>"]
