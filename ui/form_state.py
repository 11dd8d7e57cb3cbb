"""What the form says right now: base config and draft put together, every value judged.

Pure but for reading the base config file. Called by the Train page's handlers, its routes and the gate.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config import (
    Change,
    Config,
    ConfigError,
    FieldInfo,
    FieldProblem,
    as_text,
    field,
    fields,
    get,
    load_sparse,
    merged,
    parse_value,
    resolve,
    retired,
    unflatten,
)
from trainer.fields import masked
from trainer.files import child
from trainer.hub_names import downloaded, id_in
from trainer.refusal import Refusal
from trainer.workspace import Workspace
from ui.drafts import Draft


@dataclass(frozen=True)
class FormState:
    """The form of one session.

    `config` is made of all values that can be used, None where they cannot go together. `sparse` is what
    a save writes. `texts` is what each field shows. `problems` has one sentence a field, "" being the base file.
    `changes` lists what differs from the base, typed text for values that cannot be used.
    """

    base_name: str
    config: Config | None
    sparse: dict[str, Any]
    texts: dict[str, str]
    problems: dict[str, str]
    changes: list[Change]
    retired: list[str]

    @property
    def usable(self) -> bool:
        """Whether a run could be made of these settings as far as the settings themselves go."""
        return self.config is not None and not self.problems


def base_path(workspace: Workspace, config_path: Path, base: str) -> Path:
    """The file a draft started from: a saved config by name, or the server's own config file."""
    return child(workspace.configs, f"{base}.json") if base else config_path


def saved_names(workspace: Workspace) -> list[str]:
    """Names of the saved configs."""
    return sorted(p.stem for p in workspace.configs.glob("*.json"))


def form_state(workspace: Workspace, config_path: Path, draft: Draft) -> FormState:
    """Put base and draft together; never raises for what a person typed or a file says."""
    path = base_path(workspace, config_path, draft.base)
    base_name = draft.base or config_path.name
    problems: dict[str, str] = {}
    sparse: dict[str, Any] = {}
    gone: list[str] = []
    try:
        sparse, gone = load_sparse(path), retired(path)
        model = id_in(sparse["model_path"], path) if isinstance(sparse.get("model_path"), str) else None
        if model is not None and (folder := downloaded(workspace.models_dir, str(model))) is not None:
            sparse["model_path"] = str(folder)
        base = resolve(sparse, source=path.name)
    except ConfigError as error:
        problems[""] = error.message
        sparse, base = {}, Config()
    good = _parsed(workspace, draft, problems)
    layer = unflatten(good)
    try:
        config: Config | None = resolve(sparse, layer)
    except ConfigError as error:  # two settings that cannot go together
        problems |= {p.field: p.message for p in error.problems}
        config = None
    texts = {info.key: _text(info, draft, base) for info in fields()}
    changes = _changes(base, good, draft, problems)
    return FormState(base_name, config, merged(sparse, layer), texts, problems, changes, gone)


def _text(info: FieldInfo, draft: Draft, base: Config) -> str:
    """What a field shows: the text as typed, else the base's value; of a secret one only what may be shown."""
    typed = draft.values.get(info.key)
    if typed is None:
        return as_text(info, get(base, info.key))
    return masked(typed) if info.secret else typed


def _parsed(workspace: Workspace, draft: Draft, problems: dict[str, str]) -> dict[str, Any]:
    """The draft's values that can be used; the others go to `problems`."""
    good: dict[str, Any] = {}
    for key, text in draft.values.items():
        try:
            good[key] = found_path(workspace, key, parse_value(key, text))
        except ConfigError as error:
            problems[key] = error.problems[0].message
    return good


def found_path(workspace: Workspace, key: str, value: Any) -> Any:
    """A model's or dataset's name as its path; what is not found stays as typed, for the gate to name."""
    if key == "data.dataset_paths":
        return [file | {"path": found_path(workspace, "data.dataset_path", file["path"])} for file in value]
    find = {"model_path": workspace.find_model, "data.dataset_path": workspace.find_dataset}.get(key)
    find = workspace.find_dataset if key == "data.validation_dataset_path" else find
    if find is None or not value:
        return value
    try:
        return str(find(value))
    except Refusal:
        return value


def _changes(base: Config, good: dict[str, Any], draft: Draft, problems: dict[str, str]) -> list[Change]:
    changes = []
    for info in fields():
        if info.key not in draft.values:
            continue
        before = get(base, info.key)
        if info.kind == "files":
            before = [entry.model_dump() for entry in before]
        after = good.get(info.key, draft.values[info.key])
        if info.key in problems or after != before:
            changes.append(Change(info.key, info.title, before, after))
    return changes


def problem_list(state: FormState) -> list[FieldProblem]:
    """The form's problems in the order of the form, that of the base file first."""
    order = {"": -1} | {info.key: n for n, info in enumerate(fields())}
    known = sorted(state.problems.items(), key=lambda item: order.get(item[0], len(order)))
    return [FieldProblem(key, text) for key, text in known]


def changed_titles(judged: dict[str, Any], config: Config) -> list[str]:
    """Names of the settings that differ from those a check judged; other keys are passed over."""
    known = {info.key for info in fields()}
    now = config.model_dump(mode="json")
    found = []
    for key, value in judged.items():
        if key in known and _at(now, key) != value:
            found.append(field(key).name)
    return found


def judged_values(config: Config, keys: list[str]) -> dict[str, Any]:
    """The values of some settings, to be kept beside a check's result."""
    now = config.model_dump(mode="json")
    return {key: _at(now, key) for key in keys}


def _at(values: dict[str, Any], key: str) -> Any:
    inner: Any = values
    for part in key.split("."):
        inner = inner[part]
    return inner
