"""The disk that checkpoints need: the figure is that of a real run, and Start and the last save refuse with both figures."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import runs
from tests.kill_loop import WorkerHere
from tests.tiny import tiny_adapter_dir, tiny_model_dir
from trainer import checkpoint, disk_need
from trainer.cli import main
from trainer.disk_need import checkpoint_bytes, checkpoints_at_once, steps_about
from trainer.engine import Engine
from trainer.events import all_events
from trainer.refusal import Refusal
from trainer.run import status
from trainer.worker import Worker
from trainer.workspace import Workspace


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("disk")
    return tiny_model_dir(root / "model"), runs.write_rows(root / "rows.jsonl")


@pytest.mark.parametrize(
    "method", [dict(method="full"), dict(method="lora"), dict(method="lora", lora={"r": 4, "target_modules": ["q_proj"]})]
)  # fmt: skip
def test_the_figure_is_that_of_a_real_checkpoint(place: tuple[Path, Path], tmp_path: Path, method: dict) -> None:
    workspace = Workspace(tmp_path / "ws").create()
    config = runs.settings(*place, max_steps=1, eval={"eval_strategy": "no"}, **method)
    run = runs.new(workspace, config)
    assert runs.train(run, workspace, WorkerHere()) == "finished"  # type: ignore[arg-type]
    newest = checkpoint.newest_verified(run.checkpoints).path
    real = sum(path.stat().st_size for path in newest.rglob("*.safetensors"))
    wanted = checkpoint_bytes(config)
    assert wanted is not None and 0 <= real - wanted < 20_000, (wanted, real)  # but for the headers of the files


def test_an_adapter_trained_on_needs_what_it_holds(place: tuple[Path, Path], tmp_path: Path) -> None:
    adapter = tiny_adapter_dir(tmp_path / "adapter", place[0])
    config = runs.settings(adapter, place[1], method="lora")
    size = (adapter / "adapter_model.safetensors").stat().st_size
    assert 0.6 * 3 * size < (checkpoint_bytes(config) or 0) <= 3 * size


def test_how_many_there_are_at_once(place: tuple[Path, Path]) -> None:
    def at_once(steps: int | None, **output: int) -> int:
        config = runs.settings(*place, eval={"eval_strategy": "steps"}, output=output)
        return checkpoints_at_once(config, steps)

    assert at_once(1000, save_steps=10, save_total_limit=3) == 5  # three, the best, one being written
    assert at_once(15, save_steps=10, save_total_limit=3) == 2
    assert at_once(5, save_steps=10, save_total_limit=3) == 1
    assert at_once(None, save_steps=10, save_total_limit=3) == 2


def test_steps_are_the_plans_to_a_few(place: tuple[Path, Path], tmp_path: Path) -> None:
    config = runs.settings(*place, max_steps=None, num_epochs=2)
    assert steps_about(config) == 60 * 2 // 4
    (tmp_path / "list.json").write_text('[{"messages": []}]')
    assert steps_about(runs.settings(place[0], tmp_path / "list.json", max_steps=None)) is None
    assert steps_about(runs.settings(*place, max_steps=7)) == 7


def test_the_engine_refuses_at_start_with_both_figures_and_writes_nothing(
    place: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    engine = Engine(Workspace(tmp_path / "ws").create(), Worker())
    config = runs.settings(*place, max_steps=30, output={"save_steps": 10, "save_total_limit": 2})
    one = checkpoint_bytes(config)
    assert one is not None
    monkeypatch.setattr(disk_need, "free_bytes", lambda path: 3 * one - 1)
    try:
        with pytest.raises(
            Refusal, match=r"need 3\.6 MB \(3 of 1\.2 MB at once\), 3\.6 MB is free\. Nothing was written"
        ):
            engine.start_run(config, "me")
        assert engine.workspace.list_runs() == [] and not list(engine.workspace.runs.iterdir())
        assert engine.holder() is None, "the device is free again"
        lora = runs.settings(*place, max_steps=30, method="lora", output={"save_steps": 10, "save_total_limit": 2})
        disk_need.refuse_a_full_disk(lora, engine.workspace.runs)  # an adapter fits
    finally:
        engine.shutdown(10)


def test_the_command_line_refuses_with_exit_2_and_makes_no_folder(
    place: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(disk_need, "free_bytes", lambda path: 1000)
    command = ["train", "--workspace", str(tmp_path / "ws"), "--output", str(tmp_path / "deep" / "run")]
    command += ["--model", str(place[0]), "--dataset", str(place[1]), "--max-steps", "3"]
    with pytest.raises(SystemExit) as ended:
        raise SystemExit(main(command))
    said = capsys.readouterr()
    assert ended.value.code == 2 and "0.0 MB is free" in said.err and "Traceback" not in said.err
    assert not (tmp_path / "deep").exists()


def test_a_last_save_that_does_not_fit_ends_the_run_in_words_and_keeps_the_checkpoints(
    place: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = Workspace(tmp_path / "ws").create()
    config = runs.settings(*place, max_steps=6, output={"save_steps": 2}, eval={"eval_strategy": "no"})
    run = runs.new(workspace, config)
    real = checkpoint.free_bytes
    monkeypatch.setattr(
        checkpoint, "free_bytes", lambda path: 1000 if checkpoint.listed(run.checkpoints) else real(path)
    )
    assert runs.train(run, workspace, WorkerHere()) == "failed"  # type: ignore[arg-type]
    cause = status(run).cause or ""
    assert "needs 0.0 GB" not in cause and "MB" in cause and "is free" in cause, cause
    assert checkpoint.newest_verified(run.checkpoints).step == 2
    monkeypatch.undo()
    assert runs.train(run, workspace, WorkerHere()) == "finished"  # type: ignore[arg-type]
    assert [event["kind"] for event in all_events(run.events)][-1] == "finished"
