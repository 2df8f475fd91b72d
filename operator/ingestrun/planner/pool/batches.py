"""The states of a pool's batches: from the status, the workers' reports, and the ends of workers that left none.

A batch is held by one worker, or waits for one. What it needs to go on is in the status: who holds it, the attempt, the
budgets that it has used. A worker is believed about the attempt that it holds, and about no other.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Final

from ingestrun.model.contract import PERMANENT_REASONS, VERSION, Outcome, StageResult
from ingestrun.model.pool import REASON_DEADLINE, Fetched, Report, ReportOutcome
from ingestrun.model.ranges import IndexRanges
from ingestrun.model.run import IngestRun
from ingestrun.model.status import Checkpoint, IngestRunStatus, StageFailure, WorkerStatus
from ingestrun.model.text import pluralize
from ingestrun.planner.batch.attempt import Attempt
from ingestrun.planner.batch.failure_policy import WORKER_CANCELLED, Failure, outcome_of, strip_control
from ingestrun.planner.batch.ledger import add_retries, batch_contexts
from ingestrun.planner.batch.pipeline import WORKER_LABEL, Step
from ingestrun.planner.batch.retry import MemoryLimit, RetryDecision, RetryPolicy, decide_retry, memory_limit_of
from ingestrun.planner.batch.state import (
    BatchContext,
    BatchState,
    NextAttempt,
    budgets_of,
    failed_fetch,
    stage_failure,
)
from ingestrun.planner.pool.requests import WorkerRequest

WORKER_LOST: Final = "WorkerLost"
"""The failure of a batch whose worker's Job is not there any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Holder:
    """Worker that holds a batch."""

    entry: WorkerStatus
    job: Attempt | None
    """Its Job; None if it is gone, or not made yet."""
    report: Report | None
    """Its last word about the attempt."""
    fetched: Fetched | None
    """The result of the fetch of the attempt, which goes on."""
    orphaned: bool
    """True if its pod has not ended, although its Job is gone: it may still publish what it has permission for."""
    permitted: bool
    """It has permission to publish."""

    @property
    def may_have_published(self) -> bool:
        """Tell whether it may have published the batch. One that reports another end than `done` has not."""
        return self.permitted and (self.report is None or self.report.outcome is ReportOutcome.DONE)


def pool_batch_states(
    run: IngestRun,
    workers: Sequence[Attempt],
    requests: Sequence[WorkerRequest],
    *,
    orphaned: Collection[int],
    now: datetime,
) -> list[BatchState]:
    """Return the state of each batch that is in flight by the stored status.

    `workers` are the workers' Jobs; `orphaned` are the workers whose pod has not ended although their Job is gone.
    """
    context_of, digest = batch_contexts(run, now=now), run.status.source_digest
    holders = _holders(run, workers, requests, orphaned)
    states = []
    for index in run.status.batches.in_flight:
        context = replace(context_of(index), source_digest=digest)
        holder = holders.get(index)
        state = (
            _held(run, context, index, holder) if holder is not None else _waiting(context, index, run.status.failures)
        )
        # Of fetches that end at once, the one of the first batch is what the others are compared with.
        digest = digest or (state.fetched.source_digest if state.fetched is not None else None)
        states.append(state)
    return states


def release(status: IngestRunStatus, states: Sequence[BatchState]) -> IngestRunStatus:
    """Return the counted status in which no worker holds a batch that has ended, or failed an attempt.

    Of one that is tried again it has the checkpoint, without which the number of its next attempt would not be known.
    """
    held = IndexRanges(state.index for state in states if state.held)
    workers = [_without_batch_unless(entry, held) for entry in status.workers or ()]
    checkpoints = status.batches.checkpoint_by_batch
    again = [state for state in states if state.retried]
    checkpoints.update((state.checkpoint.batch, state.checkpoint) for state in again if state.checkpoint is not None)
    publishing = status.batches.publishing or IndexRanges()
    return status.replace(
        workers=workers or None,
        batches=status.batches.replace(
            publishing=publishing - (publishing - held) or None,
            checkpoints=[checkpoints[index] for index in sorted(checkpoints)],
        ),
        # Counted here, because no Job of a pool tells later which attempts there were.
        retries=add_retries(status.retries, (retry for state in again for retry in state.retried)),
    )


def _without_batch_unless(entry: WorkerStatus, held: IndexRanges) -> WorkerStatus:
    """Return the worker without its batch, if that is not among those that are held."""
    return entry if entry.batch is None or entry.batch in held else entry.replace(batch=None, batch_attempt=None)


def _holders(
    run: IngestRun, workers: Sequence[Attempt], requests: Sequence[WorkerRequest], orphaned: Collection[int]
) -> Mapping[int, _Holder]:
    jobs = {attempt.job.batch: attempt for attempt in workers}
    permitted = run.status.batches.publishing or IndexRanges()
    by_worker: dict[int, list[WorkerRequest]] = {}
    for request in requests:
        by_worker.setdefault(request.worker, []).append(request)
    return {
        entry.batch: _holder(
            entry,
            jobs.get(entry.worker),
            by_worker.get(entry.worker, ()),
            orphaned=entry.worker in orphaned,
            permitted=entry.batch in permitted,
        )
        for entry in run.status.workers or ()
        if entry.batch is not None
    }


def _holder(
    entry: WorkerStatus, job: Attempt | None, requests: Sequence[WorkerRequest], *, orphaned: bool, permitted: bool
) -> _Holder:
    held = (entry.batch or 0, entry.batch_attempt or 0)
    reports = [report for request in requests for report in request.reports if (report.batch, report.attempt) == held]
    fetched = [found for request in requests if (found := request.fetched_of(*held)) is not None]
    return _Holder(
        entry=entry,
        job=job,
        report=reports[-1] if reports else None,
        fetched=fetched[-1] if fetched else None,
        orphaned=orphaned,
        permitted=permitted,
    )


def _waiting(context: BatchContext, index: int, known: Iterable[StageFailure] = ()) -> BatchState:
    """Return the state of a batch that no worker holds; of the `known` failures it has that of its latest attempt."""
    kept = context.checkpoint or Checkpoint(batch=index)
    following = NextAttempt(
        batch=index,
        step=context.steps[0],
        number=kept.attempt or 0,
        input_attempt=None,
        not_before=kept.not_before,
        memory=MemoryLimit(limit=kept.memory_limit) if kept.memory_limit is not None else None,
    )
    before = [failure for failure in known if (failure.batch, failure.attempt + 1) == (index, following.number)]
    return BatchState(index=index, next_attempt=following, checkpoint=context.checkpoint, failures=tuple(before))


def _held(run: IngestRun, context: BatchContext, index: int, holder: _Holder) -> BatchState:
    """Return the state of a batch that a worker holds: by its report, else by its end, else it runs."""
    report, told = holder.report, holder.report.fetched if holder.report is not None else holder.fetched
    fetched = _fetch_result(told) if told is not None else None
    if fetched is not None and not context.fetch_counted:
        refused = failed_fetch(context, index, fetched)
        if refused is not None:
            return _after_failure(context, index, holder, context.steps[0].label, refused, fetched=None)
    if report is not None:
        return _reported(run, context, index, holder, report, fetched)
    ended = _worker_end(holder)
    # A partition is counted as fetched when it is done, because one that is read again may have other rows.
    counted = fetched if context.chained else None
    if ended is not None:
        return _after_failure(context, index, holder, WORKER_LABEL, ended, fetched=counted)
    return BatchState(index=index, fetched=counted, running=holder.job, held=True)


def _reported(
    run: IngestRun,
    context: BatchContext,
    index: int,
    holder: _Holder,
    report: Report,
    fetched: StageResult | None,
) -> BatchState:
    if report.outcome is ReportOutcome.DONE and fetched is not None:
        fault = _fault(run, index, report, fetched)
        if fault is None:
            written, rejected = report.written or 0, report.rejected or 0
            published = StageResult(
                v=VERSION, outcome=Outcome.DONE, read=written, written=written, manifest=report.manifest
            )
            return BatchState(index=index, fetched=fetched, published=published, rejected=rejected)
        return _after_failure(context, index, holder, context.steps[-1].label, fault, fetched=fetched)
    stage = report.stage or WORKER_LABEL
    counted = fetched if context.chained else None
    return _after_failure(context, index, holder, stage, _reported_failure(report), fetched=counted)


def _fault(run: IngestRun, index: int, report: Report, fetched: StageResult) -> Failure | None:
    """Return why a batch that is reported as done cannot be counted as that; None if it can."""
    written, rejected = report.written or 0, report.rejected or 0
    if fetched.read != written + rejected:
        message = f"read {pluralize(fetched.read, 'row')}, but published {written} and rejected {rejected}"
        return Failure(reason="RowsMismatch", message=message)
    if index not in (run.status.batches.publishing or IndexRanges()):
        return Failure(reason="ResultInvalid", message="the worker reports a publish for which it had no permission")
    return None


def _reported_failure(report: Report) -> Failure:
    message = " ".join(strip_control(report.message or "").split())
    if report.outcome is ReportOutcome.CANCELLED:
        words = f": {message}" if message else ""
        return Failure(
            reason=WORKER_CANCELLED, message=f"the worker stopped for a cancel that this run does not have{words}"
        )
    if report.outcome is ReportOutcome.STOPPED:
        return Failure(reason="WorkerStopped", message=message or "the worker was told to end (SIGTERM)")
    known = report.reason if report.reason in {*PERMANENT_REASONS, REASON_DEADLINE} else None
    reason = known or ("PermanentError" if report.permanent else "Error")
    return Failure(reason=reason, message=message, log=strip_control(report.log) if report.log else None)


def _worker_end(holder: _Holder) -> Failure | None:
    """Return why the worker can't report any more; None while it can."""
    if holder.job is None and holder.orphaned:
        return None
    if holder.job is None:
        return Failure(reason=WORKER_LOST, message="the Job of its worker is gone")
    if not holder.job.state.finished:
        return None
    outcome = outcome_of(holder.job)
    if isinstance(outcome, Failure):
        return outcome
    return Failure(reason="ResultMissing", message="its worker has ended well, and did not report the batch")


def _after_failure(
    context: BatchContext, index: int, holder: _Holder, label: str, failure: Failure, *, fetched: StageResult | None
) -> BatchState:
    """Decide between another attempt and the end of the batch. Its budgets are for all of its stages together."""
    kept = context.checkpoint or Checkpoint(batch=index)
    number = holder.entry.batch_attempt or 0
    decision = decide_retry(
        failure,
        policy=RetryPolicy(
            retries=_retries(context.steps, label), out_of_memory=context.out_of_memory, backoff=context.backoff
        ),
        used=budgets_of(kept),
        memory_limit=memory_limit_of(holder.job) if holder.job is not None else None,
        identity=f"{context.run_uid}/{index}",
    )
    # A batch of a chain is fetched again from where it began, so that has to be known.
    refetched = context.chained and (context.fetch_counted or fetched is not None)
    known = not context.fetch_counted or context.refetchable or not context.chained
    retried = decision.retried and known
    failed = stage_failure(index, label, number, failure, decision.explanation if known else "", context.now)
    if not retried:
        return BatchState(index=index, fetched=fetched, failed=failed, failures=(failed,))
    checkpoint = _next_checkpoint(kept, decision, number=number + 1, now=context.now).replace(
        may_have_landed=kept.may_have_landed or holder.may_have_published or None
    )
    following = _waiting(replace(context, checkpoint=checkpoint), index)
    return replace(
        following,
        fetched=fetched,
        failures=(failed,),
        retried=((failed.stage, failed.reason),),
        refetched=refetched,
    )


def _next_checkpoint(kept: Checkpoint, decision: RetryDecision, *, number: int, now: datetime) -> Checkpoint:
    """Return what the status keeps of a batch whose attempt `number` is next."""
    used = decision.used
    return Checkpoint(
        batch=kept.batch,
        attempt=number,
        retries=used.retries or None,
        memory_retries=used.memory or None,
        disruptions=used.disruptions or None,
        memory_limit=decision.memory.limit if decision.memory is not None else kept.memory_limit,
        not_before=now + decision.delay if decision.delay else None,
    )


def _retries(steps: Sequence[Step], label: str) -> int:
    """Return the retries of the stage that failed; of a worker that died in any stage, those of the most patient."""
    return next((step.retries for step in steps if step.label == label), max(step.retries for step in steps))


def _fetch_result(told: Fetched) -> StageResult:
    return StageResult(
        v=VERSION,
        outcome=Outcome.DONE,
        read=told.read,
        written=told.read,
        next_cursor=told.next_cursor,
        exhausted=told.exhausted,
        source_digest=told.source_digest,
        state=told.state,
    )
