"""What goes into and comes out of the planner, as plain values."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from ingestrun.engine.batches import Start
from ingestrun.engine.facts import JobFacts
from ingestrun.model.status import IngestRunStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """The API server would not take a Job of this run."""

    reason: str
    message: str
    since: datetime
    retry_at: datetime
    permanent: bool = False
    """The Job itself is at fault (422): asking again is of no use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Live:
    """That the Jobs handed to the planner were listed from the API server just now, and what else was seen."""

    pods_running: int
    """Pods of the run that have not ended, also those whose Job is gone."""


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
    """What to do, in this order: write the status, then create, delete and look again."""

    status: IngestRunStatus
    creates: tuple[Create, ...] = ()
    deletes: tuple[JobFacts, ...] = ()
    delete_blocks: tuple[int, ...] = ()
    skips: tuple[Skip, ...] = ()
    requeue_at: datetime | None = None
