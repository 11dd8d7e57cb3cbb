"""What the product's source never does: unpickle, run text as code, start a shell, take code from a model folder."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.conftest import ROOT

CONVERT = "trainer/models/convert.py"  # tensors alone, weights_only, in a limited child; its own tests hold it to that
PARTS = ("trainer", "ui", "profiles", "benchmarks", "docs")
MODULES = {"pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib", "multiprocessing", "code", "runpy"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
# they pickle what they send: text between processes goes as JSON in a tensor of bytes
PICKLING = {
    "all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list", "send_object_list",
    "recv_object_list",
}  # fmt: skip
SHELLS = {"os": {"system", "popen"}, "subprocess": {"getoutput", "getstatusoutput"}}


def product_files() -> list[Path]:
    """Every Python file that is shipped, and the scripts beside it."""
    return [ROOT / "app.py", *sorted(path for part in PARTS for path in (ROOT / part).rglob("*.py"))]


def dotted(node: ast.expr) -> str:
    """`a.b.c` of a name or attribute; "" for anything else at the root."""
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else f"?.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def of_imports(node: ast.AST) -> list[str]:
    """Banned modules, and banned names taken out of allowed ones."""
    if isinstance(node, ast.Import):
        return [f"import {a.name}" for a in node.names if a.name.split(".")[0] in MODULES]
    if isinstance(node, ast.ImportFrom) and node.module:
        first, names = node.module.split(".")[0], {alias.name for alias in node.names}
        found = [f"from {node.module}"] if first in MODULES else []
        taken = names & (SHELLS.get(first, set()) | PICKLING | ({"load"} if first == "torch" else set()))
        return found + [f"from {node.module} import {name}" for name in taken]
    return []


def of_call(node: ast.Call) -> list[str]:
    """What a call does that is banned."""
    name, found = dotted(node.func), []
    last, root = name.rsplit(".", 1)[-1], name.split(".")[0]
    if name in BUILTINS or name in {f"builtins.{each}" for each in BUILTINS}:
        found.append(name)
    if name.endswith("torch.load") or last in PICKLING or last in SHELLS.get(root, set()):
        found.append(name)
    for keyword in node.keywords:
        if keyword.arg in ("trust_remote_code", "allow_pickle", "shell") and not is_false(keyword.value):
            found.append(f"{name}({keyword.arg}=…)")
        if keyword.arg == "weights_only" and is_false(keyword.value):
            found.append(f"{name}(weights_only=False)")
    return found


def violations(source: str) -> list[str]:
    """Everything banned in a source text, with its line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        what = of_imports(node) + (of_call(node) if isinstance(node, ast.Call) else [])
        if isinstance(node, ast.Dict):  # arguments that are handed on as **options
            what += [
                f"{{'{key.value}': …}}"
                for key, value in zip(node.keys, node.values, strict=True)
                if isinstance(key, ast.Constant)
                and key.value in ("trust_remote_code", "allow_pickle")
                and not is_false(value)
            ]
        if isinstance(node, ast.Attribute) and dotted(node) in ("torch.load", "pickle.loads", "pickle.load"):
            what.append(dotted(node))
        found += [f"line {getattr(node, 'lineno', 0)}: {each}" for each in what]
    return found


def test_no_product_file_unpickles_runs_text_or_trusts_a_folders_code() -> None:
    files = product_files()
    assert len(files) > 100
    found = {path.relative_to(ROOT).as_posix(): violations(path.read_text(encoding="utf-8")) for path in files}
    allowed = found.pop(CONVERT)
    assert {name: what for name, what in found.items() if what} == {}
    assert {what.split(": ")[1] for what in allowed} == {"import pickle", "torch.load"}, allowed


def test_loading_a_model_or_tokenizer_always_says_that_no_code_is_trusted() -> None:
    silent = []
    for path in product_files():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Call)
                and dotted(node.func).startswith("Auto")
                and "from_pretrained" in dotted(node.func)
            ):
                if not any(keyword.arg == "trust_remote_code" for keyword in node.keywords):
                    silent.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert silent == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle", "from pickle import loads", "import multiprocessing.pool", "eval('1')", "exec(text)",
        "builtins.eval(text)", "compile(text, '', 'exec')", "torch.load(path)", "from torch import load", "f = torch.load",
        "os.system('ls')", "from os import system", "subprocess.run(text, shell=True)", "subprocess.run(text, shell=flag)",
        "AutoModel.from_pretrained(p, trust_remote_code=True)", "AutoModel.from_pretrained(p, trust_remote_code=flag)",
        "np.load(p, allow_pickle=True)", "options = {'trust_remote_code': True}", "dist.all_gather_object(a, b)",
        "torch.distributed.broadcast_object_list([a])", "from torch.distributed import gather_object",
        "subprocess.getoutput('ls')", "load(p, weights_only=False)",
    ],
)  # fmt: skip
def test_the_check_sees_what_it_bans(line: str) -> None:
    assert violations(line)


@pytest.mark.parametrize(
    "line", ["model.eval()", "re.compile('x')", "np.load(p, allow_pickle=False)", "block.compile(dynamic=True)",
             "AutoModel.from_pretrained(p, trust_remote_code=False)", "load(p, weights_only=True)"],
)  # fmt: skip
def test_the_check_lets_pass_what_is_harmless(line: str) -> None:
    assert violations(line) == []


def test_the_one_place_that_unpickles_takes_weights_only() -> None:
    calls = [
        node for node in ast.walk(ast.parse((ROOT / CONVERT).read_text(encoding="utf-8"))) if isinstance(node, ast.Call)
    ]
    loads = [node for node in calls if dotted(node.func) == "torch.load"]
    assert loads
    for node in loads:
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        assert isinstance(given["weights_only"], ast.Constant) and given["weights_only"].value is True
