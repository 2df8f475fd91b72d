"""The inputs and outputs of the planner, as plain values: observations, actions and the plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from ingestrun.model.contract import Stage
from ingestrun.model.ranges import IndexRanges
from ingestrun.model.run import IngestRun
from ingestrun.model.spec import CancellationPolicy
from ingestrun.model.status import AttemptId, ImagePin, IngestRunStatus, Phase
from ingestrun.planner.batch.attempt import Attempt, ObservedJob, ObservedPod
from ingestrun.planner.batch.pipeline import ON_CANCEL_STEP
from ingestrun.planner.batch.state import NextAttempt
from ingestrun.planner.pool.requests import Answer, WorkerRequest
from ingestrun.planner.status.conditions import ConditionUpdate
from ingestrun.planner.status.events import Event


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelCause:
    """Cause for which the operator cancels a run by itself. `kind` is the reason of the condition `Cancelled`."""

    kind: str
    reason: str
    requested_by: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CreateRejection:
    """The API server's refusal of a Job of this run."""

    reason: str
    message: str
    retry_at: datetime
    permanent: bool = False
    """True if the Job itself is at fault (422), so that trying again is of no use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LivePods:
    """The pods of a run, listed from the API server together with the attempts of the snapshot."""

    pods: tuple[ObservedPod, ...]
    """All pods of the run, also those whose Job is gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelledParent:
    """A run above this one that is Cancelled with `cascade`: this one has to follow."""

    name: str
    reason: str | None
    requested_by: str | None
    policy: CancellationPolicy


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildRun:
    """A run right below this one."""

    name: str
    phase: Phase | None
    """Its final phase; None as long as it has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Predecessor:
    """A run that this one may resume: read live once it has ended and is drained."""

    run: IngestRun
    resumer: IngestRun | None = None
    """The other run that has claimed the predecessor, if it still exists; read live."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimPredecessor:
    """Write to another run's status, with its resourceVersion, which records that this run resumes it."""

    of: IngestRun
    status: IngestRunStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class DeletePod:
    """Deletion of a pod: SIGTERM, and SIGKILL after the grace period (None: the pod's own)."""

    name: str
    uid: str
    grace_seconds: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class EndPod:
    """End of what is left of a pod whose stage is over: it gets SIGTERM, and the pod stays, with the stage's result."""

    name: str
    uid: str
    containers: tuple[str, ...]
    """Names of the containers that are left."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeleteJob:
    """Deletion of a Job. With `pod`: only if the pod has not changed since, which means that it has not started."""

    job: ObservedJob
    pod: ObservedPod | None = None
    why: str = "it has not started"
    """Reason for the log."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeleteJobs:
    """Deletion of many Jobs by one call, with their pods."""

    batches: IndexRanges | None
    """The batches whose Jobs are deleted; None: all batches."""
    kept: IndexRanges = field(default_factory=IndexRanges)
    """The batches whose Jobs stay, if `batches` is None."""
    clean_up: bool = False
    """True if the Job of `spec.onCancel` is deleted as well."""

    def covers(self, attempt: Attempt) -> bool:
        """Tell whether the Job of the attempt is among them."""
        if attempt.step == ON_CANCEL_STEP and not self.clean_up:
            return False
        if attempt.worker:  # its Job has no label of a batch, so no selector of batches finds it
            return self.batches is None
        return attempt.batch not in self.kept if self.batches is None else attempt.batch in self.batches


@dataclass(frozen=True, slots=True, kw_only=True)
class CreateJob:
    """Creation of the Job of an attempt; all but `attempt` is for a fetch, as `StageResult` names it."""

    attempt: NextAttempt
    cursor: str | None = None
    limit: int | None = None
    source_digest: str | None = None
    state: str | None = None

    @property
    def worker(self) -> bool:
        """Tell whether it is a worker of a pool, and not a stage of a batch."""
        return self.attempt.step.stage is Stage.WORKER

    @property
    def subject(self) -> str:
        """Return what it starts, for messages."""
        if self.worker:
            return f"worker {self.attempt.batch}"
        return f"batch {self.attempt.batch}, {self.attempt.step.label}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The actions of one pass, in this order: write the status, create, end, delete, post Events, and look again."""

    status: IngestRunStatus
    claim_predecessor: ClaimPredecessor | None = None
    """Claim that is written before everything else; then the whole run is planned anew."""
    creates: tuple[CreateJob, ...] = ()
    pod_ends: tuple[EndPod, ...] = ()
    pod_deletions: tuple[DeletePod, ...] = ()
    job_deletions: tuple[DeleteJob, ...] = ()
    bulk_deletion: DeleteJobs | None = None
    skips: tuple[AttemptId, ...] = ()
    """The attempts that would have been started now if the run were not cancelled."""
    unmet_demand: int = 0
    """Number of further Jobs that would be started now if the operator's limits and the quotas allowed it."""
    fence: bool | None = None
    """True if the run has to carry the label by which the fence selects it, False if not; None leaves it as it is."""
    events: tuple[Event, ...] = ()
    """Events that are posted once the status is stored."""
    expirable: bool = False
    """True if an ended run is drained, cleaned up and swept, so that its TTL may delete it."""
    answers: Mapping[WorkerRequest, Answer] = field(default_factory=dict)
    """The answers to requests of workers, given once the status is stored; a request without one goes on waiting."""
    misses_jobs: bool = False
    """True if the plan depends on Jobs that are not known to be there: only a live list shows that they are gone."""
    requeue_at: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """A plan whose status has yet to be finished (`status.writer.finish_status`): phase, conditions and size."""

    plan: Plan
    phase: Phase | None = None
    """The new phase; None leaves the phase as it is."""
    conditions: Sequence[ConditionUpdate] = ()
    pins: Sequence[ImagePin] | None = None
    """New `status.images`. They are stored together with another change, so that they cost no write of their own."""
    pins_needed: bool = False
    """True if `pins` are stored even without another change, because a Job that is created now runs one of them."""
