"""The deletion of orphaned Jobs: those that the operator has created, and whose run is gone.

`kubectl delete ir NAME --cascade=orphan` takes the owner from a run's Jobs, so the garbage collector leaves them, and
without their run nobody accounts for them. What counts is the state alone: a Job is deleted if all of it shows that the
operator created it (`planner.batch.ownership.orphaned_job`), nothing controls it, and a fresh GET shows no run of its
run's name and UID. The watches and the resync only ask for a look.
"""

from __future__ import annotations

import asyncio
from itertools import groupby
from typing import Final

import structlog

from ingestrun.controller.logs import about_run
from ingestrun.controller.state.cache import RunCache
from ingestrun.kube.errors import KubeError, NotFound
from ingestrun.kube.protocol import Cluster, RunKey
from ingestrun.planner.batch.ownership import OrphanedJob

logger = structlog.get_logger("ingestrun")

SETTLE_SECONDS: Final = 1.0
"""Wait before a look, so that the Jobs of one run are taken together."""
PAUSE_SECONDS: Final = 0.1
"""Wait between two deletions, because a run may leave thousands, and nobody waits for their end."""
RETRY_SECONDS: Final = 15.0


class OrphanCollector:
    """Deletes orphaned Jobs, one by one, each by its UID."""

    def __init__(
        self,
        cluster: Cluster,
        cache: RunCache,
        *,
        settle_seconds: float = SETTLE_SECONDS,
        pause_seconds: float = PAUSE_SECONDS,
    ) -> None:
        self._cluster = cluster
        self._cache = cache
        self._settle_seconds = settle_seconds
        self._pause_seconds = pause_seconds
        self._asked = asyncio.Event()
        cache.strangers.orphan_seen = self._asked.set

    async def run(self) -> None:
        """Look whenever an orphan may be there, until cancelled."""
        while True:
            await self._asked.wait()
            await asyncio.sleep(self._settle_seconds)
            self._asked.clear()
            try:
                await self.collect()
            except KubeError as error:
                logger.warning("orphaned Jobs could not be deleted", again_in_seconds=RETRY_SECONDS, error=str(error))
                await asyncio.sleep(RETRY_SECONDS)
                self._asked.set()

    async def collect(self) -> None:
        """Delete the orphans that are known. Raises KubeError, the first that a call has raised."""
        found = sorted(self._cache.orphans(), key=lambda job: (str(job.run), job.run_uid, job.name))
        for (key, run_uid), jobs in groupby(found, key=lambda job: (job.run, job.run_uid)):
            if not await self._exists(key, run_uid):
                for job in jobs:
                    await self._delete(job)
                    await asyncio.sleep(self._pause_seconds)

    async def _exists(self, key: RunKey, run_uid: str) -> bool:
        """Tell by the API server whether the run exists. Another run may have its name by now."""
        try:
            body = await self._cluster.get_run(key)
        except NotFound:
            return False
        return bool(body["metadata"]["uid"] == run_uid)

    async def _delete(self, job: OrphanedJob) -> None:
        await self._cluster.delete_job(namespace=job.run.namespace, name=job.name, uid=job.uid)
        self._cache.strangers.forget(job.uid)
        with about_run(name=job.run.name, namespace=job.run.namespace, uid=job.run_uid):
            logger.info("orphaned job deleted", job=job.name, why="its run is gone, and nothing else owns it")
