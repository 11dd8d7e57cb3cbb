"""Routes of routes_train. This file belongs to the helper who writes it; until then there are none."""

from __future__ import annotations

from starlette.routing import Route

from ui.site import Site


def routes(site: Site) -> list[Route]:
    """No routes yet."""
    return []
