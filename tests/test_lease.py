"""One device, one run: pages, command lines and processes of any workspace meet at one lock, and hear who has it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import runs
from tests.conftest import ROOT
from tests.tiny import tiny_model_dir
from trainer import cli, lease
from trainer.engine import Engine
from trainer.lease import Busy, Holder
from trainer.run import status
from trainer.worker import Worker
from trainer.workspace import Workspace

# everything imported, then both at once
AT_ONCE = (
    "import sys, trainer.alone, trainer.loop.train\nfrom trainer.cli import main\n"
    "print('ready', flush=True)\nsys.stdin.readline()\nsys.exit(main(sys.argv[1:]))\n"
)


def test_two_processes_at_once_and_a_page_give_one_run_and_the_others_hear_who_has_it_and_for_how_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("USER", "lab-2")
    model, data = tiny_model_dir(tmp_path / "model", hidden=32, layers=1), runs.write_rows(tmp_path / "rows.jsonl", 20)
    config = runs.settings(model, data, max_steps=20_000, eval={"eval_strategy": "no"}, output={"save_steps": 0})
    (tmp_path / "config.json").write_text(json.dumps(config.model_dump(mode="json")), encoding="utf-8")
    places = [Workspace(tmp_path / name).create() for name in ("one", "two")]
    words = ["train", "--config", str(tmp_path / "config.json"), "--workspace"]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", AT_ONCE, *words, str(place.root)],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for place in places
    ]  # fmt: skip
    engine = Engine(Workspace(tmp_path / "page").create(), Worker())
    try:
        for process in started:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
        for process in started:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        runs.wait_for(lambda: any(process.poll() is not None for process in started), 120)
        told = next(process for process in started if process.poll() is not None)
        winner = next(process for process in started if process is not told)
        assert told.returncode == 2 and told.stderr is not None
        said = told.stderr.read()
        clock = r"\d\d:\d\d"
        assert_matches(said, rf"The run rows · full · lr 3e-3 \(started by lab-2\) has the device since {clock}")
        counts = sorted(len(place.list_runs()) for place in places)
        assert counts == [0, 1], "a refused start leaves no directory"
        run = next(run for place in places for run in place.list_runs())
        runs.wait_for(lambda: status(run).eta_s, 60)
        for _ in range(2):  # two tabs of a page in another workspace
            with pytest.raises(Busy, match=r"has the device since \d\d:\d\d \(about [\d,]+ (min|h) left\)\.$"):
                engine.start_run(config, "owner")
        assert engine.workspace.list_runs() == []
        assert cli.main(["stop", str(run.path)]) == 0 and winner.wait(30) == 0
    finally:
        for process in started:
            process.kill()
            process.communicate()
    capsys.readouterr()
    mine = engine.workspace.run(engine.start_run(config, "owner", name="of the page"))
    try:
        began = time.monotonic()
        assert cli.main([*words, str(places[0].root)]) == 2
        assert_matches(capsys.readouterr().err, r"The run of the page \(started by owner\) has the device since")
        assert time.monotonic() - began < 5 and status(mine).state != "failed"
    finally:
        assert engine.shutdown(60)
    assert lease.holder("cpu") is None


def assert_matches(text: str, pattern: str) -> None:
    """`text` holds `pattern`, and no path."""
    assert re.search(pattern, text), text
    assert os.sep + "model" not in text


def test_the_sentence_says_what_is_known_and_nothing_else(tmp_path: Path) -> None:
    holder = Holder("train", "lab-2", 0.0, "20260101-000000-abcd", "support-chats")
    assert_matches(holder.sentence, r"^The run support-chats \(started by lab-2\) has the device since \d\d:\d\d\.$")
    gone = Holder("train", "lab-2", 0.0, "x", "", str(tmp_path / "gone"))
    assert_matches(gone.sentence, r"^The run x \(started by lab-2\) has the device since \d\d:\d\d\.$")
