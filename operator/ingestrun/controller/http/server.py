"""The operator's one HTTP server: its port, its limits and the form of its errors. What it answers are route tables.

A table knows no socket, and the server knows no route:

    server = ApiServer(routes=[CancellationCheck(...), PeopleApi(...)])
    port = await server.serve(8090)
"""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Final

import structlog
from aiohttp import web

from ingestrun.controller.http.problems import Problem, of_http_exception
from ingestrun.controller.http.rate_limit import Rate, RateLimiter
from ingestrun.controller.http.tls import ServerCertificate

logger = structlog.get_logger("ingestrun.http")

MAX_BODY_BYTES: Final = 65_536
SHUTDOWN_SECONDS: Final = 1.0
"""Time for which requests under way may go on when the server stops."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class RouteTable:
    """A part of the API: its routes, and the limits under which they are answered. To be derived from."""

    rate: Rate = Rate(per_second=20, burst=100)
    """Requests of one caller; what is beyond is answered with 429."""
    seconds: float = 30.0
    """Time for one request, its body included; what takes longer is answered with 503."""

    def routes(self) -> Iterable[web.RouteDef]:
        """Return the routes, as `aiohttp.web.get` and its like make them. A handler raises Problem for an error."""
        raise NotImplementedError

    def caller(self, request: web.Request) -> str:
        """Return whose account the request is on: by default its address, with the credentials that it shows.

        Nothing is known of these credentials yet, so whoever invents many has many accounts: a table whose
        authentication is dear has to bound that by itself.
        """
        shown = hashlib.sha256(request.headers.get("Authorization", "").encode()).hexdigest()[:32]
        return f"{request.remote} {shown}"

    async def open(self) -> None:
        """Make ready, before the first request."""

    async def finish(self) -> None:
        """Let requests that wait be answered, because the server stops."""

    async def close(self) -> None:
        """End what is left, after the last request."""


class ApiServer:
    """The server: route tables on one port."""

    def __init__(
        self,
        routes: Sequence[RouteTable],
        *,
        certificate: ServerCertificate | None = None,
        max_body_bytes: int = MAX_BODY_BYTES,
    ) -> None:
        """Prepare the server; without `certificate` it speaks plain HTTP."""
        self._tables = tuple(routes)
        self._certificate = certificate
        self._runner: web.AppRunner | None = None
        self._app = web.Application(client_max_size=max_body_bytes, middlewares=[_problems])
        self._app.on_response_prepare.append(_set_headers)
        self._app.on_shutdown.append(self._finish)
        for table in self._tables:
            limiter = RateLimiter(table.rate)
            for route in table.routes():
                handler = _limited(table, limiter, route.handler)
                self._app.router.add_routes([web.RouteDef(route.method, route.path, handler, route.kwargs)])

    async def serve(self, port: int, host: str | None = None) -> int:
        """Answer until `close`, and return the port. Raises OSError when it is taken."""
        if self._certificate is not None:
            await self._certificate.open()
        for table in self._tables:
            await table.open()
        # No access log, because it would be most of the log. The answer to a client that has hung up is dropped.
        self._runner = web.AppRunner(
            self._app, access_log=None, shutdown_timeout=SHUTDOWN_SECONDS, handler_cancellation=True
        )
        await self._runner.setup()
        tls = self._certificate.context if self._certificate is not None else None
        await web.TCPSite(self._runner, host=host, port=port, ssl_context=tls).start()
        return int(self._runner.addresses[0][1])

    async def close(self) -> None:
        """Stop answering."""
        if self._runner is not None:
            await self._runner.cleanup()
        for table in self._tables:
            await table.close()
        if self._certificate is not None:
            await self._certificate.close()

    async def _finish(self, _: web.Application) -> None:
        for table in self._tables:
            await table.finish()


def _limited(table: RouteTable, limiter: RateLimiter, handler: Handler) -> Handler:
    """Return the handler under the limits of its table."""

    async def answer(request: web.Request) -> web.StreamResponse:
        wait = limiter.take(table.caller(request))
        if wait > 0:
            # The body is not read, so the connection can't be used again.
            headers = {"Retry-After": str(math.ceil(wait)), "Connection": "close"}
            raise Problem(429, "too many requests: ask again later", headers=headers)
        try:
            async with asyncio.timeout(table.seconds):
                return await handler(request)
        except TimeoutError:
            raise Problem(503, f"the request was not done within {table.seconds:g} s") from None

    return answer


@web.middleware
async def _problems(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer each error as a problem. One that nobody has foreseen is logged, and says nothing of itself."""
    try:
        return await handler(request)
    except Problem as problem:
        return problem.response()
    except web.HTTPException as error:
        return of_http_exception(error).response()
    except Exception:
        logger.exception("a request could not be answered", method=request.method, path=request.path)
        return Problem(500, "the operator could not answer the request; its log says why").response()


async def _set_headers(_: web.Request, response: web.StreamResponse) -> None:
    """Keep answers out of caches, and the versions of our packages out of answers."""
    response.headers.setdefault("Cache-Control", "no-store")
    response.headers["Server"] = "ingestrun-operator"
    response.headers["X-Content-Type-Options"] = "nosniff"
