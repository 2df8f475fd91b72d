"""Work that nobody waits for, such as posting Events: one at a time, in order, dropped when there is too much of it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Coroutine
from typing import Any, Final

logger = logging.getLogger(__name__)

MOST: Final = 10_000
"""So much may wait. Beyond it the API server has been gone for long, and what is dropped was for people only."""


class Background:
    """Awaits what it is given, one after another. What fails is logged."""

    def __init__(self) -> None:
        self._waiting: asyncio.Queue[Awaitable[None]] = asyncio.Queue(MOST)

    def add(self, work: Awaitable[None]) -> None:
        """Have it awaited, later."""
        try:
            self._waiting.put_nowait(work)
        except asyncio.QueueFull:
            logger.warning("too much waits in the background: dropped")
            _drop(work)

    async def run(self) -> None:
        """Work until cancelled."""
        while True:
            work = await self._waiting.get()
            try:
                await work
            except Exception:
                logger.warning("background work failed", exc_info=True)
            finally:
                self._waiting.task_done()

    async def finish(self, *, seconds: float) -> None:
        """Give what waits so many seconds to be done; drop the rest."""
        try:
            async with asyncio.timeout(seconds):
                await self._waiting.join()
        except TimeoutError:
            while not self._waiting.empty():
                _drop(self._waiting.get_nowait())


def _drop(work: Awaitable[None]) -> None:
    if isinstance(work, Coroutine):
        coroutine: Coroutine[Any, Any, None] = work
        coroutine.close()
