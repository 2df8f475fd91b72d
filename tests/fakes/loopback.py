"""A real HTTP server on the loopback, for tests of the client itself: what it sends, and what it makes of answers."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from kubernetes.aio.client import Configuration

from ingestrun.kube.connection import Connection

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass
class Loopback:
    """`handler` answers every request; `seen` has (method, path and query, headers, JSON body) of each."""

    handler: Handler
    url: str = ""
    token: str = "first"
    loads: int = 0
    seen: list[tuple[str, str, Mapping[str, str], Any]] = field(default_factory=list)

    async def configuration(self) -> Configuration:
        self.loads += 1
        configuration = Configuration(host=self.url)
        configuration.api_key["BearerToken"] = f"Bearer {self.token}"
        return configuration

    async def connection(self, *, request_timeout: float = 2.0, concurrency: int = 8) -> Connection:
        return Connection(
            await self.configuration(),
            reload=self.configuration,
            request_timeout=request_timeout,
            concurrency=concurrency,
        )

    async def serve(self, request: web.Request) -> web.StreamResponse:
        text = await request.text()
        self.seen.append((request.method, request.path_qs, request.headers, json.loads(text) if text else None))
        return await self.handler(request)


@asynccontextmanager
async def loopback(handler: Handler) -> AsyncIterator[Loopback]:
    server = Loopback(handler)
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", server.serve)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    server.url = f"http://{host}:{port}"
    try:
        yield server
    finally:
        await runner.cleanup()


def status_body(code: int, reason: str, message: str, **details: Any) -> dict[str, Any]:
    """A `Status`, as the API server sends it with every refusal."""
    return {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Failure",
        "message": message,
        "reason": reason,
        "details": details,
        "code": code,
    }
