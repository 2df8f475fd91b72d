"""The server's time by its answers, whatever the operator's own clock says."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from itertools import pairwise

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from tests.fakes.loopback import loopback

from ingestrun.kube.errors import Unavailable
from ingestrun.kube.server_clock import ServerClock

TRUE = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)


def header(time: datetime) -> str:
    return format_datetime(time.replace(microsecond=0), usegmt=True)


class Server:
    """A server with a clock, and a client whose monotonic clock counts the same seconds from another zero."""

    def __init__(self, zero: float = 0.0) -> None:
        self.passed = 0.0
        self.zero = zero
        self.set_by = timedelta()
        self.clock = ServerClock(lambda: self.zero + self.passed)

    @property
    def time(self) -> datetime:
        return TRUE + self.set_by + timedelta(seconds=self.passed)

    def ask(self, *, there: float, back: float) -> None:
        """One request that takes so long there, and back."""
        sent_at = self.zero + self.passed
        self.passed += there
        date = header(self.time)
        self.passed += back
        self.clock.learn(date, sent_at=sent_at)

    @property
    def behind(self) -> timedelta:
        return self.time - self.clock.now()


def test_before_the_first_answer_there_is_no_time() -> None:
    with pytest.raises(Unavailable, match="not answered"):
        ServerClock().now()


@pytest.mark.parametrize("date", [None, "", "yesterday", "Mon, 99 Nov 2026 12:00:00 GMT"])
def test_an_answer_without_a_time_teaches_nothing(date: str | None) -> None:
    clock = ServerClock()
    clock.learn(date, sent_at=0.0)
    with pytest.raises(Unavailable):
        clock.now()


@given(st.lists(st.tuples(*[st.floats(0, 3)] * 3), min_size=1, max_size=30), st.floats(-1e9, 1e9))
def test_it_is_never_ahead_and_never_gets_worse(answers: list[tuple[float, float, float]], zero: float) -> None:
    server = Server(zero)
    behind = []
    for pause, there, back in answers:
        server.passed += pause
        server.ask(there=there, back=back)
        behind.append(server.behind)
    error = timedelta(milliseconds=1)  # of the arithmetic
    assert all(-error <= each for each in behind)
    assert behind[0] <= timedelta(seconds=1 + answers[0][2]) + error
    assert all(after <= before + error for before, after in pairwise(behind))


def test_a_few_answers_make_it_exact() -> None:
    server = Server()
    for _ in range(40):
        server.passed += 0.37
        server.ask(there=0.001, back=0.001)
    assert server.behind < timedelta(milliseconds=50)


@pytest.mark.parametrize("step", [timedelta(hours=1), timedelta(hours=-1), timedelta(days=-400)])
def test_a_clock_that_is_set_anew_is_followed(step: timedelta) -> None:
    server = Server()
    for _ in range(10):
        server.ask(there=0.3, back=0.1)
    server.set_by = step
    server.ask(there=0.3, back=0.1)
    assert timedelta() <= server.behind <= timedelta(seconds=1.2)


async def test_the_answers_of_a_connection_teach_it_but_not_those_of_a_proxy() -> None:
    in_a_year = TRUE + timedelta(days=365)
    status = 502

    async def answer(_: web.Request) -> web.Response:
        return web.json_response({}, status=status, headers={"Date": header(in_a_year)})

    async with loopback(answer) as server:
        connection = await server.connection()
        with pytest.raises(Unavailable):
            await connection.request("GET", "/x")
        with pytest.raises(Unavailable, match="not answered"):
            connection.clock.now()
        status = 200
        await connection.request("GET", "/x")
        assert abs(connection.clock.now() - in_a_year) < timedelta(seconds=5)
        await connection.close()
