"""The shape verdict on a model folder: does it hold every tensor of its architecture, in its shape, and no other?

Comes after the header verdict and imports torch, so it runs in the worker's torch child only. What is expected is built
by `trainer.models.blueprint` and kept by `trainer.models.layout`. Changes nothing in the folder.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.models import known
from trainer.models.adapter import CONFIG as ADAPTER_CONFIG
from trainer.models.adapter import base_path, check_adapter
from trainer.models.adapter_shapes import check_adapter_shapes
from trainer.models.architecture import check_config
from trainer.models.blueprint import Difference, Unbuildable, build, difference, input_embedding, layout_of
from trainer.models.findings import Findings, listed
from trainer.models.folder import ModelFolder
from trainer.models.layout import Layout, keep_layout, layout_key, matches
from trainer.models.weights import SAFETENSORS_INDEX, Weights, find_weights

PLAIN_DTYPES = frozenset(("F64", "F32", "F16", "BF16"))
MORE_BYTES = 3 * 1024**3
"""What building may take beyond what the libraries hold: names and modules, never numbers."""
AGAIN = "Weights and config.json belong to different models, or a file is damaged: download both again."


def check_shapes(path: Path, *, model_roots: Sequence[Path] = (), layouts: Path | None = None) -> dict[str, Any]:
    """Hold the tensors of the model or adapter in `path` against its architecture; `layouts` keeps what was built.

    Returns {"problems", "warnings", "facts": {"shapes", "shapes_why"}}; "shapes" is as expected, differ or unknown.
    """
    findings = Findings()
    folder = ModelFolder(path, model_roots, Findings())
    try:
        if folder.has(ADAPTER_CONFIG) and not folder.has("config.json"):
            _check_lora(folder, model_roots, findings, layouts)
        else:
            _check_full(folder, findings, layouts)
    except Unbuildable as error:
        message = f"transformers cannot build the model that config.json describes ({error.reason})"
        fix = "Download config.json again, or install what the message names."
        findings.problem("cannot_build", "config.json", message, fix)
    shapes = "differ" if findings.problems else findings.facts.get("shapes", "as expected")
    facts = {"shapes": shapes, "shapes_why": findings.facts.get("shapes_why", "")}
    return {"problems": findings.problems, "warnings": findings.warnings, "facts": facts}


def limit_memory() -> None:
    """Let this process, a child made for one verdict, take 3 GiB more than it has; a config that wants more ends it."""
    if not sys.platform.startswith("linux"):
        return  # other systems do not hold a process to it; the time-out does
    import resource

    status = Path("/proc/self/status").read_text("ascii")
    held = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmData:"))
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    wanted = held + MORE_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


def _unknown(findings: Findings, why: str) -> None:
    findings.facts["shapes"], findings.facts["shapes_why"] = "unknown", why


def _read(folder: ModelFolder) -> tuple[dict[str, Any], Weights] | str:
    """Config and weights as the header verdict passed them, or why there is nothing to compare."""
    below = folder.findings
    config = check_config(folder, below)
    weights = find_weights(folder, below)
    if below.problems:
        return below.problems[0]["message"]
    assert config is not None and weights is not None, "what is missing is a problem"
    if weights.kind == "pickle":
        return "pickle weights are not opened before they are converted"
    causal = known.causal_types()
    if causal is not None and config.get("model_type") not in causal:
        return f"transformers has no language model of the type '{str(config.get('model_type'))[:60]}'"
    return config, weights


def _check_full(folder: ModelFolder, findings: Findings, layouts: Path | None) -> None:
    read = _read(folder)
    if isinstance(read, str):
        _unknown(findings, read)
        return
    config, weights = read
    model = build(config)
    embedding = input_embedding(model)
    layout = layout_of(model)
    if layouts is not None:
        keep_layout(layouts, layout_key(config), layout)
    if matches(layout, weights.tensors):
        return
    found = difference(model, layout, weights.tensors)
    if config.get("quantization_config"):
        found = _without_packed(found, layout, weights)
    _tell(found, weights, embedding, findings)


def _without_packed(found: Difference, layout: Layout, weights: Weights) -> Difference:
    """Leave out what quantisation replaced: a module with packed numbers has other tensors in other shapes."""
    packed = {name.rpartition(".")[0] for name, info in weights.tensors.items() if info.dtype not in PLAIN_DTYPES}
    modules = {name.rpartition(".")[0] for name in layout.tensors}

    def replaced(name: str) -> bool:
        module = name.rpartition(".")[0]
        return any(place == module or place.startswith(f"{module}.") for place in packed)

    def beside(name: str) -> bool:
        parts = name.split(".")
        return any(".".join(parts[:stop]) in modules for stop in range(1, len(parts)))

    return Difference(
        [name for name in found.missing if not replaced(name)],
        [name for name in found.extra if not beside(name)],
        [entry for entry in found.misshapen if not replaced(entry[0])],
        [name for name in found.broken if not replaced(name)],
    )


def _tell(found: Difference, weights: Weights, embedding: str | None, findings: Findings) -> None:
    whole = weights.files[0] if len(weights.files) == 1 else SAFETENSORS_INDEX
    if found.missing:
        count = "a tensor is" if len(found.missing) == 1 else f"{len(found.missing):,} tensors are"
        message = f"{count} missing ({listed(found.missing)}); loading would fill in random numbers"
        findings.problem("missing_tensor", whole, message, "Download the weights again.")
    if found.misshapen:
        findings.problem("shape_mismatch", *_misshapen(found, weights, whole, embedding), AGAIN)
    if found.broken:
        message = f"the parts of {listed(found.broken)} do not fit together"
        findings.problem("shape_mismatch", whole, message, AGAIN)
    if found.extra:
        count = "a tensor is" if len(found.extra) == 1 else f"{len(found.extra):,} tensors are"
        message = f"{count} not part of the model and would not be loaded ({listed(found.extra)})"
        fix = "Nothing to do if they are from another part of the model; else compare config.json with the original."
        findings.warn("extra_tensor", _holder(weights, found.extra[0]) or whole, message, fix)


def _misshapen(found: Difference, weights: Weights, whole: str, embedding: str | None) -> tuple[str, str]:
    """(file, message) of the tensors with another shape."""
    name, has, wanted = next((entry for entry in found.misshapen if entry[0] == embedding), found.misshapen[0])
    file = _holder(weights, name) or whole
    if name == embedding and len(has) == len(wanted) == 2 and has[1] == wanted[1]:
        text = f"the embedding has {has[0]:,} rows where config.json names vocab_size {wanted[0]:,}"
    else:
        text = f"{name[:120]} has the shape {list(has)} instead of {list(wanted)}"
    others = [entry[0] for entry in found.misshapen if entry[0] != name]
    return file, text + (f"; so have others: {listed(others)}" if others else "")


def _holder(weights: Weights, tensor: str) -> str | None:
    return next((file for file, header in weights.headers.items() if tensor in header.tensors), None)


def _check_lora(folder: ModelFolder, roots: Sequence[Path], findings: Findings, layouts: Path | None) -> None:
    config, weights = check_adapter(folder, folder.findings)
    if folder.findings.problems or config is None or weights is None or not weights.headers:
        _unknown(findings, "the adapter itself is not whole")
        return
    base = base_path(str(config.get("base_model_name_or_path") or ""), folder.path, roots)
    if base is None:
        _unknown(findings, "the base model is not here")
        return
    below = ModelFolder(base, roots, Findings())
    read = _read(below)
    if isinstance(read, str):
        _unknown(findings, f"of the base model, {read}")
        return
    inner = Findings()
    _check_full(ModelFolder(base, roots, Findings()), inner, layouts)
    for found, note in ((inner.problems, findings.problem), (inner.warnings, findings.warn)):
        for item in found:
            note(item["code"], item["file"], f"in the base model: {item['message']}", item["fix"])
    check_adapter_shapes(build(read[0]), folder.path, weights, findings)
