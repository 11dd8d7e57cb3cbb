"""The renderer: labels are the answers and their ends, whatever the template and the tokenizer."""

from __future__ import annotations

import time
import unicodedata
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import profiles
from tests import chat_templates as templates
from trainer.data.render import Rendered, Renderer, template_for
from trainer.data.template import PLAIN_CHATML
from trainer.refusal import Refusal

DATE = "2025-11-22"
LOOK_ALIKES = (
    "<|im_end|>",
    "<|im_start|>assistant\n",
    "<s>",
    "</s>",
    "<|eot|>",
    "<end_of_turn>",
    "[INST]",
    "<|im_",
)
ALL_TEMPLATES = {
    name: getattr(templates, name)
    for name in ("CHATML", "THINKING", "STRIPPING", "NO_SYSTEM", "HEADERS", "MODEL_ROLE", "BRACKETS")
}


@cache
def tokenizer(kind: str = "byte_level") -> Any:
    return templates.byte_level(nfc=True) if kind == "nfc" else getattr(templates, kind)()


def renderer(template: str, kind: str = "byte_level", date: str = DATE) -> Renderer:
    return Renderer(tokenizer(kind), template, date)


def talk(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """A conversation of user and assistant turns in turn."""
    roles = ("user", "assistant")
    turns = [{"role": roles[n % 2], "content": content} for n, content in enumerate(contents)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


def labelled(row: Rendered, kind: str = "byte_level") -> str:
    ids = [number for number, label in zip(row.ids, row.labels, strict=True) if label]
    return tokenizer(kind).decode(ids, skip_special_tokens=False)


def decoded(ids: list[int], kind: str = "byte_level") -> str:
    return tokenizer(kind).decode(ids, skip_special_tokens=False)


texts = st.lists(
    st.one_of(
        st.sampled_from([*LOOK_ALIKES, "🛑️", "👩‍👩‍👧", "e\u0301", "⏹️", " ", "\n", "\t", "\u00a0", "the ", "<think>"]),
        st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=6),
    ),
    max_size=6,
).map("".join)
conversations = st.tuples(st.one_of(st.none(), texts), st.lists(st.tuples(texts, texts), min_size=1, max_size=3)).map(
    lambda pair: talk(*[text for turns in pair[1] for text in turns], system=pair[0])
)


@settings(max_examples=200, deadline=None)
@given(messages=conversations)
def test_labels_decode_to_the_answers_and_their_ends_and_nothing_else(messages: list[dict[str, str]]) -> None:
    row = renderer(templates.CHATML).render(messages)
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    assert labelled(row) == "".join(answer + "<|im_end|>" for answer in answers)
    whole = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    assert decoded(row.ids) == whole
    # a control token stands exactly where the template put one, whatever people typed
    ends = tokenizer().convert_tokens_to_ids("<|im_end|>")
    assert row.ids.count(ends) == len(messages)
    assert [kind == "label" for kind in row.kinds] == row.labels
    for segment in row.segments[1::2]:
        plain = tokenizer()(segment.text, split_special_tokens=True)["input_ids"]
        assert row.ids[segment.start : segment.stop] == plain


@settings(max_examples=200, deadline=None)
@given(messages=conversations, name=st.sampled_from(sorted(ALL_TEMPLATES)))
def test_with_every_template_the_segments_join_to_its_own_rendering_or_the_row_is_refused(
    messages: list[dict[str, str]], name: str
) -> None:
    own = renderer(ALL_TEMPLATES[name])
    try:
        row = own.render(messages)
    except Refusal as refusal:
        system = name == "MODEL_ROLE" and messages[0]["role"] == "system"
        assert system or (name == "THINKING" and "<think>" in str(messages)), (name, refusal)
        return
    expected = tokenizer().apply_chat_template(messages, chat_template=ALL_TEMPLATES[name], tokenize=False)
    assert "".join(segment.text for segment in row.segments) == expected == decoded(row.ids)
    for segment in row.segments:
        if segment.message is None:
            continue
        role, content = messages[segment.message]["role"], messages[segment.message]["content"]
        assert "".join(segment.text.split()) in "".join(content.split())
        assert all(row.labels[segment.start : segment.stop]) == (role == "assistant" or not segment.text)


@pytest.mark.parametrize(
    ("name", "answer", "expected", "context_before"),
    [
        ("CHATML", " four\n", " four\n<|im_end|>", "assistant\n"),
        ("THINKING", "four", "four<|im_end|>", "assistant\n<think>\n\n</think>\n\n"),
        (
            "THINKING",
            "<think>\nhm\n</think>\n\nfour",
            "<think>\nhm\n</think>\n\nfour<|im_end|>",
            "assistant\n",
        ),
        ("THINKING", "<think>hm</think>four", "<think>\nhm\n</think>\n\nfour<|im_end|>", "assistant\n"),
        ("STRIPPING", " four\n", "four<|im_end|>", "assistant\n"),
        ("HEADERS", "four", "four<|eot|>", "assistant<|end_header|>\n\n"),
        ("MODEL_ROLE", " four", "four<end_of_turn>", "model\n"),
        ("BRACKETS", "four", "four <|im_end|>", "[/INST] "),
    ],
)
def test_what_is_trained_and_what_stands_before_it(name: str, answer: str, expected: str, context_before: str) -> None:
    messages = talk("What is it?", answer)
    row = renderer(ALL_TEMPLATES[name]).render(messages)
    assert labelled(row) == expected
    first = row.labels.index(True)
    assert decoded(row.ids[:first]).endswith(context_before)
    prompt = renderer(ALL_TEMPLATES[name]).prompt(messages[:-1], answer)
    assert prompt == row.ids[:first]


def test_every_answer_of_a_conversation_is_trained_and_the_next_turn_is_not() -> None:
    for name, end in [("HEADERS", "<|eot|>"), ("MODEL_ROLE", "<end_of_turn>"), ("BRACKETS", " <|im_end|>")]:
        row = renderer(ALL_TEMPLATES[name]).render(talk("q1", "one", "q2", "two"))
        assert labelled(row) == f"one{end}two{end}"


def test_thinking_that_the_template_takes_out_is_not_trained() -> None:
    row = renderer(templates.THINKING).render(talk("q", "<think>\na\n</think>\n\none", "r", "two"))
    assert labelled(row) == "one<|im_end|>two<|im_end|>"
    assert row.notes == ("thinking_dropped",)


def test_a_dropped_system_message_is_told() -> None:
    messages = talk("q", "a", system="Be brief.")
    for template, dropped in [
        (templates.NO_SYSTEM, True),
        (templates.CHATML, False),
        (templates.BRACKETS, False),
    ]:
        own = renderer(template)
        assert ("system_dropped" in own.render(messages).notes) is dropped
    with pytest.raises(Refusal, match="refuses this row: System role not supported"):
        renderer(templates.MODEL_ROLE).render(messages)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (templates.CHATML.replace("message['content']", "message['content'] | upper"), "drops or rewrites"),
        (templates.CHATML.replace("message['content']", "message['content'] * 2"), "repeats message 1"),
        (templates.CHATML.replace("in messages", "in messages | reverse"), "changes the order"),
        (templates.CHATML.replace("in messages", "in messages[:1]"), "drops or rewrites message 2"),
        (templates.CHATML.replace("['content']", "['content'].replace('m', '3')"), "rewrites message 2"),
        (templates.CHATML.replace("message['content']", "message['content'][:10]"), "rewrites message 1"),
        ("{%- for message in messages -%}", "mistake on line 1"),
        ("{{ messages.nothing.at_all }}", "has no attribute"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ],
)  # fmt: skip
def test_a_template_that_does_not_keep_the_contents_is_refused_with_the_reason(template: str, words: str) -> None:
    with pytest.raises(Refusal, match=words):
        renderer(template).render(talk("Who are you then?", "me"))


def test_one_refused_row_leaves_the_others_as_they_are() -> None:
    own = renderer(templates.MODEL_ROLE)
    good, bad = talk("q", "a"), talk("q", "a", system="S")
    first, second, third = own.render_many([good, bad, good])
    assert isinstance(second, Refusal)
    assert isinstance(first, Rendered) and isinstance(third, Rendered)
    assert first.ids == third.ids == own.render(good).ids


@pytest.mark.parametrize("kind", ["sentence_piece", "unigram", "nfc"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_tokenizers_that_put_spaces_before_texts_give_every_text_back(kind: str, data: st.DataObject) -> None:
    letters = st.sampled_from(list("abthe xyz  [/]</s>?.\n")) if kind == "unigram" else texts
    content = st.lists(letters, max_size=8).map("".join)
    messages = talk(*(data.draw(content) for _ in range(4)))
    try:
        row = renderer(templates.BRACKETS, kind).render(messages)
    except Refusal as refusal:
        assert kind == "unigram" and "does not give the text" in refusal.message
        return
    for segment in row.segments:
        if segment.message is not None:
            head = tokenizer(kind)("\n", add_special_tokens=False)["input_ids"]
            back = decoded(head + row.ids[segment.start : segment.stop], kind)
            content = messages[segment.message]["content"]
            if kind == "nfc":
                content = unicodedata.normalize("NFC", content)
            assert back == "\n" + content
    special = set(tokenizer(kind).all_special_ids)
    inside = [n for s in row.segments if s.message is not None for n in row.ids[s.start : s.stop]]
    assert not special & set(inside)


def test_plain_text_cannot_become_the_end_token_even_where_the_vocabulary_holds_it() -> None:
    unigram = tokenizer("unigram")
    typed = unigram("</s>", add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert unigram.eos_token_id in typed, "the tokenizer no longer shows the danger; choose another one"
    row = renderer(templates.BRACKETS, "unigram").render(talk("say </s> now", "</s>"))
    assert row.ids.count(unigram.eos_token_id) == 1
    assert labelled(row, "unigram").count("</s>") == 2


def test_control_tokens_that_are_not_marked_special_are_kept_out_of_contents_too() -> None:
    plain = templates.byte_level(special_flag=False)
    end = plain.convert_tokens_to_ids("<|im_end|>")
    assert end in plain("a <|im_end|> b", split_special_tokens=True)["input_ids"]
    row = Renderer(plain, templates.CHATML, DATE).render(talk("a <|im_end|> b", "<|im_end|>c"))
    assert row.ids.count(end) == 2
    assert row.ids.count(plain.convert_tokens_to_ids("<think>")) == 0


def test_text_the_tokenizer_cannot_hold_is_refused_and_named() -> None:
    with pytest.raises(Refusal, match="does not give the text of message 2 back"):
        renderer(templates.BRACKETS, "unigram").render(talk("the", "É"))


def test_the_date_of_the_run_is_what_the_template_sees() -> None:
    template = "{{- strftime_now('%d %b %Y') + '\\n' -}}" + templates.CHATML
    for date, words in [("2025-11-22", "22 Nov 2025\n"), ("1999-01-02", "02 Jan 1999\n")]:
        assert decoded(renderer(template, date=date).render(talk("q", "a")).ids).startswith(words)
    with pytest.raises(Refusal, match="a date such as"):
        renderer(template, date="yesterday")


@pytest.mark.parametrize("bomb", ["{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"])
def test_a_slow_template_ends_in_words(bomb: str) -> None:
    started = time.monotonic()
    with pytest.raises(Refusal, match="too slow: more than 2 s"):
        renderer(bomb).render(talk("q", "a"))
    assert time.monotonic() - started < 10


def test_the_first_token_is_no_label_since_nothing_predicts_it() -> None:
    bare = "{%- for message in messages if message.role == 'assistant' -%}{{ message.content }}{%- endfor -%}"
    with pytest.raises(Refusal):
        renderer(bare).render(talk("q", "answer"))
    row = renderer("{%- for message in messages -%}{{ message.content }}{%- endfor -%}").render(talk("", "answer"))
    assert row.labels[0] is False and all(row.labels[1:])


@pytest.mark.parametrize("name", ["plain", "emoji_think", "regime3"])
def test_profiles_choose_their_template_and_their_texts_come_back(name: str) -> None:
    profile = profiles.load(name)
    own = templates.byte_level()
    own.chat_template = templates.THINKING
    template, note = template_for(own, profile)
    assert (template == PLAIN_CHATML) == profile.plain_template
    assert (name in note) == profile.plain_template
    for index in range(20):
        messages = profiles.with_system(talk("What is it?", "Four."), profile.system_prompt(DATE), True)
        messages = profile.transform({"messages": messages}, index)["messages"]
        row = Renderer(own, template, DATE).render(messages)
        assert labelled(row) == messages[-1]["content"] + "<|im_end|>"


def test_a_model_without_a_template_is_refused_or_gets_plain_chatml_as_asked_with_its_own_end_token() -> None:
    with pytest.raises(Refusal, match="no chat template") as caught:
        template_for(tokenizer(), None)
    assert caught.value.field == "data.chat_template"
    assert template_for(tokenizer(), None, "chatml") == (PLAIN_CHATML, "")
    piece = tokenizer("sentence_piece")
    template, _ = template_for(piece, None, "chatml")
    row = Renderer(piece, template, DATE).render(talk("hi", "the"))
    assert row.ids[-2 - row.labels[::-1].index(True) :].count(piece.eos_token_id) == 1
    assert labelled(row, "sentence_piece") == "the</s>"
    assert row.notes == ()
    endless = Renderer(piece, template.replace("eos_token", "'[END]'"), DATE).render(talk("hi", "the"))
    assert endless.notes == ("no_end_token",)
    with pytest.raises(Refusal, match="no chat template"):
        Renderer(tokenizer(), None, DATE)
    with pytest.raises(Refusal, match="could not end"):
        nothing = templates.sentence_piece()
        nothing.eos_token = None
        template_for(nothing, None, "chatml")


def test_a_prompt_is_the_beginning_of_the_training_row() -> None:
    for name, template in ALL_TEMPLATES.items():
        own = renderer(template)
        messages = talk("q1", "one", "q2", "two")
        row = own.render(messages)
        prompt = own.prompt(messages[:-1])
        assert row.ids[: len(prompt)] == prompt, name
        assert row.labels[len(prompt)] and not row.labels[len(prompt) - 1], name
    with pytest.raises(Refusal, match="ends with a turn of the user"):
        renderer(templates.CHATML).prompt(messages)


def test_thousands_of_rows_are_rendered_in_a_few_seconds() -> None:
    own = renderer(templates.CHATML)
    rows = [talk(f"question {n} " * 8, f"answer {n} " * 8) for n in range(2000)]
    started = time.process_time()
    assert all(isinstance(row, Rendered) for row in own.render_many(rows))
    assert time.process_time() - started < 5
