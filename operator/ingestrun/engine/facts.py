"""What the planner needs to know of Jobs and pods, read out of their JSON once, at the edge.

Facts are small: a run's store holds these, not the objects.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any, Final

from ingestrun.model.names import LABEL_ATTEMPT, LABEL_BATCH, LABEL_RUN_UID, LABEL_STEP

MESSAGE_CHARS: Final = 256
"""How much of a container's or the server's words is kept; the rest is in the pod's log."""

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
class JobFacts:
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Obstacle:
    """Why a pod does not start. `kind` is ours: Unschedulable, ImagePull or ContainerConfig."""

    kind: str
    message: str
    since: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class PodFacts:
    """The one pod of a Job of ours."""

    name: str
    uid: str
    job_uid: str
    run_uid: str
    started: bool
    ended: bool
    exit_code: int | None
    reason: str | None
    message: str | None
    """The termination message: the stage's result, or the last lines of its log."""
    obstacle: Obstacle | None
    resource_version: str = ""
    deleting_until: datetime | None = None
    """When the grace of its deletion ends; None while nobody has deleted it."""
    node: str | None = None
    placed_at: datetime | None = None
    """When it got a node; None while it waits for one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobView:
    """A Job and its pod as one value: what the planner judges."""

    job: JobFacts
    state: JobState
    pod: PodFacts | None

    @property
    def key(self) -> tuple[int, int, int]:
        """Batch, step, attempt."""
        return (self.job.batch, self.job.step, self.job.attempt)


class MalformedJobError(ValueError):
    """A Job with our run label whose other labels are missing or no numbers: none that the operator made."""


def read_job(job: Mapping[str, Any]) -> JobFacts:
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
    return JobFacts(
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
    )


def read_pod(pod: Mapping[str, Any]) -> PodFacts | None:
    """Read a pod's JSON; None where no Job controls it."""
    meta, spec, status = pod["metadata"], pod.get("spec") or {}, pod.get("status") or {}
    owner = next((ref for ref in meta.get("ownerReferences") or () if ref.get("kind") == "Job"), None)
    if owner is None:
        return None
    phase = status.get("phase", "Pending")
    container: Mapping[str, Any] = next(iter(status.get("containerStatuses") or ()), {})
    state = container.get("state") or {}
    terminated = state.get("terminated") or {}
    return PodFacts(
        name=meta["name"],
        uid=meta["uid"],
        job_uid=owner["uid"],
        run_uid=(meta.get("labels") or {}).get(LABEL_RUN_UID, ""),
        started=bool(phase in ("Running", "Succeeded", "Failed") or container.get("started") or "running" in state),
        ended=phase in ("Succeeded", "Failed"),
        exit_code=terminated.get("exitCode"),
        reason=_pod_reason(status, terminated),
        message=terminated.get("message") or _short(status.get("message")),
        obstacle=_obstacle(meta, spec, status, state) if phase == "Pending" else None,
        resource_version=meta.get("resourceVersion", ""),
        deleting_until=_time(meta["deletionTimestamp"]) if "deletionTimestamp" in meta else None,
        node=spec.get("nodeName"),
        placed_at=_placed_at(status),
    )


def view(job: JobFacts, pods: Sequence[PodFacts]) -> JobView:
    """Put a Job and its pod together. With several pods (never made by us: backoffLimit is 0) the ended one counts.

    A pod that has ended with exit code 0 is the Job's success: the Job controller says so a second or two later,
    and the next stage need not wait for that. It holds even if the Job then meets its deadline, so that what was
    built on it is not judged anew.
    """
    pod = max(pods, key=lambda pod: (pod.ended, pod.started), default=None)
    if pod is not None and pod.ended and pod.exit_code == 0:
        state = JobState.SUCCEEDED
    elif job.finished is not None:
        state = job.finished
    elif pod is not None and pod.started:
        state = JobState.RUNNING
    else:
        state = JobState.WAITING
    return JobView(job=job, state=state, pod=pod)


def _placed_at(status: Mapping[str, Any]) -> datetime | None:
    """When the kubelet took the pod or, if it has not yet, when the scheduler gave it a node."""
    if "startTime" in status:
        return _time(status["startTime"])
    for condition in status.get("conditions") or ():
        if condition.get("type") == "PodScheduled" and condition.get("status") == "True":
            return _time(condition["lastTransitionTime"]) if condition.get("lastTransitionTime") else None
    return None


def _pod_reason(status: Mapping[str, Any], terminated: Mapping[str, Any]) -> str | None:
    disrupted = next(
        (
            c.get("reason")
            for c in status.get("conditions") or ()
            if c.get("type") == "DisruptionTarget" and c.get("status") == "True"
        ),
        None,
    )
    return disrupted or terminated.get("reason") or status.get("reason")


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


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text.replace("Z", "+00:00"))


def _short(text: str | None) -> str | None:
    if text is None or len(text) <= MESSAGE_CHARS:
        return text
    return text[: MESSAGE_CHARS - 1] + "…"
