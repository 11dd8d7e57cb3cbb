"""Commands to a run: one small file each in control/, dropped by anyone who may, consumed by the trainer."""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from trainer.files import read_json
from trainer.refusal import Refusal
from trainer.states import Command


@dataclass(frozen=True)
class Order:
    """One command as dropped: what, by whom, with which arguments."""

    command: str
    by: str = "command line"
    args: dict[str, Any] = field(default_factory=dict)


def drop(control: Path, command: str, by: str = "command line", **args: Any) -> None:
    """Leave `command` for the trainer of the run that owns the folder `control`."""
    if command not in get_args(Command):
        raise Refusal(f"'{command}' is no command. Known: {', '.join(get_args(Command))}.")
    control.mkdir(mode=0o700, exist_ok=True)
    name = f"{time.time_ns():020d}-{secrets.token_hex(2)}.json"
    # whole or not at all, but not forced to the disk: a command is for a trainer that lives, and must not wait for one
    staging = control / f".{name}.tmp"
    staging.write_text(json.dumps({"command": command, "by": by, "args": args}), encoding="utf-8")
    staging.rename(control / name)


def take(control: Path) -> list[Order]:
    """Remove and return the waiting commands, oldest first; a file that is no command is removed and ignored."""
    orders = []
    for path in sorted(control.glob("*.json")):
        order = None
        try:
            raw = read_json(path)
            order = Order(str(raw["command"]), str(raw.get("by", "")), dict(raw.get("args", {})))
        except (ValueError, KeyError, TypeError, AttributeError):
            pass
        except OSError:  # no descriptor is free, a bad sector: it waits, and takes none of the others with it
            continue
        path.unlink(missing_ok=True)
        if order is not None and order.command in get_args(Command):
            orders.append(order)
    return orders


def clear(control: Path) -> None:
    """Drop what was left for an earlier life of the run, so that a stale stop cannot end a resume."""
    for path in control.glob("*.json"):
        path.unlink(missing_ok=True)
