"""The chat reader: what is a usable row, and which words a person gets for every other one."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.conversation import PROBLEM_NAMES
from trainer.data.formats import MAX_LINE_BYTES, Row, Scan, Tally, read_rows, scan
from trainer.refusal import Refusal

GOOD = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello 🛑️"}]}


def turn(role: str, content: object = "text") -> dict[str, object]:
    return {"role": role, "content": content}


def rows_of(path: Path, *lines: str | bytes) -> list[Row]:
    path.write_bytes(b"\n".join(line.encode() if isinstance(line, str) else line for line in lines))
    return list(read_rows(path))


def the_problem(path: Path, line: str | bytes) -> tuple[str, str]:
    (row,) = rows_of(path / "one.jsonl", line)
    assert row.messages is None and row.problem is not None
    assert row.problem.code in PROBLEM_NAMES
    assert row.problem.message.startswith("Line 1: ") and row.problem.message.endswith(".")
    return row.problem.code, row.problem.message


def chat(*turns: dict[str, object], **more: object) -> str:
    return json.dumps({"messages": list(turns), **more})


def test_a_conversation_with_system_and_several_turns_is_read_as_it_stands(tmp_path: Path) -> None:
    messages = [
        turn("system", "Be brief."),
        turn("user"),
        turn("assistant", "a"),
        turn("user"),
        turn("assistant", "b"),
    ]
    (row,) = rows_of(tmp_path / "f", chat(*messages, metadata={"id": 7}))
    assert row == Row(1, 0, messages, None)  # type: ignore[arg-type]


def test_blank_lines_count_as_lines_but_not_as_rows(tmp_path: Path) -> None:
    rows = rows_of(tmp_path / "f", json.dumps(GOOD), "", "  \t", json.dumps(GOOD) + "\r", "nonsense", json.dumps(GOOD))
    assert [(row.line, row.index, row.problem is None) for row in rows] == [
        (1, 0, True), (4, 1, True), (5, 2, False), (6, 3, True),
    ]  # fmt: skip
    assert scan(tmp_path / "f").rows == 4
    assert list(read_rows(tmp_path / "f", start=2)) == rows[2:]


def test_the_sentence_names_the_line_with_its_figure(tmp_path: Path) -> None:
    lines = [json.dumps(GOOD)] * 1872 + [chat(turn("user"), turn("assistant"), turn("user"))]
    row = rows_of(tmp_path / "f", *lines)[-1]
    assert row.problem is not None
    assert row.problem.message == "Line 1,873: the last turn is from the user; there is nothing to learn."


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        (chat(turn("user")), "no_answer", "last turn is from the user"),
        (chat(turn("system")), "no_answer", "last turn is from the system"),
        (chat(turn("user"), turn("assistant", " \n")), "empty_answer", "message 2 is an empty answer"),
        (chat(turn("user"), turn("assistant", ""), turn("user"), turn("assistant")), "empty_answer", "message 2"),
        (chat(turn("assistant"), turn("user"), turn("assistant")), "order", "first turn is from the assistant"),
        (chat(turn("system"), turn("assistant")), "order", "first turn is from the assistant"),
        (chat(turn("user"), turn("system"), turn("assistant")), "order", "system message stands after"),
        (chat(turn("system"), turn("user"), turn("user"), turn("assistant")), "order", "messages 2 and 3 are both"),
        (chat(turn("user"), turn("assistant"), turn("assistant")), "order", "messages 2 and 3 are both"),
        (chat(turn("human"), turn("assistant")), "unknown_role", "'human'; allowed: system, user, assistant"),
        (chat(turn("user"), turn("tool")), "unknown_role", "'tool'"),
        (chat(turn("user", ["part"]), turn("assistant")), "wrong_type", "message 1 is a list"),
        (chat(turn("user"), turn("assistant", None)), "wrong_type", "message 2 is missing or null"),
        (chat(turn("user", 4), turn("assistant")), "wrong_type", "a number"),
        (chat(turn("user", True), turn("assistant")), "wrong_type", "true or false"),
        ('{"messages": ["hi", "there"]}', "wrong_type", "message 1 is text"),
        ('{"messages": {"role": "user"}}', "wrong_type", "'messages' is an object"),
        ('{"messages": [{"content": "x"}]}', "wrong_type", "role of message 1 is missing"),
        ('{"messages": []}', "no_messages", "is empty"),
        ('{"prompt": "once upon a time"}', "no_messages", "no 'text' (keys found: 'prompt'"),
        ('{"text": " \\n"}', "empty_text", "the text is empty"),
        ('{"text": ["a"]}', "wrong_type", "'text' is a list"),
        ('{"text": "a\\u0000b"}', "characters", "the text contains a control character (U+0000) at character 2"),
        ("{}", "no_messages", "keys found: none"),
        ("[1, 2]", "wrong_type", "the row is a list"),
        ("3", "wrong_type", "the row is a number"),
        ('"x"', "wrong_type", "the row is text"),
        ('{"messages": [', "bad_json", "bad JSON at character"),
        (json.dumps(GOOD) + " {}", "bad_json", "extra data"),
        ('{"a": NaN}', "bad_json", "NaN is not JSON"),
        ('{"a": -Infinity}', "bad_json", "-Infinity is not JSON"),
        ('{"a": 1e999}', "bad_json", "out of range"),
        ('{"a": ' + "9" * 5000 + "}", "bad_json", "5,000 digits"),
        ('{"a": 1, "a": 2}', "bad_json", "'a' stands twice"),
        ('{"messages": [{"role": "user", "content": "a", "content": "b"}]}', "bad_json", "'content' stands twice"),
        ("[" * 100_000, "bad_json", "nested too deeply"),
        ('{"a":' * 100_000, "bad_json", "nested too deeply"),
        (chat(turn("user", "a\ud800b"), turn("assistant")), "characters", "surrogate pair (U+D800) at character 2"),
        (chat(turn("user", "a\x00"), turn("assistant")), "characters", "U+0000"),
        (chat(turn("user"), turn("assistant", "\x1b[31m")), "characters", "contains a control character (U+001B)"),
        (b'{"messages": "\x00"}', "characters", "NUL"),
        (b'{"messages": "\xff"}', "not_utf8", "byte 15 is not UTF-8"),
        (b'{"messages": "\xed\xa0\x80"}', "not_utf8", "byte 15"),
        (chat(turn("user"), {**turn("assistant"), "tool_calls": [1]}), "not_trained", "'tool_calls'"),
        (chat(turn("user"), {**turn("assistant"), "reasoning_content": "hm"}), "not_trained", "'reasoning_content'"),
        (chat(turn("user"), {**turn("assistant"), "weight": 0}), "not_trained", "weight"),
        (chat(turn("user"), turn("assistant"), tools=[{"type": "function"}]), "not_trained", "tools"),
    ],
)  # fmt: skip
def test_every_kind_of_bad_row_has_its_code_and_its_words(
    tmp_path: Path, line: str | bytes, code: str, words: str
) -> None:
    found, message = the_problem(tmp_path, line)
    assert (found, words in message) == (code, True), message


def test_what_is_harmless_stays_usable(tmp_path: Path) -> None:
    extras = [{**turn("user"), "name": "Ann", "tool_calls": None}, {**turn("assistant"), "weight": 1}]
    for number, line in enumerate([
        b"\xef\xbb\xbf" + json.dumps(GOOD).encode(),
        chat(*extras, id="x", tools=[]),
        chat(turn("user", ""), turn("assistant", "tab\tand\nlines\r\n")),
        chat(turn("user", "\u2028 \x85 \u202e <|im_end|>"), turn("assistant", "e\u0301 👩‍👩‍👧")),
        json.dumps(GOOD, ensure_ascii=False),
    ]):  # fmt: skip
        (row,) = rows_of(tmp_path / str(number), line)
        assert row.problem is None, row.problem
        assert all(set(message) == {"role", "content"} for message in row.messages or [])


@pytest.mark.parametrize(
    ("content", "words", "code"),
    [
        (json.dumps(GOOD).encode("utf-16"), "UTF-16", "wrong_format"),
        (json.dumps(GOOD).encode("utf-16-le"), "UTF-16", "wrong_format"),
        (json.dumps(GOOD).encode("utf-16-be"), "UTF-16", "wrong_format"),
        (b"\x1f\x8b\x08\x00rest\nrest", "gzip", "damaged"),
        (b"PK\x03\x04rest", "zip", "wrong_format"),
        (b"PAR1rest\n\n\nPAR1", "Parquet", "damaged"),
    ],
)
def test_a_file_of_a_foreign_format_is_named_once(tmp_path: Path, content: bytes, words: str, code: str) -> None:
    path = tmp_path / "f.jsonl"
    path.write_bytes(content)
    tally = Tally()
    (row,) = read_rows(path, tally=tally)
    assert row.problem is not None and row.problem.code == code and words in row.problem.message
    assert scan(path) == Scan(1, len(content), hashlib.sha256(content).hexdigest())
    assert (tally.bytes, tally.hexdigest()) == (len(content), scan(path).sha256)


def test_a_giant_line_is_one_problem_and_the_next_line_is_read(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    with path.open("wb") as file:
        file.write(b'{"messages": "')
        for _ in range(200):
            file.write(b"x" * 1024 * 1024)
        file.write(b'"}\n' + json.dumps(GOOD).encode())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tally = Tally()
    giant, good = read_rows(path, tally=tally)
    grown_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert giant.problem is not None and giant.problem.code == "line_too_long"
    assert (good.line, good.index, good.problem) == (2, 1, None)
    assert tally.hexdigest() == scan(path).sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert grown_mib < 64


def test_the_limit_of_a_line_is_exact(tmp_path: Path) -> None:
    def line(size: int) -> bytes:
        frame = chat(turn("user"), turn("assistant", "")).encode()
        return frame[:-4] + b"x" * (size - len(frame)) + frame[-4:]

    path = tmp_path / "f.jsonl"
    for end in (b"", b"\n"):
        for size, usable in ((MAX_LINE_BYTES, True), (MAX_LINE_BYTES + 1, False)):
            assert len(line(size)) == size
            path.write_bytes(line(size) + end)
            (row,) = read_rows(path)
            assert (row.problem is None) == usable, (size, end, row.problem)


def test_links_and_pipes_and_folders_are_refused_at_once(tmp_path: Path) -> None:
    real = tmp_path / "real.jsonl"
    real.write_text(json.dumps(GOOD))
    (tmp_path / "link.jsonl").symlink_to(real)
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "folder").mkdir()
    started = time.monotonic()
    for name, words in [
        ("link.jsonl", "is a link"),
        ("pipe.jsonl", "not a regular file"),
        ("folder", "not a regular file"),
        ("absent.jsonl", "cannot be opened"),
        ("nul\0name", "NUL"),
    ]:
        with pytest.raises(Refusal, match=words):
            list(read_rows(tmp_path / name))
    with pytest.raises(Refusal, match="not a regular file"):
        list(read_rows("/dev/zero"))
    assert time.monotonic() - started < 1


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_no_mutation_of_bytes_gets_past_the_reader_as_anything_but_clean_text(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    raw = bytearray(json.dumps(GOOD, ensure_ascii=False).encode() + b"\n" + json.dumps(GOOD).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("mutants") / "f"
    path.write_bytes(raw)
    for row in read_rows(path):
        assert (row.messages is None) != (row.problem is None)
        for message in row.messages or []:
            message["content"].encode("utf-8")
            assert set(message) == {"role", "content"} and "\x00" not in message["content"]
        if row.problem:
            assert row.problem.message.isprintable()


def test_reading_needs_the_standard_library_only() -> None:
    code = "import sys, trainer.data.formats; print({'torch', 'numpy', 'transformers', 'jinja2'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"
