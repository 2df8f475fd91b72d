"""Runs of one concurrency key begin one at a time: who may, is decided from a live list, under a lock of the key.

The lock spans [list the key's runs, decide, write the first claim]. So of two runs created in the same second one
sees the other's claim; and one replica acts, so a lock in this process is enough. Nothing has to outlive it: a new
process lists anew. What is left is a claim whose answer was lost: as long as it may still arrive at the server, no
other run of the key begins. The run that sent it reads and writes anew, and then it has arrived, or is refused for
its old resourceVersion.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from weakref import WeakValueDictionary

from ingestrun.control.store import Store
from ingestrun.engine.concurrency import Rival, bar_of, read_rival, replacer_of
from ingestrun.kube.errors import KubeError, NotFound, Unavailable
from ingestrun.kube.protocol import Cluster, RunKey
from ingestrun.model.run import IngestRun
from ingestrun.model.spec import ConcurrencyPolicy

Key = tuple[str, str]
"""A namespace and a concurrency key in it."""


class Turns:
    """What each pass is told of the runs that share its run's key. Runs without a key cost nothing."""

    def __init__(self, cluster: Cluster, store: Store) -> None:
        self._cluster = cluster
        self._store = store
        self._locks: WeakValueDictionary[Key, asyncio.Lock] = WeakValueDictionary()
        self._unsure: dict[Key, RunKey] = {}

    @asynccontextmanager
    async def take(self, key: RunKey, run: IngestRun) -> AsyncIterator[Sequence[Rival]]:
        """The other runs of the key, as this pass may judge them; the lock is held meanwhile if it may begin the run.

        Raises KubeError when they could not be listed, or when it is not known whether another has begun.
        """
        mine, phase = _key(run), run.status.phase
        if mine is None or (phase is not None and phase.ended):
            yield ()
            return
        seen = self._seen(key, run)
        if not _may_begin(run, seen):
            if self._unsure.get(mine) == key:
                del self._unsure[mine]
            yield await self._confirmed(key, run, seen)
            return
        lock = self._locks.setdefault(mine, asyncio.Lock())
        async with lock:
            self._be_sure(mine, key)
            live = await self._cluster.list_runs_of(namespace=mine[0], concurrency_key=mine[1])
            for body in live:
                self._store.saw_run(body)
            try:
                yield [read_rival(body) for body in live if body["metadata"]["uid"] != run.metadata.uid]
            except Unavailable:
                raise  # nothing was done
            except KubeError:
                self._unsure[mine] = key
                raise
            self._unsure.pop(mine, None)

    def replaced(self, key: RunKey, run: IngestRun) -> bool:
        """Whether, as far as the watch has shown, another run waits for this one to make room."""
        return _key(run) is not None and replacer_of(run, self._seen(key, run)) is not None

    def _seen(self, key: RunKey, run: IngestRun) -> list[Rival]:
        body = self._store.run(key)
        found = self._store.sharing(body) if body is not None else ()
        return [read_rival(other) for other in found if other["metadata"]["uid"] != run.metadata.uid]

    async def _confirmed(self, key: RunKey, run: IngestRun, seen: Sequence[Rival]) -> Sequence[Rival]:
        """The same, but nothing is cancelled for a run that the server does not say is waiting."""
        newer = replacer_of(run, seen)
        while newer is not None:
            other = RunKey(namespace=key.namespace, name=newer.name)
            others = [rival for rival in seen if rival.uid != newer.uid]
            try:
                body = await self._cluster.get_run(other)
            except NotFound:
                seen = others
            else:
                self._store.saw_run(body)
                live = read_rival(body)
                seen = [*others, live] if live.uid == newer.uid else others
                if live == newer:
                    return seen
            newer = replacer_of(run, seen)
        return seen

    def _be_sure(self, mine: Key, key: RunKey) -> None:
        other = self._unsure.get(mine)
        if other is None or other == key:
            return
        if self._store.run(other) is None:
            del self._unsure[mine]
            return
        raise Unavailable(f"whether run {other.name} of the same concurrency key has begun is not known yet")


def _may_begin(run: IngestRun, seen: Sequence[Rival]) -> bool:
    """Whether this pass may claim the first batch, or end the run instead, going by what the watch has shown."""
    if run.spec.cancel or run.spec.suspend or run.metadata.deletion_timestamp is not None:
        return False
    if run.status.start_time is not None:
        return False
    if run.spec.concurrency is None or run.spec.concurrency.policy is ConcurrencyPolicy.ALLOW:
        return False
    bar = bar_of(run, seen)
    return bar is None or bar.final


def _key(run: IngestRun) -> Key | None:
    concurrency = run.spec.concurrency
    return None if concurrency is None else (run.metadata.namespace, concurrency.key)
