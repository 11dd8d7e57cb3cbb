"""Stopped at any step and resumed: the rest of the curve and the final weights are those of the unbroken run, bit for bit."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest

from tests import runs
from tests.lives import assert_same, curve, one_life
from tests.tiny import tiny_model_dir
from trainer import checkpoint
from trainer.metrics import ROW_RECORD
from trainer.run import RunDir, status
from trainer.schema import Config
from trainer.worker import Worker
from trainer.workspace import Workspace


@dataclass(frozen=True)
class Case:
    """One way to train; the dropout of a full training is the model's own, of LoRA that of its matrices."""

    method: str
    dropout: float
    accumulation: int  # of 2 rows each: 1 and 4 divide an epoch of 8 rows, 3 leaves a smaller last step
    epochs: int
    packing: bool
    checkpointing: bool

    @property
    def name(self) -> str:
        """For the test's id."""
        flags = f"{'packed' * self.packing}{' recomputed' * self.checkpointing}".strip() or "plain"
        return f"{self.method}-dropout {self.dropout}-x{self.accumulation}-{self.epochs} epochs-{flags}"


AXES = (("full", "lora"), (0.0, 0.1), (1, 4, 3), (1, 2, 3), (False, True), (False, True))
ALL = [Case(*values) for values in product(*AXES)]


def pairs(case: Case) -> set[tuple[int, object, int, object]]:
    """Every two of the case's values with their axes."""
    return {(a, x, b, y) for (a, x), (b, y) in combinations(enumerate(astuple(case)), 2)}


def covering() -> list[Case]:
    """Few and short cases in which every pair of values of two axes stands (greedy, the same each time)."""
    wanted = set().union(*(pairs(case) for case in ALL))
    chosen: list[Case] = []
    while wanted:
        best = max(ALL, key=lambda case: (len(pairs(case) & wanted), -case.epochs / case.accumulation))
        chosen.append(best)
        wanted -= pairs(best)
    return chosen


COVERING = covering()


@dataclass(frozen=True)
class Place:
    """A workspace, a worker, and models and data by what a case needs of them."""

    workspace: Workspace
    worker: Worker
    models: dict[float, Path]
    root: Path

    def config(self, case: Case, rows: int = 8) -> Config:
        """The settings of `case` on `rows` rows (on twice as many with packing: two go into a pack)."""
        data = self.root / f"{rows * (1 + case.packing)}.jsonl"
        if not data.exists():
            runs.write_rows(data, rows * (1 + case.packing))
        full = case.method == "full"
        return runs.settings(
            self.models[case.dropout if full else 0.0],
            data,
            method=case.method,
            gradient_accumulation=case.accumulation,
            num_epochs=case.epochs,
            max_steps=None,
            packing=case.packing,
            max_length=192,
            use_gradient_checkpointing=case.checkpointing,
            lora={"r": 4, "dropout": 0.0 if full else case.dropout, "target_modules": ["q_proj", "down_proj"]},
            eval={"eval_strategy": "no"},
        )

    def life(self, run: RunDir, **when: object) -> str:
        """One life of `run`, ended as `when` says."""
        return one_life(run, self.workspace, self.worker, **when)  # type: ignore[arg-type]

    def whole(self, config: Config) -> RunDir:
        """The unbroken run."""
        run = runs.new(self.workspace, config)
        assert self.life(run) == "finished"
        return run


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    root = tmp_path_factory.mktemp("resume")
    models = {0.0: tiny_model_dir(root / "qwen3", hidden=32, layers=1)}
    # GPT-2 drops embeddings, attention and residuals itself
    models[0.1] = tiny_model_dir(root / "gpt2", "gpt2", hidden=32, layers=1)
    assert json.loads((models[0.1] / "config.json").read_text())["resid_pdrop"] == 0.1
    made = Place(Workspace(root / "ws").create(), Worker(), models, root)
    made.whole(made.config(COVERING[0]))
    # each life collects garbage: what the imports left behind need not be looked through every time
    gc.collect()
    gc.freeze()
    yield made
    gc.unfreeze()
    made.worker.close()


def stop_everywhere(place: Place, case: Case, rows: int) -> int:
    """Compare a run stopped at step k with the unbroken one, for every k; returns how many were stopped."""
    config = place.config(case, rows)
    whole = place.whole(config)
    total = len(curve(whole))
    for k in range(1, total + 1):
        broken = runs.new(place.workspace, config)
        ended = place.life(broken, at=k)
        assert ended == ("stopped" if k < total else "finished"), (k, status(broken).cause)
        assert checkpoint.newest_verified(broken.checkpoints).step == k
        if k < total:
            assert np.array_equal(curve(broken), curve(whole)[:k])
            assert place.life(broken) == "finished", status(broken).cause
        assert_same(broken, whole, f"{case.name}, stopped at {k} of {total}")
        lives = np.fromfile(broken.rows, ROW_RECORD)
        assert set(lives["step"][lives["life"] == 2]) == set(range(k + 1, total + 1)), "no step is trained twice"
    return total


def test_every_pair_of_settings_stands_in_the_covering_set() -> None:
    assert len(ALL) == 144 and set().union(*map(pairs, COVERING)) == set().union(*map(pairs, ALL))
    assert len(COVERING) <= 12


@pytest.mark.parametrize("case", COVERING, ids=lambda case: case.name)
def test_stopped_at_every_step_and_resumed_is_the_unbroken_run(place: Place, case: Case) -> None:
    assert stop_everywhere(place, case, rows=8) >= 1


@pytest.mark.slow
@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
def test_every_setting_stopped_at_every_step_and_resumed_is_the_unbroken_run(place: Place, case: Case) -> None:
    stopped = stop_everywhere(place, case, rows=16)
    print(f"stop steps: {stopped}")
