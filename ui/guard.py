"""The outermost layer of the server: which requests may come in, who sends them, and what that person may do.

`ui/server.py` wraps the whole application in `Guard`. Handlers ask `require(request, "start")`; our own
routes are wrapped in `guarded("start", endpoint)`. Whether a control is hidden on the page decides nothing.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections import OrderedDict
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from typing import Any, Literal
from urllib.parse import urlsplit

import gradio as gr
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response

from trainer.refusal import Refusal

Scope = MutableMapping[str, Any]
Role = Literal["owner", "operator", "viewer"]
COOKIE = "signalbox_session"
TOKEN = re.compile(r"[A-Za-z0-9_-]{43}")
MAX_BODY_BYTES = 8 * 2**20
MAX_UPLOAD_BYTES = 2 * 10**9
SESSION_UPLOAD_BYTES = 20 * 10**9
UPLOAD_PATH = "/api/data/upload"
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")

_ALL: frozenset[Role] = frozenset({"owner", "operator", "viewer"})
_OPERATORS: frozenset[Role] = frozenset({"owner", "operator"})
_OWNER: frozenset[Role] = frozenset({"owner"})
# action -> who may; "see_rows" is the viewer's only where the owner switched it on
ACTIONS: dict[str, frozenset[Role]] = {
    "see": _ALL,
    "see_rows": _OPERATORS,
    **dict.fromkeys(
        ("upload", "check", "smoke", "start", "pause", "checkpoint", "stop", "resume", "queue", "try"),
        _OPERATORS,
    ),
    **dict.fromkeys(("save_config", "promote", "roll_back", "download", "note"), _OPERATORS),
    **dict.fromkeys(("delete", "webhook", "share", "paths", "settings", "audit"), _OWNER),
}
# what of Gradio is answered; all else of it (files, proxy, uploads, api calls past the queue) is closed
GRADIO_OPEN = (
    "/gradio_api/queue/join", "/gradio_api/queue/data", "/gradio_api/startup-events",
    "/gradio_api/heartbeat/", "/gradio_api/cancel", "/gradio_api/reset", "/gradio_api/app_id",
)  # fmt: skip
GRADIO_CLOSED = (
    "/gradio_api",
    "/login",
    "/logout",
    "/config",
    "/monitoring",
    "/openapi.json",
    "/docs",
    "/redoc",
    "/svelte",
)
HEADERS = {
    "content-security-policy": (
        "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
        "style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; "
        "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=(), usb=(), payment=()",
}
DROPPED_REQUEST_HEADERS = (b"x-forwarded-host", b"x-gradio-server", b"x-forwarded-for", b"forwarded")


@dataclass(frozen=True)
class Caller:
    """Who sends a request: role, the session whose draft it sees, and whether it may see training rows."""

    role: Role
    session: str
    rows_visible: bool

    def may(self, action: str) -> bool:
        """Whether this caller may do `action`; KeyError for an action that the table does not have."""
        if action == "see_rows" and self.role == "viewer":
            return self.rows_visible
        return self.role in ACTIONS[action]


@dataclass(frozen=True)
class Rules:
    """What the guard holds requests to.

    `public_hosts`: further names the server answers to (a reverse proxy's). `root_path`: where a reverse proxy shows
    us, as "/box"; it may leave that in front of the path or take it away. `share_port`: the second socket, whose
    callers are viewers whatever name or address they use.
    """

    public_hosts: tuple[str, ...] = ()
    root_path: str = ""
    share_port: int | None = None
    viewers_see_rows: bool = False


def caller_of(request: Any) -> Caller:
    """The caller of a Starlette or Gradio request; the guard put it there, the client cannot."""
    inner = request.request if isinstance(request, gr.Request) else request
    return inner.scope["signalbox.caller"]


def refusal_text(caller: Caller, action: str) -> str:
    """Why `caller` may not do `action`, in words."""
    if action == "see_rows":
        return "The owner has not opened rows, samples and logs to viewers."
    need = "the owner" if ACTIONS[action] == _OWNER else "the owner or an operator"
    return f"Your link is for a {caller.role}. This needs {need}. Nothing was changed."


def require(request: gr.Request, action: str) -> Caller:
    """The caller, when allowed to do `action`; otherwise gr.Error, which the page shows in our words."""
    caller = caller_of(request)
    if not caller.may(action):
        raise gr.Error(refusal_text(caller, action), title="Not allowed", print_exception=False)
    return caller


Endpoint = Callable[[Request], Awaitable[Response]]


def guarded(action: str, endpoint: Endpoint) -> Endpoint:
    """`endpoint` for callers who may do `action`, 403 for others; a Refusal in it becomes a 400."""
    assert action in ACTIONS, action

    async def checked(request: Request) -> Response:
        caller = caller_of(request)
        if not caller.may(action):
            return JSONResponse({"error": refusal_text(caller, action)}, 403)
        try:
            return await endpoint(request)
        except Refusal as refusal:
            return JSONResponse({"error": refusal.message, "field": refusal.field}, 400)

    checked.action = action  # type: ignore[attr-defined]  # a test walks all routes and reads it
    return checked


class _BodyTooLarge(Exception):
    """Ends the reading of a body that is over its limit."""


class Guard:
    """ASGI middleware around everything: host, origin, session, role, open paths, body size, headers."""

    def __init__(self, app: Callable[..., Awaitable[None]], rules: Rules) -> None:
        self.app = app
        self.rules = rules
        self._uploaded: OrderedDict[str, int] = OrderedDict()

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """Handle one connection; anything refused never reaches the application."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        if self.rules.root_path and scope["path"] == self.rules.root_path:
            refusal: Response | None = RedirectResponse(f"{self.rules.root_path}/")  # pages name their files relatively
        else:
            scope = self._below_root(scope)
            refusal = self._refuse(scope, headers)
        if refusal is not None:
            await self._answer(refusal, scope, receive, self._sealed(send, "", scope["path"]))
            return
        token = _session_token(headers.get("cookie", ""))
        fresh = None if token else secrets.token_urlsafe(32)
        caller = self._caller(scope, token or fresh or "")
        clean = [pair for pair in scope["headers"] if pair[0] not in DROPPED_REQUEST_HEADERS]
        scope = {**scope, "headers": clean, "signalbox.caller": caller}
        cookie = f"{COOKIE}={fresh}; HttpOnly; SameSite=Lax; Path=/; Max-Age=31536000" if fresh else ""
        if headers.get("x-forwarded-proto") == "https":
            cookie = cookie and f"{cookie}; Secure"
        await self._within_limit(scope, receive, self._sealed(send, cookie, scope["path"]), headers, caller)

    def _refuse(self, scope: Scope, headers: dict[str, str]) -> Response | None:
        host = headers.get("host", "")
        if sum(name == b"host" for name, _ in scope["headers"]) != 1 or not self._knows(host):
            shown = re.sub(r"[^A-Za-z0-9.:_\[\]-]", "?", host[:80])
            return PlainTextResponse(
                f"This server does not answer to the name '{shown}'. Open it at localhost, or start it with "
                "--public-host and that name.\n",
                421,
            )
        path, method = scope["path"], scope.get("method", "GET")
        origin, site = headers.get("origin"), headers.get("sec-fetch-site", "none")
        if origin is not None and not _is_own(origin, host):
            return PlainTextResponse("Requests sent by other sites are refused. Nothing was changed.\n", 403)
        is_page_visit = (
            method in ("GET", "HEAD")
            and headers.get("sec-fetch-mode") == "navigate"
            and headers.get("sec-fetch-dest") == "document"
            and not path.startswith(("/api/", "/gradio_api"))
        )
        if site not in ("same-origin", "none") and not is_page_visit:
            return PlainTextResponse("Requests sent by other sites are refused. Nothing was changed.\n", 403)
        if path.startswith(GRADIO_CLOSED) and not path.startswith(GRADIO_OPEN):
            return PlainTextResponse("There is nothing at this address.\n", 404)
        return None

    def _below_root(self, scope: Scope) -> Scope:
        """The request as if we stood at the top: a proxy may leave our root path in front or take it away."""
        root, path = self.rules.root_path, scope["path"]
        if not root or not (path + "/").startswith(root + "/"):
            return scope
        return {**scope, "path": path[len(root) :] or "/"}

    def _knows(self, host: str) -> bool:
        name, _, port = host.rpartition(":") if re.search(r":\d+$", host) else (host, "", "")
        if name.lower() in LOOPBACK:  # any port: an ssh tunnel may end on another one; the origin must still match
            return True
        return any(
            host.lower() == public.lower() or name.lower() == public.lower() for public in self.rules.public_hosts
        )

    def _caller(self, scope: Scope, token: str) -> Caller:
        shared = self.rules.share_port is not None and (scope.get("server") or ("", 0))[1] == self.rules.share_port
        role: Role = "viewer" if shared else "owner"
        # the id that drafts are stored under is derived, so that it is no use as a cookie
        session = hashlib.sha256(token.encode()).hexdigest()[:24]
        return Caller(role, session, rows_visible=role != "viewer" or self.rules.viewers_see_rows)

    async def _within_limit(
        self, scope: Scope, receive: Any, send: Any, headers: dict[str, str], caller: Caller
    ) -> None:
        upload = scope["path"] == UPLOAD_PATH
        limit = MAX_UPLOAD_BYTES if upload else MAX_BODY_BYTES
        message = f"That is more than the limit of {limit / 1e9:.0f} GB." if upload else "That request is too large."
        if upload:
            left = SESSION_UPLOAD_BYTES - self._uploaded.get(caller.session, 0)
            if left < limit:
                limit = max(left, 0)
                used = f"{SESSION_UPLOAD_BYTES / 1e9:.0f} GB"
                message = f"This session has used its {used} of uploads. Put the file in a data root instead."
        declared = headers.get("content-length", "0")
        if not declared.isdigit() or int(declared) > limit:
            await self._answer(JSONResponse({"error": message}, 413), scope, receive, send)
            return
        seen, started, over = 0, False, False

        async def limited_receive() -> Any:
            nonlocal seen, over
            event = await receive()
            if event["type"] == "http.request":
                seen += len(event.get("body", b""))
                if upload:
                    self._count(caller.session, len(event.get("body", b"")))
                if seen > limit:
                    over = True
                    raise _BodyTooLarge
            return event

        async def watched_send(event: Any) -> None:
            nonlocal started
            if over:
                return
            started = started or event["type"] == "http.response.start"
            await send(event)

        try:
            await self.app(scope, limited_receive, watched_send)
        except _BodyTooLarge:
            pass
        if over and not started:
            await self._answer(JSONResponse({"error": message}, 413), scope, receive, send)

    def _count(self, session: str, count: int) -> None:
        self._uploaded[session] = self._uploaded.get(session, 0) + count
        self._uploaded.move_to_end(session)
        while len(self._uploaded) > 1000:
            self._uploaded.popitem(last=False)

    async def _answer(self, response: Response, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await response(scope, receive, send)

    def _sealed(self, send: Any, cookie: str, path: str) -> Callable[[Any], Awaitable[None]]:
        """`send` with our headers on every reply, none of Gradio's CORS ones, and `cookie` if there is one."""

        async def sealed(event: Any) -> None:
            if event["type"] == "http.response.start":
                replaced = set(HEADERS) | {"server"}
                kept = [
                    (name, value)
                    for name, value in event.get("headers", [])
                    if (text := name.decode("latin-1").lower()) not in replaced
                    and not text.startswith("access-control-")
                ]
                kept += [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                if not any(name.lower() == b"cache-control" for name, _ in kept):
                    good = event["status"] in (200, 206, 304)
                    kept.append((b"cache-control", _keeping(path) if good else b"no-store"))
                if cookie:
                    kept.append((b"set-cookie", cookie.encode()))
                event = {**event, "headers": kept}
            await send(event)

        return sealed


def _keeping(path: str) -> bytes:
    """How long a browser may keep a reply that does not say so itself."""
    if path.startswith("/assets/"):  # Gradio's scripts: their names carry a hash of their content
        return b"public, max-age=31536000, immutable"
    return b"no-cache" if path.startswith("/static/") or path == "/theme.css" else b"no-store"


def _session_token(cookies: str) -> str | None:
    try:
        morsel = SimpleCookie(cookies).get(COOKIE)
    except CookieError:
        return None
    return morsel.value if morsel and TOKEN.fullmatch(morsel.value) else None


def _is_own(origin: str, host: str) -> bool:
    parts = urlsplit(origin)
    return parts.scheme in ("http", "https") and parts.netloc.lower() == host.lower()
