"""The form: Gradio components made from the schema, group by group, each with its label, unit, help and id.

No bound, default or help text stands here; all come from `trainer.config.fields()`. Numbers are text, so that 2e-4
can be typed; the schema reads them. Called by `ui/pages/train.py`.
"""

from __future__ import annotations

import html
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, get_args

import gradio as gr

from trainer.config import FieldInfo, fields
from trainer.packages import NEEDS_BITSANDBYTES, has_bitsandbytes
from trainer.schema import Group
from trainer.workspace import Workspace
from ui import numbers

OPEN_GROUPS = ("What", "How")
"""Groups with a panel of their own; the others open inside the second one."""
FIRST = (
    "model_path", "data.dataset_path", "profile.name", "hyperparams.max_length",
    "hyperparams.method", "hyperparams.learning_rate", "hyperparams.num_epochs", "lora.r",
)  # fmt: skip
"""The order of thought; the other fields follow in the order of the schema."""
LONG_TEXT = ("profile.system_prompt",)
SEND_TEST = """<div class="sb-row" id="notify-test"><button type="button" class="sb-button">Send test</button>
<span class="sb-help" id="notify-said" role="status"></span></div>"""
"""What stands below the webhook; `assets/train_notify.js` fills it."""
MORE_DATA = """<div class="sb-row sb-more-data" id="more-data">
<label class="sb-more-file"><span class="sb-help">Add a file</span> <select class="sb-input" id="more-data-file"></select></label>
<label><span class="sb-help">Weight</span> <input class="sb-input" id="more-data-weight" type="text" inputmode="decimal"
value="1"></label> <button type="button" class="sb-button">Add</button> <span class="sb-message" role="status"></span></div>"""
"""What stands below further data files; `assets/train_files.js` fills it."""
PICKED = ("model_path", "data.dataset_path", "data.validation_dataset_path", "profile.name")
SEGMENTED = ("hyperparams.method",)
WIDE = (*PICKED[:2], *LONG_TEXT, "data.dataset_paths", "data.columns", "eval.sample_prompts", "notify.webhook_url")
# labels of choices that are no words of their own, or that need a warning
_CHOICE_LABELS = {
    "full": "Full",
    "lora": "LoRA",
    "qlora": "QLoRA",
    "adamw": "AdamW",
    "adamw_8bit": "AdamW, 8 bits (approximate)",
    "none": "none (approximate)",
    "no": "never",
    "steps": "every so many steps",
    "epoch": "each epoch",
}

Choices = list[tuple[str, str]]


@dataclass(frozen=True)
class Form:
    """The components of the form by dotted key, in the order of the schema."""

    components: dict[str, gr.components.Component]


def elem_id(key: str) -> str:
    """The id of a setting's field on the page: f-hyperparams-learning_rate."""
    return "f-" + key.replace(".", "-")


def build_form() -> Form:
    """Build all panels of the form; values and choices of pickers are filled in when the page is opened."""
    by_group: dict[str, list[FieldInfo]] = {name: [] for name in get_args(Group)}
    for info in sorted(fields(), key=lambda info: FIRST.index(info.key) if info.key in FIRST else len(FIRST)):
        by_group[info.group].append(info)
    components: dict[str, gr.components.Component] = {}
    with _panel("What", "1 What"):
        components |= _fields(by_group["What"])
    with _panel("How", "2 How"):
        components |= _fields(by_group["How"])
        for name in by_group:
            if name not in OPEN_GROUPS:
                with _disclosure(name, any(info.basic for info in by_group[name])):
                    components |= _fields(by_group[name])
                    if name == "Notify":
                        gr.HTML(SEND_TEST, elem_classes=["sb-wide-field"], apply_default_css=False, js_on_load=None)
    return Form({info.key: components[info.key] for info in fields()})


@contextmanager
def _panel(group: str, title: str) -> Iterator[None]:
    with gr.Column(elem_id=f"group-{group.lower()}", elem_classes=["sb-panel", "sb-group"]):
        gr.HTML(f'<h2 class="sb-section">{html.escape(title)}</h2>', apply_default_css=False, js_on_load=None)
        yield


@contextmanager
def _disclosure(group: str, basic: bool) -> Iterator[None]:
    """A part of a panel that opens on demand; its fields are in the page either way, so that they can be found."""
    slug = group.lower()
    classes = ["sb-group", "sb-closed"] + ([] if basic else ["sb-advanced"])
    with gr.Column(elem_id=f"group-{slug}", elem_classes=classes):
        gr.HTML(
            f'<h3 class="sb-disclosure"><button type="button" aria-expanded="false" data-opens="group-{slug}">'
            f'{html.escape(group)}<span class="sb-summary" data-summary="{html.escape(group)}"></span></button></h3>',
            apply_default_css=False,
            js_on_load=None,
        )
        with gr.Column(elem_classes=["sb-inside"]):
            yield


def _fields(group: list[FieldInfo]) -> dict[str, gr.components.Component]:
    made: dict[str, gr.components.Component] = {}
    for info in group:
        made[info.key] = _component(info)
        if info.key == "data.dataset_paths":
            classes = ["sb-wide-field", "sb-advanced"]
            gr.HTML(MORE_DATA, elem_classes=classes, apply_default_css=False, js_on_load=None)
    return made


def _component(info: FieldInfo) -> gr.components.Component:
    classes = ["sb-field", "sb-basic" if info.basic else "sb-advanced"] + (
        ["sb-wide-field"] if info.key in WIDE else []
    )
    # "Epochs" needs no unit beside it
    label = f"{info.title}, {info.unit}" if info.unit and info.unit not in info.title.lower().split() else info.title
    common: dict[str, Any] = {
        "label": label,
        "info": info.help,
        "elem_id": elem_id(info.key),
        "elem_classes": classes,
    }
    if info.kind == "switch":
        return gr.Checkbox(interactive=True, **common)
    if info.key in PICKED:
        return gr.Dropdown([], value=None, allow_custom_value=info.key != "profile.name", interactive=True, **common)
    if info.key in SEGMENTED:
        return gr.Radio(choice_labels(info), interactive=True, **common)
    if info.kind == "choice":
        return gr.Dropdown(choice_labels(info), value=None, filterable=False, interactive=True, **common)
    if info.kind in ("list", "files") or info.key in LONG_TEXT:
        return gr.Textbox(lines=2, max_lines=8, interactive=True, **common)
    return gr.Textbox(lines=1, max_lines=1, interactive=True, **common)


def choice_labels(info: FieldInfo) -> Choices:
    """The choices of a setting as (what the person reads, value)."""
    return [(_CHOICE_LABELS.get(word, word), word) for word in offered(info)]


def offered(info: FieldInfo) -> list[str]:
    """The choices of a setting that this machine has the package for."""
    hidden = None if has_bitsandbytes() else NEEDS_BITSANDBYTES.get(info.key)
    return [word for word in info.choices if word != hidden]


def to_component(info: FieldInfo, text: str) -> Any:
    """A draft's text as what its component shows."""
    if info.kind == "switch":
        return text.strip().lower() in ("true", "on", "yes", "1")
    if info.key in SEGMENTED or (info.kind == "choice" and info.key not in PICKED):
        return text if text in offered(info) else None
    return text


def picker_choices(workspace: Workspace, profile_names: list[str]) -> dict[str, Choices]:
    """The choices of the pickers as the workspace has them now."""
    models = [(path.name, str(path)) for path in workspace.models()]
    data = [(f"{info.name} · {numbers.disk(info.bytes)}", str(info.path)) for info in workspace.datasets()]
    return {
        "model_path": _told_apart(models),
        "data.dataset_path": _told_apart(data),
        "data.validation_dataset_path": [("None: a part of the data", ""), *_told_apart(data)],
        "profile.name": [("None: the rows as they are", ""), *((name, name) for name in profile_names)],
    }


def _told_apart(choices: Choices) -> Choices:
    """Choices of the same name get the folder they lie in."""
    names = [name for name, _ in choices]
    return [(f"{n} ({v.rsplit('/', 2)[-2]})" if names.count(n) > 1 and "/" in v else n, v) for n, v in choices]
