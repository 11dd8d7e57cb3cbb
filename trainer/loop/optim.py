"""AdamW with a non-finite flag that stays on the device: the bad step and all later ones change nothing.

Decoupled weight decay: Loshchilov and Hutter 2019, arXiv:1711.05101.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from trainer.models.bits import import_bitsandbytes
from trainer.refusal import Refusal

STATES = ("exp_avg", "exp_avg_sq", "step")
OVERFLOWS = 32  # in a row: halvings that bring any usual scale (2^16 at the start) below what fp16 could overflow at


def trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """(name, parameter) of all that is trained; a tied matrix once, under its first name."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def decayed(name: str, parameter: nn.Parameter) -> bool:
    """Weight decay is for matrices: a bias or a norm's scale pulled to zero only hurts."""
    return parameter.dim() >= 2 and "norm" not in name.lower()


def build(named: list[tuple[str, nn.Parameter]], *, weight_decay: float, kind: str) -> torch.optim.Optimizer:
    """AdamW (fused) with betas 0.9 and 0.999, eps 1e-8; its states are allocated by `allocate` before the first step."""
    groups = [
        {"params": [p for n, p in named if decayed(n, p)], "weight_decay": weight_decay},
        {"params": [p for n, p in named if not decayed(n, p)], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if kind == "adamw_8bit":
        # where the package is absent there is a refusal in words before any run is made (trainer.packages)
        return import_bitsandbytes().optim.AdamW8bit(groups, lr=0.0)
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), eps=1e-8, fused=True)


def allocate(optimizer: torch.optim.Optimizer) -> None:
    """Create AdamW's states now, so that a later out-of-memory can only come from forward or backward."""
    if not isinstance(optimizer, torch.optim.AdamW):
        return
    for parameter in _parameters(optimizer):
        if not optimizer.state[parameter]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            }


def state_by_name(optimizer: torch.optim.Optimizer, named: list[tuple[str, nn.Parameter]]) -> dict[str, torch.Tensor]:
    """{"exp_avg/NAME": tensor, ...}: the states under the parameters' names, not their numbers."""
    return {
        f"{key}/{name}": value if isinstance(value, torch.Tensor) else torch.tensor(value)
        for name, parameter in named
        for key, value in optimizer.state[parameter].items()
        if isinstance(value, (torch.Tensor, int))  # the 8-bit optimizer counts its steps in a plain number
    }


def restore(
    optimizer: torch.optim.Optimizer, named: list[tuple[str, nn.Parameter]], saved: dict[str, torch.Tensor]
) -> None:
    """Put saved states back; Refusal when a parameter has none, since the curve would change without a word."""
    by_name: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in saved.items():
        kind, name = key.split("/", 1)
        by_name.setdefault(name, {})[kind] = value
    adamw = isinstance(optimizer, torch.optim.AdamW)
    for name, parameter in named:
        found = by_name.get(name, {})
        if not found or (adamw and set(found) != set(STATES)):
            raise Refusal(f"The checkpoint has no optimizer state for {name}; resuming would change the run.")
        optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in found.items()}
        if not adamw:
            optimizer.state[parameter]["step"] = int(found["step"])


class StepGuard:
    """The non-finite flag: 1.0 on the device from the first bad step on; AdamW (fused) skips its update while it is set.

    In fp16 an overflowing gradient is everyday and skips its own step alone; the scale is halved after it. A gradient
    that still overflows after `OVERFLOWS` halvings is not one that a smaller scale could save, and sets the flag.
    """

    def __init__(self, device: str) -> None:
        self.flag = torch.zeros((), dtype=torch.float32, device=device)
        self._overflow = torch.zeros_like(self.flag)
        self._in_a_row = torch.zeros_like(self.flag)

    def see(self, *values: torch.Tensor) -> None:
        """Set the flag where any of `values` (0-dim) is NaN or infinite; no host wait."""
        for value in values:
            self.flag = torch.maximum(self.flag, (~torch.isfinite(value)).float())

    def see_scaled(self, norm: torch.Tensor) -> None:
        """Take the gradient norm (0-dim) of an fp16 step: skip this step where it overflowed; no host wait."""
        self._overflow = (~torch.isfinite(norm)).float()
        self._in_a_row = (self._in_a_row + 1) * self._overflow
        self.flag = torch.maximum(self.flag, (self._in_a_row > OVERFLOWS).float())

    def step(self, optimizer: torch.optim.Optimizer, rate: float) -> None:
        """One update with `rate`, or none while the flag is set or where this step overflowed."""
        for group in optimizer.param_groups:
            group["lr"] = rate
        skip = torch.maximum(self.flag, self._overflow)
        if not isinstance(optimizer, torch.optim.AdamW):  # the 8-bit one knows no flag: the host has to look
            if not bool(skip):
                optimizer.step()
            return
        optimizer.grad_scale, optimizer.found_inf = None, skip  # type: ignore[attr-defined]
        optimizer.step()


def _parameters(optimizer: torch.optim.Optimizer) -> Iterable[nn.Parameter]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])
