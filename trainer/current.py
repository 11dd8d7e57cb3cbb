"""The current model of a workspace: which checkpoint people use, kept with its history in current.json.

Promoting and rolling back are one atomic rename of that file; no weights are copied, moved or removed, so nothing can be
lost. What it names, and what it named before, is never pruned; the run of the current one cannot be deleted. Torch-free.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainer import checkpoint
from trainer.files import read_json, write_json
from trainer.locks import changing
from trainer.refusal import Refusal
from trainer.run import RunDir

HISTORY = 50


@dataclass(frozen=True)
class Promotion:
    """One checkpoint that was made current: the run's id and folder, the step, by whom, when (seconds since 1970)."""

    run_id: str
    run_path: str
    step: int
    by: str
    at: float

    @property
    def checkpoint(self) -> Path:
        """The checkpoint's directory."""
        return checkpoint.directory_of(RunDir(Path(self.run_path)).checkpoints, self.step)

    @property
    def model(self) -> Path:
        """What from_pretrained or peft loads."""
        return self.checkpoint / checkpoint.MODEL


class Current:
    """Reads and changes `path` (current.json); safe to use from any thread and process."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def history(self) -> tuple[Promotion, ...]:
        """All promotions that count, newest first; the first is the current model. Empty before the first promotion."""
        try:
            return tuple(Promotion(**entry) for entry in read_json(self.path)["history"])
        except FileNotFoundError:
            return ()
        except (OSError, ValueError, KeyError, TypeError) as error:
            why = getattr(error, "strerror", None) or str(error)
            raise Refusal(f"{self.path.name} cannot be read ({why}). The models themselves are untouched.") from None

    def promote(self, run: RunDir, step: int, by: str) -> Promotion:
        """Make the checkpoint of `step` the current model; Refusal when any byte of it is not as it was written."""
        directory = dict(checkpoint.listed(run.checkpoints)).get(step)
        if directory is None:
            raise Refusal(f"There is no checkpoint of step {step}.")
        problems = checkpoint.verify(directory)
        if problems:
            raise Refusal(f"Step {step} is damaged ({problems[0]}), so it stays what it is: not the current model.")
        new = Promotion(run.run_id, str(run.path), step, by, time.time())
        with changing(self.path, "The current model"):
            before = self.history()
            if before and (before[0].run_id, before[0].step) == (new.run_id, new.step):
                raise Refusal(f"Step {step} of this run is the current model already.")
            if not directory.exists():  # pruned by its own run since it was read
                raise Refusal(f"The checkpoint of step {step} was just removed to make room. Nothing was changed.")
            self._write((new, *before)[:HISTORY])
        return new

    def roll_back(self) -> Promotion:
        """Go back to the model that was current before; Refusal when there is none, or it is no longer whole."""
        with changing(self.path, "The current model"):
            _, *before = self.history() or (None,)
            if not before:
                raise Refusal("No model was current before this one.")
            wanted = before[0]
            problems = checkpoint.verify(wanted.checkpoint)
            if problems:
                raise Refusal(
                    f"The model before is no longer whole (run {wanted.run_id}, step {wanted.step}: {problems[0]}). "
                    "The current one stays."
                )
            self._write(tuple(before))
        return wanted

    def steps_of(self, run_id: str) -> set[int]:
        """Steps of a run that are current or were: they are not pruned."""
        return {entry.step for entry in self.history() if entry.run_id == run_id}

    def is_of(self, run_id: str) -> bool:
        """Whether the current model is a checkpoint of this run."""
        history = self.history()
        return bool(history) and history[0].run_id == run_id

    @contextmanager
    def standing(self, run_id: str) -> Iterator[set[int]]:
        """`steps_of` a run, true until the block ends: for whoever takes away what is not current, and no more a moment later."""
        with changing(self.path, "The current model"):
            yield self.steps_of(run_id)

    def _write(self, history: tuple[Promotion, ...]) -> None:
        content: dict[str, Any] = {"history": [asdict(entry) for entry in history]}
        try:
            write_json(self.path, content)
        except OSError as error:
            raise Refusal(
                f"The current model cannot be changed: {error.strerror or error}. It stays as it was."
            ) from None
