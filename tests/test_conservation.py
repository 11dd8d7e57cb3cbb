"""What goes in is trained or is listed as a problem, whatever the format; the fast JSON reader is the strict one, faster."""

from __future__ import annotations

import csv
import gzip
import json
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.tiny import tiny_model_dir
from trainer.data import strict
from trainer.data.doctor import check_data
from trainer.data.formats import read_rows
from trainer.data.mapping import Mapping, suggest
from trainer.data.problems import Fault
from trainer.data.tokens import TokenCache, TokenRequest, build_cache, load_tokenizer
from trainer.refusal import Refusal

words = st.text(st.sampled_from('ab é🛑"\\,;{}[]\n\t'), max_size=10)
answers = words.map(lambda text: text or "a")
pairs = st.lists(st.tuples(words, words), min_size=1, max_size=3)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_dir(tmp_path_factory.mktemp("models") / "tiny")


@cache
def tokenizer(model: Path) -> Any:
    return load_tokenizer(model)


def rows_of(shape: str, talks: list[list[tuple[str, str]]]) -> list[dict[str, Any]]:
    """The talks written in a shape; shapes of one turn get the last pair, and the earlier ones as history or not at all."""
    rows: list[dict[str, Any]] = []
    for talk in talks:
        if shape == "messages":
            turns = [t for q, a in talk for t in ({"role": "user", "content": q}, {"role": "assistant", "content": a})]
            rows.append({"messages": turns})
        elif shape == "sharegpt":
            rows.append(
                {
                    "conversations": [
                        t for q, a in talk for t in ({"from": "human", "value": q}, {"from": "gpt", "value": a})
                    ]
                }
            )
        elif shape == "alpaca":
            history = [[q, a] for q, a in talk[:-1]]
            rows.append({"instruction": talk[-1][0], "input": "", "output": talk[-1][1], "history": history})
        else:
            rows.append({"prompt": talk[-1][0], "completion": talk[-1][1]})
    return rows


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows({k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()} for row in rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1, ensure_ascii=False))
    else:
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    talks=st.lists(pairs, min_size=1, max_size=5),
    shape=st.sampled_from(["messages", "sharegpt", "alpaca", "completion"]),
    name=st.sampled_from(["d.jsonl", "d.json", "d.csv", "d.parquet", "d.jsonl.gz"]),
)
def test_every_answer_is_trained_or_its_row_is_listed(
    model: Path, tmp_path_factory: pytest.TempPathFactory, talks: list[list[tuple[str, str]]], shape: str, name: str
) -> None:
    if shape == "alpaca" and name in ("d.csv", "d.parquet"):
        talks = [talk[-1:] for talk in talks]  # neither holds an empty list of pairs as it is
    rows = rows_of(shape, talks)
    if shape == "alpaca" and name in ("d.csv", "d.parquet"):
        rows = [{k: v for k, v in row.items() if k != "history"} for row in rows]
    folder = tmp_path_factory.mktemp("c")
    path = folder / name
    write(path, rows)
    said = [[a for _, a in talk] if shape in ("messages", "sharegpt", "alpaca") else [talk[-1][1]] for talk in talks]
    good = [answers for answers in said if all(answer.strip() for answer in answers)]
    report = check_data(path)
    assert report["rows"] == len(talks) and report["usable"] == len(good)
    assert report["usable"] + sum(report["counts"].values()) == report["rows"]
    assert sum(int(turns) * count for turns, count in report["turns"].items()) == 2 * sum(map(len, good))
    if not good:
        return
    request = TokenRequest((str(path),), str(model), None, "", "2025-11-22", 4096, "cut")
    found = TokenCache.open(build_cache(request, folder / "tokens", lambda done, total: None))
    assert found.meta["rows"] + found.meta["rows_skipped"] == len(talks)
    own = tokenizer(model)
    for row, answers in enumerate(good):
        ids, labels = found.ids(row), found.labels(row)
        trained, turn = [], []
        for number, label in zip(ids.tolist(), labels.tolist(), strict=True):
            if label:
                turn.append(number)
            elif turn:
                trained.append(turn)
                turn = []
        trained += [turn] if turn else []
        assert [own.decode(part, skip_special_tokens=True) for part in trained] == answers


# ---- the fast reader


def told(parse: Any, raw: bytes) -> Any:
    try:
        return parse(raw)
    except Fault as fault:
        return fault.code, fault.text


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4), max_leaves=12,
)  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(value=json_values, data=st.data(), ascii_only=st.booleans())
def test_what_is_read_fast_is_what_is_read_strictly(value: Any, data: st.DataObject, ascii_only: bool) -> None:
    raw = bytearray(json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass"))
    for _ in range(data.draw(st.integers(0, 2))):
        at = data.draw(st.integers(0, max(0, len(raw) - 1)))
        raw[at : at + 1] = data.draw(
            st.sampled_from([b'"', b"\\", b"{", b"}", b",", b":", b"0", b"\x00", b"\xff", b"", b"e9"])
        )
    assert repr(told(strict.parse, bytes(raw))) == repr(told(strict.parse_strictly, bytes(raw)))


@pytest.mark.parametrize(
    "raw",
    [
        b'{"a": 1, "a": 2}', b'{"a": "\\\\", "a": "\\\\"}', b'{"m": [{"b": "x", "c": {"d": 1, "d": 1}}]}', b'{"a": NaN}',
        b'{"a": 1e999}', b'{"a": ' + b"9" * 500 + b"}", b'{"a": 0.' + b"1" * 500 + b"}", b'{"\\u0061": 1, "a": 2}',
        b'{"a": "\\ud800"}'[:-1], b"[" * 70 + b"]" * 70, b'{"a":' * 70 + b"1" + b"}" * 70,
    ],
)  # fmt: skip
def test_nothing_suspicious_gets_past_the_fast_reader(raw: bytes) -> None:
    assert told(strict.parse, raw) == told(strict.parse_strictly, raw) and told(strict.parse, raw)[0] == "bad_json"


# ---- column mapping


def test_a_mapping_is_suggested_and_used_everywhere(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text("id,question,context,response\n1,what?,the box,a lever\n2,who?,,the signalman\n")
    report = check_data(path)
    assert not report["valid"] and report["counts"] == {"no_messages": 2}
    assert report["suggested"] == ["user=question", "input=context", "assistant=response"]
    assert report["columns"] == ["id", "question", "context", "response"]
    mapped = check_data(path, columns=report["suggested"])
    assert mapped["valid"] and mapped["mapping"] == report["suggested"]
    assert mapped["format_reason"].startswith("Mapped columns: user from 'question', input from 'context'")
    (first, second) = (row.messages for row in read_rows(path, columns=report["suggested"]))
    assert first and first[0]["content"] == "what?\nthe box" and second and second[0]["content"] == "who?"
    request = TokenRequest(
        (str(path),), str(model), None, "", "2025-11-22", 64, "cut", columns=tuple(report["suggested"])
    )
    plain = TokenRequest((str(path),), str(model), None, "", "2025-11-22", 64, "cut")
    assert request.key() != plain.key()
    found = TokenCache.open(build_cache(request, tmp_path / "t", lambda done, total: None))
    assert "a lever" in tokenizer(model).decode(found.ids(0)) and found.meta["columns"] == [report["suggested"]]
    for folder, is_ours in ((tmp_path / "0123456789abcdef", True), (tmp_path / "a root", False)):
        folder.mkdir()
        own = folder / "d.csv"
        own.write_bytes(path.read_bytes())
        (folder / "manifest.json").write_text(json.dumps({"file": "d.csv", "columns": report["suggested"]}))
        kept = TokenRequest((str(own),), str(model), None, "", "2025-11-22", 64, "cut")
        assert check_data(own)["valid"] is is_ours and (kept.mappings() == [report["suggested"]]) is is_ours


def test_a_row_without_a_mapped_column_is_a_problem_and_a_bad_mapping_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"q": "a", "a": "b"}\n{"q": "a"}\n{"q": 1, "a": "b"}\n{"q": "a", "a": ["b"]}\n')
    found = [row.problem.code if row.problem else "" for row in read_rows(path, columns=["user=q", "assistant=a"])]
    assert found == ["", "columns", "wrong_type", "wrong_type"]
    for wrong in (
        ["user=q"],
        ["user"],
        ["role=q"],
        ["text=a", "user=b"],
        ["user=a", "user=b", "assistant=c"],
        ["user="],
    ):
        with pytest.raises(Refusal) as refused:
            Mapping.parse(wrong)
        assert refused.value.field == "data.columns"


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        (
            {"instruction": "i", "context": "c", "response": "r", "category": "x"},
            ["user=instruction", "input=context", "assistant=response"],
        ),
        ({"Question": "q", "Answer": "a"}, ["user=Question", "assistant=Answer"]),
        ({"dialog": [{"from": "human", "value": "x"}]}, ["messages=dialog"]),
        ({"article": "long"}, ["text=article"]),
        ({"input": "i", "output": "o"}, ["user=input", "assistant=output"]),
        ({"question": 3, "answer": 4}, []),
        ({"label": "x"}, []),
    ],
)  # fmt: skip
def test_what_columns_suggest(row: dict[str, Any], wanted: list[str]) -> None:
    assert suggest([row]) == wanted


# ---- leakage and errors of samples


def test_rows_of_the_held_out_file_in_the_training_data_are_named(tmp_path: Path) -> None:
    def talk(question: str, answer: str) -> str:
        return (
            json.dumps({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})
            + "\n"
        )

    train, held_out = tmp_path / "train.jsonl", tmp_path / "held.jsonl"
    train.write_text("".join(talk(f"q{n}", f"answer {n}.") for n in range(50)))
    held_out.write_text(
        talk("new", "one") + talk("q7", "answer 7.") + talk(" Q9!", "Answer  9") + talk("q8", "another")
    )
    (warning,) = check_data(train, held_out=str(held_out))["warnings"]
    assert (warning["code"], warning["count"]) == ("leakage", 2)
    assert "2 of 4 held-out rows" in warning["message"] and "1 word for word" in warning["message"]
    assert warning["lines"] == [
        "Line 8 of the training data is line 2 of held.jsonl.",
        "Line 10 of the training data is line 3 of held.jsonl, but for case, spacing or punctuation.",
    ]
    held_out.write_text(talk("new", "one"))
    assert check_data(train, held_out=str(held_out))["warnings"] == []


def test_the_error_of_a_sample_is_stated_and_true_and_gone_once_the_tokens_are_made(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer.data import doctor

    path = tmp_path / "d.jsonl"
    talks = [[("q", "word " * (1 + n * n % 60))] for n in range(1500)]
    write(path, rows_of("messages", talks))
    options: dict[str, Any] = {"tokenizer": tokenizer(model), "model_path": str(model), "max_length": 40}
    truth = check_data(path, **options)["lengths"]
    assert truth["exact"] and truth["mean_error"] == 0 and truth["over_rows"] == [truth["over"]] * 2
    monkeypatch.setattr(doctor, "SAMPLE_ROWS", 200)
    hits = 0
    for seed in range(24):
        found = check_data(path, seed=seed, **options)["lengths"]
        assert not found["exact"] and found["sampled"] == 200 and found["rows"] == 1500
        low, high = found["over_rows"]
        assert low < high
        hits += abs(found["mean"] - truth["mean"]) <= found["mean_error"] and low <= truth["over"] <= high
    assert hits >= 20, "both intervals hold together in about nine of ten samples"
    request = TokenRequest((str(path),), str(model), None, "", "1970-01-01", 40, "cut")
    build_cache(request, tmp_path / "tokens", lambda done, total: None)
    exact = check_data(path, caches=str(tmp_path / "tokens"), **options)["lengths"]
    assert {k: v for k, v in exact.items() if k != "too_long"} == {k: v for k, v in truth.items() if k != "too_long"}
    assert exact["too_long"] == truth["too_long"][: len(exact["too_long"])]
    assert not check_data(path, caches=str(tmp_path / "tokens"), **(options | {"max_length": 41}))["lengths"]["exact"]
