"""The planner: from a run and its Jobs to what its status should say and what to start, delete and announce.

Pure: it knows no client and no clock of its own, keeps nothing, and decides the same from the same state. So
a restarted operator needs no memory, an event that was missed costs nothing, and each rule has a table test.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import datetime

from ingestrun.engine import conditions as c
from ingestrun.engine.accounting import accounted, assess_all, in_flight, with_
from ingestrun.engine.announce import memory_raised
from ingestrun.engine.batches import NO_ROOM, START_GRACE, Batch
from ingestrun.engine.cancelling import cancel
from ingestrun.engine.capacity import NOT_COUNTED_YET, gives_up_at, made_room
from ingestrun.engine.concurrency import Bar, Rival, bar_of, replaced
from ingestrun.engine.conditions import Claim
from ingestrun.engine.decisions import Cause, Child, Delete, Live, Parent, Plan, Predecessor, Refusal
from ingestrun.engine.ending import end_of, out_of_patience
from ingestrun.engine.facts import NO_POD_RELOOK, QUEUED_AFTER, JobView
from ingestrun.engine.fairness import Capacity
from ingestrun.engine.gaps import with_gaps
from ingestrun.engine.images import moved, newly_pinned, pinned
from ingestrun.engine.lifetime import FIRST_ATTEMPT, deadline_of, stale, stale_at
from ingestrun.engine.parking import unneeded
from ingestrun.engine.resuming import Resumed, resume
from ingestrun.engine.retention import spent
from ingestrun.engine.saying import activity, backpressure, said, suspension, under_way
from ingestrun.engine.settling import settle
from ingestrun.engine.starts import Starts, starts
from ingestrun.engine.steps import ON_CANCEL_STEP
from ingestrun.model.run import IngestRun
from ingestrun.model.status import IngestRunStatus, Phase


def plan(
    run: IngestRun,
    jobs: Sequence[JobView],
    *,
    now: datetime,
    refusal: Refusal | None = None,
    live: Live | None = None,
    parent: Parent | None = None,
    children: Sequence[Child] = (),
    rivals: Sequence[Rival] = (),
    predecessors: Sequence[Predecessor] | None = None,
    capacity: Capacity | None = None,
) -> Plan:
    """Decide for one run.

    `jobs` are all that are known of the run. An ended run that is not drained is judged only by `live` ones:
    without them nothing is said about the drain. `parent` is a run above that is Cancelled with `cascade`;
    `children` are the runs right below, of interest once this one is Cancelled itself. `rivals` are the other
    runs of its concurrency key; before a first batch is claimed they have to be listed live. `predecessors`
    are the runs that `spec.resumeFrom` is about, of interest until this one has taken over (None: nobody has looked):
    the one that it names, or those left of a saved state's row of resumes. `capacity` is what the
    operator's caps and the namespace's quota leave for this run among the others; None: no limit.
    """
    stages = [job for job in jobs if job.job.step != ON_CANCEL_STEP]
    if run.status.ended:
        clean_up = next((job for job in jobs if job.job.step == ON_CANCEL_STEP), None)
        return settle(run, stages, clean_up, now=now, live=live, parent=parent, children=children)
    if run.metadata.deletion_timestamp is not None:
        return Plan(status=run.status)
    if run.spec.cancel or parent is not None:
        return cancel(run, stages, now=now, parent=parent)
    cause = replaced(run, rivals)
    if run.cancel_requested:
        # By the mark alone: of a request that was taken back, or the operator's own before it wrote the rest.
        cause = cause or overdue(run, stages, now=now)
    if run.cancel_requested or cause is not None:
        return cancel(run, stages, now=now, parent=None, cause=cause)
    bar = bar_of(run, rivals)
    if bar is not None and bar.final:
        refusal = Refusal(reason=bar.reason, message=bar.message, retry_at=now, permanent=True)
    resumed = resume(run, predecessors, now=now) if bar is None else None
    if isinstance(resumed, Plan):
        return resumed
    if isinstance(resumed, Resumed):
        begins = run.model_copy(update={"status": resumed.status})
        begun = advance(begins, stages, now=now, refusal=refusal, capacity=capacity)
        return replace(begun, tell=(*begun.tell, resumed.tell))
    return advance(run, stages, now=now, refusal=refusal, bar=bar, capacity=capacity)


def overdue(run: IngestRun, jobs: Sequence[JobView], *, now: datetime) -> Cause | None:
    """Whether the run has stood still for too long."""
    if run.spec.stale_after_seconds is None:
        return None
    batches = assess_all(run, jobs, now=now)
    status = accounted(run.status, batches, chained=run.spec.batches.cursor is not None, now=now)
    flight = [batch for batch in batches if batch.index in in_flight(status.batches)]
    still = stale_at(run, status, flight, jobs, now=now)
    return stale(run) if still is not None and now >= still else None


def advance(
    run: IngestRun,
    jobs: Sequence[JobView],
    *,
    now: datetime,
    refusal: Refusal | None,
    bar: Bar | None = None,
    capacity: Capacity | None = None,
) -> Plan:
    """Decide for a run that has not ended and is not to be cancelled: account, then end, wait, or start more."""
    spec, old = run.spec, run.status
    batches = assess_all(run, jobs, now=now)
    status = accounted(old, batches, chained=spec.batches.cursor is not None, now=now)
    status = with_gaps(run, status, batches)
    by_index = {batch.index: batch for batch in batches}
    flight = [by_index[index] for index in in_flight(status.batches)]

    pins = pinned(run, jobs)
    over = (status.batches.published | status.batches.failed) - old.batches.published - old.batches.failed
    tell = moved(pins, run, (job for job in jobs if job.job.batch in over))
    end = end_of(run, status, batches, flight, refusal=refusal, now=now)
    if end is not None:
        return Plan(status=end, tell=tell, requeue_at=now)

    started = Starts(status=status, room=made_room(run, jobs, capacity))
    if not spec.suspend and bar is None:
        started = starts(run, status, flight, jobs, refusal=refusal, capacity=capacity, now=now)
    status, creates, held = started.status, started.creates, started.held

    due = list(started.looks)
    still = stale_at(run, status, flight, jobs, now=now)
    if still is not None and not any(create.start.attempt == FIRST_ATTEMPT for create in creates):
        if now >= still:
            return cancel(run, jobs, now=now, parent=None, cause=stale(run))
        due.append(still)
    full = held if held is not None and held.reason != NOT_COUNTED_YET else None
    patience = gives_up_at(run, jobs, now=now) if full is not None and not creates else None
    if patience is not None and full is not None:
        if now >= patience:
            return Plan(status=out_of_patience(run, status, full.reason, full.message, now=now), requeue_at=now)
        due.append(patience)
    deadline = deadline_of(run, status, now=now)
    if deadline is not None:
        due.append(deadline)
    due += [at for batch in flight for at in _looks(batch, now)]

    phase = Phase.SUSPENDED if spec.suspend else Phase.RUNNING if status.batches.claimed else Phase.PENDING
    stuck = next((batch for batch in flight if batch.obstacle is not None), None)
    doing = activity(phase, batches, stuck, full, now=now)
    if bar is not None:
        doing = Claim(type=c.RECONCILING, status="True", reason=bar.reason, message=bar.message)
    claims = [*under_way(phase, doing), *backpressure(run, held), *suspension(run)]
    status = said(run, status, phase=phase, claims=claims, now=now)
    fresh = newly_pinned(old.images, pins)
    if fresh and (status != old or any(create.start.step.index in fresh for create in creates)):
        # Goes along with another write, or with the first Job that is to run it: no write of its own for each pod.
        status = with_(status, images=pins)
    return Plan(
        status=status,
        creates=creates,
        deletes=(*_given_up(status, jobs), *unneeded(run, jobs)),
        spent=started.room or spent(run, jobs),
        tell=(*tell, *memory_raised(old, status, (batch.start for batch in flight if batch.start is not None))),
        asks=held.asks if held is not None else 0,
        requeue_at=min(due, default=None),
    )


def _given_up(status: IngestRunStatus, jobs: Sequence[JobView]) -> Iterator[Delete]:
    """What still runs, or waits, of batches that have failed."""
    for job in jobs:
        if not job.state.finished and not job.job.deleting and job.job.batch in status.batches.failed:
            yield Delete(job=job.job, pod=job.pod)


def _looks(batch: Batch, now: datetime) -> Iterator[datetime]:
    """When a Job whose pod does not start, or that waits without one, is of interest though nothing happens to it."""
    if batch.obstacle is not None and batch.obstacle.kind not in NO_ROOM:
        yield batch.obstacle.since + START_GRACE
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
        yield max(at, now + NO_POD_RELOOK) if now >= at else at
