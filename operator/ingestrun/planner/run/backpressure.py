"""Whether there is room in the cluster for one more Job of a run, and for how long a run waits for some."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from ingestrun.model.ranges import IndexRanges
from ingestrun.model.run import IngestRun
from ingestrun.model.status import IngestRunStatus
from ingestrun.planner.actions import CreateRejection, DeleteJob, DeleteJobs
from ingestrun.planner.batch.attempt import Attempt, JobState
from ingestrun.planner.batch.ledger import add_retries, parked_of
from ingestrun.planner.batch.state import CAPACITY_OBSTACLES, BatchState, is_checkpointed
from ingestrun.planner.jobs.retention import kept_failed_batches
from ingestrun.planner.run.fair_sharing import Capacity
from ingestrun.planner.status import conditions as c

NOT_COUNTED_YET: Final = ""
"""The reason while the Jobs that an earlier process has left are counted: a moment, not worth a condition."""

DELETED_AT_ONCE: Final = 100
"""How many batches one call deletes the Jobs of: the selector is part of the URL."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Backpressure:
    """Why a run may not start all that it could."""

    reason: str
    message: str
    retry_at: datetime | None
    admitted: int = 0
    """So many Jobs may be started all the same: what a cap leaves, or the one that asks whether there is room."""
    unmet_demand: int = 0
    """So many more it would start as soon as it is let: its demand, when slots are shared out."""


def backpressure_of(
    run: IngestRun,
    flight: Sequence[BatchState],
    refusal: CreateRejection | None,
    capacity: Capacity | None,
    *,
    wants: int,
    now: datetime,
) -> Backpressure | None:
    """Why not all of the `wants` Jobs that are due may be started, for want of room; None where all may."""
    for batch in flight:
        if batch.obstacle is not None and batch.obstacle.kind in CAPACITY_OBSTACLES:
            message = f"batch {batch.index}: {batch.obstacle.message}"
            return Backpressure(reason=batch.obstacle.kind, message=message, retry_at=None)
    grant = capacity.admit(wants) if capacity is not None else None
    if refusal is not None:
        due = now >= refusal.retry_at or _quota_freed_since(refusal, capacity)
        if due and not wants:
            return None
        admits = 1 if due and (grant is None or grant.number) else 0
        return Backpressure(
            reason=refusal.reason,
            message=refusal.message,
            retry_at=refusal.retry_at if now < refusal.retry_at else now + retry_interval(run),
            admitted=admits,
            unmet_demand=1 if wants and not admits and (due or refusal.reason == "QuotaExceeded") else 0,
        )
    if grant is None or grant.number >= wants:
        return None
    return Backpressure(
        reason=grant.reason or NOT_COUNTED_YET,
        message=grant.message,
        # Whoever gets a slot is told so; the look after the usual pause is for a message that was missed.
        retry_at=now + retry_interval(run),
        admitted=grant.number,
        unmet_demand=wants - grant.number,
    )


def quota_used_up(capacity: Capacity | None) -> bool:
    """Whether a quota on Jobs, which counts ended ones too, is used up as far as is known."""
    return capacity is not None and capacity.quota is not None and not capacity.quota.free


def jobs_to_free_quota(
    run: IngestRun, jobs: Sequence[Attempt], capacity: Capacity | None, *, last: bool = False
) -> DeleteJobs | None:
    """The Jobs that are to go at once under such a quota: those of batches that are over, as the stored status has it.

    Those of failed batches that are kept for their logs only go as a `last` resort, one batch's at a time.
    """
    if capacity is None or capacity.quota is None:
        return None
    batches = run.status.batches
    over = (
        batches.published | batches.failed if last else (batches.published | batches.failed) - kept_failed_batches(run)
    )
    seen = {job.job.batch for job in jobs if job.state.finished and not job.job.deleting}
    done = sorted(batch for batch in seen if batch in over)[: 1 if last else DELETED_AT_ONCE]
    return DeleteJobs(batches=IndexRanges(done)) if done else None


def retry_interval(run: IngestRun) -> timedelta:
    """`backpressure.retrySeconds`, up to a tenth more or less by the run's UID: held together, not back together."""
    share = int.from_bytes(hashlib.sha256(run.metadata.uid.encode()).digest()[:4]) / 2**32
    return timedelta(seconds=run.spec.backpressure.retry_seconds * (0.9 + share / 5))


def backpressure_deadline(run: IngestRun, jobs: Sequence[Attempt], *, now: datetime) -> datetime | None:
    """When a run that is held back fails by `backpressure.timeoutSeconds`; None: not as things are.

    Counted from the moment since which it is held and nothing of it has run: a Job that runs, or has ended since,
    is a sign of room, and waiting for one's turn under a cap must not fail a run that gets its turns.
    """
    seconds = run.spec.backpressure.timeout_seconds
    if seconds is None or any(job.state is JobState.RUNNING for job in jobs):
        return None
    condition = run.status.condition(c.BACKPRESSURED)
    since = condition.last_transition_time if condition is not None and condition.status == "True" else now
    ends = [job.job.finished_at for job in jobs if job.job.finished_at is not None]
    if run.status.last_progress_time is not None:
        ends.append(run.status.last_progress_time)
    return max([since, *ends]) + timedelta(seconds=seconds)


def rejection_in_status(run: IngestRun, *, now: datetime) -> CreateRejection | None:
    """The refusal that a process before this one was told, as the status has it: the next Job asks again.

    So the run stays Backpressured, since when it was, until a Job has been taken.
    """
    condition = run.status.condition(c.BACKPRESSURED)
    if condition is None or condition.status != "True" or condition.reason in ("Unschedulable", "JobLimitReached"):
        return None
    return CreateRejection(reason=condition.reason, message=condition.message, retry_at=now)


def _quota_freed_since(refusal: CreateRejection, capacity: Capacity | None) -> bool:
    """Whether Jobs have gone since the quota refused one: asking again before the pause is over is worth it."""
    quota = capacity.quota if capacity is not None else None
    return refusal.reason == "QuotaExceeded" and quota is not None and quota.free > 0


# Room under a quota on Jobs, which counts ended ones too: what they have come to is put in the status, and they go.
#
# Without it batches in flight that each hold ended Jobs and wait for one more could use a quota up and wait for ever.
# So where a Job is refused for want of room, batches that wait are parked, the first ones first: one status write says
# all that their next Jobs need (`Parked`), and only when it is stored are the Jobs deleted, each by its UID. Nothing is
# done twice. What comes free goes to the run's parked batches before its others (`plan`), so whoever has taken the last
# place can be parked in turn: a quota of one Job is enough to get on.
#

MAX_CHECKPOINTS: Final = 6
"""How many batches are parked at once: about 100 bytes each in a status that has other things to tell."""


def with_checkpoints(
    status: IngestRunStatus, waiting: Sequence[BatchState], jobs: Iterable[Attempt], *, places: int
) -> IngestRunStatus:
    """The status with as many of the batches parked that wait for a Job as it takes to free so many places.

    Those that are parked already free theirs too. A retry that is parked is counted here: its failed attempts are not
    there any more when the batch is accounted for.
    """
    holds = Counter(job.job.batch for job in jobs if not job.job.deleting)
    parked = parked_of(status.batches)
    newly = []
    for batch in waiting:
        if places <= 0:
            break
        entry = batch.checkpoint
        if entry is None or not holds[batch.index] or (batch.index not in parked and len(parked) >= MAX_CHECKPOINTS):
            continue
        places -= holds[batch.index]
        if parked.get(batch.index) != entry:
            parked[batch.index] = entry
            newly.append(batch)
    if not newly:
        return status
    return status.replace(
        batches=status.batches.replace(checkpoints=[parked[index] for index in sorted(parked)]),
        retries=add_retries(status.retries, (retry for batch in newly for retry in batch.retried)),
    )


def have_jobs(flight: Sequence[BatchState], jobs: Iterable[Attempt]) -> bool:
    """Whether a batch in flight has a Job: it will end, or be parked, or go, and its place be free."""
    indexes = {batch.index for batch in flight}
    return any(job.job.batch in indexes for job in jobs)


def checkpointed_jobs(run: IngestRun, jobs: Iterable[Attempt]) -> tuple[DeleteJob, ...]:
    """The Jobs of which the stored status keeps all that is needed."""
    parked = parked_of(run.status.batches)
    return tuple(
        DeleteJob(job=job.job, why="kept in the status, to make room")
        for job in jobs
        if job.state.finished
        and not job.job.deleting
        and job.job.batch in parked
        and is_checkpointed(parked[job.job.batch], job)
    )
