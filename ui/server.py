"""The server of one workspace: pages, routes and guard put together, and uvicorn on sockets that we opened.

`ui/process.py` makes a `Server` and runs it; tests call `create_app`. The role of a caller follows the socket
it came in by, never an address, a name or a header.
"""

from __future__ import annotations

import socket
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace

import gradio as gr
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

import ui.data_api
import ui.feed
import ui.hub_api
import ui.models_api
import ui.notify_api
import ui.queue_api
import ui.routes
import ui.routes_train
from ui.guard import MAX_BODY_BYTES, Guard, Rules, caller_of
from ui.pages import data, live, models, runs, train
from ui.routes import asset_url
from ui.site import Site
from ui.theme import theme

RESTART_CODE = 75
WARM_AFTER_S = 5.0
PAGES = (
    ("Live", "/live", live),
    ("Runs", "/runs", runs),
    ("Data", "/data", data),
    ("Models", "/models", models),
)


def build_pages(site: Site) -> gr.Blocks:
    """All pages as one Gradio application: Train at the root, the others by their paths."""
    demo = gr.Blocks(title="Signalbox", analytics_enabled=False, fill_width=True, delete_cache=(3600, 86400))
    with demo:
        train.build(site)
    for title, path, page in PAGES:
        with demo.route(title, path, show_in_navbar=False):
            page.build(site)
    # each handler only hands work over, so several people may be in the same one at a time
    demo.queue(default_concurrency_limit=8, max_size=64, api_open=False)
    return demo


def our_routes(site: Site) -> list[Route]:
    """Every route that is not Gradio's, in the order they are tried."""
    parts = (ui.routes, ui.feed, ui.routes_train, ui.queue_api, ui.data_api, ui.models_api, ui.hub_api, ui.notify_api)
    return [route for part in parts for route in part.routes(site)]


def create_app(site: Site, rules: Rules, restart: Callable[[], None]) -> Guard:
    """The whole application behind its guard. Every Gradio setting that could widen what is reachable is
    passed by name, so that no GRADIO_… variable of the environment decides it."""
    app = Starlette(routes=our_routes(site))
    app.state.restart = restart
    demo = build_pages(site)
    demo.root_path = rules.root_path
    with warnings.catch_warnings():
        # several pages rule out server-side rendering, which we switch off anyway
        warnings.filterwarnings("ignore", message="SSR mode is not supported")
        gr.mount_gradio_app(
            app,
            demo,
            path="/",
            server_name="127.0.0.1",
            footer_links=[],
            run_history=False,
            auth_dependency=_username,
            root_path=rules.root_path,
            allowed_paths=[],
            blocked_paths=[str(site.workspace.root)],
            show_error=False,
            max_file_size=MAX_BODY_BYTES,
            ssr_mode=False,
            enable_monitoring=False,
            pwa=False,
            mcp_server=False,
            favicon_path=str(ui.routes.ASSETS / "mark.svg"),
            theme=theme(),
            head=f'<link rel="stylesheet" href="{asset_url("style.css")}">',
            app_kwargs={"openapi_url": None, "docs_url": None, "redoc_url": None},
        )
    # Gradio answers a number it has no function for with a KeyError, which would be a 500
    app.routes[-1].app.add_exception_handler(KeyError, _no_such_function)  # type: ignore[attr-defined]
    return Guard(app, rules)


def _no_such_function(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": "There is no such function."}, 404)


def _username(request: Request) -> str:
    # Gradio only needs to know that somebody is there; who may do what is decided in the handlers
    return caller_of(request).role


class Server:
    """The running server: uvicorn on a thread of its own, so that the main thread is free for signals."""

    def __init__(
        self,
        site: Site,
        listening: socket.socket,
        ended: threading.Event,
        *,
        public_hosts: Sequence[str] = (),
        root_path: str = "",
    ) -> None:
        self._site = site
        self._sockets = [listening]
        self._ended = ended
        self.exit_code = 0
        self.guard = create_app(site, Rules(tuple(public_hosts), root_path), self.restart)
        config = uvicorn.Config(
            self.guard,
            proxy_headers=False,
            server_header=False,
            date_header=False,
            access_log=False,
            log_level="warning",
            lifespan="on",
            ws="none",
            timeout_keep_alive=30,
            timeout_graceful_shutdown=2,
            limit_concurrency=512,
        )
        self._uvicorn = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._serve, name="http", daemon=True)

    def open_share_socket(self) -> int:
        """Open the second socket, whose callers are viewers; returns its port. Call it before `start`."""
        shared = socket.create_server(("127.0.0.1", 0), backlog=128)
        self._sockets.append(shared)
        port = shared.getsockname()[1]
        self.guard.rules = replace(self.guard.rules, share_port=port)
        return port

    def start(self, timeout_s: float = 30.0) -> bool:
        """Serve from now on; True once requests are answered. The engine warms up later: page first."""
        self._thread.start()
        deadline = time.monotonic() + timeout_s
        while not self._uvicorn.started and self._thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        warm = threading.Timer(WARM_AFTER_S, self._site.engine.warm)
        warm.daemon = True
        warm.start()
        return self._uvicorn.started

    def restart(self) -> None:
        """End with the exit code that asks the supervisor for a fresh process."""
        self.exit_code = RESTART_CODE
        self._ended.set()

    def stop(self, timeout_s: float = 5.0) -> None:
        """Close the sockets and end; open requests get two seconds."""
        self._uvicorn.should_exit = True
        self._thread.join(timeout_s)

    def _serve(self) -> None:
        try:
            self._uvicorn.run(sockets=self._sockets)
        finally:
            if not self._uvicorn.should_exit:  # it ended of itself: a fresh process is better than none
                self.exit_code = RESTART_CODE
            self._ended.set()
