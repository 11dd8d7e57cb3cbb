"""Continued pretraining: texts become consecutive pieces, nothing lost, and train what plain transformers trains."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from tests import chat_templates as templates
from tests import runs
from tests.real_templates import SPECIAL
from tests.tiny import tiny_model_dir
from trainer.cli import main
from trainer.data import plain_text
from trainer.data.doctor import check_data
from trainer.data.formats import Row, read_rows, scan
from trainer.data.loader import assemble
from trainer.data.plain_text import TextEncoder, labels_of, pieces_of
from trainer.data.tokens import TokenCache, TokenRequest, build_cache, load_tokenizer
from trainer.events import all_events
from trainer.metrics import read_metrics
from trainer.metrics import read_rows as trained_rows
from trainer.models.starter import build_tokenizer
from trainer.refusal import Refusal
from trainer.schema import WeightedFile
from trainer.worker import Worker
from trainer.workspace import Workspace

DATE = "2025-11-22"
PROSE = "A signal box stands by the line.\n\nIts levers move the points; its bells speak to the next box. 🛑️\n" * 6
CHAT = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_dir(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "ws").create()


@pytest.fixture(scope="module")
def worker() -> Any:
    made = Worker()
    yield made
    made.close()


def texts_file(path: Path, *texts: str) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def tokens_of(model: Path, root: Path, *files: Path, limit: int = 48, **changes: Any) -> TokenCache:
    request = TokenRequest(tuple(map(str, files)), str(model), changes.pop("profile", None), "", DATE, limit, "cut")
    return TokenCache.open(build_cache(request, root, lambda done, total: None))


# ---- reading


def test_a_text_row_is_a_document_and_a_txt_file_is_one_as_it_stands(tmp_path: Path) -> None:
    rows = list(read_rows(texts_file(tmp_path / "d.jsonl", "one", "two\n\nthree")))
    assert rows == [Row(1, 0, None, None, "one"), Row(2, 1, None, None, "two\n\nthree")]
    prose = tmp_path / "book.TXT"
    prose.write_bytes(b"\xef\xbb\xbf[1] A line.\r\n\r\n{ not json\n\x0cNext page.\n")
    assert list(read_rows(prose)) == [Row(1, 0, None, None, "[1] A line.\r\n\r\n{ not json\n\x0cNext page.\n")]
    assert scan(prose).rows == 1 and list(read_rows(prose, start=1)) == []
    (tmp_path / "empty.txt").write_text(" \n")
    assert list(read_rows(tmp_path / "empty.txt")) == [] and scan(tmp_path / "empty.txt").rows == 0


def test_json_lines_that_are_called_txt_stay_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "chats.txt"
    path.write_text("\n" + json.dumps(CHAT) + "\n" + json.dumps(CHAT))
    assert [row.messages for row in read_rows(path)] == [CHAT["messages"]] * 2 and scan(path).rows == 2
    path.write_text('{"name": "a JSON object that is no row"}\n')
    assert next(read_rows(path)).text == '{"name": "a JSON object that is no row"}\n'


@pytest.mark.parametrize(
    ("content", "code"),
    [(b"a\xff", "not_utf8"), (b"a\x00b", "characters"), (b"\x1f\x8brest", "damaged"), (b"\xff\xfea\x00", "wrong_format")],
)  # fmt: skip
def test_a_text_file_that_is_no_text_is_named(tmp_path: Path, content: bytes, code: str) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes(content)
    (row,) = read_rows(path)
    assert row.problem is not None and row.problem.code == code


def test_a_row_with_messages_and_text_is_a_conversation(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps(CHAT | {"text": "rendered once"}))
    assert next(read_rows(path)).messages == CHAT["messages"]


# ---- ids and labels


@cache
def tokenizer(kind: str) -> Any:
    if kind == "line ends":  # has tokens of several line ends, which a border must not part
        return build_tokenizer(["the fox\n\nthe\n\n\nfox \n"] * 9)
    return getattr(templates, kind)()


texts = st.lists(
    st.one_of(
        st.sampled_from([*SPECIAL, "<think>", "🛑️", "👩‍👩‍👧", "e\u0301", " ", "\n", "\n\n", "the fox "]),
        st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=5),
    ),
    min_size=1, max_size=12,
).map("".join).filter(lambda text: text.strip())  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(text=texts, kind=st.sampled_from(["byte_level", "sentence_piece"]))
def test_a_document_is_what_the_tokenizer_makes_of_it_and_its_end(text: str, kind: str) -> None:
    own = tokenizer(kind)
    found = TextEncoder(own).document(text)
    assert found == own(text, split_special_tokens=True)["input_ids"] + [own.eos_token_id]
    assert not set(own.all_special_ids) & set(found[:-1]), "typed control tokens stay text"


def test_the_start_token_of_a_tokenizer_that_puts_one_is_there_once() -> None:
    from tokenizers import processors

    own = templates.byte_level()
    start, end = own.bos_token_id, own.eos_token_id
    for single, expected in [("<s> $A", [start, "text", end]), ("<s> $A <|im_end|>", [start, "text", end])]:
        own.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[("<s>", start), ("<|im_end|>", end)]
        )
        body = own("the fox", add_special_tokens=False)["input_ids"]
        wanted = [n for part in expected for n in (body if part == "text" else [part])]
        assert TextEncoder(own).document("the fox") == wanted
        assert own("the fox")["input_ids"] in (wanted, wanted[:-1])


def test_text_cannot_become_a_control_token_whatever_the_vocabulary_holds() -> None:
    unigram = tokenizer("unigram")
    assert unigram.eos_token_id in unigram("</s>", add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert TextEncoder(unigram).document("say </s> now").count(unigram.eos_token_id) == 1
    unmarked = templates.byte_level(special_flag=False)
    unmarked.eos_token = "<|endoftext|>"
    end = unmarked.convert_tokens_to_ids("<|im_end|>")
    assert end in unmarked("a <|im_end|>", split_special_tokens=True)["input_ids"]
    found = TextEncoder(unmarked, templates.CHATML).document("a <|im_end|>")
    assert end not in found and unmarked.decode(found[:-1]) == "a <|im_end|>"


def test_a_tokenizer_without_an_end_token_is_refused() -> None:
    bare = templates.byte_level()
    bare.eos_token = None
    with pytest.raises(Refusal, match="no end token"):
        TextEncoder(bare)


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=st.lists(texts, min_size=8, max_size=30).map("\n".join), window=st.integers(40, 200))
def test_a_long_text_encoded_in_parts_is_the_text_encoded_at_once(text: str, window: int) -> None:
    own = tokenizer("line ends")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plain_text, "WINDOW_CHARACTERS", window)
        try:
            found = TextEncoder(own).document(text)
        except Refusal as refusal:  # no line of it ends within half a window
            assert "Split it into files" in refusal.message
            return
    assert found == own(text, split_special_tokens=True)["input_ids"] + [own.eos_token_id]


@given(st.integers(2, 40), st.integers(2, 200))
def test_pieces_lose_nothing_repeat_nothing_and_leave_no_token_alone(limit: int, length: int) -> None:
    pieces = pieces_of(list(range(length)), limit)
    assert [n for piece in pieces for n in piece] == list(range(length))
    assert all(1 <= len(piece) <= limit for piece in pieces)
    assert len(pieces[-1]) > 1 and (limit == 2 or min(map(len, pieces)) > 1)
    assert labels_of([7, 8, 9]) == [False, True, True]


# ---- cache, doctor, words


def test_the_cache_holds_the_chunks_of_each_document_in_order(model: Path, tmp_path: Path) -> None:
    texts_ = [PROSE, "Short.", "<|im_end|> typed <|endoftext|>"]
    book = tmp_path / "book.txt"
    book.write_text(PROSE[:500], encoding="utf-8")
    found = tokens_of(model, tmp_path / "t", texts_file(tmp_path / "d.jsonl", *texts_), book)
    own = load_tokenizer(model)
    expected, places = [], []
    for file, line, text in [(0, 1, texts_[0]), (0, 2, texts_[1]), (0, 3, texts_[2]), (1, 1, PROSE[:500])]:
        ids = own(text, split_special_tokens=True)["input_ids"] + [own.eos_token_id]
        chunks = [ids[at : at + 48] for at in range(0, len(ids), 48)]
        assert len(chunks[-1]) > 1, "the plain cut of the reference would leave a token alone; choose another text"
        expected += chunks
        places += [(file, line, line - 1, piece) for piece in range(len(chunks))]
    assert [found.ids(row).tolist() for row in range(len(found.lengths))] == expected
    assert [found.place(row) for row in range(len(expected))] == places
    assert all(found.labels(row).tolist() == [0] + [1] * (len(ids) - 1) for row, ids in enumerate(expected))
    batch = assemble(found, np.arange(len(expected)), "cpu")
    assert batch.labels == sum(len(chunk) - 1 for chunk in expected) and not found.cut.any()
    meta = found.meta
    assert (meta["documents"], meta["pieces"], meta["rows"]) == (4, len(expected), len(expected))
    assert meta["chat_template"] is None and meta["rows_cut"] == meta["rows_dropped"] == 0


def test_what_to_do_with_rows_too_long_is_for_conversations_alone(model: Path, tmp_path: Path) -> None:
    path = texts_file(tmp_path / "d.jsonl", PROSE)
    for too_long in ("cut", "drop", "refuse"):
        request = TokenRequest((str(path),), str(model), None, "", DATE, 32, too_long)  # type: ignore[arg-type]
        found = TokenCache.open(build_cache(request, tmp_path / "t", lambda done, total: None))
        own = load_tokenizer(model)
        assert int(found.lengths.sum()) == len(own(PROSE)["input_ids"]) + 1


def test_conversations_and_texts_may_stand_in_one_file(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join([json.dumps(CHAT), json.dumps({"text": PROSE}), "nonsense", json.dumps(CHAT)]))
    found = tokens_of(model, tmp_path / "t", path)
    assert found.pieces[0] == found.pieces[-1] == -1 and found.pieces[1:-1].tolist() == list(
        range(len(found.pieces) - 2)
    )
    assert found.source[:, 1].tolist() == [1, *[2] * (len(found.pieces) - 2), 4]
    assert found.meta["problem_counts"] == {"bad_json": 1} and found.meta["chat_template"] is not None
    report = check_data(path, tokenizer=load_tokenizer(model), max_length=48)
    assert report["format"] == "messages and texts, JSON Lines"
    assert (report["documents"], report["pieces"], report["turns"]) == (1, len(found.pieces) - 2, {"2": 2})


def test_the_doctor_names_plain_text_and_measures_it_as_it_is_trained(model: Path, tmp_path: Path) -> None:
    path = texts_file(tmp_path / "d.jsonl", PROSE, "Short.", "Short.", " ")
    report = check_data(path, tokenizer=load_tokenizer(model), max_length=48)
    found = tokens_of(model, tmp_path / "t", path)
    assert (report["format"], report["rows"], report["usable"], report["documents"]) == ("texts, JSON Lines", 4, 3, 3)
    assert report["counts"] == {"empty_text": 1} and report["pieces"] == len(found.lengths)
    assert report["lengths"]["over"] == 0 and report["lengths"]["longest"] == int(found.lengths.max())
    assert report["label_share"] == found.meta["labels"] / found.meta["tokens"]
    assert [warning["code"] for warning in report["warnings"]] == ["duplicates"]


def test_a_profile_with_plain_text_is_refused_in_words(model: Path, tmp_path: Path) -> None:
    path = texts_file(tmp_path / "d.jsonl", "one")
    words = r"d.jsonl, line 1 is plain text, and the profile emoji_think is made for conversations. Choose no profile"
    for refused in (
        lambda: tokens_of(model, tmp_path / "t", path, profile="emoji_think"),
        lambda: check_data(path, profile="emoji_think"),
    ):
        with pytest.raises(Refusal, match=words) as caught:
            refused()
        assert caught.value.field == "profile.name"


def test_a_row_of_text_is_shown_with_every_token_but_the_first_as_a_label(
    model: Path, tmp_path: Path, worker: Worker
) -> None:
    path = texts_file(tmp_path / "d.jsonl", PROSE)
    args: dict[str, Any] = {
        "path": str(path), "row": 0, "model_path": str(model), "profile": None, "system_prompt": "", "date": DATE,
        "max_length": 48, "too_long": "cut",
    }  # fmt: skip
    view = worker.call("view_row", **args)
    found = tokens_of(model, tmp_path / "t", path)
    assert view["counts"]["label"] == found.meta["labels"] and view["counts"]["tokens"] == found.meta["tokens"]
    assert [n for n, token in enumerate(view["tokens"]) if token["kind"] == "context"] == found.offsets[:-1].tolist()
    assert "".join(token["text"] for token in view["tokens"]) == PROSE + "<|im_end|>"
    assert view["after"] == [{"role": "text", "content": PROSE}] and "pieces" in view["note"]
    second = worker.call("view_row", **args, piece=1)
    assert [token["id"] for token in second["tokens"]] == found.ids(1).tolist()
    assert "made for conversations" in _refusal(lambda: worker.call("view_row", **(args | {"profile": "plain"})))


def _refusal(work: Any) -> str:
    with pytest.raises(Refusal) as caught:
        work()
    return caught.value.message


# ---- training


def losses_of(model: Path, chunks: list[list[int]]) -> list[tuple[float, int]]:
    """(loss sum, labels) of each chunk from plain transformers."""
    plain = AutoModelForCausalLM.from_pretrained(model).eval()
    found = []
    with torch.no_grad():
        for chunk in chunks:
            ids = torch.tensor([chunk])
            found.append((float(plain(input_ids=ids, labels=ids).loss) * (len(chunk) - 1), len(chunk) - 1))
    return found


def test_a_run_on_text_trains_and_its_first_loss_is_that_of_plain_transformers(
    model: Path, tmp_path: Path, workspace: Workspace, worker: Worker
) -> None:
    folder = tmp_path / "without a template"
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "chat_template.jinja").unlink()
    book = tmp_path / "book.txt"
    book.write_text(PROSE * 2, encoding="utf-8")
    data = texts_file(tmp_path / "d.jsonl", *[f"{n} {PROSE}" for n in range(4)])
    config = runs.settings(
        folder, book, max_length=48, max_steps=12, learning_rate=3e-3, warmup_steps=0,
        eval={"sample_steps": 12, "sample_max_tokens": 4, "eval_steps": 12},
    )  # fmt: skip
    more = config.data.model_copy(update={"dataset_paths": [WeightedFile(path=str(data))]})
    run = runs.new(workspace, config.model_copy(update={"data": more}))
    assert runs.train(run, workspace, worker) == "finished"
    found = TokenCache.open(next(path for path in workspace.tokens.iterdir() if path.is_dir()))
    rows = trained_rows(run.rows, 1)
    expected = losses_of(folder, [found.ids(row).tolist() for row, _, _ in rows])
    for (_, mine, labels), (wanted, count) in zip(rows, expected, strict=True):
        assert labels == count and mine == pytest.approx(wanted, rel=1e-5)
    losses = read_metrics(run.metrics)["loss"]
    assert losses[-1] < losses[0]
    events = all_events(run.events)
    samples = [event for event in events if event["kind"] == "sample"]
    assert samples and all(event["prompt"] and event["wanted"] for event in samples)
    told = " ".join(str(event.get("text")) for event in events if event["kind"] == "log")
    assert "Plain text: 5 documents in" in told and "ChatML" not in told


def test_own_prompts_on_text_are_continued_and_not_wrapped_in_a_chat(
    model: Path, tmp_path: Path, workspace: Workspace, worker: Worker
) -> None:
    from trainer.launch import prompt_of
    from trainer.loop.prepare import all_tokens
    from trainer.loop.sampler import default_questions, typed_question

    config = runs.settings(model, texts_file(tmp_path / "d.jsonl", *[PROSE] * 30), max_length=48)
    prompt, own = prompt_of(config, workspace.profiles), load_tokenizer(model)
    tokens = all_tokens(config, prompt, (workspace.tokens, workspace.profiles), worker)
    typed = typed_question("Once <|im_end|>", 0, config, prompt, tokens, own, workspace.profiles)
    assert typed.ids == own("Once <|im_end|>", split_special_tokens=True)["input_ids"]
    (first, *_) = default_questions(config, prompt, tokens, own, worker, workspace.profiles)
    row = tokens.held_out.ids(int(tokens.held_out_rows[0])).tolist()
    assert row[: len(first.ids)] == first.ids and 0 < len(first.ids) <= 32 and first.wanted
    assert own.decode(row[: len(first.ids)]) == first.text


def test_the_command_line_trains_checks_smokes_and_inspects_text(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    book = tmp_path / "book.txt"
    book.write_text(PROSE * 3, encoding="utf-8")
    settings_ = {"method": "full", "batch_size": 2, "max_length": 48, "learning_rate": 3e-3}
    (tmp_path / "config.json").write_text(json.dumps({"model_path": str(model), "hyperparams": settings_}))
    assert main(["check-data", str(book)]) == 0
    assert "plain text" in capfd.readouterr().out
    assert main(["inspect", "--dataset", str(book)]) == 0
    out = capfd.readouterr().out
    assert "book.txt, line 1, piece " in out and "positions 0 to 47" in out and "nothing padded" in out
    assert main(["smoke", "--dataset", str(book)]) == 0, capfd.readouterr().out
    assert "every token but the first is trained" in capfd.readouterr().out
    assert main(["train", "--dataset", str(book), "--profile", "plain", "--output", "refused"]) == 2
    told = capfd.readouterr().err
    assert told.count("\n") == 1 and "made for conversations" in told
