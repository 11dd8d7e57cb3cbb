"""The live page: one element that `assets/live.js` fills from the feed of the run that is being trained."""

from __future__ import annotations

import gradio as gr

from ui.frame import header
from ui.routes import asset_url, plotly_url
from ui.site import Site

# in this order: each file uses what the ones before it put on window.signalbox
SCRIPTS = (
    "elements.js",
    "poller.js",
    "live_model.js",
    "charts.js",
    "run_charts.js",
    "live_actions.js",
    "live_end.js",
    "run_tabs.js",
    "live_panels.js",
    "live_layout.js",
    "live_head.js",
    "live.js",
)


def live_board() -> gr.HTML:
    """The board of one run. It is drawn once and then only extended; no event of Gradio is involved."""
    links = f'<link rel="stylesheet" href="{asset_url("live.css")}">'
    scripts = "".join(f'<script src="{asset_url(name)}"></script>' for name in SCRIPTS)
    return gr.HTML(
        "",
        elem_id="sb-live",
        padding=False,
        apply_default_css=False,
        head=links + scripts,
        js_on_load="window.signalbox.live(element, {plotly: props.plotly})",
        plotly=plotly_url(),
    )


def build(site: Site) -> None:
    """Build the page; the run comes from its address (`?run=ID`), else from `api/state`."""
    header(site, "Live")
    live_board()
