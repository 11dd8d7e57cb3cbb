"""Routes that belong to no page: our own files, plotly.js out of its wheel, health, and the server's restart.

Files carry a version in their address and never change under it, so a browser keeps them for good.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
from functools import lru_cache
from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from ui.guard import guarded
from ui.site import Site
from ui.theme import css_variables

ASSETS = Path(__file__).parent / "assets"
_TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_FOREVER = {"cache-control": "public, max-age=31536000, immutable"}


@lru_cache(maxsize=64)
def _asset(name: str) -> bytes:
    """The bytes of one of our files; the style sheet comes with the palette in front."""
    content = (ASSETS / name).read_bytes()
    return css_variables().encode() + content if name == "style.css" else content


def asset_url(name: str) -> str:
    """Where a page finds one of our files, relative to the page, with a version that follows its content."""
    return f"files/{hashlib.sha256(_asset(name)).hexdigest()[:12]}/{name}"


@lru_cache(maxsize=1)
def plotly_url() -> str:
    """Where a page finds plotly.js; the version is the installed wheel's."""
    return f"files/plotly-{importlib.metadata.version('plotly')}/plotly.min.js"


def _plotly_file() -> Path:
    spec = importlib.util.find_spec("plotly")  # found, not imported: importing it takes half a second
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "package_data" / "plotly.min.js"


async def _file(request: Request) -> Response:
    name = request.path_params["name"]
    if f"files/{request.path_params['version']}/{name}" == plotly_url():
        return FileResponse(_plotly_file(), media_type="text/javascript", headers=_FOREVER)
    if name not in {path.name for path in ASSETS.iterdir()}:
        return JSONResponse({"error": "There is no such file."}, 404)
    current = asset_url(name) == f"files/{request.path_params['version']}/{name}"
    # an old address gets the new file, but may not keep it
    headers = _FOREVER if current else {"cache-control": "no-cache"}
    return Response(_asset(name), media_type=_TYPES.get(Path(name).suffix, "application/octet-stream"), headers=headers)


async def _health(request: Request) -> Response:
    return JSONResponse({"ok": True, "port": (request.scope.get("server") or ("", 0))[1]})


async def _restart(request: Request) -> Response:
    request.app.state.restart()
    return JSONResponse({"ok": True}, 202)


def routes(site: Site) -> list[Route]:
    """The routes of this module; every one names the action that its caller must be allowed."""
    return [
        Route("/files/{version}/{name}", guarded("see", _file)),
        Route("/api/health", guarded("see", _health)),
        Route("/api/restart", guarded("settings", _restart), methods=["POST"]),
    ]
