"""The old system's configuration keys: which mean a setting of today, and which belong to parts that are
gone.

`modern(raw)` turns the content of a config file, old or new, into nested settings; `trainer/config.py`
calls it. The old keys were read from that system's source and its shipped file.
"""

from __future__ import annotations

from typing import Any

from trainer.fields import ConfigError, FieldProblem, sections, shown, shown_group
from trainer.schema import HyperparamSettings

_OUTPUT = {"save_steps": "output.save_steps", "save_total_limit": "output.save_total_limit"}
_EVAL = {"eval_steps": "eval.eval_steps", "eval_strategy": "eval.eval_strategy"}
# hyperparameters could stand at the top of the file, and saving and held-out keys among the hyperparameters
_TWINS = (
    {name: f"hyperparams.{name}" for name in HyperparamSettings.model_fields}
    | {
        "epochs": "hyperparams.num_epochs",
        "training_mode": "hyperparams.method",
        "model.model_path": "model_path",
    }
    | {"hyperparams.training_mode": "hyperparams.method"}
    | _OUTPUT
    | _EVAL
    | {f"hyperparams.{old}": new for old, new in (_OUTPUT | _EVAL).items()}
)
_METHOD_TWINS = ("training_mode", "hyperparams.training_mode")
_FOUR_BIT = ("use_qlora", "load_in_4bit", "model.load_in_4bit")

# whole sections and single keys of parts that no longer exist
_RETIRED = frozenset(
    "current_model_dir base_model log_steps poll_interval snapshot_time num_eval_samples eval_max_tokens"
    " eval_timeout_seconds self_correction auto_generate remote_eval curriculum retention locked monitoring"
    " environment galore fortune_teller max_new_tokens effective_batch_size"
    " hyperparams.max_new_tokens hyperparams.effective_batch_size"
    " profile.options profile.system_prompt_template"
    " data.shuffle data.min_length data.max_length_override data.augmentation data.enable_packing"
    " data.packing_strategy output.output_dir output.logging_dir output.resume_from_checkpoint"
    " output.overwrite_output_dir output.save_safetensors output.save_only_model".split()
)
# sections whose keys must be looked at one by one
_OPENED = frozenset({"model", *sections()})


def modern(raw: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The nested settings of a config file's content, and the retired keys that were passed over.

    Raises ConfigError when an old key and its nested twin are both given and differ. Unknown keys stay in
    place, for the schema to refuse.
    """
    flat = _flattened(raw)
    retired = [key for key, value in flat.items() if _is_retired(key, value)]
    for key in retired:
        del flat[key]
    problems = _merge_lora_and_bits(flat)
    for old in [key for key in flat if key in _TWINS]:
        problems += _move(flat, old, _TWINS[old], flat.pop(old))
    if problems:
        raise ConfigError(problems)
    return _nest(flat), retired


def _is_retired(key: str, value: Any) -> bool:
    if key in _RETIRED or key.rsplit(".", 1)[-1].startswith("_"):
        return True
    if key == "optimizer":  # once a section of its own, now a word
        return isinstance(value, dict)
    return key.split(".")[0] == "model" and key not in _TWINS and key not in _FOUR_BIT


def _flattened(raw: dict[str, Any]) -> dict[str, Any]:
    """Keys of known sections as dotted keys; everything else, whatever it holds, as it stands."""
    flat: dict[str, Any] = {}
    for key, value in raw.items():
        section = key.split(".")[0]
        if "." in key and section in _OPENED:
            text = f'write {{"{section}": {{…}}}} with the key inside; a dot in a key is not read.'
            raise ConfigError([FieldProblem(key, text)])
        if key not in _OPENED:
            flat[key] = value
        elif isinstance(value, dict):
            flat |= {f"{key}.{inner}": content for inner, content in value.items()}
        else:
            text = f"{key} is {shown_group(key, value)}. Allowed: a group of settings in {{ }}."
            raise ConfigError([FieldProblem(key, text)])
    return flat


def _nest(flat: dict[str, Any]) -> dict[str, Any]:
    sparse: dict[str, Any] = {}
    for key, value in flat.items():
        section, dot, name = key.partition(".")
        if dot and section in _OPENED:
            sparse.setdefault(section, {})[name] = value
        else:
            sparse[key] = value
    return sparse


def _clash(old: str, value: Any, new: str, other: Any) -> FieldProblem:
    text = f"{old} is {shown(value)}, but {new} is {shown(other)}. They are the same setting: keep one of them."
    return FieldProblem(new, text)


def _move(flat: dict[str, Any], old: str, new: str, value: Any) -> list[FieldProblem]:
    """Give the value of an old key to the setting of today; two that differ are a problem naming both."""
    present = flat.setdefault(new, value)
    same = present == value and isinstance(present, bool) == isinstance(value, bool)
    return [] if same else [_clash(old, value, new, present)]


def _merge_lora_and_bits(flat: dict[str, Any]) -> list[FieldProblem]:
    """The old system had no method: rank 0 or no rank meant full training, 4 bits meant QLoRA."""
    bits = {key: flat.pop(key) for key in _FOUR_BIT if key in flat}
    wrong = [key for key, value in bits.items() if not isinstance(value, bool)]
    if wrong:
        text = f"{wrong[0]} is {shown(bits[wrong[0]])}. Allowed: true or false."
        return [FieldProblem("hyperparams.method", text)]
    rank, alpha = flat.pop("lora_r", None), flat.pop("lora_alpha", None)
    no_rank = rank is not None and not isinstance(rank, bool) and rank == 0
    problems: list[FieldProblem] = []
    if alpha is not None and not (no_rank and alpha == 0):
        problems += _move(flat, "lora_alpha", "lora.alpha", alpha)
    if rank is not None and not no_rank:
        problems += _move(flat, "lora_r", "lora.r", rank)
    return problems + _method(flat, bits, rank, no_rank)


def _method(flat: dict[str, Any], bits: dict[str, Any], rank: Any, no_rank: bool) -> list[FieldProblem]:
    """Set the method that rank and bits mean; a given method that is another one is a problem."""
    means: dict[str, str] = {key: "qlora" for key, value in bits.items() if value}
    if no_rank:
        means["lora_r"] = "full"
    elif rank is not None and not means:
        means["lora_r"] = "lora"
    elif bits and not means and not any(key.startswith("lora.") for key in flat):
        means[next(iter(bits))] = "full"
    given = {key: flat[key] for key in ("hyperparams.method", "method", *_METHOD_TWINS) if key in flat}
    key, method = next(iter(given.items()), ("hyperparams.method", None))
    if method is None:
        if len(set(means.values())) > 1:
            return [_clash("lora_r", rank, next(iter(means)), True)]
        for word in means.values():
            flat["hyperparams.method"] = word
        return []
    if method == "qlora" and bits and not any(bits.values()):
        return [_clash(next(iter(bits)), False, key, method)]
    for old, word in means.items():
        value = rank if old == "lora_r" else bits[old]
        # a rank fits both methods with matrices; no 4 bits fits both methods without them
        fits = {"lora": ("lora", "qlora"), "full": ("full",) if old == "lora_r" else ("full", "lora")}.get(
            word, (word,)
        )
        if method not in fits:
            return [_clash(old, value, key, method)]
    return []
