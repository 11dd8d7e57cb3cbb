"""Every format as its reference library reads it: JSON, CSV, Parquet, gzip, ShareGPT, Alpaca; bombs end at limits, in words."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainer.data import containers, gunzip, parquet
from trainer.data.doctor import check_data
from trainer.data.formats import Tally, read_rows, scan
from trainer.data.problems import FIXES, PROBLEM_NAMES
from trainer.worker import Worker, WorkerDied

TALK = [{"role": "user", "content": "two and two?"}, {"role": "assistant", "content": "Four."}]


def found(path: Path) -> Any:
    tally = Tally()
    for _ in read_rows(path, tally=tally):
        pass
    return tally.format


def problems(path: Path) -> list[tuple[int, str]]:
    return [(row.line, row.problem.code) for row in read_rows(path) if row.problem is not None]


SHAPES: dict[str, tuple[dict[str, Any], str]] = {
    "messages": ({"messages": TALK}, "messages"),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "two and two?"}, {"from": "gpt", "value": "Four."}]},
        "ShareGPT",
    ),
    "alpaca": ({"instruction": "two and two?", "input": "", "output": "Four."}, "Alpaca"),
    "completion": ({"prompt": "two and two?", "completion": "Four."}, "prompt and completion"),
}


def write(path: Path, rows: list[dict[str, Any]], form: str) -> Path:
    """`rows` in a container, written by the library that everybody uses for it."""
    if form == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif form == "json":
        path.write_text(json.dumps(rows, indent=1))
    elif form == "object":
        path.write_text(json.dumps({"version": "1", "tags": ["a", 1], "data": rows}))
    elif form == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        flat = [{k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()} for row in rows]
        pd.DataFrame(flat).to_csv(path, index=False, sep="\t" if form == "tsv" else ",")
    return path


NAMES = {"jsonl": "JSON Lines", "json": "JSON", "object": "JSON", "csv": "CSV", "tsv": "TSV", "parquet": "Parquet"}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", NAMES)
def test_every_shape_in_every_container_is_the_same_conversation_and_named_with_its_reason(
    tmp_path: Path, shape: str, form: str
) -> None:
    row, name = SHAPES[shape]
    suffix = "json" if form == "object" else form
    path = write(tmp_path / f"d.{suffix}", [row] * 3, form)
    assert [each.messages for each in read_rows(path)] == [TALK] * 3
    assert (found(path).container, found(path).shape) == (NAMES[form], name)
    report = check_data(path)
    assert report["valid"] and report["format"] == f"{name}, {NAMES[form]}"
    assert f": every row has {found(path).mark}. {NAMES[form]}: " in report["format_reason"]
    assert scan(path).rows == 3 and scan(path).sha256 == report["sha256"]
    assert [each.index for each in read_rows(path, start=2)] == [2]
    if form != "parquet":
        packed = tmp_path / f"d.{suffix}.gz"
        packed.write_bytes(gzip.compress(path.read_bytes()))
        assert list(read_rows(packed)) == list(read_rows(path)) and found(packed).container.endswith(", gzip")
        assert scan(packed).rows == 3


def test_lines_are_where_rows_begin(tmp_path: Path) -> None:
    bad = {"messages": TALK[:1]}
    path = tmp_path / "d.json"
    path.write_text(json.dumps([SHAPES["messages"][0], bad, SHAPES["messages"][0], bad], indent=2))
    begins = [at for at, line in enumerate(path.read_text().split("\n"), 1) if line == "  {"]
    assert [row.line for row in read_rows(path)] == begins and problems(path) == [
        (begins[1], "no_answer"),
        (begins[3], "no_answer"),
    ]
    table = tmp_path / "d.csv"
    table.write_text('prompt,completion\r\n"a\nb","c ""d"", e"\r\n\r\nq,\r\n"x","y\n\nz"\r\nlast,one\r\n', newline="")
    rows = list(read_rows(table))
    assert [row.line for row in rows] == [2, 5, 6, 9] and problems(table) == [(5, "empty_answer")]
    assert rows[0].messages == [{"role": "user", "content": "a\nb"}, {"role": "assistant", "content": 'c "d", e'}]
    columns = write(tmp_path / "d.parquet", [SHAPES["completion"][0], {"prompt": "q", "completion": ""}], "parquet")
    (row,) = [row for row in read_rows(columns) if row.problem]
    assert row.problem is not None and row.problem.message.startswith("Row 2: ") and row.line == 2


cells = st.text(st.sampled_from('ab",;\t\n\r é\u2028🛑'), min_size=1, max_size=12)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.tuples(cells, cells), min_size=1, max_size=8),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
)
def test_csv_is_what_the_csv_module_reads(tmp_path: Path, rows: list[tuple[str, str]], quoting: int) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text, quoting=quoting)  # type: ignore[arg-type]
    writer.writerow(["prompt", "completion"])
    writer.writerows(rows)
    path = tmp_path / "d.csv"
    path.write_bytes(text.getvalue().encode())
    wanted = [row for row in list(csv.reader(io.StringIO(text.getvalue(), newline="")))[1:] if row]
    seen = [[m["content"] for m in row.messages] for row in read_rows(path) if row.messages]
    assert seen == [row for row in wanted if row[1].strip()]
    assert sum(1 for _ in read_rows(path)) == len(wanted) == scan(path).rows


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3), max_leaves=8,
)  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(values, max_size=6), indent=st.sampled_from([None, 1]), ascii_only=st.booleans())
def test_a_json_list_is_cut_where_json_itself_cuts_it(
    tmp_path: Path, rows: list[Any], indent: int | None, ascii_only: bool
) -> None:
    path = tmp_path / "d.json"
    path.write_text(json.dumps([{"text": "t"}, *rows], indent=indent, ensure_ascii=ascii_only))
    with path.open("rb") as file:
        seen = [json.loads(raw) for _, raw, fault in containers.json_list.elements(file, 10**6)]
    assert seen == json.loads(path.read_text())


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 64])
def test_the_cuts_do_not_hang_on_how_the_bytes_come(tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"a": 'x"\\', "b": [1, {"c": "]}"}]}, {"d": "é\\\\"}, 12, "t\\"]
    monkeypatch.setattr(containers.json_list, "_CHUNK_BYTES", size)
    for text in (json.dumps(rows), json.dumps({"n": 1, "rows": rows}, indent=1)):
        seen = [json.loads(raw) for _, raw, _ in containers.json_list.elements(io.BytesIO(text.encode()), 1000)]
        assert seen == rows


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('[{"text": "a"}, {"text": "b"}', ["", "", "damaged"]),
        ('[{"text": "a"}, {"text": "b"', ["", "damaged"]),
        ('[{"text": "a"} {"text": "b"}]', ["", "bad_json", ""]),
        ('[{"text": "a"},]', ["", "bad_json"]),
        ('[{"text": "a"}, {"text": NaN}]', ["", "bad_json"]),
        ('[{"text": "a"}, {"text": "a", "text": "b"}]', ["", "bad_json"]),
        ('[{"text": "a"}] more', ["", "bad_json"]),
        ('{"rows": [{"text": "a"}], "more": [{"text": "b"}]}', ["", "wrong_format"]),
        ('{"version": 1}', ["wrong_format"]),
        ('[{"text": "a"}, {"prompt": "p", "completion": "c"}, {"text": "b"}]', ["", "other_shape", ""]),
    ],
)
def test_what_is_wrong_in_a_json_file_is_a_row_with_a_problem(tmp_path: Path, text: str, wanted: list[str]) -> None:
    path = tmp_path / "d.json"
    path.write_text(text)
    assert [row.problem.code if row.problem else "" for row in read_rows(path)] == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (b"prompt,completion\na,b,c\nd,e\n", [(2, "columns")]),
        (b"prompt,prompt\na,b\n", [(1, "columns")]),
        (b'prompt,completion\na,b\n"open,c\nd,e\n', [(3, "bad_csv")]),
        (b'prompt,completion\n"a"x,b\nd,e\n', [(2, "bad_csv")]),
        (b"prompt,completion\ncaf\xe9,b\nd,e\n", [(2, "not_utf8")]),
        (b"prompt,completion\na,b\x00\nd,e\n", [(2, "characters")]),
        (b"prompt,completion\n\na,b\n,\n", [(4, "empty_answer")]),
        (b"question,answer\na,b\n", [(2, "no_messages")]),
    ],
)
def test_what_is_wrong_in_a_csv_file_is_named_by_line(
    tmp_path: Path, text: bytes, wanted: list[tuple[int, str]]
) -> None:
    path = tmp_path / "d.csv"
    path.write_bytes(text)
    assert problems(path) == wanted
    assert check_data(path)["counts"] == {code: 1 for _, code in wanted}


def test_latin_1_is_shown_as_what_it_reads_as(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes('{"text": "ein café am Gleis"}\n'.encode("latin-1"))
    (row,) = read_rows(path)
    assert row.problem is not None and "as Windows or Latin-1 text it reads" in row.problem.message
    assert "café" in row.problem.message and "ein caf" in row.problem.excerpt


def test_sharegpt_and_alpaca_keep_every_turn(tmp_path: Path) -> None:
    talk = [("system", "S"), ("human", "a"), ("gpt", "b"), ("human", "c"), ("gpt", "d")]
    rows: list[dict[str, Any]] = [
        {"conversations": [{"from": who, "value": said} for who, said in talk]},
        {"system": "S", "conversations": [{"from": who, "value": said} for who, said in talk[1:]]},
    ]
    wanted = [{"system": "system", "human": "user", "gpt": "assistant"}[who] for who, _ in talk]
    for row in read_rows(write(tmp_path / "s.jsonl", rows, "jsonl")):
        assert row.messages and [m["role"] for m in row.messages] == wanted
    alpaca = {"instruction": "c", "input": "about x", "output": "d", "system": "S", "history": [["a", "b"]]}
    (row,) = read_rows(write(tmp_path / "a.jsonl", [alpaca], "jsonl"))
    assert row.messages and [m["content"] for m in row.messages] == ["S", "a", "b", "c\nabout x", "d"]
    bad = [
        {
            "conversations": [
                {"from": "human", "value": "a"},
                {"from": "observation", "value": "{}"},
                {"from": "gpt", "value": "b"},
            ]
        }
    ]
    bad.append({"conversations": [{"from": "alien", "value": "a"}]})
    assert problems(write(tmp_path / "b.jsonl", rows + bad, "jsonl")) == [(3, "not_trained"), (4, "unknown_role")]


def packed_bomb(path: Path, mib: int) -> Path:
    line = json.dumps({"text": "a " * 2000}).encode() + b"\n"
    with gzip.open(path, "wb") as file:
        for _ in range(mib * 1024 * 1024 // len(line)):
            file.write(line)
    return path


def test_a_gzip_bomb_ends_at_its_ratio_and_at_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gunzip, "RATIO_FROM_BYTES", 4 * 1024**2)
    bomb = packed_bomb(tmp_path / "bomb.jsonl.gz", 24)
    report = check_data(bomb)
    assert report["counts"] == {"too_large": 1} and "times its size" in report["problems"][0]["message"]
    assert 0 < report["usable"] < 24 * 1024**2 // 4014, "it ended before the end, and what came before is counted"
    monkeypatch.setattr(gunzip, "MAX_RATIO", 10**6)
    monkeypatch.setattr(gunzip, "MAX_UNPACKED_BYTES", 2 * 1024**2)
    assert check_data(bomb)["counts"] == {"too_large": 1}


def test_a_broken_archive_says_that_rows_are_missing(tmp_path: Path) -> None:
    lines = [json.dumps({"text": random.Random(n).randbytes(300).hex()}).encode() + b"\n" for n in range(6000)]
    whole = gzip.compress(b"".join(lines))
    path = tmp_path / "d.jsonl.gz"
    for content in (whole[: len(whole) // 2], whole[:400_000] + b"\x00\xff" * 20 + whole[400_040:], whole[:9000]):
        path.write_bytes(content)
        report = check_data(path)
        assert report["counts"].get("damaged") == 1 and not report["valid"]
        assert report["usable"] > 5, "the rows before the damage are there"
    path.write_bytes(whole + whole)  # two members one after the other are one file
    assert check_data(path)["rows"] == 12000


def test_parquet_that_declares_too_much_or_is_cut_off_ends_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "d.parquet", [{"text": "a" * 1000}] * 4000, "parquet")
    assert check_data(path)["valid"]
    content = path.read_bytes()
    (tmp_path / "cut.parquet").write_bytes(content[:-200])
    assert problems(tmp_path / "cut.parquet") == [(1, "damaged")]
    noise = bytearray(content)
    noise[10:60] = b"\xff" * 50
    (tmp_path / "noise.parquet").write_bytes(noise)
    assert problems(tmp_path / "noise.parquet")[-1][1] == "damaged"
    monkeypatch.setattr(parquet, "MAX_GROUP_BYTES", 1000)
    assert problems(path) == [(1, "too_large")]


def dictionary_bomb(path: Path, mib: int, rows: int) -> Path:
    """A small file in which every one of `rows` rows is the same text of `mib` MiB."""
    giant = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array(["x" * mib * 1024**2]))
    pq.write_table(pa.table({"text": giant}), path, store_schema=False)
    return path


def test_one_giant_text_in_thousands_of_rows_is_not_written_out_thousands_of_times(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    path = dictionary_bomb(tmp_path / "d.parquet", 9, 2000)
    codes = {row.problem.code for row, _ in zip(read_rows(path), range(200), strict=False) if row.problem}
    assert codes == {"line_too_long"}
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < 1500, "written out it is 18 GiB"


@pytest.mark.slow
def test_a_parquet_bomb_meets_the_limit_of_the_worker_and_that_is_a_sentence(tmp_path: Path) -> None:
    path = dictionary_bomb(tmp_path / "d.parquet", 64, 300_000)
    worker = Worker(memory_bytes=2 * 1024**3)
    try:
        report = worker.call("check_data", timeout_s=120, path=str(path))
        said = report["problems"][0]["message"]
    except WorkerDied as died:
        said = died.message
    finally:
        worker.close()
    assert "more memory than" in said, said


def test_parquet_is_what_pandas_reads_and_can_be_entered_anywhere(tmp_path: Path) -> None:
    frame = pd.DataFrame(
        {"prompt": [f"q{n} é" for n in range(1000)], "completion": [f"a{n}" for n in range(1000)], "id": range(1000)}
    )
    path = tmp_path / "d.parquet"
    frame.to_parquet(path, row_group_size=300)
    seen = [(row.messages[0]["content"], row.messages[1]["content"]) for row in read_rows(path) if row.messages]
    assert seen == list(pd.read_parquet(path)[["prompt", "completion"]].itertuples(index=False, name=None))
    whole = list(read_rows(path))
    for start in (0, 49, 50, 299, 300, 601, 999, 1000):
        assert [row.index for row in read_rows(path, start=start)] == list(range(start, 1000))
        assert list(read_rows(path, start=start)) == whole[start:]


@pytest.mark.parametrize(
    "make",
    [
        lambda: b'{"text": "' + b"x" * (9 * 1024**2) + b'"}\n{"text": "b"}\n',
        lambda: b'[{"text": "a"}, {"text": "' + b"x" * (9 * 1024**2) + b'"}, {"text": "b"}]',
        lambda: b'[{"text": "a"}, ' + b"[" * (9 * 1024**2) + b"]" * (9 * 1024**2) + b"]",
        lambda: b"prompt,completion\nb,c\na," + b"x" * (9 * 1024**2) + b"\n",
        lambda: b'prompt,completion\nb,c\na,"' + (b"x" * 999 + b"\n") * 9000,
    ],
)
def test_a_giant_row_is_one_problem_and_the_others_are_read(tmp_path: Path, make: Callable[[], bytes]) -> None:
    content = make()
    path = tmp_path / ("d.csv" if content.startswith(b"prompt") else "d.json")
    path.write_bytes(content)
    rows = list(read_rows(path))
    bad = [row.problem.code for row in rows if row.problem]
    assert bad[0] in ("line_too_long", "bad_csv") and any(row.problem is None for row in rows)
    assert len(rows) == scan(path).rows


def test_every_code_has_a_name_and_a_cure() -> None:
    assert set(FIXES) == set(PROBLEM_NAMES)
