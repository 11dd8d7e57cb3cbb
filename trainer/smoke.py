"""The smoke test: a few real steps with the chosen model, data and profile that prove a run will work, or say why not.

Same tokens, loader, loss path, optimizer and saver as training. Called by the engine and by `python -m trainer smoke`.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from trainer import process_peak
from trainer.config import flatten
from trainer.fields import without_secrets
from trainer.files import make_private_dir
from trainer.launch import Prompt
from trainer.loop import smoke_checkpoint, smoke_model, smoke_steps, smoke_tokens
from trainer.loop.fit import with_micro_batch
from trainer.loop.fit_start import fit_of_smoke, remember_smoke
from trainer.loop.prepare import Left, all_tokens, build_model, pick_device, plan_of, safetensors_folder
from trainer.machine import Machine
from trainer.refusal import Refusal
from trainer.report import Report, Verdict
from trainer.schema import Config
from trainer.session import free_memory, used_gib
from trainer.worker import Worker
from trainer.workspace import Workspace


def run_smoke(
    folder: Path,
    config: Config,
    prompt: Prompt,
    workspace: Workspace,
    worker: Worker,
    here: Machine,
    threads: int,
    interrupt: Callable[[], bool],
) -> dict[str, Any]:
    """Run every check that is possible here, write `folder`/report.json as it goes, return the report; never raises."""
    report = Report(folder / "report.json", judged=flatten(without_secrets(config.model_dump(mode="json"))))
    before = used_gib(here.gpu is not None)
    state = "done"
    try:
        _check_all(report, folder, config, prompt, workspace, worker, here, threads, interrupt)
    except Left:
        state = "stopped"
    except Refusal as refusal:
        report.add("refused", "problem", refusal.message)
        traceback.clear_frames(refusal.__traceback__)
    except torch.OutOfMemoryError as error:
        report.add(
            "memory",
            "problem",
            "Out of memory with the longest rows. Lower the micro-batch or the maximum length, switch "
            "gradient checkpointing on, or use LoRA.",
        )
        traceback.clear_frames(error.__traceback__)
    except Exception as error:  # the thread's edge
        report.add("fault", "problem", f"{type(error).__name__}: {str(error).strip()[:300]}")
        report.fact(detail="".join(traceback.format_exception(error))[-20_000:])
        traceback.clear_frames(error.__traceback__)
    if state == "done":
        _memory_given_back(report, here, before)
    return report.end("stopped" if state == "stopped" else "done")


def _check_all(
    report: Report,
    folder: Path,
    config: Config,
    prompt: Prompt,
    workspace: Workspace,
    worker: Worker,
    here: Machine,
    threads: int,
    interrupt: Callable[[], bool],
) -> None:
    torch.set_num_threads(threads)
    before_gib = used_gib(False)
    device = pick_device(here.device)
    model_path = Path(config.model_path)
    report.doing("tokenising")
    tokens = all_tokens(config, prompt, (workspace.tokens, workspace.profiles), worker, interrupt)
    cache = tokens.cache
    plan = plan_of(config, tokens)
    smoke_tokens.data(report, cache, plan)
    smoke_tokens.prompt_in_tokens(report, config, prompt, tokens, worker, workspace.profiles)
    _leave(interrupt)
    report.doing("loading the model")
    said: list[str] = []
    converted = make_private_dir(workspace.tokens.parent / "converted")
    folder_of_model = safetensors_folder(model_path, converted, worker, said.append)
    model = build_model(config, folder_of_model, cache, device, here.summary, said.append)
    smoke_model.finite_weights(report, model)
    smoke_model.loss_path(report, model)
    smoke_model.checkpointing(report, config, model, tokens)
    fit = fit_of_smoke(config, model, tokens, plan, workspace.root, here.device, before_gib)
    config = with_micro_batch(config, fit.packs_each)
    bench = smoke_steps.Bench(config, model, tokens, plan, device, report, interrupt)
    report.doing("training on the longest rows")
    process_peak.begin()
    smoke_steps.longest_rows(report, bench)
    remember_smoke(report, fit, workspace.root, folder.name)
    report.doing("training one batch again and again")
    smoke_steps.loss_falls(report, bench)
    smoke_model.attention_called(report, model)
    report.doing("saving and loading a checkpoint")
    smoke_checkpoint.checkpoint_round_trip(report, bench, folder)
    report.doing("writing an answer")
    smoke_model.generation(report, config, prompt, model, tokens, worker, workspace.profiles, device, interrupt)
    smoke_steps.forecast(report, bench, folder)


def _leave(interrupt: Callable[[], bool]) -> None:
    if interrupt():
        raise Left()


def _memory_given_back(report: Report, here: Machine, before_gib: float) -> None:
    after = free_memory(here.gpu is not None, None)["memory_after_gib"] or 0.0
    if here.gpu is None:
        report.add(
            "memory_back",
            "not_possible",
            f"Memory given back: not measurable on a CPU (process {before_gib:.1f} → {after:.1f} GiB).",
        )
        return
    kept = after - before_gib
    status: Verdict = "pass" if kept < 0.1 else "problem"
    report.add(
        "memory_back",
        status,
        f"GPU memory given back: {before_gib:.2f} GiB before, {after:.2f} GiB after.",
        f"{kept:+.2f} GiB",
    )
