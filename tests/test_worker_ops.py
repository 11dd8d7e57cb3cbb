"""What the worker answers: reports, rows as tokens, previews, token caches, starter model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.tiny import tiny_tokenizer
from tests.worker_kit import DATE, chat, child_pids, view, with_template
from trainer.data.formats import read_rows
from trainer.data.tokens import TokenCache, TokenRequest, load_tokenizer
from trainer.refusal import Refusal
from trainer.worker import Worker


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokenizer(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join([chat("q", "one"), "", "bad", chat("r", "two 🛑️ three")]))
    return path


def test_the_doctor_answers_through_the_worker(worker: Worker, data: Path, model: Path) -> None:
    report = worker.call("check_data", path=str(data))
    assert (report["valid"], report["rows"], report["usable"]) == (False, 3, 2)
    assert report["problems"][0]["line"] == 3
    measured = worker.call("check_data", path=str(data), model_path=str(model), max_length=32)
    assert measured["lengths"]["sampled"] == 2 and 0 < measured["label_share"] < 1
    data.write_text("\n".join([chat("q", "a")] * 2500))
    steps: list[tuple[int, int]] = []
    worker.call("check_data", path=str(data), on_progress=lambda done, total: steps.append((done, total)))
    assert steps and all(0 < done <= total == data.stat().st_size for done, total in steps)
    with pytest.raises(Refusal, match="no profile 'nobody'"):
        worker.call("check_data", path=str(data), profile="nobody")
    with pytest.raises(Refusal, match="absent cannot be opened"):
        worker.call("check_data", path=str(data.parent / "absent"))


def test_a_model_folder_is_judged_through_the_worker(worker: Worker, model: Path) -> None:
    report = worker.call("check_model", path=str(model))
    assert report["valid"] is False and "config.json" in json.dumps(report["problems"])


def test_a_row_is_shown_as_it_will_be_trained(worker: Worker, data: Path, model: Path) -> None:
    seen = view(worker, data, model, 2, profile="emoji_think", max_length=200)
    assert (seen["line"], seen["rows"], seen["problem"]) == (4, 3, None)
    assert seen["before"] == list(read_rows(data))[2].messages
    assert DATE in seen["system_prompt"] and seen["after"][0] == {"role": "system", "content": seen["system_prompt"]}
    tokenizer = load_tokenizer(model)
    assert "".join(token["text"] for token in seen["tokens"]) == tokenizer.decode([t["id"] for t in seen["tokens"]])
    answer = seen["after"][-1]["content"]
    assert "".join(token["text"] for token in seen["tokens"] if token["kind"] == "label") == answer + "<|im_end|>"
    assert any(token["text"] == "<|im_start|>" and token["kind"] == "special" for token in seen["tokens"])
    counts = seen["counts"]
    assert (
        counts["tokens"] == len(seen["tokens"]) == sum(counts[kind] for kind in ("label", "context", "special", "cut"))
    )


def test_cut_tokens_and_unusable_rows_are_said(worker: Worker, data: Path, model: Path) -> None:
    cut = view(worker, data, model, 2, max_length=12)
    assert [token["kind"] == "cut" for token in cut["tokens"]] == [n >= 12 for n in range(len(cut["tokens"]))]
    assert "12 allowed: its last" in cut["note"] and "No token of this row is trained." in cut["note"]
    assert "left out" in view(worker, data, model, 2, max_length=12, too_long="drop")["note"]
    bad = view(worker, data, model, 1)
    assert bad["problem"]["code"] == "bad_json" and bad["tokens"] == []
    for row in (3, -1):
        with pytest.raises(Refusal, match="d.jsonl has 3 rows"):
            view(worker, data, model, row)
    with pytest.raises(Refusal) as caught:
        view(worker, data, model, 0, profile="nobody")
    assert caught.value.field == "profile.name"


def test_the_view_follows_files_that_change(worker: Worker, data: Path, model: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    shutil.copytree(model, own)
    before = view(worker, data, own, 0)["tokens"]
    with data.open("a") as file:
        file.write("\n" + chat("new", "row"))
    assert view(worker, data, own, 3)["rows"] == 4
    (own / "chat_template.jinja").write_text("{{- 'Hi ' -}}" + (own / "chat_template.jinja").read_text())
    after = view(worker, data, own, 0)["tokens"]
    assert "".join(token["text"] for token in after) == "Hi " + "".join(token["text"] for token in before)


def test_the_operations_that_need_torch_have_a_child_of_their_own_that_ends(worker: Worker, tmp_path: Path) -> None:
    before = child_pids(worker)
    made = worker.call("starter", timeout_s=300, models_root=str(tmp_path / "m"), datasets_root=str(tmp_path / "d"))
    assert worker.call("check_model", path=made["model"])["valid"] is True
    report = worker.call("check_data", path=made["dataset"], model_path=made["model"])
    assert report["valid"] is True and report["lengths"]["sampled"] > 100
    with pytest.raises(Refusal, match="safetensors already"):
        worker.call("convert", timeout_s=300, path=made["model"], out=str(tmp_path / "out"))
    assert set(before) <= set(child_pids(worker)) and not worker._busy


def test_a_profile_is_previewed_on_real_rows(worker: Worker, data: Path) -> None:
    seen = worker.call(
        "preview_profile", path=str(data), profile="regime3", system_prompt="", date=DATE, profiles_root=None
    )
    assert [row["line"] for row in seen["rows"]] == [1, 4]
    assert "<<ANS_START>> one <<ANS_END>>" in seen["rows"][0]["after"][-1]["content"]
    assert DATE in seen["system_prompt"] and seen["description"]


def test_tokens_are_made_with_progress_and_found_again(worker: Worker, data: Path, model: Path, tmp_path: Path) -> None:
    data.write_text("\n".join(chat("q", f"answer {n}") for n in range(600)))
    request = TokenRequest((str(data),), str(model), None, "", DATE, 128, "cut")
    steps: list[tuple[int, int]] = []
    made = worker.call(
        "tokenise",
        on_progress=lambda done, total: steps.append((done, total)),
        request={**request.__dict__, "files": list(request.files)},
        root=str(tmp_path / "tokens"),
    )
    assert made["cache"] == str(tmp_path / "tokens" / request.key())
    assert steps[-1] == (600, 600)
    cache = TokenCache.open(Path(made["cache"]))
    assert cache.meta == made["meta"] and int(np.sum(cache.lengths)) == made["meta"]["tokens"]


def test_templates_cannot_reach_out_of_their_sandbox(worker: Worker, data: Path, model: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    write = f"open('{canary}', 'w')"
    gadgets = [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}",
        "{{ self._TemplateReference__context.environment }}",
        "{{ lipsum.__globals__['os'].popen('touch CANARY').read() }}",
        "{{ strftime_now.__globals__ }}",
        "{{ strftime_now.__code__.co_consts }}",
        "{{ raise_exception.__globals__['__builtins__']['open']('CANARY', 'w') }}",
        "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
        "{{ namespace.__init__.__globals__ }}",
        "{% set x = messages.__class__ %}{{ x }}",
        f"{{{{ {write} }}}}",
    ]
    for number, gadget in enumerate(gadgets):
        folder = with_template(model, tmp_path / str(number), gadget.replace("CANARY", str(canary)))
        seen = view(worker, data, folder, 0)
        assert seen["problem"] is not None, gadget
        assert "globals" not in json.dumps(seen["tokens"])
    assert not canary.exists()


@pytest.mark.parametrize("profile", [None, "plain"])
@pytest.mark.parametrize("name", ["d.json", "d.csv", "d.parquet", "d.jsonl.gz"])
def test_any_row_of_any_format_is_shown_as_the_model_sees_it(
    worker: Worker, model: Path, tmp_path: Path, name: str, profile: str | None
) -> None:
    import gzip

    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / name
    rows = [{"prompt": f"question {n}", "completion": f"answer {n}"} for n in range(70)]
    if name == "d.parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif name == "d.csv":
        path.write_text("prompt,completion\n" + "".join(f"question {n},answer {n}\n" for n in range(70)))
    else:
        text = json.dumps(rows) if name == "d.json" else "".join(json.dumps(row) + "\n" for row in rows)
        path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    asked = {"system_prompt": "", "date": "2025-11-22", "max_length": 64, "too_long": "cut", "profile": profile}
    for row in (0, 49, 50, 69):
        view = worker.call("view_row", path=str(path), row=row, model_path=str(model), **asked)
        assert view["rows"] == 70 and view["before"][-1]["content"] == f"answer {row}"
        learned = "".join(token["text"] for token in view["tokens"] if token["kind"] == "label")
        assert learned.startswith(f"answer {row}")
