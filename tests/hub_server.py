"""A small hub on loopback: the requests that huggingface_hub really makes for a model, and the ways in which a hub fails.

`GET api/models/ID[/revision/R]?blobs=true` and `GET ID/resolve/COMMIT/FILE` with ranges, as the installed library asks them.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Model:
    """What lies under one id, and what the hub does wrong with it."""

    files: dict[str, bytes]
    gated: bool = False
    fails: dict[str, list[int]] = field(
        default_factory=dict
    )  # of a file's next answers: a status, or bytes until the cut
    wrong_digest: str = ""  # the file whose announced sha256 is another's
    wrong_size: str = ""  # the file that is announced one byte shorter than it is
    bytes_a_second: float | None = None
    ignores_ranges: bool = False
    lies_at: str = ""  # another server's address, where its files are to be fetched

    def siblings(self) -> list[dict[str, Any]]:
        """The files as the hub lists them: weights with their sha256, small files with git's hash."""
        return [self._entry(name, content) for name, content in self.files.items()]

    def _entry(self, name: str, content: bytes) -> dict[str, Any]:
        size = len(content) - (name == self.wrong_size)
        git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        entry: dict[str, Any] = {"rfilename": name, "size": size, "blobId": git}
        if name.endswith((".safetensors", ".bin", ".gguf")):
            told = b"something else" if name == self.wrong_digest else content
            entry["lfs"] = {"sha256": hashlib.sha256(told).hexdigest(), "size": size, "pointerSize": 134}
        return entry


@dataclass
class Hub:
    """A running hub: its address, its models, and every request that came, as (method, path, headers)."""

    url: str
    models: dict[str, Model]
    seen: list[tuple[str, str, dict[str, str]]]
    token: str | None = None

    def asked(self, name: str) -> list[dict[str, str]]:
        """The headers of the requests for one file."""
        return [headers for _, path, headers in self.seen if path.endswith(f"/{name}")]


def files_of(folder: Path) -> dict[str, bytes]:
    """The files of a model folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


@contextmanager
def running_hub(**models: Model) -> Iterator[Hub]:
    """A hub with these models; `__` in a name stands for the slash."""
    hub = Hub("", {name.replace("__", "/"): model for name, model in models.items()}, [])

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._serve(body=True)

        def do_HEAD(self) -> None:
            self._serve(body=False)

        def log_message(self, *args: Any) -> None:
            """Nothing on the terminal."""

        def _serve(self, body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.seen.append((self.command, path, {name.lower(): value for name, value in self.headers.items()}))
            api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path)
            file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
            found = api or file
            model = hub.models.get(found[1]) if found else None
            if model is None:
                self._say(404, {"X-Error-Code": "RepoNotFound"})
            elif api and api[2] not in (None, "main", COMMIT):
                self._say(404, {"X-Error-Code": "RevisionNotFound"})
            elif api:
                told = {
                    "id": api[1],
                    "sha": COMMIT,
                    "siblings": model.siblings(),
                    "gated": model.gated,
                    "private": False,
                }
                self._say(200, {"Content-Type": "application/json"}, json.dumps(told).encode())
            elif model.gated and self.headers.get("Authorization") != f"Bearer {hub.token}":
                self._say(403, {"X-Error-Code": "GatedRepo"})
            elif model.lies_at:
                self._say(302, {"Location": model.lies_at + path, "X-Repo-Commit": COMMIT})
            elif found[3] not in model.files:
                self._say(404, {"X-Error-Code": "EntryNotFound"})
            else:
                self._file(model, found[3])

        def _say(self, status: int, headers: dict[str, str], content: bytes = b"") -> None:
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(content))}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def _file(self, model: Model, name: str) -> None:
            content, start = model.files[name], 0
            failing = model.fails.get(name)
            failure = failing.pop(0) if failing else None
            if failure is not None and failure < 1000:
                self._say(failure, {})
                return
            asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            if asked and not model.ignores_ranges:
                start = int(asked[1])
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            rest = content[start:]
            try:
                self._trickle(rest[:failure], model.bytes_a_second)
            except OSError:  # the other side was killed
                failure = 0
            self.close_connection = failure is not None

        def _trickle(self, content: bytes, bytes_a_second: float | None) -> None:
            piece = len(content) if bytes_a_second is None else max(1, int(bytes_a_second / 20))
            for at in range(0, len(content), piece or 1):
                self.wfile.write(content[at : at + piece])
                self.wfile.flush()
                if bytes_a_second is not None:
                    time.sleep(0.05)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda request, client: None  # a child that was killed hangs up: no traceback for that
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
