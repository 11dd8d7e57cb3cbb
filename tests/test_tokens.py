"""The token cache: what is in the arrays is what the renderer made, and every row is kept or counted."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import profiles
from tests.tiny import tiny_tokenizer
from trainer.data.arrays import GrowingArray
from trainer.data.formats import scan
from trainer.data.render import Renderer
from trainer.data.tokens import TokenCache, TokenRequest, build_cache, load_tokenizer
from trainer.refusal import Refusal

DATE = "2025-11-22"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokenizer(tmp_path_factory.mktemp("model") / "tiny")


def chat(question: str, answer: str, system: str | None = None) -> str:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": ([{"role": "system", "content": system}] if system else []) + turns})


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines))
    return path


def request(model: Path, *files: Path, **changes: Any) -> TokenRequest:
    settings: dict[str, Any] = {
        "profile": None, "system_prompt": "", "date": DATE, "max_length": 128, "too_long": "cut",
    }  # fmt: skip
    return TokenRequest(files=tuple(map(str, files)), model_path=str(model), **(settings | changes))


def left(root: Path) -> list[str]:
    """What stands in the folder of caches, locks aside."""
    return [path.name for path in root.iterdir() if not path.name.endswith(".lock")]


def build(asked: TokenRequest, root: Path) -> TokenCache:
    return TokenCache.open(build_cache(asked, root, lambda done, total: None))


def test_the_arrays_hold_what_the_renderer_made_row_by_row(model: Path, tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", chat("q", "one"), "", "nonsense", chat("r", "two 🛑️", "Be brief."))
    second = write(tmp_path / "b.jsonl", chat("s", "three"))
    cache = build(request(model, first, second), tmp_path / "tokens")
    renderer = Renderer(load_tokenizer(model), None, DATE)
    assert cache.source.tolist() == [[0, 1, 0], [0, 4, 2], [1, 1, 0]]
    lines = [first.read_text().split("\n")[0], first.read_text().split("\n")[3], second.read_text()]
    for row, line in enumerate(lines):
        expected = renderer.render(json.loads(line)["messages"])
        assert cache.ids(row).tolist() == expected.ids
        assert cache.labels(row).tolist() == [int(label) for label in expected.labels]
    assert cache.lengths.tolist() == [len(cache.ids(row)) for row in range(3)]
    assert cache.label_counts.tolist() == [int(cache.labels(row).sum()) for row in range(3)]
    meta = cache.meta
    assert (meta["rows"], meta["rows_skipped"], meta["tokens"]) == (3, 1, int(cache.lengths.sum()))
    assert meta["labels"] == int(cache.label_counts.sum()) and meta["longest"] == int(cache.lengths.max())
    assert meta["problem_counts"] == {"bad_json": 1}
    assert [problem["line"] for problem in meta["problems"]] == [3]
    assert meta["files"][1] == {"path": str(second), "sha256": scan(second).sha256, "rows": 1, "unit": "line"}
    kinds = {name: np.load(cache.path / f"{name}.npy").dtype for name in ("ids", "labels", "offsets", "source")}
    assert kinds == {"ids": np.int32, "labels": np.uint8, "offsets": np.int64, "source": np.int64}


lines = st.lists(
    st.sampled_from([
        chat("q", "a"), chat("long " * 40, "a"), chat("q", "long " * 40), "nonsense", "", "[]",
        chat("q", ""), chat("q " * 300, "answer after the limit"),
    ]), min_size=1, max_size=30,
)  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(lines=lines, too_long=st.sampled_from(["cut", "drop"]), limit=st.sampled_from([16, 40, 512]))
def test_every_row_is_kept_or_counted(
    model: Path, tmp_path_factory: pytest.TempPathFactory, lines: list[str], too_long: str, limit: int
) -> None:
    folder = tmp_path_factory.mktemp("c")
    path = write(folder / "d.jsonl", *lines)
    try:
        cache = build(request(model, path, too_long=too_long, max_length=limit), folder / "tokens")
    except Refusal as refusal:
        assert "No row of" in refusal.message
        assert left(folder / "tokens") == [], "a refused cache leaves nothing that looks like one"
        return
    meta = cache.meta
    seen = meta["rows"] + meta["rows_skipped"] + meta["rows_dropped"] + meta["rows_without_labels"]
    assert seen == scan(path).rows == sum(1 for line in lines if line)
    assert cache.lengths.max() <= limit and cache.label_counts.min() >= 1
    assert (too_long == "cut") or meta["rows_cut"] == 0


def test_a_cut_row_learns_no_end_it_does_not_have(model: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", chat("q", "word " * 60), chat("q", "short"))
    cache = build(request(model, path, max_length=32), tmp_path / "tokens")
    end = load_tokenizer(model).convert_tokens_to_ids("<|im_end|>")
    trained = [cache.ids(row)[cache.labels(row) == 1].tolist() for row in (0, 1)]
    assert len(cache.ids(0)) == 32 and end not in trained[0]
    assert trained[1][-1] == end
    whole = len(
        Renderer(load_tokenizer(model), None, DATE).render(json.loads(path.read_text().split("\n")[0])["messages"]).ids
    )
    assert (cache.meta["rows_cut"], cache.meta["tokens_cut"]) == (1, whole - 32)
    assert cache.meta["longest_uncut"] == whole


def test_rows_too_long_are_dropped_or_refused_by_line_as_asked(model: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", chat("q", "ok"), *[chat("q", "word " * 60)] * 7)
    cache = build(request(model, path, max_length=64, too_long="drop"), tmp_path / "tokens")
    assert (cache.meta["rows"], cache.meta["rows_dropped"], cache.meta["rows_cut"]) == (1, 7, 0)
    with pytest.raises(Refusal, match=r"longer than 64 tokens: 7 \(longest [0-9]+; lines 2, 3, 4, 5, 6, …\)") as caught:
        build(request(model, path, max_length=64, too_long="refuse"), tmp_path / "tokens")
    assert caught.value.field == "data.too_long"
    build(request(model, write(path, chat("q", "ok")), max_length=64, too_long="refuse"), tmp_path / "tokens")


def test_files_without_a_usable_row_are_refused_with_the_first_reason(model: Path, tmp_path: Path) -> None:
    for name, content, words in [
        ("empty", "", "No row of 0 can be trained: there is none."),
        ("bad", "x\ny", "No row of 2 can be trained: 2 with problems. Line 1: bad JSON"),
        ("late", chat("q " * 300, "a"), "1 with no answer in the first 128 tokens"),
    ]:
        with pytest.raises(Refusal) as caught:
            build(request(model, write(tmp_path / name, content)), tmp_path / "tokens")
        assert words in caught.value.message
    assert left(tmp_path / "tokens") == []


def test_the_key_moves_with_everything_that_can_move_a_token_and_with_nothing_else(model: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", chat("q", "a"))
    own = tmp_path / "profiles"
    own.mkdir()
    base = request(model, path)
    keys = {base.key()}
    changes: list[dict[str, Any]] = [
        {"profile": "plain"}, {"profile": "regime3"}, {"system_prompt": "x"}, {"date": "2025-11-23"},
        {"max_length": 127}, {"too_long": "drop"},
    ]  # fmt: skip
    keys |= {request(model, path, **change).key() for change in changes}
    keys.add(request(model, path, path).key())
    keys.add(request(model, write(tmp_path / "e.jsonl", chat("q", "b"))).key())
    for name, content in [("tokenizer.json", " "), ("chat_template.jinja", "{# #}")]:
        other = shutil.copytree(model, tmp_path / f"with {name}")
        (other / name).write_text((other / name).read_text() + content)
        keys.add(request(other, path).key())
    assert len(keys) == 1 + len(changes) + 4
    same = shutil.copytree(model, tmp_path / "elsewhere")
    (same / "model.safetensors").write_bytes(b"weights")
    moved = shutil.copy(path, tmp_path / "moved.jsonl")
    assert request(same, Path(moved), profiles_root=str(own)).key() == base.key()


def test_a_users_profile_is_part_of_the_key_by_its_text(model: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", chat("q", "a"))
    file = write(tmp_path / "mine.json", json.dumps({"a": 1}))
    asked = request(model, path, profile="mine", profiles_root=str(tmp_path))
    before = asked.key()
    file.write_text(json.dumps({"a": 2}))
    assert asked.key() != before


def test_a_finished_cache_is_used_again_and_a_damaged_one_is_made_again(model: Path, tmp_path: Path) -> None:
    asked = request(model, write(tmp_path / "d.jsonl", chat("q", "a")))
    cache = build(asked, tmp_path / "tokens")
    ids = cache.ids(0).tolist()
    stamp = (cache.path / "ids.npy").stat().st_mtime_ns
    assert (build(asked, tmp_path / "tokens").path / "ids.npy").stat().st_mtime_ns == stamp
    (cache.path / "ids.npy").write_bytes((cache.path / "ids.npy").read_bytes()[:-4])
    with pytest.raises(Refusal, match="Tokenise again"):
        TokenCache.open(cache.path)
    stale = tmp_path / "tokens" / f".{asked.key()}.dead.tmp"
    stale.mkdir()
    assert build(asked, tmp_path / "tokens").ids(0).tolist() == ids
    assert not stale.exists()


def test_two_builders_of_one_cache_end_with_one_whole_cache(model: Path, tmp_path: Path) -> None:
    asked = request(model, write(tmp_path / "d.jsonl", *[chat("q", "a " * n) for n in range(1, 60)]))
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(build_cache(asked, tmp_path / "tokens", lambda a, b: None)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 3 and len(set(found)) == 1
    assert TokenCache.open(found[0]).meta["rows"] == 59
    assert left(tmp_path / "tokens") == [asked.key()]


def test_a_file_that_changes_while_it_is_read_is_refused(model: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", *[chat("q", "a")] * 600)

    def swap(done: int, total: int) -> None:
        if done == 256:
            with path.open("a") as file:
                file.write("\n" + chat("q", "injected"))

    with pytest.raises(Refusal, match="was changed while it was read"):
        build_cache(request(model, path), tmp_path / "tokens", swap)


def test_progress_counts_up_to_all_rows(model: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", *[chat("q", "a"), "bad"] * 400)
    seen: list[tuple[int, int]] = []
    build_cache(request(model, path), tmp_path / "tokens", lambda done, total: seen.append((done, total)))
    assert seen == [(256, 800), (512, 800), (768, 800), (800, 800)]


def test_system_messages_follow_the_profile_or_the_setting(model: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", chat("q", "a"), chat("q", "a", "Own."))
    tokenizer = load_tokenizer(model)

    def texts(**changes: Any) -> list[str]:
        cache = build(request(model, path, max_length=512, **changes), tmp_path / "tokens")
        return [tokenizer.decode(cache.ids(row)).split("<|im_end|>")[0] for row in (0, 1)]

    start = "<|im_start|>system\n"
    assert texts() == ["<|im_start|>user\nq", f"{start}Own."]
    assert texts(system_prompt="Day {date}.") == [f"{start}Day {DATE}.", f"{start}Own."]
    plain = profiles.load("plain").system_prompt(DATE)
    assert texts(profile="plain", system_prompt="not used") == [f"{start}{plain}", f"{start}Own."]
    emoji = profiles.load("emoji_think").system_prompt(DATE)
    assert DATE in emoji and texts(profile="emoji_think") == [f"{start}{emoji}"] * 2
    with pytest.raises(Refusal, match="placeholder") as caught:
        texts(system_prompt="Hello {name}")
    assert caught.value.field == "profile.system_prompt"
    with pytest.raises(Refusal, match="no profile 'nobody'") as caught:
        texts(profile="nobody")
    assert caught.value.field == "profile.name"


def test_a_profile_draws_by_the_rows_place_in_its_file_skipped_rows_included(model: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", "bad", chat("q", "four"), "", chat("q", "four"))
    cache = build(request(model, path, profile="emoji_think", max_length=512), tmp_path / "tokens")
    tokenizer, profile = load_tokenizer(model), profiles.load("emoji_think")
    for row, index in enumerate((1, 2)):
        ids = cache.ids(row)[cache.labels(row) == 1]
        messages = json.loads(chat("q", "four"))["messages"]
        expected = profile.transform({"messages": messages}, index)["messages"][-1]["content"]
        assert tokenizer.decode(ids) == expected + "<|im_end|>"


def test_rows_the_template_refuses_are_counted_by_line(model: Path, tmp_path: Path) -> None:
    other = shutil.copytree(model, tmp_path / "picky")
    template = "{%- if messages[0].role == 'system' -%}{{- raise_exception('No system') -}}{%- endif -%}"
    (other / "chat_template.jinja").write_text(template + (model / "chat_template.jinja").read_text())
    path = write(tmp_path / "d.jsonl", chat("q", "a", "S"), chat("q", "a"))
    meta = build(request(other, path), tmp_path / "tokens").meta
    assert meta["problem_counts"] == {"template": 1}
    assert meta["problems"][0]["message"] == "Line 1: the chat template refuses this row: No system."


def test_a_broken_or_missing_tokenizer_is_refused_in_words(model: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", chat("q", "a"))
    broken = shutil.copytree(model, tmp_path / "broken")
    (broken / "tokenizer.json").write_text('{"model": 3}')
    strict = shutil.copytree(model, tmp_path / "strict")
    (strict / "config.json").write_text(json.dumps({"model_type": "qwen3", "hidden_size": "many"}))
    empty = tmp_path / "empty"
    empty.mkdir()
    coded = shutil.copytree(model, tmp_path / "coded")
    settings_of = json.loads((coded / "tokenizer_config.json").read_text())
    settings_of |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (coded / "tokenizer_config.json").write_text(json.dumps(settings_of))
    (coded / "own.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')")
    for folder, words in [
        (broken, "cannot be loaded"),
        (strict, "cannot be loaded: .*hidden_size"),
        (empty, "no tokenizer files"),
        (tmp_path / "none", "no tokenizer"),
    ]:
        with pytest.raises(Refusal, match=words) as caught:
            build(request(folder, path), tmp_path / "tokens")
        assert caught.value.field == "model_path"
    try:
        load_tokenizer(coded)
    except Refusal:
        pass
    assert not (tmp_path / "canary").exists()


def test_a_full_disk_leaves_nothing_behind(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: GrowingArray) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(GrowingArray, "finish", full)
    with pytest.raises(Refusal, match="could not be written: No space left on device. Nothing was changed."):
        build(request(model, write(tmp_path / "d.jsonl", chat("q", "a"))), tmp_path / "tokens")
    assert left(tmp_path / "tokens") == []


def test_growing_arrays_are_what_numpy_reads(tmp_path: Path) -> None:
    for width, rows in ((None, 0), (None, 5), (3, 4)):
        array = GrowingArray(tmp_path / "a.npy", np.int64, width)
        expected = np.arange(rows * (width or 1)).reshape((rows, width) if width else (rows,))
        for row in expected:
            array.append(np.atleast_1d(row))
        array.finish()
        assert np.array_equal(np.load(tmp_path / "a.npy", allow_pickle=False), expected)
        assert np.load(tmp_path / "a.npy").shape == expected.shape
