"""The pass for an active run, one that has not ended and is not to be cancelled: it ends, waits, or starts more."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime

from ingestrun.model.run import IngestRun
from ingestrun.model.status import ImagePin, Phase
from ingestrun.planner.actions import CancelCause, Decision, DeleteJob, Plan
from ingestrun.planner.batch.attempt import QUEUED_AFTER, Attempt, JobState, stuck_message
from ingestrun.planner.batch.pod_start import next_look_at_start
from ingestrun.planner.batch.state import BatchState
from ingestrun.planner.jobs.image_pins import image_drift_events, newly_pinned, pinned_images
from ingestrun.planner.jobs.retention import jobs_to_delete
from ingestrun.planner.pool.schedule import pool_schedule
from ingestrun.planner.run.backpressure import Backpressure, backpressure_deadline
from ingestrun.planner.run.cancel import cancel
from ingestrun.planner.run.checkpoints import checkpointed_jobs
from ingestrun.planner.run.completion import (
    FIRST_ATTEMPT,
    backpressure_timed_out,
    completion_of,
    deadline_of,
    failed,
    stale_at,
    stale_cause,
)
from ingestrun.planner.run.concurrency import StartBlock
from ingestrun.planner.run.schedule import Schedule, nothing_scheduled, schedule
from ingestrun.planner.snapshot import Snapshot
from ingestrun.planner.status import conditions as c
from ingestrun.planner.status.conditions import ConditionUpdate
from ingestrun.planner.status.events import QUEUED, SUSPENDED_NOTE, Event, memory_raised_events
from ingestrun.planner.status.writer import active_conditions, describe_failure


def progress(snapshot: Snapshot, *, block: StartBlock | None = None) -> Decision:
    """Decide for an active run. `block` is why it may not begin, because of another run of its concurrency key."""
    run = snapshot.run
    pins = pinned_images(run, snapshot.started)
    drift = _image_drift(snapshot, pins)
    end = completion_of(snapshot)
    if end is not None:
        return _with_events(end, drift)

    may_start = not run.spec.suspend and block is None
    if run.spec.pooled:
        scheduled = pool_schedule(snapshot, may_start=may_start)
        if scheduled.failure is not None:
            return failed(snapshot, scheduled.status, *scheduled.failure)
    else:
        scheduled = schedule(snapshot) if may_start else nothing_scheduled(snapshot)
    due = list(scheduled.rechecks)
    over = _time_over(snapshot, scheduled, due)
    if over is not None:
        return over

    status, creates = scheduled.status, scheduled.creates
    phase = Phase.SUSPENDED if run.spec.suspend else Phase.RUNNING if status.batches.claimed else Phase.PENDING
    fresh = newly_pinned(run.status.images, pins)
    next_attempts = (batch.next_attempt for batch in snapshot.in_flight if batch.next_attempt is not None)
    return Decision(
        plan=Plan(
            status=status,
            creates=creates,
            job_deletions=(*_unfinished_of_failed(snapshot), *checkpointed_jobs(snapshot), *scheduled.job_deletions),
            pod_deletions=scheduled.pod_deletions,
            bulk_deletion=scheduled.bulk_deletion or jobs_to_delete(run, snapshot.stages),
            events=(*drift, *memory_raised_events(run.status, status, next_attempts)),
            answers=scheduled.answers,
            misses_jobs=scheduled.misses_jobs,
            unmet_demand=scheduled.backpressure.unmet_demand if scheduled.backpressure is not None else 0,
            requeue_at=min(due, default=None),
        ),
        phase=phase,
        conditions=[
            *active_conditions(phase, _reconciling(snapshot, phase, scheduled.backpressure, block)),
            *_backpressured(run, scheduled.backpressure),
            *_suspended(run),
        ],
        pins=pins if fresh else None,
        pins_needed=any(create.attempt.step.index in fresh for create in creates),
    )


def stalled(snapshot: Snapshot) -> CancelCause | None:
    """Return a cause if the run has stood still for too long, even if it could start a Job now."""
    still = stale_at(snapshot, snapshot.status)
    return stale_cause(snapshot.run) if still is not None and snapshot.now >= still else None


def _time_over(snapshot: Snapshot, scheduled: Schedule, due: list[datetime]) -> Decision | None:
    """End the run if one of its deadlines is over; else add to `due` the deadlines and the times to recheck Jobs."""
    now, status, held = snapshot.now, scheduled.status, scheduled.backpressure
    still = stale_at(snapshot, status)
    begins = any(create.attempt.number == FIRST_ATTEMPT and not create.worker for create in scheduled.creates)
    if still is not None and not begins:
        if now >= still:
            return cancel(snapshot, cause=stale_cause(snapshot.run))
        due.append(still)
    if held is not None and held.reason is not None and not scheduled.creates:
        gives_up = backpressure_deadline(snapshot)
        if gives_up is not None and now >= gives_up:
            return backpressure_timed_out(snapshot, status, held.reason, held.message)
        due += [gives_up] if gives_up is not None else []
    deadline = deadline_of(snapshot.run, status, now=now)
    due += [deadline] if deadline is not None else []
    due += _all_rechecks(snapshot)
    return None


def _all_rechecks(snapshot: Snapshot) -> Iterator[datetime]:
    """Yield when the Jobs of the run need a look although no event comes."""
    for batch in snapshot.in_flight:
        yield from _rechecks(batch, snapshot.now)
    for worker in snapshot.workers:
        yield from _rechecks_of(worker, snapshot.now)


def _image_drift(snapshot: Snapshot, pins: list[ImagePin]) -> tuple[Event, ...]:
    """Return Events about batches that ended now and ran another image than the pinned one."""
    before, after = snapshot.run.status.batches, snapshot.status.batches
    ended = (after.published | after.failed) - before.published - before.failed
    attempts = (attempt for attempt in snapshot.stages if attempt.batch in ended)
    return image_drift_events(pins, snapshot.run, attempts)


def _with_events(decision: Decision, events: tuple[Event, ...]) -> Decision:
    return replace(decision, plan=replace(decision.plan, events=(*decision.plan.events, *events)))


def _unfinished_of_failed(snapshot: Snapshot) -> Iterator[DeleteJob]:
    """Yield the deletions of Jobs of failed batches that still run or wait."""
    failed = snapshot.status.batches.failed
    for attempt in snapshot.stages:
        if not attempt.state.finished and not attempt.job.deleting and attempt.batch in failed:
            yield DeleteJob(job=attempt.job, pod=attempt.pod)


def _rechecks(batch: BatchState, now: datetime) -> Iterator[datetime]:
    """Yield when a Job whose pod does not start or end, or that has no pod, needs a look although no event comes."""
    if batch.running_until is not None:
        yield batch.running_until
    if batch.running is not None:
        yield from _rechecks_of(batch.running, now)


def _rechecks_of(attempt: Attempt, now: datetime) -> Iterator[datetime]:
    stuck_at = attempt.pod.stuck_at if attempt.pod is not None else None
    if stuck_at is not None and stuck_at > now:
        yield stuck_at
    if attempt.queued:
        reported = (attempt.job.created or now) + QUEUED_AFTER
        if reported > now:
            yield reported
        return
    at = next_look_at_start(attempt, now=now)
    if at is not None:
        yield at


def _reconciling(
    snapshot: Snapshot, phase: Phase, held: Backpressure | None, block: StartBlock | None
) -> ConditionUpdate:
    """Return the condition Reconciling: the run's activity, or the obstacle to it."""
    reason, message = _activity(snapshot, phase, held)
    if block is not None:
        reason, message = block.reason, block.message
    return ConditionUpdate(type=c.RECONCILING, status="True", reason=reason, message=message)


def _activity(snapshot: Snapshot, phase: Phase, held: Backpressure | None) -> tuple[str, str]:
    """Return the activity of a run, or the obstacle to it, as reason and message."""
    not_starting = _not_starting(snapshot)
    if not_starting is not None:
        return "PodNotStarting", not_starting
    if held is not None and held.reason is not None:
        return "Backpressured", held.message
    pods = [batch.running.pod for batch in snapshot.in_flight if batch.running is not None]
    pods += [worker.pod for worker in snapshot.workers]
    lost = [pod for pod in pods if pod is not None and pod.is_stuck(snapshot.now)]
    if lost:
        return c.POD_STUCK_TERMINATING, stuck_message(lost)
    return _undisturbed_activity(snapshot, phase)


def _not_starting(snapshot: Snapshot) -> str | None:
    """Return which pod does not start, and why, if that matters: a worker's only while no other runs."""
    attempts = [batch.running for batch in snapshot.in_flight if batch.running is not None]
    if not any(worker.state is JobState.RUNNING for worker in snapshot.workers):
        attempts += snapshot.workers
    for attempt in attempts:
        if attempt.obstacle is not None:
            what = "worker" if attempt.worker else "batch"
            return f"{what} {attempt.batch}, Job {attempt.job.name}: {attempt.obstacle.message}"
    return None


def _undisturbed_activity(snapshot: Snapshot, phase: Phase) -> tuple[str, str]:
    """Return the activity of a run to which there is no obstacle."""
    if phase is Phase.RUNNING:
        if _waits_for_admission(snapshot):
            return QUEUED, "its Jobs are suspended until Kueue, or the user who suspended them, admits them"
        retried = [
            batch
            for batch in snapshot.batches
            if batch.next_attempt is not None and batch.next_attempt.number and batch.failures
        ]
        if retried:
            return "Retrying", describe_failure(retried[0].failures[-1])
    return phase.value, SUSPENDED_NOTE if phase is Phase.SUSPENDED else ""


def _waits_for_admission(snapshot: Snapshot) -> bool:
    """Tell whether all Jobs of the run have waited to be admitted for longer than an admission takes."""
    running = [batch.running for batch in snapshot.batches if batch.running is not None]
    running += [worker for worker in snapshot.workers if not worker.state.finished]
    return bool(running) and all(
        attempt.queued and (attempt.job.created is None or snapshot.now >= attempt.job.created + QUEUED_AFTER)
        for attempt in running
    )


def _backpressured(run: IngestRun, held: Backpressure | None) -> list[ConditionUpdate]:
    """Return the condition Backpressured. Empty while Jobs are still counted, or if the run was never held back."""
    if held is not None:
        if held.reason is None:
            return []
        return [ConditionUpdate(type=c.BACKPRESSURED, status="True", reason=held.reason, message=held.message)]
    if run.status.condition(c.BACKPRESSURED) is None:
        return []
    # A suspended run asks for no Job; once it is resumed, the wait begins anew.
    reason = "Suspended" if run.spec.suspend else c.CAPACITY_AVAILABLE
    return [ConditionUpdate(type=c.BACKPRESSURED, status="False", reason=reason)]


def _suspended(run: IngestRun) -> list[ConditionUpdate]:
    """Return the condition Suspended; empty if the run never was."""
    if run.spec.suspend:
        return [ConditionUpdate(type=c.SUSPENDED, status="True", reason="Suspended")]
    if run.status.condition(c.SUSPENDED) is None:
        return []
    return [ConditionUpdate(type=c.SUSPENDED, status="False", reason="Resumed")]
