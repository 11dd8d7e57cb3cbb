"""What the installed transformers can load, read from its source text: importing it would import torch.

Each function returns None when the layout of a later release differs; the check is then left to loading.
"""

from __future__ import annotations

import ast
import importlib.util
from functools import lru_cache
from pathlib import Path


@lru_cache(maxsize=1)
def causal_types() -> frozenset[str] | None:
    """The model types that have a causal language model."""
    return _keys("models/auto/modeling_auto.py", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES")


@lru_cache(maxsize=1)
def model_types() -> frozenset[str] | None:
    """All model types."""
    return _keys("models/auto/auto_mappings.py", "CONFIG_MAPPING_NAMES")


@lru_cache(maxsize=1)
def quantisations() -> frozenset[str] | None:
    """The quantisation methods."""
    return _keys("quantizers/auto.py", "AUTO_QUANTIZER_MAPPING")


def _keys(module: str, variable: str) -> frozenset[str] | None:
    """The text keys of a table `variable = {...}` or `variable = OrderedDict([(key, ...), ...])`."""
    package = importlib.util.find_spec("transformers")
    if package is None or not package.submodule_search_locations:
        return None
    source = Path(package.submodule_search_locations[0]) / module
    if not source.is_file():
        return None
    for statement in ast.parse(source.read_text("utf-8")).body:
        if not isinstance(statement, ast.Assign | ast.AnnAssign):
            continue
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        if any(isinstance(target, ast.Name) and target.id == variable for target in targets):
            keys = [node.value for node in _key_nodes(statement.value) if isinstance(node, ast.Constant)]
            return frozenset(key for key in keys if isinstance(key, str)) or None
    return None


def _key_nodes(value: ast.expr | None) -> list[ast.expr]:
    if isinstance(value, ast.Dict):
        return [key for key in value.keys if key is not None]
    if isinstance(value, ast.Call) and value.args and isinstance(value.args[0], ast.List):
        return [pair.elts[0] for pair in value.args[0].elts if isinstance(pair, ast.Tuple) and pair.elts]
    return []
