"""The smoke test's checkpoint: saved as a run saves it, loaded back, and the same in every tensor and in the next step."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel, set_peft_model_state_dict

from trainer import checkpoint
from trainer.disk_need import file_size
from trainer.events import EventLog
from trainer.loop import optim
from trainer.loop.prepare import Model
from trainer.loop.save import Saver, Snapshot, load_optimizer, snapshot
from trainer.loop.smoke_steps import Bench
from trainer.models.load import load_model
from trainer.report import Report


def checkpoint_round_trip(report: Report, bench: Bench, folder: Path) -> None:
    """Saved and loaded again: every tensor equal, and the next step the same from the files as from memory."""
    model, stepper = bench.model, bench.model.stepper
    rows = bench.plan.micro_batches(1, bench.config.hyperparams.batch_size)[0]
    number = bench.taken + 1
    shot = snapshot(number, model.trained, stepper.named, stepper.optimizer, {"step": number, "best_step": None})
    events = EventLog(folder / "events.jsonl")
    saver = Saver(folder / "checkpoints", events, model.trained, model.tokenizer, model.loaded.base_path, keep=1)
    (folder / "checkpoints").mkdir(mode=0o700, exist_ok=True)
    saver.save(shot, set())
    saver.wait()
    events.close()
    found = checkpoint.newest_verified(folder / "checkpoints")
    size = sum(path.stat().st_size for path in found.path.rglob("*") if path.is_file())
    try:
        first = bench.step(rows, number)
        different = _load_back(found.path, shot, model)
        second = bench.step(rows, number)
    finally:
        checkpoint.remove(found.path)
    report.fact(checkpoint_bytes=size, save_s=saver.last_seconds)
    same = first == second if bench.device == "cpu" else abs(first - second) <= 1e-3 * abs(first)
    if different or not same:
        what = (
            f"tensor {different[0]} differs" if different else f"the next loss is {second:.6f} instead of {first:.6f}"
        )
        report.add("checkpoint", "problem", f"A checkpoint does not come back as it was saved: {what}.")
        return
    report.add(
        "checkpoint",
        "pass",
        f"Checkpoint saved and loaded: every tensor equal, the next step's loss the same ({first:.4f}).",
        file_size(size),
    )


def _load_back(directory: Path, shot: Snapshot, model: Model) -> list[str]:
    """Put the files' tensors into the model and the optimizer; returns the names that differ from what was saved."""
    from safetensors.torch import load_file

    trained, stepper = model.trained, model.stepper
    if isinstance(trained, PeftModel):
        weights = load_file(directory / checkpoint.MODEL / "adapter_model.safetensors")
        set_peft_model_state_dict(trained, weights)
    else:
        fresh = load_model(directory / checkpoint.MODEL, dtype=model.precision.weights, device="cpu")
        weights = fresh.model.state_dict()
        trained.load_state_dict(weights)
        from trainer.models import attention

        # loading registered another attention function under the same name: put ours back
        attention.AttentionInterface.register(attention.NAME, model.loaded.attention)
    states = load_optimizer(directory)
    optim.restore(stepper.optimizer, stepper.named, states)
    pairs = [(name, tensor, weights.get(name)) for name, tensor in shot.weights.items()]
    pairs += [(name, tensor, states.get(name)) for name, tensor in shot.optimizer.items()]
    return [name for name, mine, theirs in pairs if theirs is None or not torch.equal(mine, theirs)]
