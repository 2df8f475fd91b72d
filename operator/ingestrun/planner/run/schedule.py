"""What a running run starts now: the stages and retries that are due, then new batches, as far as there is room."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from ingestrun.model.contract import Stage
from ingestrun.model.run import IngestRun
from ingestrun.model.status import IngestRunStatus
from ingestrun.planner.actions import CreateJob, CreateRejection, DeleteJobs
from ingestrun.planner.batch.attempt import Attempt
from ingestrun.planner.batch.ledger import (
    claimable,
    cursor_of,
    fetch_limit,
    next_claims,
    parked_of,
    pending_gaps,
    replay_limit,
)
from ingestrun.planner.batch.pipeline import steps_of
from ingestrun.planner.batch.state import BatchState, NextAttempt
from ingestrun.planner.run.backpressure import (
    Backpressure,
    backpressure_of,
    have_jobs,
    jobs_to_free_quota,
    quota_used_up,
    with_checkpoints,
)
from ingestrun.planner.run.fair_sharing import Capacity


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """What to start, and what keeps the rest."""

    status: IngestRunStatus
    """With the new batches claimed, and those parked that wait for room."""
    creates: tuple[CreateJob, ...] = ()
    backpressure: Backpressure | None = None
    bulk_deletion: DeleteJobs | None = None
    """Jobs to delete at once, since they use up a quota."""
    rechecks: tuple[datetime, ...] = ()
    """When more is due."""


def schedule(
    run: IngestRun,
    status: IngestRunStatus,
    flight: Sequence[BatchState],
    jobs: Sequence[Attempt],
    *,
    refusal: CreateRejection | None,
    capacity: Capacity | None,
    now: datetime,
) -> Schedule:
    """Decide what of `flight`, the batches under way, and of those not begun may be started."""
    spec = run.spec
    waiting = [batch for batch in flight if batch.next_attempt is not None]
    looks = [at for batch in waiting if (at := _not_before(batch)) is not None and at > now]
    ready = [batch for batch in waiting if (at := _not_before(batch)) is None or at <= now]
    claims = max(0, min(spec.parallelism - len(flight), claimable(spec, status.batches, status.records)))
    held = backpressure_of(run, flight, refusal, capacity, wants=len(ready) + claims, now=now)
    room = jobs_to_free_quota(run, jobs, capacity)
    if held is not None:
        # What is in flight goes before new batches, and first what has given up the places of its Jobs.
        parked = parked_of(status.batches)
        ready.sort(key=lambda batch: (batch.index not in parked, batch.index))
        if room is None and quota_used_up(capacity) and len(ready) > held.admitted:
            before = status
            status = with_checkpoints(status, ready, jobs, places=len(ready) - held.admitted)
            looks += [now] if status is not before else []
        if room is None and quota_used_up(capacity) and not have_jobs(flight, jobs):
            room = jobs_to_free_quota(run, jobs, capacity, last=True)
        ready = ready[: held.admitted]
        claims = min(claims, held.admitted - len(ready))
        if held.retry_at is not None and held.retry_at > now:
            looks.append(held.retry_at)
    creates = [_create_job(run, status, batch.next_attempt) for batch in ready if batch.next_attempt is not None]
    if claims:
        fetch = steps_of(spec)[0]
        new = next_claims(status.batches, claims)
        creates += [
            _create_job(run, status, NextAttempt(batch=index, step=fetch, attempt=0, input_attempt=None))
            for index in new
        ]
        claimed = status.batches.replace(claimed=status.batches.claimed | new, replay=status.batches.replay - new)
        status = status.replace(batches=claimed, start_time=status.start_time or now)
    return Schedule(status=status, creates=tuple(creates), backpressure=held, bulk_deletion=room, rechecks=tuple(looks))


def _not_before(batch: BatchState) -> datetime | None:
    return batch.next_attempt.not_before if batch.next_attempt is not None else None


def _create_job(run: IngestRun, status: IngestRunStatus, start: NextAttempt) -> CreateJob:
    if start.step.stage is not Stage.FETCH:
        return CreateJob(start=start)
    partitions = run.spec.batches.partitions
    gap = pending_gaps(status.batches).get(start.batch)
    if gap is not None:
        return CreateJob(start=start, cursor=gap.cursor, limit=replay_limit(gap))
    if partitions is None:
        return CreateJob(start=start, cursor=cursor_of(run, status), limit=fetch_limit(run.spec, status.records))
    value = partitions.values[start.batch] if partitions.values is not None else str(start.batch)
    return CreateJob(start=start, cursor=value)
