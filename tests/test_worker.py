"""The worker: real children, real limits; whatever the bytes do, the one who asks gets words or a result."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.tiny import tiny_tokenizer
from tests.worker_kit import DATE, LOOP, chat, child_pids, view, with_template
from trainer.refusal import Refusal
from trainer.worker import Cancelled, Worker, WorkerDied


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokenizer(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join([chat("q", "one"), "", "bad", chat("r", "two 🛑️ three")]))
    return path


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


def test_a_call_out_of_time_is_ended_and_the_next_one_works(
    worker: Worker, data: Path, model: Path, tmp_path: Path
) -> None:
    slow = with_template(model, tmp_path / "slow", LOOP)
    started = time.monotonic()
    with pytest.raises(WorkerDied, match="Showing the row took longer than 0.5 s and was ended"):
        view(worker, data, slow, 0, timeout_s=0.5)
    assert time.monotonic() - started < 5
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
    assert time.monotonic() - started < 10
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
    assert time.monotonic() - started < 5


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
    assert gone(pid, 1.2)


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
        assert time.monotonic() - started < 3
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
