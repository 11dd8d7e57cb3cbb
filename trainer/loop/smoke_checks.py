"""The single checks of the smoke test; each adds one line to the report, with its figure."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel, set_peft_model_state_dict

import profiles
from trainer import checkpoint
from trainer.data.loader import assemble
from trainer.data.packing import Plan
from trainer.data.tokens import TokenCache
from trainer.disk_need import file_size
from trainer.events import EventLog
from trainer.launch import Prompt
from trainer.loop import optim
from trainer.loop.forward import losses
from trainer.loop.prepare import Left, Model, Tokens
from trainer.loop.sample import answer
from trainer.loop.sampler import default_questions, messages_as_trained
from trainer.loop.save import Saver, Snapshot, load_optimizer, snapshot
from trainer.machine import GIB
from trainer.models import activations
from trainer.models.load import load_model
from trainer.refusal import Refusal
from trainer.report import Report
from trainer.schema import Config
from trainer.worker import Worker

LONGEST_STEPS, REPEATED_STEPS = 3, 8
MUST_FALL = 0.005  # of the first loss of a repeated batch
MAY_RISE = 1.2


class Bench:
    """Takes real optimiser steps at the full rate and keeps what they showed."""

    def __init__(
        self,
        config: Config,
        model: Model,
        tokens: Tokens,
        plan: Plan,
        device: str,
        report: Report,
        interrupt: Callable[[], bool],
    ) -> None:
        self.config, self.model, self.tokens, self.plan, self.device, self.interrupt = (
            config,
            model,
            tokens,
            plan,
            device,
            interrupt,
        )
        self.rate = config.hyperparams.learning_rate
        self.taken = 0
        self.seconds: list[float] = []
        self.tokens_done: list[int] = []
        self.peak_gib = 0.0
        self.first_loss = float("nan")

    def step(self, rows: np.ndarray, number: int | None = None) -> float:
        """One optimiser step on one micro-batch; returns its loss. Raises Left when a stop was asked for."""
        if self.interrupt():
            raise Left()
        record = self.model.stepper.step(number or self.taken + 1, [rows], self.tokens.cache, self.rate)
        assert record is not None
        loss, _, bad, _ = record.arrive()
        if self.taken == 0:
            self.first_loss = loss
        self.taken += 1
        self.seconds.append(sum(record.marks.seconds()) + record.data_s)
        self.tokens_done.append(record.tokens)
        if self.device.startswith("cuda"):
            self.peak_gib = torch.cuda.max_memory_allocated() / GIB
        return float("nan") if bad else loss


def data(report: Report, cache: TokenCache, plan: Plan) -> None:
    """There are rows, they have labels, and a plan of steps came out."""
    meta = cache.meta
    share = 100 * meta["labels"] / max(1, meta["tokens"])
    text = (
        f"Data: {meta['rows']:,} rows, {meta['tokens']:,} tokens, {share:.0f} % answer tokens; "
        f"{plan.total_steps:,} steps planned."
    )
    report.add("data", "pass", text, f"{share:.0f} %")
    unseen = meta["rows_skipped"] + meta["rows_dropped"] + meta["rows_without_labels"]
    if unseen:
        report.add(
            "rows_left_out",
            "problem" if unseen > meta["rows"] else "pass",
            f"{unseen:,} rows are left out: {meta['rows_skipped']:,} with problems, {meta['rows_dropped']:,} too long, "
            f"{meta['rows_without_labels']:,} without an answer inside the maximum length.",
            f"{unseen:,}",
        )


def prompt_in_tokens(
    report: Report, config: Config, prompt: Prompt, tokens: Tokens, worker: Worker, user_profiles: Path
) -> None:
    """The system prompt stands in the tokens of a real row, decoded from what will be trained."""
    from trainer.data.tokens import load_tokenizer

    row = int(tokens.trained_rows[0])
    files = [file.path for file in config.data.files]
    file, line, index, piece = tokens.cache.place(row)
    if piece is not None:
        _text_in_tokens(report, tokens.cache, row)
        return
    messages = messages_as_trained(config, prompt, worker, user_profiles, files[file], index)
    system = next((message["content"] for message in messages if message["role"] == "system"), "")
    if not system.strip():
        report.add("prompt", "pass", "No system prompt is set and the rows have none; the model sees none.")
        return
    text = load_tokenizer(Path(config.model_path)).decode(tokens.cache.ids(row).tolist())
    if system.strip() in text:
        report.add("prompt", "pass", f"The system prompt is in the tokens of the row in line {line:,}.")
    else:
        report.add(
            "prompt",
            "problem",
            "The model does not see your prompt. The chat template drops or changes the system message.",
        )


def _text_in_tokens(report: Report, cache: TokenCache, row: int) -> None:
    """A plain text has no prompt; every token of it but the first must be a label."""
    labels = np.asarray(cache.labels(row))
    if labels[1:].all() and not labels[0]:
        report.add("prompt", "pass", "The first row is plain text: no prompt, every token but the first is trained.")
    else:
        report.add("prompt", "problem", "Tokens of a plain text are left out of training.")


def finite_weights(report: Report, model: Model) -> None:
    """Loading refuses NaN and infinity by the tensor's name, so a model that is here has none."""
    report.add("weights", "pass", f"Model loaded, every weight finite; {model.precision.name}.")


def loss_path(report: Report, model: Model) -> None:
    """Our loss is the model's own."""
    choice = model.choice
    slower = (
        f" Faster ways passed over: {'; '.join(reason for _, reason in choice.passed_over)}."
        if choice.passed_over
        else ""
    )
    report.add(
        "loss",
        "pass",
        f"Our loss equals the model's own on two rows ({choice.path.way}).{slower}",
        f"{choice.difference:.1e}",
    )


def saved_bytes(bench_model: Model, batch: Any) -> int:
    """Bytes of activations that the forward pass of `batch` keeps for the backward pass."""
    total = 0
    own = {parameter.data_ptr() for parameter in bench_model.loaded.model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal total
        if tensor.data_ptr() not in own:
            total += tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses(bench_model.loaded.model, batch, bench_model.choice.path).sum()
    return total


def checkpointing(report: Report, config: Config, model: Model, tokens: Tokens) -> None:
    """Gradient checkpointing is really on (or off): seen in the activations kept by one forward pass, both ways."""
    lengths = np.asarray(tokens.cache.lengths)[tokens.trained_rows]
    row = tokens.trained_rows[np.argsort(lengths, kind="stable")[len(lengths) // 2]]
    batch = assemble(tokens.cache, np.array([row]), model.stepper.device)
    wanted = config.hyperparams.use_gradient_checkpointing
    as_set = saved_bytes(model, batch)
    inner = model.loaded.model
    if wanted:
        activations.keep(inner)
        plain = saved_bytes(model, batch)
        activations.recompute(inner, config.hyperparams.gradient_checkpointing_policy)
        text = (
            f"Gradient checkpointing is on: one row keeps {as_set / 2**20:.1f} MiB of activations "
            f"instead of {plain / 2**20:.1f}."
        )
        report.add(
            "checkpointing",
            "pass" if as_set < 0.9 * plain else "problem",
            text
            if as_set < 0.9 * plain
            else "Gradient checkpointing is set, but as many activations are kept as without it.",
            f"{as_set / max(1, plain):.0%}",
        )
        return
    on = activations.recomputes(inner)
    report.add(
        "checkpointing",
        "problem" if on else "pass",
        f"Gradient checkpointing is off, as set: one row keeps {as_set / 2**20:.1f} MiB of activations.",
    )


def heaviest(plan: Plan, lengths: np.ndarray, size: int) -> list[np.ndarray]:
    """Micro-batches of `size` packs (rows, unpacked), made of the longest of the plan, the heaviest first."""
    starts = plan.pack_starts
    tokens = np.add.reduceat(lengths[plan.rows], starts[:-1])
    _, first_of_each = np.unique(plan.rows[starts[:-1]], return_index=True)  # later epochs bring the same rows again
    order = first_of_each[np.argsort(-tokens[first_of_each], kind="stable")]
    packs = [plan.rows[starts[pack] : starts[pack + 1]] for pack in order[: LONGEST_STEPS * size]]
    return [np.concatenate(packs[at : at + size]) for at in range(0, len(packs), size)]


def longest_rows(report: Report, bench: Bench) -> None:
    """Steps on the longest rows of the data first: what fits them fits the run."""
    size = bench.config.hyperparams.batch_size
    groups = heaviest(bench.plan, np.asarray(bench.tokens.cache.lengths), size)[:LONGEST_STEPS]
    found = []
    if bench.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    for rows in groups:
        found.append(bench.step(rows))
    if not np.all(np.isfinite(found)):
        _diverged(bench)
    longest = int(np.asarray(bench.tokens.cache.lengths)[groups[0]].max())
    if bench.device.startswith("cuda"):
        report.add(
            "memory",
            "pass",
            f"Peak memory {bench.peak_gib:.1f} GiB at the longest rows ({longest:,} tokens, micro-batch {size}).",
            f"{bench.peak_gib:.1f} GiB",
        )
        report.fact(peak_gib=bench.peak_gib)
    else:
        report.add(
            "memory",
            "not_possible",
            f"Device memory: not possible on a CPU. The longest rows ({longest:,} tokens) trained.",
        )
    report.add(
        "steps",
        "pass",
        f"{len(found)} optimiser steps on the longest rows: loss {found[0]:.3f} to {found[-1]:.3f}, all finite.",
    )


def loss_falls(report: Report, bench: Bench) -> None:
    """One typical batch, trained again and again at the chosen rate, is learnt; a rate too high shows here."""
    rows = bench.plan.micro_batches(1, bench.config.hyperparams.batch_size)[0]
    found = [bench.step(rows) for _ in range(REPEATED_STEPS)]
    # the steps before may have ruined the weights already: what counts is the loss that the model came with
    start = min(found[0], bench.first_loss)
    if not np.all(np.isfinite(found)) or found[-1] > MAY_RISE * start:
        last = found[-1] if np.isfinite(found[-1]) else "NaN"
        report.add(
            "learns",
            "problem",
            f"The rate {bench.rate:.2g} is too high: the loss went from {start:.3f} to "
            + (f"{last:.3f}" if not isinstance(last, str) else last)
            + f" in {bench.taken} steps. Try a tenth of it.",
        )
        raise Refusal("The remaining checks were left out: weights that diverge prove nothing.")
    fall = 1 - found[-1] / found[0]
    text = (
        f"The loss of one batch trained {REPEATED_STEPS} times went from {found[0]:.3f} to {found[-1]:.3f} "
        f"(at least {MUST_FALL:.1%} lower is needed)."
    )
    report.add("learns", "pass" if fall >= MUST_FALL else "problem", text, f"−{fall:.1%}")


def _diverged(bench: Bench) -> None:
    raise Refusal(
        f"The loss became NaN or infinite on the longest rows at the rate {bench.rate:.2g}. Lower the rate or use fp32.",
        "hyperparams.learning_rate",
    )


def attention_called(report: Report, model: Model) -> None:
    """Which attention kernel was really called, counted at the call."""
    calls = {kernel: count for kernel, count in model.loaded.attention.calls.items() if kernel != "sdpa"}
    if not calls:
        report.add("attention", "pass", "Attention: the model's own; no row sees another.")
        return
    kernel = max(calls, key=lambda name: calls[name])
    report.add(
        "attention",
        "pass",
        f"Attention really called: {kernel}, {calls[kernel]:,} times; no row sees another.",
        kernel,
    )


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


def generation(
    report: Report,
    config: Config,
    prompt: Prompt,
    model: Model,
    tokens: Tokens,
    worker: Worker,
    user_profiles: Path,
    device: str,
    interrupt: Callable[[], bool],
) -> None:
    """One answer to a real row's prompt, with the profile's processors."""
    (question,) = default_questions(config, prompt, tokens, model.tokenizer, worker, user_profiles, 1)
    profile = profiles.load(prompt.profile, user_profiles) if prompt.profile is not None else None
    processors = profile.logits_processors(model.tokenizer) if profile else []
    text = answer(
        model.trained,
        model.tokenizer,
        question.ids,
        processors,
        device=device,
        max_tokens=min(32, config.eval.sample_max_tokens),
        max_s=config.eval.sample_max_s,
        autocast=model.precision.autocast,
        interrupt=interrupt,
    )
    with_them = f" with {len(processors)} processors of the profile" if processors else ""
    report.fact(sample=text[:500])
    report.add("generation", "pass", f"The model writes an answer{with_them}.", f"{len(text):,} characters")


def forecast(report: Report, bench: Bench, folder: Path) -> None:
    """Seconds a step at the plan's mean length, the whole run's time, and the disk it needs."""
    h = bench.config.hyperparams
    typical = slice(LONGEST_STEPS, LONGEST_STEPS + REPEATED_STEPS)
    seconds_a_token = float(np.median(np.array(bench.seconds[typical]) / np.array(bench.tokens_done[typical])))
    lengths = np.asarray(bench.tokens.cache.lengths)
    tokens_a_step = float(lengths[bench.plan.rows].sum()) / max(1, bench.plan.total_steps)
    seconds = seconds_a_token * tokens_a_step
    whole = seconds * bench.plan.total_steps
    report.fact(
        seconds_a_step=seconds,
        forecast_s=whole,
        total_steps=bench.plan.total_steps,
        tokens_a_step=tokens_a_step,
    )
    hours, minutes = divmod(round(whole / 60), 60)
    text = f"About {seconds:.2f} s a step ({h.rows_per_step} rows); the whole run about " + (
        f"{hours} h {minutes} min." if hours else f"{max(1, minutes)} min."
    )
    report.add("speed", "pass", text, f"{tokens_a_step / seconds:,.0f} tok/s")
    size = report_size(bench, folder)
    free = checkpoint.free_bytes(folder)
    enough = free > size
    report.add(
        "disk",
        "pass" if enough else "problem",
        f"Disk: checkpoints need up to {file_size(size)}, {file_size(free)} is free.",
        file_size(size),
    )


def report_size(bench: Bench, folder: Path) -> int:
    """Bytes of the most checkpoints that exist at once: those kept, the best, and one being written."""
    stepper, trained = bench.model.stepper, bench.model.trained
    whole = trained.parameters() if not isinstance(trained, PeftModel) else [p for _, p in stepper.named]
    weights = sum(parameter.nbytes for parameter in whole)
    states = sum(state.nbytes for state in optim.state_by_name(stepper.optimizer, stepper.named).values())
    return (weights + states) * (bench.config.output.save_total_limit + 2)
