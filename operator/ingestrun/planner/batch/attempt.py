"""An attempt of a stage, as observed: the few fields of its Job and its pod that the planner needs.

They are read out of the JSON once, where it arrives. The cache holds them, and not the objects, because they are small.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, Final

from ingestrun.model.names import LABEL_ATTEMPT, LABEL_BATCH, LABEL_RUN_UID, LABEL_STEP
from ingestrun.model.quantity import QuantityError, read_bytes
from ingestrun.model.size_budget import MESSAGE_CHARS
from ingestrun.model.text import truncate
from ingestrun.model.times import parse_time

POD_EXPECTED_WITHIN: Final = timedelta(seconds=5)
"""Time after its start within which a Job has a pod. Without one by then, the pod's creation may be refused."""
NO_POD_RECHECK: Final = timedelta(seconds=15)
"""Interval at which a Job without a pod is checked again."""
STUCK_AFTER: Final = timedelta(seconds=60)
"""Time after the end of its grace period at which a pod that still exists is reported as stuck."""
QUEUED_AFTER: Final = timedelta(seconds=5)
"""Time for which a Job is suspended before its run is reported as queued: a quick admission deserves no status."""

_IMAGE_REASONS: Final = frozenset(
    {
        "ErrImagePull",
        "ImagePullBackOff",
        "ErrImageNeverPull",
        "InvalidImageName",
        "ImageInspectError",
        "RegistryUnavailable",
    }
)
_CONFIG_REASONS: Final = frozenset({"CreateContainerConfigError", "CreateContainerError", "RunContainerError"})


class JobState(StrEnum):
    """State of a Job. `WAITING`: no container of the Job has started yet."""

    WAITING = "Waiting"
    RUNNING = "Running"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"

    @property
    def finished(self) -> bool:
        """Tell whether the Job has ended, and all its pods with it."""
        return self in (JobState.SUCCEEDED, JobState.FAILED)


@dataclass(frozen=True, slots=True, kw_only=True)
class ObservedJob:
    """A Job of the run, without its pod."""

    namespace: str
    name: str
    uid: str
    resource_version: str
    run_uid: str
    batch: int
    step: int
    attempt: int
    deleting: bool
    finished: JobState | None
    """SUCCEEDED or FAILED once the Job's own condition says so."""
    finished_at: datetime | None
    reason: str | None
    message: str | None
    image: str | None = None
    """The image of its container, as the Job names it."""
    memory_limit: int | None = None
    """Memory limit of its container, in bytes, from the Job's template."""
    created: datetime | None = None
    started_at: datetime | None = None
    """Time at which the Job controller started it; if it was suspended since, the time of the latest start."""
    suspended: bool = False
    """True if Kueue or a user has suspended the Job, because it is not admitted or its admission was taken back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Obstacle:
    """Obstacle that keeps a pod from starting or from being created.

    `kind` is one of Unschedulable, ImagePull and ContainerConfig; without a pod, of QuotaExceeded and PodRefused.
    """

    kind: str
    message: str
    since: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class ObservedPod:
    """The one pod of a Job of the run."""

    name: str
    uid: str
    job_uid: str
    run_uid: str
    started: bool
    ended: bool
    exit_code: int | None
    reason: str | None
    """Reason for which its container ended or, if no container was started, for which the pod ended."""
    message: str | None
    """The termination message: the stage's result, or the last lines of its log."""
    obstacle: Obstacle | None
    pod_reason: str | None = None
    """The reason in the pod's own status: Evicted, NodeAffinity and the like."""
    pod_message: str | None = None
    disruption: str | None = None
    """The reason of its condition DisruptionTarget, which marks a pod that was ended for a cause outside of the pod."""
    memory_limit: int | None = None
    """Memory limit of its container, in bytes; a LimitRange may have set it."""
    resource_version: str = ""
    deleting_until: datetime | None = None
    """End of the grace period of its deletion; None while it is not being deleted."""
    node: str | None = None
    image_id: str | None = None
    """The image that its container runs, as the kubelet names it; None before it has started."""
    created: datetime | None = None
    placed_at: datetime | None = None
    """Time at which the pod got a node; None while it waits for a node."""

    @property
    def stuck_at(self) -> datetime | None:
        """Return when it counts as stuck, unless it has ended by then; None while it is not being deleted."""
        if self.ended or self.deleting_until is None:
            return None
        return self.deleting_until + STUCK_AFTER

    def is_stuck(self, now: datetime) -> bool:
        """Tell whether it should have ended and has not, because nobody on its node can end it."""
        return self.stuck_at is not None and now >= self.stuck_at


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One attempt of a stage of a batch: its Job and its pod as one value."""

    job: ObservedJob
    state: JobState
    pod: ObservedPod | None
    pod_creation: Obstacle | None = None
    """Obstacle to the creation of its pod; looked up only for a Job that lacks a pod (`lacks_pod`)."""

    @property
    def batch(self) -> int:
        """Return the index of its batch."""
        return self.job.batch

    @property
    def step(self) -> int:
        """Return the place of its stage in the pipeline, from 0."""
        return self.job.step

    @property
    def number(self) -> int:
        """Return its number among the attempts of the stage, from 0."""
        return self.job.attempt

    @property
    def queued(self) -> bool:
        """Tell whether it is suspended and nothing of it runs, so that it waits to be admitted."""
        return self.job.suspended and self.state is JobState.WAITING

    @property
    def obstacle(self) -> Obstacle | None:
        """Return why its pod does not start or cannot be created; None if nothing prevents it."""
        if self.state is not JobState.WAITING:
            return None
        return self.pod.obstacle if self.pod is not None else self.pod_creation

    def lacks_pod(self, now: datetime) -> bool:
        """Tell whether it should have a pod by now and has none."""
        at = self.lacks_pod_at
        return at is not None and now >= at

    @property
    def lacks_pod_at(self) -> datetime | None:
        """Return when it should have a pod at the latest; None if it has one, or is not to have one."""
        job = self.job
        if self.pod is not None or self.state is not JobState.WAITING or job.suspended or job.deleting:
            return None
        return job.started_at + POD_EXPECTED_WITHIN if job.started_at is not None else None

    @property
    def order(self) -> tuple[int, int, int]:
        """Return the sort key of attempts: batch, stage, number."""
        return (self.batch, self.step, self.number)


def stuck_message(stuck: Sequence[ObservedPod]) -> str:
    """Return what people can do about stuck pods."""
    first = stuck[0]
    more = f" and {len(stuck) - 1} more" if len(stuck) > 1 else ""
    return (
        f"pod {first.name} on node {first.node or '?'}{more} should have ended and has not: look at the node; "
        "if it is gone for good, delete the pod with --grace-period=0 --force"
    )


class MalformedJobError(ValueError):
    """A Job with the run label whose other labels are missing or not numbers: the operator did not create it."""


def read_job(job: Mapping[str, Any]) -> ObservedJob:
    """Read a Job's JSON.

    Raises:
        MalformedJobError: its labels are not those of the operator's Jobs.
    """
    meta, status = job["metadata"], job.get("status") or {}
    labels = meta.get("labels") or {}
    try:
        batch, step, attempt = (int(labels[label]) for label in (LABEL_BATCH, LABEL_STEP, LABEL_ATTEMPT))
        run_uid = labels[LABEL_RUN_UID]
    except (KeyError, ValueError) as error:
        raise MalformedJobError(f"Job {meta.get('name')} lacks the labels of an operator's Job: {error}") from None
    spec = job.get("spec") or {}
    finished, ended = _finished(status)
    ended_at = ended.get("lastTransitionTime") or meta["creationTimestamp"] if finished is not None else None
    return ObservedJob(
        namespace=meta["namespace"],
        name=meta["name"],
        uid=meta["uid"],
        resource_version=meta.get("resourceVersion", ""),
        run_uid=run_uid,
        batch=batch,
        step=step,
        attempt=attempt,
        deleting="deletionTimestamp" in meta,
        finished=finished,
        finished_at=_optional_time(ended_at),
        reason=ended.get("reason"),
        message=_short(ended.get("message")),
        image=_image(job),
        memory_limit=_memory_limit((spec.get("template") or {}).get("spec") or {}),
        created=_optional_time(meta.get("creationTimestamp")),
        started_at=_optional_time(status.get("startTime")),
        # A Job with a parallelism of 0 is paused as a suspended one is: it has no pod, and does not end.
        suspended=bool(spec.get("suspend")) or spec.get("parallelism") == 0,
    )


def _finished(status: Mapping[str, Any]) -> tuple[JobState | None, Mapping[str, Any]]:
    """Return how a Job has ended, and the condition that says so; None and nothing while it has not."""
    for condition in status.get("conditions") or ():
        if condition.get("status") == "True" and condition.get("type") in ("Complete", "Failed"):
            return JobState.SUCCEEDED if condition["type"] == "Complete" else JobState.FAILED, condition
    return None, {}


def read_pod(pod: Mapping[str, Any]) -> ObservedPod | None:
    """Read a pod's JSON; return None if no Job controls it."""
    meta, spec, status = pod["metadata"], pod.get("spec") or {}, pod.get("status") or {}
    owner = next((ref for ref in meta.get("ownerReferences") or () if ref.get("kind") == "Job"), None)
    if owner is None:
        return None
    labels, phase = meta.get("labels") or {}, status.get("phase", "Pending")
    container: Mapping[str, Any] = next(iter(status.get("containerStatuses") or ()), {})
    state = container.get("state") or {}
    terminated = state.get("terminated") or {}
    ended = phase in ("Succeeded", "Failed")
    return ObservedPod(
        name=meta["name"],
        uid=meta["uid"],
        job_uid=owner["uid"],
        run_uid=labels.get(LABEL_RUN_UID, ""),
        started=ended or phase == "Running" or _has_started(container),
        ended=ended,
        exit_code=terminated.get("exitCode"),
        reason=terminated.get("reason") or status.get("reason"),
        message=terminated.get("message"),
        obstacle=_obstacle(meta, spec, status, state) if phase == "Pending" else None,
        pod_reason=status.get("reason"),
        pod_message=_short(status.get("message")),
        disruption=_disruption(status),
        memory_limit=_memory_limit(spec),
        resource_version=meta.get("resourceVersion", ""),
        deleting_until=_optional_time(meta.get("deletionTimestamp")),
        node=spec.get("nodeName"),
        image_id=sys.intern(container.get("imageID") or "") or None,
        created=_optional_time(meta.get("creationTimestamp")),
        placed_at=_placed_at(status),
    )


def attempt_of(job: ObservedJob, pods: Sequence[ObservedPod]) -> Attempt:
    """Put a Job and its pod together. Of several pods (backoffLimit is 0, so there are none) the ended one counts.

    A pod that has ended with exit code 0 is the Job's success: the Job controller reports it a second or two later, and
    the next stage need not wait for that. This holds even if the Job then exceeds its deadline, so that the verdict on
    an attempt that later stages built on never changes.

    A pod that was ended by a suspension (Kueue's way to preempt) no longer belongs to the Job, which starts anew.
    """
    pods = [pod for pod in pods if not ended_by_suspension(job, pod)]
    pod = max(pods, key=lambda pod: (pod.ended, pod.started), default=None)
    if pod is not None and pod.ended and pod.exit_code == 0:
        state = JobState.SUCCEEDED
    elif job.finished is not None:
        state = job.finished
    elif pod is not None and pod.started:
        state = JobState.RUNNING
    else:
        state = JobState.WAITING
    return Attempt(job=job, state=state, pod=pod)


def pod_creation_obstacle(attempt: Attempt, event_note: str | None) -> Obstacle | None:
    """Read the Job controller's Event about a pod that it cannot create; return None without one.

    A quota may have room later. Every other refusal (by a LimitRange, the namespace's pod security, a webhook, or for a
    service account or priority class that does not exist) is repeated until the cluster or the run is changed.
    """
    since = attempt.job.started_at
    if not event_note or since is None:
        return None
    _, _, reason = event_note.partition("is forbidden: ")
    kind = "QuotaExceeded" if "exceeded quota" in event_note else "PodRefused"
    message = reason or event_note.removeprefix("Error creating: ")
    return Obstacle(kind=kind, message=f"its pod is refused: {_short(message)}", since=since)


def ended_by_suspension(job: ObservedJob, pod: ObservedPod) -> bool:
    """Tell whether the pod was ended because its Job was suspended, so that its end is not the end of the Job.

    The Job controller takes its finalizer off the pods that it deletes for a suspension, counts none of them, and sets
    the Job's start time anew when it is resumed.
    """
    if not pod.ended or pod.exit_code == 0 or job.finished is not None:
        return False
    before = job.started_at is not None and pod.created is not None and pod.created < job.started_at
    return job.suspended or before


def _placed_at(status: Mapping[str, Any]) -> datetime | None:
    """Read when the kubelet accepted the pod or, if it has not yet, when the scheduler gave it a node."""
    if "startTime" in status:
        return parse_time(status["startTime"])
    for condition in status.get("conditions") or ():
        if condition.get("type") == "PodScheduled" and condition.get("status") == "True":
            return parse_time(condition["lastTransitionTime"]) if condition.get("lastTransitionTime") else None
    return None


def _disruption(status: Mapping[str, Any]) -> str | None:
    return next(
        (
            condition.get("reason") or "Unknown"
            for condition in status.get("conditions") or ()
            if condition.get("type") == "DisruptionTarget" and condition.get("status") == "True"
        ),
        None,
    )


def _memory_limit(pod_spec: Mapping[str, Any]) -> int | None:
    container: Mapping[str, Any] = next(iter(pod_spec.get("containers") or ()), {})
    quantity = ((container.get("resources") or {}).get("limits") or {}).get("memory")
    try:
        return read_bytes(quantity) if quantity is not None else None
    except QuantityError:
        return None


def _obstacle(
    meta: Mapping[str, Any], spec: Mapping[str, Any], status: Mapping[str, Any], state: Mapping[str, Any]
) -> Obstacle | None:
    for condition in status.get("conditions") or ():
        if condition.get("type") == "PodScheduled" and condition.get("reason") == "Unschedulable":
            since = parse_time(condition.get("lastTransitionTime") or meta["creationTimestamp"])
            return Obstacle(kind="Unschedulable", message=_short(condition.get("message")) or "", since=since)
    waiting = state.get("waiting") or {}
    since = parse_time(status.get("startTime") or meta["creationTimestamp"])
    if waiting.get("reason") in _IMAGE_REASONS:
        # The kubelet's message alternates between ErrImagePull and its back-off, and each change would be a write.
        image = next((c.get("image") for c in spec.get("containers") or ()), "?")
        return Obstacle(kind="ImagePull", message=f"image {image!r} cannot be pulled", since=since)
    if waiting.get("reason") in _CONFIG_REASONS:
        return Obstacle(kind="ContainerConfig", message=_short(waiting.get("message")) or "", since=since)
    return None


def _image(job: Mapping[str, Any]) -> str | None:
    containers = job.get("spec", {}).get("template", {}).get("spec", {}).get("containers") or ()
    image = next((container.get("image") for container in containers), None)
    return sys.intern(image) if image else None


def _has_started(container: Mapping[str, Any]) -> bool:
    return bool(container.get("started")) or "running" in (container.get("state") or {})


def _optional_time(text: str | None) -> datetime | None:
    return parse_time(text) if text else None


def _short(text: str | None) -> str | None:
    return truncate(text, MESSAGE_CHARS) if text is not None else None
