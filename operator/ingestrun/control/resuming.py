"""What a run that resumes another asks of the API server, and writes there: a few calls, once in its life.

Two runs must not both go on from one state. Where the ended run is still there, its `resumedBy` decides, by
compare-and-set. A saved state may have no run any more: so a pass that may take over holds the door of the first
run's UID, and of two runs with one saved state the second finds the first in a live list.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial

import structlog

from ingestrun.control.doors import Doors
from ingestrun.control.store import Store
from ingestrun.engine.decisions import Predecessor, Take
from ingestrun.engine.resuming import awaits, drained
from ingestrun.kube.errors import Conflict, NotFound, Unavailable
from ingestrun.kube.protocol import Cluster, RunKey
from ingestrun.model.run import IngestRun

logger = structlog.get_logger("ingestrun")


class Resumptions:
    """What each pass is told of the runs from which its run may go on. Runs without `resumeFrom` cost nothing."""

    def __init__(self, cluster: Cluster, store: Store) -> None:
        self._cluster = cluster
        self._store = store
        self._doors = Doors(store)

    @asynccontextmanager
    async def take(self, key: RunKey, run: IngestRun) -> AsyncIterator[Sequence[Predecessor] | None]:
        """The runs that `spec.resumeFrom` is about; the door is held meanwhile. None: there is nothing to take over.

        By name it is that run, if it exists; for a saved state all that are left of its row of resumes.
        Raises KubeError when they could not be read.
        """
        if not awaits(run):
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
        old = self._known(run) or await self._read(_named_by(run))
        return old.origin_uid if old is not None else None

    async def _named(self, run: IngestRun, origin: str) -> Sequence[Predecessor]:
        """The run that is named: from the cache while it has to be waited for, then from the server.

        Also once it bears this run's claim: a cache may show one that is gone, and whose saved state another has taken.
        """
        old = self._known(run)
        if old is None or drained(old):
            old = await self._read(_named_by(run))
        if old is None:
            return ()
        if old.origin_uid != origin:
            raise Unavailable(f"run {old.metadata.name} has just been seen to be another than was known: asked anew")
        resumer = None
        by = old.status.resumed_by
        if by is not None and by.uid != run.metadata.uid:
            resumer = await self._read(run.metadata.key.sibling(by.name))
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
                self._store.saw_run(body)
                old = IngestRun.read(body)
                by = old.status.resumed_by
                holder = bodies.get(by.name) if by is not None else None
                row.append(Predecessor(run=old, resumer=IngestRun.read(holder) if holder is not None else None))
        return row

    def _known(self, run: IngestRun) -> IngestRun | None:
        key = _named_by(run)
        return self._store.parsed(key) if self._store.run(key) is not None else None

    async def _read(self, key: RunKey) -> IngestRun | None:
        try:
            body = await self._cluster.get_run(key)
        except NotFound:
            return None
        self._store.saw_run(body)
        return IngestRun.read(body)


async def claim(cluster: Cluster, store: Store, taken: Take) -> None:
    """Claim the rest of a run; if it has changed meanwhile, that is seen at the next look."""
    meta = taken.of.metadata
    status = taken.status.model_dump(mode="json", by_alias=True, exclude_none=True)
    try:
        body = await cluster.write_status(meta.key, resource_version=meta.resource_version, status=status)
    except (Conflict, NotFound):
        return
    store.saw_run(body)
    by = taken.status.resumed_by
    logger.info("run is resumed", run=meta.name, namespace=meta.namespace, uid=meta.uid, by=by.name if by else None)


def _named_by(run: IngestRun) -> RunKey:
    wanted = run.spec.resume_from
    assert wanted is not None  # noqa: S101  (for the type checker)
    assert wanted.name is not None  # noqa: S101
    return run.metadata.key.sibling(wanted.name)
