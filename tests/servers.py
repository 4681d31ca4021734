"""A web server on loopback that misbehaves on request, and a world of one's own to fetch from it in."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from headstart import downloads, sources
from headstart.errors import HeadstartError

DATA = os.urandom(1 << 20)
DIGEST = hashlib.sha256(DATA).hexdigest()
FETCH = (
    "import sys; from headstart import downloads, sources; downloads.BACKOFF = 0\n"
    "print(sources.fetch(*sys.argv[1:]))"
)


COMMIT = "86b5e0934494bd15c9632b12f734a8a67f723594"


@dataclass
class Loopback:
    """Files by path, and how to serve them.

    Args:
        files: what there is to get; a query is ignored.
        headers: more headers, by path.
        ranges: honour Range and If-Range.
        tagged: send an ETag.
        statuses: (status, headers) for the next requests, before all goes well.
        drops: after how many bytes the next downloads are cut off.
        hold: after how many bytes a download waits for ``release``.
        login: "user:password" that every request must carry.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    headers: dict[str, dict[str, str]] = field(default_factory=dict)
    ranges: bool = True
    tagged: bool = True
    statuses: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    drops: list[int] = field(default_factory=list)
    hold: int | None = None
    login: str = ""
    asked: list[tuple[str, str, str]] = field(default_factory=list)
    release: threading.Event = field(default_factory=threading.Event)
    host: str = ""
    scheme: str = "http"

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.host}"

    def downloads(self, path: str) -> list[str]:
        """The Range of each GET of a path, in order; "" for the whole."""
        return [wanted for method, asked, wanted in self.asked if method == "GET" and asked == path]


@contextmanager
def serving(loopback: Loopback, certificate: Path | None = None) -> Iterator[Loopback]:
    """Serve until the block ends, over TLS if there is a certificate; all threads are done then."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            self.close_connection = True
            path, wanted = self.path.partition("?")[0], self.headers.get("Range", "")
            loopback.asked.append((self.command, path, wanted))
            login = base64.b64encode(loopback.login.encode()).decode()
            if loopback.statuses:
                self.answer(*loopback.statuses.pop(0))
            elif loopback.login and self.headers.get("Authorization") != f"Basic {login}":
                self.answer(401, {"WWW-Authenticate": "Basic"})
            elif path not in loopback.files:
                self.answer(404, {})
            else:
                self.give(path, loopback.files[path], wanted)

        def answer(self, status: int, headers: dict[str, str], length: int = 0) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            if "Content-Length" not in headers:
                self.send_header("Content-Length", str(length))
            self.send_header("Connection", "close")
            self.end_headers()

        def give(self, path: str, content: bytes, wanted: str) -> None:
            tag = f'"{hashlib.sha256(content).hexdigest()}"'
            headers = ({"ETag": tag} if loopback.tagged else {}) | loopback.headers.get(path, {})
            match = re.fullmatch(r"bytes=(\d+)-", wanted) if loopback.ranges else None
            start = 0
            if match and self.headers.get("If-Range", tag) == tag:
                start = int(match[1])
                if start >= len(content):
                    self.answer(416, headers | {"Content-Range": f"bytes */{len(content)}"})
                    return
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            body = content[start:]
            self.answer(206 if "Content-Range" in headers else 200, headers, len(body))
            if self.command == "HEAD":
                return
            if loopback.drops:
                body = body[: loopback.drops.pop(0)]
            try:
                if loopback.hold is not None and not loopback.release.is_set():
                    self.wfile.write(body[: loopback.hold])
                    self.wfile.flush()
                    loopback.release.wait(60)
                    body = body[loopback.hold :]
                self.wfile.write(body)
            except OSError:  # whoever asked was killed
                pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = False
    loopback.host = f"127.0.0.1:{server.server_address[1]}"
    if certificate:
        loopback.scheme, context = "https", ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield loopback
    finally:
        loopback.release.set()
        server.shutdown()
        thread.join()
        server.server_close()


# Fixtures, for a module to take by their names.


@pytest.fixture(autouse=True)
def own_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache, a home and a pip of the test's own; no pauses."""
    for name in list(os.environ):
        if name.startswith(("HEADSTART_", "PIP_", "HF_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HEADSTART_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home/hf"))
    monkeypatch.setenv("XDG_CONFIG_DIRS", str(tmp_path / "etc"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(downloads, "BACKOFF", 0)


@pytest.fixture
def server() -> Iterator[Loopback]:
    with serving(Loopback({"/data.zip": DATA})) as loopback:
        yield loopback


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def closed() -> str:
    """An address where nobody listens."""
    return f"http://127.0.0.1:{free_port()}"


def refused(uri: str, sha256: str | None = None) -> HeadstartError:
    """The error, which fits on one screen."""
    with pytest.raises(HeadstartError) as caught:
        sources.fetch(uri, sha256)
    assert len(str(caught.value).splitlines()) <= 20
    assert max(map(len, str(caught.value).splitlines())) < 400
    assert caught.value.do
    return caught.value


def partial(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "cache").rglob("*.part"))


def in_process(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", FETCH, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def offer(hub: Loopback, model: dict[str, bytes], name: str = "owner/model") -> None:
    """Put a model's files where the hub's own client looks for them, at ``COMMIT``."""
    tree = []
    for file, content in model.items():
        digest = hashlib.sha256(content).hexdigest()
        git = hashlib.sha1(b"blob %d\0%b" % (len(content), content)).hexdigest()
        entry: dict[str, Any] = {"type": "file", "path": file, "size": len(content), "oid": git}
        if file.endswith((".safetensors", ".bin", ".h5")):
            entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 134}
        tree.append(entry)
        path = f"/{name}/resolve/{COMMIT}/{file}"
        hub.files[path] = content
        hub.headers[path] = {"X-Repo-Commit": COMMIT, "ETag": f'"{digest if "lfs" in entry else git}"'}
    info = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": file} for file in model]}
    pages = {f"tree/{COMMIT}": tree, f"revision/{COMMIT}": info, "revision/main": info}
    for page, content in pages.items():
        hub.files[f"/api/models/{name}/{page}"] = json.dumps(content).encode()
        hub.headers[f"/api/models/{name}/{page}"] = {"Content-Type": "application/json"}
