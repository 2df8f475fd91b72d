"""Work that nobody waits for, such as posting Events: one at a time, in order, dropped when there is too much of it.

It gives way to what somebody waits for: when twenty runs are cancelled at once, their twenty Events come after.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final

logger = logging.getLogger(__name__)

MOST: Final = 10_000
"""So much may wait. Beyond it the API server has been gone for long, and what is dropped was for people only."""
DELAY_SECONDS: Final = 0.5
"""How long each piece waits, at least."""
LOOK_SECONDS: Final = 0.05


class Background:
    """Awaits what it is given, one after another. What fails is logged."""

    def __init__(self, *, pressed: Callable[[], bool] = lambda: False, delay_seconds: float = DELAY_SECONDS) -> None:
        """While the process is `pressed` nothing is begun."""
        self._pressed = pressed
        self._delay = delay_seconds
        self._waiting: asyncio.Queue[tuple[float, Awaitable[None]]] = asyncio.Queue(MOST)

    def add(self, work: Awaitable[None]) -> None:
        """Have it awaited, later."""
        try:
            self._waiting.put_nowait((asyncio.get_running_loop().time() + self._delay, work))
        except asyncio.QueueFull:
            logger.warning("too much waits in the background: dropped")
            _drop(work)

    async def run(self) -> None:
        """Work until cancelled."""
        while True:
            due, work = await self._waiting.get()
            try:
                await self._turn(due)
            except asyncio.CancelledError:
                _drop(work)
                raise
            try:
                await work
            except Exception:
                logger.warning("background work failed", exc_info=True)
            finally:
                self._waiting.task_done()

    async def _turn(self, due: float) -> None:
        await asyncio.sleep(due - asyncio.get_running_loop().time())
        while self._pressed():  # noqa: ASYNC110  (nobody is told when it ends, and nobody waits for this)
            await asyncio.sleep(LOOK_SECONDS)

    async def finish(self, *, seconds: float) -> None:
        """Give what waits so many seconds to be done; drop the rest."""
        try:
            async with asyncio.timeout(seconds):
                await self._waiting.join()
        except TimeoutError:
            while not self._waiting.empty():
                _drop(self._waiting.get_nowait()[1])


def _drop(work: Awaitable[None]) -> None:
    if isinstance(work, Coroutine):
        coroutine: Coroutine[Any, Any, None] = work
        coroutine.close()
