"""When numbers stop being numbers: nothing moves any more, the step and its rows are named, fp16's overflow is none of it."""

from __future__ import annotations

import functools
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests import runs
from tests.conftest import RunningApp
from tests.lives import assert_same, one_life
from tests.memory_rows import random_rows
from tests.test_step import VOCABULARY, build, stepper_for
from tests.tiny import tiny_model_dir
from trainer import checkpoint
from trainer.events import all_events
from trainer.launch import approximations
from trainer.loop import optim
from trainer.loop import step as steps
from trainer.loop.forward import Found
from trainer.metrics import read_metrics, read_rows
from trainer.packages import has_bitsandbytes
from trainer.run import RunDir, status
from trainer.states import allowed
from trainer.worker import Worker
from trainer.workspace import Workspace
from ui.follow import Follower, Reader

HALF = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Place = tuple[Workspace, Path, Path]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    root = tmp_path_factory.mktemp("diverged")
    data = runs.write_rows(root / "rows.jsonl", 24)
    # a line that is no row, so that a row's number and its line differ by two
    data.write_text("this line is no row\n" + data.read_text())
    return Workspace(root / "ws").create(), tiny_model_dir(root / "model", hidden=32, layers=1), data


def new(place: Place, **settings: Any) -> RunDir:
    workspace, model, data = place
    base = {"eval": {"eval_strategy": "no"}, "output": {"save_steps": 1}, "max_steps": 6}
    return runs.new(workspace, runs.settings(model, data, **base | settings))


def poison(patch: pytest.MonkeyPatch, *rows: int, value: float = math.nan) -> None:
    """From now on the loss of these rows is `value` in training."""
    true_forward = steps.forward

    def forward(model: Any, batch: Any, path: Any) -> Found:
        found = true_forward(model, batch, path)
        factors = torch.tensor([value if row in rows else 1.0 for row in batch.rows])
        return Found(found.labels * factors[batch.label_row], found.router)

    patch.setattr(steps, "forward", forward)


def log_of(run: RunDir) -> str:
    return "\n".join(event["text"] for event in all_events(run.events) if event["kind"] == "log")


@pytest.mark.parametrize("precision", HALF)
def test_the_bad_step_and_all_later_ones_move_nothing_before_the_host_has_heard(precision: str) -> None:
    cache = random_rows(12, VOCABULARY, seed=2)
    half = HALF[precision]
    autocast = None if precision == "fp32" else half
    stepper = stepper_for(build(), cache, fp16=precision == "fp16", compute=half, autocast=autocast)
    stepper.scaler = torch.amp.GradScaler("cpu", init_scale=16.0, enabled=precision == "fp16")
    stepper.step(1, [np.arange(4)], cache, 1e-3)

    def everything() -> dict[str, torch.Tensor]:
        weights = {name: parameter.detach().clone() for name, parameter in stepper.named}
        return weights | {k: v.clone() for k, v in optim.state_by_name(stepper.optimizer, stepper.named).items()}

    before = everything()
    assert all(float(value) == 1 for name, value in before.items() if name.startswith("step/"))
    with pytest.MonkeyPatch.context() as patch:
        poison(patch, 5)
        bad = stepper.step(2, [np.arange(4, 6), np.arange(6, 8)], cache, 1e-3)
    later = [stepper.step(n, [np.arange(8, 12)], cache, 1e-3) for n in (3, 4)]  # nobody has looked at step 2 yet
    after = everything()
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert bad.arrive()[2] and all(record.arrive()[2] for record in later)
    assert np.isfinite(bad.arrive()[3]).tolist() == [True, False, True, True], "the row's own loss tells which it was"


def test_an_overflow_in_fp16_skips_its_own_step_alone() -> None:
    cache = random_rows(8, VOCABULARY, seed=2)
    stepper = stepper_for(build(), cache, fp16=True, compute=torch.float16, autocast=torch.float16)
    stepper.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**26)
    weights = [parameter.detach().clone() for _, parameter in stepper.named]
    skipped = 0
    while not math.isfinite(norm := (record := stepper.step(skipped + 1, [np.arange(8)], cache, 1e-3)).arrive()[1]):
        assert not record.arrive()[2] and math.isfinite(record.arrive()[0])
        assert all(torch.equal(a, b) for a, (_, b) in zip(weights, stepper.named, strict=True))
        skipped += 1
    assert skipped >= 3 and stepper.scaler.get_scale() == 2.0 ** (26 - skipped)
    assert not all(torch.equal(a, b) for a, (_, b) in zip(weights, stepper.named, strict=True))
    states = optim.state_by_name(stepper.optimizer, stepper.named)
    assert {float(value) for name, value in states.items() if name.startswith("step/")} == {1.0}
    assert norm == pytest.approx(stepper_for(build(), cache).step(1, [np.arange(8)], cache, 1e-3).arrive()[1], rel=2e-2)


def test_a_gradient_that_no_scale_can_save_is_found_out_in_fp16_too() -> None:
    cache = random_rows(4, VOCABULARY, seed=2)
    stepper = stepper_for(build(), cache, fp16=True, compute=torch.float16, autocast=torch.float16)
    _, first = stepper.named[0]
    first.register_hook(lambda gradient: gradient * math.nan)
    found = [stepper.step(n, [np.arange(4)], cache, 1e-3).arrive() for n in range(1, optim.OVERFLOWS + 2)]
    assert all(math.isfinite(loss) for loss, *_ in found)
    assert [bad for _, _, bad, _ in found] == [False] * optim.OVERFLOWS + [True]


def test_a_run_in_fp16_learns_says_its_skips_once_and_resumes_in_the_middle_of_them(
    place: Place, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = place[0]
    monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(torch.amp.GradScaler, init_scale=2.0**26))
    settings = {"fp_precision": "fp16", "max_steps": 12, "warmup_steps": 0, "batch_size": 4, "gradient_accumulation": 1}
    whole, broken = new(place, **settings), new(place, **settings)
    assert one_life(whole, workspace, worker) == "finished", status(whole).cause
    curve = read_metrics(whole.metrics)
    skipped = int((~np.isfinite(curve["grad_norm"])).sum())
    assert 3 <= skipped < 9 and np.isfinite(curve["loss"]).all()
    assert curve["loss"][-1] < 0.98 * curve["loss"][:skipped].mean()
    assert log_of(whole).count("did not fit into fp16") == 1 and "fp16 with fp32 master weights" in log_of(whole)
    newest = checkpoint.newest_verified(whole.checkpoints).path
    assert {str(t.dtype) for t in load_file(newest / "model" / "model.safetensors").values()} == {"torch.float32"}
    assert one_life(broken, workspace, worker, at=2) == "stopped"
    assert one_life(broken, workspace, worker) == "finished"
    assert_same(broken, whole, "the loss scale is kept across the resume")


@pytest.mark.parametrize("precision", HALF)
def test_a_diverged_run_names_step_and_row_and_goes_on_from_the_last_good_checkpoint(
    place: Place, worker: Worker, precision: str
) -> None:
    workspace = place[0]
    settings = {"fp_precision": precision, "warmup_steps": 0, "max_steps": 5}
    whole, run = new(place, **settings), new(place, **settings)
    assert one_life(whole, workspace, worker) == "finished"
    (row, *_), *_ = read_rows(whole.rows, 4)
    with pytest.MonkeyPatch.context() as patch:
        poison(patch, row)
        assert one_life(run, workspace, worker) == "diverged"
    now = status(run)
    assert now.state == "diverged" and now.cause_step == 4 and "resume" in allowed(now.state)
    assert f"NaN or infinite at step 4: the loss of rows.jsonl line {row + 2}. Those weights" in (now.cause or "")
    end = all_events(run.events)[-1]
    assert end["rows"] == [{"row": row, "file": "rows.jsonl", "line": row + 2}] and end["saved_step"] == 3
    assert checkpoint.newest_verified(run.checkpoints).step == 3
    assert one_life(run, workspace, worker) == "finished"
    assert_same(run, whole, "resumed from the last good checkpoint")


def test_three_rows_are_named_with_their_files_and_the_rest_is_counted(
    place: Place, worker: Worker, tmp_path: Path
) -> None:
    workspace = place[0]
    second = runs.write_rows(tmp_path / "second.jsonl", 6)
    run = new(place, batch_size=15, data={"dataset_paths": [{"path": str(second), "weight": 1}]})
    with pytest.MonkeyPatch.context() as patch:
        poison(patch, *range(21, 27), value=math.inf)
        assert one_life(run, workspace, worker) == "diverged"
    cause, end = status(run).cause or "", all_events(run.events)[-1]
    places = {row: ("rows.jsonl", row + 2) if row < 24 else ("second.jsonl", row - 23) for row in range(21, 27)}
    assert sorted(each["row"] for each in end["rows"]) == list(places)
    assert all((each["file"], each["line"]) == places[each["row"]] for each in end["rows"])
    named = cause.split("the loss of ")[1].split(". Those")[0]
    assert named.endswith(" and 3 more") and named.count("line") == 3, cause
    assert all(f"line {each['line']}" in named and each["file"] in named for each in end["rows"][:3])


def test_a_gradient_alone_that_is_no_number_names_the_rows_of_the_step(
    place: Place, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = steps.Stepper._update

    def spoiled(self: steps.Stepper, rate: float, sums: list[torch.Tensor]) -> torch.Tensor:
        if self.optimizer.state[self.named[0][1]]["step"] == 2:
            self.named[0][1].grad[0, 0] = math.inf
        return update(self, rate, sums)

    monkeypatch.setattr(steps.Stepper, "_update", spoiled)
    run = new(place)
    assert one_life(run, place[0], worker) == "diverged"
    rows = [row for row, *_ in read_rows(run.rows, 3)]
    assert [each["row"] for each in all_events(run.events)[-1]["rows"]] == rows and len(rows) == 4
    cause = status(run).cause or ""
    assert cause.startswith("gradient became NaN or infinite at step 3: every row's loss is a number;"), cause
    assert " and 1 more. Those" in cause and read_metrics(run.metrics)["grad_norm"][-1] == math.inf


def test_pure_bf16_and_8_bit_states_are_called_approximate_and_nothing_else_is(place: Place, worker: Worker) -> None:
    run = new(place, fp_precision="bf16", master_weights="none", max_steps=2)
    assert one_life(run, place[0], worker) == "finished"
    assert "pure bf16, approximate" in log_of(run) and "Approximate: pure bf16 weights" in log_of(run)
    exact = new(place, fp_precision="bf16", max_steps=1)
    assert one_life(exact, place[0], worker) == "finished" and "pproximate" not in log_of(exact)
    for each, shown in ((run, "pure bf16 weights and optimizer states"), (exact, "")):
        told = Follower(each).reply(None, 0, "", Reader(True, False, False))["s"]
        assert told["approximate"] == shown

    def of(on_gpu: bool, **settings: str) -> list[str]:
        return approximations({"hyperparams": {"method": "full", "fp_precision": "auto", **settings}}, on_gpu)

    assert of(False, master_weights="none") == [] and of(True, master_weights="none") != []
    assert of(True, master_weights="fp32") == [] and of(True, optimizer="adamw_8bit") == ["8-bit optimizer states"]


def test_lora_in_bf16_is_exact_in_its_own_matrices_whatever_is_chosen_for_master_weights(
    place: Place, worker: Worker
) -> None:
    made = [
        new(place, method="lora", fp_precision="bf16", master_weights=masters, max_steps=3)
        for masters in ("fp32", "none")
    ]
    for run in made:
        assert one_life(run, place[0], worker) == "finished" and "pproximate" not in log_of(run)
        newest = checkpoint.newest_verified(run.checkpoints).path
        for file in ("model/adapter_model.safetensors", "optimizer.safetensors"):
            assert {tensor.dtype for tensor in load_file(newest / file).values()} == {torch.float32}
    assert_same(*made, "nothing but the setting's name differs")
    assert approximations(made[1].snapshot()["config"], on_gpu=False) == []


def test_the_form_calls_them_approximate() -> None:
    from trainer.fields import field
    from ui.form import choice_labels

    # where the package is absent, the form does not offer the 8-bit optimizer at all
    eight_bits = ["adamw_8bit"] if has_bitsandbytes() else []
    for key, words in (("hyperparams.optimizer", eight_bits), ("hyperparams.master_weights", ["none"])):
        labels = {value: label for label, value in choice_labels(field(key))}
        assert [value for value, label in labels.items() if "approximate" in label] == words


@pytest.mark.browser
def test_the_board_of_an_approximate_run_says_so(page: Any, app: RunningApp, place: Place) -> None:
    settings = {"fp_precision": "bf16", "master_weights": "none", "optimizer": "adamw_8bit"}
    with pytest.MonkeyPatch.context() as patch:  # the board shows runs that were started where the package is
        patch.setattr("trainer.launch.check_packages", lambda config: None)
        patch.setattr("trainer.launch.needs_bitsandbytes", lambda config: False)
        run = runs.new(Workspace(app.workspace), runs.settings(place[1], place[2], **settings))
    page.goto(f"{app.url}/live?run={run.run_id}")
    shown = "[...document.querySelectorAll('dt')].find((each) => each.textContent === 'Approximate')?.nextSibling"
    page.wait_for_function(f"{shown}?.textContent.includes('8-bit optimizer states')", timeout=15_000)
    assert page.evaluate(f"{shown}.textContent") == "pure bf16 weights and optimizer states, 8-bit optimizer states"
    shutil.rmtree(run.path)
