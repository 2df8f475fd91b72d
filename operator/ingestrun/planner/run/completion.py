"""The end of a run by itself, as Succeeded or Failed, and the limits on its duration, its stalls and its retention."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from typing import Final

from ingestrun.model.contract import Stage
from ingestrun.model.names import OPERATOR_NAME
from ingestrun.model.run import IngestRun
from ingestrun.model.size_budget import MAX_FAILED_BATCHES
from ingestrun.model.spec import OnBatchFailure
from ingestrun.model.status import IngestRunStatus, Phase, StageFailure
from ingestrun.model.text import pluralize
from ingestrun.planner.actions import CancelCause, Decision, Plan
from ingestrun.planner.batch.attempt import JobState
from ingestrun.planner.batch.ledger import claimable
from ingestrun.planner.batch.state import BatchState
from ingestrun.planner.jobs.sidecars import left_running_words
from ingestrun.planner.snapshot import Snapshot
from ingestrun.planner.status import conditions as c
from ingestrun.planner.status.conditions import ConditionUpdate
from ingestrun.planner.status.writer import backpressure_over, describe_failure

FIRST_ATTEMPT: Final = 0
FULL: Final = frozenset({"JobLimitReached", "QuotaExceeded", "Unschedulable"})
"""Reasons of backpressure for which room is what is missing."""


def completion_of(snapshot: Snapshot) -> Decision | None:
    """Decide whether the run ends now; None while it goes on. The first reason that fits counts."""
    failure = next(_reasons_to_fail(snapshot), None)
    if failure is not None:
        return failed(snapshot, snapshot.status, *failure)
    spec, status = snapshot.run.spec, snapshot.status
    if snapshot.in_flight or not status.batches.claimed or claimable(spec, status.batches, status.records):
        return None
    if not status.batches.published:
        last = f"; the last: {describe_failure(status.failures[-1])}" if status.failures else ""
        message = f"{_batches(len(status.batches.failed))} failed, and none was published{last}"
        return failed(snapshot, status, "AllBatchesFailed", message)
    return _succeeded(snapshot, status)


def _batches(number: int) -> str:
    return pluralize(number, "batch", "batches")


def _reasons_to_fail(snapshot: Snapshot) -> Iterator[tuple[str, str]]:
    """Yield why the run fails now, as reason and message."""
    run, status = snapshot.run, snapshot.status
    if snapshot.rejection is not None and snapshot.rejection.permanent:
        yield snapshot.rejection.reason, snapshot.rejection.message
    failures = [batch.failed for batch in snapshot.batches if batch.failed is not None]
    broken = _broken_chain(snapshot, failures)
    if broken is not None:
        yield "FetchFailed", describe_failure(broken)
    allowed, count = _allowed_failures(run), len(status.batches.failed)
    if failures and count > allowed:
        last = describe_failure(failures[-1])
        if allowed == 0:
            yield "BatchFailed", last
        else:
            yield "TooManyFailedBatches", f"{_batches(count)} failed, at most {allowed} may; {last}"
    deadline = deadline_of(run, status, now=snapshot.now)
    if deadline is not None and snapshot.now >= deadline:
        seconds = run.spec.active_deadline_seconds
        yield "DeadlineExceeded", f"the run took longer than its activeDeadlineSeconds of {seconds}"


def _broken_chain(snapshot: Snapshot, failures: Sequence[StageFailure]) -> StageFailure | None:
    """Return the failed fetch that breaks a cursor chain, because nothing after it can be fetched."""
    if snapshot.run.spec.batches.cursor is None:
        return None
    # A replayed batch cannot break the chain: its successors were fetched before.
    replays = snapshot.status.batches.pending_replays
    return next((it for it in failures if it.stage == Stage.FETCH and it.batch not in replays), None)


def _allowed_failures(run: IngestRun) -> int:
    if run.spec.on_batch_failure is not OnBatchFailure.CONTINUE:
        return 0
    return run.spec.max_failed_batches if run.spec.max_failed_batches is not None else MAX_FAILED_BATCHES


def _succeeded(snapshot: Snapshot, status: IngestRunStatus) -> Decision:
    failed_batches = len(status.batches.failed)
    message = f"{pluralize(status.records.published, 'record')} published in {_batches(len(status.batches.published))}"
    if failed_batches:
        message += f"; {_batches(failed_batches)} failed ({status.batches.failed})"
    left = left_running_words(attempt.pod for attempt in snapshot.attempts if attempt.pod is not None)
    reason = "CompletedWithFailedBatches" if failed_batches else "Completed"
    drained = ConditionUpdate(type=c.DRAINED, status="True", reason="NothingInFlight", message=left)
    if status.workers:
        drained = ConditionUpdate(
            type=c.DRAINED, status="False", reason="Draining", message="its workers have not ended"
        )
    return Decision(
        plan=Plan(status=status.replace(completion_time=snapshot.now), requeue_at=snapshot.now),
        phase=Phase.SUCCEEDED,
        conditions=[
            ConditionUpdate(type=c.SUCCEEDED, status="True", reason=reason, message=message),
            ConditionUpdate(type=c.FINISHED, status="True", reason="Succeeded", message=message),
            drained,
            ConditionUpdate(type=c.RECONCILING, status="False", reason="Finished"),
            *backpressure_over(status),
        ],
    )


def failed(snapshot: Snapshot, status: IngestRunStatus, reason: str, message: str) -> Decision:
    """Decide that the run is Failed, from `status` on, for that reason."""
    return Decision(
        plan=Plan(status=status.replace(completion_time=snapshot.now), requeue_at=snapshot.now),
        phase=Phase.FAILED,
        conditions=[
            ConditionUpdate(type=c.SUCCEEDED, status="False", reason=reason, message=message),
            ConditionUpdate(type=c.FINISHED, status="True", reason="Failed", message=message),
            ConditionUpdate(type=c.STALLED, status="True", reason=reason, message=message),
            ConditionUpdate(type=c.DRAINED, status="False", reason="Draining"),
            ConditionUpdate(type=c.RECONCILING, status="False", reason="Finished"),
            *backpressure_over(status),
        ],
    )


def backpressure_timed_out(snapshot: Snapshot, status: IngestRunStatus, reason: str, message: str) -> Decision:
    """Decide that the run is Failed because it was held back for `backpressure.timeoutSeconds`."""
    seconds = snapshot.run.spec.backpressure.timeout_seconds
    what = "no room" if reason in FULL else "held back"
    text = f"{what} for {seconds} s (backpressure.timeoutSeconds): {reason}: {message}"
    return failed(snapshot, status, "BackpressureTimeout", text)


def deadline_of(run: IngestRun, status: IngestRunStatus, *, now: datetime) -> datetime | None:
    """Return when the run has taken too long; None without a limit, before its start and while it is suspended."""
    seconds, since = run.spec.active_deadline_seconds, _active_since(run, status, now=now)
    if seconds is None or since is None:
        return None
    return since + timedelta(seconds=seconds)


def stale_at(snapshot: Snapshot, status: IngestRunStatus) -> datetime | None:
    """Return when the run will have stood still for too long; None if that does not count now.

    Progress is a step that can happen only once: a stage gets its node for the first time (so the one before has ended
    well), a fetch or a batch is counted. A retry is no progress, or a run that fails and retries for ever would
    never be stale. While the run is backpressured without a running Job, or all its Jobs wait for a node or for their
    admission, the run is not to blame for standing still, so its time begins anew afterwards.
    """
    run, now = snapshot.run, snapshot.now
    seconds, since = run.spec.stale_after_seconds, _active_since(run, status, now=now)
    if seconds is None or since is None or _waits_for_admission_or_node(snapshot.in_flight):
        return None
    moments = [since, status.last_progress_time]
    if not any(attempt.state is JobState.RUNNING for attempt in snapshot.started):
        moments.append(_over_since(status, c.BACKPRESSURED, now=now))
    moments += [
        attempt.pod.placed_at
        for attempt in snapshot.stages
        if attempt.pod is not None and attempt.number == FIRST_ATTEMPT
    ]
    return max(moment for moment in moments if moment is not None) + timedelta(seconds=seconds)


def stale_cause(run: IngestRun) -> CancelCause:
    """Return the cause by which a stale run is cancelled."""
    return CancelCause(
        kind="Stale",
        reason=f"no progress for {run.spec.stale_after_seconds} s (staleAfterSeconds)",
        requested_by=OPERATOR_NAME,
    )


def expiry_of(run: IngestRun) -> datetime | None:
    """Return when an ended run is to be deleted; None if it stays. `Plan.expirable` tells whether it may be deleted."""
    seconds, ended = run.spec.ttl_seconds_after_finished, run.status.completion_time
    if seconds is None or ended is None or run.metadata.deletion_timestamp is not None or run.unreadable:
        return None
    return ended + timedelta(seconds=seconds)


def _active_since(run: IngestRun, status: IngestRunStatus, *, now: datetime) -> datetime | None:
    """Return since when the run's time counts: its start or, as with a Job, the latest time that it was resumed."""
    if run.spec.suspend or status.start_time is None:
        return None
    resumed = _over_since(status, c.SUSPENDED, now=now)
    return max(status.start_time, resumed) if resumed is not None else status.start_time


def _over_since(status: IngestRunStatus, kind: str, *, now: datetime) -> datetime | None:
    """Return since when a condition that was True is not True any more: now, if the status has yet to record it."""
    condition = status.condition(kind)
    if condition is None:
        return None
    return now if condition.status == "True" else condition.last_transition_time


def _waits_for_admission_or_node(batches: Sequence[BatchState]) -> bool:
    """Tell whether the run's only Jobs are first attempts that wait for a node, or to be admitted to a queue."""
    running = [batch.running for batch in batches if batch.running is not None]
    return bool(running) and all(
        attempt.state is JobState.WAITING
        and attempt.number == FIRST_ATTEMPT
        and (attempt.pod is None or attempt.pod.placed_at is None)
        for attempt in running
    )
