"""An attempt of a stage, as observed: the few fields of its Job and its pod that the planner needs.

They are read out of the JSON once, where it arrives. The cache holds them, and not the objects, because they are small.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, Final

from ingestrun.model.contract import Stage
from ingestrun.model.names import (
    ANNOTATION_CHECKPOINT,
    LABEL_ATTEMPT,
    LABEL_BATCH,
    LABEL_RUN_UID,
    LABEL_STAGE,
    LABEL_STEP,
    LABEL_WORKER,
)
from ingestrun.model.quantity import QuantityError, read_bytes
from ingestrun.model.size_budget import MESSAGE_CHARS
from ingestrun.model.text import truncate
from ingestrun.model.times import parse_time
from ingestrun.planner.batch.containers import (
    InitContainerEnd,
    failed_init_container,
    left_running,
    named,
    own_container_name,
)
from ingestrun.planner.batch.obstacle import Obstacle, PodWait, read_wait, status_obstacle

POD_EXPECTED_WITHIN: Final = timedelta(seconds=5)
"""Time after its start within which a Job has a pod. Without one by then, the pod's creation may be refused."""
STUCK_AFTER: Final = timedelta(seconds=60)
"""Time after the end of its grace period at which a pod that still exists is reported as stuck."""
QUEUED_AFTER: Final = timedelta(seconds=5)
"""Time for which a Job is suspended before its run is reported as queued: a quick admission deserves no status."""


JOB_DELETED: Final = "JobDeleted"
"""Reason of a Job that somebody has deleted before it had ended, as far as is known."""
END_DEADLINE: Final = 1
"""The `activeDeadlineSeconds`, always over, that tells the kubelet to end what is left of a pod (decision 0009)."""
KILLED_CODES: Final = (137, 143)
"""The exit codes of SIGKILL and SIGTERM."""


class JobState(StrEnum):
    """State of a stage's Job, as its own container has it. `WAITING`: that container has not started yet."""

    WAITING = "Waiting"
    RUNNING = "Running"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"

    @property
    def finished(self) -> bool:
        """Tell whether the stage is over: its container has ended, whatever else of the pod still runs."""
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
    """The index of its batch; of a pool's worker, the worker's number."""
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
    deadline: timedelta | None = None
    """The stage's deadline, which counts from when a node has taken the pod, from the Job's template."""
    created: datetime | None = None
    started_at: datetime | None = None
    """Time at which the Job controller started it; if it was suspended since, the time of the latest start."""
    checkpoint: str | None = None
    """The state of its batch when it was created, as JSON; None for the first Job of a batch."""
    worker: bool = False
    """True if it is a worker of a pool, and no stage of a batch."""
    suspended: bool = False
    """True if Kueue or a user has suspended the Job, because it is not admitted or its admission was taken back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ObservedPod:
    """The one pod of a Job of the run. "Its container" is the stage's own, whatever others were put beside it."""

    name: str
    uid: str
    job_uid: str
    run_uid: str
    started: bool
    ended: bool
    """True once its container has ended, or the pod has; `left_running` has those that go on nevertheless."""
    exit_code: int | None
    reason: str | None
    """Reason for which its container ended or, if no container was started, for which the pod ended."""
    message: str | None
    """The termination message: the stage's result, or the last lines of its log."""
    obstacle: Obstacle | None
    """The obstacle to its start that its status names."""
    pod_reason: str | None = None
    """The reason in the pod's own status: Evicted, NodeAffinity and the like."""
    pod_message: str | None = None
    disruption: str | None = None
    """The reason of its condition DisruptionTarget, which marks a pod that was ended for a cause outside of the pod."""
    worker: int | None = None
    """The number of the pool's worker that it is; None: it is no worker."""
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
    left_running: tuple[str, ...] = ()
    """The other containers that have not ended, once its own has; without native sidecars, which the kubelet ends."""
    told_to_end: bool = False
    """True if the operator has told the kubelet to end what is left of the pod."""
    ended_at: datetime | None = None
    """Time at which its container ended; None if the pod has no other container, because its Job ends with it then."""
    ran_for: timedelta | None = None
    """Time from when a node had taken the pod to `ended_at`, or to the end of the failed init container."""
    failed_init: InitContainerEnd | None = None
    """The init container because of which its container could not start."""
    wait: PodWait | None = None
    """The wait for its first container; None while an init container is at work, and once it has started."""

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
    explanation: Obstacle | None = None
    """The obstacle that no status names, looked up in Events (`pod_start.explanation_of`)."""
    last_obstacle: Obstacle | None = None
    """The obstacle that was seen last before it ended, as far as the process knows one."""

    @property
    def batch(self) -> int:
        """Return the index of its batch."""
        return self.job.batch

    @property
    def step(self) -> int:
        """Return the place of its stage in the pipeline, from 0."""
        return self.job.step

    @property
    def worker(self) -> bool:
        """Tell whether it is a worker of a pool, and no stage of a batch."""
        return self.job.worker

    @property
    def number(self) -> int:
        """Return its number among the attempts of the stage, from 0."""
        return self.job.attempt

    @property
    def queued(self) -> bool:
        """Tell whether it is suspended and nothing of it runs, so that it waits to be admitted."""
        return self.job.suspended and self.state is JobState.WAITING

    @property
    def container_ended(self) -> bool:
        """Tell whether nothing of the stage runs or can start any more, though its Job may not have ended yet.

        While the pod is being deleted its Job decides, because a suspended Job is to start another pod.
        """
        pod = self.pod
        return self.state.finished or (pod is not None and pod.ended and pod.deleting_until is None)

    @property
    def ended_at(self) -> datetime | None:
        """Return when the stage ended; None while that is not known."""
        at = self.pod.ended_at if self.pod is not None else None
        return at if at is not None else self.job.finished_at

    @property
    def obstacle(self) -> Obstacle | None:
        """Return what keeps its pod from starting or from being created; None if nothing is known to."""
        if self.state is not JobState.WAITING:
            return None
        if self.explanation is not None:
            return self.explanation
        return self.pod.obstacle if self.pod is not None else None

    @property
    def wants_pod(self) -> bool:
        """Tell whether the Job controller is to make a pod for it and has not."""
        return self.pod is None and self.state is JobState.WAITING and not (self.job.suspended or self.job.deleting)

    @property
    def lacks_pod_at(self) -> datetime | None:
        """Return when it should have a pod at the latest; None if it has one, or is not to have one."""
        started_at = self.job.started_at if self.wants_pod else None
        return started_at + POD_EXPECTED_WITHIN if started_at is not None else None

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


def read_job(job: Mapping[str, Any]) -> ObservedJob:
    """Read the JSON of a Job that is a run's own (`ownership.foreign_job_reason`)."""
    meta, labels, status = job["metadata"], job["metadata"]["labels"], job.get("status") or {}
    step, attempt = (int(labels[label]) for label in (LABEL_STEP, LABEL_ATTEMPT))
    batch = int(labels[LABEL_WORKER if labels[LABEL_STAGE] == Stage.WORKER else LABEL_BATCH])
    spec = job.get("spec") or {}
    pod_spec = (spec.get("template") or {}).get("spec") or {}
    container = named(pod_spec.get("containers"), own_container_name(labels))
    finished, ended = _finished(status)
    ended_at = ended.get("lastTransitionTime") or meta["creationTimestamp"] if finished is not None else None
    return ObservedJob(
        namespace=meta["namespace"],
        name=meta["name"],
        uid=meta["uid"],
        resource_version=meta.get("resourceVersion", ""),
        run_uid=labels[LABEL_RUN_UID],
        batch=batch,
        step=step,
        attempt=attempt,
        worker=labels[LABEL_STAGE] == Stage.WORKER,
        deleting="deletionTimestamp" in meta,
        finished=finished,
        finished_at=_optional_time(ended_at),
        reason=ended.get("reason"),
        message=_short(ended.get("message")),
        image=sys.intern(container.get("image") or "") or None,
        memory_limit=_memory_limit(container),
        deadline=timedelta(seconds=seconds) if (seconds := pod_spec.get("activeDeadlineSeconds")) is not None else None,
        created=_optional_time(meta.get("creationTimestamp")),
        started_at=_optional_time(status.get("startTime")),
        checkpoint=(meta.get("annotations") or {}).get(ANNOTATION_CHECKPOINT),
        # A Job with a parallelism of 0 is paused as a suspended one is: it has no pod, and does not end.
        suspended=bool(spec.get("suspend")) or spec.get("parallelism") == 0,
    )


def _finished(status: Mapping[str, Any]) -> tuple[JobState | None, Mapping[str, Any]]:
    """Return how a Job has ended, and the condition that says so; None and nothing while it has not."""
    for condition in status.get("conditions") or ():
        if condition.get("status") == "True" and condition.get("type") in ("Complete", "Failed"):
            return JobState.SUCCEEDED if condition["type"] == "Complete" else JobState.FAILED, condition
    return None, {}


def read_pod(pod: Mapping[str, Any]) -> ObservedPod:
    """Read the JSON of a pod that is a run's own (`ownership.foreign_pod_reason`)."""
    meta, spec, status = pod["metadata"], pod.get("spec") or {}, pod.get("status") or {}
    owner = next(reference for reference in meta["ownerReferences"] if reference.get("controller"))
    labels = meta.get("labels") or {}
    own = own_container_name(labels)
    container = named(status.get("containerStatuses"), own)
    observed = ObservedPod(
        name=meta["name"],
        uid=meta["uid"],
        job_uid=owner["uid"],
        run_uid=labels.get(LABEL_RUN_UID, ""),
        worker=int(labels[LABEL_WORKER]) if LABEL_WORKER in labels else None,
        started=_stage_started(status, container),
        ended=_is_over(status),
        exit_code=None,
        reason=status.get("reason"),
        message=None,
        obstacle=None,
        pod_reason=status.get("reason"),
        pod_message=_short(status.get("message")),
        disruption=_disruption(status),
        memory_limit=_memory_limit(named(spec.get("containers"), own)),
        resource_version=meta.get("resourceVersion", ""),
        deleting_until=_optional_time(meta.get("deletionTimestamp")),
        node=spec.get("nodeName"),
        image_id=sys.intern(container.get("imageID") or "") or None,
        created=_optional_time(meta.get("creationTimestamp")),
        placed_at=_placed_at(status),
        told_to_end=spec.get("activeDeadlineSeconds") == END_DEADLINE,
    )
    if not observed.started:
        observed = replace(observed, obstacle=status_obstacle(meta, spec, status), wait=read_wait(meta, spec, status))
    if not _has_started(container):
        return _with_failed_init(observed, spec, status)
    terminated = (container.get("state") or {}).get("terminated")
    return _with_end(observed, spec, status, terminated, own=own) if terminated is not None else observed


def _is_over(status: Mapping[str, Any]) -> bool:
    return status.get("phase") in ("Succeeded", "Failed")


def _stage_started(status: Mapping[str, Any], container: Mapping[str, Any]) -> bool:
    """Tell whether the stage's own container has started, as far as is known of it."""
    runs = status.get("phase") == "Running" and "waiting" not in (container.get("state") or {})
    return runs or _is_over(status) or _has_started(container)


def _with_failed_init(pod: ObservedPod, spec: Mapping[str, Any], status: Mapping[str, Any]) -> ObservedPod:
    """Add the init container because of which the stage's own could not start, if there is one."""
    failed = failed_init_container(spec, status)
    return replace(pod, failed_init=failed, ran_for=_time_on_node(status, failed.finished_at)) if failed else pod


def _with_end(
    pod: ObservedPod, spec: Mapping[str, Any], status: Mapping[str, Any], terminated: Mapping[str, Any], *, own: str
) -> ObservedPod:
    """Add the end of the stage's own container, and which others of the pod run on."""
    with_others = len(spec.get("containers") or ()) > 1
    ended_at = _optional_time(terminated.get("finishedAt")) if with_others else None
    return replace(
        pod,
        ended=True,
        exit_code=terminated.get("exitCode"),
        reason=terminated.get("reason") or pod.reason,
        message=terminated.get("message"),
        ended_at=ended_at,
        ran_for=_time_on_node(status, ended_at),
        left_running=left_running(spec, status, own) if with_others and not _is_over(status) else (),
    )


def _time_on_node(status: Mapping[str, Any], end: datetime | None) -> timedelta | None:
    """Return the time from when a node had taken the pod to an end."""
    taken_at = _optional_time(status.get("startTime"))
    return end - taken_at if end is not None and taken_at is not None else None


def attempt_of(job: ObservedJob, pods: Sequence[ObservedPod]) -> Attempt:
    """Put a Job and its pod together. Of several pods (backoffLimit is 0, so there are none) the ended one counts.

    A container that has ended with exit code 0 is the Job's success: the Job controller reports it a second or two
    later, or never while another container goes on, and the next stage need not wait for that. This holds even if the
    Job then fails, because the other container does, or exceeds its deadline, so that the verdict on an attempt that
    later stages built on never changes. So is any other exit code the Job's failure where other containers go on.

    A pod that was ended by a suspension (Kueue's way to preempt) no longer belongs to the Job, which starts anew.
    """
    pods = [pod for pod in pods if not ended_by_suspension(job, pod)]
    pod = max(pods, key=lambda pod: (pod.ended, pod.started), default=None)
    if pod is not None and pod.ended and pod.exit_code == 0:
        state = JobState.SUCCEEDED
    elif job.finished is not None:
        state = job.finished
    elif pod is not None and _failed_by_itself(pod):
        state = JobState.FAILED
    elif pod is not None and pod.started:
        state = JobState.RUNNING
    else:
        state = JobState.WAITING
    return Attempt(job=job, state=state, pod=pod)


def _failed_by_itself(pod: ObservedPod) -> bool:
    """Tell whether its container has failed beside others that go on, and for no cause outside of it.

    A container that got a signal may have been ended with its whole pod: by an eviction, at its deadline, for a
    suspension. The pod says so when all its containers have ended.
    """
    if not pod.left_running or pod.deleting_until is not None or pod.disruption is not None:
        return False
    return pod.exit_code not in KILLED_CODES or pod.reason == "OOMKilled"


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


def _memory_limit(container: Mapping[str, Any]) -> int | None:
    quantity = ((container.get("resources") or {}).get("limits") or {}).get("memory")
    try:
        return read_bytes(quantity) if quantity is not None else None
    except QuantityError:
        return None


def _has_started(container: Mapping[str, Any]) -> bool:
    state = container.get("state") or {}
    return bool(container.get("started")) or "running" in state or "terminated" in state


def _optional_time(text: str | None) -> datetime | None:
    return parse_time(text) if text else None


def _short(text: str | None) -> str | None:
    return truncate(text, MESSAGE_CHARS) if text is not None else None
