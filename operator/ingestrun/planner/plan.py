"""The planner, which turns a snapshot of a run into its new status and the objects to create, delete and announce.

The planner is pure: it has no client and no clock, keeps no state, and decides the same from the same snapshot. So
a restarted operator needs no memory, a missed event does no harm, and each rule has a table test.
"""

from __future__ import annotations

from dataclasses import replace

from ingestrun.planner.actions import CreateRejection, Decision, Plan
from ingestrun.planner.batch.pipeline import config_refusal, steps_of
from ingestrun.planner.jobs.sidecars import pods_to_end
from ingestrun.planner.run.active import progress, stalled
from ingestrun.planner.run.cancel import cancel
from ingestrun.planner.run.completion import failed
from ingestrun.planner.run.concurrency import replacement_cause, start_block
from ingestrun.planner.run.drain import drain
from ingestrun.planner.run.hold import hold
from ingestrun.planner.run.resume import TakenOver, resume
from ingestrun.planner.snapshot import Snapshot
from ingestrun.planner.status import conditions as c
from ingestrun.planner.status.events import events_between, skipped_events
from ingestrun.planner.status.writer import finish_status


def plan(snapshot: Snapshot) -> Plan:
    """Decide the new status of one run, and the actions once it is stored, from the snapshot alone."""
    decision = _decide(snapshot)
    return decision if isinstance(decision, Plan) else _finish(snapshot, decision)


def _decide(snapshot: Snapshot) -> Decision | Plan:
    """Choose by the state of the run: ended, to be cancelled, being deleted, held, or active."""
    run = snapshot.run
    if run.status.ended:
        return drain(snapshot)
    if run.spec.cancel or snapshot.parent is not None:
        return cancel(snapshot)  # also one that is being deleted: a finalizer may hold it for ever, and its Jobs run
    if run.metadata.deletion_timestamp is not None:
        return Plan(status=run.status)
    cause = replacement_cause(run, snapshot.peers)
    if run.cancel_requested:
        # Only the label asks for the cancel: the request was taken back, or the operator set the label before its own
        # cancel.
        cause = cause or (stalled(snapshot) if not run.unreadable else None)
    if run.cancel_requested or cause is not None:
        return cancel(snapshot, cause=cause)
    return hold(snapshot) if run.unreadable else _begin_or_progress(snapshot)


def _begin_or_progress(snapshot: Snapshot) -> Decision | Plan:
    """Let an active run go on, or begin (where it resumes, if it does) unless its spec or another run prevents that."""
    if snapshot.run.status.start_time is None:
        refusal = config_refusal(steps_of(snapshot.run.spec))
        if refusal is not None:
            return failed(snapshot, snapshot.run.status, "InvalidSpec", refusal)
    block = start_block(snapshot.run, snapshot.peers)
    if block is not None:
        if block.final:
            rejection = CreateRejection(
                reason=block.reason, message=block.message, retry_at=snapshot.now, permanent=True
            )
            snapshot = replace(snapshot, rejection=rejection)
        return progress(snapshot, block=block)
    resumed = resume(snapshot)
    if resumed is None:
        return progress(snapshot)
    if not isinstance(resumed, TakenOver):
        return resumed
    begun = progress(replace(snapshot, run=snapshot.run.model_copy(update={"status": resumed.status})))
    return replace(begun, plan=replace(begun.plan, events=(*begun.plan.events, resumed.event)))


def _finish(snapshot: Snapshot, decision: Decision) -> Plan:
    """Finish the status, once, and add the Events for its change, and the pods to end."""
    run, before = snapshot.run, snapshot.run.status
    status = finish_status(
        run, decision.plan.status, phase=decision.phase, conditions=decision.conditions, now=snapshot.now
    )
    if decision.pins is not None and (decision.pins_needed or status != before):
        status = status.replace(images=list(decision.pins))
    events = [*events_between(before, status), *decision.plan.events]
    if any(event.reason == c.DRAINED for event in events):
        events += skipped_events({*snapshot.skipped, *decision.plan.skips})
    pod_ends = pods_to_end(snapshot.attempts, decision.plan.job_deletions)
    return replace(decision.plan, status=status, events=tuple(events), pod_ends=pod_ends)
