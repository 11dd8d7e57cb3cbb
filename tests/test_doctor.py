"""The doctor: it counts every row and every turn, names what is wrong, and measures a fair sample."""

from __future__ import annotations

import hashlib
import json
import resource
import time
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import chat_templates as templates
from trainer.data import doctor
from trainer.data.doctor import check_data
from trainer.data.render import Renderer
from trainer.refusal import Refusal


@cache
def tokenizer(template: str = templates.CHATML) -> Any:
    made = templates.byte_level()
    made.chat_template = template
    return made


def chat(*contents: str, system: bool = False) -> str:
    turns = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents)]
    return json.dumps({"messages": ([{"role": "system", "content": "S"}] if system else []) + turns})


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines))
    return path


def test_the_summary_says_it_as_a_person_would(tmp_path: Path) -> None:
    good = [chat(f"q{n}", "a") for n in range(1231)]
    bad = [chat("q")] * 3 + ["nonsense"] * 2 + ['{"messages": [{"role": "bot", "content": "x"}]}']
    report = check_data(write(tmp_path / "d.jsonl", *good, *bad))
    assert report["summary"] == (
        "1,231 of 1,237 rows are usable. 6 have problems: 3 no answer · 2 bad JSON · 1 unknown role."
    )
    assert (report["valid"], report["rows"], report["usable"]) == (False, 1237, 1231)
    assert report["counts"] == {"no_answer": 3, "bad_json": 2, "unknown_role": 1}
    assert report["problems"][0] == {
        "line": 1232,
        "code": "no_answer",
        "message": "Line 1,232: the last turn is from the user; there is nothing to learn.",
        "excerpt": '{"messages": [{"role": "user", "content": "q"}]}',
    }


def test_a_clean_file_is_valid_and_carries_its_hash(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", chat("q", "a"), chat("r", "b", system=True))
    report = check_data(path)
    assert report["valid"] is True and report["summary"] == "2 of 2 rows are usable."
    assert report["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert report["bytes"] == path.stat().st_size
    assert (report["format"], report["with_system"], report["warnings"]) == ("messages, JSON Lines", 1, [])
    assert json.loads(json.dumps(report)) == report


def test_an_empty_or_foreign_file_is_not_valid(tmp_path: Path) -> None:
    assert check_data(write(tmp_path / "e", "", " "))["valid"] is False
    foreign = check_data(write(tmp_path / "f", "PK\x03\x04", chat("q", "a")))
    assert (foreign["valid"], foreign["format"], foreign["counts"]) == (False, "unknown", {"wrong_format": 1})
    with pytest.raises(Refusal, match="cannot be opened"):
        check_data(tmp_path / "absent")


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.tuples(st.integers(1, 5), st.booleans(), st.booleans()), max_size=40))
def test_no_turn_is_lost_or_made_up(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[int, bool, bool]]
) -> None:
    lines, usable, bad = [], Counter[str](), 0
    for pairs, system, broken in rows:
        texts = [str(n) for n in range(2 * pairs)]
        lines.append(chat(*(texts[:-1] if broken else texts), system=system))
        bad += broken
        if not broken:
            usable[str(2 * pairs)] += 1
    report = check_data(write(tmp_path_factory.mktemp("t") / "d", *lines))
    assert report["turns"] == dict(usable)
    assert report["usable"] + sum(report["counts"].values()) == report["rows"] == len(rows)
    assert report["counts"].get("no_answer", 0) == bad
    assert sum(int(turns) * count for turns, count in report["turns"].items()) == sum(
        2 * pairs for pairs, _, broken in rows if not broken
    )


def test_only_the_first_problems_are_listed_and_all_are_counted(tmp_path: Path) -> None:
    report = check_data(write(tmp_path / "d", *["x"] * 500))
    assert [problem["line"] for problem in report["problems"]] == list(range(1, 201))
    assert report["counts"] == {"bad_json": 500}


def test_rows_that_say_the_same_are_a_warning_and_no_problem(tmp_path: Path) -> None:
    same = chat("q", "a")
    other_keys = json.dumps({"id": 1, **json.loads(same)})
    moved = chat("qa", "a"), chat("q", "aa")
    report = check_data(write(tmp_path / "d", same, other_keys, *moved, same))
    assert report["valid"] is True
    assert report["warnings"] == [
        {
            "code": "duplicates",
            "count": 2,
            "message": "2 of 5 rows say the same as an earlier one.",
            "lines": ["Line 2 says the same as line 1.", "Line 5 says the same as line 1."],
        }
    ]


def test_lengths_and_labels_are_those_of_the_renderer(tmp_path: Path) -> None:
    texts = [("q " * n, "a " * (2 * n)) for n in range(1, 40)]
    path = write(tmp_path / "d", *[chat(*pair) for pair in texts])
    report = check_data(path, tokenizer=tokenizer(), max_length=100)
    renderer = Renderer(tokenizer(), None, "1970-01-01")
    rows = [renderer.render(json.loads(chat(*pair))["messages"]) for pair in texts]
    lengths = sorted(len(row.ids) for row in rows)
    found = report["lengths"]
    assert (found["sampled"], found["longest"], found["median"]) == (39, lengths[-1], lengths[19])
    assert found["over"] == sum(length > 100 for length in lengths) > 0
    assert report["label_share"] == sum(sum(row.labels) for row in rows) / sum(lengths)
    edges, counts = found["histogram"]["edges"], found["histogram"]["counts"]
    assert sum(counts) == 39 and edges[0] == 0 and edges[-1] > lengths[-1]
    for start, stop, count in zip(edges, edges[1:], counts, strict=False):
        assert count == sum(start <= length < stop for length in lengths)


def test_profile_and_system_prompt_count_in_the_lengths(tmp_path: Path) -> None:
    path = write(tmp_path / "d", *[chat("q", "a")] * 3)
    bare = check_data(path, tokenizer=tokenizer())["lengths"]["longest"]
    prompted = check_data(path, tokenizer=tokenizer(), system_prompt="Be brief.")["lengths"]["longest"]
    emoji = check_data(path, tokenizer=tokenizer(), profile="emoji_think")["lengths"]["longest"]
    assert bare < prompted < emoji


def test_what_the_template_does_to_rows_is_a_warning(tmp_path: Path) -> None:
    path = write(tmp_path / "d", chat("q", "a", system=True), chat("q", "b"))
    for template, code, words in [
        (templates.NO_SYSTEM, "system_dropped", "drops the system message (1 of 2 sampled rows)."),
        (templates.MODEL_ROLE, "template", "1 of 2 sampled rows cannot be rendered. The first: The chat template"),
    ]:
        report = check_data(path, tokenizer=tokenizer(template))
        assert [warning["code"] for warning in report["warnings"]] == [code]
        assert words in report["warnings"][0]["message"] and report["warnings"][0]["count"] == 1
    refusing = tokenizer("{{- raise_exception('never') -}}")
    assert check_data(path, tokenizer=refusing)["lengths"] is None


def test_the_sample_is_fair_seeded_and_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "SAMPLE_ROWS", 100)
    path = write(tmp_path / "d", *[chat("q", "a " * (1 + n // 100)) for n in range(1000)])
    first, again = (check_data(path, tokenizer=tokenizer(), seed=3) for _ in range(2))
    assert first == again and first["lengths"]["sampled"] == 100
    assert check_data(path, tokenizer=tokenizer(), seed=4)["lengths"]["mean"] != first["lengths"]["mean"]
    means = [check_data(path, tokenizer=tokenizer(), seed=seed)["lengths"]["mean"] for seed in range(8)]
    monkeypatch.setattr(doctor, "SAMPLE_ROWS", 1000)
    truth = check_data(path, tokenizer=tokenizer())["lengths"]["mean"]
    assert abs(sum(means) / 8 - truth) / truth < 0.08
    monkeypatch.setattr(doctor, "SAMPLE_CHARACTERS", 200)
    few = check_data(path, tokenizer=tokenizer())["lengths"]["sampled"]
    assert 5 <= few <= 66


def test_a_hundred_thousand_rows_take_seconds_and_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    with path.open("w") as file:
        for number in range(100_000):
            file.write(chat(f"question {number} " * 5, "an answer of some words " * 10) + "\n")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    report = check_data(path)
    assert report["usable"] == 100_000
    assert time.process_time() - started < 10
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < 64
