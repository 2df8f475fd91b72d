"""The cancel itself: the one write that makes a run Cancelled, and the starts that it prevents."""

from __future__ import annotations

from typing import Final

from ingestrun.model.contract import Stage
from ingestrun.model.run import IngestRun
from ingestrun.model.size_budget import REASON_CHARS, REQUESTER_CHARS
from ingestrun.model.spec import CancellationPolicy
from ingestrun.model.status import AttemptId, CancellationStatus, Phase
from ingestrun.model.text import pluralize, truncate
from ingestrun.planner.actions import CancelCause, CancelledParent, Decision, Plan
from ingestrun.planner.batch.ledger import claimable, next_claims
from ingestrun.planner.snapshot import Snapshot
from ingestrun.planner.status import conditions as c
from ingestrun.planner.status.conditions import ConditionUpdate
from ingestrun.planner.status.events import Event, warning
from ingestrun.planner.status.writer import backpressure_over

_REQUESTED: Final = "Requested"
"""The reason of the condition Cancelled of a run that was asked for by itself."""


def cancel(snapshot: Snapshot, *, cause: CancelCause | None = None) -> Decision:
    """Make the run Cancelled: because it asks for it, because a run above it is, or for the operator's own `cause`.

    Counters stay as they were stored, because batches in flight are accounted for under `status.cancellation`.
    """
    run = snapshot.run
    parent = snapshot.parent if cause is None else None
    # The label is no request of the run's own if the operator itself has put it on for the parent's.
    by_parent = parent if not run.spec.cancel else None
    reason, requester = _reason_and_requester(run, by_parent, cause)
    active = len(run.status.batches.in_flight)
    message = f"cancelled{f' by {requester}' if requester else ''}{f': {reason}' if reason else ''}"
    status = run.status.replace(
        completion_time=snapshot.now,
        cancellation=CancellationStatus(
            reason=truncate(reason, REASON_CHARS) if reason is not None else None,
            requested_by=truncate(requester, REQUESTER_CHARS) if requester is not None else None,
            policy=policy_of(run, parent),
            cascade=run.spec.cancellation.cascade or by_parent is not None,
            parent=by_parent.name if by_parent is not None else None,
            accepted_at=snapshot.now,
            active_batches=active,
        ),
    )
    kind = cause.kind if cause is not None else _REQUESTED if by_parent is None else "ParentCancelled"
    # The column REASON shows it, and that somebody asked is in the message.
    told = c.CANCELLED if kind == _REQUESTED else kind
    draining = pluralize(active, "batch in flight", "batches in flight")
    unasked = not run.spec.cancel and by_parent is None and cause is None
    return Decision(
        plan=Plan(
            status=status,
            skips=skipped_starts(snapshot),
            fence=True,
            events=(cancel_cleared_event(run),) if unasked else (),
            requeue_at=snapshot.now,
        ),
        phase=Phase.CANCELLED,
        conditions=[
            ConditionUpdate(type=c.SUCCEEDED, status="False", reason=told, message=message),
            ConditionUpdate(type=c.FINISHED, status="True", reason="Cancelled", message=message),
            ConditionUpdate(type=c.CANCELLED, status="True", reason=kind, message=message),
            ConditionUpdate(type=c.DRAINED, status="False", reason="Draining", message=draining),
            # To kstatus a cancelled run is Failed at once: what comes after it must not take its data for delivered.
            ConditionUpdate(type=c.RECONCILING, status="False", reason="Finished"),
            ConditionUpdate(type=c.STALLED, status="True", reason=told, message=message),
            *backpressure_over(run.status),
        ],
    )


def _reason_and_requester(
    run: IngestRun, parent: CancelledParent | None, cause: CancelCause | None
) -> tuple[str | None, str | None]:
    """Return the reason and the requester of the cancel."""
    if cause is not None:
        return cause.reason, cause.requested_by
    if parent is not None:
        reason = f"{parent.name} was cancelled" + (f": {parent.reason}" if parent.reason else "")
        return reason, parent.requested_by
    return run.spec.cancellation.reason, run.metadata.cancel_requested_by


def cancel_cleared_event(run: IngestRun) -> Event:
    """Return the Event that answers a `spec.cancel` that was taken back."""
    note = "spec.cancel was cleared, which changes nothing: a cancel is final. To go on, create a new run"
    note += f" with resumeFrom: {{name: {run.metadata.name}}}"
    return warning("CancelCleared", note, action="Ignore")


def policy_of(run: IngestRun, parent: CancelledParent | None) -> CancellationPolicy:
    """Return the policy for started pods. Terminate stays once it was requested: here, above, or in the status."""
    stored = run.status.cancellation.policy if run.status.cancellation is not None else None
    requested = (stored, run.spec.cancellation.policy, parent.policy if parent is not None else None)
    return CancellationPolicy.TERMINATE if CancellationPolicy.TERMINATE in requested else CancellationPolicy.DRAIN


def skipped_starts(snapshot: Snapshot) -> tuple[AttemptId, ...]:
    """Return the attempts that would start now, or once a backoff is over, if the run were not cancelled.

    A run that is held would start none. What a pool's worker has begun, the worker itself tells; so of an ended run's
    pool there is nothing more to tell than at its end.
    """
    run = snapshot.run
    if run.unreadable or (run.spec.pooled and run.status.ended):
        return ()
    status = snapshot.status
    held = {entry.batch for entry in run.status.workers or ()}
    skips = [batch.next_attempt.id for batch in snapshot.batches if batch.next_attempt and batch.index not in held]
    more = claimable(run.spec, status.batches, status.records)
    if more and len(snapshot.batches) < run.spec.parallelism:
        (following,) = next_claims(status.batches, 1)
        skips.append(AttemptId(following, Stage.FETCH.value, 0))
    return tuple(skips)
