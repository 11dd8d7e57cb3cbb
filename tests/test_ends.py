"""How a process ended, as the machine tells it: faulthandler's words, the kernel's, the control group's counter."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.ends import CRASH_LOG, LEDGER, End, Watch, boot_id, crash_words, kernel_killed, oom_kills, read_ends


def end(code: int, **fields: str) -> End:
    return End(7, "boot", 1.0, 2.0, code, **fields)


@pytest.mark.parametrize(
    ("ended", "says"),
    [
        (end(-9), "signal 9 (SIGKILL), sent from outside; the kernel says nothing of memory"),
        (
            end(-9, out_of_memory="the kernel ended it for want of memory"),
            "signal 9 (SIGKILL), the kernel ended it for want of memory",
        ),
        (
            end(-11, crash="Segmentation fault in step.py, line 3 (f)"),
            "signal 11 (SIGSEGV), Segmentation fault in step.py",
        ),
        (end(-6), "signal 6 (SIGABRT)"),
        (end(130), "a second signal ended it at once"),
        (end(0), "it was told to end, and the run was not through in time"),
        (end(3), "exit code 3"),
    ],
)
def test_an_end_is_a_cause_in_words(ended: End, says: str) -> None:
    assert ended.sentence.startswith(says)


def test_a_real_fault_in_native_code_is_told_with_its_place_and_without_folders(tmp_path: Path) -> None:
    log = tmp_path / CRASH_LOG
    log.write_text("Fatal Python error: Aborted\n\nCurrent thread 0x1 (most recent call first):\n")
    watch = Watch(tmp_path, 1)
    code = f"import ctypes, faulthandler\nfaulthandler.enable(open({str(log)!r}, 'a'))\n"
    code += "def deepest():\n    ctypes.string_at(0)\ndeepest()\n"
    (tmp_path / "victim.py").write_text(code)
    done = subprocess.run([sys.executable, str(tmp_path / "victim.py")])
    ended = watch.ended(done.returncode)
    assert done.returncode == -signal.SIGSEGV
    assert ended.crash.startswith("Segmentation fault in __init__.py, line"), "string_at is the innermost frame"
    assert str(tmp_path) not in ended.sentence and "/" not in ended.crash
    assert read_ends(tmp_path) == [ended] and ended.boot == boot_id()


def test_a_clean_end_leaves_no_crash_and_the_ledger_keeps_the_last_twenty(tmp_path: Path) -> None:
    for pid in range(30):
        assert Watch(tmp_path, pid).ended(0).crash == ""
    assert [each.pid for each in read_ends(tmp_path)] == list(range(10, 30))
    (tmp_path / LEDGER).write_text('[{"pid": 1}]')
    assert read_ends(tmp_path) == []
    assert crash_words(tmp_path / "none", 0) == ""


KMSG = (
    "4,1001,5000000,-;python3 invoked oom-killer: gfp_mask=0x0\n"
    "3,1002,6000000,-;Out of memory: Killed process 4242 (python3) total-vm:1kB\n"
    " SUBSYSTEM=x\n"
)


def test_the_kernel_log_is_believed_for_this_process_and_this_time_alone(tmp_path: Path) -> None:
    log = tmp_path / "kmsg"
    log.write_text(KMSG)
    assert kernel_killed(4242, 5.9, log)
    assert not kernel_killed(4242, 6.1, log), "an older process of the same number"
    assert not kernel_killed(424, 0, log) and not kernel_killed(42421, 0, log)
    assert not kernel_killed(4242, 0, tmp_path / "none")


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_the_counter_of_the_control_group_tells_of_kills_for_memory(tmp_path: Path, version: str) -> None:
    cgroup, mount = tmp_path / "cgroup", tmp_path / "fs"
    if version == "v1":
        cgroup.write_text("9:name=systemd:/\n4:memory:/box/a\n0::/\n")
        file = mount / "memory/box/a/memory.oom_control"
        text = "oom_kill_disable 0\nunder_oom 0\noom_kill {}\n"
    else:
        cgroup.write_text("0::/user.slice/a\n")
        file = mount / "user.slice/a/memory.events"
        text = "low 0\nhigh 0\nmax 9\noom 4\noom_kill {}\n"
    file.parent.mkdir(parents=True)
    for count in (0, 3):
        file.write_text(text.format(count))
        assert oom_kills(cgroup, mount) == count
    file.unlink()
    assert oom_kills(cgroup, mount) is None and oom_kills(tmp_path / "none", mount) is None


def test_a_kill_counts_as_one_for_memory_when_the_counter_rose_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = iter([4, 4, 4, 5])
    monkeypatch.setattr("trainer.ends.oom_kills", lambda: next(counts))
    before = Watch(tmp_path, 999_999_999, _oom_kills=next(counts))
    assert before.ended(-9).out_of_memory == ""
    before = Watch(tmp_path, 999_999_999, _oom_kills=next(counts))
    assert "want of memory" in before.ended(-9).sentence
