"""The cancel itself: the one write that makes a run Cancelled, and what it keeps from being started."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from ingestrun.model.contract import Stage
from ingestrun.model.run import IngestRun
from ingestrun.model.spec import CancellationPolicy
from ingestrun.model.status import CancellationStatus, Phase
from ingestrun.planner.actions import CancelCause, CancelledParent, Plan, SkippedStart
from ingestrun.planner.batch.attempt import Attempt
from ingestrun.planner.batch.ledger import batch_states, claimable, in_flight, next_claims, update_counters
from ingestrun.planner.status import conditions as c
from ingestrun.planner.status.conditions import ConditionUpdate
from ingestrun.planner.status.events import Event, warning
from ingestrun.planner.status.writer import backpressure_over, finish_status, pluralize


def cancel(
    run: IngestRun,
    jobs: Sequence[Attempt],
    *,
    now: datetime,
    parent: CancelledParent | None,
    cause: CancelCause | None = None,
) -> Plan:
    """Make the run Cancelled, because it asks for it, because a run above it is, or for the operator's own `cause`.

    Counters stay as they were stored: what was in flight is told apart, under `status.cancellation`.
    """
    wanted = run.spec.cancellation
    # The label is no request of the run's own where the operator itself has put it on for the parent's.
    by_parent = parent if not run.spec.cancel else None
    reason, who = wanted.reason, run.metadata.cancel_requested_by
    if by_parent is not None:
        reason = f"{by_parent.name} was cancelled" + (f": {by_parent.reason}" if by_parent.reason else "")
        who = by_parent.requested_by
    if cause is not None:
        reason, who = cause.reason, cause.requested_by
    flight = in_flight(run.status.batches)
    message = f"cancelled{f' by {who}' if who else ''}{f': {reason}' if reason else ''}"
    status = run.status.replace(
        completion_time=now,
        cancellation=CancellationStatus(
            reason=reason,
            requested_by=who,
            policy=policy_of(run, parent),
            cascade=wanted.cascade or by_parent is not None,
            parent=by_parent.name if by_parent is not None else None,
            accepted_at=now,
            active_batches=len(flight),
        ),
    )
    flying = pluralize(len(flight), "batch in flight", "batches in flight")
    status = finish_status(
        run,
        status,
        phase=Phase.CANCELLED,
        claims=[
            ConditionUpdate(type=c.SUCCEEDED, status="False", reason="Cancelled", message=message),
            ConditionUpdate(type=c.FINISHED, status="True", reason="Cancelled", message=message),
            ConditionUpdate(
                type=c.CANCELLED,
                status="True",
                reason=cause.kind if cause is not None else "Requested" if by_parent is None else "ParentCancelled",
                message=message,
            ),
            ConditionUpdate(type=c.DRAINED, status="False", reason="Draining", message=flying),
            ConditionUpdate(type=c.RECONCILING, status="True", reason="Draining"),
            *backpressure_over(run.status),
        ],
        now=now,
    )
    return Plan(
        status=status,
        skips=skipped_starts(run, jobs, now=now),
        fence=True,
        events=() if run.spec.cancel or by_parent is not None or cause is not None else (cancel_cleared_event(run),),
        requeue_at=now,
    )


def cancel_cleared_event(run: IngestRun) -> Event:
    """The answer to a `spec.cancel` that was taken back."""
    note = "spec.cancel was cleared, which changes nothing: a cancel is final. To go on, create a new run"
    note += f" with resumeFrom: {{name: {run.metadata.name}}}"
    return warning("CancelCleared", note, action="Ignore")


def policy_of(run: IngestRun, parent: CancelledParent | None) -> CancellationPolicy:
    """What becomes of started pods. Terminate holds once it was asked for: here, above, or as the status has it."""
    stored = run.status.cancellation.policy if run.status.cancellation is not None else None
    asked = (stored, run.spec.cancellation.policy, parent.policy if parent is not None else None)
    return CancellationPolicy.TERMINATE if CancellationPolicy.TERMINATE in asked else CancellationPolicy.DRAIN


def skipped_starts(run: IngestRun, jobs: Sequence[Attempt], *, now: datetime) -> tuple[SkippedStart, ...]:
    """What would be started for this run now, or as soon as a retry is due, if it had not been cancelled."""
    batches = batch_states(run, jobs, now=now)
    starts = [batch.next_attempt for batch in batches if batch.next_attempt is not None]
    skips = [SkippedStart(batch=start.batch, stage=start.step.label, attempt=start.attempt) for start in starts]
    status = update_counters(run.status, batches, chained=run.spec.batches.cursor is not None, now=now)
    if claimable(run.spec, status.batches, status.records) and len(batches) < run.spec.parallelism:
        (following,) = next_claims(status.batches, 1)
        skips.append(SkippedStart(batch=following, stage=Stage.FETCH.value, attempt=0))
    return tuple(skips)
