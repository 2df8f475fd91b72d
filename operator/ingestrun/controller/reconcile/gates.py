"""Locks around [ask the server, decide, write], for steps that two runs must not both take.

Of two runs at one lock the second sees the write of the first. One replica acts, so a lock in this process is
enough, and no lock has to outlive it, because a new process asks anew. One case is left: a write whose answer was
lost. As long as it may still arrive at the server, no other run gets the lock. The run that sent it reads and writes
anew; after that the lost write has arrived, or is refused for its old resourceVersion.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import TypeVar
from weakref import WeakValueDictionary

import structlog

from ingestrun.controller.logs import about_run
from ingestrun.controller.state.cache import RunCache, read_run
from ingestrun.kube.errors import Conflict, KubeError, NotFound, Unavailable
from ingestrun.kube.protocol import Cluster, RunKey
from ingestrun.model.run import IngestRun
from ingestrun.model.spec import ConcurrencyPolicy
from ingestrun.planner.actions import ClaimPredecessor, Predecessor
from ingestrun.planner.run.concurrency import ConcurrentRun, replacing_run, start_block
from ingestrun.planner.run.resume import must_resume

logger = structlog.get_logger("ingestrun")

LockKey = tuple[str, str]
"""A namespace, and the name of a step in it that only one run may take at a time."""

T = TypeVar("T")


class KeyedLocks:
    """The locks of one kind. Unused locks take no memory."""

    def __init__(self, cache: RunCache) -> None:
        self._cache = cache
        self._locks: WeakValueDictionary[LockKey, asyncio.Lock] = WeakValueDictionary()
        self._unconfirmed: dict[LockKey, RunKey] = {}
        """The run whose last write under the lock has not been answered."""

    @asynccontextmanager
    async def hold(self, lock_key: LockKey, key: RunKey, ask: Callable[[], Awaitable[T]]) -> AsyncIterator[T]:
        """Hold the lock while a pass of this run asks, decides and writes.

        Raises Unavailable while another run's write under the lock is unconfirmed, and the errors that `ask` raises.
        """
        lock = self._locks.setdefault(lock_key, asyncio.Lock())
        async with lock:
            self._check_confirmed(lock_key, key)
            answer = await ask()
            try:
                yield answer
            except Unavailable:
                raise  # no write was sent
            except KubeError:
                self._unconfirmed[lock_key] = key
                raise
            self._unconfirmed.pop(lock_key, None)

    def confirm(self, key: RunKey) -> None:
        """Release the locks that this run may have left unconfirmed, once its newest stored version has been read."""
        for lock_key in [lock_key for lock_key, other in self._unconfirmed.items() if other == key]:
            del self._unconfirmed[lock_key]

    def _check_confirmed(self, lock_key: LockKey, key: RunKey) -> None:
        other = self._unconfirmed.get(lock_key)
        if other is None or other == key:
            return
        if self._cache.run(other) is None:
            del self._unconfirmed[lock_key]
            return
        raise Unavailable(f"what run {other.name} has written, which concerns this one, is not known yet")


class ConcurrencyGate:
    """Observes the runs that share a run's concurrency key, and lets them begin one at a time.

    The lock of the key spans [list the key's runs, decide, write the first claim]. So of two runs created in the same
    second one sees the other's claim. Runs without a key cost nothing.
    """

    def __init__(self, cluster: Cluster, cache: RunCache) -> None:
        self._cluster = cluster
        self._cache = cache
        self._locks = KeyedLocks(cache)

    @asynccontextmanager
    async def peers(self, key: RunKey, run: IngestRun) -> AsyncIterator[Sequence[ConcurrentRun]]:
        """Observe the other runs of the key, and hold the lock meanwhile if this pass may begin the run.

        Raises KubeError when they could not be listed, or when it is not known whether another has begun.
        """
        lock_key = _lock_key_of(run)
        if lock_key is None or run.status.ended:
            yield ()
            return
        watched = self._watched(key, run)
        if not _may_start(run, watched):
            self._locks.confirm(key)
            yield await self._confirm_replacing(key, run, watched)
            return
        async with self._locks.hold(lock_key, key, partial(self._list_live, lock_key, run)) as peers:
            yield peers

    def is_replaced(self, key: RunKey, run: IngestRun) -> bool:
        """Tell whether, as far as the watch has shown, another run waits for this one to make room."""
        return _lock_key_of(run) is not None and replacing_run(run, self._watched(key, run)) is not None

    async def _list_live(self, lock_key: LockKey, run: IngestRun) -> Sequence[ConcurrentRun]:
        before = self._cache.known()
        live = await self._cluster.list_runs_of(namespace=lock_key[0], concurrency_key=lock_key[1])
        for body in live:
            self._cache.upsert_run(body, asked=before.get(RunKey.of(body)))
        return [ConcurrentRun.read(body) for body in live if body["metadata"]["uid"] != run.metadata.uid]

    def _watched(self, key: RunKey, run: IngestRun) -> list[ConcurrentRun]:
        body = self._cache.run(key)
        found = self._cache.peers_of(body) if body is not None else ()
        return [ConcurrentRun.read(other) for other in found if other["metadata"]["uid"] != run.metadata.uid]

    async def _confirm_replacing(
        self, key: RunKey, run: IngestRun, watched: Sequence[ConcurrentRun]
    ) -> Sequence[ConcurrentRun]:
        """Return the same peers, less each replacing run that the server does not show as waiting.

        Therefore no run is cancelled for a replacing run that is gone, or that waits only by an old cache entry.
        """
        peers = watched
        newer = replacing_run(run, peers)
        while newer is not None:
            others = [peer for peer in peers if peer.uid != newer.uid]
            try:
                body = await read_run(self._cluster, self._cache, key.sibling(newer.name))
            except NotFound:
                peers = others
            else:
                live = ConcurrentRun.read(body)
                peers = [*others, live] if live.uid == newer.uid else others
                if live == newer:
                    return peers
            newer = replacing_run(run, peers)
        return peers


def _may_start(run: IngestRun, peers: Sequence[ConcurrentRun]) -> bool:
    """Tell whether this pass may claim the first batch, or end the run instead, going by what the watch has shown."""
    if run.spec.cancel or run.spec.suspend or run.metadata.deletion_timestamp is not None:
        return False
    if run.status.start_time is not None:
        return False
    if run.spec.concurrency is None or run.spec.concurrency.policy is ConcurrencyPolicy.ALLOW:
        return False
    block = start_block(run, peers)
    return block is None or block.final


def _lock_key_of(run: IngestRun) -> LockKey | None:
    concurrency = run.spec.concurrency
    return None if concurrency is None else (run.metadata.namespace, concurrency.key)


class ResumeGate:
    """Observes the runs from which a run may go on, and lets only one run go on from one state.

    If the ended run still exists, its `resumedBy` decides, by compare-and-set. A saved state may have no run any
    more. So a pass that may take over holds the lock of the first run's UID, and of two runs with one saved state the
    second finds the first in a live list. Runs without `resumeFrom` cost nothing, others a few calls in their life.
    """

    def __init__(self, cluster: Cluster, cache: RunCache) -> None:
        self._cluster = cluster
        self._cache = cache
        self._locks = KeyedLocks(cache)

    @asynccontextmanager
    async def predecessors(self, key: RunKey, run: IngestRun) -> AsyncIterator[Sequence[Predecessor] | None]:
        """Observe the runs that `spec.resumeFrom` is about, and hold the lock. None: there is nothing to take over.

        By name it is that run, if it exists; for a saved state all that are left of its chain of resumes.
        Raises KubeError when they could not be read.
        """
        wanted = run.spec.resume_from
        if wanted is None or not must_resume(run):
            self._locks.confirm(key)
            yield None
            return
        ask: Callable[[], Awaitable[Sequence[Predecessor]]]
        if wanted.name is not None:
            predecessor = run.metadata.key.sibling(wanted.name)
            named = self._watched(predecessor) or await self._read(predecessor)
            origin = named.origin_uid if named is not None else None
            ask = partial(self._named, run, predecessor, origin)
        else:
            origin = wanted.saved_state.uid if wanted.saved_state is not None else None
            ask = partial(self._chain_of, run, origin)
        if origin is None:
            yield ()
            return
        async with self._locks.hold((key.namespace, origin), key, ask) as found:
            yield found

    async def _named(self, run: IngestRun, predecessor: RunKey, origin: str | None) -> Sequence[Predecessor]:
        """Return the named run: from the cache while it has to be waited for, then from the server.

        It is read from the server also once it bears this run's claim, because a cache may show a run that is gone
        and whose saved state another has taken.
        """
        old = self._watched(predecessor)
        if old is None or old.status.drained:
            old = await self._read(predecessor)
        if old is None:
            return ()
        if old.origin_uid != origin:
            raise Unavailable(f"run {old.metadata.name} has just been seen to be another than was known: asked anew")
        resumer = None
        by = old.status.resumed_by
        if by is not None and by.uid != run.metadata.uid:
            resumer = await self._read(run.metadata.key.sibling(by.name))
        return (Predecessor(run=old, resumer=resumer),)

    async def _chain_of(self, run: IngestRun, origin: str | None) -> Sequence[Predecessor]:
        """Return the other runs that publish under that UID: the first one, and those that have gone on from it.

        All runs of the namespace are listed, because a list can't be asked for a UID. That happens at the take-over
        and while it has to wait.
        """
        before = self._cache.known()
        listed = await self._cluster.list_runs_in(namespace=run.metadata.namespace)
        bodies = {body["metadata"]["name"]: body for body in listed}
        chain = []
        for body in bodies.values():
            taken_from = (body.get("status") or {}).get("resumedFrom") or {}
            uid = body["metadata"]["uid"]
            if uid != run.metadata.uid and origin in (uid, taken_from.get("originUid")):
                self._cache.upsert_run(body, asked=before.get(RunKey.of(body)))
                old = IngestRun.read(body)
                by = old.status.resumed_by
                holder = bodies.get(by.name) if by is not None else None
                resumer = IngestRun.read(holder) if holder is not None else None
                chain.append(Predecessor(run=old, resumer=resumer))
        return chain

    def _watched(self, key: RunKey) -> IngestRun | None:
        return self._cache.parsed(key) if self._cache.run(key) is not None else None

    async def _read(self, key: RunKey) -> IngestRun | None:
        try:
            body = await read_run(self._cluster, self._cache, key)
        except NotFound:
            return None
        return IngestRun.read(body)


async def claim_predecessor(cluster: Cluster, cache: RunCache, claim: ClaimPredecessor) -> None:
    """Claim the rest of a run. If that run has changed meanwhile, the next observation shows it."""
    meta = claim.of.metadata
    status = claim.status.to_json()
    try:
        body = await cluster.write_status(meta.key, resource_version=meta.resource_version, status=status)
    except (Conflict, NotFound):
        return
    cache.upsert_run(body)
    by = claim.status.resumed_by
    with about_run(name=meta.name, namespace=meta.namespace, uid=meta.uid):
        logger.info("run is resumed", by=by.name if by else None)
