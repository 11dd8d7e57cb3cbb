"""The Data page: upload, the list of datasets, and the report and rows of the chosen one.

One element that `assets/shelf.js` and `assets/data.js` fill from `ui/data_api.py`.
"""

from __future__ import annotations

import gradio as gr

from ui.data_api import limits
from ui.frame import header
from ui.routes import asset_url
from ui.site import Site

SCRIPTS = ("elements.js", "shelf.js", "data_versions.js", "data.js")


def build(site: Site) -> None:
    """Build the page."""
    header(site, "Data")
    roots = [str(root) for root in site.workspace.data_roots]
    gr.HTML(
        "",
        html_template='<div class="sb-shelf"></div>',
        elem_id="sb-data",
        padding=False,
        apply_default_css=False,
        head="".join(f'<script src="{asset_url(name)}"></script>' for name in SCRIPTS)
        + f'<link rel="stylesheet" href="{asset_url("shelf.css")}">',
        js_on_load="window.signalbox.dataPage(element, props)",
        limits=limits(),
        roots=roots,
    )
