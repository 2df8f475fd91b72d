"""The resync: every few minutes all runs, Jobs and pods are listed, for what the watches have missed.

kopf does not repeat an `on.event` handler that failed, and a DELETED that fell into a relist is never shown;
neither may cost a run its progress, or the process memory for a run that is gone.

The first resync comes before the watches, so that a new process knows all Jobs by a few lists, and not by two for each
run.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from typing import Final

import structlog

from ingestrun.controller.http.health import Health
from ingestrun.controller.state.cache import RunCache
from ingestrun.controller.watch.workqueue import WorkQueue
from ingestrun.kube.errors import KubeError, NotFound
from ingestrun.kube.protocol import Cluster, RunKey
from ingestrun.planner.batch.attempt import ObservedJob, ObservedPod

logger = structlog.get_logger("ingestrun")

MISSING_CRD_SECONDS: Final = 5.0
"""Seconds after which a missing CRD is looked for again."""


async def resync_once(cluster: Cluster, cache: RunCache, queue: WorkQueue[RunKey]) -> int:
    """List everything, ask for a look at each run that still needs one, and forget the runs that are gone.

    Returns how many runs there are. Raises KubeError when they could not be listed: then nothing is forgotten.
    """
    known = set(cache.keys())
    cache.begin_sync()
    jobs: dict[str, list[ObservedJob]] = defaultdict(list)
    for job in await cluster.list_all_jobs(cache.own_job):
        if job is not None:
            jobs[job.run_uid].append(job)
    pods: dict[str, list[ObservedPod]] = defaultdict(list)
    for pod in await cluster.list_all_pods(cache.own_pod):
        if pod is not None:
            pods[pod.run_uid].append(pod)
    before = cache.known()
    seen = set(await cluster.list_runs(lambda body: cache.upsert_run(body, asked=before.get(RunKey.of(body)))))
    for key in known - seen:
        cache.remove_run(key)
        queue.forget(key)
    cache.finish_sync(jobs, pods)
    cache.usage.finish_sync()
    for key in seen:
        body = cache.run(key)
        if body is not None and not cache.is_archived(body["metadata"]["uid"]):
            queue.add(key, "resync")
    return len(seen)


async def resync_forever(
    cluster: Cluster,
    cache: RunCache,
    queue: WorkQueue[RunKey],
    *,
    seconds: float,
    health: Health,
    tried: asyncio.Event,
) -> None:
    """Resync at once and then every so many seconds, sooner after a failure. `tried` is set after the first time.

    But not while the server does not know the resource: kopf looks once, when it starts, which resources there are, and
    would never watch runs if the operator were installed before the CRD.
    """
    while True:
        health.beat("resync", within=3 * seconds + 60)
        try:
            await resync_once(cluster, cache, queue)
            pause = seconds
        except NotFound as error:
            logger.error("the CRD of IngestRun is not installed: waiting for it", error=str(error))
            pause = min(MISSING_CRD_SECONDS, seconds)
        except Exception as error:  # any: one object must not end the operator for all others
            logger.warning("resync failed", error=str(error), exc_info=not isinstance(error, KubeError))
            pause = min(10.0, seconds)
            tried.set()
        else:
            tried.set()
        await asyncio.sleep(pause)
