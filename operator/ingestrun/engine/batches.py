"""One batch: from its Jobs to where it stands. Its whole state is in them; the status only says claimed or done.

The one exception: where a quota counts ended Jobs too, the status keeps what the next Job needs of them (`Parked`), so
that they can go.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Final

from ingestrun.engine.facts import MESSAGE_CHARS, JobView, Obstacle
from ingestrun.engine.failure import Failure, judge
from ingestrun.engine.memory import Memory, limit_of
from ingestrun.engine.retrying import Allowance, Sequel, Spent, sequel
from ingestrun.engine.steps import Step
from ingestrun.model.contract import Stage, StageResult
from ingestrun.model.resume import Gap, cursor_digest
from ingestrun.model.spec import Backoff, OutOfMemory
from ingestrun.model.status import Parked, StageFailure

JOB_MISSING: Final = "JobMissing"
"""The reason of a batch that lacks a Job which nothing can stand in for."""
START_GRACE: Final = timedelta(seconds=120)
"""How long a pod may wait for its image or configuration before its batch fails: one ErrImagePull is no verdict."""
NO_ROOM: Final = frozenset({"Unschedulable", "QuotaExceeded"})
"""Obstacles that say that the cluster is full: backpressure, and no fault of the batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """The next Job that the batch needs, not before `not_before`."""

    batch: int
    step: Step
    attempt: int
    input_attempt: int | None
    """Which attempt of the step before wrote this one's input; None for fetch."""
    not_before: datetime | None = None
    memory: Memory | None = None
    """The memory limit, where it is not the spec's: an attempt before was killed for memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Where a claimed batch stands. At most one of `start`, `running`, `failed` and `published` is set."""

    index: int
    fetched: StageResult | None = None
    """The fetch's result once it has one."""
    published: StageResult | None = None
    rejected: int = 0
    start: Start | None = None
    running: JobView | None = None
    failed: StageFailure | None = None
    failures: tuple[StageFailure, ...] = ()
    """All failed attempts that can still be seen, the final one included."""
    retried: tuple[tuple[str, str], ...] = ()
    """Each attempt that was tried again, or is to be, as stage and reason; without those that were parked with it."""
    parks: Parked | None = None
    """With `start`: what the status has to keep for it, so that the Jobs so far can go."""

    @property
    def obstacle(self) -> Obstacle | None:
        """Why the running Job's pod does not start or can't be created, if something keeps it."""
        return self.running.obstacle if self.running is not None else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
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
    again: Gap | None = None
    """What the batch's fetch was when a run that this one resumes did it; the batches after it are built on that."""
    parked: Parked | None = None
    """What the status keeps of the batch's Jobs that may be gone."""


def covers(parked: Parked, job: JobView) -> bool:
    """Whether all that is needed of the Job is in the status."""
    return job.job.batch == parked.batch and (job.job.step, job.job.attempt) < (parked.step or 0, parked.attempt or 0)


def assess(rules: Rules, index: int, jobs: Sequence[JobView], *, fetch_accounted: bool) -> Batch:
    """Derive where batch `index` stands from its Jobs (in any order).

    A Job that should be there and is not makes the batch fail, unless the step can be repeated without harm:
    a missing Job is never a success.
    """
    parked = rules.parked or Parked(batch=index)
    by_step: dict[int, list[JobView]] = {}
    for job in sorted(jobs, key=lambda job: job.job.attempt):
        if not covers(parked, job):
            by_step.setdefault(job.job.step, []).append(job)
    reached = max(by_step, default=0)
    first = parked.step or 0
    failures: list[StageFailure] = []
    retried: list[tuple[str, str]] = []
    fetched: StageResult | None = None
    published: StageResult | None = None
    start: Start | None = None
    parks: Parked | None = None
    handed = parked.written
    input_attempt = (parked.input or 0) if first else None
    rejected = parked.rejected or 0

    for step in rules.steps[first:]:
        attempts = by_step.get(step.index, [])
        begun, spent = _begun(parked, step)
        if not attempts:
            if step.index < reached:
                handed, input_attempt = None, None
                continue
            can_start = input_attempt is not None or (step.index == 0 and not (rules.chained and fetch_accounted))
            if not can_start:
                gone = Failure(
                    reason=JOB_MISSING, message="the Job of the stage before is gone, and its result with it"
                )
                failed = _told(index, step, 0, gone, "", rules.now)
                return Batch(index=index, failed=failed, failures=(*failures, failed), retried=tuple(retried))
            start = Start(
                batch=index,
                step=step,
                attempt=begun,
                input_attempt=input_attempt,
                memory=Memory(limit=parked.memory_limit) if begun and parked.memory_limit is not None else None,
            )
            parks = _parks(start, handed, rejected, spent)
            break

        latest = attempts[-1]
        known, spent = _earlier(rules, index, step, attempts[:-1], range(begun, latest.job.attempt), handed, spent)
        failures += [failure for failure in known if failure.reason != JOB_MISSING]
        retried += [(failure.stage, failure.reason) for failure in known]
        verdict: StageResult | Failure
        if not latest.state.finished:
            refused = given_up(latest, rules.now)
            if refused is None:
                return Batch(index=index, fetched=fetched, rejected=rejected, running=latest, failures=tuple(failures))
            verdict, ended_at = refused, rules.now
        else:
            verdict = judge(latest)
            if isinstance(verdict, StageResult):
                verdict = _checked(rules, step, verdict, handed, fetch_accounted=fetch_accounted)
            ended_at = latest.job.finished_at or rules.now
        if isinstance(verdict, Failure):
            then = _sequel(rules, index, step, latest, verdict, spent)
            input_known = step.index == 0 or input_attempt is not None
            goes_on = then.retried and input_known
            failed = _told(index, step, latest.job.attempt, verdict, then.said if input_known else "", ended_at)
            failures.append(failed)
            if not goes_on:
                return Batch(
                    index=index, fetched=fetched, failed=failed, failures=tuple(failures), retried=tuple(retried)
                )
            start = Start(
                batch=index,
                step=step,
                attempt=latest.job.attempt + 1,
                input_attempt=input_attempt,
                not_before=ended_at + then.delay,
                memory=then.memory or _kept(rules, latest),
            )
            retried.append((failed.stage, failed.reason))
            parks = _parks(start, handed, rejected, then.spent) if latest.state.finished else None
            break
        if step.stage is Stage.FETCH:
            fetched = verdict
        rejected += verdict.rejected
        published, handed, input_attempt = verdict, verdict.written, latest.job.attempt

    return Batch(
        index=index,
        fetched=fetched,
        published=published if start is None else None,
        rejected=rejected,
        start=start,
        failures=tuple(failures),
        retried=tuple(retried),
        parks=parks,
    )


def _begun(parked: Parked, step: Step) -> tuple[int, Spent]:
    """With which attempt the stage begins, and what those before it have taken from its budgets."""
    if step.index != (parked.step or 0):
        return 0, Spent()
    spent = Spent(retries=parked.retries or 0, memory=parked.memory_retries or 0, disruptions=parked.disruptions or 0)
    return parked.attempt or 0, spent


def _parks(start: Start, handed: int | None, rejected: int, spent: Spent) -> Parked | None:
    """What the status has to keep for that start; None for a batch that has had no Job."""
    if start.step.index == 0 and not start.attempt:
        return None
    return Parked(
        batch=start.batch,
        step=start.step.index or None,
        attempt=start.attempt or None,
        input=start.input_attempt or None,
        written=handed,
        rejected=rejected or None,
        retries=spent.retries or None,
        memory_retries=spent.memory or None,
        disruptions=spent.disruptions or None,
        memory_limit=start.memory.limit if start.memory is not None else None,
    )


def _earlier(
    rules: Rules,
    index: int,
    step: Step,
    attempts: Sequence[JobView],
    numbers: range,
    handed: int | None,
    spent: Spent,
) -> tuple[list[StageFailure], Spent]:
    """The attempts before the latest, all of them failed, and what has been taken from the stage's budgets by then."""
    seen = {job.job.attempt: job for job in attempts}
    failures: list[StageFailure] = []
    for attempt in numbers:
        job = seen.get(attempt)
        if job is None:
            gone = Failure(reason=JOB_MISSING, message="the attempt's Job is gone")
            spent = replace(spent, retries=spent.retries + 1)
            failures.append(_told(index, step, attempt, gone, "", rules.now))
            continue
        verdict = judge(job)
        if isinstance(verdict, StageResult):
            # It was judged when it was the latest: held to the stage before, or to a cursor that has moved on since.
            verdict = _rows(step, verdict, handed) or Failure(
                reason="ResultInvalid", message="the result could not be taken"
            )
        then = _sequel(rules, index, step, job, verdict, spent)
        spent = then.spent
        failures.append(_told(index, step, attempt, verdict, then.said, job.job.finished_at or rules.now))
    return failures, spent


def _sequel(rules: Rules, index: int, step: Step, job: JobView, failure: Failure, spent: Spent) -> Sequel:
    return sequel(
        failure,
        allowance=Allowance(retries=step.retries, out_of_memory=rules.out_of_memory, backoff=rules.backoff),
        spent=spent,
        had=limit_of(job),
        identity=f"{rules.run_uid}/{index}/{step.index}",
    )


def _kept(rules: Rules, latest: JobView) -> Memory | None:
    """What the attempt before had been raised to is kept, whatever it failed of."""
    if rules.out_of_memory is None or latest.job.memory_limit is None:
        return None
    return Memory(limit=latest.job.memory_limit)


def _told(index: int, step: Step, attempt: int, failure: Failure, then: str, at: datetime) -> StageFailure:
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


def given_up(job: JobView, now: datetime) -> Failure | None:
    """Why a Job that waits is waited for no longer; None where it is."""
    obstacle = job.obstacle
    if obstacle is None or obstacle.kind in NO_ROOM or now - obstacle.since < START_GRACE:
        return None
    waited = int(START_GRACE.total_seconds())
    return Failure(
        reason=obstacle.kind,
        message=f"the pod has not started for {waited} s: {obstacle.message}",
    )


def _checked(
    rules: Rules, step: Step, result: StageResult, handed: int | None, *, fetch_accounted: bool
) -> StageResult | Failure:
    """Hold a result to what the stage was asked: no row lost, no chain that stands still."""
    mismatch = _rows(step, result, handed)
    if mismatch is not None:
        return mismatch
    if step.stage is not Stage.FETCH or fetch_accounted:
        return result
    changed = _changed(rules.again, result) if rules.again is not None else None
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


def _changed(before: Gap, result: StageResult) -> Failure | None:
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


def _rows(step: Step, result: StageResult, handed: int | None) -> Failure | None:
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
