"""The start of a pod: which Events may explain why it does not come, and for how long it may wait."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Final

from ingestrun.model.size_budget import MESSAGE_CHARS
from ingestrun.model.spec import PodStart
from ingestrun.model.text import truncate
from ingestrun.planner.batch.attempt import Attempt, JobState, ObservedJob
from ingestrun.planner.batch.failure_policy import Failure, FailureAction, rule_of
from ingestrun.planner.batch.obstacle import (
    START_TIMEOUT,
    UNBOUND_CLAIM,
    Obstacle,
    PodWait,
    StartEvent,
    claim_obstacle,
    creation_obstacle,
    last_event,
    pod_event_obstacle,
)
from ingestrun.planner.batch.pipeline import Step

POD_EXPLAINED_AFTER: Final = timedelta(seconds=20)
"""Time for which a step of a pod's start may take before Events are read: volumes and sandbox mostly take less."""
UNEXPLAINED_AFTER: Final = timedelta(seconds=120)
"""Time after which a start that nothing explains is told: a large image is pulled in silence."""
START_RECHECK: Final = timedelta(seconds=15)
"""Interval at which the Events about a start are read again, because they are not watched."""
_AFTER_DEADLINE: Final = timedelta(seconds=60)
"""Time that the kubelet is left to end a pod at its stage's deadline, before its start is given up here."""

_GRACES: Final = {
    "ImagePull": "image_pull_seconds",
    "ContainerConfig": "configuration_seconds",
    "VolumeMissing": "configuration_seconds",
    "PodRefused": "refused_seconds",
    "VolumeUnavailable": "infrastructure_seconds",
    "PodSandbox": "infrastructure_seconds",
    START_TIMEOUT: "infrastructure_seconds",
}
"""The field of `spec.podStart` that bounds each kind of obstacle; a kind that holds the run has none."""

JOB_NOT_STARTED: Final = "JobNotStarted"
"""The kind of an obstacle that all Jobs of the cluster have: nobody takes them up."""
_TOLD_ONCE: Final = frozenset({"VolumeUnavailable", "PodSandbox"})
"""Kinds of which an Event may be told once and expire, so they stay until the sandbox is up."""


class EventSubject(StrEnum):
    """Kind of the objects that Events are about."""

    JOB = "Job"
    POD = "Pod"
    CLAIM = "PersistentVolumeClaim"


def holds(obstacle: Obstacle) -> bool:
    """Tell whether the obstacle is waited for without a limit of its own, and nothing new is started meanwhile."""
    return rule_of(obstacle.kind).action is FailureAction.HOLD


def subject_of(attempt: Attempt) -> EventSubject | None:
    """Return what the Events are about that may explain why the attempt does not start; None if none is needed."""
    pod = attempt.pod
    if attempt.state is not JobState.WAITING or attempt.queued or attempt.job.deleting:
        return None
    if pod is None:
        return EventSubject.JOB if attempt.lacks_pod_at is not None else None
    if pod.wait is None or pod.deleting_until is not None:
        return None
    if pod.obstacle is not None:
        unbound = pod.obstacle.kind == "VolumeUnavailable" and UNBOUND_CLAIM in pod.obstacle.message
        return EventSubject.CLAIM if unbound else None
    return EventSubject.POD if pod.wait.placed and not pod.wait.sandbox_up else None


def explained_at(attempt: Attempt) -> datetime | None:
    """Return from when on Events about the attempt are read; None if none is needed."""
    subject = subject_of(attempt)
    if subject is None:
        return None
    if subject is EventSubject.JOB:
        return attempt.lacks_pod_at
    return attempt.pod.wait.since + POD_EXPLAINED_AFTER if attempt.pod is not None and attempt.pod.wait else None


def explanation_of(
    attempt: Attempt, events: Sequence[StartEvent], *, now: datetime, before: Obstacle | None = None
) -> Obstacle | None:
    """Return the obstacle that the status of a pod does not name; None if there is none, or none is known yet.

    `events` are those about `subject_of(attempt)`, of whatever object, and `before` is the obstacle known so far. A
    start that takes long is told even if nothing explains it, because Events are dropped and expire.
    """
    pod, subject = attempt.pod, subject_of(attempt)
    if pod is None:
        return _creation_explanation(attempt.job, events, now=now) if attempt.wants_pod else None
    if pod.wait is None or attempt.state is not JobState.WAITING or pod.deleting_until is not None:
        return None
    if pod.obstacle is not None:
        return claim_obstacle(events, pod.wait, pod.obstacle) if subject is EventSubject.CLAIM else None
    about = [event for event in events if event.uid == pod.uid]
    found = None
    if subject is EventSubject.POD:
        found = pod_event_obstacle(about, since=pod.wait.since, now=now) or _still_there(before, pod.wait)
    return found or _unexplained(pod.wait.since, _silent_step(pod.wait, pod.node), now=now, last=last_event(about))


def _creation_explanation(job: ObservedJob, events: Sequence[StartEvent], *, now: datetime) -> Obstacle | None:
    """Return why a Job has no pod: it is refused, or the Job controller does not work."""
    if job.started_at is None:
        silent = _unexplained(job.created, "the Job controller has not begun with the Job", now=now)
        return replace(silent, kind=JOB_NOT_STARTED) if silent is not None else None
    about = [event for event in events if event.uid == job.uid]
    return creation_obstacle(about, since=job.started_at) or _unexplained(
        job.started_at, "the Job controller has made no pod", now=now
    )


def _still_there(before: Obstacle | None, wait: PodWait) -> Obstacle | None:
    """Return an obstacle that an Event has told before, and perhaps tells once only.

    An older one is that of a pod before, which a suspension has ended.
    """
    told_once = before is not None and before.kind in _TOLD_ONCE and before.since >= wait.since
    return before if told_once else None


def gives_up_at(attempt: Attempt, *, step: Step, graces: PodStart) -> datetime | None:
    """Return when the attempt has waited for too long for its pod to start; None if that is not so limited.

    The grace of what is wrong with the cluster is the stage's deadline unless it is set: the kubelet keeps that
    deadline, and the stage is tried again. Only a pod that no kubelet has is given up here instead.
    """
    obstacle = attempt.obstacle
    if obstacle is None or holds(obstacle):
        return None
    seconds: int | None = getattr(graces, _GRACES[obstacle.kind])
    if seconds is None:
        return obstacle.since + timedelta(seconds=step.deadline_seconds) + _AFTER_DEADLINE
    return obstacle.since + timedelta(seconds=seconds)


def start_timed_out(attempt: Attempt, *, step: Step, graces: PodStart, now: datetime) -> Failure | None:
    """Return the failure of a Job whose pod did not start in time; None while the pod may still start."""
    obstacle, until = attempt.obstacle, gives_up_at(attempt, step=step, graces=graces)
    if obstacle is None or until is None or now < until:
        return None
    waited = int((until - obstacle.since).total_seconds())
    return Failure(
        reason=obstacle.kind,
        message=f"the pod has not started for {waited} s: {obstacle.message}",
    )


def next_look_at_start(attempt: Attempt, *, now: datetime) -> datetime | None:
    """Return when a start has to be looked at although no event may come; None if an event will tell."""
    at = explained_at(attempt)
    if at is not None:
        return max(at, now + START_RECHECK) if now >= at else at
    pod = attempt.pod
    since = attempt.job.created if attempt.wants_pod else None
    if attempt.state is JobState.WAITING and pod is not None and pod.wait is not None and pod.obstacle is None:
        since = pod.wait.since
    told = since + UNEXPLAINED_AFTER if since is not None else None
    return told if told is not None and told > now else None


def _unexplained(since: datetime | None, what: str, *, now: datetime, last: str = "") -> Obstacle | None:
    if since is None or now < since + UNEXPLAINED_AFTER:
        return None
    told = f"; its latest Event is {last}" if last else ""
    message = f"{what} for more than {int(UNEXPLAINED_AFTER.total_seconds())} s, and nothing tells why{told}"
    return Obstacle(kind=START_TIMEOUT, message=truncate(message, MESSAGE_CHARS), since=since)


def _silent_step(wait: PodWait, node: str | None) -> str:
    """Describe the step of a pod's start that has come to a halt."""
    if not wait.placed:
        return "the scheduler has not looked at the pod"
    if wait.sandbox_up:
        return f"node {node or '?'} has not started the pod's container, whose image it may be pulling,"
    return f"node {node or '?'} has not set up the pod's volumes and sandbox"
