"""Limits on the rate of requests by caller, by the generic cell rate algorithm: one number a caller is kept."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

MOST_CALLERS: Final = 10_000
"""Callers that are remembered; the one that asked longest ago is forgotten first."""


@dataclass(frozen=True, slots=True)
class Rate:
    """Requests that a caller may make: so many at once, and afterwards so many a second."""

    per_second: float
    burst: int


class RateLimiter:
    """Account of the requests of each caller."""

    def __init__(self, rate: Rate, *, clock: Callable[[], float] = time.monotonic, most: int = MOST_CALLERS) -> None:
        self._interval = 1 / rate.per_second
        self._slack = (rate.burst - 1) * self._interval
        self._clock = clock
        self._most = most
        self._due: dict[str, float] = {}
        """The time at which each caller has nothing on its account any more, in the order of their last requests."""

    def take(self, caller: str) -> float:
        """Count a request and return 0; return the seconds to wait if it is one too many, and do not count it."""
        wait = self.wait(caller)
        now = self._clock()
        due = max(now, self._due.pop(caller, now))
        self._due[caller] = due if wait > 0 else due + self._interval
        while len(self._due) > self._most:
            del self._due[next(iter(self._due))]
        return wait

    def wait(self, caller: str) -> float:
        """Return the seconds that the caller's next request would have to wait, and count nothing."""
        now = self._clock()
        return max(0.0, self._due.get(caller, now) - now - self._slack)
