"""The page of all runs: one element that `assets/runs.js` fills from `api/runs`."""

from __future__ import annotations

import gradio as gr

from ui.frame import header
from ui.routes import asset_url
from ui.site import Site

# in this order: each file uses what the ones before it put on window.signalbox
SCRIPTS = ("elements.js", "poller.js", "queue.js", "runs.js")


def runs_list() -> gr.HTML:
    """The table of runs with search, filter and deletion; every action is a route that checks the role itself."""
    links = f'<link rel="stylesheet" href="{asset_url("runs.css")}">'
    scripts = "".join(f'<script src="{asset_url(name)}"></script>' for name in SCRIPTS)
    return gr.HTML(
        "",
        elem_id="sb-runs",
        padding=False,
        apply_default_css=False,
        head=links + scripts,
        js_on_load="window.signalbox.runs(element)",
    )


def build(site: Site) -> None:
    """Build the page."""
    header(site, "Runs")
    runs_list()
