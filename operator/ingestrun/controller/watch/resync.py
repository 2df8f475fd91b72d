"""The resync: every few minutes all runs are listed, for what the watches have missed.

kopf does not repeat an `on.event` handler that failed, and a DELETED that fell into a relist is never shown;
neither may cost a run its progress, or us memory for a run that is gone.
"""

from __future__ import annotations

import asyncio
import contextlib

import structlog

from ingestrun.controller.http.health import Health
from ingestrun.controller.state.cache import RunCache
from ingestrun.controller.watch.workqueue import WorkQueue
from ingestrun.kube.errors import KubeError
from ingestrun.kube.protocol import Cluster, RunKey
from ingestrun.planner.batch.attempt import MalformedJobError, read_job

logger = structlog.get_logger("ingestrun")


async def resync_once(cluster: Cluster, store: RunCache, queue: WorkQueue[RunKey]) -> int:
    """List all runs, ask for a look at each that is not done with, forget those that are gone.

    Returns how many there are. The first time, if there are caps on Jobs, it counts the Jobs that are there.

    Raises KubeError when they could not be listed: then nothing is forgotten.
    """
    known = set(store.keys())
    if not store.usage.synced:
        # Before the first Job under a cap is created: those that an earlier process has left are counted.
        for job in await cluster.list_all_jobs():
            with contextlib.suppress(MalformedJobError):
                store.upsert_job(read_job(job))
    seen: set[RunKey] = set()
    for body in await cluster.list_runs():
        key = store.upsert_run(body)
        seen.add(key)
        if not store.is_archived(body["metadata"]["uid"]):
            store.invalidate(body["metadata"]["uid"])
            queue.add(key, "resync")
    for key in known - seen:
        store.remove_run(key)
        queue.forget(key)
    store.prune_orphans()
    store.usage.finish_sync()
    return len(seen)


async def resync_forever(
    cluster: Cluster,
    store: RunCache,
    queue: WorkQueue[RunKey],
    *,
    seconds: float,
    health: Health,
) -> None:
    """Resync at once and then every so many seconds, sooner after a failure."""
    while True:
        health.beat("resync", within=3 * seconds + 60)
        try:
            await resync_once(cluster, store, queue)
            pause = seconds
        except KubeError as error:
            logger.warning("resync failed", error=str(error))
            pause = min(10.0, seconds)
        await asyncio.sleep(pause)
