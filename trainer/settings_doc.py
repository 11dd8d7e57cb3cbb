"""docs/settings.md, written from the schema; a test keeps the file and the schema together."""

from __future__ import annotations

from typing import get_args

from trainer.fields import FieldInfo, fields
from trainer.schema import Group
from trainer.values import as_text

_HEAD = """# Settings

Written from `trainer/schema.py` by `trainer/settings_doc.py`: change the schema, then run
`python -m trainer.settings_doc > docs/settings.md`. A config file is JSON and holds only what differs from
the defaults; `hyperparams.learning_rate` stands in it as `{"hyperparams": {"learning_rate": 2e-4}}`.
Relative paths are relative to the config file. Sources, later ones win: defaults, config file, `--profile
--model --dataset` and the form, `--set key=value`.
"""
_OLD = """
## Files of the old system

They load unchanged. Hyperparameters may stand at the top of the file (`batch_size`, `epochs`, `lora_r`,
...), and `save_steps`, `save_total_limit`, `eval_steps`, `eval_strategy` there or under `hyperparams`.
`lora_r` 0, or `use_qlora` / `load_in_4bit` false without any rank, means full training, as it did there; 4
bits mean `qlora`. The same setting under two names with two values is refused, and both names are told.
Keys of parts that are gone (`monitoring`, `locked`, `poll_interval`, ...) have no effect and are listed
when the file is opened. Any other unknown key is refused.
"""


def settings_markdown() -> str:
    """The whole text of docs/settings.md: one table a group, in the order of the form."""
    parts = [_HEAD]
    for group in get_args(Group):
        parts.append(f"\n## {group}\n\n| key | label | default | allowed | help |\n| --- | --- | --- | --- | --- |\n")
        parts += [_row(info) for info in fields() if info.group == group]
    return "".join(parts) + _OLD


def _row(info: FieldInfo) -> str:
    default = as_text(info, info.default)
    unit = f" ({info.unit})" if info.unit else ""
    return (
        f"| `{info.key}` | {info.title}{unit} | {f'`{default}`' if default else 'empty'} "
        f"| {info.allowed} | {info.help} |\n"
    )


if __name__ == "__main__":
    print(settings_markdown(), end="")
