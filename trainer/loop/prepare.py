"""Everything between a run's settings and its first step: tokens, model, optimizer, plan, and the proof of the loss path."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from trainer.data.conversation import printable
from trainer.data.loader import BadRow, MicroBatch, assemble, read_row
from trainer.data.packing import Plan, make_plan, split
from trainer.data.tokens import TokenCache, load_tokenizer
from trainer.files import make_private_dir
from trainer.launch import Prompt, approximations, fingerprint
from trainer.loop.evaluate import micro_groups
from trainer.loop.forward import Choice, choose_path, losses
from trainer.loop.step import Stepper
from trainer.loop.team import ALONE, Team
from trainer.models.activations import recompute
from trainer.models.load import DTYPES, Loaded, is_adapter, load_model, refuse_non_finite
from trainer.models.lora import add_lora, continue_lora, has_stacked_experts, targets_line
from trainer.packages import check_packages
from trainer.refusal import Refusal
from trainer.schema import Config
from trainer.worker import Cancelled, Worker

Say = Callable[[str], None]
TOKENISE_LIMIT_S = 6 * 3600.0


class Left(Exception):
    """Preparation was left because a stop was asked for."""


@dataclass(frozen=True)
class Precision:
    """Formats of a run: the stored weights, the matrix products, and autocast where the two differ."""

    weights: torch.dtype
    compute: torch.dtype
    autocast: torch.dtype | None
    fp16: bool
    name: str


@dataclass(frozen=True)
class Tokens:
    """The token cache of the training rows, that of the held-out rows, and where each training row came from."""

    cache: TokenCache
    held_out: TokenCache
    held_out_rows: np.ndarray
    trained_rows: np.ndarray
    row_weights: np.ndarray


@dataclass(frozen=True)
class Model:
    """The model, what of it is trained (itself or its adapter), its tokenizer, and the steps it takes."""

    loaded: Loaded
    trained: nn.Module
    tokenizer: Any
    precision: Precision
    choice: Choice
    stepper: Stepper


def pick_device(machine_device: str, rank: int = 0) -> str:
    """The torch device for the machine's device name, the `rank`th of several; Refusal when it cannot be used after all."""
    if machine_device == "cpu":
        return "cpu"
    # the driver's numbering, which the lock and the telemetry use; torch's own puts the fastest card first
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    if not torch.cuda.is_available():
        raise Refusal(
            "The GPU is there, but torch cannot use it (driver too old or device busy). "
            "`python -m torch.utils.collect_env` says more."
        )
    return f"cuda:{rank}"


def pick_precision(config: Config, device: str) -> Precision:
    """Formats for these settings on this device. A frozen base (LoRA) needs no fp32 copy: nothing is added to it."""
    wanted = config.hyperparams.fp_precision
    cuda = device.startswith("cuda")
    if wanted == "auto":
        wanted = ("bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16") if cuda else "fp32"
    compute = DTYPES[wanted]
    if wanted == "fp32":
        return Precision(torch.float32, compute, None, False, "fp32")
    # LoRA's own matrices are few and stay fp32 with their states, whatever is chosen for whole models
    pure = config.hyperparams.master_weights == "none" and config.hyperparams.method == "full"
    if wanted == "bf16" and pure:
        return Precision(compute, compute, None, False, "pure bf16, approximate")
    base = compute if config.hyperparams.method != "full" else torch.float32
    return Precision(base, compute, compute, wanted == "fp16", f"{wanted} with fp32 master weights")


def tokenise(
    config: Config,
    prompt: Prompt,
    model_path: Path,
    roots: tuple[Path, Path],
    worker: Worker,
    interrupt: Callable[[], bool],
    progress: Callable[[int, int], None],
    files: list[str],
) -> TokenCache:
    """The token cache of `files`, built by the worker unless it is there already. `roots` = (token caches, users' profiles)."""
    request = {
        "files": files,
        "model_path": str(model_path),
        "profile": prompt.profile,
        "system_prompt": config.profile.system_prompt,
        "date": prompt.date,
        "max_length": config.hyperparams.max_length,
        "too_long": config.data.too_long,
        "chat_template": config.data.chat_template,
        "columns": list(config.data.columns),
        "profiles_root": str(roots[1]),
    }
    try:
        made = worker.call(
            "tokenise",
            timeout_s=TOKENISE_LIMIT_S,
            on_progress=progress,
            cancelled=interrupt,
            request=request,
            root=str(roots[0]),
        )
    except Cancelled:
        raise Left() from None
    return TokenCache.open(Path(made["cache"]))


def safetensors_folder(path: Path, root: Path, worker: Worker, say: Say) -> Path:
    """`path` itself, or for pickle weights its conversion in `root`, made once by the worker: nothing here unpickles."""
    files = [file.name for file in path.iterdir()]
    if any(name.endswith(".safetensors") for name in files) or not any(name.endswith(".bin") for name in files):
        return path
    target = root / fingerprint(path)
    if not target.exists():
        say(
            f"{path.name} holds pickle weights: converting them to safetensors first. The folder itself is not changed."
        )
        make_private_dir(root)
        worker.call("convert", timeout_s=TOKENISE_LIMIT_S, path=str(path), out=str(target))
    return target


def all_tokens(
    config: Config,
    prompt: Prompt,
    roots: tuple[Path, Path],
    worker: Worker,
    interrupt: Callable[[], bool] = lambda: False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Tokens:
    """The tokens of the training files and of the held-out file, if there is one, parted into trained and held out."""

    def cached(files: list[str]) -> TokenCache:
        return tokenise(config, prompt, Path(config.model_path), roots, worker, interrupt, progress, files)

    cache = cached([file.path for file in config.data.files])
    held_out = cached([config.data.validation_dataset_path]) if has_held_out_file(config) else None
    return split_rows(config, cache, held_out)


def has_held_out_file(config: Config) -> bool:
    """Whether held-out loss is measured on a file of its own."""
    return bool(config.data.validation_dataset_path) and config.eval.eval_strategy != "no"


def split_rows(config: Config, cache: TokenCache, held_out: TokenCache | None) -> Tokens:
    """Decide which rows are trained and which are held out, and how often each trained row is seen."""
    share = 0.0 if held_out is not None or config.eval.eval_strategy == "no" else config.data.validation_split
    rows = len(cache.lengths)
    trained, kept = split(rows, share, config.data.validation_max_rows, config.data.seed)
    if len(trained) == 0:
        raise Refusal("There is no row to train on.", "data.dataset_path")
    if held_out is not None:
        kept = np.arange(min(len(held_out.lengths), config.data.validation_max_rows))
    weights = np.array([file.weight for file in config.data.files])[np.asarray(cache.source)[trained, 0]]
    return Tokens(cache, held_out or cache, kept, trained, weights)


def held_out_groups(config: Config, tokens: Tokens) -> list[np.ndarray]:
    """The held-out rows as micro-batches; none where held-out loss is not measured."""
    if config.eval.eval_strategy == "no" or len(tokens.held_out_rows) == 0:
        return []
    return micro_groups(tokens.held_out_rows, np.asarray(tokens.held_out.lengths), config.hyperparams.max_length * 2)


def plan_of(config: Config, tokens: Tokens) -> Plan:
    """The plan of all epochs."""
    h = config.hyperparams
    return make_plan(
        np.asarray(tokens.cache.lengths),
        tokens.trained_rows,
        tokens.held_out_rows,
        tokens.row_weights,
        seed=config.data.seed,
        epochs=h.num_epochs,
        max_steps=h.max_steps,
        packs_per_step=h.rows_per_step,
        capacity=h.max_length if h.packing else None,
    )


def build_model(
    config: Config,
    path: Path,
    cache: TokenCache,
    device: str,
    machine_name: str,
    say: Say,
    *,
    resume_from: Path | None = None,
    team: Team = ALONE,
) -> Model:
    """Load, add LoRA, switch checkpointing, build the optimizer, and prove the loss path on two short real rows.

    `resume_from` is a checkpoint's model directory; its weights are taken as they are. Says what scripts look for in the log.
    """
    h = config.hyperparams
    precision = pick_precision(config, device)
    quantised = h.method == "qlora"
    check_packages(config)
    source = resume_from if resume_from is not None else path
    loaded = load_model(source, dtype=precision.weights, device=device, quantise=quantised)
    say(
        f"Model loaded: {config.display_name}, {loaded.model.num_parameters() / 1e6:.1f} M weights, "
        f"{precision.name}, on {machine_name}."
    )
    refuse_foreign_ids(loaded, cache, source)
    if quantised:
        say_four_bits(loaded, device, say)
    trained = _what_is_trained(config, loaded, source, resumed=resume_from is not None, say=say)
    refuse_nothing_trainable(trained, h.method)
    for what in approximations(config.model_dump(), device != "cpu"):
        say(f"Approximate: {what}. Small updates can round to nothing; the curve is not that of exact weights.")
    if h.use_gradient_checkpointing:
        recompute(loaded.model, h.gradient_checkpointing_policy)
        say(f"Gradient checkpointing enabled ({h.gradient_checkpointing_policy}).")
    else:
        say("Gradient checkpointing off.")
    trained.train()
    embeddings: Any = loaded.model.get_input_embeddings()
    probe = _short_rows(cache, device, embeddings.weight.shape[0])
    choice = choose_path(loaded.model, probe, compute=precision.compute, autocast=precision.autocast)
    say_attention(loaded, choice, probe, say)
    if h.compile:
        compile_layers(loaded, say)
    stepper = Stepper(
        loaded,
        trained,
        choice.path,
        device=device,
        max_grad_norm=h.max_grad_norm,
        weight_decay=h.weight_decay,
        optimizer=h.optimizer,
        seed=config.data.seed,
        fp16=precision.fp16,
        team=team,
    )
    count = sum(parameter.numel() for _, parameter in stepper.named)
    say(f"Training {count / 1e6:.2f} M of {loaded.model.num_parameters() / 1e6:.1f} M weights ({h.method}).")
    return Model(loaded, trained, load_tokenizer(source), precision, choice, stepper)


def refuse_foreign_ids(loaded: Loaded, cache: TokenCache, source: Path) -> None:
    """Raise Refusal where a token of the data has no row in the model's embedding."""
    embedding: Any = loaded.model.get_input_embeddings()
    rows, largest = embedding.weight.shape[0], cache.meta["largest_id"]
    if largest >= rows:
        name = printable(str(load_tokenizer(source).convert_ids_to_tokens(largest)), 40)
        raise Refusal(
            f"The data has the token {largest:,} ('{name}'), but the model's vocabulary ends at {rows - 1:,}. "
            "Its tokenizer belongs to another model: download the folder again.",
            "model_path",
        )


def refuse_nothing_trainable(trained: nn.Module, method: str) -> None:
    """Raise Refusal where no parameter asks for a gradient: such a run would change nothing."""
    if not any(parameter.requires_grad and parameter.numel() for parameter in trained.parameters()):
        what = "adapter" if method != "full" else "model"
        raise Refusal(
            f"The {what} has no trainable parameters: a run would change nothing. No file was touched. Check lora.r and "
            "lora.target_modules, or use full training.",
            "hyperparams.method",
        )


def _what_is_trained(config: Config, loaded: Loaded, source: Path, *, resumed: bool, say: Say) -> nn.Module:
    """The model itself, or an adapter on it: a new one, or the one in `source`."""
    if config.hyperparams.method == "full":
        return loaded.model
    if is_adapter(source):
        if not resumed:
            say("The adapter is trained on as it is: its own rank, alpha and targets, not those of the settings.")
        trained = continue_lora(loaded.model, source)
        refuse_non_finite(trained, "adapter")
    else:
        trained = add_lora(
            loaded.model,
            rank=config.lora.r,
            alpha=config.lora.alpha,
            dropout=config.lora.dropout,
            targets=list(config.lora.target_modules),
            seed=config.data.seed,
        )
    say(targets_line(trained))
    return trained


def say_four_bits(loaded: Loaded, device: str, say: Say) -> None:
    """The log's word on what is in 4 bits, what is not, and that a processor is slow at it."""
    layers = sum(type(module).__name__ == "Linear4bit" for module in loaded.model.modules())
    slow = " On a processor this saves memory and is slow." if device == "cpu" else ""
    say(f"QLoRA: {layers} linear layers in 4 bits (NF4, double quantisation); embeddings and head as they are.{slow}")
    if has_stacked_experts(loaded.model):
        say("QLoRA: the experts are no linear layers and stay as wide as they are.")


def say_attention(loaded: Loaded, choice: Choice, probe: MicroBatch, say: Say) -> None:
    """The log's word on the attention kernel, seen in one pass as training makes it, and on what was passed over."""
    loaded.attention.calls.clear()
    with torch.no_grad():
        losses(loaded.model, probe, choice.path)
    called = set(loaded.attention.calls)
    if choice.path.way == "one row at a time":
        say("Flash Attention: not used, one row at a time through the model's own attention.")
    elif not called:
        say("Flash Attention: not used; the model's own attention, inside each row.")
    elif called <= {"sdpa per document"}:
        reason = "no GPU" if not probe.ids.is_cuda else "this GPU, this torch or this precision has none"
        say(f"Flash Attention: not available ({reason}); exact attention inside each row instead.")
    else:
        say(f"Flash Attention: {', '.join(sorted(called))}, inside each row.")
    for way, reason in choice.passed_over:
        say(f"Loss path '{way}' passed over: {reason}.")
    if choice.path.router is not None:
        say(
            f"Router loss is added: coefficient {choice.path.router:g}, each row's own, weighted by tokens. "
            "The curve shows the loss of the labels alone."
        )
    say(f"Loss path: {choice.path.way}; on two rows it is the model's own loss to {choice.difference:.1e}.")


def compile_layers(loaded: Loaded, say: Say) -> None:
    """Compile each block on its own: the same code serves all of them, and shapes may change."""
    blocks = next((m for _, m in loaded.model.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 0), None)
    if blocks is None:
        raise Refusal("This model has no list of layers to compile. Switch Compile off.", "hyperparams.compile")
    for block in blocks:
        block.compile(dynamic=True)
    say(f"Compile: {len(blocks)} layers; the first step takes longer.")


def _short_rows(cache: TokenCache, device: str, vocabulary: int) -> MicroBatch:
    """The two shortest rows of at least 16 tokens (or the longest two) that can be read, as one micro-batch."""
    lengths = np.asarray(cache.lengths)
    order = np.argsort(lengths, kind="stable")
    enough = order[lengths[order] >= 16]
    found: list[int] = []
    for row in enough if len(enough) >= 2 else order[::-1]:
        try:
            read_row(cache, int(row), vocabulary)
        except BadRow:  # the step that comes to it says so, or leaves it out
            continue
        found.append(int(row))
        if len(found) == 2:
            break
    if not found:
        raise Refusal(f"No row of the token cache {cache.path.name} can be read. Delete that folder in cache/tokens.")
    return assemble(cache, np.array(found), device)
