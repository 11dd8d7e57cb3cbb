"""The guard around everything: hosts, origins, sessions, roles, body sizes, headers. A real guard, a small app in it."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import gradio as gr
import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from trainer.refusal import Refusal
from ui import guard
from ui.guard import ACTIONS, Caller, Guard, Rules, guarded, require


def in_a_thread(coroutine: Any) -> Any:
    """Run a coroutine where no loop runs yet: Playwright keeps one in the tests' own thread once a browser was opened."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, coroutine).result()


PORT, SHARED = 7860, 7999
OWN = {"host": f"localhost:{PORT}"}
# design.md 8, written out by hand: the table of the product must equal it
EXPECTED = {
    "see": "owner operator viewer",
    "see_rows": "owner operator",
    "upload": "owner operator", "check": "owner operator", "smoke": "owner operator", "start": "owner operator",
    "pause": "owner operator", "checkpoint": "owner operator", "stop": "owner operator", "resume": "owner operator",
    "queue": "owner operator", "try": "owner operator", "save_config": "owner operator",
    "promote": "owner operator", "roll_back": "owner operator", "download": "owner operator",
    "note": "owner operator", "delete": "owner", "webhook": "owner", "share": "owner", "paths": "owner",
    "settings": "owner", "audit": "owner",
}  # fmt: skip


async def echo(request: Request) -> Response:
    """What the application saw of a request."""
    body = await request.body()
    caller: Caller = request.scope["signalbox.caller"]
    seen = {
        "bytes": len(body),
        "role": caller.role,
        "session": caller.session,
        "headers": dict(request.headers),
    }
    return JSONResponse(seen, headers={"access-control-allow-origin": "*", "server": "x"})


async def refusing(request: Request) -> Response:
    """An endpoint that refuses."""
    raise Refusal("No data is chosen.", "data.dataset_path")


async def events(request: Request) -> Response:
    """A stream, as Gradio's queue sends."""

    async def pieces() -> AsyncIterator[str]:
        for number in range(3):
            yield f"data: {number}\n\n"

    return StreamingResponse(pieces(), media_type="text/event-stream")


def guard_of(rules: Rules | None = None) -> Guard:
    """A guard around an application that answers everywhere."""
    routes = [
        Route("/api/start", guarded("start", echo), methods=["GET", "POST"]),
        Route("/api/refusing", guarded("see", refusing)),
        Route("/gradio_api/queue/data", events),
        Route("/{path:path}", echo, methods=["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"]),
    ]
    return Guard(Starlette(routes=routes), rules or Rules(share_port=SHARED))


def ask(
    path: str = "/", method: str = "GET", *, port: int = PORT, around: Guard | None = None, **more: Any
) -> httpx.Response:
    """One request through the guard, arriving at the socket of `port`."""
    headers: Any = {**OWN, **more.pop("headers", {})}

    async def go() -> httpx.Response:
        inner = around or guard_of()

        async def arriving(scope: Any, receive: Any, send: Any) -> None:
            await inner({**scope, "server": ("127.0.0.1", port)}, receive, send)

        transport = httpx.ASGITransport(arriving, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url=f"http://localhost:{port}") as client:
            return await client.request(method, path, headers=headers, **more)

    return in_a_thread(go())


def test_the_roles_table_is_the_one_that_was_agreed() -> None:
    assert {action: set(roles) for action, roles in ACTIONS.items()} == {
        action: set(roles.split()) for action, roles in EXPECTED.items()
    }


@pytest.mark.parametrize("action", EXPECTED)
@pytest.mark.parametrize("role", ["owner", "operator", "viewer"])
def test_a_handler_runs_for_exactly_the_roles_of_the_table(action: str, role: str) -> None:
    caller = Caller(role, "s", rows_visible=role != "viewer")  # type: ignore[arg-type]
    request = gr.Request(Request({"type": "http", "headers": [], "signalbox.caller": caller}))
    if role in EXPECTED[action].split():
        assert require(request, action) is caller
    else:
        with pytest.raises(gr.Error, match="Nothing was changed|not opened"):
            require(request, action)


def test_a_viewer_sees_rows_only_where_the_owner_switched_it_on() -> None:
    assert not Caller("viewer", "s", rows_visible=False).may("see_rows")
    assert Caller("viewer", "s", rows_visible=True).may("see_rows")


def test_an_action_the_table_does_not_have_is_an_error_not_a_permission() -> None:
    with pytest.raises(KeyError):
        Caller("owner", "s", rows_visible=True).may("format_disk")


@pytest.mark.parametrize("host", ["localhost:7860", "127.0.0.1:7860", "[::1]:7860", "LOCALHOST:7860", "localhost"])
def test_the_names_of_this_machine_are_answered(host: str) -> None:
    assert ask(headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    ["evil.com", "evil.com:7860", "localhost.evil.com", "127.0.0.1.evil.com:7860", "", "localhost:7860@evil.com",
     "10.0.0.5:7860", "0.0.0.0:7860", "localhost evil.com", "xlocalhost", "[::2]:7860"],
)  # fmt: skip
def test_any_other_host_is_turned_away_in_words(host: str) -> None:
    reply = ask(headers={"host": host})
    assert reply.status_code == 421
    assert "--public-host" in reply.text and "<" not in reply.text


def test_a_second_host_header_is_turned_away() -> None:
    scope = {
        "type": "http", "method": "GET", "path": "/", "raw_path": b"/", "query_string": b"", "server": ("127.0.0.1", PORT),
        "headers": [(b"host", b"localhost:7860"), (b"host", b"evil.com")],
    }  # fmt: skip
    sent: list[Any] = []

    async def send(event: Any) -> None:
        sent.append(event)

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    in_a_thread(guard_of()(scope, receive, send))
    assert sent[0]["status"] == 421


def test_a_public_host_is_answered_when_it_was_named() -> None:
    around = guard_of(Rules(public_hosts=("train.example.org",)))
    good = {"host": "train.example.org", "origin": "https://train.example.org"}
    assert ask(around=around, headers=good).status_code == 200
    assert ask(around=around, headers={"host": "other.example.org"}).status_code == 421


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
@pytest.mark.parametrize(
    "origin",
    ["http://evil.com", "http://localhost:3000", "null", "https://localhost", "http://localhost:7860.evil.com",
     "file://", "http://127.0.0.1:7860", "chrome-extension://abc"],
)  # fmt: skip
def test_a_request_of_another_origin_is_refused_whatever_the_method(method: str, origin: str) -> None:
    for path in ("/", "/api/start", "/gradio_api/queue/join", "/gradio_api/queue/data"):
        assert ask(path, method, headers={"origin": origin}).status_code == 403


def test_our_own_origin_is_let_in_also_behind_a_tunnel_on_another_port() -> None:
    assert ask("/api/start", "POST", headers={"origin": "http://localhost:7860"}).status_code == 200
    tunnelled = {"host": "localhost:9000", "origin": "http://localhost:9000"}
    assert ask("/api/start", "POST", headers=tunnelled).status_code == 200


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_a_browser_that_says_the_request_is_another_sites_is_refused_but_may_follow_a_link(site: str) -> None:
    assert ask("/api/start", headers={"sec-fetch-site": site}).status_code == 403
    assert ask("/", headers={"sec-fetch-site": site, "sec-fetch-mode": "no-cors"}).status_code == 403
    link = {"sec-fetch-site": site, "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}
    assert ask("/live", headers=link).status_code == 200
    assert ask("/live", "POST", headers=link).status_code == 403
    assert ask("/api/start", headers=link).status_code == 403
    framed = {**link, "sec-fetch-dest": "iframe"}
    assert ask("/live", headers=framed).status_code == 403


def test_a_websocket_of_another_origin_is_closed_before_the_application_hears_of_it() -> None:
    heard: list[str] = []

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        heard.append(scope["type"])

    async def go(origin: bytes) -> list[Any]:
        sent: list[Any] = []

        async def send(event: Any) -> None:
            sent.append(event)

        headers = [(b"host", b"localhost:7860"), (b"origin", origin)]
        scope = {"type": "websocket", "path": "/ws", "headers": headers, "server": ("127.0.0.1", PORT)}
        await Guard(inner, Rules())(scope, lambda: None, send)
        return sent

    assert in_a_thread(go(b"http://evil.com")) == [{"type": "websocket.close", "code": 1008}]
    assert heard == []
    in_a_thread(go(b"http://localhost:7860"))
    assert heard == ["websocket"]


@pytest.mark.parametrize(
    "path",
    ["/gradio_api/upload", "/gradio_api/file=/etc/passwd", "/gradio_api/proxy=http://a.hf.space/", "/gradio_api/run/x",
     "/gradio_api/call/x", "/gradio_api/info", "/gradio_api/deep_link", "/gradio_api/mcp", "/gradio_api/dev/reload",
     "/gradio_api/stream/a/b/c", "/gradio_api/component_server", "/config", "/login", "/openapi.json", "/docs",
     "/monitoring", "/gradio_api/token", "/gradio_api", "/gradio_api/runs"],
)  # fmt: skip
def test_the_parts_of_gradio_that_nothing_here_uses_are_closed(path: str) -> None:
    for method in ("GET", "POST"):
        assert ask(path, method).status_code == 404


def test_the_role_follows_the_socket_and_no_header() -> None:
    forged = {"x-forwarded-for": "127.0.0.1", "x-real-ip": "127.0.0.1", "forwarded": "for=127.0.0.1"}
    assert ask("/x").json()["role"] == "owner"
    assert ask("/x", port=SHARED, headers=forged).json()["role"] == "viewer"
    assert ask("/api/start", port=SHARED).status_code == 403
    assert "viewer" in ask("/api/start", port=SHARED).json()["error"]


def test_headers_that_gradio_builds_addresses_from_do_not_get_in() -> None:
    forged = {"x-forwarded-host": "evil.com", "x-gradio-server": "http://evil.com"}
    assert not {"x-forwarded-host", "x-gradio-server"} & set(ask("/x", headers=forged).json()["headers"])


def test_every_reply_carries_the_security_headers_and_no_cors_header() -> None:
    for reply in (
        ask("/x"),
        ask("/config"),
        ask(headers={"host": "evil.com"}),
        ask("/gradio_api/queue/data"),
    ):
        headers = reply.headers
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert "object-src 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert not [name for name in headers if name.startswith("access-control-")]
        assert "server" not in headers


def test_a_session_gets_one_cookie_that_scripts_cannot_read_and_keeps_it() -> None:
    first = ask("/x")
    cookie = first.headers["set-cookie"]
    assert {"HttpOnly", "SameSite=Lax", "Path=/"} <= {part.strip() for part in cookie.split(";")}
    value = cookie.split(";")[0]
    again = ask("/x", headers={"cookie": value})
    assert "set-cookie" not in again.headers
    assert again.json()["session"] == first.json()["session"] != ask("/x").json()["session"]
    assert re.fullmatch(r"[0-9a-f]{24}", first.json()["session"])
    assert first.json()["session"] not in value, "the id that drafts are stored under must not be the secret"


def test_the_cookie_of_a_page_behind_https_is_never_sent_without_it() -> None:
    assert "Secure" in ask("/x", headers={"x-forwarded-proto": "https"}).headers["set-cookie"]
    assert "Secure" not in ask("/x").headers["set-cookie"]


@pytest.mark.parametrize("value", ["../../etc", "a", "x" * 44, "%00" * 10, '"; Path=/evil', "é" * 43])
def test_a_cookie_that_is_not_ours_is_replaced(value: str) -> None:
    cookie = f"{guard.COOKIE}={value}".encode("latin-1")
    assert "set-cookie" in ask("/x", headers={b"cookie": cookie}).headers


def test_a_refusal_in_a_route_is_a_sentence_and_its_field() -> None:
    reply = ask("/api/refusing")
    assert (reply.status_code, reply.json()) == (
        400,
        {"error": "No data is chosen.", "field": "data.dataset_path"},
    )


def test_a_body_over_the_limit_is_refused_by_its_declared_size_before_it_is_read() -> None:
    reply = ask("/api/start", "POST", content=b"x", headers={"content-length": str(guard.MAX_BODY_BYTES + 1)})
    assert reply.status_code == 413


@pytest.mark.parametrize("declared", ["-1", "abc", "1e9", ""])
def test_a_declared_size_that_is_no_number_is_refused(declared: str) -> None:
    assert ask("/api/start", "POST", content=b"x", headers={"content-length": declared}).status_code == 413


def stream(chunks: int, size: int, seen: list[int]) -> AsyncIterator[bytes]:
    """A body without a declared size, which counts what was asked of it."""

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(chunks):
            seen.append(size)
            yield b"x" * size

    return pieces()


def test_a_body_without_a_declared_size_is_cut_off_at_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "MAX_BODY_BYTES", 10_000)
    reply = ask("/api/start", "POST", content=stream(100, 1000, []))
    assert reply.status_code == 413 and "too large" in reply.json()["error"]
    assert ask("/api/start", "POST", content=stream(10, 1000, [])).json()["bytes"] == 10_000


def test_uploads_have_a_limit_of_their_own_and_a_session_has_a_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "MAX_UPLOAD_BYTES", 10_000)
    monkeypatch.setattr(guard, "SESSION_UPLOAD_BYTES", 15_000)
    around = guard_of()
    session = {"cookie": f"{guard.COOKIE}={'a' * 43}"}
    first = ask(guard.UPLOAD_PATH, "POST", around=around, content=b"x" * 10_000, headers=session)
    assert first.json()["bytes"] == 10_000
    second = ask(guard.UPLOAD_PATH, "POST", around=around, content=b"x" * 10_000, headers=session)
    assert second.status_code == 413 and "data root" in second.json()["error"]
    other = {"cookie": f"{guard.COOKIE}={'b' * 43}"}
    assert ask(guard.UPLOAD_PATH, "POST", around=around, content=b"x" * 10_000, headers=other).status_code == 200


def test_below_a_root_path_both_kinds_of_proxies_find_the_same_page() -> None:
    around = guard_of(Rules(root_path="/box"))
    assert ask("/box", around=around).headers["location"] == "/box/"
    for path in ("/box/api/start", "/api/start"):
        assert ask(path, around=around).status_code == 200
    assert ask("/box/config", around=around).status_code == 404, "what is closed is closed below the root path too"
    assert ask("/box/gradio_api/upload", "POST", around=around).status_code == 404


def test_replies_that_say_nothing_of_caching_are_not_kept() -> None:
    assert ask("/x").headers["cache-control"] == "no-store"


def test_a_stream_goes_through_piece_by_piece() -> None:
    assert ask("/gradio_api/queue/data").text.count("data:") == 3


def test_what_a_refused_visitor_sent_comes_back_as_plain_text() -> None:
    assert ask(headers={"host": "<script>alert(1)</script>"}).headers["content-type"].startswith("text/plain")
