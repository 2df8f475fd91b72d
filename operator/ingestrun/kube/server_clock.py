"""The API server's clock, as far as its answers show it.

All times that the operator compares are the server's (a creation, a start, the end of a Job) or were written by the
operator into a status that another process reads. So the operator's own clock, which may be wrong by an hour or a year,
decides nothing: it only measures what has passed since the last answer.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Final

from ingestrun.kube.errors import Unavailable

Clock = Callable[[], float]
CLOCK: Final[Clock] = (
    # Unlike CLOCK_MONOTONIC it advances while the machine is suspended, when others can take the lease.
    partial(time.clock_gettime, time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic
)
"""The operator's own clock, which measures durations and knows no time of day."""


class ServerClock:
    """The estimate of one server's clock. It is never ahead of the server, and at most some milliseconds behind it.

    An answer has its time (`Date`) in whole seconds, cut off, and a little older than its arrival. So each answer shows
    a time that has certainly been reached, and the best of them counts. It also shows a time that was certainly not
    reached: an estimate beyond that is of a clock that was put back, or of another server's, and is dropped.
    """

    def __init__(self, clock: Clock = CLOCK) -> None:
        self._clock = clock
        self._zero: float | None = None
        """The server's time (Unix seconds) at which `clock` was 0."""

    def learn(self, date: str | None, *, sent_at: float) -> None:
        """Take the header `Date` of an answer that has just arrived to a request sent at that time of `clock`."""
        try:
            told = parsedate_to_datetime(date or "").timestamp()
        except ValueError:
            return  # no API server's answer: it sends one with each
        reached = told - self._clock()
        not_reached = told + 1 - sent_at
        if self._zero is None or not reached <= self._zero <= not_reached:
            self._zero = reached

    def now(self) -> datetime:
        """Return the server's time.

        Raises Unavailable before its first answer, because any other clock may be wrong.
        """
        if self._zero is None:
            raise Unavailable("the API server has not answered yet, so its time is not known")
        return datetime.fromtimestamp(0, UTC) + timedelta(seconds=self._zero + self._clock())
