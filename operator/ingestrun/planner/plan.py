"""The planner: from a run and its Jobs to what its status should say and what to start, delete and announce.

Pure: it knows no client and no clock of its own, keeps nothing, and decides the same from the same state. So
a restarted operator needs no memory, an event that was missed costs nothing, and each rule has a table test.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import datetime

from ingestrun.model.run import IngestRun
from ingestrun.model.status import IngestRunStatus, Phase
from ingestrun.planner.actions import (
    CancelCause,
    CreateRejection,
    DeleteJob,
    Plan,
)
from ingestrun.planner.batch.attempt import NO_POD_RECHECK, QUEUED_AFTER, Attempt
from ingestrun.planner.batch.ledger import batch_states, in_flight, update_counters
from ingestrun.planner.batch.pipeline import ON_CANCEL_STEP
from ingestrun.planner.batch.state import CAPACITY_OBSTACLES, POD_START_GRACE, BatchState
from ingestrun.planner.jobs.image_pins import image_drift_events, newly_pinned, pinned_images
from ingestrun.planner.jobs.retention import jobs_to_delete
from ingestrun.planner.run.backpressure import (
    NOT_COUNTED_YET,
    backpressure_deadline,
    checkpointed_jobs,
    jobs_to_free_quota,
)
from ingestrun.planner.run.cancel import cancel
from ingestrun.planner.run.completion import (
    FIRST_ATTEMPT,
    backpressure_timed_out,
    completion_of,
    deadline_of,
    stale_at,
    stale_cause,
)
from ingestrun.planner.run.concurrency import StartBlock, replacement_cause, start_block
from ingestrun.planner.run.drain import drain
from ingestrun.planner.run.fair_sharing import Capacity
from ingestrun.planner.run.progress import with_unpublished
from ingestrun.planner.run.resume import TakenOver, resume
from ingestrun.planner.run.schedule import Schedule, schedule
from ingestrun.planner.snapshot import Snapshot
from ingestrun.planner.status import conditions as c
from ingestrun.planner.status.conditions import ConditionUpdate
from ingestrun.planner.status.events import Event, events_between, memory_raised_events, skipped_events
from ingestrun.planner.status.writer import (
    active_conditions,
    activity_condition,
    backpressure_conditions,
    finish_status,
    suspension_conditions,
)


def plan(snapshot: Snapshot) -> Plan:
    """Decide for one run, from the snapshot alone."""
    decided = _decide(snapshot)
    return replace(decided, events=all_events(snapshot, decided))


def all_events(snapshot: Snapshot, decided: Plan) -> tuple[Event, ...]:
    """Return all Events of a pass: of the change of status, of the decision itself, and once drained of the skips."""
    events = [*events_between(snapshot.run.status, decided.status), *decided.events]
    if any(event.reason == "Drained" for event in events):
        events += skipped_events({*snapshot.skipped, *(skip.key for skip in decided.skips)})
    return tuple(events)


def _decide(snapshot: Snapshot) -> Plan:
    run, jobs, now = snapshot.run, snapshot.attempts, snapshot.now
    refusal, live, parent, children = snapshot.rejection, snapshot.live, snapshot.parent, snapshot.children
    rivals, predecessors, capacity = snapshot.peers, snapshot.predecessors, snapshot.capacity
    stages = [job for job in jobs if job.job.step != ON_CANCEL_STEP]
    if run.status.ended:
        clean_up = next((job for job in jobs if job.job.step == ON_CANCEL_STEP), None)
        return drain(run, stages, clean_up, now=now, live=live, parent=parent, children=children)
    if run.metadata.deletion_timestamp is not None:
        return Plan(status=run.status)
    if run.spec.cancel or parent is not None:
        return cancel(run, stages, now=now, parent=parent)
    cause = replacement_cause(run, rivals)
    if run.cancel_requested:
        # By the mark alone: of a request that was taken back, or the operator's own before it wrote the rest.
        cause = cause or stale_cause_of(run, stages, now=now)
    if run.cancel_requested or cause is not None:
        return cancel(run, stages, now=now, parent=None, cause=cause)
    bar = start_block(run, rivals)
    if bar is not None and bar.final:
        refusal = CreateRejection(reason=bar.reason, message=bar.message, retry_at=now, permanent=True)
    resumed = resume(run, predecessors, now=now) if bar is None else None
    if isinstance(resumed, Plan):
        return resumed
    if isinstance(resumed, TakenOver):
        begins = run.model_copy(update={"status": resumed.status})
        begun = progress(begins, stages, now=now, refusal=refusal, capacity=capacity)
        return replace(begun, events=(*begun.events, resumed.tell))
    return progress(run, stages, now=now, refusal=refusal, bar=bar, capacity=capacity)


def stale_cause_of(run: IngestRun, jobs: Sequence[Attempt], *, now: datetime) -> CancelCause | None:
    """Whether the run has stood still for too long."""
    if run.spec.stale_after_seconds is None:
        return None
    batches = batch_states(run, jobs, now=now)
    status = update_counters(run.status, batches, chained=run.spec.batches.cursor is not None, now=now)
    flight = [batch for batch in batches if batch.index in in_flight(status.batches)]
    still = stale_at(run, status, flight, jobs, now=now)
    return stale_cause(run) if still is not None and now >= still else None


def progress(
    run: IngestRun,
    jobs: Sequence[Attempt],
    *,
    now: datetime,
    refusal: CreateRejection | None,
    bar: StartBlock | None = None,
    capacity: Capacity | None = None,
) -> Plan:
    """Decide for a run that has not ended and is not to be cancelled: account, then end, wait, or start more."""
    spec, old = run.spec, run.status
    batches = batch_states(run, jobs, now=now)
    status = update_counters(old, batches, chained=spec.batches.cursor is not None, now=now)
    status = with_unpublished(run, status, batches)
    by_index = {batch.index: batch for batch in batches}
    flight = [by_index[index] for index in in_flight(status.batches)]

    pins = pinned_images(run, jobs)
    over = (status.batches.published | status.batches.failed) - old.batches.published - old.batches.failed
    tell = image_drift_events(pins, run, (job for job in jobs if job.job.batch in over))
    end = completion_of(run, status, batches, flight, refusal=refusal, now=now)
    if end is not None:
        return Plan(status=end, events=tell, requeue_at=now)

    started = Schedule(status=status, bulk_deletion=jobs_to_free_quota(run, jobs, capacity))
    if not spec.suspend and bar is None:
        started = schedule(run, status, flight, jobs, refusal=refusal, capacity=capacity, now=now)
    status, creates, held = started.status, started.creates, started.backpressure

    due = list(started.rechecks)
    still = stale_at(run, status, flight, jobs, now=now)
    if still is not None and not any(create.start.attempt == FIRST_ATTEMPT for create in creates):
        if now >= still:
            return cancel(run, jobs, now=now, parent=None, cause=stale_cause(run))
        due.append(still)
    full = held if held is not None and held.reason != NOT_COUNTED_YET else None
    patience = backpressure_deadline(run, jobs, now=now) if full is not None and not creates else None
    if patience is not None and full is not None:
        if now >= patience:
            return Plan(status=backpressure_timed_out(run, status, full.reason, full.message, now=now), requeue_at=now)
        due.append(patience)
    deadline = deadline_of(run, status, now=now)
    if deadline is not None:
        due.append(deadline)
    due += [at for batch in flight for at in _rechecks(batch, now)]

    phase = Phase.SUSPENDED if spec.suspend else Phase.RUNNING if status.batches.claimed else Phase.PENDING
    stuck = next((batch for batch in flight if batch.obstacle is not None), None)
    doing = activity_condition(phase, batches, stuck, full, now=now)
    if bar is not None:
        doing = ConditionUpdate(type=c.RECONCILING, status="True", reason=bar.reason, message=bar.message)
    claims = [*active_conditions(phase, doing), *backpressure_conditions(run, held), *suspension_conditions(run)]
    status = finish_status(run, status, phase=phase, claims=claims, now=now)
    fresh = newly_pinned(old.images, pins)
    if fresh and (status != old or any(create.start.step.index in fresh for create in creates)):
        # Goes along with another write, or with the first Job that is to run it: no write of its own for each pod.
        status = status.replace(images=pins)
    return Plan(
        status=status,
        creates=creates,
        job_deletions=(*_unfinished_of_failed(status, jobs), *checkpointed_jobs(run, jobs)),
        bulk_deletion=started.bulk_deletion or jobs_to_delete(run, jobs),
        events=(
            *tell,
            *memory_raised_events(
                old, status, (batch.next_attempt for batch in flight if batch.next_attempt is not None)
            ),
        ),
        unmet_demand=held.unmet_demand if held is not None else 0,
        requeue_at=min(due, default=None),
    )


def _unfinished_of_failed(status: IngestRunStatus, jobs: Sequence[Attempt]) -> Iterator[DeleteJob]:
    """What still runs, or waits, of batches that have failed."""
    for job in jobs:
        if not job.state.finished and not job.job.deleting and job.job.batch in status.batches.failed:
            yield DeleteJob(job=job.job, pod=job.pod)


def _rechecks(batch: BatchState, now: datetime) -> Iterator[datetime]:
    """When a Job whose pod does not start, or that waits without one, is of interest though nothing happens to it."""
    if batch.obstacle is not None and batch.obstacle.kind not in CAPACITY_OBSTACLES:
        yield batch.obstacle.since + POD_START_GRACE
    job = batch.running
    if job is None:
        return
    if job.queued:
        told = (job.job.created or now) + QUEUED_AFTER
        if told > now:
            yield told
        return
    at = job.lacks_pod_at
    if at is not None:
        yield max(at, now + NO_POD_RECHECK) if now >= at else at
