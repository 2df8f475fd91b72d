"""How a run ends: succeeded, failed or cancelled; and what is left to do for one that has ended.

Nothing leaves an end: `settle` writes no phase, and each end is one write with everything in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Final

from ingestrun.engine import conditions as c
from ingestrun.engine.accounting import accounted, assess_all, claimable, in_flight, with_
from ingestrun.engine.batches import Batch
from ingestrun.engine.conditions import Claim
from ingestrun.engine.decisions import Live, Plan, Refusal, Skip
from ingestrun.engine.facts import JobFacts, JobState, JobView
from ingestrun.engine.saying import counted, no_backpressure, said, sentence
from ingestrun.engine.steps import steps_of
from ingestrun.model.contract import Stage
from ingestrun.model.names import BLOCK_BATCHES, block_of
from ingestrun.model.ranges import IndexRanges
from ingestrun.model.run import IngestRun
from ingestrun.model.spec import MAX_FAILED_BATCHES, OnBatchFailure
from ingestrun.model.status import BatchesStatus, CancellationStatus, IngestRunStatus, Phase

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
    chain_broken = next((f for f in failed if spec.batches.cursor is not None and f.stage == Stage.FETCH), None)
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
    deadline = deadline_of(run, status)
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


def cancel(run: IngestRun, jobs: Sequence[JobView], *, now: datetime) -> Plan:
    """The one write that makes a run Cancelled. Counters stay as they were stored: what is in flight is told apart."""
    reason = run.spec.cancellation.reason
    who = run.metadata.cancel_requested_by
    flight = in_flight(run.status.batches)
    message = f"cancelled{f' by {who}' if who else ''}{f': {reason}' if reason else ''}"
    status = with_(
        run.status,
        completion_time=now,
        cancellation=CancellationStatus(reason=reason, requested_by=who, accepted_at=now, in_flight=len(flight)),
    )
    status = said(
        run,
        status,
        phase=Phase.CANCELLED,
        claims=[
            Claim(type=c.SUCCEEDED, status="False", reason="Cancelled", message=message),
            Claim(type=c.FINISHED, status="True", reason="Cancelled", message=message),
            Claim(type=c.CANCELLED, status="True", reason="Requested", message=message),
            Claim(
                type=c.DRAINED,
                status="False",
                reason="Draining",
                message=counted(len(flight), "batch in flight", "batches in flight"),
            ),
            Claim(type=c.RECONCILING, status="True", reason="Draining"),
            *no_backpressure(run.status),
        ],
        now=now,
    )
    return Plan(status=status, deletes=unstarted(jobs), skips=skips_of(run, jobs, now=now), requeue_at=now)


def settle(run: IngestRun, jobs: Sequence[JobView], *, now: datetime, live: Live | None) -> Plan:
    """What is left for an ended run: let started pods end, delete what has not started, say when all is quiet."""
    status = run.status
    skips = skips_of(run, jobs, now=now) if status.phase is Phase.CANCELLED else ()
    drained = status.condition(c.DRAINED)
    if drained is not None and drained.status == "True":
        sweep_at = (status.completion_time or now) + SWEEP_AFTER
        late = tuple(job.job for job in jobs if live is not None and not job.state.finished and not job.job.deleting)
        return Plan(
            status=status,
            deletes=late,
            delete_blocks=spent_blocks(status.batches, jobs),
            skips=skips,
            requeue_at=sweep_at if now < sweep_at else None,
        )

    deletes = unstarted(jobs)
    if live is None:
        return Plan(status=status, deletes=deletes, skips=skips, requeue_at=now)
    running = sum(1 for job in jobs if not job.state.finished)
    if running or live.pods_running:
        left = max(running, live.pods_running)
        claims = [
            Claim(
                type=c.DRAINED,
                status="False",
                reason="Draining",
                message=counted(left, "pod has", "pods have") + " not ended",
            )
        ]
        return Plan(
            status=said(run, status, phase=None, claims=claims, now=now),
            deletes=deletes,
            skips=skips,
            requeue_at=now + DRAIN_RECHECK,
        )

    claims = [
        Claim(type=c.DRAINED, status="True", reason="Drained", message="no pod of this run is left running"),
        Claim(type=c.RECONCILING, status="False", reason="Finished"),
    ]
    if status.cancellation is not None:
        publish = steps_of(run.spec)[-1].index
        landed = IndexRanges(
            job.job.batch for job in jobs if job.job.step == publish and job.state is JobState.SUCCEEDED
        )
        flight = in_flight(status.batches)
        missed = flight - landed
        status = with_(
            status,
            cancellation=with_(status.cancellation, drained_at=now, published=flight - missed, not_published=missed),
        )
    return Plan(
        status=said(run, status, phase=None, claims=claims, now=now),
        skips=skips,
        requeue_at=(status.completion_time or now) + SWEEP_AFTER,
    )


def skips_of(run: IngestRun, jobs: Sequence[JobView], *, now: datetime) -> tuple[Skip, ...]:
    """What would be started for this run now, or as soon as a retry is due, if it had not been cancelled."""
    batches = assess_all(run, jobs, now=now)
    starts = [batch.start for batch in batches if batch.start is not None]
    skips = [Skip(batch=start.batch, stage=start.step.label, attempt=start.attempt) for start in starts]
    status = accounted(run.status, batches, chained=run.spec.batches.cursor is not None, now=now)
    if claimable(run.spec, status.batches, status.records) and len(batches) < run.spec.parallelism:
        skips.append(Skip(batch=status.batches.claimed.first_gap, stage=Stage.FETCH.value, attempt=0))
    return tuple(skips)


def deadline_of(run: IngestRun, status: IngestRunStatus) -> datetime | None:
    seconds = run.spec.active_deadline_seconds
    if seconds is None or status.start_time is None:
        return None
    return status.start_time + timedelta(seconds=seconds)


def unstarted(jobs: Sequence[JobView]) -> tuple[JobFacts, ...]:
    return tuple(job.job for job in jobs if job.state is JobState.WAITING and not job.job.deleting)


def spent_blocks(stored: BatchesStatus, jobs: Sequence[JobView]) -> tuple[int, ...]:
    """Blocks whose batches are all published, as the stored status has it: only then may their Jobs go."""
    seen = {block_of(job.job.batch) for job in jobs if not job.job.deleting}
    return tuple(
        block
        for block in sorted(seen)
        if not IndexRanges.span(block * BLOCK_BATCHES, (block + 1) * BLOCK_BATCHES - 1) - stored.published
    )
