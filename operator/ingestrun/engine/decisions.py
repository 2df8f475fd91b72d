"""What goes into and comes out of the planner, as plain values."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime

from ingestrun.engine.announce import Announcement
from ingestrun.engine.batches import Start
from ingestrun.engine.facts import JobFacts, PodFacts
from ingestrun.model.ranges import IndexRanges
from ingestrun.model.run import IngestRun
from ingestrun.model.spec import CancellationPolicy
from ingestrun.model.status import IngestRunStatus, Phase


@dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    """Why the operator cancels a run by itself. `kind` is the reason of the condition `Cancelled`."""

    kind: str
    reason: str
    requested_by: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """The API server would not take a Job of this run."""

    reason: str
    message: str
    retry_at: datetime
    permanent: bool = False
    """The Job itself is at fault (422): asking again is of no use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Live:
    """That the Jobs handed to the planner were listed from the API server just now, and the pods with them."""

    pods: tuple[PodFacts, ...]
    """All pods of the run, also those whose Job is gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parent:
    """A run above this one that is Cancelled with `cascade`: this one has to follow."""

    name: str
    reason: str | None
    requested_by: str | None
    policy: CancellationPolicy


@dataclass(frozen=True, slots=True, kw_only=True)
class Child:
    """A run right below this one."""

    name: str
    phase: Phase | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Predecessor:
    """A run from which this one may go on: read live once it has ended and is drained."""

    run: IngestRun
    resumer: IngestRun | None = None
    """The run that has claimed it, where that is another than this one and still there; read live."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Take:
    """A write to another run's status, with its resourceVersion: that this run does its rest."""

    of: IngestRun
    status: IngestRunStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """A pod to end: SIGTERM, and SIGKILL after so many seconds (None: what the pod itself says)."""

    name: str
    uid: str
    grace_seconds: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Delete:
    """A Job to delete. With `pod`: only if that pod has not changed since, which is to say has not started."""

    job: JobFacts
    pod: PodFacts | None = None
    why: str = "it has not started"
    """For the log."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """Jobs to delete by one call, with their pods."""

    batches: IndexRanges | None
    """Those of these batches; None: of all batches."""
    kept: IndexRanges = field(default_factory=IndexRanges)
    """Without `batches`: but not those of these."""
    clean_up: bool = False
    """That of `spec.onCancel` as well."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Create:
    """A Job to create: the start, and what its fetch is told."""

    start: Start
    cursor: str | None = None
    limit: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Skip:
    """What would have been started now had the run not been cancelled."""

    batch: int
    stage: str
    attempt: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to do, in this order: write the status, then create, end, delete, announce, and look again."""

    status: IngestRunStatus
    take: Take | None = None
    """Before all else, and then all is planned anew."""
    creates: tuple[Create, ...] = ()
    kills: tuple[Kill, ...] = ()
    deletes: tuple[Delete, ...] = ()
    spent: Spent | None = None
    skips: tuple[Skip, ...] = ()
    asks: int = 0
    """How many Jobs more would be started now if the operator's caps, or a quota, let them be."""
    fenced: bool | None = None
    """Whether the run has to carry the label that the fence selects by; None: as it is."""
    tell: tuple[Announcement, ...] = ()
    """Events that do not follow from the change of the status alone."""
    settled: bool = False
    """Of an ended run: it is drained, cleaned up and swept, so it may be deleted when its time has come."""
    requeue_at: datetime | None = None
