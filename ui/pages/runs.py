"""The runs page. This file belongs to the helper who builds that page; until then it shows the frame alone."""

from __future__ import annotations

from ui.frame import header
from ui.site import Site


def build(site: Site) -> None:
    """Build the page."""
    header(site, "Runs")
