"""What goes into and comes out of the planner, as plain values: observations, actions and the plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime

from ingestrun.model.ranges import IndexRanges
from ingestrun.model.run import IngestRun
from ingestrun.model.spec import CancellationPolicy
from ingestrun.model.status import AttemptId, ImagePin, IngestRunStatus, Phase
from ingestrun.planner.batch.attempt import ObservedJob, ObservedPod
from ingestrun.planner.batch.state import NextAttempt
from ingestrun.planner.status.conditions import ConditionUpdate
from ingestrun.planner.status.events import Event


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelCause:
    """Why the operator cancels a run by itself. `kind` is the reason of the condition `Cancelled`."""

    kind: str
    reason: str
    requested_by: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CreateRejection:
    """The API server did not accept a Job of this run."""

    reason: str
    message: str
    retry_at: datetime
    permanent: bool = False
    """The Job itself is at fault (422), so there is no use in asking again."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Predecessor:
    """A run that this one may resume: read live once it has ended and is drained."""

    run: IngestRun
    resumer: IngestRun | None = None
    """The run that has claimed it, if that is another than this one and still there; read live."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimPredecessor:
    """Write to another run's status, with its resourceVersion, that this run resumes it."""

    of: IngestRun
    status: IngestRunStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class DeletePod:
    """End a pod: SIGTERM, and SIGKILL after the grace period (None: the pod's own)."""

    name: str
    uid: str
    grace_seconds: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class DeleteJob:
    """Delete a Job. With `pod`: only if that pod has not changed since, which means that it has not started."""

    job: ObservedJob
    pod: ObservedPod | None = None
    why: str = "it has not started"
    """For the log."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeleteJobs:
    """Delete many Jobs by one call, with their pods."""

    batches: IndexRanges | None
    """Those of these batches; None: of all batches."""
    kept: IndexRanges = field(default_factory=IndexRanges)
    """Without `batches`: except those of these."""
    clean_up: bool = False
    """That of `spec.onCancel` as well."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CreateJob:
    """Create the Job of an attempt; `cursor` and `limit` are for a fetch."""

    attempt: NextAttempt
    cursor: str | None = None
    limit: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to do, in this order: write the status, then create, end, delete, post Events, and look again."""

    status: IngestRunStatus
    claim_predecessor: ClaimPredecessor | None = None
    """Before all else; then all is planned anew."""
    creates: tuple[CreateJob, ...] = ()
    pod_deletions: tuple[DeletePod, ...] = ()
    job_deletions: tuple[DeleteJob, ...] = ()
    bulk_deletion: DeleteJobs | None = None
    skips: tuple[AttemptId, ...] = ()
    """What would have been started now if the run were not cancelled."""
    unmet_demand: int = 0
    """How many more Jobs would be started now if the operator's limits, or a quota, allowed it."""
    fence: bool | None = None
    """Whether the run has to carry the label by which the fence selects it; None: leave it as it is."""
    events: tuple[Event, ...] = ()
    """Posted once the status is stored."""
    expirable: bool = False
    """Of an ended run: it is drained, cleaned up and swept, so its TTL may delete it."""
    requeue_at: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """A plan whose status has yet to be finished (`status.writer.finish_status`): phase, conditions and size."""

    plan: Plan
    phase: Phase | None = None
    """None: it stays."""
    conditions: Sequence[ConditionUpdate] = ()
    pins: Sequence[ImagePin] | None = None
    """New `status.images`. They are stored together with another change, so that they cost no write of their own."""
    pins_needed: bool = False
    """Store them even without another change, because a Job that is created now runs one of them."""
