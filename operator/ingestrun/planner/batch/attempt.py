"""What the planner needs to know of Jobs and pods, read out of their JSON once, at the edge.

Facts are small: a run's store holds these, not the objects.
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

MESSAGE_CHARS: Final = 256
"""How much of a container's or the server's words is kept; the rest is in the pod's log."""
POD_EXPECTED_WITHIN: Final = timedelta(seconds=5)
"""A Job that has been started by the Job controller and has no pod after so long: its creation may be refused."""
NO_POD_RECHECK: Final = timedelta(seconds=15)
"""How often such a Job is looked at again."""
QUEUED_AFTER: Final = timedelta(seconds=5)
"""How long a Job may be suspended before its run is said to be queued: an admission that is quick is no news."""

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
    """How far a Job is, as seen from outside. `WAITING`: no container of it has started yet."""

    WAITING = "Waiting"
    RUNNING = "Running"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"

    @property
    def finished(self) -> bool:
        """Whether the Job has ended, and all its pods with it."""
        return self in (JobState.SUCCEEDED, JobState.FAILED)


@dataclass(frozen=True, slots=True, kw_only=True)
class ObservedJob:
    """A Job of ours, without its pod."""

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
    """What its container is to run, as the Job names it."""
    memory_limit: int | None = None
    """Of its container, in bytes, as its template has it."""
    created: datetime | None = None
    started_at: datetime | None = None
    """When the Job controller took it up, for the last time if it was suspended since."""
    suspended: bool = False
    """Queued: Kueue, or whoever else has suspended it, has not admitted it, or has taken the admission back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Obstacle:
    """Why a pod does not start, or is not even created.

    `kind` is ours: Unschedulable, ImagePull or ContainerConfig; QuotaExceeded or PodRefused where there is no pod.
    """

    kind: str
    message: str
    since: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class ObservedPod:
    """The one pod of a Job of ours."""

    name: str
    uid: str
    job_uid: str
    run_uid: str
    started: bool
    ended: bool
    exit_code: int | None
    reason: str | None
    """Why its container ended; where none was begun, why the pod did."""
    message: str | None
    """The termination message: the stage's result, or the last lines of its log."""
    obstacle: Obstacle | None
    pod_reason: str | None = None
    """The pod's own reason, beside its container's: Evicted, NodeAffinity and the like."""
    pod_message: str | None = None
    disruption: str | None = None
    """The reason of its condition DisruptionTarget: who ended it for a cause outside of it."""
    memory_limit: int | None = None
    """Of its container, in bytes; that of a LimitRange as well."""
    resource_version: str = ""
    deleting_until: datetime | None = None
    """When the grace of its deletion ends; None while nobody has deleted it."""
    node: str | None = None
    image_id: str | None = None
    """What its container really runs, as the kubelet names it; None before it has started."""
    created: datetime | None = None
    placed_at: datetime | None = None
    """When it got a node; None while it waits for one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """A Job and its pod as one value: what the planner judges."""

    job: ObservedJob
    state: JobState
    pod: ObservedPod | None
    pod_creation: Obstacle | None = None
    """Why the Job controller can't create its pod, where somebody has asked (`lacks_pod`)."""

    @property
    def queued(self) -> bool:
        """Whether it is suspended and nothing of it runs: it waits to be admitted."""
        return self.job.suspended and self.state is JobState.WAITING

    @property
    def obstacle(self) -> Obstacle | None:
        """Why its pod does not start or can't be created, if something keeps it."""
        if self.state is not JobState.WAITING:
            return None
        return self.pod.obstacle if self.pod is not None else self.pod_creation

    def lacks_pod(self, now: datetime) -> bool:
        """Whether it should have a pod by now and has none."""
        at = self.lacks_pod_at
        return at is not None and now >= at

    @property
    def lacks_pod_at(self) -> datetime | None:
        """When it should have a pod at the latest; None where it has one, or is not to have one."""
        job = self.job
        if self.pod is not None or self.state is not JobState.WAITING or job.suspended or job.deleting:
            return None
        return job.started_at + POD_EXPECTED_WITHIN if job.started_at is not None else None

    @property
    def key(self) -> tuple[int, int, int]:
        """Batch, step, attempt."""
        return (self.job.batch, self.job.step, self.job.attempt)


class MalformedJobError(ValueError):
    """A Job with our run label whose other labels are missing or no numbers: none that the operator made."""


def read_job(job: Mapping[str, Any]) -> ObservedJob:
    """Read a Job's JSON.

    Raises:
        MalformedJobError: its labels are not ours.
    """
    meta, status = job["metadata"], job.get("status") or {}
    labels = meta.get("labels") or {}
    try:
        batch, step, attempt = (int(labels[label]) for label in (LABEL_BATCH, LABEL_STEP, LABEL_ATTEMPT))
        run_uid = labels[LABEL_RUN_UID]
    except (KeyError, ValueError) as error:
        raise MalformedJobError(f"Job {meta.get('name')} has not the labels of a Job of ours: {error}") from None
    finished, ended = None, None
    for condition in status.get("conditions") or ():
        if condition.get("status") == "True" and condition.get("type") in ("Complete", "Failed"):
            finished = JobState.SUCCEEDED if condition["type"] == "Complete" else JobState.FAILED
            ended = condition
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
        finished_at=_time(ended.get("lastTransitionTime") or meta["creationTimestamp"]) if ended else None,
        reason=ended.get("reason") if ended else None,
        message=_short(ended.get("message")) if ended else None,
        image=_image(job),
        memory_limit=_memory_limit(((job.get("spec") or {}).get("template") or {}).get("spec") or {}),
        created=_time(meta["creationTimestamp"]) if "creationTimestamp" in meta else None,
        started_at=_time(status["startTime"]) if status.get("startTime") else None,
        suspended=bool((job.get("spec") or {}).get("suspend")),
    )


def read_pod(pod: Mapping[str, Any]) -> ObservedPod | None:
    """Read a pod's JSON; None where no Job controls it."""
    meta, spec, status = pod["metadata"], pod.get("spec") or {}, pod.get("status") or {}
    owner = next((ref for ref in meta.get("ownerReferences") or () if ref.get("kind") == "Job"), None)
    if owner is None:
        return None
    phase = status.get("phase", "Pending")
    container: Mapping[str, Any] = next(iter(status.get("containerStatuses") or ()), {})
    state = container.get("state") or {}
    terminated = state.get("terminated") or {}
    return ObservedPod(
        name=meta["name"],
        uid=meta["uid"],
        job_uid=owner["uid"],
        run_uid=(meta.get("labels") or {}).get(LABEL_RUN_UID, ""),
        started=bool(phase in ("Running", "Succeeded", "Failed") or container.get("started") or "running" in state),
        ended=phase in ("Succeeded", "Failed"),
        exit_code=terminated.get("exitCode"),
        reason=terminated.get("reason") or status.get("reason"),
        message=terminated.get("message"),
        obstacle=_obstacle(meta, spec, status, state) if phase == "Pending" else None,
        pod_reason=status.get("reason"),
        pod_message=_short(status.get("message")),
        disruption=_disruption(status),
        memory_limit=_memory_limit(spec),
        resource_version=meta.get("resourceVersion", ""),
        deleting_until=_time(meta["deletionTimestamp"]) if "deletionTimestamp" in meta else None,
        node=spec.get("nodeName"),
        image_id=sys.intern(container.get("imageID") or "") or None,
        created=_time(meta["creationTimestamp"]) if "creationTimestamp" in meta else None,
        placed_at=_placed_at(status),
    )


def attempt_of(job: ObservedJob, pods: Sequence[ObservedPod]) -> Attempt:
    """Put a Job and its pod together. With several pods (never made by us: backoffLimit is 0) the ended one counts.

    A pod that has ended with exit code 0 is the Job's success: the Job controller says so a second or two later,
    and the next stage need not wait for that. It holds even if the Job then meets its deadline, so that what was
    built on it is not judged anew; and if the kubelet ended the pod for its own: the result, or its lack, tells more.

    A pod that a suspension has ended is none of the Job's any more: Kueue preempts so, and the Job starts anew.
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


def pod_creation_obstacle(job: Attempt, said: str | None) -> Obstacle | None:
    """What the Job controller's sentence about a pod that it can't create means; None without one.

    A quota has room another time. All else (a LimitRange, the namespace's pod security, a webhook, a service account or
    priority class that does not exist) will be refused again, until somebody changes something.
    """
    since = job.job.started_at
    if not said or since is None:
        return None
    _, _, words = said.partition("is forbidden: ")
    kind = "QuotaExceeded" if "exceeded quota" in said else "PodRefused"
    message = words or said.removeprefix("Error creating: ")
    return Obstacle(kind=kind, message=f"its pod is refused: {_short(message)}", since=since)


def ended_by_suspension(job: ObservedJob, pod: ObservedPod) -> bool:
    """Whether the pod was ended because its Job was suspended, so that its end says nothing about the Job.

    The Job controller takes its finalizer off the pods that it deletes for a suspension, counts none of them, and sets
    the Job's start time anew when it is resumed.
    """
    if not pod.ended or pod.exit_code == 0 or job.finished is not None:
        return False
    before = job.started_at is not None and pod.created is not None and pod.created < job.started_at
    return job.suspended or before


def _placed_at(status: Mapping[str, Any]) -> datetime | None:
    """When the kubelet took the pod or, if it has not yet, when the scheduler gave it a node."""
    if "startTime" in status:
        return _time(status["startTime"])
    for condition in status.get("conditions") or ():
        if condition.get("type") == "PodScheduled" and condition.get("status") == "True":
            return _time(condition["lastTransitionTime"]) if condition.get("lastTransitionTime") else None
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
            since = _time(condition.get("lastTransitionTime") or meta["creationTimestamp"])
            return Obstacle(kind="Unschedulable", message=_short(condition.get("message")) or "", since=since)
    waiting = state.get("waiting") or {}
    since = _time(status.get("startTime") or meta["creationTimestamp"])
    if waiting.get("reason") in _IMAGE_REASONS:
        # The kubelet's own words alternate between ErrImagePull and its back-off; one steady sentence instead.
        image = next((c.get("image") for c in spec.get("containers") or ()), "?")
        return Obstacle(kind="ImagePull", message=f"image {image!r} cannot be pulled", since=since)
    if waiting.get("reason") in _CONFIG_REASONS:
        return Obstacle(kind="ContainerConfig", message=_short(waiting.get("message")) or "", since=since)
    return None


def _image(job: Mapping[str, Any]) -> str | None:
    containers = job.get("spec", {}).get("template", {}).get("spec", {}).get("containers") or ()
    image = next((container.get("image") for container in containers), None)
    return sys.intern(image) if image else None


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text.replace("Z", "+00:00"))


def _short(text: str | None) -> str | None:
    if text is None or len(text) <= MESSAGE_CHARS:
        return text
    return text[: MESSAGE_CHARS - 1] + "…"
