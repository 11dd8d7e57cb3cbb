"""The Train page: the form, the gate beside it, and what the model will see below.

The form's components are Gradio's; what a person does to them reaches the draft through `assets/train_fields.js` and
`ui/routes_train.py`, not through Gradio's events: Gradio 6.31 calls a text box's input handler on key presses only (a
paste or a deletion is missed) and a dropdown's twice at once, which can leave a stream open for as long as the tab is.
Gradio's queue carries only what changes components: the page's opening and the acts of buttons. The draft on the
server is the one truth of all.
"""

from __future__ import annotations

import json
import time
from typing import Any

import gradio as gr
from gradio.context import Context

import profiles
from trainer.config import fields
from trainer.refusal import Refusal
from ui.drafts import Draft
from ui.form import Form, build_form, picker_choices, to_component
from ui.form_state import FormState, form_state
from ui.frame import header
from ui.guard import require
from ui.pages import train_parts as parts
from ui.routes import asset_url
from ui.site import Site
from ui.train_actions import act_of, apply, check_rights

# what the bus carries to the page's script: the draft's revision, which tells it to ask for the new state
_ON_LOAD = "window.signalbox.train(element, trigger, watch, props)"


def build(site: Site) -> None:
    """Build the page into the current Blocks."""
    header(site, "Train")
    scripts = (
        "elements.js",
        "train_fields.js",
        "train_view.js",
        "train_batch.js",
        "train_notify.js",
        "train_files.js",
        "train.js",
    )
    head = "".join(f'<script src="{asset_url(name)}"></script>' for name in scripts)
    styles = ("train.css", "train_form.css", "train_batch.css")
    head += "".join(f'<link rel="stylesheet" href="{asset_url(name)}">' for name in styles)
    with gr.Column(elem_id="train", elem_classes=["sb-waiting"]):
        _static(parts.TOOLBAR + parts.FIRST, "train-top")
        with gr.Row(elem_id="train-columns"):
            with gr.Column(scale=7, elem_id="train-form"):
                form = build_form()
                _static(parts.VIEW, "train-view-box")
            with gr.Column(scale=5, elem_id="train-gate"):
                _static(parts.GATE, "train-gate-box")
        _static(parts.BOTTOM, "train-bottom-box")
        bus = gr.HTML(
            "",
            html_template="<span></span>",
            elem_id="train-bus",
            apply_default_css=False,
            head=head,
            js_on_load=_ON_LOAD,
        )
    _listen(site, form, bus)


def _static(markup: str, elem_id: str) -> None:
    gr.HTML(markup, elem_id=elem_id, padding=False, apply_default_css=False, js_on_load=None)


def _listen(site: Site, form: Form, bus: gr.HTML) -> None:
    """Fill the fields when the page is opened, and again after each act of the page's script."""
    components = list(form.components.values())
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}

    def on_load(request: gr.Request) -> dict[Any, Any]:
        caller = require(request, "check")
        return _shown(site, form, bus, site.drafts.read(caller.session), None)

    def on_act(request: gr.Request, event: gr.EventData) -> dict[Any, Any]:
        caller = require(request, "save_config")
        try:
            act = act_of(event._data)
            check_rights(site, caller, act.values)
            before = _state(site, site.drafts.read(caller.session))
            draft = site.drafts.change(caller.session, lambda draft: apply(site, draft, act))
        except Refusal as refusal:
            return {bus: _signal(site.drafts.read(caller.session), refusal.message)}
        return _shown(site, form, bus, draft, None if act.kind == "refresh" else before)

    Context.root_block.load(on_load, None, [bus, *components], **quiet)
    bus.click(on_act, None, [bus, *components], **quiet)


def _state(site: Site, draft: Draft) -> FormState:
    return form_state(site.workspace, site.config_path, draft)


def _signal(draft: Draft, said: str = "") -> str:
    # the time makes each signal a new value, so that the page hears of it also where nothing changed
    return json.dumps({"revision": draft.revision, "said": said, "at": time.time()})


def _shown(site: Site, form: Form, bus: gr.HTML, draft: Draft, before: FormState | None) -> dict[Any, Any]:
    """Updates for the fields: all of them, or those whose text is another than `before`."""
    state = _state(site, draft)
    choices = picker_choices(site.workspace, profiles.names(site.workspace.profiles))
    updates: dict[Any, Any] = {bus: _signal(draft)}
    for info in fields():
        text = state.texts[info.key]
        if before is not None and before.texts[info.key] == text:
            continue
        value = to_component(info, text)
        if info.key in choices:
            offered = choices[info.key]
            if info.key == "profile.name" and text and text not in dict(offered).values():
                offered = [*offered, (text, text)]
            updates[form.components[info.key]] = gr.update(value=value, choices=offered)
        else:
            updates[form.components[info.key]] = gr.update(value=value)
    return updates
