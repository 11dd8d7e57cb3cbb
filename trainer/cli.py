"""The command line: arguments, one function for each command, and the edge where a Refusal becomes a line and exit 2.

Torch-free until a command computes.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer import config as configs
from trainer import control
from trainer.data.problems import PROBLEM_NAMES
from trainer.events import wire
from trainer.hub import with_downloaded_model
from trainer.hub_names import id_or_none
from trainer.recovery import SHUTDOWN, settle
from trainer.refusal import Refusal
from trainer.run import RunDir, status
from trainer.schema import Config
from trainer.states import LIVE_STATES, allowed
from trainer.workspace import Workspace

REFUSED = 2


def _run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, default=Path("config.json"), help="settings file (default: config.json)")
    parser.add_argument("--workspace", type=Path, default=Path("workspace"), help="where runs and caches live")
    parser.add_argument("--profile", help="profile name; wins over the settings file")
    parser.add_argument(
        "--model", type=Path, help="model folder, or the id of a downloaded model; wins over the settings file"
    )
    parser.add_argument("--dataset", type=Path, action="append", default=[], help="dataset file; repeatable")
    parser.add_argument("--max-steps", type=int, help="stop after this many steps")
    parser.add_argument("--skip-eval", action="store_true", help="no held-out loss")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="settings",
        help="any setting; wins over all",
    )


def parser() -> argparse.ArgumentParser:
    """The arguments of every command."""
    top = argparse.ArgumentParser(prog="python -m trainer", description="Train, test and check without the page.")
    commands = top.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train a run to its end")
    _run_options(train)
    train.add_argument("--output", type=Path, help="the run's folder (default: a new one in the workspace)")
    smoke = commands.add_parser("smoke", help="prove on the real model and data that a run will work")
    _run_options(smoke)
    inspect = commands.add_parser("inspect", help="show the first batch, token by token")
    _run_options(inspect)
    resume = commands.add_parser("resume", help="go on with a run from its newest whole checkpoint")
    for name in ("stop", "pause", "checkpoint", "leave", "discard", "status", "metrics"):
        command = commands.add_parser(name, help=f"{name} of a run")
        command.add_argument("run", type=Path, metavar="RUN_DIR")
        if name == "stop":
            command.add_argument(
                "--now", action="store_true", help="without saving the steps since the last checkpoint"
            )
        if name in ("status", "metrics"):
            command.add_argument("--json", action="store_true")
        if name == "metrics":
            command.add_argument("--csv", action="store_true")
    resume.add_argument("run", type=Path, metavar="RUN_DIR")
    resume.add_argument("--json", action="store_true")
    smoke.add_argument("--json", action="store_true")
    model = commands.add_parser("check-model", help="what a model folder is, and what is wrong with it")
    model.add_argument("path", type=Path)
    model.add_argument("--json", action="store_true")
    model.add_argument("--deep", action="store_true", help="read every number: NaN, infinities, all zero")
    data = commands.add_parser("check-data", help="what is wrong with a dataset, by line")
    data.add_argument("path", type=Path)
    data.add_argument("--model", type=Path)
    data.add_argument("--profile")
    data.add_argument("--json", action="store_true")
    data.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="PART=COLUMN",
        dest="columns",
        help="for rows named otherwise, such as user=question; repeatable",
    )
    data.add_argument("--held-out", type=Path, help="a held-out file whose rows must not stand in this one")
    data.add_argument(
        "--repair", type=Path, metavar="OUT", help="write the repaired copy to OUT, and what was left out"
    )
    convert = commands.add_parser("convert", help="pickle weights to safetensors")
    convert.add_argument("path", type=Path)
    convert.add_argument("out", type=Path)
    starter = commands.add_parser("starter", help="write the starter model and dataset")
    starter.add_argument("--workspace", type=Path, default=Path("workspace"))
    download = commands.add_parser("download", help="fetch a model from a hub into the workspace")
    download.add_argument("model", metavar="ORG/NAME[@REVISION]")
    download.add_argument("--workspace", type=Path, default=Path("workspace"))
    return top


def load_config(arguments: argparse.Namespace) -> Config:
    """Settings with their precedence: schema, file, --profile/--model/--dataset/--max-steps, --set."""
    file = configs.load_sparse(arguments.config)
    chosen: dict[str, Any] = {}
    if arguments.profile is not None:
        chosen["profile"] = {"name": arguments.profile}
    if arguments.model is not None:
        named = str(arguments.model)
        is_id = id_or_none(named) is not None and not arguments.model.exists()
        chosen["model_path"] = named if is_id else str(arguments.model.resolve())
    if arguments.dataset:
        first, *more = (str(path.resolve()) for path in arguments.dataset)
        chosen["data"] = {"dataset_path": first, "dataset_paths": [{"path": path} for path in more]}
    if arguments.max_steps is not None:
        chosen["hyperparams"] = {"max_steps": arguments.max_steps}
    if arguments.skip_eval:  # a setting of the run, so that a resume plans the same rows
        chosen["eval"] = {"eval_strategy": "no"}
    sets = [configs.parse_set(text) for text in arguments.settings]
    config = configs.resolve(file, chosen, *sets)
    return with_downloaded_model(config, Workspace(arguments.workspace.resolve()), arguments.config)


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    arguments = parser().parse_args(argv)
    command: Callable[[argparse.Namespace], int] = COMMANDS[arguments.command]
    try:
        return command(arguments)
    except Refusal as refusal:
        print(" ".join(refusal.message.splitlines()), file=sys.stderr)
        return REFUSED
    except BrokenPipeError:  # `... | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _existing(path: Path) -> RunDir:
    run = RunDir(path.resolve())
    run.snapshot()  # refuses a folder that is none
    return run


def _train(arguments: argparse.Namespace) -> int:
    from trainer.alone import train_alone

    config = load_config(arguments)
    return train_alone(Workspace(arguments.workspace.resolve()).create(), config, arguments.output)


def _resume(arguments: argparse.Namespace) -> int:
    from trainer.alone import resume_alone

    run = _existing(arguments.run)
    code = resume_alone(run, quiet=arguments.json)
    if arguments.json:
        print(json.dumps(wire(status(run).as_json())))
    return code


def _smoke(arguments: argparse.Namespace) -> int:
    from trainer.alone import smoke_alone

    return smoke_alone(Workspace(arguments.workspace.resolve()).create(), load_config(arguments), arguments.json)


def _inspect(arguments: argparse.Namespace) -> int:
    from trainer.alone import inspect_alone

    return inspect_alone(Workspace(arguments.workspace.resolve()).create(), load_config(arguments))


def _ask(arguments: argparse.Namespace) -> int:
    run = _existing(arguments.run)
    state = status(run).state
    command = "stop-now" if arguments.command == "stop" and arguments.now else arguments.command
    if command not in allowed(state):
        raise Refusal(f"The run is {state}: there is nothing to {arguments.command}.")
    control.drop(run.control, command, by=os.environ.get("USER", "command line"))
    print(f"Asked: {command}. The run answers in its events; `python -m trainer status {arguments.run}` shows it.")
    return 0


def _settle(arguments: argparse.Namespace) -> int:
    run = _existing(arguments.run)
    settle(run, arguments.command, by=os.environ.get("USER", "command line"))
    now = status(run)
    print(f"Stopped at step {now.last_checkpoint_step or 0:,}. Nothing was deleted; it can still be resumed.")
    return 0


def _status(arguments: argparse.Namespace) -> int:
    now = status(_existing(arguments.run))
    if arguments.json:
        print(json.dumps(wire(now.as_json())))
        return 0
    total = f"/{now.total_steps:,}" if now.total_steps else ""
    loss = f", loss {now.loss:.3f}" if now.loss is not None else ""
    left = f", about {now.eta_s / 60:.0f} min left" if now.eta_s and now.state in LIVE_STATES else ""
    print(
        f"{now.state} ({now.phase}): step" if now.phase else f"{now.state}: step",
        f"{now.current_step:,}{total}{loss}{left}",
    )
    if now.cause:
        print(now.cause)
    return 0


def _metrics(arguments: argparse.Namespace) -> int:
    from trainer.tables import metrics_rows

    run = _existing(arguments.run)
    names, rows = metrics_rows(run)
    if arguments.json:
        print(json.dumps([wire(dict(zip(names, row, strict=True))) for row in rows]))
        return 0
    separator = "," if arguments.csv else "  "
    print(separator.join(names))
    for row in rows:
        print(separator.join(f"{value:g}" if not arguments.csv else repr(value) for value in row))
    return 0


def _check_model(arguments: argparse.Namespace) -> int:
    from trainer.models.full_report import full_report
    from trainer.worker import Worker

    worker = Worker()
    try:
        report = full_report(worker.call, arguments.path.resolve(), deep=arguments.deep)
    finally:
        worker.close()
    if arguments.json:
        print(json.dumps(report))
    else:
        for entry in report["problems"] + report["warnings"]:
            print(f"{entry['file'] or arguments.path}: {entry['message']}. {entry['fix']}")
        if shapes := report["facts"].get("shapes"):
            why = report["facts"].get("shapes_why")
            print(f"Names and shapes of the tensors: {shapes}{f' ({why})' if why else ''}")
        print(f"{'Valid' if report['valid'] else 'Not valid'}: {report['kind']}, {arguments.path}")
    return 0 if report["valid"] else 1


def _check_data(arguments: argparse.Namespace) -> int:
    from trainer.alone import ask_worker

    model = str(arguments.model.resolve()) if arguments.model else None
    path, held_out = str(arguments.path.resolve()), arguments.held_out
    report = ask_worker(
        "check_data", path=path, model_path=model, profile=arguments.profile, columns=arguments.columns,
        held_out=str(held_out.resolve()) if held_out else None,
    )  # fmt: skip
    if arguments.repair is not None:
        out = str(arguments.repair.resolve())
        report["repair"] = ask_worker("repair_data", path=path, out=out, columns=arguments.columns)
    if arguments.json:
        print(json.dumps(report))
    else:
        _print_data_report(report)
    return 0 if report["valid"] else 1


def _print_data_report(report: dict[str, Any]) -> None:
    """The doctor's report for a terminal: problems with what to do about each kind, then the verdict."""
    for entry in report["problems"]:
        print(entry["message"] + (f"  {entry['excerpt']}" if entry["excerpt"] else ""))
    for code, number in report["counts"].items():
        print(f"{number:,} {PROBLEM_NAMES[code]}: {report['fixes'][code]}")
    for warning in report["warnings"]:
        print(f"Warning: {warning['message']}")
    if report["suggested"]:
        print("Column mapping that fits: " + " ".join(f"--column {text}" for text in report["suggested"]))
    print(f"{report['format_reason']}")
    print(f"{report['usable']:,} of {report['rows']:,} rows are usable ({report['format']}).")
    if "repair" in report:
        print(report["repair"]["summary"])


def _convert(arguments: argparse.Namespace) -> int:
    from trainer.alone import ask_worker

    report = ask_worker("convert", path=str(arguments.path.resolve()), out=str(arguments.out.resolve()))
    print(f"Converted to {arguments.out}: {json.dumps(report)}")
    return 0


def _starter(arguments: argparse.Namespace) -> int:
    from trainer.alone import ask_worker

    workspace = Workspace(arguments.workspace.resolve()).create()
    made = ask_worker("starter", models_root=str(workspace.models_dir), datasets_root=str(workspace.datasets_dir))
    print(f"Starter model: {made['model']}\nStarter data: {made['dataset']}")
    return 0


def _download(arguments: argparse.Namespace) -> int:
    from trainer.hub import download_alone

    folder = download_alone(Workspace(arguments.workspace.resolve()).create(), arguments.model)
    print(f"Downloaded: {folder}")
    return 0


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "train": _train,
    "resume": _resume,
    "smoke": _smoke,
    "inspect": _inspect,
    "stop": _ask,
    "pause": _ask,
    "checkpoint": _ask,
    "leave": _settle,
    "discard": _settle,
    "status": _status,
    "metrics": _metrics,
    "check-model": _check_model,
    "check-data": _check_data,
    "convert": _convert,
    "starter": _starter,
    "download": _download,
}


def install_stop(ask: Callable[[str], None]) -> None:
    """SIGTERM, SIGINT and SIGHUP ask for a stop at the step; a second one ends at once. `ask` hears who asked."""

    def handler(number: int, frame: Any) -> None:
        # first of all: a second signal that comes while the first is being answered must end the process too
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, signal.SIG_DFL)
        ask({signal.SIGTERM: SHUTDOWN, signal.SIGINT: "Ctrl-C"}.get(number, "a closed terminal"))  # type: ignore[call-overload]

    for name in ("SIGTERM", "SIGINT", "SIGHUP"):
        # nohup ignores SIGHUP for us, and that must stay so
        if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) != signal.SIG_IGN:
            signal.signal(getattr(signal, name), handler)
