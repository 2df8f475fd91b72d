"""One run at a time through a door: [ask the server, decide, write], for what two runs must not both do.

Of two runs at one door the second sees what the first has written. One replica acts, so a lock in this process is
enough, and nothing has to outlive it: a new process asks anew. What is left is a write whose answer was lost: as long
as it may still arrive at the server, no other run passes. The run that sent it reads and writes anew, and then it has
arrived, or is refused for its old resourceVersion.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeVar
from weakref import WeakValueDictionary

from ingestrun.control.store import Store
from ingestrun.kube.errors import KubeError, Unavailable
from ingestrun.kube.protocol import RunKey

Door = tuple[str, str]
"""A namespace, and what in it only one run may do at a time."""

T = TypeVar("T")


class Doors:
    """The doors of one kind. Those at which nobody stands cost nothing."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._locks: WeakValueDictionary[Door, asyncio.Lock] = WeakValueDictionary()
        self._unsure: dict[Door, RunKey] = {}

    @asynccontextmanager
    async def through(self, door: Door, key: RunKey, ask: Callable[[], Awaitable[T]]) -> AsyncIterator[T]:
        """Hold the door while a pass of this run asks, decides and writes.

        Raises Unavailable while it is not known what another run has written, and what `ask` raises.
        """
        lock = self._locks.setdefault(door, asyncio.Lock())
        async with lock:
            self._be_sure(door, key)
            answer = await ask()
            try:
                yield answer
            except Unavailable:
                raise  # nothing was done
            except KubeError:
                self._unsure[door] = key
                raise
            self._unsure.pop(door, None)

    def left(self, key: RunKey) -> None:
        """A pass of this run, from what is stored of it now, has nothing to do at any door."""
        for door in [door for door, other in self._unsure.items() if other == key]:
            del self._unsure[door]

    def _be_sure(self, door: Door, key: RunKey) -> None:
        other = self._unsure.get(door)
        if other is None or other == key:
            return
        if self._store.run(other) is None:
            del self._unsure[door]
            return
        raise Unavailable(f"what run {other.name} has written, which concerns this one, is not known yet")
