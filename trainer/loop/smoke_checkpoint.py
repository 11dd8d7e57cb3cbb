"""The smoke test's checkpoint: saved as a run saves it, loaded back, and the same in every tensor and in the next two steps.

With it the room on the disk, and that the folder of the runs takes a file.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict

from trainer import checkpoint
from trainer.disk_need import file_size
from trainer.events import EventLog
from trainer.files import fsync_dir, make_private_dir
from trainer.loop import optim
from trainer.loop.prepare import Left, Model
from trainer.loop.save import Saver, Snapshot, load_optimizer, snapshot
from trainer.loop.smoke_steps import Bench
from trainer.models import attention
from trainer.models.load import load_model
from trainer.refusal import Refusal
from trainer.report import Report

TRIAL, PROBE = ".trial", ".signalbox-probe"
PROBE_BYTES = 1 << 16


def checkpoint_round_trip(report: Report, bench: Bench, folder: Path) -> None:
    """Saved and loaded again: every tensor equal, and the next two steps the same from the files as from memory.

    Weights and optimizer states are asked of the model and the optimizer themselves after loading; the second step is the
    first whose loss depends on the states.
    """
    model, stepper = bench.model, bench.model.stepper
    rows = bench.plan.micro_batches(1, bench.config.hyperparams.batch_size)[0]
    number = bench.taken + 1
    shot = snapshot(number, model.trained, stepper.named, stepper.optimizer, {"step": number, "best_step": None})
    with _trial(folder) as trial:
        try:
            saver = _save(shot, model, trial, bench.interrupt)
        except (OSError, Refusal) as error:
            why = getattr(error, "strerror", None) or str(error)
            report.add(
                "checkpoint",
                "problem",
                f"A checkpoint cannot be written: {why.rstrip('.')}. Nothing was changed and nothing is left behind. Make room "
                "for it, or begin with another workspace, before you start: a run could not save.",
            )
            return
        found = checkpoint.newest_verified(trial)
        size = sum(path.stat().st_size for path in found.path.rglob("*") if path.is_file())
        first = [bench.step(rows, number), bench.step(rows, number + 1)]
        _load_back(found.path, model)
        different = _different(shot, model)
        second = [bench.step(rows, number), bench.step(rows, number + 1)]
    report.fact(checkpoint_bytes=size, save_s=saver.last_seconds)
    exact = bench.device == "cpu"
    same = first == second if exact else all(abs(a - b) <= 1e-3 * abs(a) for a, b in zip(first, second, strict=True))
    if different or not same:
        at = next((n for n in (0, 1) if first[n] != second[n]), 0)
        what = (
            f"tensor {different[0]} differs"
            if different
            else f"{('the next loss', 'the loss after the next')[at]} is {second[at]:.6f} instead of {first[at]:.6f}"
        )
        report.add(
            "checkpoint",
            "problem",
            f"A checkpoint does not come back as it was saved: {what}. Nothing was changed. A run would train, but go on from a "
            "checkpoint as another run: let it go through without a stop, and report the model's family.",
        )
        return
    report.add(
        "checkpoint",
        "pass",
        f"Checkpoint saved and loaded: every tensor equal, the next two losses the same ({first[0]:.4f}, {first[1]:.4f}).",
        file_size(size),
    )


@contextmanager
def _trial(folder: Path) -> Iterator[Path]:
    """A folder for one checkpoint inside the smoke test's own, which is gone afterwards, whatever happens."""
    trial = make_private_dir(folder / TRIAL)
    try:
        yield trial
    finally:
        shutil.rmtree(trial, ignore_errors=True)


def _save(shot: Snapshot, model: Model, trial: Path, interrupt: Callable[[], bool]) -> Saver:
    """Write the checkpoint as a run does; raises Refusal where it cannot be written, Left at a stop."""
    events = EventLog(trial / "events.jsonl")
    try:
        saver = Saver(trial, events, model.trained, model.tokenizer, model.loaded.base_path, keep=1)
        saver.save(shot, set())
        saver.wait()  # files that are half written cannot be left to a thread: a stop waits for them
    finally:
        events.close()
    if interrupt():
        raise Left()
    return saver


def _load_back(directory: Path, model: Model) -> None:
    """Put the files' tensors into the model and the optimizer, as a resume does."""
    from safetensors.torch import load_file

    trained, stepper = model.trained, model.stepper
    if isinstance(trained, PeftModel):
        set_peft_model_state_dict(trained, load_file(directory / checkpoint.MODEL / "adapter_model.safetensors"))
    else:
        fresh = load_model(directory / checkpoint.MODEL, dtype=model.precision.weights, device="cpu")
        trained.load_state_dict(fresh.model.state_dict())
        # loading registered another attention function under the same name: put ours back
        attention.AttentionInterface.register(attention.NAME, model.loaded.attention)
    optim.restore(stepper.optimizer, stepper.named, load_optimizer(directory))


def _different(shot: Snapshot, model: Model) -> list[str]:
    """Names of the tensors that the model and the optimizer now hold and that are not those that were saved."""
    trained, stepper = model.trained, model.stepper
    weights = get_peft_model_state_dict(trained) if isinstance(trained, PeftModel) else trained.state_dict()
    states = optim.state_by_name(stepper.optimizer, stepper.named)
    pairs = [(name, tensor, weights.get(name)) for name, tensor in shot.weights.items()]
    pairs += [(name, tensor, states.get(name)) for name, tensor in shot.optimizer.items()]
    return [name for name, mine, theirs in pairs if theirs is None or not torch.equal(mine, theirs.cpu())]


def disk(report: Report, bench: Bench, runs: Path) -> None:
    """The folder of the runs takes a file, and has room for the most checkpoints that are there at once."""
    need, refused = most_bytes(bench), _refused(runs)
    if refused is not None:
        report.add(
            "disk",
            "problem",
            f"The folder of the runs takes no file: {refused}. What is there is untouched. Make the workspace writable, or begin "
            "with another.",
        )
        return
    free = checkpoint.free_bytes(runs)
    if free > need:
        text = f"Disk: checkpoints need up to {file_size(need)}, {file_size(free)} is free."
        report.add("disk", "pass", text, file_size(need))
        return
    report.add(
        "disk",
        "problem",
        f"The disk is too small: checkpoints need up to {file_size(need)}, {file_size(free)} is free. What is there is "
        "untouched. Make room, or keep fewer checkpoints.",
        file_size(need),
    )


def _refused(runs: Path) -> str | None:
    """Why a file cannot be written, put on the disk and removed in `runs`; None where all that works."""
    probe = runs / f"{PROBE}-{os.getpid()}"
    try:
        with open(probe, "xb") as file:
            file.write(bytes(PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
        fsync_dir(runs)
    except OSError as error:
        return error.strerror or str(error)
    finally:
        try:
            probe.unlink(missing_ok=True)
        except OSError:  # a folder that is none: nothing is there either
            pass
    return None


def most_bytes(bench: Bench) -> int:
    """Bytes of the most checkpoints that exist at once: those kept, the best, and one being written."""
    stepper, trained = bench.model.stepper, bench.model.trained
    whole = trained.parameters() if not isinstance(trained, PeftModel) else [p for _, p in stepper.named]
    weights = sum(parameter.nbytes for parameter in whole)
    states = sum(state.nbytes for state in optim.state_by_name(stepper.optimizer, stepper.named).values())
    return (weights + states) * (bench.config.output.save_total_limit + 2)
