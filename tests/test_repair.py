"""The repaired copy: every row is in it or among the rejects, rows are shortened at whole turns and never get a word more."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.doctor import check_data
from trainer.data.formats import read_rows
from trainer.data.repair import repair
from trainer.refusal import Refusal

U, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
GOOD = {"messages": [U, A]}


def repaired(path: Path, **more: Any) -> tuple[dict[str, Any], list[Any], list[Any]]:
    out, rejects = path.with_name("fixed.jsonl"), path.with_name("rejects.jsonl")
    result = repair(path, out, rejects, **more)
    kept, left = ([json.loads(line) for line in file.read_text().splitlines()] for file in (out, rejects))
    return result, kept, left


def test_a_trailing_question_goes_and_what_cannot_be_saved_is_kept_with_its_reason(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    lines = [
        json.dumps(GOOD),
        json.dumps({"messages": [U, A, {"role": "user", "content": "and?"}]}),
        json.dumps({"messages": [{"role": "system", "content": "S"}, A, {"role": "user", "content": "r"}, A]}),
        json.dumps({"messages": [U]}),
        "nonsense",
        json.dumps(GOOD),
        json.dumps({"messages": [U, {"role": "assistant", "content": ""}]}),
    ]
    path.write_text("\n".join(lines))
    before = path.read_bytes()
    result, kept, left = repaired(path)
    assert path.read_bytes() == before
    # the second row, trimmed, says what the first says: it is left out as said twice
    assert [row["messages"] for row in kept] == [
        [U, A],
        [{"role": "system", "content": "S"}, {"role": "user", "content": "r"}, A],
    ]
    assert [(row["line"], row["code"]) for row in left] == [
        (2, "duplicate"), (4, "no_answer"), (5, "bad_json"), (6, "duplicate"), (7, "empty_answer"),
    ]  # fmt: skip
    assert left[2]["row"] == "nonsense" and left[2]["reason"].startswith("Line 5: ")
    assert (result["rows"], result["kept"], result["left_out"]) == (7, 2, 5)
    assert result["examples"] == ["Line 3: first turns without a question were taken off."]
    assert result["summary"].startswith("Kept 2 of 7 rows.") and "2 said twice" in result["summary"]
    assert check_data(tmp_path / "fixed.jsonl")["valid"]


def test_utf_16_becomes_utf_8_and_csv_becomes_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_bytes("question,answer\nwo?,im Café\n".encode("utf-16"))
    result, kept, _ = repaired(path, columns=["user=question", "assistant=answer"])
    assert kept[0]["messages"][1]["content"] == "im Café" and "UTF-16 became UTF-8" in result["summary"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["d.csv", "fixed.jsonl", "rejects.jsonl"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf_16_with_and_without_its_mark_is_repaired(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes((json.dumps(GOOD) + "\n").encode(encoding))
    assert check_data(path)["counts"] == {"wrong_format": 1}
    _, kept, left = repaired(path)
    assert kept == [GOOD] and left == []


def test_nothing_to_keep_and_nothing_to_do_are_said_and_nothing_is_written_or_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    for content, words in ((json.dumps(GOOD), "nothing to repair"), ("nonsense", "No row of this file")):
        path.write_text(content)
        with pytest.raises(Refusal, match=words):
            repaired(path)
        assert [file.name for file in tmp_path.iterdir()] == ["d.jsonl"]
    mine = tmp_path / "fixed.jsonl"
    mine.write_text("precious")
    with pytest.raises(Refusal, match="is there already"):
        repaired(path)
    assert mine.read_text() == "precious" and not (tmp_path / "rejects.jsonl").exists()


roles = st.sampled_from(["system", "user", "assistant", "alien"])
turns = st.lists(
    st.builds(lambda role, n: {"role": role, "content": f"w{n}" if n else ""}, roles, st.integers(0, 9)), max_size=6
)


@settings(max_examples=150, deadline=None)
@given(rows=st.lists(turns, min_size=1, max_size=8), sharegpt=st.booleans())
def test_every_row_is_kept_or_rejected_and_no_word_is_new(
    tmp_path_factory: pytest.TempPathFactory, rows: list[list[dict[str, str]]], sharegpt: bool
) -> None:
    path = tmp_path_factory.mktemp("r") / "d.jsonl"
    names = {"user": "human", "assistant": "gpt"}
    with path.open("w") as file:
        for row in rows:
            own = [{"from": names.get(t["role"], t["role"]), "value": t["content"]} for t in row]
            file.write(json.dumps({"conversations": own} if sharegpt else {"messages": row}) + "\n")
    try:
        result, kept, left = repaired(path)
    except Refusal:
        return
    assert len(kept) + len(left) == len(rows) == result["rows"]
    places = {row["line"] for row in left}
    sources = [row for line, row in enumerate(rows, 1) if line not in places]
    for row, source in zip(kept, sources, strict=True):
        own = [(turn["role"], turn["content"]) for turn in row["messages"]]
        was = [(turn["role"], turn["content"]) for turn in source]
        text = " ".join(f"{role}:{said}" for role, said in was)
        assert all(turn in was for turn in own) and re.search(re.escape(f"{own[-1][0]}:{own[-1][1]}"), text)
    again = list(read_rows(path.with_name("fixed.jsonl")))
    assert all(row.problem is None for row in again)


def test_the_command_line_maps_columns_and_writes_the_repaired_copy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from trainer.cli import main

    path, out = tmp_path / "d.csv", tmp_path / "out.jsonl"
    path.write_text("question,answer\nq,a\nr,\n")
    assert main(["check-data", str(path)]) == 1
    assert "--column user=question --column assistant=answer" in capsys.readouterr().out
    mapped = ["--column", "user=question", "--column", "assistant=answer"]
    assert main(["check-data", str(path), *mapped, "--repair", str(out), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["problems"] == [
        {
            "line": 3,
            "code": "empty_answer",
            "message": report["problems"][0]["message"],
            "excerpt": "question: r, answer: ",
        }
    ]
    assert report["repair"]["kept"] == 1 and json.loads(out.read_text())["messages"] == [U, A]
    assert (tmp_path / "out-rejects.jsonl").exists()
    assert main(["check-data", str(path), "--column", "user=question"]) == 2
