"""The real save, with its tensors, tokenizer, thread and events, and a whole life of a run: each file call failed in turn."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests import runs
from tests.figures import Note
from tests.kill_loop import WorkerHere
from tests.sweeps import HOWS, Case, Root, calls_of, fresh, outcome, sweep
from tests.tiny import tiny_model_dir
from trainer import checkpoint
from trainer.events import EventLog, all_events
from trainer.files import read_json
from trainer.loop.save import Saver, Snapshot, copy_to_host
from trainer.machine import machine
from trainer.metrics import read_metrics
from trainer.refusal import Refusal
from trainer.run import RunDir, status
from trainer.session import open_life, train_to_end
from trainer.workspace import Workspace


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """fsync is counted and failed here, and need not take its time."""
    monkeypatch.setattr(os, "fsync", os.fstat)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_dir(tmp_path_factory.mktemp("models") / "tiny", hidden=32, layers=1)


def saving(model_dir: Path, lora: bool) -> Callable[[Root, int], None]:
    """A function that saves a step in a folder through the product's saver; the weights hold the step's number."""
    model: Any = AutoModelForCausalLM.from_pretrained(model_dir)
    trained = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])) if lora else model
    tokenizer = AutoTokenizer.from_pretrained(model_dir)

    def save(root: Root, step: int) -> None:
        names = ["base.layers.0.q_proj.lora_A.weight", "base.layers.0.q_proj.lora_B.weight"]
        weights = (
            {name: torch.full((4, 4), float(step)) for name in names}
            if lora
            else copy_to_host({name: torch.full_like(t, float(step)) for name, t in model.state_dict().items()})
        )
        shot = Snapshot(step, weights, {"states": torch.full((8,), float(step))}, {"step": step, "best_step": None})
        try:
            (root / "checkpoints").mkdir(exist_ok=True)
            events = EventLog(root / "events.jsonl")
        except OSError as error:  # the life is opened before there is a saver; it says this
            raise Refusal(f"The run's folder cannot be written: {error.strerror}. Nothing was started.") from None
        saver = Saver(root / "checkpoints", events, trained, tokenizer, model_dir, keep=2)
        try:
            saver.save(shot, set())
            saver.wait()
        finally:
            events.close()

    return save


def saved_held(root: Root) -> None:
    """The two newest are whole, hold what they say, and nothing else has a final name."""
    acknowledged = [event["step"] for event in all_events(root / "events.jsonl") if event["kind"] == "checkpoint"]
    there = dict(checkpoint.listed(root / "checkpoints"))
    assert acknowledged[:2] == [1, 2] and len(there) >= 2 and max(there) >= max(acknowledged)
    for step, path in there.items():
        assert checkpoint.verify(path) == []
        states = load_file(path / checkpoint.OPTIMIZER)["states"]
        weights = [t for file in path.glob("model/*.safetensors") for t in load_file(file).values()]
        assert weights and all(bool((tensor == step).all()) for tensor in [states, *weights])


def saver_case(model_dir: Path, lora: bool) -> Case:
    """Two steps are saved; the third is what fails, and must in words, for a saver has the loop above it."""
    save = saving(model_dir, lora)

    def two(root: Root) -> None:
        for step in (1, 2):
            save(root, step)

    def done(root: Root) -> None:
        assert [step for step, _ in checkpoint.listed(root / "checkpoints")] == [3, 2]

    return Case("saver", two, lambda root: save(root, 3), saved_held, done, refuses=True)


def test_each_file_call_of_a_real_save_failed_in_turn_loses_nothing(model_dir: Path, tmp_path: Path) -> None:
    assert sweep(saver_case(model_dir, lora=False), tmp_path, thorough=False, stride=6) >= 10


@pytest.mark.slow
@pytest.mark.torture
@pytest.mark.parametrize("lora", [False, True], ids=["full", "adapter"])
def test_each_file_call_of_a_real_save_failed_in_every_way_loses_nothing(
    model_dir: Path, tmp_path: Path, lora: bool, figures: Note
) -> None:
    tries = sweep(saver_case(model_dir, lora), tmp_path, thorough=True)
    done = "every call of the product's own saver x kill, ENOSPC, EIO, EACCES, once and from there on"
    figures(f"The real save, {'adapter' if lora else 'all weights'}", done, tried=tries, lost=0)


def damaged(content: bytes, how: str) -> bytes | None:
    """A file's content after the damage; None where the file is gone."""
    flipped = content[: len(content) // 2] + bytes([content[len(content) // 2] ^ 4]) + content[len(content) // 2 + 1 :]
    ways = {"missing": None, "empty": b"", "half": content[: len(content) // 2], "zeros": bytes(len(content))}
    return flipped if how == "flipped" else ways[how]


@pytest.mark.torture
@pytest.mark.parametrize("lora", [False, True], ids=["full", "adapter"])
def test_every_file_of_a_real_checkpoint_damaged_in_every_way_falls_back_to_the_one_before(
    model_dir: Path, tmp_path: Path, lora: bool, figures: Note
) -> None:
    save = saving(model_dir, lora)
    for step in (1, 2):
        save(tmp_path, step)
    newest = checkpoint.directory_of(tmp_path / "checkpoints", 2)
    names = {path.relative_to(newest).as_posix() for path in newest.rglob("*") if path.is_file()}
    weights = "model/adapter_model.safetensors" if lora else "model/model.safetensors"
    settings = "model/adapter_config.json" if lora else "model/config.json"
    kinds = {
        weights,
        settings,
        "model/tokenizer.json",
        "model/chat_template.jinja",
        "optimizer.safetensors",
        "state.json",
    }
    assert names >= kinds | {"MANIFEST.json"}
    for name in names:
        content = (newest / name).read_bytes()
        for how in ("missing", "empty", "half", "zeros", "flipped"):
            after = damaged(content, how)
            if after is None:
                (newest / name).unlink()
            else:
                (newest / name).write_bytes(after)
            found = checkpoint.newest_verified(tmp_path / "checkpoints")
            assert found.step == 1, f"{name}, {how}: the damage went unseen"
            assert found.passed_over[0][0] == newest.name
            assert name == "MANIFEST.json" or found.passed_over[0][1].startswith(name)
        (newest / name).write_bytes(content)
    assert checkpoint.newest_verified(tmp_path / "checkpoints").step == 2
    done = f"{len(names)} files x missing, empty, half, zeros, one bit flipped"
    figures(f"Damage, {'adapter' if lora else 'all weights'}", done, tried=5 * len(names), lost=0, failed_resumes=0)


# -- a whole life, from the lock to the last event


def life_in(root: Root) -> str:
    """The next life of the run in `root`."""
    run = RunDir(root / "run")
    life = open_life(run, "test", resumed=run.events.exists())
    return train_to_end(life, Workspace(root), WorkerHere(), machine())  # type: ignore[arg-type]


def test_a_read_that_fails_while_a_life_begins_ends_it_in_words_or_not_at_all(model_dir: Path, tmp_path: Path) -> None:
    rows = runs.write_rows(tmp_path / "rows.jsonl", 20)
    config = runs.settings(model_dir, rows, max_steps=1, eval={"eval_strategy": "no"})
    template = tmp_path / "template"
    runs.launch.new_run(Workspace(template).create(), config, machine(), owner="t", threads=1, output=template / "run")
    # from the lock to the first look at the model: what those that watch a life read
    for at in range(8, 20, 2):
        root = fresh(tmp_path, template)
        came_of_it = outcome(root, life_in, at, "EIO")
        assert came_of_it is None or isinstance(came_of_it, Refusal), f"call {at}: {came_of_it!r}"
        assert status(RunDir(root / "run")).state in ("finished", "failed", "queued"), at


@pytest.mark.slow
@pytest.mark.torture
@pytest.mark.parametrize("at_life", ["first", "second"])
def test_each_third_file_call_of_a_whole_life_failed_in_turn_and_the_next_life_ends_like_a_whole_run(
    model_dir: Path, tmp_path: Path, at_life: str, figures: Note
) -> None:
    config = runs.settings(
        model_dir, runs.write_rows(tmp_path / "rows.jsonl", 20), max_steps=4, eval={"eval_strategy": "no"},
        output={"save_steps": 1, "save_total_limit": 2},
    )  # fmt: skip
    template = tmp_path / "template"
    runs.launch.new_run(Workspace(template).create(), config, machine(), owner="t", threads=1, output=template / "run")
    if at_life == "second":
        calls = calls_of(fresh(tmp_path, template), life_in).seen
        template = tmp_path / "second"
        fresh(tmp_path, tmp_path / "template").rename(template)
        outcome(template, life_in, calls * 2 // 3, "kill")
    root = fresh(tmp_path, template)
    calls = calls_of(root, life_in).seen
    wanted, wrong, tries = end_of(root), [], 0
    for at in range(1 + calls % 3, calls + 1, 3):  # a life is a second: each third call, and of four ways one in turn
        how = HOWS[at % len(HOWS)]
        root = fresh(tmp_path, template)
        came_of_it = outcome(root, life_in, at, how)
        wrong += [f"call {at} of {calls}, {how}: {text}" for text in faults_of(root, came_of_it, wanted)]
        tries += 1
    differ = sum("differ" in text for text in wrong)
    done = f"every third of {calls} calls of a {at_life} life, four ways in turn; then the next life"
    figures("A whole life", done, tried=tries, failed_resumes=len(wrong) - differ, differences=differ)
    assert wrong == []


def faults_of(root: Root, came_of_it: BaseException | str | None, wanted: tuple[Any, Any]) -> list[str]:
    """What of the promises was not kept by a life in which a call failed, and by the next one."""
    run, wrong = RunDir(root / "run"), []
    if not (came_of_it is None or came_of_it == "killed" or isinstance(came_of_it, Refusal)):
        wrong.append(f"no words: {came_of_it!r}")
    events = all_events(run.events)
    failed = [event["cause"] for event in events if event["kind"] == "failed"]
    wrong += [f"not in words: {cause}" for cause in failed if not cause.endswith(".") or "Errno" in cause]
    if (state := status(run).state) != "finished" and (end := life_in(root)) != "finished":
        wrong.append(
            f"the life after one that was {state} ({came_of_it!r}, {failed}) ended as {end}: {status(run).cause}"
        )
    weights, curve = end_of(root)
    if weights != wanted[0]:
        wrong.append("the weights at the end differ")
    if came_of_it == "killed" and curve != wanted[1]:
        wrong.append("the curve differs")
    return wrong


def end_of(root: Root) -> tuple[dict[str, str], list[list[float]]]:
    """(hashes of weights and states, curve) of the run that has finished in `root`."""
    run = RunDir(root / "run")
    files = read_json(checkpoint.newest_verified(run.checkpoints).path / checkpoint.MANIFEST)["files"]
    curve = [[float(r[name]) for name in ("step", "loss", "grad_norm")] for r in read_metrics(run.metrics)]
    return {name: entry["sha256"] for name, entry in files.items() if name.endswith(".safetensors")}, curve
