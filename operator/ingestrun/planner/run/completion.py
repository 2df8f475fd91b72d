"""When a run ends by itself, as Succeeded or Failed: one write with everything in it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from typing import Final

from ingestrun.model.contract import Stage
from ingestrun.model.run import IngestRun
from ingestrun.model.spec import MAX_FAILED_BATCHES, OnBatchFailure
from ingestrun.model.status import IngestRunStatus, Phase
from ingestrun.planner.actions import OPERATOR, CancelCause, CreateRejection, DeleteJob
from ingestrun.planner.batch.attempt import Attempt, JobState
from ingestrun.planner.batch.ledger import claimable, pending_gaps
from ingestrun.planner.batch.state import BatchState
from ingestrun.planner.status import conditions as c
from ingestrun.planner.status.conditions import ConditionUpdate
from ingestrun.planner.status.writer import backpressure_over, describe_failure, finish_status

DRAIN_RECHECK: Final = timedelta(seconds=15)
SWEEP_AFTER: Final = timedelta(seconds=60)
"""When an ended run's Jobs are listed once more: longer than any request that was under way can take to land."""


def completion_of(
    run: IngestRun,
    status: IngestRunStatus,
    seen: Sequence[BatchState],
    flight: Sequence[BatchState],
    *,
    refusal: CreateRejection | None,
    now: datetime,
) -> IngestRunStatus | None:
    """The status of a run that ends now; None while it goes on."""
    spec = run.spec
    failed = [batch.failed for batch in seen if batch.failed is not None]
    allowed = 0
    if spec.on_batch_failure is OnBatchFailure.CONTINUE:
        allowed = spec.max_failed_batches if spec.max_failed_batches is not None else MAX_FAILED_BATCHES
    # One that is done again is no link of the chain: that has gone on from it long since.
    chained = spec.batches.cursor is not None
    again = pending_gaps(status.batches)
    chain_broken = next((f for f in failed if chained and f.stage == Stage.FETCH and f.batch not in again), None)
    if refusal is not None and refusal.permanent:
        return _failed_status(run, status, refusal.reason, refusal.message, now=now)
    if chain_broken is not None:
        return _failed_status(run, status, "FetchFailed", describe_failure(chain_broken), now=now)
    if failed and len(status.batches.failed) > allowed:
        count = len(status.batches.failed)
        reason, head = (
            ("BatchFailed", "")
            if allowed == 0
            else ("TooManyFailedBatches", f"{count} batches failed, {allowed} are allowed; ")
        )
        return _failed_status(run, status, reason, head + describe_failure(failed[-1]), now=now)
    deadline = deadline_of(run, status, now=now)
    if deadline is not None and now >= deadline:
        message = f"the run took longer than its activeDeadlineSeconds of {spec.active_deadline_seconds}"
        return _failed_status(run, status, "DeadlineExceeded", message, now=now)
    if flight or not status.batches.claimed or claimable(spec, status.batches, status.records):
        return None
    if not status.batches.published:
        last = f"; the last: {describe_failure(status.failures[-1])}" if status.failures else ""
        return _failed_status(
            run, status, "AllBatchesFailed", f"all {len(status.batches.failed)} batches failed{last}", now=now
        )
    lost = len(status.batches.failed)
    message = f"{status.records.published} records published in {len(status.batches.published)} batches"
    if lost:
        message += f"; {lost} batches failed ({status.batches.failed})"
    reason = "CompletedWithFailedBatches" if lost else "Completed"
    return finish_status(
        run,
        status.replace(completion_time=now),
        phase=Phase.SUCCEEDED,
        claims=[
            ConditionUpdate(type=c.SUCCEEDED, status="True", reason=reason, message=message),
            ConditionUpdate(type=c.FINISHED, status="True", reason="Succeeded", message=message),
            ConditionUpdate(type=c.DRAINED, status="True", reason="NothingInFlight"),
            ConditionUpdate(type=c.RECONCILING, status="False", reason="Finished"),
            *backpressure_over(status),
        ],
        now=now,
    )


def _failed_status(
    run: IngestRun, status: IngestRunStatus, reason: str, message: str, *, now: datetime
) -> IngestRunStatus:
    return finish_status(
        run,
        status.replace(completion_time=now),
        phase=Phase.FAILED,
        claims=[
            ConditionUpdate(type=c.SUCCEEDED, status="False", reason=reason, message=message),
            ConditionUpdate(type=c.FINISHED, status="True", reason="Failed", message=message),
            ConditionUpdate(type=c.STALLED, status="True", reason=reason, message=message),
            ConditionUpdate(type=c.DRAINED, status="False", reason="Draining"),
            ConditionUpdate(type=c.RECONCILING, status="False", reason="Finished"),
            *backpressure_over(status),
        ],
        now=now,
    )


def failed_before_start(run: IngestRun, reason: str, message: str, *, now: datetime) -> IngestRunStatus:
    """The status of a run that ends before it has begun: what it asks for can't be done."""
    return _failed_status(run, run.status, reason, message, now=now)


def unstarted_jobs(jobs: Sequence[Attempt]) -> tuple[DeleteJob, ...]:
    """The Jobs whose pods have not started, to be deleted if that is still so.

    To be asked of a live list: what the watches have shown may be a moment old, and a pod that has started since
    would be ended with its work, or with the only trace of what it has published.
    """
    return tuple(
        DeleteJob(job=job.job, pod=job.pod) for job in jobs if job.state is JobState.WAITING and not job.job.deleting
    )


def backpressure_timed_out(
    run: IngestRun, status: IngestRunStatus, reason: str, message: str, *, now: datetime
) -> IngestRunStatus:
    """The status of a run that there has been no room for, longer than it was to wait."""
    seconds = run.spec.backpressure.timeout_seconds
    text = f"no room for {seconds} s (backpressure.timeoutSeconds): {reason}: {message}"
    return _failed_status(run, status, "BackpressureTimeout", text, now=now)


# How long a run may take, how long it may stand still, and how long it stays: from the spec to moments in time.

FIRST_ATTEMPT: Final = 0


def deadline_of(run: IngestRun, status: IngestRunStatus, *, now: datetime) -> datetime | None:
    """When the run has taken too long; None without a limit, before the start and while it is suspended."""
    seconds, since = run.spec.active_deadline_seconds, _active_since(run, status, now=now)
    if seconds is None or since is None:
        return None
    return since + timedelta(seconds=seconds)


def stale_at(
    run: IngestRun, status: IngestRunStatus, flight: Sequence[BatchState], jobs: Iterable[Attempt], *, now: datetime
) -> datetime | None:
    """When the run will have stood still for too long; None where that does not count now.

    Progress is what can happen once only: a stage gets its node for the first time (so the one before has ended
    well), a fetch or a batch is accounted for. A retry is none, or a run that fails and retries for ever would
    never stand still. As long as it is backpressured with nothing running, and as long as all that it has are Jobs
    that wait for a node or for their admission, standing still is not the run's doing: its time begins anew afterwards.
    """
    seconds, since = run.spec.stale_after_seconds, _active_since(run, status, now=now)
    jobs = list(jobs)
    if seconds is None or since is None or _waits_for_admission_or_node(flight):
        return None
    moments = [since, status.last_progress_time]
    if not any(job.state is JobState.RUNNING for job in jobs):
        moments.append(_over_since(status, c.BACKPRESSURED, now=now))
    moments += [job.pod.placed_at for job in jobs if job.pod is not None and job.job.attempt == FIRST_ATTEMPT]
    return max(moment for moment in moments if moment is not None) + timedelta(seconds=seconds)


def stale_cause(run: IngestRun) -> CancelCause:
    """Why a run that has stood still is cancelled."""
    return CancelCause(
        kind="Stale",
        reason=f"no progress for {run.spec.stale_after_seconds} s (staleAfterSeconds)",
        requested_by=OPERATOR,
    )


def expiry_of(run: IngestRun) -> datetime | None:
    """When an ended run is to be deleted; None where it stays. That it is quiet is not asked here."""
    seconds, ended = run.spec.ttl_seconds_after_finished, run.status.completion_time
    if seconds is None or ended is None or run.metadata.deletion_timestamp is not None:
        return None
    return ended + timedelta(seconds=seconds)


def _active_since(run: IngestRun, status: IngestRunStatus, *, now: datetime) -> datetime | None:
    """Since when the run's time counts: its start or, as with a Job, the latest time that it was resumed."""
    if run.spec.suspend or status.start_time is None:
        return None
    resumed = _over_since(status, c.SUSPENDED, now=now)
    return max(status.start_time, resumed) if resumed is not None else status.start_time


def _over_since(status: IngestRunStatus, kind: str, *, now: datetime) -> datetime | None:
    """Since when a condition that held does not any more: now, if the status has yet to say so."""
    condition = status.condition(kind)
    if condition is None:
        return None
    return now if condition.status == "True" else condition.last_transition_time


def _waits_for_admission_or_node(flight: Sequence[BatchState]) -> bool:
    """Whether the run's only Jobs are ones that wait for a node, or to be admitted to a queue."""
    running = [batch.running for batch in flight if batch.running is not None]
    waits = [
        job.state is JobState.WAITING
        and job.job.attempt == FIRST_ATTEMPT
        and (job.pod is None or job.pod.placed_at is None)
        for job in running
    ]
    return bool(waits) and all(waits)
