"""What a smoke test leaves behind: its report and nothing else, however it ends; and Start begins from the disk again."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from tests import runs
from tests.test_smoke import line, smoke
from tests.tiny import tiny_model_dir
from trainer import lease
from trainer.engine import Engine
from trainer.loop import smoke_memory, smoke_steps
from trainer.loop.step import Stepper
from trainer.metrics import read_metrics
from trainer.run import status
from trainer.worker import Worker
from trainer.workspace import Workspace

pytestmark = pytest.mark.usefixtures("only_new_objects")


@pytest.fixture(scope="module")
def worker():
    made = Worker()
    yield made
    made.close()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return runs.write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model_dir(tmp_path_factory.mktemp("models") / "good")


@pytest.fixture
def workspace(tmp_path):
    return Workspace(tmp_path / "ws").create()


def tree(*roots: Path) -> dict[str, bytes]:
    """Every file below `roots` with its bytes, every folder with none."""
    found = [path for root in roots for path in sorted(root.rglob("*"))]
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in found}


def left(before: dict[str, bytes], after: dict[str, bytes]) -> list[str]:
    """Names of what came, went or changed."""
    return sorted(Path(path).name for path in before | after if before.get(path) != after.get(path))


@pytest.mark.parametrize(
    "settings,changed",
    [
        ({}, ["fit_history.jsonl", "report.json", "two"]),
        ({"method": "lora"}, ["fit_history.jsonl", "report.json", "two"]),
        ({"learning_rate": 1.0, "max_grad_norm": 0}, ["fit_history.jsonl", "report.json", "two"]),
    ],
    ids=["full", "lora", "diverged"],
)
def test_the_tree_afterwards_is_the_tree_before_with_its_report_and_one_line_of_history(
    workspace, worker, data, model, settings, changed
):
    config = runs.settings(model, data, **settings)
    smoke(workspace, worker, config)  # makes the token cache, which runs use too
    before, lines = tree(workspace.root, model, data.parent), (workspace.root / "fit_history.jsonl").read_text()
    smoke(workspace, worker, config, name="two")
    assert left(before, tree(workspace.root, model, data.parent)) == changed
    after = (workspace.root / "fit_history.jsonl").read_text()
    assert after.startswith(lines) and len(after.splitlines()) == 2


def test_a_first_smoke_test_adds_the_token_cache_and_no_more(workspace, worker, data, model):
    before = tree(workspace.root, model, data.parent)
    smoke(workspace, worker, runs.settings(model, data))
    new = [Path(path).relative_to(workspace.root) for path in tree(workspace.root) if path not in before]
    elsewhere = {str(path) for path in new if path.parts[:2] != ("cache", "tokens")}
    assert elsewhere == {"smoke/one", "smoke/one/report.json", "fit_history.jsonl"}


def test_a_stop_ends_it_wherever_it_is_and_leaves_its_report_alone(workspace, worker, data, model):
    config = runs.settings(model, data, use_gradient_checkpointing=True)
    asked: list[str] = []
    report_of = lambda name: json.loads((workspace.smoke / name / "report.json").read_text())  # noqa: E731

    def noting() -> bool:
        asked.append(report_of("one")["doing"])
        return False

    assert smoke(workspace, worker, config, noting)["failed"] == 0
    places = [asked.index(phase) + asked.count(phase) // 2 for phase in dict.fromkeys(asked)]
    assert len(places) >= 6 and len(asked) > 100, "inside the checks, too"
    before, held = tree(workspace.root), smoke_memory.tensors_gib()
    for place in places:
        left_to_ask = [place]

        def stop(left_to_ask: list[int] = left_to_ask) -> bool:
            left_to_ask[0] -= 1
            return left_to_ask[0] < 0

        name = f"at{place}"
        report = smoke(workspace, worker, config, stop, name=name)
        assert report["state"] == "stopped" and report["failed"] == 0, (asked[place], report["summary"])
        assert report["summary"].startswith("Stopped after"), report["summary"]
        assert set(left(before, tree(workspace.root))) <= {name, "report.json", "fit_history.jsonl"}, asked[place]
        before = tree(workspace.root)
    assert smoke_memory.tensors_gib() - held < smoke_memory.MAY_KEEP_TENSORS_GIB


def test_a_stop_inside_a_long_step_does_not_wait_for_its_end(workspace, worker, data, model, monkeypatch):
    asked = threading.Event()
    real, ended = Stepper.step, []

    def long_step(self, number, micro_rows, cache, rate, interrupt=None):
        layer = self.model.model.layers[0].mlp
        hook = layer.register_forward_pre_hook(lambda *_: asked.set())
        try:
            record = real(self, number, micro_rows, cache, rate, interrupt)
        finally:
            hook.remove()
        ended.append(number)
        return record

    monkeypatch.setattr(Stepper, "step", long_step)
    report = smoke(workspace, worker, runs.settings(model, data), asked.is_set)
    assert report["state"] == "stopped" and not ended, (report["summary"], ended, "the step was left at its next layer")


def first_losses(workspace: Workspace, run_id: str) -> list[float]:
    return read_metrics(workspace.run(run_id).metrics)["loss"].tolist()


def test_start_is_refused_meanwhile_and_loads_the_weights_from_the_disk_again(tmp_path, data, monkeypatch):
    go_on, real = threading.Event(), smoke_steps.Bench.step
    monkeypatch.setattr(smoke_steps.Bench, "step", lambda *a: go_on.wait(30) and real(*a))
    place = Workspace(tmp_path / "ws").create()
    model, fresh = tiny_model_dir(tmp_path / "model"), Workspace(tmp_path / "fresh").create()
    config = runs.settings(model, data, max_steps=3)
    worker = Worker()
    plain = runs.new(fresh, config)
    assert runs.train(plain, fresh, worker) == "finished"
    engine = Engine(place, worker)
    try:
        smoke_id = engine.start_smoke(config, "me")
        with pytest.raises(lease.Busy, match="The smoke test of model"):
            engine.start_run(config, "me")
        go_on.set()
        runs.wait_for(lambda: engine.holder() is None, 60)
        report = json.loads((place.smoke / smoke_id / "report.json").read_text())
        assert report["failed"] == 0 and report["passed"] >= 17, report["summary"]
        losses = _train(engine, place, config)
        assert losses == first_losses(fresh, plain.run_id), "a smoke test's thirteen steps left no trace"
        tiny_model_dir(model, seed=1)
        other = runs.new(fresh, config)
        assert runs.train(other, fresh, worker) == "finished"
        runs.wait_for(lambda: engine.holder() is None, 60)
        engine.start_smoke(config, "me")
        runs.wait_for(lambda: engine.holder() is None, 60)
        again = _train(engine, place, config)
        assert again == first_losses(fresh, other.run_id) and again != losses, "the weights that stand on the disk now"
    finally:
        engine.shutdown(10)


def _train(engine: Engine, place: Workspace, config) -> list[float]:
    run_id = engine.start_run(config, "me")
    runs.wait_for(lambda: status(place.run(run_id)).state == "finished", 60)
    runs.wait_for(lambda: engine.holder() is None, 60)
    return first_losses(place, run_id)


def test_the_summary_has_the_peak_its_estimate_and_the_time_of_the_run(workspace, worker, data, model):
    report = smoke(workspace, worker, runs.settings(model, data))
    said = report["summary"]
    assert said.startswith(f"Passed {report['passed']} of {len(report['lines'])} in "), said
    assert "at the longest row (estimate " in said and said.endswith("Whole run: about 1 min."), said
    assert report["peak_gib"] > 0.1 and report["forecast_gib"] > 0.1
    assert smoke_steps.whole_words(24_000) == "6 h 40 min"
    assert line(report, "memory")["figure"].endswith("MiB")
