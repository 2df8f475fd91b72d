"""Whether there is room in the cluster for one more Job of a run, and for how long a run waits for some."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from ingestrun.engine import conditions as c
from ingestrun.engine.batches import NO_ROOM, Batch
from ingestrun.engine.decisions import Refusal, Spent
from ingestrun.engine.facts import JobState, JobView
from ingestrun.engine.fairness import Capacity
from ingestrun.engine.retention import kept_failed
from ingestrun.model.ranges import IndexRanges
from ingestrun.model.run import IngestRun

NOT_COUNTED_YET: Final = ""
"""The reason while the Jobs that an earlier process has left are counted: a moment, not worth a condition."""

DELETED_AT_ONCE: Final = 100
"""How many batches one call deletes the Jobs of: the selector is part of the URL."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """Why a run may not start all that it could."""

    reason: str
    message: str
    retry_at: datetime | None
    admits: int = 0
    """So many Jobs may be started all the same: what a cap leaves, or the one that asks whether there is room."""
    asks: int = 0
    """So many more it would start as soon as it is let: its demand, when slots are shared out."""


def held_back(
    run: IngestRun,
    flight: Sequence[Batch],
    refusal: Refusal | None,
    capacity: Capacity | None,
    *,
    wants: int,
    now: datetime,
) -> Held | None:
    """Why not all of the `wants` Jobs that are due may be started, for want of room; None where all may."""
    for batch in flight:
        if batch.obstacle is not None and batch.obstacle.kind in NO_ROOM:
            message = f"batch {batch.index}: {batch.obstacle.message}"
            return Held(reason=batch.obstacle.kind, message=message, retry_at=None)
    grant = capacity.grant(wants) if capacity is not None else None
    if refusal is not None:
        due = now >= refusal.retry_at or _gone_since(refusal, capacity)
        if due and not wants:
            return None
        admits = 1 if due and (grant is None or grant.number) else 0
        return Held(
            reason=refusal.reason,
            message=refusal.message,
            retry_at=refusal.retry_at if now < refusal.retry_at else now + retry_pause(run),
            admits=admits,
            asks=1 if wants and not admits and (due or refusal.reason == "QuotaExceeded") else 0,
        )
    if grant is None or grant.number >= wants:
        return None
    return Held(
        reason=grant.reason or NOT_COUNTED_YET,
        message=grant.message,
        # Whoever gets a slot is told so; the look after the usual pause is for a message that was missed.
        retry_at=now + retry_pause(run),
        admits=grant.number,
        asks=wants - grant.number,
    )


def used_up(capacity: Capacity | None) -> bool:
    """Whether a quota on Jobs, which counts ended ones too, is used up as far as is known."""
    return capacity is not None and capacity.quota is not None and not capacity.quota.free


def made_room(
    run: IngestRun, jobs: Sequence[JobView], capacity: Capacity | None, *, last: bool = False
) -> Spent | None:
    """The Jobs that are to go at once under such a quota: those of batches that are over, as the stored status has it.

    Those of failed batches that are kept for their logs only go as a `last` resort, one batch's at a time.
    """
    if capacity is None or capacity.quota is None:
        return None
    batches = run.status.batches
    over = batches.published | batches.failed if last else (batches.published | batches.failed) - kept_failed(run)
    seen = {job.job.batch for job in jobs if job.state.finished and not job.job.deleting}
    done = sorted(batch for batch in seen if batch in over)[: 1 if last else DELETED_AT_ONCE]
    return Spent(batches=IndexRanges(done)) if done else None


def retry_pause(run: IngestRun) -> timedelta:
    """`backpressure.retrySeconds`, up to a tenth more or less by the run's UID: held together, not back together."""
    share = int.from_bytes(hashlib.sha256(run.metadata.uid.encode()).digest()[:4]) / 2**32
    return timedelta(seconds=run.spec.backpressure.retry_seconds * (0.9 + share / 5))


def gives_up_at(run: IngestRun, jobs: Sequence[JobView], *, now: datetime) -> datetime | None:
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


def remembered(run: IngestRun, *, now: datetime) -> Refusal | None:
    """The refusal that a process before this one was told, as the status has it: the next Job asks again.

    So the run stays Backpressured, since when it was, until a Job has been taken.
    """
    condition = run.status.condition(c.BACKPRESSURED)
    if condition is None or condition.status != "True" or condition.reason in ("Unschedulable", "JobLimitReached"):
        return None
    return Refusal(reason=condition.reason, message=condition.message, retry_at=now)


def _gone_since(refusal: Refusal, capacity: Capacity | None) -> bool:
    """Whether Jobs have gone since the quota refused one: asking again before the pause is over is worth it."""
    quota = capacity.quota if capacity is not None else None
    return refusal.reason == "QuotaExceeded" and quota is not None and quota.free > 0
