"""The planner: from a run and its Jobs to what its status should say and what to start, delete and announce.

Pure: it knows no client and no clock of its own, keeps nothing, and decides the same from the same state. So
a restarted operator needs no memory, an event that was missed costs nothing, and each rule has a table test.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime

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
    pending_gaps,
    with_,
)
from ingestrun.engine.batches import START_GRACE, Start
from ingestrun.engine.cancelling import cancel
from ingestrun.engine.capacity import held_back
from ingestrun.engine.conditions import Claim
from ingestrun.engine.decisions import Child, Create, Delete, Live, Parent, Plan, Predecessor, Refusal
from ingestrun.engine.ending import deadline_of, end_of, spent_blocks
from ingestrun.engine.facts import JobView
from ingestrun.engine.gaps import with_gaps
from ingestrun.engine.resuming import Resumed, resume
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
    predecessor: Predecessor | None = None,
) -> Plan:
    """Decide for one run.

    `jobs` are all that are known of the run. An ended run that is not drained is judged only by `live` ones:
    without them nothing is said about the drain. `parent` is a run above that is Cancelled with `cascade`;
    `children` are the runs right below, of interest once this one is Cancelled itself. `predecessor` is the run
    that `spec.resumeFrom` names, of interest until this one has taken over from it.
    """
    stages = [job for job in jobs if job.job.step != ON_CANCEL_STEP]
    if run.status.phase is not None and run.status.phase.ended:
        clean_up = next((job for job in jobs if job.job.step == ON_CANCEL_STEP), None)
        return settle(run, stages, clean_up, now=now, live=live, parent=parent, children=children)
    if run.metadata.deletion_timestamp is not None:
        return Plan(status=run.status)
    if run.spec.cancel or parent is not None:
        return cancel(run, stages, now=now, parent=parent)
    resumed = resume(run, predecessor, now=now)
    if isinstance(resumed, Plan):
        return resumed
    if isinstance(resumed, Resumed):
        begun = advance(run.model_copy(update={"status": resumed.status}), stages, now=now, refusal=refusal)
        return replace(begun, tell=(*begun.tell, resumed.tell))
    return advance(run, stages, now=now, refusal=refusal)


def advance(run: IngestRun, jobs: Sequence[JobView], *, now: datetime, refusal: Refusal | None) -> Plan:
    spec, old = run.spec, run.status
    batches = assess_all(run, jobs, now=now)
    status = accounted(old, batches, chained=spec.batches.cursor is not None, now=now)
    status = with_gaps(run, status, batches)
    old_flight = {batch.index: batch for batch in batches}
    flight = [old_flight[index] for index in in_flight(status.batches)]

    end = end_of(run, status, batches, flight, refusal=refusal, now=now)
    if end is not None:
        return Plan(status=end, requeue_at=now)

    stuck = next((batch for batch in flight if batch.obstacle is not None), None)
    held = held_back(flight, refusal, now=now)
    creates: list[Create] = []
    due: list[datetime] = []
    if not spec.suspend and (held is None or held.probe):
        for start in (batch.start for batch in flight if batch.start is not None):
            if start.not_before is not None and start.not_before > now:
                due.append(start.not_before)
            else:
                creates.append(_create(run, status, start))
        claims = max(0, min(spec.parallelism - len(flight), claimable(spec, status.batches, status.records)))
        if held is not None:
            # One Job asks whether there is room again; the rest waits for the answer.
            creates, claims = creates[:1], 0 if creates else min(claims, 1)
        if claims:
            fetch = steps_of(spec)[0]
            new = next_claims(status.batches, claims)
            for index in new:
                start = Start(batch=index, step=fetch, attempt=0, input_attempt=None)
                creates.append(_create(run, status, start))
            claimed = with_(status.batches, claimed=status.batches.claimed | new, redo=status.batches.redo - new)
            status = with_(status, batches=claimed, start_time=status.start_time or now)
        if held is not None and not creates:
            held = None

    if held is not None and held.retry_at is not None and held.retry_at > now:
        due.append(held.retry_at)
    deadline = deadline_of(run, status)
    if deadline is not None:
        due.append(deadline)
    due += [
        batch.obstacle.since + START_GRACE
        for batch in flight
        if batch.obstacle and batch.obstacle.kind != "Unschedulable"
    ]

    phase = Phase.SUSPENDED if spec.suspend else Phase.RUNNING if status.batches.claimed else Phase.PENDING
    doing = activity(phase, batches, stuck, held)
    claims_made = [
        Claim(type=c.SUCCEEDED, status="Unknown", reason=doing.reason, message=doing.message),
        Claim(type=c.FINISHED, status="False", reason=phase.value),
        doing,
    ]
    if held is not None:
        claims_made.append(Claim(type=c.BACKPRESSURED, status="True", reason=held.reason, message=held.message))
    elif old.condition(c.BACKPRESSURED):
        claims_made.append(Claim(type=c.BACKPRESSURED, status="False", reason="RoomAgain"))
    return Plan(
        status=said(run, status, phase=phase, claims=claims_made, now=now),
        creates=tuple(creates),
        deletes=tuple(
            Delete(job=job.job, pod=job.pod)
            for job in jobs
            if not job.state.finished and not job.job.deleting and job.job.batch in status.batches.failed
        ),
        delete_blocks=spent_blocks(old.batches, jobs),
        requeue_at=min(due, default=None),
    )


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
