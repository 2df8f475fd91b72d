"""One run at a time through a door: [ask the server, decide, write], for what two runs must not both do.

Of two runs at one door the second sees what the first has written. One replica acts, so a lock in this process is
enough, and nothing has to outlive it: a new process asks anew. What is left is a write whose answer was lost: as long
as it may still arrive at the server, no other run passes. The run that sent it reads and writes anew, and then it has
arrived, or is refused for its old resourceVersion.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import TypeVar
from weakref import WeakValueDictionary

import structlog

from ingestrun.controller.state.cache import RunCache
from ingestrun.kube.errors import Conflict, KubeError, NotFound, Unavailable
from ingestrun.kube.protocol import Cluster, RunKey
from ingestrun.model.run import IngestRun
from ingestrun.model.spec import ConcurrencyPolicy
from ingestrun.planner.actions import ClaimPredecessor, Predecessor
from ingestrun.planner.run.concurrency import ConcurrentRun, replacing_run, start_block
from ingestrun.planner.run.resume import must_resume

LockKey = tuple[str, str]
"""A namespace, and what in it only one run may do at a time."""

T = TypeVar("T")


class KeyedLocks:
    """The doors of one kind. Those at which nobody stands cost nothing."""

    def __init__(self, store: RunCache) -> None:
        self._store = store
        self._locks: WeakValueDictionary[LockKey, asyncio.Lock] = WeakValueDictionary()
        self._unsure: dict[LockKey, RunKey] = {}

    @asynccontextmanager
    async def through(self, door: LockKey, key: RunKey, ask: Callable[[], Awaitable[T]]) -> AsyncIterator[T]:
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

    def _be_sure(self, door: LockKey, key: RunKey) -> None:
        other = self._unsure.get(door)
        if other is None or other == key:
            return
        if self._store.run(other) is None:
            del self._unsure[door]
            return
        raise Unavailable(f"what run {other.name} has written, which concerns this one, is not known yet")


# Runs of one concurrency key begin one at a time: who may, is decided from a live list, under a lock of the key.
#
# The lock spans [list the key's runs, decide, write the first claim] (`doors`). So of two runs created in the same
# second one sees the other's claim.
#


class ConcurrencyGate:
    """What each pass is told of the runs that share its run's key. Runs without a key cost nothing."""

    def __init__(self, cluster: Cluster, store: RunCache) -> None:
        self._cluster = cluster
        self._store = store
        self._doors = KeyedLocks(store)

    @asynccontextmanager
    async def take(self, key: RunKey, run: IngestRun) -> AsyncIterator[Sequence[ConcurrentRun]]:
        """The other runs of the key, as this pass may judge them; the lock is held meanwhile if it may begin the run.

        Raises KubeError when they could not be listed, or when it is not known whether another has begun.
        """
        mine = _group_of(run)
        if mine is None or run.status.ended:
            yield ()
            return
        seen = self._seen(key, run)
        if not _may_start(run, seen):
            self._doors.left(key)
            yield await self._confirmed(key, run, seen)
            return
        async with self._doors.through(mine, key, partial(self._listed, mine, run)) as rivals:
            yield rivals

    def replaced(self, key: RunKey, run: IngestRun) -> bool:
        """Whether, as far as the watch has shown, another run waits for this one to make room."""
        return _group_of(run) is not None and replacing_run(run, self._seen(key, run)) is not None

    async def _listed(self, mine: LockKey, run: IngestRun) -> Sequence[ConcurrentRun]:
        live = await self._cluster.list_runs_of(namespace=mine[0], concurrency_key=mine[1])
        for body in live:
            self._store.upsert_run(body)
        return [ConcurrentRun.read(body) for body in live if body["metadata"]["uid"] != run.metadata.uid]

    def _seen(self, key: RunKey, run: IngestRun) -> list[ConcurrentRun]:
        body = self._store.run(key)
        found = self._store.peers_of(body) if body is not None else ()
        return [ConcurrentRun.read(other) for other in found if other["metadata"]["uid"] != run.metadata.uid]

    async def _confirmed(self, key: RunKey, run: IngestRun, seen: Sequence[ConcurrentRun]) -> Sequence[ConcurrentRun]:
        """The same, but nothing is cancelled for a run that the server does not say is waiting."""
        newer = replacing_run(run, seen)
        while newer is not None:
            other = RunKey(namespace=key.namespace, name=newer.name)
            others = [rival for rival in seen if rival.uid != newer.uid]
            try:
                body = await self._cluster.get_run(other)
            except NotFound:
                seen = others
            else:
                self._store.upsert_run(body)
                live = ConcurrentRun.read(body)
                seen = [*others, live] if live.uid == newer.uid else others
                if live == newer:
                    return seen
            newer = replacing_run(run, seen)
        return seen


def _may_start(run: IngestRun, seen: Sequence[ConcurrentRun]) -> bool:
    """Whether this pass may claim the first batch, or end the run instead, going by what the watch has shown."""
    if run.spec.cancel or run.spec.suspend or run.metadata.deletion_timestamp is not None:
        return False
    if run.status.start_time is not None:
        return False
    if run.spec.concurrency is None or run.spec.concurrency.policy is ConcurrencyPolicy.ALLOW:
        return False
    bar = start_block(run, seen)
    return bar is None or bar.final


def _group_of(run: IngestRun) -> LockKey | None:
    concurrency = run.spec.concurrency
    return None if concurrency is None else (run.metadata.namespace, concurrency.key)


# What a run that resumes another asks of the API server, and writes there: a few calls, once in its life.
#
# Two runs must not both go on from one state. Where the ended run is still there, its `resumedBy` decides, by
# compare-and-set. A saved state may have no run any more: so a pass that may take over holds the door of the first
# run's UID, and of two runs with one saved state the second finds the first in a live list.
#

logger = structlog.get_logger("ingestrun")


class ResumeGate:
    """What each pass is told of the runs from which its run may go on. Runs without `resumeFrom` cost nothing."""

    def __init__(self, cluster: Cluster, store: RunCache) -> None:
        self._cluster = cluster
        self._store = store
        self._doors = KeyedLocks(store)

    @asynccontextmanager
    async def take(self, key: RunKey, run: IngestRun) -> AsyncIterator[Sequence[Predecessor] | None]:
        """The runs that `spec.resumeFrom` is about; the door is held meanwhile. None: there is nothing to take over.

        By name it is that run, if it exists; for a saved state all that are left of its row of resumes.
        Raises KubeError when they could not be read.
        """
        if not must_resume(run):
            self._doors.left(key)
            yield None
            return
        origin = await self._origin_of(run)
        if origin is None:
            yield ()
            return
        asks = self._named if run.spec.resume_from and run.spec.resume_from.name else self._row_of
        async with self._doors.through((key.namespace, origin), key, partial(asks, run, origin)) as found:
            yield found

    async def _origin_of(self, run: IngestRun) -> str | None:
        """The UID of the first run in the row that this one is to join; None where the run that it names is gone."""
        wanted = run.spec.resume_from
        assert wanted is not None  # noqa: S101  (for the type checker)
        if wanted.saved_state is not None:
            return wanted.saved_state.uid
        old = self._known(run) or await self._read(_predecessor_key(run))
        return old.origin_uid if old is not None else None

    async def _named(self, run: IngestRun, origin: str) -> Sequence[Predecessor]:
        """The run that is named: from the cache while it has to be waited for, then from the server.

        Also once it bears this run's claim: a cache may show one that is gone, and whose saved state another has taken.
        """
        old = self._known(run)
        if old is None or old.status.drained:
            old = await self._read(_predecessor_key(run))
        if old is None:
            return ()
        if old.origin_uid != origin:
            raise Unavailable(f"run {old.metadata.name} has just been seen to be another than was known: asked anew")
        resumer = None
        by = old.status.resumed_by
        if by is not None and by.uid != run.metadata.uid:
            resumer = await self._read(RunKey(namespace=run.metadata.namespace, name=by.name))
        return (Predecessor(run=old, resumer=resumer),)

    async def _row_of(self, run: IngestRun, origin: str) -> Sequence[Predecessor]:
        """The other runs that publish under that UID: the first one, and those that have gone on from it.

        All of the namespace are listed, at the take-over and while that waits: a list can't be asked for a UID.
        """
        bodies = {
            body["metadata"]["name"]: body
            for body in await self._cluster.list_runs_in(namespace=run.metadata.namespace)
        }
        row = []
        for body in bodies.values():
            taken_from = (body.get("status") or {}).get("resumedFrom") or {}
            uid = body["metadata"]["uid"]
            if uid != run.metadata.uid and origin in (uid, taken_from.get("originUid")):
                self._store.upsert_run(body)
                old = IngestRun.read(body)
                by = old.status.resumed_by
                holder = bodies.get(by.name) if by is not None else None
                row.append(Predecessor(run=old, resumer=IngestRun.read(holder) if holder is not None else None))
        return row

    def _known(self, run: IngestRun) -> IngestRun | None:
        key = _predecessor_key(run)
        return self._store.parsed(key) if self._store.run(key) is not None else None

    async def _read(self, key: RunKey) -> IngestRun | None:
        try:
            body = await self._cluster.get_run(key)
        except NotFound:
            return None
        self._store.upsert_run(body)
        return IngestRun.read(body)


async def claim_predecessor(cluster: Cluster, store: RunCache, taken: ClaimPredecessor) -> None:
    """Claim the rest of a run; if it has changed meanwhile, that is seen at the next look."""
    meta = taken.of.metadata
    key = RunKey(namespace=meta.namespace, name=meta.name)
    status = taken.status.model_dump(mode="json", by_alias=True, exclude_none=True)
    try:
        body = await cluster.write_status(key, resource_version=meta.resource_version, status=status)
    except (Conflict, NotFound):
        return
    store.upsert_run(body)
    by = taken.status.resumed_by
    logger.info("run is resumed", run=meta.name, namespace=meta.namespace, uid=meta.uid, by=by.name if by else None)


def _predecessor_key(run: IngestRun) -> RunKey:
    wanted = run.spec.resume_from
    assert wanted is not None  # noqa: S101  (for the type checker)
    assert wanted.name is not None  # noqa: S101
    return RunKey(namespace=run.metadata.namespace, name=wanted.name)
