"""The smoke test: a few real steps with the chosen model, data and profile that prove a run will work, or say why not.

Same tokens, loader, loss path, optimizer and saver as training. Called by the engine and by `python -m trainer smoke`.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from trainer import process_peak
from trainer.config import flatten
from trainer.fields import without_secrets
from trainer.launch import Prompt
from trainer.loop import (
    smoke_answer,
    smoke_attention,
    smoke_checkpoint,
    smoke_memory,
    smoke_model,
    smoke_steps,
    smoke_tokens,
)
from trainer.loop.fit import room_gib, with_micro_batch
from trainer.loop.fit_start import fit_of_smoke, remember_smoke
from trainer.loop.memory import memory_text
from trainer.loop.prepare import Left, Model, Tokens, all_tokens, build_model, pick_device, plan_of, safetensors_folder
from trainer.loop.smoke_memory import Before
from trainer.loop.smoke_steps import Bench, Enough
from trainer.machine import Machine
from trainer.refusal import Refusal
from trainer.report import Report
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
    before = Before.now(here.gpu is not None)
    state: Literal["done", "stopped"] = "done"
    try:
        _check_all(report, folder, config, prompt, workspace, worker, here, threads, interrupt)
    except Left:
        state = "stopped"
    except Enough as enough:
        report.add(enough.code, "problem", enough.text)
        _clear(enough)
    except Refusal as refusal:
        report.add("refused", "problem", refusal.message)
        _clear(refusal)
    except Exception as error:  # the thread's edge
        if smoke_steps.out_of_memory(error):
            report.add("memory", "problem", OUT_OF_MEMORY)
        else:
            report.add("fault", "problem", f"{type(error).__name__}: {str(error).strip()[:300]}")
            report.fact(detail="".join(traceback.format_exception(error))[-20_000:])
        _clear(error)
    if state == "done":
        smoke_memory.given_back(report, before, report.get("peak_gib"))
    else:
        free_memory(before.gpu, None)
    return report.end(state, _figures(report))


OUT_OF_MEMORY = (
    "Out of memory before a step was taken: the model alone does not fit. Nothing was changed. Use LoRA, half precision or a "
    "smaller model, or end what else takes memory."
)


def _clear(error: BaseException) -> None:
    """Let go of what the frames of an error hold, the model above all; also of the errors it came from."""
    seen: BaseException | None = error
    while seen is not None:
        traceback.clear_frames(seen.__traceback__)
        seen = seen.__cause__ or seen.__context__


def _figures(report: Report) -> str:
    """ "Peak 13.8 GiB at the longest row (estimate 14.2 GiB). Whole run: about 6 h 40 min." """
    peak, expected, whole = (report.get(name) for name in ("peak_gib", "forecast_gib", "forecast_s"))
    said = []
    if peak is not None and expected is not None:
        said.append(f"Peak {memory_text(peak)} at the longest row (estimate {memory_text(expected)}).")
    if whole is not None:
        said.append(f"Whole run: about {smoke_steps.whole_words(whole)}.")
    return " ".join(said)


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
    folder_of_model = safetensors_folder(model_path, workspace.tokens.parent / "converted", worker, said.append)
    model = build_model(config, folder_of_model, cache, device, here.summary, said.append)
    said_kernel = smoke_attention.announced(model)
    with smoke_memory.stoppable_inside(model, interrupt):
        bench = Bench(config, model, tokens, plan, device, report, interrupt)
        _check_model(report, config, model, tokens, interrupt)
        fit = fit_of_smoke(config, model, tokens, plan, workspace.root, here.device, before_gib)
        bench.config = config = with_micro_batch(config, fit.packs_each)
        smoke_memory.refuse_what_cannot_fit(fit, here.device, room_gib(device))
        report.doing("training on the longest rows")
        began = process_peak.begin()
        longest = smoke_steps.longest_rows(report, bench)
        smoke_memory.peak(report, fit, remember_smoke(report, fit, workspace.root, folder.name), began)
        report.doing("training one batch again and again")
        if smoke_steps.loss_falls(report, bench):  # a rate of zero moves nothing, and is one problem and not two
            smoke_steps.everything_moves(report, bench)
        smoke_attention.attention_called(report, model, said_kernel, cache, longest)
        report.doing("saving and loading a checkpoint")
        smoke_checkpoint.checkpoint_round_trip(report, bench, folder)
        smoke_checkpoint.disk(report, bench, workspace.runs)
        report.doing("writing an answer")
        smoke_answer.answers_end(report, model, tokens)
        smoke_answer.generation(report, config, prompt, model, tokens, worker, workspace.profiles, device, interrupt)
        _leave(interrupt)
        smoke_steps.forecast(report, bench)


def _check_model(report: Report, config: Config, model: Model, tokens: Tokens, interrupt: Callable[[], bool]) -> None:
    """What can be seen before a step is taken."""
    smoke_model.finite_weights(report, model)
    _leave(interrupt)
    report.doing("comparing losses")
    smoke_model.own_loss(report, model, tokens)
    smoke_model.knows_the_tokens(report, model, tokens)
    _leave(interrupt)
    smoke_model.checkpointing(report, config, model, tokens)


def _leave(interrupt: Callable[[], bool]) -> None:
    if interrupt():
        raise Left()
