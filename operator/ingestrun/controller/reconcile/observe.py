"""Why a Job has no pod: the Job controller says so in an Event, and nowhere else.

Asked only for Jobs that should have a pod and have none, and of a namespace at most once in a while for all of them:
the normal course costs no call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any, Final

import structlog

from ingestrun.controller.state.usage import Usage
from ingestrun.kube.errors import KubeError
from ingestrun.kube.protocol import Cluster, Object, RunKey
from ingestrun.model.run import IngestRun
from ingestrun.planner.batch.attempt import NO_POD_RECHECK, Attempt, pod_creation_obstacle

logger = structlog.get_logger("ingestrun")

COMES_FIRST: Final = timedelta(minutes=10)
"""How long a run whose pod a quota refuses comes before those with more Jobs; its pod may be one that never fits."""


@dataclass(frozen=True, slots=True)
class _FailedCreates:
    at: datetime
    said: dict[str, str]
    """By the Job's UID: the newest sentence of the Job controller."""


class PodCreationFailures:
    """Looks for the reason, and remembers the last look at each namespace that has such Jobs."""

    def __init__(self, cluster: Cluster, usage: Usage) -> None:
        """`usage` is told which runs wait for a pod that a quota refuses."""
        self._cluster = cluster
        self._usage = usage
        self._looks: dict[str, _FailedCreates] = {}

    async def explained(self, key: RunKey, run: IngestRun, jobs: Sequence[Attempt], *, now: datetime) -> list[Attempt]:
        """The same Jobs; those that lack their pod with the reason, where the Job controller has given one."""
        lacking = {job.job.uid for job in jobs if job.lacks_pod(now)}
        if not lacking:
            self._usage.set_pods_refused(run.metadata.uid, key.namespace, refused=False)
            return list(jobs)
        told = await self.reasons(key.namespace, jobs, now=now)
        refused = any(
            job.pod_creation is not None
            and job.pod_creation.kind == "QuotaExceeded"
            and now < job.pod_creation.since + COMES_FIRST
            for job in told
        )
        self._usage.set_pods_refused(run.metadata.uid, key.namespace, refused=refused)
        return told

    async def reasons(self, namespace: str, jobs: Sequence[Attempt], *, now: datetime) -> list[Attempt]:
        """As `explained`, of Jobs whose waiting for room holds nobody else back."""
        lacking = {job.job.uid for job in jobs if job.lacks_pod(now)}
        said = await self._said(namespace, now=now) if lacking else {}
        return [
            replace(job, pod_creation=pod_creation_obstacle(job, said.get(job.job.uid)))
            if job.job.uid in lacking
            else job
            for job in jobs
        ]

    async def _said(self, namespace: str, *, now: datetime) -> dict[str, str]:
        look = self._looks.get(namespace)
        if look is not None and now - look.at < NO_POD_RECHECK:
            return look.said
        for place in [place for place, last in self._looks.items() if now - last.at > 4 * NO_POD_RECHECK]:
            del self._looks[place]
        try:
            found = sorted(await self._cluster.list_failed_creates(namespace=namespace), key=_time)
        except KubeError as error:
            logger.warning("why a Job has no pod could not be asked", namespace=namespace, error=str(error))
            found = []
        said = {event["regarding"]["uid"]: str(event.get("note") or "") for event in found}
        self._looks[namespace] = _FailedCreates(now, said)
        return said


def _time(event: Object) -> str:
    """When an Event was last repeated; as text, it sorts: all are of the same form but for fractions of a second."""
    series: dict[str, Any] = event.get("series") or {}
    return str(series.get("lastObservedTime") or event.get("deprecatedLastTimestamp") or event.get("eventTime") or "")
