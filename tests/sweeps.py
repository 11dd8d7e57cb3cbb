"""Something done to a folder again and again, each time with another file call of it failing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.file_faults import KILLED, FileCalls
from trainer import session
from trainer.refusal import Refusal

Root = Path
HOWS = ("kill", "ENOSPC", "EIO", "EACCES")


@dataclass(frozen=True)
class Case:
    """Something done to a folder. `held` checks the promises whatever came of it, `done` that it came through.

    `refuses`: there is no edge above it that knows an OSError, so it must raise a Refusal. `recover` is what happens next
    after it was cut off, a life that puts things right or a person who asks again; None: the same once more.
    """

    name: str
    prepare: Callable[[Root], None]
    work: Callable[[Root], Any]
    held: Callable[[Root], None]
    done: Callable[[Root], None]
    refuses: bool = False
    recover: Callable[[Root], Any] | None = None


def in_words(error: BaseException | str | None, refusal_only: bool = False) -> None:
    """What a fault may become: a Refusal, or (inside a life) an OSError that the life's edge turns into a sentence."""
    if isinstance(error, Refusal):
        text = error.message
    elif isinstance(error, OSError) and not refusal_only:
        text = session._cause(error)
    else:
        assert error in (None, "killed"), f"{type(error).__name__}: {error}"
        return
    assert not any(word in text for word in ("Traceback", "Error:", "Errno", "\n")), text
    assert text.endswith(".") and len(text) > 30, text


def outcome(
    root: Root, work: Callable[[Root], Any], at: int, how: str, persist: bool = False
) -> BaseException | str | None:
    """Do `work` with call `at` below `root` failing: "killed", the exception it ended with, or None where it went through."""
    if how == "kill":
        pid = os.fork()
        if pid == 0:
            try:
                with FileCalls(root, at, how).installed():
                    work(root)
            finally:
                os._exit(0)  # an error's own way out is not what a kill tests
        return "killed" if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == KILLED else None
    try:
        with FileCalls(root, at, how, persist).installed():
            work(root)
    except Exception as error:
        return error
    return None


def calls_of(root: Root, work: Callable[[Root], Any]) -> FileCalls:
    """The calls that `work` makes below `root`, all of them succeeding."""
    calls = FileCalls(root)
    with calls.installed():
        work(root)
    return calls


def each_try(count: int, thorough: bool, stride: int = 1) -> Iterator[tuple[int, str, bool]]:
    """(call, how, persist) to try: all of them, or for each call one in turn."""
    every = [(how, persist) for how in HOWS for persist in (False, True) if not (persist and how == "kill")]
    for at in range(1, count + 1, stride):
        in_turn = ("kill", False) if at // stride % 2 else every[at // 2 % len(every)]
        for how, persist in every if thorough else [in_turn]:
            yield at, how, persist


def fresh(tmp_path: Path, template: Path) -> Path:
    root = tmp_path / "place"
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(template, root)
    return root


def sweep(case: Case, tmp_path: Path, thorough: bool, stride: int = 1) -> int:
    """Fail each call (or every `stride`th) once; returns how many tries there were."""
    template = tmp_path / "template"
    template.mkdir()
    case.prepare(template)
    root = fresh(tmp_path, template)
    count = calls_of(root, case.work).seen
    tries = 0
    for at, how, persist in each_try(count, thorough, stride):
        root = fresh(tmp_path, template)
        came_of_it = outcome(root, case.work, at, how, persist)
        try:
            in_words(came_of_it, case.refuses)
            case.held(root)
            case.work(root)
            case.held(root)
            case.done(root)
        except BaseException:
            print(f"{case.name}: call {at} of {count}, {how}{' from there on' * persist}: {came_of_it!r}")
            raise
        tries += 1
    return tries


def compound(case: Case, tmp_path: Path, stride: int = 1, more: int = 1) -> tuple[int, int]:
    """Fail a call of the case, then each call of what follows from that; returns how many (first faults, tries) there were.

    The first fault is at every `stride`th call, the second at every `more`th, each in one way in turn: all ways of both at
    all calls would be hours. Then it is done once more on a disk that works.
    """
    template, broken = tmp_path / "template", tmp_path / "broken"
    template.mkdir()
    case.prepare(template)
    recover = case.recover or case.work
    count, firsts, tries = calls_of(fresh(tmp_path, template), case.work).seen, 0, 0
    for first in range(1, count + 1, stride):
        how = HOWS[first % len(HOWS)]
        root = fresh(tmp_path, template)
        outcome(root, case.work, first, how)
        shutil.rmtree(broken, ignore_errors=True)
        shutil.copytree(root, broken)
        firsts += 1
        for second in range(1 + first % more, calls_of(root, recover).seen + 1, more):
            then = HOWS[(first // len(HOWS) + second) % len(HOWS)]  # so that all pairs of ways come
            _fail_again(case, recover, fresh(tmp_path, broken), (first, how), (second, then))
            tries += 1
    return firsts, tries


def _fail_again(
    case: Case, recover: Callable[[Root], Any], root: Root, first: tuple[int, str], second: tuple[int, str]
) -> None:
    """One try of `compound`: `first` and `second` are (call, how)."""
    came_of_it = outcome(root, recover, *second)
    try:
        in_words(came_of_it, case.refuses)
        case.held(root)
        recover(root)
        case.held(root)
    except BaseException:
        print(f"{case.name}: call {first[0]}, {first[1]}; then call {second[0]}, {second[1]}: {came_of_it!r}")
        raise
