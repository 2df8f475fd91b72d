"""Runs of one concurrency key begin one at a time: who may, is decided from a live list, under a lock of the key.

The lock spans [list the key's runs, decide, write the first claim] (`doors`). So of two runs created in the same
second one sees the other's claim.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial

from ingestrun.control.doors import Door, Doors
from ingestrun.control.store import Store
from ingestrun.engine.concurrency import Rival, bar_of, read_rival, replacer_of
from ingestrun.kube.errors import NotFound
from ingestrun.kube.protocol import Cluster, RunKey
from ingestrun.model.run import IngestRun
from ingestrun.model.spec import ConcurrencyPolicy


class Turns:
    """What each pass is told of the runs that share its run's key. Runs without a key cost nothing."""

    def __init__(self, cluster: Cluster, store: Store) -> None:
        self._cluster = cluster
        self._store = store
        self._doors = Doors(store)

    @asynccontextmanager
    async def take(self, key: RunKey, run: IngestRun) -> AsyncIterator[Sequence[Rival]]:
        """The other runs of the key, as this pass may judge them; the lock is held meanwhile if it may begin the run.

        Raises KubeError when they could not be listed, or when it is not known whether another has begun.
        """
        mine = _key(run)
        if mine is None or run.status.ended:
            yield ()
            return
        seen = self._seen(key, run)
        if not _may_begin(run, seen):
            self._doors.left(key)
            yield await self._confirmed(key, run, seen)
            return
        async with self._doors.through(mine, key, partial(self._listed, mine, run)) as rivals:
            yield rivals

    def replaced(self, key: RunKey, run: IngestRun) -> bool:
        """Whether, as far as the watch has shown, another run waits for this one to make room."""
        return _key(run) is not None and replacer_of(run, self._seen(key, run)) is not None

    async def _listed(self, mine: Door, run: IngestRun) -> Sequence[Rival]:
        live = await self._cluster.list_runs_of(namespace=mine[0], concurrency_key=mine[1])
        for body in live:
            self._store.saw_run(body)
        return [read_rival(body) for body in live if body["metadata"]["uid"] != run.metadata.uid]

    def _seen(self, key: RunKey, run: IngestRun) -> list[Rival]:
        body = self._store.run(key)
        found = self._store.sharing(body) if body is not None else ()
        return [read_rival(other) for other in found if other["metadata"]["uid"] != run.metadata.uid]

    async def _confirmed(self, key: RunKey, run: IngestRun, seen: Sequence[Rival]) -> Sequence[Rival]:
        """The same, but nothing is cancelled for a run that the server does not say is waiting."""
        newer = replacer_of(run, seen)
        while newer is not None:
            other = key.sibling(newer.name)
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


def _key(run: IngestRun) -> Door | None:
    concurrency = run.spec.concurrency
    return None if concurrency is None else (run.metadata.namespace, concurrency.key)
