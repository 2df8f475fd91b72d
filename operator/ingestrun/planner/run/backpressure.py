"""Backpressure: the room in the cluster for one more Job of a run, and the time that a run waits for it.

A quota may count what has ended: Jobs (`count/jobs.batch`), or their pods (`count/pods`). Batches in flight that each
hold ended Jobs and wait for one more could use such a quota up and wait for ever. So when a Job or a pod is refused for
want of room, batches are checkpointed (`checkpoints`), lowest index first: one status write keeps all values that their
next Jobs need, and only when it is stored are their ended Jobs deleted, each by its UID. No stage is done twice. The
freed room goes to the run's checkpointed batches before its others (`schedule`), so a batch that has taken the last
place can be checkpointed in turn, and a quota of one Job, or of one pod, is enough to make progress.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from ingestrun.model.ranges import IndexRanges
from ingestrun.model.run import IngestRun
from ingestrun.planner.actions import CreateRejection, DeleteJobs
from ingestrun.planner.batch.attempt import Attempt, JobState
from ingestrun.planner.batch.failure_policy import rule_of
from ingestrun.planner.batch.pod_start import holds
from ingestrun.planner.batch.state import BatchState
from ingestrun.planner.jobs.retention import MAX_DELETE_BATCHES, kept_failed_batches
from ingestrun.planner.run.fair_sharing import Admission, Capacity
from ingestrun.planner.snapshot import Snapshot
from ingestrun.planner.status import conditions as c


@dataclass(frozen=True, slots=True, kw_only=True)
class Backpressure:
    """Obstacle that prevents some of the due Jobs from being created."""

    reason: str | None
    """The reason of the condition; None for the moment in which the Jobs of an earlier process are still counted."""
    message: str
    retry_at: datetime | None
    admitted: int = 0
    """Jobs that may be created nevertheless: what the limit leaves, or a single probe."""
    unmet_demand: int = 0
    """Jobs that the run would create as soon as it is allowed to: its demand when slots are shared."""


def backpressure_of(snapshot: Snapshot, *, wants: int) -> Backpressure | None:
    """Return what prevents some of the `wants` due Jobs from being created; None if nothing does."""
    for batch in snapshot.in_flight:
        if batch.obstacle is not None and holds(batch.obstacle):
            message = f"batch {batch.index}: {batch.obstacle.message}"
            return Backpressure(reason=batch.obstacle.kind, message=message, retry_at=None)
    return room_of(snapshot, wants=wants)


def room_of(snapshot: Snapshot, *, wants: int) -> Backpressure | None:
    """Return which limit, quota or refusal prevents some of `wants` Jobs from being created; None if none does."""
    admission = snapshot.capacity.admit(wants) if snapshot.capacity is not None else None
    if snapshot.rejection is not None:
        return _rejected(snapshot, snapshot.rejection, admission, wants=wants)
    if admission is None or admission.number >= wants:
        return None
    return Backpressure(
        reason=admission.reason,
        message=admission.message,
        # A run that gets a slot is woken. The look after the usual interval is for a lost wake-up.
        retry_at=snapshot.now + retry_interval(snapshot.run),
        admitted=admission.number,
        unmet_demand=wants - admission.number,
    )


def _rejected(
    snapshot: Snapshot, rejection: CreateRejection, admission: Admission | None, *, wants: int
) -> Backpressure | None:
    """Return the backpressure after a rejection: one Job is tried at the retry time, and none before."""
    now = snapshot.now
    due = now >= rejection.retry_at or _quota_freed_since(rejection, snapshot.capacity)
    if due and not wants:
        return None
    admitted = 1 if due and (admission is None or admission.number) else 0
    waits_for_slot = bool(wants) and not admitted and (due or rejection.reason == "QuotaExceeded")
    return Backpressure(
        reason=rejection.reason,
        message=rejection.message,
        retry_at=rejection.retry_at if now < rejection.retry_at else now + retry_interval(snapshot.run),
        admitted=admitted,
        unmet_demand=1 if waits_for_slot else 0,
    )


def quota_used_up(capacity: Capacity | None) -> bool:
    """Tell whether a quota on Jobs, which counts ended ones too, is used up as far as is known."""
    return capacity is not None and capacity.quota is not None and not capacity.quota.free


def jobs_to_free_quota(snapshot: Snapshot, *, last_resort: bool = False) -> DeleteJobs | None:
    """Return the Jobs to delete at once where a quota counts what has ended: of batches ended by the stored status.

    Jobs of failed batches that are kept for their logs are deleted only as a last resort, one batch's at a time.
    """
    if snapshot.capacity is None or not snapshot.capacity.pressed:
        return None
    batches = snapshot.run.status.batches
    ended = batches.published | batches.failed
    if not last_resort:
        ended = ended - kept_failed_batches(snapshot.run)
    present = {attempt.batch for attempt in snapshot.stages if attempt.state.finished and not attempt.job.deleting}
    chosen = sorted(batch for batch in present if batch in ended)[: 1 if last_resort else MAX_DELETE_BATCHES]
    return DeleteJobs(batches=IndexRanges(chosen)) if chosen else None


def retry_interval(run: IngestRun) -> timedelta:
    """Return `backpressure.retrySeconds` ± 10 %, derived from the run's UID.

    Derived, so that runs held back together do not all retry at once, and a restart changes nothing.
    """
    share = int.from_bytes(hashlib.sha256(run.metadata.uid.encode()).digest()[:4]) / 2**32
    return timedelta(seconds=run.spec.backpressure.retry_seconds * (0.9 + share / 5))


def backpressure_deadline(snapshot: Snapshot) -> datetime | None:
    """Return when a run that is held back fails by `backpressure.timeoutSeconds`; None if that does not apply now.

    The time counts from the moment since which it is held back and no Job of it has run. A Job that runs, or has ended
    since, is a sign of room, and waiting for a turn under a limit must not fail a run that gets its turns.
    """
    run, attempts = snapshot.run, snapshot.started
    seconds = run.spec.backpressure.timeout_seconds
    if seconds is None or any(attempt.state is JobState.RUNNING for attempt in attempts):
        return None
    condition = run.status.condition(c.BACKPRESSURED)
    held = condition is not None and condition.status == "True"
    since = condition.last_transition_time if condition is not None and held else snapshot.now
    signs = [attempt.job.finished_at for attempt in attempts if attempt.job.finished_at is not None]
    if run.status.last_progress_time is not None:
        signs.append(run.status.last_progress_time)
    return max([since, *signs]) + timedelta(seconds=seconds)


def rejection_in_status(run: IngestRun, *, now: datetime) -> CreateRejection | None:
    """Return from the status the rejection that an earlier process got; the next Job is tried at once.

    So the run stays Backpressured, with the old transition time, until a Job has been accepted.
    """
    condition = run.status.condition(c.BACKPRESSURED)
    if condition is None or condition.status != "True" or not rule_of(condition.reason).probed:
        return None
    return CreateRejection(reason=condition.reason, message=condition.message, retry_at=now)


def _quota_freed_since(rejection: CreateRejection, capacity: Capacity | None) -> bool:
    """Tell whether Jobs have gone since the rejection, so that a retry before the interval is over may succeed."""
    quota = capacity.quota if capacity is not None else None
    return rejection.reason == "QuotaExceeded" and quota is not None and quota.free > 0


def hold_jobs(batches: Sequence[BatchState], attempts: Iterable[Attempt]) -> bool:
    """Tell whether one of the batches has a Job: it will end, or be checkpointed, or be deleted, and free its place."""
    indexes = {batch.index for batch in batches}
    return any(attempt.batch in indexes for attempt in attempts)
