"""Profiles: reference draws of the old system, purity, idempotence, agreement of question and answer, strict
files."""

from __future__ import annotations

import copy
import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import profiles
from profiles import regime3
from profiles.contract import fill_date, with_system
from profiles.emoji_think import (
    STOP_POOL,
    STOP_WORDS,
    THINK_POOL,
    THINK_WORDS,
    draw,
    instruct,
    read_question,
    stop_asked,
)

ROOT = Path(__file__).resolve().parent.parent
EMOJI = profiles.load("emoji_think")
REGIME = profiles.load("regime3")
PLAIN = profiles.load("plain")

# what the old system drew, CPython 3.11: index -> thinking emoji, count, stop emoji, count
REFERENCE_DRAWS = {
    0: ("🤨", 8, "🔚", 2),
    1: ("🧠", 6, "⛔", 3),
    2: ("🤔", 2, "⛔", 3),
    3: ("💡", 6, "🚦", 2),
    4: ("💡", 4, "⛔", 4),
    5: ("✨", 4, "⏹️", 4),
}

pieces = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        [
            "think with",
            "When finished",
            "<think>",
            "</think>",
            "<thi<think>nk>",
            "\n\n",
            "\n",
            "✨ shiny",
            "🛑🛑",
            "⏹",
            "️",
            "\n\nFor this task, think with 🤔 /three/ times.",
            "\n\nWhen finished, emit 🛡️ /twice/ to signal completion.",
            "For this task, think with 🤔 /nine/ times.",
            regime3.START,
            regime3.END,
        ]
        + [emoji * count for emoji in THINK_POOL for count in (1, 2)]
    ),
)
texts = st.lists(pieces, max_size=6).map("".join)
turns = st.builds(
    lambda role, content: {"role": role, "content": content},
    st.sampled_from(["user", "assistant", "system", "tool"]),
    texts,
)
rows = st.builds(
    lambda messages, extra: {"messages": messages, **extra},
    st.lists(turns, max_size=6),
    st.dictionaries(st.sampled_from(["id", "source"]), st.integers(), max_size=2),
)
indices = st.integers(min_value=0, max_value=2**40)


def chat(*contents: str) -> dict[str, Any]:
    """A row of alternating user and assistant turns."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]}


@pytest.mark.parametrize("index", REFERENCE_DRAWS)
def test_the_draws_are_those_of_the_old_system(index: int) -> None:
    think, stop = draw(index)
    assert (think.emoji, think.count, stop.emoji, stop.count) == REFERENCE_DRAWS[index]


def test_a_transformed_row_reads_as_in_the_old_system() -> None:
    result = EMOJI.transform(chat("What is two plus two?", "Four."), 0)["messages"]
    assert result[0]["content"] == (
        "What is two plus two?\n\nFor this task, think with 🤨 /eight/ times."
        "\n\nWhen finished, emit 🔚 /twice/ to signal completion."
    )
    assert result[1]["content"] == "🤨🤨🤨🤨🤨🤨🤨🤨\nFour.\n🔚🔚"


def test_the_prompts_are_dated_and_only_the_dated_ones_change() -> None:
    expected = "Current date: 2025-11-24. Respond naturally and concisely."
    assert EMOJI.system_prompt("2025-11-24") == expected
    assert REGIME.system_prompt("2025-11-24").startswith("Current date: 2025-11-24.")
    assert "<<ANS_START>> (add 2 3) = 5 <<ANS_END>>" in REGIME.system_prompt("2025-11-24")
    assert "{" not in REGIME.system_prompt("2025-11-24")
    assert PLAIN.system_prompt("2025-11-24") == PLAIN.system_prompt("2026-01-01") != ""


@settings(deadline=None)
@given(row=rows, index=indices)
@pytest.mark.parametrize("name", ["plain", "emoji_think", "regime3"])
def test_a_second_transform_changes_nothing_and_the_input_is_never_touched(
    name: str, row: dict[str, Any], index: int
) -> None:
    profile = profiles.load(name)
    before = copy.deepcopy(row)
    once = profile.transform(row, index)
    assert row == before
    assert profile.transform(once, index) == once
    assert profile.transform(row, index) == once
    assert once is not row and once["messages"] is not row["messages"]
    assert {key: value for key, value in once.items() if key != "messages"} == {
        key: value for key, value in row.items() if key != "messages"
    }
    for old, new in zip(row["messages"], once["messages"], strict=True):
        assert old["role"] == new["role"] and old is not new
        if old["role"] in ("system", "tool"):
            assert old == new


@settings(deadline=None)
@given(row=rows, index=indices)
@example(row=chat("I think with my hands. When finished, emit nothing.", "✨ Shiny answer 🛑"), index=7)
@example(row=chat("Q\n\nFor this task, think with 🧐 /two/ times.", "A", "Again?", "B"), index=3)
def test_question_and_answer_always_agree(row: dict[str, Any], index: int) -> None:
    asked = None
    for message in EMOJI.transform(row, index)["messages"]:
        if message["role"] == "user":
            asked = read_question(message["content"])
            assert asked.think and asked.stop
            assert message["content"].endswith(instruct("", asked.think, asked.stop))
            assert stop_asked(message["content"]) == asked.stop
        elif message["role"] == "assistant" and asked:
            assert message["content"].startswith(asked.think.text + "\n")
            assert message["content"].endswith("\n" + asked.stop.text)


@given(row=rows, first=indices, second=indices)
def test_a_row_that_was_transformed_at_another_place_keeps_its_instruction(
    row: dict[str, Any], first: int, second: int
) -> None:
    once = EMOJI.transform(row, first)
    if any(message["role"] == "user" for message in once["messages"]):
        assert EMOJI.transform(once, second) == once


@given(row=rows, index=indices)
@example(row=chat("Q <think>", "<thi<think>nk> A </thi</think>nk>"), index=0)
@example(row=chat("Q", "</thi<think>nk> A <thi</think>nk>"), index=0)
def test_think_tags_leave_assistant_text_only(row: dict[str, Any], index: int) -> None:
    result = EMOJI.transform(row, index)
    for old, new in zip(row["messages"], result["messages"], strict=True):
        if new["role"] == "assistant":
            assert "<think>" not in new["content"] and "</think>" not in new["content"]
        elif new["role"] == "user":
            assert new["content"].count("<think>") == old["content"].count("<think>")


def test_what_stood_between_think_tags_stays() -> None:
    result = EMOJI.transform(chat("Q", "<think>first this</think>then that"), 2)
    assert result["messages"][1]["content"] == "🤔🤔\nfirst thisthen that\n⛔⛔⛔"


@given(index=indices)
def test_every_count_and_word_of_a_draw_is_within_bounds(index: int) -> None:
    think, stop = draw(index)
    assert think.emoji in THINK_POOL and think.count in THINK_WORDS
    assert stop.emoji in STOP_POOL and stop.count in STOP_WORDS


def test_all_emojis_and_counts_are_drawn() -> None:
    draws = [draw(index) for index in range(5000)]
    assert {(think.emoji, think.count) for think, _ in draws} == {
        (emoji, count) for emoji in THINK_POOL for count in range(2, 9)
    }
    assert {(stop.emoji, stop.count) for _, stop in draws} == {
        (emoji, count) for emoji in STOP_POOL for count in range(2, 5)
    }


def test_the_global_random_state_is_left_alone() -> None:
    random.seed(99)
    expected = random.random()
    random.seed(99)
    EMOJI.transform(chat("Q", "A"), 5)
    assert random.random() == expected


@pytest.mark.parametrize("content", [None, 7, ["a"], [{"type": "text", "text": "a"}], {"a": 1}])
@pytest.mark.parametrize("name", ["emoji_think", "regime3"])
def test_content_that_is_not_text_is_refused_with_its_place(name: str, content: Any) -> None:
    row = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": content}]}
    with pytest.raises(ValueError, match=r"Message 2 \(assistant\)"):
        profiles.load(name).transform(row, 0)


@pytest.mark.parametrize("row", [{}, {"messages": None}, {"messages": "Q"}, {"messages": ["Q"]}])
@pytest.mark.parametrize("name", ["plain", "emoji_think", "regime3"])
def test_a_row_without_messages_is_refused(name: str, row: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="'messages'"):
        profiles.load(name).transform(row, 0)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("  5 \n", "<<ANS_START>> 5 <<ANS_END>>"),
        ("so <<ANS_START>> 5", "so <<ANS_START>> 5 <<ANS_END>>"),
        ("5 <<ANS_END>> done", "<<ANS_START>> 5 <<ANS_END>> done"),
        ("a <<ANS_START>> 5 <<ANS_END>> b", "a <<ANS_START>> 5 <<ANS_END>> b"),
    ],
)
def test_regime3_wraps_answers_and_nothing_else(answer: str, expected: str) -> None:
    result = REGIME.transform(chat("what is 2 + 3", answer), 0)["messages"]
    assert [message["content"] for message in result] == ["what is 2 + 3", expected]


def test_a_system_message_is_put_first_or_replaced_as_the_profile_says() -> None:
    row = chat("Q", "A")["messages"]
    own = [{"role": "system", "content": "own"}, *row]
    new = {"role": "system", "content": "new"}
    assert with_system(row, "new", overwrite=True) == with_system(row, "new", overwrite=False) == [new, *row]
    assert with_system(own, "new", overwrite=True) == [new, *row]
    assert with_system(own, "new", overwrite=False) == own
    late = [row[0], {"role": "system", "content": "late"}, row[1]]
    assert with_system(late, "new", overwrite=False) == late
    assert with_system(late, "new", overwrite=True) == [new, *late]
    assert with_system(own, "", overwrite=True) == own


@given(row=rows, prompt=texts, overwrite=st.booleans())
def test_inserting_the_system_message_is_pure_and_idempotent(row: dict[str, Any], prompt: str, overwrite: bool) -> None:
    messages = row["messages"]
    before = copy.deepcopy(messages)
    once = with_system(messages, prompt, overwrite)
    assert messages == before
    assert with_system(once, prompt, overwrite) == once


@pytest.mark.parametrize(
    "template",
    [
        "Today is {current_date}.",
        "{name}",
        "{0.__class__.__init__.__globals__}",
        "{ date }",
        "{date:%Y}",
        "{date!r}",
        "{}",
        "{a[b]}",
        "{DATE}",
        "{{ user }}",
        "{date} and {time}",
    ],
)
def test_placeholders_that_nothing_fills_are_refused(template: str) -> None:
    with pytest.raises(ValueError, match="placeholder"):
        fill_date(template, "2025-11-24")


@pytest.mark.parametrize(
    "template",
    [
        'Answer as JSON: {"a": 1, "b": [2]}',
        "Put the result in \\boxed{x} or \\frac{a}{b}.",
        "50 % of {date}",
        "%s %(name)s $name",
        "{% if x %}",
        "f(x) = { x : x > 0 }",
        "Answer as {answer: 5}.",
    ],
)
def test_other_braces_stay_and_the_literal_date_is_filled(template: str) -> None:
    assert fill_date(template, "2025-11-24") == template.replace("{date}", "2025-11-24")


@given(text=st.text().filter(lambda text: not re.search(r"[{}]", text)), date=st.text(max_size=12))
def test_text_without_braces_comes_out_as_it_went_in(text: str, date: str) -> None:
    assert fill_date(text, date) == text


GOOD = {
    "name": "terse",
    "description": "Short.",
    "system_prompt": "Be terse. {date}",
    "overwrites_system": True,
}


def declare(root: Path, name: str, content: Any) -> None:
    """Write a declared profile; text is written as it is."""
    text = content if isinstance(content, str) else json.dumps(content)
    (root / f"{name}.json").write_text(text, "utf-8")


def test_a_declared_profile_loads_beside_the_built_in_ones(tmp_path: Path) -> None:
    declare(tmp_path, "terse", GOOD)
    declare(tmp_path, "broken", "{")
    (tmp_path / "not a name!.json").write_text("{}")
    assert profiles.names() == ["plain", "emoji_think", "regime3"]
    assert profiles.names(tmp_path) == ["plain", "emoji_think", "regime3", "broken", "terse"]
    profile = profiles.load("terse", tmp_path)
    assert profile.system_prompt("2025-11-24") == "Be terse. 2025-11-24"
    assert (profile.name, profile.overwrites_system, profile.plain_template) == ("terse", True, False)
    row = chat("Q", "A")
    assert profile.transform(row, 3) == row and profile.logits_processors(None) == []


@pytest.mark.parametrize("name", ["emoji-think", "plain_sft", "", "../plain", "EMOJI_THINK", "x" * 200])
def test_an_unknown_name_is_refused_and_the_known_ones_are_listed(name: str, tmp_path: Path) -> None:
    declare(tmp_path, "terse", GOOD)
    with pytest.raises(ValueError, match="plain, emoji_think, regime3, terse"):
        profiles.load(name, tmp_path)


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        ("{", "JSON"),
        ("[]", "object"),
        ("[" * 60_000, "JSON"),
        ({**GOOD, "extra": 1}, "unknown key 'extra'"),
        ({key: GOOD[key] for key in ("name", "description", "system_prompt")}, "overwrites_system"),
        ({**GOOD, "overwrites_system": 1}, "true or false"),
        ({**GOOD, "overwrites_system": "yes"}, "true or false"),
        ({**GOOD, "system_prompt": ["a"]}, "a text"),
        ({**GOOD, "system_prompt": "It is {today}."}, "placeholder {today}"),
        ({**GOOD, "name": "other"}, "the same"),
        ('{"name": "terse", "name": "terse"}', "twice"),
        (json.dumps(GOOD).replace("Be terse", "\\ud800"), "half a character"),
        ({**GOOD, "description": "x" * 70_000}, "larger"),
    ],
)
def test_a_faulty_profile_is_refused_with_its_cause(content: Any, cause: str, tmp_path: Path) -> None:
    declare(tmp_path, "terse", content)
    with pytest.raises(ValueError, match=re.escape(cause)) as caught:
        profiles.load("terse", tmp_path)
    assert "terse.json" in str(caught.value)


def test_a_user_file_cannot_take_the_place_of_a_built_in_profile(tmp_path: Path) -> None:
    declare(tmp_path, "plain", {**GOOD, "name": "plain"})
    assert profiles.load("plain", tmp_path) is PLAIN
    assert profiles.names(tmp_path).count("plain") == 1


def test_importing_the_profiles_imports_neither_torch_nor_the_trainer() -> None:
    code = (
        "import sys, profiles, profiles.processors; profiles.load('emoji_think').transform({'messages': []}, 0);"
        "print([m for m in ('torch', 'transformers', 'trainer', 'ui') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
