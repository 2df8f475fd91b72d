"""Fixtures: a workspace with stages to run on it, and a source on loopback."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import pytest

from .support import Bench, Request, Site


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    (tmp_path / "workspace").mkdir()
    return Bench(tmp_path / "workspace")


class Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """A client that was stopped by SIGTERM hangs up."""


@pytest.fixture
def sites() -> Iterator[Callable[[], Site]]:
    servers = []

    def make() -> Site:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                parts = urlsplit(self.path)
                headers = {name.lower(): value for name, value in self.headers.items()}
                request = Request(parts.path, dict(parse_qsl(parts.query)), headers)
                made.requests.append(request)
                reply = made.answer(request)
                self.send_response(reply.status)
                for name, value in {"content-length": str(len(reply.body)), **reply.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(reply.body)

            def log_message(self, *_: object) -> None:
                pass

        server = Quiet(("127.0.0.1", 0), Handler)
        made = Site(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        servers.append(server)
        return made

    yield make
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def site(sites: Callable[[], Site], monkeypatch: pytest.MonkeyPatch) -> Site:
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    return sites()


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits of the HTTP client, which are then none."""
    waits: list[float] = []
    monkeypatch.setattr("ingestrun.worker.shutdown.Stop.wait", lambda _stop, seconds: waits.append(seconds))
    return waits
