"""The Events about starts that come to a halt: listed from the API server, and only when no status tells why.

A run whose pods start costs no call. Otherwise one list in START_RECHECK serves all runs of a namespace, for each kind
of object that Events are about.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Final

import structlog

from ingestrun.controller.state.memory import RunMemory
from ingestrun.controller.state.usage import Usage
from ingestrun.kube.errors import KubeError
from ingestrun.kube.protocol import Cluster, RunKey
from ingestrun.planner.batch.attempt import Attempt, JobState
from ingestrun.planner.batch.obstacle import StartEvent, read_start_event
from ingestrun.planner.batch.pod_start import START_RECHECK, EventSubject, explained_at, explanation_of, subject_of

logger = structlog.get_logger("ingestrun")

FRESH_QUOTA_REFUSAL: Final = timedelta(minutes=10)
"""Time for which a run whose pod a quota refuses has precedence over those with more Jobs; the pod may never fit."""


@dataclass(frozen=True, slots=True)
class _Listed:
    at: datetime
    by_uid: Mapping[str, Sequence[StartEvent]]
    """The Events by the UID of the object that they are about."""

    def about(self, subject: EventSubject, attempt: Attempt) -> Sequence[StartEvent]:
        """Return the Events about an attempt's Job or pod; those about all claims, of which it knows the names."""
        if subject is EventSubject.CLAIM:
            return [event for events in self.by_uid.values() for event in events]
        uid = attempt.pod.uid if attempt.pod is not None else attempt.job.uid
        return self.by_uid.get(uid, ())


class StartEvents:
    """The reader of what Events tell about Jobs without a pod, pods that do not start, and claims without a volume."""

    def __init__(self, cluster: Cluster, usage: Usage) -> None:
        """Use `usage` to remember the runs that wait for a pod that a quota refuses."""
        self._cluster = cluster
        self._usage = usage
        self._listed: dict[tuple[str, EventSubject], _Listed] = {}

    async def explain_and_count(
        self, key: RunKey, uid: str, memory: RunMemory, attempts: Sequence[Attempt], *, now: datetime
    ) -> list[Attempt]:
        """Do as `explain`, and give a run whose pod a quota refuses precedence over those with more Jobs."""
        explained = await self.explain(key.namespace, memory, attempts, now=now)
        refused = any(
            attempt.pod is None
            and attempt.obstacle is not None
            and attempt.obstacle.kind == "QuotaExceeded"
            and now < attempt.obstacle.since + FRESH_QUOTA_REFUSAL
            for attempt in explained
        )
        self._usage.set_pods_refused(uid, key.namespace, refused=refused)
        counted = [each for each in explained if each.obstacle is not None and each.obstacle.ended_counted]
        self._usage.set_pods_counted(uid, key.namespace, refused=len(counted), now=now)
        return explained

    async def explain(
        self, namespace: str, memory: RunMemory, attempts: Sequence[Attempt], *, now: datetime
    ) -> list[Attempt]:
        """Return the attempts, those that do not start with the reason, and those that never did with the last one."""
        explained = []
        for attempt in attempts:
            if attempt.state is JobState.WAITING:
                events = await self._events(namespace, attempt, now=now)
                known = memory.obstacles.get(attempt.job.uid)
                obstacle = explanation_of(attempt, events, now=now, before=known)
                explained.append(replace(attempt, explanation=obstacle) if obstacle is not None else attempt)
            elif attempt.job.uid in memory.obstacles:
                explained.append(replace(attempt, last_obstacle=memory.obstacles[attempt.job.uid]))
            else:
                explained.append(attempt)
        memory.keep_obstacles(explained)
        return explained

    async def _events(self, namespace: str, attempt: Attempt, *, now: datetime) -> Sequence[StartEvent]:
        """Return the Events about what the attempt waits for; none before its start takes long."""
        subject, since = subject_of(attempt), explained_at(attempt)
        if subject is None or since is None or now < since:
            return ()
        known = self._listed.get((namespace, subject))
        if known is None or now - known.at >= START_RECHECK:
            self._forget_old(now)
            known = self._listed[namespace, subject] = await self._list(namespace, subject, known, now=now)
        return known.about(subject, attempt)

    async def _list(self, namespace: str, subject: EventSubject, before: _Listed | None, *, now: datetime) -> _Listed:
        """List the Events of a namespace; where that fails, those that were listed before stand for them."""
        try:
            found = await self._cluster.list_start_events(read_start_event, namespace=namespace, about=subject.value)
        except KubeError as error:
            logger.warning("the Events about a start could not be listed", about=subject.value, error=str(error))
            return _Listed(now, before.by_uid if before is not None else {})
        by_uid: dict[str, list[StartEvent]] = {}
        for event in found:
            by_uid.setdefault(event.uid, []).append(event)
        return _Listed(now, by_uid)

    def _forget_old(self, now: datetime) -> None:
        for key in [key for key, listed in self._listed.items() if now - listed.at > 4 * START_RECHECK]:
            del self._listed[key]
