"""What a run that resumes another asks of the API server, and writes there: a few calls, once in its life."""

from __future__ import annotations

import structlog

from ingestrun.control.store import Store
from ingestrun.engine.decisions import Predecessor, Take
from ingestrun.engine.resuming import drained
from ingestrun.kube.errors import Conflict, NotFound
from ingestrun.kube.protocol import Cluster, RunKey
from ingestrun.model.run import IngestRun

logger = structlog.get_logger("ingestrun")


async def predecessor_of(cluster: Cluster, store: Store, run: IngestRun) -> Predecessor:
    """The run that `spec.resumeFrom` names: from the cache while it has to be waited for, then from the server.

    Once it is drained and bears this run's claim, what of it matters here changes no more: the cache will do.
    """
    wanted = run.spec.resume_from
    assert wanted is not None  # noqa: S101  (for the type checker)
    assert wanted.name is not None  # noqa: S101
    key = RunKey(namespace=run.metadata.namespace, name=wanted.name)
    body = store.run(key)
    old = IngestRun.read(body) if body is not None else None
    if old is None or (drained(old) and not _held_by(old, run)):
        old = await _read(cluster, store, key)
    resumer = None
    if old is not None and drained(old) and old.status.resumed_by is not None and not _held_by(old, run):
        holder = RunKey(namespace=key.namespace, name=old.status.resumed_by.name)
        resumer = await _read(cluster, store, holder)
    return Predecessor(run=old, resumer=resumer)


async def take(cluster: Cluster, store: Store, taken: Take) -> None:
    """Claim the rest of a run; if it has changed meanwhile, that is seen at the next look."""
    meta = taken.of.metadata
    key = RunKey(namespace=meta.namespace, name=meta.name)
    status = taken.status.model_dump(mode="json", by_alias=True, exclude_none=True)
    try:
        body = await cluster.write_status(key, resource_version=meta.resource_version, status=status)
    except (Conflict, NotFound):
        return
    store.saw_run(body)
    by = taken.status.resumed_by
    logger.info("run is resumed", run=meta.name, namespace=meta.namespace, uid=meta.uid, by=by.name if by else None)


async def _read(cluster: Cluster, store: Store, key: RunKey) -> IngestRun | None:
    try:
        body = await cluster.get_run(key)
    except NotFound:
        return None
    store.saw_run(body)
    return IngestRun.read(body)


def _held_by(old: IngestRun, run: IngestRun) -> bool:
    return old.status.resumed_by is not None and old.status.resumed_by.uid == run.metadata.uid
