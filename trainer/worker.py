"""The limited child that parses all foreign bytes, and the client that asks it: files, templates, tokenizers.

A child is `python -m trainer.worker`: JSON over its pipes, limits on memory and open files, an allow-list of
environment variables, no torch except for the few operations that need it. It is killed on time-out. Its side
is trainer.worker_child, what it does trainer.worker_ops. Called by the page, the engine and the command line.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.refusal import Refusal
from trainer.worker_child import main, read_frame, write_frame

MEMORY_BYTES = 4 * 1024**3
TORCH_MEMORY_BYTES = 64 * 1024**3  # of addresses: a CUDA build of torch maps many GiB that it never touches
CHILDREN = 3
TORCH_OPS = frozenset({"check_shapes", "convert", "starter"})

INHERITED = (
    "PATH", "HOME", "LANG", "LC_ALL", "LC_CTYPE", "TMPDIR", "TEMP", "TMP", "TZ", "SYSTEMROOT", "PYTHONPATH",
    "LD_LIBRARY_PATH", "VIRTUAL_ENV", "PYTHONHOME",
)  # fmt: skip
_SET = {
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MALLOC_ARENA_MAX": "2",  # each thread's own arena reserves addresses, which the memory limit counts
    "OMP_NUM_THREADS": "2",
    "OPENBLAS_NUM_THREADS": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONIOENCODING": "utf-8",
    "TOKENIZERS_PARALLELISM": "true",
    "TRANSFORMERS_VERBOSITY": "error",
}
_WORDS = {
    "check_model": "Checking the model",
    "check_shapes": "Comparing the tensors with the architecture",
    "try_tokenizer": "Trying the tokenizer",
    "check_data": "Checking the data",
    "preview_columns": "Showing the columns",
    "repair_data": "Making the repaired copy",
    "view_row": "Showing the row",
    "preview_profile": "Showing the profile",
    "token_texts": "Showing the batch",
    "tokenise": "Tokenising",
    "convert": "Converting the weights",
    "starter": "Making the starter model",
}


class WorkerDied(Refusal):
    """The child crashed, ran out of memory or out of time; `detail` is what it wrote last, for a report."""

    def __init__(self, message: str, detail: str = "") -> None:
        super().__init__(message)
        self.detail = detail


class Cancelled(Refusal):
    """The call was left because `cancelled()` said so."""


class Worker:
    """Asks children, up to three at once, which are started when needed and kept. Safe to use from any thread."""

    def __init__(self, memory_bytes: int = MEMORY_BYTES, torch_memory_bytes: int = TORCH_MEMORY_BYTES) -> None:
        self._memory_bytes = memory_bytes
        self._torch_memory_bytes = torch_memory_bytes
        self._change = threading.Condition()
        self._idle: list[_Child] = []
        self._busy: list[_Child] = []
        self._closed = False

    def call(
        self,
        op: str,
        *,
        timeout_s: float = 60,
        on_progress: Callable[[int, int], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
        **args: Any,
    ) -> Any:
        """Run an operation of trainer.worker_ops in a child and return its JSON result.

        Raises Refusal for what the data or model did, WorkerDied for a crash, the memory limit or the time-out
        (counted from the moment a child takes the call), Cancelled. The next call gets a new child after those.
        """
        child = self._borrow(op in TORCH_OPS, cancelled)
        try:
            answer = child.ask({"op": op, "args": args}, timeout_s, on_progress, cancelled)
        except BaseException:  # also what the callbacks raise: the child's answer would meet the next question
            child.kill()
            raise
        finally:
            self._give_back(child)
        if "refusal" in answer:
            raise Refusal(answer["refusal"], answer.get("field"))
        return answer["result"]

    def warm(self) -> None:
        """Start a child in the background and let it import what it needs; returns at once."""
        threading.Thread(target=self._warm, name="worker-warm", daemon=True).start()

    def close(self) -> None:
        """End all children; calls in progress raise WorkerDied, later ones Refusal."""
        with self._change:
            self._closed = True
            children = self._idle + self._busy
            self._change.notify_all()
        for child in children:
            child.kill()

    def _warm(self) -> None:
        try:
            self.call("warm", timeout_s=120)
        except Refusal:
            pass  # the first real call says what is wrong

    def _borrow(self, torch: bool, cancelled: Callable[[], bool] | None) -> _Child:
        with self._change:
            while True:
                if self._closed:
                    raise Refusal("The server is ending.")
                self._idle = [child for child in self._idle if child.alive()]
                if self._idle and not torch:
                    child = self._idle.pop()
                    break
                if len(self._busy) < CHILDREN:
                    child = _Child(self._torch_memory_bytes if torch else self._memory_bytes, torch)
                    break
                if cancelled is not None and cancelled():
                    raise Cancelled("Left before it began.")
                self._change.wait(0.1)
            self._busy.append(child)
            return child

    def _give_back(self, child: _Child) -> None:
        with self._change:
            self._busy.remove(child)
            if child.alive() and not child.torch and not self._closed:
                self._idle.append(child)
            else:
                child.kill()
            self._change.notify_all()


class _Child:
    """One child process. A thread of its own starts it and reads what it writes to stderr until it ends."""

    def __init__(self, memory_bytes: int, torch: bool) -> None:
        self.torch = torch
        self._memory_bytes = memory_bytes
        self._frames: queue.Queue[bytes | None] = queue.Queue()
        self._said: deque[bytes] = deque(maxlen=200)
        self._process: subprocess.Popen[bytes] | None = None
        self._start_error: OSError | None = None
        self._killed = False
        started = threading.Event()
        # Linux kills the child when the thread that started it ends, not the process: hence a thread that stays
        self._attendant = threading.Thread(target=self._attend, args=(started,), name="worker", daemon=True)
        self._attendant.start()
        started.wait()
        if self._process is None:
            raise WorkerDied(f"The worker process cannot be started: {self._start_error}.")
        threading.Thread(target=self._read, name="worker-read", daemon=True).start()

    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        """End the process; harmless when it has ended."""
        assert self._process is not None
        self._killed = True
        self._process.kill()
        self._process.wait()

    def ask(
        self,
        request: dict[str, Any],
        timeout_s: float,
        on_progress: Callable[[int, int], None] | None,
        cancelled: Callable[[], bool] | None,
    ) -> dict[str, Any]:
        """Send one request and wait for its answer; raises WorkerDied or Cancelled, with the child in any state."""
        assert self._process is not None and self._process.stdin is not None
        what = _WORDS.get(request["op"], request["op"])
        deadline = time.monotonic() + timeout_s
        try:
            write_frame(self._process.stdin, request)
        except OSError:
            raise self._death(what) from None
        while True:
            if cancelled is not None and cancelled():
                raise Cancelled(f"{what} was cancelled.")
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise WorkerDied(f"{what} took longer than {timeout_s:,g} s and was ended. Nothing was changed.")
            try:
                frame = self._frames.get(timeout=min(0.1, left_s))
            except queue.Empty:
                continue
            if frame is None:
                raise self._death(what)
            answer = json.loads(frame)
            if "progress" not in answer:
                break
            if on_progress is not None:
                on_progress(*answer["progress"])
        if "died" in answer:
            raise self._died(what, answer["died"], answer["detail"])
        return answer

    def _attend(self, started: threading.Event) -> None:
        package_root = str(Path(__file__).resolve().parent.parent)
        environment = {name: os.environ[name] for name in INHERITED if name in os.environ} | _SET
        inherited = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = os.pathsep.join([package_root, inherited] if inherited else [package_root])
        command = [sys.executable, "-P", "-m", "trainer.worker", "--memory-bytes", str(self._memory_bytes)]
        command += ["--parent", str(os.getpid())] + (["--torch"] if self.torch else [])
        pipe = subprocess.PIPE
        try:
            self._process = subprocess.Popen(
                command,
                stdin=pipe,
                stdout=pipe,
                stderr=pipe,
                env=environment,
                start_new_session=True,
            )
        except OSError as error:
            self._start_error = error
            return
        finally:
            started.set()
        assert self._process.stderr is not None
        while line := self._process.stderr.readline(4096):
            self._said.append(line)
        self._process.wait()

    def _read(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        while (frame := read_frame(self._process.stdout)) is not None:
            self._frames.put(frame)
        self._frames.put(None)

    def _death(self, what: str) -> WorkerDied:
        """What to say of a child that ended without a word."""
        assert self._process is not None
        self._attendant.join(2)
        detail = b"".join(self._said).decode("utf-8", "replace")
        code = self._process.poll()
        if self._killed:
            return WorkerDied(f"{what} was left because the server is ending.")
        # the Rust and C++ libraries abort with these words; SIGKILL from elsewhere is the system's out-of-memory killer
        if (
            any(words in detail for words in ("memory allocation of", "MemoryError", "bad_alloc"))
            or code == -signal.SIGKILL
        ):
            return self._died(what, "memory", detail)
        return self._died(what, f"signal {-code}" if code is not None and code < 0 else f"exit {code}", detail)

    def _died(self, what: str, how: str, detail: str) -> WorkerDied:
        if how == "memory":
            limit = f"{self._memory_bytes / 1024**3:.1f} GiB"
            text = f"{what} needed more memory than it may have ({limit}) and was ended. Nothing was changed."
            return WorkerDied(text, detail)
        return WorkerDied(f"{what} ended unexpectedly ({how}). Nothing was changed. Try it again.", detail)


if __name__ == "__main__":
    sys.exit(main())
