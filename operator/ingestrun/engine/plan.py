"""The planner: from a run and its Jobs to what its status should say and what to start, delete and announce.

Pure: it knows no client and no clock of its own, keeps nothing, and decides the same from the same state. So
a restarted operator needs no memory, an event that was missed costs nothing, and each rule has a table test.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from itertools import repeat

from ingestrun.engine import conditions as c
from ingestrun.engine.accounting import (
    accounted,
    again_limit,
    assess_all,
    claimable,
    cursor_of,
    fetch_limit,
    in_flight,
    next_claims,
    parked_of,
    pending_gaps,
    with_,
)
from ingestrun.engine.announce import memory_raised
from ingestrun.engine.batches import NO_ROOM, START_GRACE, Batch, Start
from ingestrun.engine.cancelling import cancel
from ingestrun.engine.capacity import NOT_COUNTED_YET, gives_up_at, held_back, made_room, used_up
from ingestrun.engine.concurrency import Bar, Rival, bar_of, replaced
from ingestrun.engine.conditions import Claim
from ingestrun.engine.decisions import Cause, Child, Create, Delete, Live, Parent, Plan, Predecessor, Refusal
from ingestrun.engine.ending import end_of, out_of_patience
from ingestrun.engine.facts import NO_POD_RELOOK, QUEUED_AFTER, JobView
from ingestrun.engine.fairness import Capacity
from ingestrun.engine.gaps import with_gaps
from ingestrun.engine.images import moved, newly_pinned, pinned
from ingestrun.engine.lifetime import FIRST_ATTEMPT, deadline_of, stale, stale_at
from ingestrun.engine.parking import holds_room, unneeded, with_parked
from ingestrun.engine.resuming import Resumed, resume
from ingestrun.engine.retention import spent
from ingestrun.engine.saying import activity, said
from ingestrun.engine.settling import settle
from ingestrun.engine.steps import ON_CANCEL_STEP, steps_of
from ingestrun.model.contract import Stage
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
    if run.status.phase is not None and run.status.phase.ended:
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
    spec, old = run.spec, run.status
    batches = assess_all(run, jobs, now=now)
    status = accounted(old, batches, chained=spec.batches.cursor is not None, now=now)
    status = with_gaps(run, status, batches)
    old_flight = {batch.index: batch for batch in batches}
    flight = [old_flight[index] for index in in_flight(status.batches)]

    pins = pinned(run, jobs)
    over = (status.batches.published | status.batches.failed) - old.batches.published - old.batches.failed
    tell = moved(pins, run, (job for job in jobs if job.job.batch in over))
    end = end_of(run, status, batches, flight, refusal=refusal, now=now)
    if end is not None:
        return Plan(status=end, tell=tell, requeue_at=now)

    stuck = next((batch for batch in flight if batch.obstacle is not None), None)
    ready: list[Start] = []
    due: list[datetime] = []
    claims = 0
    may_start = not spec.suspend and bar is None
    if may_start:
        for start in (batch.start for batch in flight if batch.start is not None):
            if start.not_before is not None and start.not_before > now:
                due.append(start.not_before)
            else:
                ready.append(start)
        claims = max(0, min(spec.parallelism - len(flight), claimable(spec, status.batches, status.records)))
    wants = len(ready) + claims
    held = held_back(run, flight, refusal, capacity, wants=wants, now=now) if may_start else None
    room = made_room(run, jobs, capacity)
    if held is not None:
        # What is in flight goes before new batches, and first what has given up the places of its Jobs.
        parked = parked_of(status.batches)
        ready.sort(key=lambda start: (start.batch not in parked, start.batch))
        if room is None and used_up(capacity) and len(ready) > held.admits:
            waiting, before = [old_flight[start.batch] for start in ready], status
            status = with_parked(status, waiting, jobs, places=len(ready) - held.admits)
            due += [now] if status is not before else []
        if room is None and used_up(capacity) and not holds_room(flight, jobs):
            room = made_room(run, jobs, capacity, last=True)
        ready = ready[: held.admits]
        claims = min(claims, held.admits - len(ready))
    creates = [_create(run, status, start) for start in ready]
    if claims:
        fetch = steps_of(spec)[0]
        new = next_claims(status.batches, claims)
        for index in new:
            start = Start(batch=index, step=fetch, attempt=0, input_attempt=None)
            creates.append(_create(run, status, start))
        claimed = with_(status.batches, claimed=status.batches.claimed | new, redo=status.batches.redo - new)
        status = with_(status, batches=claimed, start_time=status.start_time or now)
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
    if held is not None and held.retry_at is not None and held.retry_at > now:
        due.append(held.retry_at)
    deadline = deadline_of(run, status, now=now)
    if deadline is not None:
        due.append(deadline)
    due += [
        batch.obstacle.since + START_GRACE for batch in flight if batch.obstacle and batch.obstacle.kind not in NO_ROOM
    ]
    due += [at for at in map(_next_look, flight, repeat(now)) if at is not None]

    phase = Phase.SUSPENDED if spec.suspend else Phase.RUNNING if status.batches.claimed else Phase.PENDING
    doing = activity(phase, batches, stuck, full, now=now)
    if bar is not None:
        doing = Claim(type=c.RECONCILING, status="True", reason=bar.reason, message=bar.message)
    claims_made = [
        Claim(type=c.SUCCEEDED, status="Unknown", reason=doing.reason, message=doing.message),
        Claim(type=c.FINISHED, status="False", reason=phase.value),
        doing,
    ]
    if full is not None:
        claims_made.append(Claim(type=c.BACKPRESSURED, status="True", reason=full.reason, message=full.message))
    elif held is None and old.condition(c.BACKPRESSURED):
        # Suspended, it asks for nothing: once it does again, the wait begins anew.
        reason = "Suspended" if spec.suspend else "RoomAgain"
        claims_made.append(Claim(type=c.BACKPRESSURED, status="False", reason=reason))
    if spec.suspend:
        claims_made.append(Claim(type=c.SUSPENDED, status="True", reason="Suspended"))
    elif old.condition(c.SUSPENDED):
        claims_made.append(Claim(type=c.SUSPENDED, status="False", reason="Resumed"))
    status = said(run, status, phase=phase, claims=claims_made, now=now)
    fresh = newly_pinned(old.images, pins)
    if fresh and (status != old or any(create.start.step.index in fresh for create in creates)):
        # Goes along with another write, or with the first Job that is to run it: no write of its own for each pod.
        status = with_(status, images=pins)
    return Plan(
        status=status,
        creates=tuple(creates),
        deletes=(
            *(
                Delete(job=job.job, pod=job.pod)
                for job in jobs
                if not job.state.finished and not job.job.deleting and job.job.batch in status.batches.failed
            ),
            *unneeded(run, jobs),
        ),
        spent=room or spent(run, jobs),
        tell=(*tell, *memory_raised(old, status, (batch.start for batch in flight if batch.start is not None))),
        asks=held.asks if held is not None else 0,
        requeue_at=min(due, default=None),
    )


def _next_look(batch: Batch, now: datetime) -> datetime | None:
    """When a Job that waits without a pod, or suspended, is of interest again though nothing has happened to it."""
    job = batch.running
    if job is None:
        return None
    if job.queued:
        told = (job.job.created or now) + QUEUED_AFTER
        return told if told > now else None
    at = job.lacks_pod_at
    return max(at, now + NO_POD_RELOOK) if at is not None and now >= at else at


def _create(run: IngestRun, status: IngestRunStatus, start: Start) -> Create:
    if start.step.stage is not Stage.FETCH:
        return Create(start=start)
    partitions = run.spec.batches.partitions
    gap = pending_gaps(status.batches).get(start.batch)
    if gap is not None:
        return Create(start=start, cursor=gap.cursor, limit=again_limit(gap))
    if partitions is None:
        return Create(start=start, cursor=cursor_of(run, status), limit=fetch_limit(run.spec, status.records))
    value = partitions.values[start.batch] if partitions.values is not None else str(start.batch)
    return Create(start=start, cursor=value)
