"""How a process of ours ended, as far as the machine tells: signal, exit code, faulthandler's last words, the kernel's.

The supervisor (`app.py`) watches each server it starts and keeps the last ends in `server_ends.json`; a server that comes
up reads them, to say why a run was cut off. Standard library alone, since the supervisor must stay light.
"""

from __future__ import annotations

import os
import re
import signal
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from trainer.files import read_json, write_json

KEPT_ENDS = 20
LEDGER, CRASH_LOG = "server_ends.json", "crash.log"
_CRASH_LOG_READ_BYTES = 64 * 1024
_FRAME = re.compile(r'^\s+File "(?P<file>[^"]*)", line (?P<line>\d+) in (?P<function>\S+)')


@dataclass(frozen=True)
class End:
    """One end: `code` as subprocess gives it (minus the signal's number), times in seconds since 1970.

    `out_of_memory` is what the kernel said of it ("" where it said nothing), `crash` faulthandler's words on one line.
    """

    pid: int
    boot: str
    began: float
    ended: float
    code: int
    out_of_memory: str = ""
    crash: str = ""

    @property
    def sentence(self) -> str:
        """The cause as it stands in brackets behind "the server ended without stopping"."""
        if self.code < 0:
            return self._of_signal()
        known = {0: "it was told to end, and the run was not through in time", 75: "it was started afresh"}
        if self.code in (129, 130, 143):
            return "a second signal ended it at once"
        return known.get(self.code, f"exit code {self.code}")

    def _of_signal(self) -> str:
        name = f"signal {-self.code} ({signal_name(-self.code)})"
        if self.out_of_memory:
            return f"{name}, {self.out_of_memory}"
        if self.crash:
            return f"{name}, {self.crash}"
        if -self.code == signal.SIGKILL:
            return f"{name}, sent from outside; the kernel says nothing of memory"
        return name


def signal_name(number: int) -> str:
    """ "SIGKILL" for 9; the number itself where it has no name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)


def boot_id() -> str:
    """What is another after each start of the machine; "" where the system does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def oom_kills(proc_cgroup: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")) -> int | None:
    """How many processes of our control group the kernel has ended for want of memory; None where it does not say."""
    try:
        lines = proc_cgroup.read_text().splitlines()
    except OSError:
        return None
    for number, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if number == "0" and not controllers:
            files = [mount / path.lstrip("/") / "memory.events", mount / "memory.events"]
        elif "memory" in controllers.split(","):
            files = [mount / "memory" / path.lstrip("/") / "memory.oom_control", mount / "memory/memory.oom_control"]
        else:
            continue
        for file in files:
            try:
                found = re.search(r"^oom_kill (\d+)$", file.read_text(), re.MULTILINE)
            except OSError:
                continue
            if found:
                return int(found.group(1))
    return None


def kernel_killed(pid: int, since_s: float, log: Path = Path("/dev/kmsg")) -> bool:
    """Whether the kernel's log, where it may be read, says that it ended `pid` for memory after `since_s` (monotonic)."""
    try:
        fd = os.open(log, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except OSError:
        return False
    words = f"Killed process {pid} ".encode()
    try:
        while True:
            try:
                record = os.read(fd, 8192)
            except BrokenPipeError:  # the oldest records were overwritten while we read: go on with the next
                continue
            if not record:
                return False
            for line in record.splitlines():
                head, _, text = line.partition(b";")
                if words in text and float(head.split(b",")[2]) / 1e6 >= since_s:
                    return True
    except (OSError, ValueError, IndexError):  # BlockingIOError: all of it is read
        return False
    finally:
        os.close(fd)


def crash_words(log: Path, since_bytes: int) -> str:
    """What faulthandler wrote behind byte `since_bytes`: the fault and the innermost frame, without folders; else ""."""
    try:
        with open(log, "rb") as file:
            file.seek(since_bytes)
            lines = file.read(_CRASH_LOG_READ_BYTES).decode("utf-8", "replace").splitlines()
    except OSError:
        return ""
    fault = next((line.partition(": ")[2] for line in lines if line.startswith("Fatal Python error: ")), "")
    current = next((n for n, line in enumerate(lines) if line.startswith("Current thread ")), len(lines))
    frame = next((match for line in lines[current + 1 : current + 2] if (match := _FRAME.match(line))), None)
    if not fault or frame is None:
        return fault
    return f"{fault} in {Path(frame['file']).name}, line {frame['line']} ({frame['function']})"


@dataclass
class Watch:
    """What was true when a server was started; `ended` compares it with what is true at its end."""

    workspace: Path
    pid: int
    began: float = field(default_factory=time.time)
    _began_s: float = field(default_factory=time.monotonic)
    _oom_kills: int | None = field(default_factory=oom_kills)
    _crash_bytes: int = 0

    def __post_init__(self) -> None:
        log = self.workspace / CRASH_LOG
        self._crash_bytes = log.stat().st_size if log.exists() else 0

    def ended(self, code: int) -> End:
        """Put the end into the ledger and return it. A disk that is full costs the entry, nothing else."""
        memory = self._memory() if code == -getattr(signal, "SIGKILL", 9) else ""
        crash = crash_words(self.workspace / CRASH_LOG, self._crash_bytes) if code < 0 else ""
        end = End(self.pid, boot_id(), self.began, time.time(), code, memory, crash)
        try:
            write_json(
                self.workspace / LEDGER, [asdict(each) for each in [*read_ends(self.workspace), end][-KEPT_ENDS:]]
            )
        except OSError:
            pass
        return end

    def _memory(self) -> str:
        if kernel_killed(self.pid, self._began_s):
            return "the kernel ended it for want of memory"
        now = oom_kills()
        if now is not None and self._oom_kills is not None and now > self._oom_kills:
            return "the kernel ended it for want of memory: its group of processes was at its limit"
        return ""


def read_ends(workspace: Path) -> list[End]:
    """The ends that are kept, oldest first; none where there is no ledger that can be read."""
    try:
        return [End(**entry) for entry in read_json(workspace / LEDGER)]
    except (OSError, ValueError, TypeError):
        return []
