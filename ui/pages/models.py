"""The Models page: the model folders of the roots, each with its report, the download by id, and the starter model.

One element that `assets/shelf.js`, `hub.js` and `models.js` fill from `ui/models_api.py` and `ui/hub_api.py`.
"""

from __future__ import annotations

import gradio as gr

from ui.frame import header
from ui.routes import asset_url
from ui.site import Site

SCRIPTS = ("elements.js", "shelf.js", "hub.js", "models.js")


def build(site: Site) -> None:
    """Build the page."""
    header(site, "Models")
    gr.HTML(
        "",
        html_template='<div class="sb-shelf"></div>',
        elem_id="sb-models",
        padding=False,
        apply_default_css=False,
        head="".join(f'<script src="{asset_url(name)}"></script>' for name in SCRIPTS)
        + f'<link rel="stylesheet" href="{asset_url("shelf.css")}">',
        js_on_load="window.signalbox.modelsPage(element, props)",
        folder=str(site.workspace.models_dir),
        roots=[str(root) for root in site.workspace.model_roots],
    )
