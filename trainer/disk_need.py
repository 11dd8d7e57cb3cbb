"""What a run's checkpoints need of the disk, from headers and settings alone: Start can refuse before anything is written.

One checkpoint holds the trained weights and two optimiser states of each. Torch-free; called by `trainer.launch`.
"""

from __future__ import annotations

from pathlib import Path

from trainer.checkpoint import free_bytes
from trainer.models.headers import BadHeader, TensorInfo, read_header
from trainer.refusal import Refusal
from trainer.schema import Config

LOOKED_AT_BYTES = 16 * 2**20
BYTES_A_TOKEN = 4
"""Of JSON Lines; only how many saves there will be follows from it, and only up to the number that is kept."""
TOKENIZER_BYTES = 2 * 10**7


def checkpoint_bytes(config: Config) -> int | None:
    """Bytes of one checkpoint of a run with these settings; None where the model's headers do not tell."""
    model, h = Path(config.model_path), config.hyperparams
    is_adapter = (model / "adapter_config.json").exists()
    tensors = _tensors(model)
    if not tensors:
        return None
    if h.method == "full":
        trained = sum(tensor.elements for tensor in tensors.values())
    elif is_adapter:
        trained = sum(tensor.elements for name, tensor in tensors.items() if "lora_" in name)
    else:
        trained = _adapter_elements(tensors, config.lora.r, list(config.lora.target_modules))
    pure = h.method == "full" and h.fp_precision == "bf16" and h.master_weights == "none"
    weight = 2 if pure else 4
    states = 2 if h.optimizer == "adamw_8bit" else 2 * weight
    return trained * (weight + states)


def _tensors(model: Path) -> dict[str, TensorInfo]:
    """All tensors of a folder's safetensors files; none where one cannot be read, which loading will say in its words."""
    found: dict[str, TensorInfo] = {}
    try:
        for path in sorted(model.glob("*.safetensors")):
            found |= read_header(path).tensors
    except (BadHeader, OSError):
        return {}
    return found


def _adapter_elements(tensors: dict[str, TensorInfo], rank: int, targets: list[str]) -> int:
    """Elements of LoRA matrices on the linear layers inside the blocks, or on `targets` alone."""
    total = 0
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        if module == name or len(tensor.shape) != 2 or not any(part.isdigit() for part in module.split(".")):
            continue
        if not targets or module.rsplit(".", 1)[-1] in targets:
            total += rank * sum(tensor.shape)
    return total


def steps_about(config: Config) -> int | None:
    """How many steps the run will have, about: `max_steps`, or from the size of its data; None for data that has no lines."""
    h = config.hyperparams
    if h.max_steps:
        return h.max_steps
    rows = tokens = 0.0
    for file in config.data.files:
        size = Path(file.path).stat().st_size
        with open(file.path, "rb") as handle:
            start = handle.read(LOOKED_AT_BYTES)
        if start[:1] == b"[" or not start:
            return None
        rows += (start.count(b"\n") + (start[-1:] != b"\n")) * max(1.0, size / len(start)) * file.weight
        tokens += size / BYTES_A_TOKEN * file.weight
    packs = min(rows, tokens / h.max_length) if h.packing else rows
    return max(1, int(packs * h.num_epochs / h.rows_per_step))


def checkpoints_at_once(config: Config, steps: int | None) -> int:
    """The most checkpoints that exist at one time: those kept, the best beside them, and one being written."""
    output = config.output
    most = output.save_total_limit + (config.eval.eval_strategy != "no") + 1
    if steps is None or not output.save_steps:
        return 1 if not output.save_steps else 2
    return min(most, -(-steps // output.save_steps))


def refuse_a_full_disk(config: Config, folder: Path) -> None:
    """Refusal with both figures where the disk of `folder`, which need not exist yet, cannot hold the run's checkpoints."""
    one = checkpoint_bytes(config)
    if one is None:
        return
    while not folder.exists():
        folder = folder.parent
    count = checkpoints_at_once(config, steps_about(config))
    needed, free = count * (one + TOKENIZER_BYTES * (one > TOKENIZER_BYTES)), free_bytes(folder)
    if needed <= free:
        return
    each = f"{count} of {file_size(one)} at once" if count > 1 else "one"
    cures = ["Free some"]
    if count > 2:
        cures.append("keep fewer (output.save_total_limit)")
    if config.hyperparams.method == "full":
        cures.append("use LoRA, whose checkpoints hold the adapter alone")
    raise Refusal(
        f"The disk cannot hold this run's checkpoints: they need {file_size(needed)} ({each}), {file_size(free)} is free. "
        f"Nothing was written. {', or '.join(cures)}.",
        "output.save_total_limit",
    )


def file_size(count_bytes: float) -> str:
    """Bytes of files for a person: GB is 10^9."""
    return f"{count_bytes / 1e9:.1f} GB" if count_bytes >= 1e9 else f"{count_bytes / 1e6:.1f} MB"
