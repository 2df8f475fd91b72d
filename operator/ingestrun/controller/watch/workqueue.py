"""The work queue: one pass at a time for a key, requests in between coalesced, delayed requests kept by key.

kopf's own timers put a finalizer on every object and see it as it was when their cycle began. Here a timer only asks
for a look at the key, and the look decides from the state of that moment.
"""

from __future__ import annotations

import asyncio
import enum
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from contextvars import Context
from itertools import count
from typing import Generic, TypeVar

import structlog

K = TypeVar("K", bound=Hashable)

logger = structlog.get_logger("ingestrun")

FIRST_RETRY_SECONDS = 0.5
LAST_RETRY_SECONDS = 60.0
PATIENT = 4
"""Low-priority keys that are handled side by side."""


class Priority(enum.Enum):
    """Priority of a key that waits for its turn."""

    URGENT = enum.auto()
    """Turn before all others."""
    NORMAL = enum.auto()
    """Turn in the order of asking."""
    PATIENT = enum.auto()
    """Turn in the order of asking too, but only while few others of this priority are being handled."""


class WorkQueue(Generic[K]):
    """Calls `handle(key, trigger)` for each key that was asked for.

    `handle` returns in how many seconds it wants the key looked at again, or None. When it raises, the key is
    looked at again after a delay that doubles from half a second to a minute.
    """

    def __init__(
        self,
        handle: Callable[[K, str], Awaitable[float | None]],
        *,
        concurrency: int,
        urgent: Callable[[K], bool] = lambda _: False,
        patient: Callable[[K], bool] = lambda _: False,
        context: Callable[[K], Context] = lambda _: Context(),
    ) -> None:
        """Handle at most `concurrency` keys side by side; those that are `urgent` do not queue behind others.

        At most PATIENT low-priority keys run at once, so that draining runs' live lists do not delay the others.
        A pass runs in the `context` of its key, because a copy of the asker's context would put
        another run into its log lines.
        """
        self._handle = handle
        self._context = context
        self._urgent = urgent
        self._patient = patient
        self._concurrency = concurrency
        self._waiting: dict[Priority, OrderedDict[K, tuple[int, str]]] = {level: OrderedDict() for level in Priority}
        """Keys that wait for their turn: their number in the order of asking, and the newest trigger."""
        self._turns = count()
        self._running: dict[K, asyncio.Task[None]] = {}
        self._running_patient = 0
        self._again: dict[K, str] = {}
        """Keys that were asked for again while they were being handled, with the newest trigger."""
        self._timers: dict[K, asyncio.TimerHandle] = {}
        self._errors: dict[K, int] = {}
        self._closed = False

    @property
    def pressed(self) -> bool:
        """Tell whether an urgent key waits for its turn."""
        return bool(self._waiting[Priority.URGENT])

    def add(self, key: K, trigger: str) -> None:
        """Ask for a look at the key, now or right after the pass that is under way."""
        if self._closed:
            return
        if key in self._running:
            self._again[key] = trigger
            return
        self._drop_timer(key)
        priority = self._priority(key)
        for other, keys in self._waiting.items():
            if other is not priority:
                keys.pop(key, None)
        keys = self._waiting[priority]
        turn = keys[key][0] if key in keys else next(self._turns)
        keys[key] = (turn, trigger)
        self._start_next()

    def add_after(self, key: K, seconds: float, trigger: str) -> None:
        """Ask for a look at the key after a delay; of several such requests the earliest counts."""
        if self._closed:
            return
        loop = asyncio.get_running_loop()
        when = loop.time() + max(0.0, seconds)
        before = self._timers.get(key)
        if before is not None and before.when() <= when:
            return
        self._drop_timer(key)
        self._timers[key] = loop.call_at(when, self._fire, key, trigger)

    def forget(self, key: K) -> None:
        """Drop what is delayed for the key; a pass under way goes on."""
        self._drop_timer(key)
        self._errors.pop(key, None)

    async def close(self) -> None:
        """Take no more, drop what waits, and wait for the passes under way."""
        self._closed = True
        for keys in self._waiting.values():
            keys.clear()
        for key in list(self._timers):
            self._drop_timer(key)
        await asyncio.gather(*self._running.values(), return_exceptions=True)

    async def idle(self) -> None:
        """Wait until no pass is under way (delayed requests may be left)."""
        while self._running:
            await asyncio.wait(list(self._running.values()))

    def _fire(self, key: K, trigger: str) -> None:
        self._timers.pop(key, None)
        self.add(key, trigger)

    def _drop_timer(self, key: K) -> None:
        timer = self._timers.pop(key, None)
        if timer is not None:
            timer.cancel()

    def _priority(self, key: K) -> Priority:
        if self._urgent(key):
            return Priority.URGENT
        return Priority.PATIENT if self._patient(key) else Priority.NORMAL

    def _start_next(self) -> None:
        """Start passes while there is room for one."""
        while len(self._running) < self._concurrency:
            priority = self._next_priority()
            if priority is None:
                return
            keys = self._waiting[priority]
            key = next(iter(keys))
            _, trigger = keys.pop(key)
            self._running_patient += priority is Priority.PATIENT
            self._running[key] = asyncio.create_task(
                self._serve(key, trigger, priority), name=f"pass {key}", context=self._context(key)
            )

    def _next_priority(self) -> Priority | None:
        """Return the priority whose first key is next; None if none may start."""
        if self._waiting[Priority.URGENT]:
            return Priority.URGENT
        levels = [Priority.NORMAL, *([Priority.PATIENT] if self._running_patient < PATIENT else [])]
        first = {next(iter(keys.values())): level for level in levels if (keys := self._waiting[level])}
        return first[min(first)] if first else None

    async def _serve(self, key: K, trigger: str, priority: Priority) -> None:
        try:
            delay = await self._handle(key, trigger)
            self._errors.pop(key, None)
            if delay is not None:
                self.add_after(key, delay, "timer")
        except Exception as error:
            failures = self._errors[key] = self._errors.get(key, 0) + 1
            delay = min(LAST_RETRY_SECONDS, FIRST_RETRY_SECONDS * 2 ** min(failures - 1, 10))
            # The traceback at the first failure only: what goes on failing says so in one line.
            logger.warning("pass failed", again_in_seconds=delay, error=str(error), exc_info=failures == 1)
            self.add_after(key, delay, "retry")
        finally:
            del self._running[key]
            self._running_patient -= priority is Priority.PATIENT
            again = self._again.pop(key, None)
            if again is not None:
                self.add(key, again)
            self._start_next()
