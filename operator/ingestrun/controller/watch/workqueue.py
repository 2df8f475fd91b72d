"""The work queue: one pass at a time for a key, requests in between coalesced, delayed requests kept by key.

kopf's own timers put a finalizer on every object and see it as it was when their cycle began. Here a timer only asks
for a look at the key, and the look decides from the state of that moment.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable, Hashable
from contextvars import Context
from typing import Generic, TypeVar

import structlog

K = TypeVar("K", bound=Hashable)

logger = structlog.get_logger("ingestrun")

FIRST_RETRY_SECONDS = 0.5
LAST_RETRY_SECONDS = 60.0
PATIENT = 4
"""Low-priority keys that are handled side by side."""


class PrioritySemaphore:
    """A bounded number of slots. `first` requests are served before others that wait, in the order of asking."""

    def __init__(self, number: int) -> None:
        self._free = number
        self._waiting: tuple[deque[asyncio.Future[None]], deque[asyncio.Future[None]]] = (deque(), deque())

    @property
    def pressed(self) -> bool:
        """Tell whether a `first` request waits."""
        return bool(self._waiting[0])

    async def take(self, *, first: bool) -> None:
        """Wait for a slot."""
        if self._free > 0:
            self._free -= 1
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting[0 if first else 1].append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.give()
            raise

    def give(self) -> None:
        """Give a slot back, to the next request."""
        for queue in self._waiting:
            while queue:
                turn = queue.popleft()
                if not turn.done():
                    turn.set_result(None)
                    return
        self._free += 1


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
        self._slots = PrioritySemaphore(concurrency)
        self._patient_slots = asyncio.Semaphore(PATIENT)
        self._running: dict[K, asyncio.Task[None]] = {}
        self._again: dict[K, str] = {}
        self._timers: dict[K, asyncio.TimerHandle] = {}
        self._errors: dict[K, int] = {}
        self._closed = False

    @property
    def pressed(self) -> bool:
        """Tell whether an urgent key waits for a slot."""
        return self._slots.pressed

    def add(self, key: K, trigger: str) -> None:
        """Ask for a look at the key, now or right after the pass that is under way."""
        if self._closed:
            return
        if key in self._running:
            self._again[key] = trigger
            return
        self._drop_timer(key)
        self._running[key] = asyncio.create_task(
            self._serve(key, trigger), name=f"pass {key}", context=self._context(key)
        )

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
        """Take no more, and wait for the passes under way."""
        self._closed = True
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

    async def _serve(self, key: K, trigger: str) -> None:
        try:
            async with self._patient_slots if self._patient(key) else contextlib.nullcontext():
                await self._slots.take(first=self._urgent(key))
                try:
                    delay = await self._handle(key, trigger)
                finally:
                    self._slots.give()
            self._errors.pop(key, None)
            if delay is not None:
                self.add_after(key, delay, "timer")
        except Exception as error:
            count = self._errors[key] = self._errors.get(key, 0) + 1
            delay = min(LAST_RETRY_SECONDS, FIRST_RETRY_SECONDS * 2 ** min(count - 1, 10))
            # The traceback at the first failure only: what goes on failing says so in one line.
            logger.warning("pass failed", again_in_seconds=delay, error=str(error), exc_info=count == 1)
            self.add_after(key, delay, "retry")
        finally:
            del self._running[key]
            again = self._again.pop(key, None)
            if again is not None:
                self.add(key, again)
