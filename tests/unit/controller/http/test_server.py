"""The HTTP server's own part, whatever the routes: limits, problem+json, what is said of an error nobody foresaw."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

import aiohttp
import pytest
from aiohttp import web

from ingestrun.controller.http.problems import Problem
from ingestrun.controller.http.rate_limit import Rate, RateLimiter
from ingestrun.controller.http.server import ApiServer, RouteTable


class Table(RouteTable):
    """Routes that do what a test needs."""

    rate = Rate(per_second=0.001, burst=3)
    seconds = 0.2

    def __init__(self) -> None:
        self.log: list[str] = []

    def routes(self) -> Iterable[web.RouteDef]:
        return [
            web.get("/ok", self._ok, allow_head=False),
            web.get("/raises", self._raises),
            web.get("/problem", self._problem),
            web.get("/slow", self._slow),
            web.post("/echo", self._echo),
        ]

    async def open(self) -> None:
        self.log.append("open")

    async def finish(self) -> None:
        self.log.append("finish")

    async def close(self) -> None:
        self.log.append("close")

    async def _ok(self, _: web.Request) -> web.Response:
        return web.json_response({"ok": True})

    async def _raises(self, _: web.Request) -> web.Response:
        raise RuntimeError("a secret")

    async def _problem(self, _: web.Request) -> web.Response:
        raise Problem(409, "it is already over", phase="Failed")

    async def _slow(self, _: web.Request) -> web.Response:
        await asyncio.Event().wait()
        raise AssertionError

    async def _echo(self, request: web.Request) -> web.Response:
        return web.Response(body=await request.read())


class Other(Table):
    rate = Rate(per_second=100, burst=100)

    def routes(self) -> Iterable[web.RouteDef]:
        return [web.get("/other", self._ok)]


@asynccontextmanager
async def serving(*tables: RouteTable) -> AsyncIterator[tuple[aiohttp.ClientSession, str]]:
    server = ApiServer(routes=tables, max_body_bytes=1000)
    port = await server.serve(0, "127.0.0.1")
    try:
        async with aiohttp.ClientSession() as session:
            yield session, f"http://127.0.0.1:{port}"
    finally:
        await server.close()


async def test_tables_are_plugged_in_and_told_of_beginning_and_end() -> None:
    tables = Table(), Other()
    async with serving(*tables) as (session, url):
        for path in ("/ok", "/other"):
            async with session.get(url + path) as answer:
                assert (answer.status, await answer.json()) == (200, {"ok": True})
                assert answer.headers["Server"] == "ingestrun-operator"
                assert answer.headers["Cache-Control"] == "no-store"
        assert [table.log for table in tables] == [["open"], ["open"]]
    assert [table.log for table in tables] == [["open", "finish", "close"]] * 2


@pytest.mark.parametrize(
    ("method", "path", "status", "detail"),
    [
        ("GET", "/nothing", 404, "there is nothing under this path"),
        ("DELETE", "/ok", 405, "the path has no such method, but GET"),
        ("HEAD", "/ok", 405, ""),
        ("GET", "/problem", 409, "it is already over"),
        ("GET", "/raises", 500, "the operator could not answer the request; its log says why"),
        ("GET", "/slow", 503, "the request was not done within 0.2 s"),
    ],
)
async def test_every_error_is_a_problem(method: str, path: str, status: int, detail: str) -> None:
    async with serving(Table()) as (session, url), session.request(method, url + path) as answer:
        assert answer.status == status
        assert answer.content_type == "application/problem+json"
        if method != "HEAD":
            body = await answer.json(content_type=None)
            assert (body["status"], body["detail"]) == (status, detail)
            assert body["title"]
            assert body.get("phase") == ("Failed" if status == 409 else None)


async def test_an_error_nobody_foresaw_says_nothing_of_itself_and_is_logged(
    capsys: pytest.CaptureFixture[str],
) -> None:
    async with serving(Table()) as (session, url), session.get(url + "/raises") as answer:
        assert "secret" not in await answer.text()
    assert "RuntimeError" in capsys.readouterr().out


async def test_a_body_is_bounded() -> None:
    async with serving(Table()) as (session, url):
        async with session.post(url + "/echo", data=b"x" * 1000) as answer:
            assert (answer.status, len(await answer.read())) == (200, 1000)
        async with session.post(url + "/echo", data=b"x" * 1001) as answer:
            assert answer.status == 413
            assert (await answer.json(content_type=None))["detail"] == "the body is too large"


async def test_each_caller_has_an_account_of_its_own_in_each_table() -> None:
    async with serving(Table(), Other()) as (session, url):

        async def ask(path: str, token: str) -> int:
            async with session.get(url + path, headers={"Authorization": f"Bearer {token}"}) as answer:
                if answer.status == 429:
                    assert answer.content_type == "application/problem+json"
                    assert 1 <= int(answer.headers["Retry-After"]) <= 1000
                return answer.status

        assert [await ask("/ok", "a") for _ in range(4)] == [200, 200, 200, 429]
        assert await ask("/ok", "b") == 200
        assert await ask("/other", "a") == 200


def test_the_rate_is_kept_and_a_refusal_costs_nothing() -> None:
    now = 0.0
    limiter = RateLimiter(Rate(per_second=2, burst=3), clock=lambda: now)
    assert [limiter.take("a") for _ in range(3)] == [0, 0, 0]
    assert [limiter.take("a") for _ in range(9)] == [0.5] * 9
    now = 0.5
    assert [limiter.take("a"), limiter.take("a")] == [0, 0.5]
    now = 60.0
    assert [limiter.take("a") for _ in range(4)] == [0, 0, 0, 0.5]


def test_callers_that_are_gone_are_forgotten() -> None:
    limiter = RateLimiter(Rate(per_second=1, burst=1), clock=lambda: 0.0, most=2)
    assert limiter.take("a") == 0
    assert limiter.take("b") == 0
    assert limiter.take("a") > 0
    assert limiter.take("c") == 0, "b asked longest ago, and is forgotten"
    assert limiter.take("a") > 0
    assert limiter.take("b") == 0
