"""What a process of a team does that does not lead it: load the same model, then obey until the leader ends.

It writes nothing, listens to no command and decides nothing; its gradients and loss sums go to the leader.
"""

from __future__ import annotations

from pathlib import Path

import torch

from trainer import checkpoint
from trainer.bad_rows import LeftOut
from trainer.data.loader import BadRow
from trainer.data.tokens import TokenCache
from trainer.loop import prepare
from trainer.loop.evaluate import groups_without, held_out_loss
from trainer.loop.ready import restore
from trainer.loop.step import UpdateOutOfMemory
from trainer.loop.team import Team, Word
from trainer.machine import Machine
from trainer.refusal import Refusal
from trainer.run import RunDir
from trainer.schema import Config


def follow(team: Team, machine: Machine) -> None:
    """Help the leader of `team` until it gives no more orders.

    Raises Refusal when the leader is gone in mid-step (Lost), when a row cannot be read here, and when memory runs out.
    """
    told = team.hear_facts()
    if told is None:
        return
    snapshot = RunDir(Path(told["run"])).snapshot()
    config = Config.model_validate(snapshot["config"])
    torch.set_num_threads(snapshot["threads"])
    device = prepare.pick_device(machine.device, team.rank)
    cache = TokenCache.open(Path(told["cache"]))
    held_out = TokenCache.open(Path(told["held_out"])) if prepare.has_held_out_file(config) else None
    tokens = prepare.split_rows(config, cache, held_out)
    found = Path(told["checkpoint"]) if told["checkpoint"] is not None else None
    model = prepare.build_model(
        config,
        Path(told["folder"]),
        cache,
        device,
        "",
        lambda text: None,
        resume_from=found / checkpoint.MODEL if found is not None else None,
        team=team,
    )
    if found is not None:
        restore(config, model, found)
    trained, held = told["left_out"]
    left_out = LeftOut(dict(trained), dict(held))
    try:
        _obey(team, config, tokens, model, device, frozenset(told["skip"]), left_out)
    except BadRow as bad:
        raise Refusal(f"Process {team.rank} stopped: {cache.place_words(bad.row)} is bad, {bad.reason}.") from None
    except (torch.OutOfMemoryError, UpdateOutOfMemory):
        raise Refusal(
            f"Process {team.rank} ran out of memory. Resume with a smaller hyperparams.batch_size and more "
            "hyperparams.gradient_accumulation."
        ) from None


def _obey(
    team: Team,
    config: Config,
    tokens: prepare.Tokens,
    model: prepare.Model,
    device: str,
    skip: frozenset[int],
    left_out: LeftOut,
) -> None:
    plan = prepare.plan_of(config, tokens)
    groups = prepare.held_out_groups(config, tokens)
    while (order := team.hear()).word is not Word.END:
        if order.word is Word.STEP:
            micro_rows = plan.micro_batches(order.step, order.packs_each, without=skip | left_out.at(order.step))
            model.stepper.step(order.step, micro_rows, tokens.cache, order.rate)
        elif order.word is Word.HELD_OUT:
            now = groups_without(groups, left_out.held_out_at(order.step))
            path = model.choice.path
            held_out_loss(model.loaded.model, model.trained, tokens.held_out, now, path, device, team=team)
        else:
            left_out.add(order.row, order.step, held_out=order.word is Word.BAD_HELD_OUT)
