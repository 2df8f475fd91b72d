"""One batch: from its Jobs to where it stands. Its whole state is in them; the status only says claimed or done.

The one exception: where a quota counts ended Jobs too, the status keeps what the next Job needs of them (`Parked`), so
that they can go.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Final

from ingestrun.model.contract import Stage, StageResult
from ingestrun.model.resume import UnpublishedBatch, cursor_digest
from ingestrun.model.spec import Backoff, OutOfMemory
from ingestrun.model.status import Checkpoint, StageFailure
from ingestrun.planner.batch.attempt import MESSAGE_CHARS, Attempt, Obstacle
from ingestrun.planner.batch.failure_policy import Failure, outcome_of
from ingestrun.planner.batch.pipeline import Step
from ingestrun.planner.batch.retry import (
    BudgetsUsed,
    MemoryLimit,
    RetryDecision,
    RetryPolicy,
    decide_retry,
    memory_limit_of,
)

JOB_MISSING: Final = "JobMissing"
"""The reason of a batch that lacks a Job which nothing can stand in for."""
POD_START_GRACE: Final = timedelta(seconds=120)
"""How long a pod may wait for its image or configuration before its batch fails: one ErrImagePull is no verdict."""
CAPACITY_OBSTACLES: Final = frozenset({"Unschedulable", "QuotaExceeded"})
"""Obstacles that say that the cluster is full: backpressure, and no fault of the batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NextAttempt:
    """The next Job that the batch needs, not before `not_before`."""

    batch: int
    step: Step
    attempt: int
    input_attempt: int | None
    """Which attempt of the step before wrote this one's input; None for fetch."""
    not_before: datetime | None = None
    memory: MemoryLimit | None = None
    """The memory limit, where it is not the spec's: an attempt before was killed for memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchState:
    """Where a claimed batch stands. At most one of `start`, `running`, `failed` and `published` is set."""

    index: int
    fetched: StageResult | None = None
    """The fetch's result once it has one."""
    published: StageResult | None = None
    rejected: int = 0
    next_attempt: NextAttempt | None = None
    running: Attempt | None = None
    failed: StageFailure | None = None
    failures: tuple[StageFailure, ...] = ()
    """All failed attempts that can still be seen, the final one included."""
    retried: tuple[tuple[str, str], ...] = ()
    """Each attempt that was tried again, or is to be, as stage and reason; without those that were parked with it."""
    checkpoint: Checkpoint | None = None
    """With `start`: what the status has to keep for it, so that the Jobs so far can go."""

    @property
    def obstacle(self) -> Obstacle | None:
        """Why the running Job's pod does not start or can't be created, if something keeps it."""
        return self.running.obstacle if self.running is not None else None


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchContext:
    """What of the run and its status the judgement of one batch depends on."""

    run_uid: str
    steps: tuple[Step, ...]
    backoff: Backoff
    out_of_memory: OutOfMemory | None
    chained: bool
    """A cursor chain: a fetch can't be repeated once its cursor has moved on."""
    cursor: str
    """Where the chain's newest fetch began; meaningless once that fetch is accounted for."""
    fetch_limit: int | None
    now: datetime
    replayed: UnpublishedBatch | None = None
    """What the batch's fetch was when a run that this one resumes did it; the batches after it are built on that."""
    checkpoint: Checkpoint | None = None
    """What the status keeps of the batch's Jobs that may be gone."""


def is_checkpointed(parked: Checkpoint, job: Attempt) -> bool:
    """Whether all that is needed of the Job is in the status."""
    return job.job.batch == parked.batch and (job.job.step, job.job.attempt) < (parked.stage or 0, parked.attempt or 0)


def batch_state(rules: BatchContext, index: int, jobs: Sequence[Attempt], *, fetch_accounted: bool) -> BatchState:
    """Derive where batch `index` stands from its Jobs (in any order).

    A Job that should be there and is not makes the batch fail, unless the step can be repeated without harm:
    a missing Job is never a success.
    """
    parked = rules.checkpoint or Checkpoint(batch=index)
    by_step: dict[int, list[Attempt]] = {}
    for job in sorted(jobs, key=lambda job: job.job.attempt):
        if not is_checkpointed(parked, job):
            by_step.setdefault(job.job.step, []).append(job)
    reached = max(by_step, default=0)
    first = parked.stage or 0
    failures: list[StageFailure] = []
    retried: list[tuple[str, str]] = []
    fetched: StageResult | None = None
    published: StageResult | None = None
    start: NextAttempt | None = None
    parks: Checkpoint | None = None
    handed = parked.written
    input_attempt = (parked.input_attempt or 0) if first else None
    rejected = parked.rejected or 0

    for step in rules.steps[first:]:
        attempts = by_step.get(step.index, [])
        begun, spent = _checkpointed_attempts(parked, step)
        if not attempts:
            if step.index < reached:
                handed, input_attempt = None, None
                continue
            can_start = input_attempt is not None or (step.index == 0 and not (rules.chained and fetch_accounted))
            if not can_start:
                gone = Failure(
                    reason=JOB_MISSING, message="the Job of the stage before is gone, and its result with it"
                )
                failed = _stage_failure(index, step, 0, gone, "", rules.now)
                return BatchState(index=index, failed=failed, failures=(*failures, failed), retried=tuple(retried))
            start = NextAttempt(
                batch=index,
                step=step,
                attempt=begun,
                input_attempt=input_attempt,
                memory=MemoryLimit(limit=parked.memory_limit) if begun and parked.memory_limit is not None else None,
            )
            parks = _checkpoint(start, handed, rejected, spent)
            break

        latest = attempts[-1]
        known, spent = _failed_attempts(
            rules, index, step, attempts[:-1], range(begun, latest.job.attempt), handed, spent
        )
        failures += [failure for failure in known if failure.reason != JOB_MISSING]
        retried += [(failure.stage, failure.reason) for failure in known]
        verdict: StageResult | Failure
        if not latest.state.finished:
            refused = start_timed_out(latest, rules.now)
            if refused is None:
                return BatchState(
                    index=index, fetched=fetched, rejected=rejected, running=latest, failures=tuple(failures)
                )
            verdict, ended_at = refused, rules.now
        else:
            verdict = outcome_of(latest)
            if isinstance(verdict, StageResult):
                verdict = _verified(rules, step, verdict, handed, fetch_accounted=fetch_accounted)
            ended_at = latest.job.finished_at or rules.now
        if isinstance(verdict, Failure):
            then = _retry_decision(rules, index, step, latest, verdict, spent)
            input_known = step.index == 0 or input_attempt is not None
            goes_on = then.retried and input_known
            failed = _stage_failure(
                index, step, latest.job.attempt, verdict, then.explanation if input_known else "", ended_at
            )
            failures.append(failed)
            if not goes_on:
                return BatchState(
                    index=index, fetched=fetched, failed=failed, failures=tuple(failures), retried=tuple(retried)
                )
            start = NextAttempt(
                batch=index,
                step=step,
                attempt=latest.job.attempt + 1,
                input_attempt=input_attempt,
                not_before=ended_at + then.delay,
                memory=then.memory or _raised_memory(rules, latest),
            )
            retried.append((failed.stage, failed.reason))
            parks = _checkpoint(start, handed, rejected, then.used) if latest.state.finished else None
            break
        if step.stage is Stage.FETCH:
            fetched = verdict
        rejected += verdict.rejected
        published, handed, input_attempt = verdict, verdict.written, latest.job.attempt

    return BatchState(
        index=index,
        fetched=fetched,
        published=published if start is None else None,
        rejected=rejected,
        next_attempt=start,
        failures=tuple(failures),
        retried=tuple(retried),
        checkpoint=parks,
    )


def _checkpointed_attempts(parked: Checkpoint, step: Step) -> tuple[int, BudgetsUsed]:
    """With which attempt the stage begins, and what those before it have taken from its budgets."""
    if step.index != (parked.stage or 0):
        return 0, BudgetsUsed()
    spent = BudgetsUsed(
        retries=parked.retries or 0, memory=parked.memory_retries or 0, disruptions=parked.disruptions or 0
    )
    return parked.attempt or 0, spent


def _checkpoint(start: NextAttempt, handed: int | None, rejected: int, spent: BudgetsUsed) -> Checkpoint | None:
    """What the status has to keep for that start; None for a batch that has had no Job."""
    if start.step.index == 0 and not start.attempt:
        return None
    return Checkpoint(
        batch=start.batch,
        stage=start.step.index or None,
        attempt=start.attempt or None,
        input_attempt=start.input_attempt or None,
        written=handed,
        rejected=rejected or None,
        retries=spent.retries or None,
        memory_retries=spent.memory or None,
        disruptions=spent.disruptions or None,
        memory_limit=start.memory.limit if start.memory is not None else None,
    )


def _failed_attempts(
    rules: BatchContext,
    index: int,
    step: Step,
    attempts: Sequence[Attempt],
    numbers: range,
    handed: int | None,
    spent: BudgetsUsed,
) -> tuple[list[StageFailure], BudgetsUsed]:
    """The attempts before the latest, all of them failed, and what has been taken from the stage's budgets by then."""
    seen = {job.job.attempt: job for job in attempts}
    failures: list[StageFailure] = []
    for attempt in numbers:
        job = seen.get(attempt)
        if job is None:
            gone = Failure(reason=JOB_MISSING, message="the attempt's Job is gone")
            spent = replace(spent, retries=spent.retries + 1)
            failures.append(_stage_failure(index, step, attempt, gone, "", rules.now))
            continue
        verdict = outcome_of(job)
        if isinstance(verdict, StageResult):
            # It was judged when it was the latest: held to the stage before, or to a cursor that has moved on since.
            verdict = _row_mismatch(step, verdict, handed) or Failure(
                reason="ResultInvalid", message="the result could not be taken"
            )
        then = _retry_decision(rules, index, step, job, verdict, spent)
        spent = then.used
        failures.append(
            _stage_failure(index, step, attempt, verdict, then.explanation, job.job.finished_at or rules.now)
        )
    return failures, spent


def _retry_decision(
    rules: BatchContext, index: int, step: Step, job: Attempt, failure: Failure, spent: BudgetsUsed
) -> RetryDecision:
    return decide_retry(
        failure,
        allowance=RetryPolicy(retries=step.retries, out_of_memory=rules.out_of_memory, backoff=rules.backoff),
        spent=spent,
        had=memory_limit_of(job),
        identity=f"{rules.run_uid}/{index}/{step.index}",
    )


def _raised_memory(rules: BatchContext, latest: Attempt) -> MemoryLimit | None:
    """What the attempt before had been raised to is kept, whatever it failed of."""
    if rules.out_of_memory is None or latest.job.memory_limit is None:
        return None
    return MemoryLimit(limit=latest.job.memory_limit)


def _stage_failure(index: int, step: Step, attempt: int, failure: Failure, then: str, at: datetime) -> StageFailure:
    """A failed attempt as the status has it: why, and what comes of it."""
    room = MESSAGE_CHARS - (len(then) + 2 if then else 0)
    why = failure.message if len(failure.message) <= room else failure.message[: room - 1] + "…"
    return StageFailure(
        batch=index,
        stage=step.label,
        attempt=attempt,
        reason=failure.reason,
        message=f"{why}; {then}" if then else why,
        time=at,
        log=failure.log,
    )


def start_timed_out(job: Attempt, now: datetime) -> Failure | None:
    """Why a Job that waits is waited for no longer; None where it is."""
    obstacle = job.obstacle
    if obstacle is None or obstacle.kind in CAPACITY_OBSTACLES or now - obstacle.since < POD_START_GRACE:
        return None
    waited = int(POD_START_GRACE.total_seconds())
    return Failure(
        reason=obstacle.kind,
        message=f"the pod has not started for {waited} s: {obstacle.message}",
    )


def _verified(
    rules: BatchContext, step: Step, result: StageResult, handed: int | None, *, fetch_accounted: bool
) -> StageResult | Failure:
    """Hold a result to what the stage was asked: no row lost, no chain that stands still."""
    mismatch = _row_mismatch(step, result, handed)
    if mismatch is not None:
        return mismatch
    if step.stage is not Stage.FETCH or fetch_accounted:
        return result
    changed = _source_changed(rules.replayed, result) if rules.replayed is not None else None
    if changed is not None:
        return changed
    if rules.fetch_limit is not None and result.read > rules.fetch_limit:
        return Failure(
            reason="LimitExceeded",
            message=f"read {result.read} records, at most {rules.fetch_limit} were asked for",
        )
    if rules.chained and not result.exhausted:
        if result.next_cursor is None:
            return Failure(reason="ResultInvalid", message="neither exhausted nor a nextCursor in the result")
        if result.next_cursor == rules.cursor:
            return Failure(
                reason="NoProgress",
                message="the fetch returned the cursor that it was given, and did not say exhausted",
            )
    return result


def _source_changed(before: UnpublishedBatch, result: StageResult) -> Failure | None:
    """Whether a batch that is fetched again ends elsewhere than where the next one has begun: a gap, or a repeat."""
    cursor = result.next_cursor
    if result.read != before.read:
        what = f"read {result.read} records where the run that is resumed read {before.read}"
    elif before.next is not None and cursor is not None and cursor_digest(cursor) != before.next:
        what = "ended at another cursor than in the run that is resumed"
    else:
        return None
    message = f"the source has changed: the batch {what}, and the batch after it began there"
    return Failure(reason="SourceChanged", message=message)


def _row_mismatch(step: Step, result: StageResult, handed: int | None) -> Failure | None:
    """Whether rows went missing, or came from nowhere, between two stages or inside one."""
    if handed is not None and result.read != handed:
        return Failure(
            reason="RowsMismatch",
            message=f"read {result.read} rows of the {handed} that the stage before handed on",
        )
    if step.stage is not Stage.FETCH and result.read != result.written + result.rejected:
        return Failure(
            reason="RowsMismatch",
            message=f"read {result.read} rows, but wrote {result.written} and rejected {result.rejected}",
        )
    return None
