"""What can be seen of a run from outside: each a function of the run alone, for the table of settings and their effects."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tests import runs
from tests.lives import curve, one_life
from trainer import checkpoint
from trainer.config import resolve
from trainer.data.tokens import TokenCache
from trainer.events import all_events
from trainer.loop.step import Stepper
from trainer.metrics import read_metrics, read_rows
from trainer.notify import webhook_of
from trainer.recovery import recover
from trainer.refusal import Refusal
from trainer.run import RunDir, status
from trainer.schema import Config
from trainer.session import open_life
from trainer.worker import Worker
from trainer.workspace import Workspace


@dataclass(frozen=True)
class Seen:
    """A run that was made, or the sentence that refused it, and what only shows while it computes."""

    run: RunDir | None
    refused: str
    workspace: Workspace
    flops: float  # of the backward passes: what is recomputed is counted again
    compiled: int  # blocks that torch was asked to compile

    @property
    def here(self) -> RunDir:
        """The run."""
        assert self.run is not None, self.refused
        return self.run

    def events(self, kind: str) -> list[dict[str, Any]]:
        """The run's events of one kind."""
        return [event for event in all_events(self.here.events) if event["kind"] == kind]


def watch(config: dict[str, Any], workspace: Workspace, worker: Worker) -> Seen:
    """Make the run of these settings (nested, as in a config file) and let it end."""
    base = {"method": "full", "batch_size": 2, "gradient_accumulation": 2, "learning_rate": 3e-3}
    try:
        run = runs.new(workspace, resolve(config | {"hyperparams": base | config["hyperparams"]}))
    except Refusal as refusal:
        return Seen(None, refusal.message, workspace, 0.0, 0)
    with _counting() as counted:
        one_life(run, workspace, worker)
    return Seen(run, "", workspace, counted["flops"], int(counted["compiled"]))


@contextlib.contextmanager
def _counting() -> Iterator[dict[str, float]]:
    counted = {"flops": 0.0, "compiled": 0.0}
    update, compile_block = Stepper._backward, nn.Module.compile

    def backward(self: Stepper, *args: Any) -> torch.Tensor:
        with FlopCounterMode(display=False) as counter:
            found = update(self, *args)
        counted["flops"] += counter.get_total_flops()
        return found

    def compiling(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        counted["compiled"] += 1
        compile_block(self, *args, **kwargs)

    # a compiled block runs as it is here: its code takes minutes to build on two cores (the long suite does build it)
    with (
        patch.object(Stepper, "_backward", backward),
        patch.object(nn.Module, "compile", compiling),
        torch.compiler.set_stance("force_eager"),
    ):
        yield counted


Observe = Callable[[Seen], Any]


def losses(seen: Seen) -> list[list[float]]:
    """(loss, gradient norm) of each step."""
    return curve(seen.here)[:, 1:3].tolist()


def rates(seen: Seen) -> list[float]:
    """The learning rate of each step."""
    return read_metrics(seen.here.metrics)["learning_rate"].tolist()


def order(seen: Seen) -> list[list[int]]:
    """The rows of each step, in order."""
    steps = read_metrics(seen.here.metrics)["step"]
    return [[row for row, *_ in read_rows(seen.here.rows, int(step))] for step in steps]


def rows_sorted(seen: Seen) -> list[list[int]]:
    """The rows of each step, whatever their order in it."""
    return [sorted(rows) for rows in order(seen)]


def micro_batch(seen: Seen) -> int | None:
    """Rows of the micro-batch that the run chose by itself; None where it was told."""
    chosen = seen.here.snapshot().get("micro_batch")
    return chosen["rows"] if chosen else None


def total_steps(seen: Seen) -> int:
    """Steps that were taken."""
    return len(curve(seen.here))


def plan(seen: Seen) -> dict[str, Any]:
    """The plan's event."""
    (found,) = seen.events("plan")
    return {key: found[key] for key in ("total_steps", "rows", "held_out_rows", "rows_per_step", "waste")}


def token_key(seen: Seen) -> str:
    """The name of the token cache."""
    return str(seen.events("plan")[0]["token_key"])


def tokens(seen: Seen) -> list[list[int]]:
    """The token ids of every training row, in order."""
    cache = TokenCache.open(seen.workspace.tokens / token_key(seen))
    return [cache.ids(row).tolist() for row in range(len(cache.lengths))]


def checks(seen: Seen) -> list[tuple[int, float]]:
    """(step, held-out loss) of each check."""
    return [(event["step"], event["loss"]) for event in seen.events("eval")]


def saved(seen: Seen) -> list[int]:
    """Steps whose checkpoint was written."""
    return [event["step"] for event in seen.events("checkpoint")]


def kept(seen: Seen) -> list[int]:
    """Steps whose checkpoint is there at the end."""
    return sorted(step for step, _ in checkpoint.listed(seen.here.checkpoints))


def samples(seen: Seen) -> list[tuple[int, str, str]]:
    """(step, prompt, answer) of each sample."""
    return [(event["step"], event["prompt"], event["text"]) for event in seen.events("sample")]


def alerts(seen: Seen) -> list[str]:
    """Code of each alert."""
    return [event["code"] for event in seen.events("alert")]


def log(seen: Seen) -> str:
    """The whole log."""
    return "\n".join(event["text"] for event in seen.events("log"))


def saved_tensors(seen: Seen) -> dict[str, tuple[list[int], str]]:
    """Shape and format of each saved weight."""
    newest = checkpoint.newest_verified(seen.here.checkpoints).path / checkpoint.MODEL
    found = {name: t for file in newest.glob("*.safetensors") for name, t in load_file(file).items()}
    return {name: (list(tensor.shape), str(tensor.dtype)) for name, tensor in found.items()}


def adapter(seen: Seen) -> dict[str, Any]:
    """What the saved adapter says of itself."""
    newest = checkpoint.newest_verified(seen.here.checkpoints).path / checkpoint.MODEL
    return json.loads((newest / "adapter_config.json").read_text())


def names(seen: Seen) -> tuple[str, str]:
    """What the page calls the model, and the name in the snapshot."""
    return status(seen.here).model_display_name, seen.here.snapshot()["model"]["display_name"]


def fingerprint(seen: Seen) -> str:
    """Which model it was."""
    return str(seen.here.snapshot()["model"]["fingerprint"])


def end(seen: Seen) -> tuple[str, str | None]:
    """How the run ended, and the cause that was given; of one that was refused, why."""
    if seen.run is None:
        return "refused", seen.refused
    now = status(seen.run)
    return now.state, now.cause


def flops(seen: Seen) -> float:
    """Work of forward and backward passes."""
    return seen.flops


def compiled(seen: Seen) -> int:
    """Blocks given to torch.compile."""
    return seen.compiled


def rewinds(seen: Seen) -> int:
    """How often the run went back."""
    return len(seen.events("rewind"))


def webhook(seen: Seen) -> str:
    """The address kept for the run, outside its folder; tests/test_notify.py shows the requests."""
    return webhook_of(seen.workspace.root, seen.here.run_id)


def goes_on_by_itself(seen: Seen) -> bool:
    """Whether a run of the same settings that was cut off is resumed when a server comes up."""
    run = runs.new(seen.workspace, Config.model_validate(seen.here.snapshot()["config"]))
    open_life(run, "test", resumed=False).close()
    resumed: list[RunDir] = []
    recover([run], [], resumed.append)
    return resumed == [run]
