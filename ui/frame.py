"""The frame of every page: name, the five pages, the Share button and one link that says what is going on.

Each page's `build(site)` calls `header(site, "Train")` first. Gradio's own navigation and footer are off.
"""

from __future__ import annotations

import html

import gradio as gr

from ui.glyphs import SPRITE
from ui.routes import asset_url
from ui.site import Site

PAGES = (("Train", "./"), ("Live", "live"), ("Runs", "runs"), ("Data", "data"), ("Models", "models"))
_MARK = (
    '<svg class="sb-mark" width="20" height="20" viewBox="0 0 20 20" aria-hidden="true">'
    '<rect x="6" y="1" width="8" height="14" rx="4" fill="none" stroke="currentColor" stroke-width="1.5"/>'
    '<circle cx="10" cy="5" r="2" fill="currentColor"/>'
    '<circle cx="10" cy="11" r="2" fill="none" stroke="currentColor"/>'
    '<path d="M10 15v4M6 19h8" stroke="currentColor" stroke-width="1.5"/></svg>'
)
_SHARE = """
<div id="sb-share" class="sb-pop" popover role="dialog" aria-labelledby="sb-share-title">
  <h2 id="sb-share-title">Work from another computer</h2>
  <p>This page answers only on the machine it runs on. From another computer, open a tunnel over your own
  ssh:</p>
  <div class="sb-copy"><code id="sb-ssh">ssh -L 7860:localhost:7860 user@host</code>
  <button type="button" class="sb-button" data-copy="sb-ssh">Copy</button></div>
  <p>Put in how you log in to this machine, then open <code id="sb-ssh-url">http://localhost:7860</code>
  there. Nobody without that login can see anything.</p>
  <p class="sb-help">Links for teammates come in a later version. They will be off by default.</p>
</div>
"""


def header(site: Site, current: str) -> None:
    """Build the header of one page; `current` is its title in PAGES, or the page it belongs to.

    The status link is filled by `assets/frame.js`, which asks `api/state` every two seconds while the page is
    visible.
    """
    links = "".join(
        f'<a href="{href}" data-word="{title}"{" aria-current=page" if title == current else ""}>{title}</a>'
        for title, href in PAGES
    )
    gr.HTML(
        f'{SPRITE}<a class="sb-skip" href="#sb-main">Skip to the page</a>'
        f'<header class="sb-header" data-page="{html.escape(current)}">'
        f'<a class="sb-name" href="./">{_MARK}Signalbox</a>'
        f'<nav class="sb-nav" aria-label="Pages">{links}</nav>'
        '<a class="sb-status" id="sb-status" href="live" aria-live="off"><span>…</span></a>'
        '<button type="button" class="sb-button" popovertarget="sb-share">Share</button></header>'
        f'{_SHARE}<span id="sb-main" tabindex="-1"></span>',
        elem_id="sb-frame",
        padding=False,
        apply_default_css=False,
        head="".join(f'<script src="{asset_url(name)}"></script>' for name in ("numbers.js", "frame.js")),
        js_on_load="window.signalbox.frame(element)",
    )
