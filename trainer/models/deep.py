"""The deep check: reads every weight once and names tensors that hold NaN or infinity, or nothing but zeros.

Works on the bytes with numpy, tensor by tensor in pieces, so that memory stays small. Called by
`trainer.models.inspect`.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.models.findings import Findings, listed
from trainer.models.headers import TensorInfo
from trainer.models.weights import Weights

if TYPE_CHECKING:
    import numpy as np

PIECE_BYTES = 16_000_000
_BLOCK = re.compile(r"(.*\.(?:layers|h|blocks)\.\d+)\..+")
# dtype -> (integer type of the same width, mask of the exponent bits, mask of all bits but the sign)
_BITS = {
    "F64": ("<u8", 0x7FF0_0000_0000_0000, 0x7FFF_FFFF_FFFF_FFFF),
    "F32": ("<u4", 0x7F80_0000, 0x7FFF_FFFF),
    "F16": ("<u2", 0x7C00, 0x7FFF),
    "BF16": ("<u2", 0x7F80, 0x7FFF),
    "F8_E5M2": ("u1", 0x7C, 0x7F),
    "F8_E4M3": ("u1", 0x7F, 0x7F),  # has no infinity; NaN is all ones
}


def check_numbers(folder: Path, weights: Weights, findings: Findings) -> None:
    """Read all float tensors of `weights` in `folder`; problems for non-finite and for lost (all-zero) weights."""
    if not weights.headers:
        message = "the numbers in pickle files cannot be looked at here"
        findings.warn("deep_skipped", weights.files[0], message, "Convert the folder first, then check the new one.")
        return
    broken: list[str] = []
    zero: list[str] = []
    for file, header in weights.headers.items():
        for name, info in header.tensors.items():
            if info.dtype not in _BITS or not info.elements:
                continue
            finite, all_zero = _judge(folder / file, header.data_start + info.begin, info)
            if not finite:
                broken.append(name)
            if all_zero:
                zero.append(name)
    if broken:
        count = "a tensor holds" if len(broken) == 1 else f"{len(broken):,} tensors hold"
        message = f"{count} NaN or infinity ({listed(sorted(broken))})"
        findings.problem("not_finite", _file_of(weights, broken[0]), message, "Download the weights again.")
    _judge_zeros(weights, sorted(zero), findings)


def _judge(path: Path, start: int, info: TensorInfo) -> tuple[bool, bool]:
    """Whether one tensor is finite throughout, and whether it is zero throughout."""
    import numpy as np

    kind, exponent, magnitude = _BITS[info.dtype]
    width = np.dtype(kind).itemsize
    finite, all_zero = True, True
    with path.open("rb") as file:
        file.seek(start)
        left = info.elements
        while left and (finite or all_zero):
            count = min(left, PIECE_BYTES // width)
            bits: np.ndarray = np.fromfile(file, dtype=kind, count=count)
            if bits.size != count:
                raise OSError(f"{path.name} became shorter while it was read")
            finite = finite and not bool(((bits & exponent) == exponent).any())
            all_zero = all_zero and not bool((bits & magnitude).any())
            left -= count
    return finite, all_zero


def _file_of(weights: Weights, tensor: str) -> str:
    return next(file for file, header in weights.headers.items() if tensor in header.tensors)


def _judge_zeros(weights: Weights, zero: list[str], findings: Findings) -> None:
    """A matrix of zeros alone may be meant (a new block, a fresh LoRA); a block or embedding of zeros is lost
    data."""
    tensors = weights.tensors
    matrices = [name for name in zero if len(tensors[name].shape) > 1 and min(tensors[name].shape) > 1]
    if not matrices:
        return
    groups: dict[str, list[str]] = defaultdict(list)
    for name, info in tensors.items():
        if len(info.shape) > 1 and math.prod(info.shape) > 1:
            match = _BLOCK.fullmatch(name)
            groups[match[1] if match else name].append(name)
    # one half of each LoRA pair starts at zero, which half depends on the layer
    lost = [group for group, names in groups.items() if set(names) <= set(matrices) and ".lora_" not in names[0]]
    file = _file_of(weights, matrices[0])
    if lost:
        message = f"nothing but zeros in {listed(sorted(lost))}: the data is lost"
        findings.problem("zero_weights", file, message, f"Download {file} again.")
    else:
        message = f"nothing but zeros in {listed(matrices)}"
        findings.warn("zero_weights", file, message, "Usual for a fresh LoRA or an added block; else download again.")
