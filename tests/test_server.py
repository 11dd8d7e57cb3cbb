"""The real server: what it serves, what it keeps shut, and that no variable of the environment opens it."""

from __future__ import annotations

import http.client
import json
import re
import socket
import stat
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import ROOT, RunningApp, end_app, start_app
from ui.guard import ACTIONS, HEADERS

PAGES = ("", "live", "runs", "data", "models")
HOSTILE = {
    "GRADIO_SHARE": "True",
    "GRADIO_SERVER_NAME": "0.0.0.0",
    "GRADIO_SERVER_PORT": "1",
    "GRADIO_ALLOWED_PATHS": "/",
    "GRADIO_MCP_SERVER": "True",
    "GRADIO_ROOT_PATH": "http://evil.example",
    "GRADIO_SSR_MODE": "True",
    "GRADIO_RUN_HISTORY": "True",
    "GRADIO_VIBE_MODE": "1",
    "GRADIO_LOCAL_DEV_MODE": "1",
    "GRADIO_TEMP_DIR": "/",
    "GRADIO_ANALYTICS_ENABLED": "True",
}


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningApp]:
    """A server started from a shell whose variables ask Gradio to open everything."""
    patch = pytest.MonkeyPatch()
    for name, value in HOSTILE.items():
        patch.setenv(name, value)
    running = start_app(tmp_path_factory.mktemp("hostile"), "--foreground")
    patch.undo()
    yield running
    end_app(running)


def page_config(url: str, path: str) -> dict[str, Any]:
    """What a page tells its browser about itself."""
    with urllib.request.urlopen(f"{url}/{path}", timeout=20) as reply:
        text = reply.read().decode()
    found = re.search(r"window\.gradio_config = (\{.*?\});</script>", text, re.S)
    assert found is not None
    return json.loads(found.group(1))


def status(url: str, path: str, method: str = "GET", headers: dict[str, str] | None = None) -> int:
    """The status of one raw request; the path is sent as it is."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=10)
    connection.request(method, path, headers=headers or {})
    code = connection.getresponse().status
    connection.close()
    return code


@pytest.mark.parametrize("path", PAGES)
def test_every_page_is_there_and_holds_no_connection_open(app_url: str, path: str) -> None:
    config = page_config(app_url, path)
    assert config["connect_heartbeat"] is False
    assert not config.get("is_space") and not config.get("space_id")


@pytest.mark.parametrize("path", PAGES)
def test_every_page_has_the_security_headers(app_url: str, path: str) -> None:
    with urllib.request.urlopen(f"{app_url}/{path}", timeout=20) as reply:
        assert {name: reply.headers[name] for name in HEADERS} == HEADERS


def test_only_loopback_is_listened_on_whatever_the_environment_says(hostile: RunningApp) -> None:
    ours = [hostile.process.pid, *(child.pid for child in psutil.Process(hostile.process.pid).children(recursive=True))]
    listening = [
        link.laddr.ip
        for pid in ours
        for link in psutil.Process(pid).net_connections("inet")
        if link.status == psutil.CONN_LISTEN
    ]
    assert listening == ["127.0.0.1"]


@pytest.mark.parametrize(
    "path",
    ["/gradio_api/mcp", "/gradio_api/mcp/sse", "/gradio_api/file=/etc/passwd", "/gradio_api/runs", "/monitoring",
     "/gradio_api/file=" + str(ROOT / "app.py"), "/gradio_api/vibe-code", "/openapi.json", "/docs"],
)  # fmt: skip
def test_variables_of_the_environment_open_nothing(hostile: RunningApp, path: str) -> None:
    assert status(hostile.url, path) == 404


def test_the_pages_of_a_hostile_environment_still_point_at_this_server(hostile: RunningApp) -> None:
    config = page_config(hostile.url, "live")
    assert config["root"] == hostile.url
    assert config["connect_heartbeat"] is False
    assert "evil" not in json.dumps(config)


def test_the_server_works_in_an_empty_private_folder(app: RunningApp) -> None:
    folder = Path(psutil.Process(app.process.pid).cwd())
    assert folder == app.workspace / "server" / "empty"
    assert list(folder.iterdir()) == []
    for private in (folder, app.workspace / "server" / "temporary", app.workspace / "runs", app.workspace / "uploads"):
        assert stat.S_IMODE(private.stat().st_mode) == 0o700


ENCODINGS = ("/", "%2f", "%252f", "\\", "%5c", "%c0%af", "//", "/./", "%u2215")
SECRETS = ("etc/passwd", "app.py", "config.json", "server.lock", ".git/config")


def test_no_spelling_of_a_path_brings_a_file_of_the_machine(app: RunningApp) -> None:
    canary = (ROOT / "app.py").read_text(encoding="utf-8").splitlines()[0]
    wrong = []
    for start in ("files/x", "assets", "static", "gradio_api/file=", "svelte", "theme.css", "files"):
        for slash in ENCODINGS:
            for depth in (1, 4, 9):
                for secret in SECRETS:
                    path = f"/{start}{slash}" + f"..{slash}" * depth + secret.replace("/", slash)
                    connection = http.client.HTTPConnection(app.url.removeprefix("http://"), timeout=10)
                    connection.putrequest("GET", path, skip_accept_encoding=True)
                    connection.endheaders()
                    body = connection.getresponse().read().decode("utf-8", "replace")
                    connection.close()
                    if canary in body or "root:x:" in body or '"model_path"' in body or "[core]" in body:
                        wrong.append(path)
    assert wrong == []


def test_our_files_may_be_kept_for_good_and_an_old_address_may_not(app_url: str) -> None:
    with urllib.request.urlopen(f"{app_url}/live", timeout=20) as reply:
        text = reply.read().decode()
    address = re.search(r"files/[0-9a-f]{12}/style\.css", text)
    assert address is not None
    with urllib.request.urlopen(f"{app_url}/{address.group(0)}", timeout=10) as reply:
        assert "immutable" in reply.headers["cache-control"]
        css = reply.read().decode()
    assert "--sb-bg: #F5F7FA" in css and ".sb-panel" in css
    with urllib.request.urlopen(f"{app_url}/files/000000000000/style.css", timeout=10) as reply:
        assert reply.headers["cache-control"] == "no-cache"


@pytest.mark.browser
def test_the_second_page_takes_its_scripts_out_of_the_browsers_own_store(app_url: str, browser: Any) -> None:
    context = browser.new_context()
    tab = context.new_page()
    tab.goto(f"{app_url}/data")
    tab.wait_for_selector("#sb-status .sb-glyph")
    tab.goto(f"{app_url}/models")
    tab.wait_for_selector("#sb-status .sb-glyph")
    sizes = tab.evaluate(
        "performance.getEntriesByType('resource').filter(e => /\\/(assets|files)\\//.test(e.name)).map(e => e.transferSize)"
    )
    context.close()
    assert len(sizes) > 20
    assert sum(size > 0 for size in sizes) <= 8, "scripts of the first page were fetched again"


def test_what_somebody_typed_or_trained_is_never_kept_by_the_browser(app_url: str) -> None:
    for path in ("live", "api/state", "api/data"):
        with urllib.request.urlopen(f"{app_url}/{path}", timeout=20) as reply:
            assert reply.headers["cache-control"] == "no-store"


def test_plotly_comes_out_of_the_installed_wheel(app_url: str) -> None:
    import importlib.metadata

    version = importlib.metadata.version("plotly")
    with urllib.request.urlopen(f"{app_url}/files/plotly-{version}/plotly.min.js", timeout=10) as reply:
        assert "immutable" in reply.headers["cache-control"]
        assert reply.headers["content-type"].startswith("text/javascript")
        assert b"plotly" in reply.read(2000)
    assert status(app_url, "/files/plotly-0.0.0/plotly.min.js") == 404


def test_every_route_of_ours_names_the_action_that_its_caller_must_be_allowed(site: Any) -> None:
    """Walks the routes as the server mounts them; a route added without `guarded` fails here."""
    from ui.server import our_routes

    routes = our_routes(site)
    assert len(routes) > 8
    for route in routes:
        assert getattr(route.endpoint, "action", None) in ACTIONS, route.path
        changes = (route.methods or set()) - {"GET", "HEAD"}
        assert not (changes and route.endpoint.action in ("see", "see_rows")), f"{route.path} changes things"


@pytest.mark.parametrize("number", [-1, 9999, 10**30, "x", None, [1]])
def test_a_forged_function_number_is_the_senders_fault_and_not_the_servers(app_url: str, number: Any) -> None:
    body = json.dumps({"fn_index": number, "data": [], "session_hash": "x"}).encode()
    request = urllib.request.Request(
        f"{app_url}/gradio_api/queue/join", body, {"content-type": "application/json"}, method="POST"
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=10)
    with refused.value as reply:
        assert 400 <= reply.code < 500


def test_who_comes_in_by_the_second_socket_is_a_viewer_and_may_change_nothing(site: Any) -> None:
    import threading

    from ui.server import Server

    listening = socket.create_server(("127.0.0.1", 0))
    server = Server(site, listening, threading.Event())
    shared, own = server.open_share_socket(), listening.getsockname()[1]
    assert server.start()
    try:
        for port, expected in ((own, 202), (shared, 403)):
            url = f"http://127.0.0.1:{port}"
            assert status(url, "/api/state") == 200
            assert (
                status(url, "/api/restart", "POST", {"host": "localhost", "x-forwarded-for": "127.0.0.1"}) == expected
            )
        assert status(f"http://127.0.0.1:{shared}", "/api/data/upload?name=a.jsonl", "POST") == 403
        assert status(f"http://127.0.0.1:{shared}", "/api/models/starter", "POST") == 403
    finally:
        server.stop()


@pytest.mark.parametrize("slash", ["//", "/./", "/x/../", "/%2e/", "/;/"])
@pytest.mark.parametrize("path", ["gradio_api/upload", "gradio_api/info", "config", "gradio_api/file=/etc/passwd"])
def test_a_closed_part_stays_closed_however_its_path_is_spelt(app_url: str, slash: str, path: str) -> None:
    assert status(app_url, slash + path) in (400, 403, 404)
    assert status(app_url, slash + path, "POST") in (400, 403, 404, 405)


@pytest.mark.browser
def test_behind_a_proxy_under_a_path_every_page_and_file_is_found(
    tmp_path_factory: pytest.TempPathFactory, browser: Any
) -> None:
    running = start_app(
        tmp_path_factory.mktemp("proxy"), "--foreground", "--root-path", "box", "--public-host", "a.test"
    )
    context = browser.new_context()
    tab = context.new_page()
    missing: list[str] = []
    tab.on("response", lambda reply: reply.status >= 400 and missing.append(f"{reply.status} {reply.url}"))
    for path in ("", "live", "data"):
        tab.goto(f"{running.url}/box/{path}")
        tab.wait_for_selector("#sb-status .sb-glyph")
    assert missing == []
    assert tab.locator(".sb-nav a").nth(3).evaluate("a => a.href") == f"{running.url}/box/data"
    context.close()
    end_app(running)


@pytest.mark.browser
@pytest.mark.parametrize("path", PAGES)
def test_a_page_asks_no_other_host_and_its_console_stays_empty(app_url: str, page: Any, path: str) -> None:
    foreign: list[str] = []
    page.on("request", lambda request: request.url.startswith(app_url) or foreign.append(request.url))
    refused: list[str] = []
    page.on("response", lambda reply: reply.status >= 400 and refused.append(f"{reply.status} {reply.url}"))
    page.goto(f"{app_url}/{path}")
    page.wait_for_selector("#sb-status .sb-glyph")
    page.wait_for_timeout(300)
    assert [url for url in foreign if not url.startswith(("data:", "blob:"))] == []
    assert refused == []


@pytest.mark.browser
def test_the_header_is_the_same_on_every_page_and_says_where_one_is(app_url: str, page: Any) -> None:
    places = set()
    for path, title in zip(PAGES, ("Train", "Live", "Runs", "Data", "Models"), strict=True):
        page.goto(f"{app_url}/{path}")
        page.wait_for_selector("#sb-status .sb-glyph")
        assert page.locator(".sb-nav a").all_inner_texts() == ["Train", "Live", "Runs", "Data", "Models"]
        assert page.locator(".sb-nav a[aria-current=page]").inner_text() == title
        assert page.locator("#sb-status").inner_text().startswith("idle · ")
        assert not page.locator(".nav-holder, footer").first.is_visible()
        places.add(str(page.evaluate("[...document.querySelectorAll('.sb-nav a')].map(a => a.offsetLeft)")))
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.id") == "sb-main", (
            "the first stop of the keyboard skips the header"
        )
        assert page.url.rstrip("/") == f"{app_url}/{path}".rstrip("/")
    assert len(places) == 1, "the pages stand at the same place in every header"


@pytest.mark.browser
def test_share_offers_a_tunnel_with_the_real_port_and_promises_nothing_else(app: RunningApp, page: Any) -> None:
    page.goto(f"{app.url}/live")
    page.wait_for_selector("#sb-status .sb-glyph")
    page.click("text=Share")
    port = app.url.rsplit(":", 1)[1]
    page.wait_for_function(f"document.getElementById('sb-ssh').textContent.includes('{port}')")
    assert page.inner_text("#sb-ssh") == f"ssh -L {port}:localhost:{port} user@host"
    assert page.locator("#sb-share button").all_inner_texts() == ["Copy"]


@pytest.mark.browser
def test_a_silent_server_is_said_and_never_shown_as_an_idle_one(
    tmp_path_factory: pytest.TempPathFactory, browser: Any
) -> None:
    running = start_app(tmp_path_factory.mktemp("silent"), "--foreground")
    context = browser.new_context()
    tab = context.new_page()
    tab.goto(f"{running.url}/live")
    tab.wait_for_selector("#sb-status .sb-glyph")
    end_app(running)
    tab.wait_for_function("document.getElementById('sb-status').textContent.startsWith('no answer')", timeout=20_000)
    context.close()
