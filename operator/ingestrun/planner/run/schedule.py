"""The schedule of a running run: due stages and retries start first, then new batches, as far as there is room."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from ingestrun.model.contract import Stage
from ingestrun.model.ranges import IndexRanges
from ingestrun.model.run import IngestRun
from ingestrun.model.status import IngestRunStatus
from ingestrun.planner.actions import CreateJob, DeleteJob, DeleteJobs, DeletePod
from ingestrun.planner.batch.ledger import claimable, cursor_of, fetch_limit, next_claims, replay_limit
from ingestrun.planner.batch.pipeline import steps_of
from ingestrun.planner.batch.pod_start import START_RECHECK
from ingestrun.planner.batch.state import BatchState, NextAttempt
from ingestrun.planner.pool.requests import Answer, WorkerRequest
from ingestrun.planner.run.backpressure import (
    Backpressure,
    backpressure_of,
    hold_jobs,
    jobs_to_free_quota,
    quota_used_up,
)
from ingestrun.planner.run.checkpoints import (
    batches_that_hold_room,
    free_places,
    suspended_batches,
    vanishing_batches,
    with_checkpoints,
)
from ingestrun.planner.snapshot import Snapshot


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """The attempts to start, and the backpressure that prevents others."""

    status: IngestRunStatus
    """The status with new batches claimed, and with batches that wait for room checkpointed."""
    creates: tuple[CreateJob, ...] = ()
    backpressure: Backpressure | None = None
    bulk_deletion: DeleteJobs | None = None
    """Jobs to delete at once, because they use up a quota."""
    rechecks: tuple[datetime, ...] = ()
    """Times at which further attempts are due."""
    job_deletions: tuple[DeleteJob, ...] = ()
    pod_deletions: tuple[DeletePod, ...] = ()
    answers: Mapping[WorkerRequest, Answer] = field(default_factory=dict)
    misses_jobs: bool = False
    failure: tuple[str, str] | None = None
    """Reason and message of a failure that ends the run."""


@dataclass(slots=True)
class _Candidates:
    """Candidates to start: batches in flight whose next attempt may start, and how many new batches may be claimed."""

    ready: list[BatchState]
    claims: int
    status: IngestRunStatus
    bulk_deletion: DeleteJobs | None
    rechecks: list[datetime] = field(default_factory=list)


def nothing_scheduled(snapshot: Snapshot) -> Schedule:
    """Return the schedule of a run that may start no Job now; it gives back what uses up a quota nevertheless."""
    status = with_checkpoints(snapshot.status, suspended_batches(snapshot))
    given = _give_back(snapshot, status)
    return Schedule(status=given.status, bulk_deletion=given.bulk_deletion, rechecks=given.rechecks)


def schedule(snapshot: Snapshot) -> Schedule:
    """Decide which of the batches in flight, and of those not begun, start an attempt now."""
    run, due = snapshot.run, _candidates(snapshot)
    backpressure = backpressure_of(snapshot, wants=len(due.ready) + due.claims)
    if backpressure is not None:
        _hold_back(snapshot, due, backpressure)
    created = [batch.index for batch in due.ready]
    status = with_checkpoints(due.status, vanishing_batches(snapshot, created=created))
    creates = [_create_job(run, status, batch.next_attempt) for batch in due.ready if batch.next_attempt]
    if due.claims:
        claimed = next_claims(status.batches, due.claims)
        fetch = steps_of(run.spec)[0]
        creates += [
            _create_job(run, status, NextAttempt(batch=index, step=fetch, number=0, input_attempt=None))
            for index in claimed
        ]
        status = with_claimed(status, claimed, now=snapshot.now)
    return Schedule(
        status=status,
        creates=tuple(creates),
        backpressure=backpressure,
        bulk_deletion=due.bulk_deletion,
        rechecks=tuple(due.rechecks),
    )


def _candidates(snapshot: Snapshot) -> _Candidates:
    """Return what could start now if there were room for all of it."""
    run, now, status = snapshot.run, snapshot.now, snapshot.status
    waiting = [batch for batch in snapshot.in_flight if batch.next_attempt is not None]
    free = run.spec.parallelism - len(snapshot.in_flight)
    given = _give_back(snapshot, status)
    ready = [batch for batch in waiting if batch.next_attempt is not None and batch.next_attempt.due(now)]
    return _Candidates(
        ready=[batch for batch in ready if batch.index not in given.holding],
        claims=max(0, min(free, claimable(run.spec, status.batches, status.records))),
        status=given.status,
        bulk_deletion=given.bulk_deletion,
        rechecks=[*given.rechecks, *(at for batch in waiting if (at := batch.not_before) is not None and at > now)],
    )


def with_claimed(status: IngestRunStatus, claimed: IndexRanges, *, now: datetime) -> IngestRunStatus:
    """Return the status with these batches claimed; the run starts with the first."""
    batches = status.batches.replace(claimed=status.batches.claimed | claimed, replay=status.batches.replay - claimed)
    return status.replace(batches=batches, start_time=status.start_time or now)


@dataclass(frozen=True, slots=True, kw_only=True)
class _GivenBack:
    """Ended Jobs that are given back because a quota of the namespace counts them, or their pods."""

    status: IngestRunStatus
    bulk_deletion: DeleteJobs | None
    holding: frozenset[int] = frozenset()
    """Batches whose next Job waits until their ended Jobs are deleted."""
    rechecks: tuple[datetime, ...] = ()


def _give_back(snapshot: Snapshot, status: IngestRunStatus) -> _GivenBack:
    """Give back what has ended: of ended batches at once, of those in flight by way of a checkpoint.

    The Jobs of failed batches that are kept for their logs are the last resort, one batch's at a time.
    """
    capacity, bulk = snapshot.capacity, jobs_to_free_quota(snapshot)
    if capacity is None or not capacity.pressed:
        return _GivenBack(status=status, bulk_deletion=None)
    in_flight, holding = batches_that_hold_room(snapshot), []
    if capacity.pods_counted:
        status = with_checkpoints(status, in_flight)
        kept = status.batches.checkpoint_by_batch
        holding = [batch for batch in in_flight if kept.get(batch.index) == batch.checkpoint]
    rechecks = (snapshot.now,) if holding else ()
    if capacity.starved and bulk is None and not in_flight:
        bulk = jobs_to_free_quota(snapshot, last_resort=True)
        rechecks = (snapshot.now + START_RECHECK,) if bulk is not None else ()
    return _GivenBack(
        status=status,
        bulk_deletion=bulk,
        holding=frozenset(batch.index for batch in holding),
        rechecks=rechecks,
    )


def _hold_back(snapshot: Snapshot, due: _Candidates, backpressure: Backpressure) -> None:
    """Cut the candidates down to the admitted number, and make room under a quota that is used up."""
    attempts, now = snapshot.stages, snapshot.now
    # Batches in flight come before new ones; among them those that were checkpointed, because their Jobs were deleted
    # to free the quota.
    checkpoints = due.status.batches.checkpoint_by_batch
    due.ready.sort(key=lambda batch: (batch.index not in checkpoints, batch.index))
    if due.bulk_deletion is None and quota_used_up(snapshot.capacity):
        missing = len(due.ready) - backpressure.admitted
        if missing > 0:
            checkpointed = free_places(due.status, due.ready, attempts, places=missing)
            due.rechecks += [now] if checkpointed is not due.status else []
            due.status = checkpointed
        if not hold_jobs(snapshot.in_flight, attempts):
            due.bulk_deletion = jobs_to_free_quota(snapshot, last_resort=True)
    due.ready = due.ready[: backpressure.admitted]
    due.claims = min(due.claims, backpressure.admitted - len(due.ready))
    if backpressure.retry_at is not None and backpressure.retry_at > now:
        due.rechecks.append(backpressure.retry_at)


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchInputs:
    """Inputs that a batch's fetch is told, named as in `CreateJob`."""

    cursor: str | None = None
    limit: int | None = None
    source_digest: str | None = None
    state: str | None = None


def fetch_inputs(run: IngestRun, status: IngestRunStatus, batch: int) -> FetchInputs:
    """Return what the fetch of a batch is told, from the status in which the batch is claimed."""
    partitions, digest = run.spec.batches.partitions, status.source_digest
    replayed = status.batches.pending_replays.get(batch)
    if replayed is not None:
        return FetchInputs(cursor=replayed.cursor, limit=replay_limit(replayed), source_digest=digest)
    if partitions is None:
        return FetchInputs(
            cursor=cursor_of(run, status),
            limit=fetch_limit(run.spec, status.records),
            source_digest=digest,
            state=status.cursor_state,
        )
    value = partitions.values[batch] if partitions.values is not None else str(batch)
    return FetchInputs(cursor=value, source_digest=digest)


def _create_job(run: IngestRun, status: IngestRunStatus, following: NextAttempt) -> CreateJob:
    if following.step.stage is not Stage.FETCH:
        return CreateJob(attempt=following)
    told = fetch_inputs(run, status, following.batch)
    return CreateJob(
        attempt=following,
        cursor=told.cursor,
        limit=told.limit,
        source_digest=told.source_digest,
        state=told.state,
    )
