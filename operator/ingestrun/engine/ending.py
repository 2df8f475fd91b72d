"""When a run ends by itself, as Succeeded or Failed: one write with everything in it."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Final

from ingestrun.engine import conditions as c
from ingestrun.engine.accounting import claimable, pending_gaps, with_
from ingestrun.engine.batches import Batch
from ingestrun.engine.conditions import Claim
from ingestrun.engine.decisions import Delete, Refusal
from ingestrun.engine.facts import JobState, JobView
from ingestrun.engine.lifetime import deadline_of
from ingestrun.engine.saying import no_backpressure, said, sentence
from ingestrun.model.contract import Stage
from ingestrun.model.run import IngestRun
from ingestrun.model.spec import MAX_FAILED_BATCHES, OnBatchFailure
from ingestrun.model.status import IngestRunStatus, Phase

DRAIN_RECHECK: Final = timedelta(seconds=15)
SWEEP_AFTER: Final = timedelta(seconds=60)
"""When an ended run's Jobs are listed once more: longer than any request that was under way can take to land."""


def end_of(
    run: IngestRun,
    status: IngestRunStatus,
    seen: Sequence[Batch],
    flight: Sequence[Batch],
    *,
    refusal: Refusal | None,
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
        return _failed(run, status, refusal.reason, refusal.message, now=now)
    if chain_broken is not None:
        return _failed(run, status, "FetchFailed", sentence(chain_broken), now=now)
    if failed and len(status.batches.failed) > allowed:
        count = len(status.batches.failed)
        reason, head = (
            ("BatchFailed", "")
            if allowed == 0
            else ("TooManyFailedBatches", f"{count} batches failed, {allowed} are allowed; ")
        )
        return _failed(run, status, reason, head + sentence(failed[-1]), now=now)
    deadline = deadline_of(run, status, now=now)
    if deadline is not None and now >= deadline:
        message = f"the run took longer than its activeDeadlineSeconds of {spec.active_deadline_seconds}"
        return _failed(run, status, "DeadlineExceeded", message, now=now)
    if flight or not status.batches.claimed or claimable(spec, status.batches, status.records):
        return None
    if not status.batches.published:
        last = f"; the last: {sentence(status.failures[-1])}" if status.failures else ""
        return _failed(
            run, status, "AllBatchesFailed", f"all {len(status.batches.failed)} batches failed{last}", now=now
        )
    lost = len(status.batches.failed)
    message = f"{status.records.published} records published in {len(status.batches.published)} batches"
    if lost:
        message += f"; {lost} batches failed ({status.batches.failed})"
    reason = "CompletedWithFailedBatches" if lost else "Completed"
    return said(
        run,
        with_(status, completion_time=now),
        phase=Phase.SUCCEEDED,
        claims=[
            Claim(type=c.SUCCEEDED, status="True", reason=reason, message=message),
            Claim(type=c.FINISHED, status="True", reason="Succeeded", message=message),
            Claim(type=c.DRAINED, status="True", reason="NothingInFlight"),
            Claim(type=c.RECONCILING, status="False", reason="Finished"),
            *no_backpressure(status),
        ],
        now=now,
    )


def _failed(run: IngestRun, status: IngestRunStatus, reason: str, message: str, *, now: datetime) -> IngestRunStatus:
    return said(
        run,
        with_(status, completion_time=now),
        phase=Phase.FAILED,
        claims=[
            Claim(type=c.SUCCEEDED, status="False", reason=reason, message=message),
            Claim(type=c.FINISHED, status="True", reason="Failed", message=message),
            Claim(type=c.STALLED, status="True", reason=reason, message=message),
            Claim(type=c.DRAINED, status="False", reason="Draining"),
            Claim(type=c.RECONCILING, status="False", reason="Finished"),
            *no_backpressure(status),
        ],
        now=now,
    )


def refused(run: IngestRun, reason: str, message: str, *, now: datetime) -> IngestRunStatus:
    """The status of a run that ends before it has begun: what it asks for can't be done."""
    return _failed(run, run.status, reason, message, now=now)


def unstarted(jobs: Sequence[JobView]) -> tuple[Delete, ...]:
    """The Jobs whose pods have not started, to be deleted if that is still so.

    To be asked of a live list: what the watches have shown may be a moment old, and a pod that has started since
    would be ended with its work, or with the only trace of what it has published.
    """
    return tuple(
        Delete(job=job.job, pod=job.pod) for job in jobs if job.state is JobState.WAITING and not job.job.deleting
    )


def out_of_patience(
    run: IngestRun, status: IngestRunStatus, reason: str, message: str, *, now: datetime
) -> IngestRunStatus:
    """The status of a run that there has been no room for, longer than it was to wait."""
    seconds = run.spec.backpressure.timeout_seconds
    text = f"no room for {seconds} s (backpressure.timeoutSeconds): {reason}: {message}"
    return _failed(run, status, "BackpressureTimeout", text, now=now)
