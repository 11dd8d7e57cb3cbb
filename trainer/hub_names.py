"""Names of a hub: what a model id is, which folder it becomes, and which files of a model are fetched.

Torch-free and without the hub's library; called by `trainer.hub`, its child process, the workspace and the command line.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from trainer.refusal import Refusal

STAGING = ".download-"
NOTE = ".downloaded"
"""Where a downloaded folder says what it is; no suffix, so that a run's fingerprint of the model does not depend on it."""

_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
_ID = re.compile(rf"(?P<org>{_PART})/(?P<name>{_PART})(?:@(?P<revision>[A-Za-z0-9][A-Za-z0-9._-]{{0,63}}))?")
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,159}")
_USUAL_WEIGHTS = re.compile(r"(?:model|adapter_model)(?:-\d{5}-of-\d{5})?\.safetensors")
_TEXTS = frozenset(
    (
        "config.json", "generation_config.json", "adapter_config.json",
        "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
        "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tekken.json",
        "chat_template.jinja", "chat_template.json",
    )
)  # fmt: skip
_LONGEST_ID = 96


@dataclass(frozen=True)
class ModelId:
    """`org/name` on a hub, and a branch, tag or commit of it where one was named."""

    repo: str
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> ModelId:
        """The id that a person typed; raises Refusal for anything that is none, paths and addresses among them."""
        found = _ID.fullmatch(text.strip())
        # the hub allows neither of these in a name; without "--" a folder's name belongs to one id alone
        if found is None or "--" in found[0] or ".." in found[0] or len(found["org"] + found["name"]) >= _LONGEST_ID:
            raise Refusal(
                f"'{text.strip()[:80]}' is no model id. Write organisation/name, and behind an @ a branch, tag or commit "
                "if it is to be one: org/name or org/name@main.",
                "model_path",
            )
        return cls(f"{found['org']}/{found['name']}", found["revision"])

    @classmethod
    def of_folder(cls, name: str) -> ModelId | None:
        """The id behind the name of a folder that `folder` gave, or None."""
        try:
            return cls.parse(name.replace("--", "/", 1))
        except Refusal:
            return None

    @property
    def folder(self) -> str:
        """The model's folder among the models of a workspace."""
        return self.repo.replace("/", "--") + (f"@{self.revision}" if self.revision else "")

    def __str__(self) -> str:
        return self.repo + (f"@{self.revision}" if self.revision else "")


def id_or_none(text: str) -> ModelId | None:
    """The id that `text` is, or None."""
    try:
        return ModelId.parse(text)
    except Refusal:
        return None


def downloaded(models_dir: Path, text: str) -> Path | None:
    """The folder of the downloaded model whose id `text` is; None where it is no id or the model is not there."""
    found = id_or_none(text)
    folder = models_dir / found.folder if found else None
    return folder if folder is not None and folder.is_dir() else None


def id_in(model_path: str, config_file: Path) -> ModelId | None:
    """The id that a config's `model_path` is, which was read as a path beside the file; None where it is a folder or no id."""
    path, beside = Path(model_path), config_file.absolute().parent
    if not model_path or path.is_dir():
        return None
    return id_or_none(str(path.relative_to(beside)) if path.is_relative_to(beside) else model_path)


def how_to_get(model: ModelId) -> str:
    """What to do about a model id that is not in the workspace."""
    return f"`python -m trainer download {model}` fetches it into the workspace; so does Download on the Models page."


def chosen_files(names: list[str]) -> list[str]:
    """Which files are fetched: configuration, tokenizer, chat template and safetensors weights, all of the top folder.

    Weights under their usual names are enough where there are such; other copies of them (another precision, one file for
    another program) stay where they are. Code, pickle and GGUF files are never among them.
    """
    safe = [name for name in names if _FILE.fullmatch(name)]
    weights = [name for name in safe if name.endswith(".safetensors")]
    usual = [name for name in weights if _USUAL_WEIGHTS.fullmatch(name)] or weights
    index = [name for name in safe if name.endswith(".safetensors.index.json")]
    index = [name for name in index if name.startswith(("model.", "adapter_model."))] or index
    return sorted({name for name in safe if name in _TEXTS} | set(usual) | set(index))
