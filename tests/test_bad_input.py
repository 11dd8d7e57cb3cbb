"""Input that cannot be trained is refused before step 1, in one line that names the cause; what can be trained is."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests import runs
from tests.tiny import tiny_adapter_dir, tiny_model_dir
from trainer import alone
from trainer.cli import main
from trainer.events import all_events
from trainer.metrics import read_metrics
from trainer.run import RunDir, status
from trainer.worker import Worker

GOOD = {"messages": [{"role": "user", "content": "Two and two?"}, {"role": "assistant", "content": "Four it is."}]}
LATE = {"messages": [{"role": "user", "content": "long " * 200}, {"role": "assistant", "content": "yes"}]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_dir(tmp_path_factory.mktemp("models") / "tiny")


class KeptWorker(Worker):
    """A real worker that outlives the command, so that not each of these tests has to start a process."""

    def close(self) -> None:
        """Nothing yet; `end` closes it."""

    def end(self) -> None:
        """End the children."""
        super().close()


@pytest.fixture(scope="module")
def worker() -> Iterator[KeptWorker]:
    made = KeptWorker()
    yield made
    made.end()


@pytest.fixture
def place(model: Path, worker: KeptWorker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of a person: a copy of the model, good rows, settings that fit both."""
    monkeypatch.setattr(alone, "Worker", lambda: worker)
    shutil.copytree(model, tmp_path / "model")
    runs.write_rows(tmp_path / "rows.jsonl", 12)
    settings = {"method": "full", "batch_size": 2, "gradient_accumulation": 1, "max_length": 128, "max_steps": 2}
    content = {"model_path": "model", "data": {"dataset_path": "rows.jsonl"}, "hyperparams": settings}
    (tmp_path / "config.json").write_text(json.dumps(content))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path


def rows(place: Path, *found: dict[str, Any] | str, name: str = "rows.jsonl") -> None:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in found]
    (place / name).write_text("\n".join(lines))


def config(place: Path, **changes: Any) -> None:
    """Change settings in the config file as text, so that NaN can stand there too."""
    content = json.loads((place / "config.json").read_text())
    for section, values in changes.items():
        content.setdefault(section, {}).update(values)
    (place / "config.json").write_text(json.dumps(content))


def change_weight(place: Path, ending: str, value: float, file: str = "model/model.safetensors") -> str:
    """Put `value` into one number of the tensor whose name ends so; returns the name."""
    weights = load_file(place / file)
    name = next(name for name in sorted(weights) if name.endswith(ending))
    weights[name].view(-1)[3] = value
    save_file(weights, place / file, metadata={"format": "pt"})
    return name


def without_template(place: Path) -> None:
    (place / "model" / "chat_template.jinja").unlink()


def small_vocabulary(place: Path) -> None:
    """A model with fewer rows in its embedding than its tokenizer has tokens."""
    shutil.rmtree(place / "model")
    tiny_model_dir(place / "model", vocab=300)


def silent_tokenizer(place: Path) -> None:
    """A tokenizer that makes nothing of the text that is trained, and a text of that kind alone."""
    path = place / "model" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["normalizer"] = {"type": "Replace", "pattern": {"Regex": "[a-z]"}, "content": ""}
    path.write_text(json.dumps(content))
    rows(place, {"text": "nothing"}, {"text": "remains"})


def silent_template(place: Path) -> None:
    (place / "model" / "chat_template.jinja").write_text("{{- '' -}}")


def nan_adapter(place: Path) -> str:
    tiny_adapter_dir(place / "adapter", place / "model")
    name = change_weight(place, "lora_A.weight", math.nan, "adapter/adapter_model.safetensors")
    config(place, hyperparams={"method": "lora"})
    content = json.loads((place / "config.json").read_text()) | {"model_path": "adapter"}
    (place / "config.json").write_text(json.dumps(content))
    return name.removesuffix(".lora_A.weight").rpartition(".")[2]


# what is done to the good folder, further arguments, and words of the one line (None: what the change returns)
REFUSED: dict[str, tuple[Callable[[Path], Any], list[str], tuple[str, ...]]] = {
    "empty data": (lambda p: rows(p), [], ("No row of 0 can be trained: there is none.",)),
    "data of blank lines": (lambda p: rows(p, "", "  ", ""), [], ("No row of 0",)),
    "an empty text file": (lambda p: rows(p, name="book.txt"), ["--dataset", "book.txt"], ("No row of 0",)),
    "no usable row": (lambda p: rows(p, "x", "{}"), [], ("2 with problems", "Line 1: bad JSON")),
    "all labels cut away": (lambda p: rows(p, LATE, LATE), [], ("2 with no answer in the first 128 tokens",)),
    "rows too long, dropped": (
        lambda p: rows(p, LATE), ["--set", "data.too_long=drop"], ("1 longer than 128 tokens",)),
    "rows too long, refused": (
        lambda p: rows(p, GOOD, LATE), ["--set", "data.too_long=refuse"], ("Rows longer than 128 tokens: 1", "lines 2")),
    "texts of no token": (silent_tokenizer, [], ("2 with problems", "Line 1: the tokenizer makes no token of this text")),
    "a template that writes nothing": (silent_template, [], ("drops or rewrites message",)),
    "ids beyond the vocabulary": (small_vocabulary, [], ("The data has the token", "vocabulary ends at 299")),
    "no template": (without_template, [], ("no chat template", "data.chat_template=chatml")),
    "no end token for a text": (
        lambda p: (rows(p, {"text": "one"}), drop_special(p, "eos_token")), [], ("no end token (eos_token)",)),
    "NaN in the weights": (lambda p: change_weight(p, "up_proj.weight", math.nan), [], ("NaN or infinite",)),
    "infinity in the weights": (lambda p: change_weight(p, "norm.weight", math.inf), [], ("NaN or infinite",)),
    "NaN in an adapter": (nan_adapter, [], ("The adapter has NaN",)),
    "a rate of NaN": (lambda p: None, ["--set", "hyperparams.learning_rate=nan"], ("earning rate", "nan")),
    "a negative rate": (lambda p: None, ["--set", "hyperparams.learning_rate=-1e-4"], ("earning rate", "0 to 1")),
    "an infinite rate": (lambda p: None, ["--set", "hyperparams.learning_rate=inf"], ("earning rate", "inf")),
    "a rate of NaN in the file": (
        lambda p: config(p, hyperparams={"learning_rate": math.nan}), [], ("NaN",)),
    "a negative rate in the file": (
        lambda p: config(p, hyperparams={"learning_rate": -1}), [], ("learning_rate", "-1")),
    "a profile on a text": (
        lambda p: rows(p, {"text": "one"}), ["--profile", "regime3"], ("plain text", "profile regime3")),
}  # fmt: skip


def drop_special(place: Path, name: str) -> None:
    """Take one named token out of the tokenizer's settings."""
    path = place / "model" / "tokenizer_config.json"
    content = json.loads(path.read_text())
    content.pop(name, None)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("what", REFUSED)
def test_it_is_refused_before_step_1_in_one_line_that_names_the_cause(
    place: Path, what: str, capfd: pytest.CaptureFixture[str]
) -> None:
    spoil, arguments, words = REFUSED[what]
    named = spoil(place)
    before = {path.name for path in place.iterdir()}
    capfd.readouterr()
    assert main(["train", *arguments]) == 2
    told = capfd.readouterr()
    assert told.err.count("\n") == 1 and "Traceback" not in told.out + told.err, told.err
    assert all(word in told.err for word in words), told.err
    assert not isinstance(named, str) or named in told.err, (named, told.err)
    new = {path.name for path in place.iterdir()} - before
    assert all(name == "workspace" or name.startswith("signalbox-") for name in new), new
    for folder in (place / "workspace" / "runs").glob("*"):
        run = RunDir(folder)
        now = status(run)
        assert (now.state, now.current_step) == ("failed", 0) and now.cause == told.err.strip()
        assert not list(run.checkpoints.glob("*")) and not read_metrics(run.metrics)["loss"].size


def trained(place: Path, *arguments: str) -> tuple[RunDir, list[str]]:
    """Train to the end; the run and what it said."""
    assert main(["train", "--output", "out", *arguments]) == 0
    run = RunDir(place / "out")
    assert status(run).state == "finished"
    return run, [str(event.get("text")) for event in all_events(run.events) if event["kind"] == "log"]


def test_one_row_is_trained_without_a_held_out_loss_and_that_is_said(place: Path) -> None:
    rows(place, GOOD)
    run, said = trained(place)
    assert read_metrics(run.metrics)["rows"].tolist() == [1, 1]
    assert "Nothing is held out, since there is only one row: there will be no held-out loss." in said
    assert not [event for event in all_events(run.events) if event["kind"] == "eval"]


def test_fewer_rows_than_a_batch_are_trained_in_one_step_an_epoch(place: Path) -> None:
    rows(place, *[GOOD] * 3)
    config(place, hyperparams={"batch_size": 16, "gradient_accumulation": 4, "max_steps": None, "num_epochs": 2})
    run, said = trained(place)
    assert read_metrics(run.metrics)["rows"].tolist() == [2, 2], "one row is held out"
    assert any(text.startswith("Plan: 2 steps") for text in said)


def test_no_pad_token_is_no_obstacle_since_nothing_is_padded(place: Path) -> None:
    drop_special(place, "pad_token")
    from trainer.data.tokens import load_tokenizer

    assert load_tokenizer(place / "model").pad_token is None
    run, _ = trained(place, "--set", "eval.sample_steps=2", "--set", "eval.sample_max_tokens=3")
    assert [event for event in all_events(run.events) if event["kind"] == "sample"]
    assert not [event for event in all_events(run.events) if event["kind"] == "alert"]


def test_no_template_is_no_obstacle_for_text_and_with_chatml_none_for_conversations(place: Path) -> None:
    without_template(place)
    rows(place, *[{"text": f"{n} signal boxes stand by the line."} for n in range(9)], name="texts.jsonl")
    _, said = trained(place, "--dataset", "texts.jsonl")
    assert any(text.startswith("Plain text: 9 documents") for text in said)
    shutil.rmtree(place / "out")
    run, _ = trained(place, "--set", "data.chat_template=chatml")
    newest = max((run.checkpoints).glob("step_*"))
    assert "<|im_start|>" in (newest / "model" / "chat_template.jinja").read_text(), "the checkpoint brings it along"


def test_the_model_of_these_tests_is_good_until_it_is_spoilt(place: Path) -> None:
    run, _ = trained(place)
    assert read_metrics(run.metrics)["loss"].size == 2
