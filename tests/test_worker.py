"""The worker: real children, real limits; whatever the bytes do, the one who asks gets words or a result."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.tiny import tiny_tokenizer
from trainer.data.formats import read_rows
from trainer.data.tokens import TokenCache, TokenRequest, load_tokenizer
from trainer.refusal import Refusal
from trainer.worker import Cancelled, Worker, WorkerDied

DATE = "2025-11-22"
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    made = Worker()
    yield made
    made.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokenizer(tmp_path_factory.mktemp("model") / "tiny")


def chat(question: str, answer: str) -> str:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": turns})


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join([chat("q", "one"), "", "bad", chat("r", "two 🛑️ three")]))
    return path


def view(worker: Worker, data: Path, model: Path, row: int, **changes: Any) -> dict[str, Any]:
    args: dict[str, Any] = {
        "profile": None, "system_prompt": "", "date": DATE, "max_length": 128, "too_long": "cut",
        "profiles_root": None,
    }  # fmt: skip
    return worker.call("view_row", path=str(data), row=row, model_path=str(model), **(args | changes))


def with_template(model: Path, to: Path, template: str) -> Path:
    shutil.copytree(model, to)
    (to / "chat_template.jinja").write_text(template)
    return to


def child_pids(worker: Worker) -> list[int]:
    return [child._process.pid for child in worker._idle if child._process is not None]


def test_the_doctor_answers_through_the_worker(worker: Worker, data: Path, model: Path) -> None:
    report = worker.call("check_data", path=str(data))
    assert (report["valid"], report["rows"], report["usable"]) == (False, 3, 2)
    assert report["problems"][0]["line"] == 3
    measured = worker.call("check_data", path=str(data), model_path=str(model), max_length=32)
    assert measured["lengths"]["sampled"] == 2 and 0 < measured["label_share"] < 1
    data.write_text("\n".join([chat("q", "a")] * 2500))
    steps: list[tuple[int, int]] = []
    worker.call("check_data", path=str(data), on_progress=lambda done, total: steps.append((done, total)))
    assert steps and all(0 < done < total == data.stat().st_size for done, total in steps)
    with pytest.raises(Refusal, match="no profile 'nobody'"):
        worker.call("check_data", path=str(data), profile="nobody")
    with pytest.raises(Refusal, match="absent cannot be opened"):
        worker.call("check_data", path=str(data.parent / "absent"))


def test_a_model_folder_is_judged_through_the_worker(worker: Worker, model: Path) -> None:
    report = worker.call("check_model", path=str(model))
    assert report["valid"] is False and report["problems"][0]["file"]


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


def test_a_slow_template_ends_in_words_and_the_child_lives_on(
    worker: Worker, data: Path, model: Path, tmp_path: Path
) -> None:
    bomb = with_template(model, tmp_path / "bomb", LOOP)
    view(worker, data, model, 0)
    pids = child_pids(worker)
    started = time.monotonic()
    seen = view(worker, data, bomb, 0)
    assert "too slow: more than 2 s" in seen["problem"]["message"]
    assert time.monotonic() - started < 20
    assert child_pids(worker) == pids


@pytest.mark.parametrize("template", ["{{ 'a' * 9999999999 }}", "{{ (messages * 9999999999) | length }}"])
def test_a_template_that_eats_memory_ends_in_words(
    worker: Worker, data: Path, model: Path, tmp_path: Path, template: str
) -> None:
    bomb = with_template(model, tmp_path / "bomb", template)
    assert "needs more memory" in view(worker, data, bomb, 0)["problem"]["message"]


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


def test_a_call_out_of_time_is_ended_and_the_next_one_works(
    worker: Worker, data: Path, model: Path, tmp_path: Path
) -> None:
    slow = with_template(model, tmp_path / "slow", LOOP)
    started = time.monotonic()
    with pytest.raises(WorkerDied, match="Showing the row took longer than 0.5 s and was ended"):
        view(worker, data, slow, 0, timeout_s=0.5)
    assert time.monotonic() - started < 2
    assert worker.call("check_data", path=str(data))["rows"] == 3


def test_a_crash_is_told_with_its_text_and_the_next_call_works(worker: Worker, data: Path) -> None:
    with pytest.raises(WorkerDied, match=r"ended unexpectedly \(TypeError") as caught:
        worker.call("check_data", nonsense=1)
    assert "Traceback" in caught.value.detail
    assert worker.call("check_data", path=str(data))["rows"] == 3


def test_a_child_that_is_killed_is_noticed_at_once(data: Path, model: Path, tmp_path: Path) -> None:
    own = Worker()
    slow = with_template(model, tmp_path / "slow", LOOP)
    view(own, data, model, 0)
    (pid,) = child_pids(own)
    threading.Timer(0.3, os.kill, (pid, signal.SIGSEGV)).start()
    started = time.monotonic()
    with pytest.raises(WorkerDied, match=r"Showing the row ended unexpectedly \(signal 11\)"):
        view(own, data, slow, 0)
    assert time.monotonic() - started < 2
    own.call("check_data", path=str(data))
    own.close()


def test_the_memory_limit_holds_and_is_named(data: Path) -> None:
    small = Worker(memory_bytes=600 * 1024**2)
    try:
        assert small.call("check_data", path=str(data))["rows"] == 3
        line = (
            '{"messages": [{"role": "user", "content": "'
            + "x" * 7_000_000
            + '"}, {"role": "assistant", "content": "a"}]}\n'
        )
        with data.open("w") as file:
            for _ in range(3):
                file.write(line)
        assert small.call("check_data", path=str(data))["rows"] == 3
        with pytest.raises(WorkerDied, match=r"more memory than it may have \(0.6 GiB\)"):
            small.call("preview_profile", path=str(data), profile=None, system_prompt="x" * 90_000_000, date=DATE)
        assert small.call("check_data", path=str(data))["rows"] == 3
    finally:
        small.close()


def test_cancelling_leaves_at_once(worker: Worker, data: Path, model: Path, tmp_path: Path) -> None:
    slow = with_template(model, tmp_path / "slow", LOOP)
    started = time.monotonic()
    with pytest.raises(Cancelled, match="Showing the row was cancelled"):
        worker.call(
            "view_row",
            cancelled=lambda: time.monotonic() - started > 0.3,
            path=str(data), row=0, model_path=str(slow), profile=None, system_prompt="", date=DATE,
            max_length=9, too_long="cut",
        )  # fmt: skip
    assert time.monotonic() - started < 1.5


def test_an_error_in_a_callback_does_not_mix_up_later_answers(
    worker: Worker, data: Path, model: Path, tmp_path: Path
) -> None:
    def fails(done: int, total: int) -> None:
        raise RuntimeError("the page went away")

    request = {"files": [str(data)], "model_path": str(model), "profile": None, "system_prompt": "", "date": DATE}
    request |= {"max_length": 64, "too_long": "cut"}
    with pytest.raises(RuntimeError):
        worker.call("tokenise", on_progress=fails, request=request, root=str(tmp_path / "tokens"))
    assert worker.call("check_data", path=str(data))["rows"] == 3


def test_calls_of_many_threads_get_their_own_answers(worker: Worker, tmp_path: Path) -> None:
    answers: dict[int, int] = {}

    def ask(rows: int) -> None:
        path = tmp_path / f"{rows}.jsonl"
        path.write_text("\n".join([chat("q", "a")] * rows))
        answers[rows] = worker.call("check_data", path=str(path))["rows"]

    threads = [threading.Thread(target=ask, args=(rows,)) for rows in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert answers == {rows: rows for rows in range(1, 9)}
    assert len(child_pids(worker)) <= 3


def test_secrets_and_devices_are_not_handed_on(monkeypatch: pytest.MonkeyPatch, data: Path) -> None:
    monkeypatch.setenv("HF_TOKEN", "canary-secret")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    own = Worker()
    try:
        own.call("check_data", path=str(data))
        (pid,) = child_pids(own)
        environment = Path(f"/proc/{pid}/environ").read_bytes()
        assert b"canary" not in environment and b"CUDA_VISIBLE_DEVICES=\0" in environment
        limits = Path(f"/proc/{pid}/limits").read_text()
        assert str(4 * 1024**3) in limits and "Max core file size        0" in limits
    finally:
        own.close()


def test_the_ordinary_child_holds_no_torch_and_little_memory(worker: Worker, data: Path, model: Path) -> None:
    view(worker, data, model, 0)
    for pid in child_pids(worker):
        maps = Path(f"/proc/{pid}/maps").read_text()
        assert "libtorch" not in maps
        resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        assert resident < 250 * 1024**2


def gone(pid: str, within_s: float) -> bool:
    """Whether the process ends in time; one that nobody waits for stays as a zombie, which counts as ended."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            if "zombie" in Path(f"/proc/{pid}/status").read_text():
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.02)
    return False


def test_a_child_outlives_the_thread_that_asked_it(worker: Worker, data: Path) -> None:
    own = Worker()
    try:
        for _ in range(2):
            thread = threading.Thread(target=own.call, args=("check_data",), kwargs={"path": str(data)})
            thread.start()
            thread.join(30)
            time.sleep(0.3)
            (pid,) = child_pids(own)
        assert not gone(str(pid), 0.1)
    finally:
        own.close()


@pytest.mark.parametrize("busy", [False, True])
def test_children_end_with_the_process_that_started_them(busy: bool, data: Path, model: Path, tmp_path: Path) -> None:
    slow = with_template(model, tmp_path / "slow", LOOP)
    code = (
        "import sys, threading, time; from trainer.worker import Worker\n"
        "w = Worker(); w.call('check_data', path=sys.argv[1])\n"
        "print(w._idle[0]._process.pid, flush=True)\n"
        "args = dict(path=sys.argv[1], row=0, model_path=sys.argv[2], profile=None, system_prompt='', too_long='cut')\n"
        "sys.argv[3] == 'True' and w.call('view_row', max_length=9, date='2025-11-22', **args)\n"
        "time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(data), str(slow), str(busy)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    pid = server.stdout.readline().strip()
    if busy:  # until it is in the template, which takes two seconds of processor time
        cpu = Path(f"/proc/{pid}/stat")
        before = int(cpu.read_text().split()[13])
        while int(cpu.read_text().split()[13]) < before + 0.3 * os.sysconf("SC_CLK_TCK"):
            time.sleep(0.02)
    assert not gone(pid, 0.1)
    server.kill()
    server.wait()
    assert gone(pid, 0.5)


def test_warming_makes_the_first_call_quick(data: Path, model: Path) -> None:
    own = Worker()
    try:
        own.warm()
        deadline = time.monotonic() + 60
        while not own._idle:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        started = time.monotonic()
        view(own, data, model, 0)
        assert time.monotonic() - started < 2
    finally:
        own.close()


def test_a_closed_worker_says_so_and_leaves_nobody(data: Path, model: Path, tmp_path: Path) -> None:
    own = Worker()
    slow = with_template(model, tmp_path / "slow", LOOP)
    heard: list[str] = []

    def ask() -> None:
        try:
            view(own, data, slow, 0)
        except WorkerDied as died:
            heard.append(died.message)

    thread = threading.Thread(target=ask)
    thread.start()
    while not own._busy:
        time.sleep(0.01)
    pid = own._busy[0]._process.pid
    time.sleep(0.2)
    own.close()
    thread.join(5)
    assert heard == ["Showing the row was left because the server is ending."]
    assert not Path(f"/proc/{pid}").exists()
    with pytest.raises(Refusal, match="server is ending"):
        own.call("check_data", path=str(data))
