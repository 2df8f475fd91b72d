"""One batch: from its Jobs to where it stands. Its whole state is in them; the status only says claimed or done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from ingestrun.engine.facts import JobState, JobView, Obstacle
from ingestrun.engine.failure import Failure, judge, retry_delay
from ingestrun.engine.steps import Step
from ingestrun.model.contract import Stage, StageResult
from ingestrun.model.resume import Gap, cursor_digest
from ingestrun.model.spec import Backoff
from ingestrun.model.status import StageFailure

START_GRACE: Final = timedelta(seconds=120)
"""How long a pod may wait for its image or configuration before its batch fails: one ErrImagePull is no verdict."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """The next Job that the batch needs, not before `not_before`."""

    batch: int
    step: Step
    attempt: int
    input_attempt: int | None
    """Which attempt of the step before wrote this one's input; None for fetch."""
    not_before: datetime | None = None


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

    @property
    def obstacle(self) -> Obstacle | None:
        """Why the running Job's pod does not start, if something keeps it."""
        pod = self.running.pod if self.running and self.running.state is JobState.WAITING else None
        return pod.obstacle if pod else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What of the run and its status the judgement of one batch depends on."""

    run_uid: str
    steps: tuple[Step, ...]
    backoff: Backoff
    chained: bool
    """A cursor chain: a fetch can't be repeated once its cursor has moved on."""
    cursor: str
    """Where the chain's newest fetch began; meaningless once that fetch is accounted for."""
    fetch_limit: int | None
    now: datetime
    again: Gap | None = None
    """What the batch's fetch was when a run that this one resumes did it; the batches after it are built on that."""


def assess(rules: Rules, index: int, jobs: Sequence[JobView], *, fetch_accounted: bool) -> Batch:
    """Derive where batch `index` stands from its Jobs (in any order).

    A Job that should be there and is not makes the batch fail, unless the step can be repeated without harm:
    a missing Job is never a success.
    """
    by_step: dict[int, list[JobView]] = {}
    for job in sorted(jobs, key=lambda job: job.job.attempt):
        by_step.setdefault(job.job.step, []).append(job)
    reached = max(by_step, default=0)
    failures: list[StageFailure] = []
    fetched: StageResult | None = None
    before: StageResult | None = None
    before_attempt: int | None = None
    rejected = 0

    def fail(step: Step, attempt: int, failure: Failure, at: datetime) -> StageFailure:
        return StageFailure(
            batch=index,
            stage=step.label,
            attempt=attempt,
            reason=failure.reason,
            message=failure.message,
            time=at,
        )

    for step in rules.steps:
        attempts = by_step.get(step.index, [])
        if not attempts:
            if step.index < reached:
                before, before_attempt = None, None
                continue
            can_start = before_attempt is not None or (step.index == 0 and not (rules.chained and fetch_accounted))
            if not can_start:
                gone = Failure(
                    reason="JobMissing", message="the Job of the stage before is gone, and its result with it"
                )
                failed = fail(step, 0, gone, rules.now)
                return Batch(index=index, failed=failed, failures=(*failures, failed))
            start = Start(batch=index, step=step, attempt=0, input_attempt=before_attempt)
            return Batch(index=index, fetched=fetched, rejected=rejected, start=start, failures=tuple(failures))

        latest = attempts[-1]
        for earlier in attempts[:-1]:
            verdict = judge(earlier)
            if isinstance(verdict, Failure):
                failures.append(fail(step, earlier.job.attempt, verdict, earlier.job.finished_at or rules.now))
        if not latest.state.finished:
            given_up = _given_up(latest, rules.now)
            if given_up is None:
                return Batch(index=index, fetched=fetched, rejected=rejected, running=latest, failures=tuple(failures))
            verdict, ended_at = given_up, rules.now
        else:
            verdict = judge(latest)
            if isinstance(verdict, StageResult):
                verdict = _checked(rules, step, verdict, before, fetch_accounted=fetch_accounted)
            ended_at = latest.job.finished_at or rules.now
        if isinstance(verdict, Failure):
            failed = fail(step, latest.job.attempt, verdict, ended_at)
            failures.append(failed)
            attempt = latest.job.attempt + 1
            input_known = step.index == 0 or before_attempt is not None
            if verdict.permanent or attempt > step.retries or not input_known:
                return Batch(index=index, fetched=fetched, failed=failed, failures=tuple(failures))
            identity = f"{rules.run_uid}/{index}/{step.index}"
            start = Start(
                batch=index,
                step=step,
                attempt=attempt,
                input_attempt=before_attempt,
                not_before=ended_at + retry_delay(rules.backoff, identity=identity, attempt=latest.job.attempt),
            )
            return Batch(index=index, fetched=fetched, rejected=rejected, start=start, failures=tuple(failures))
        if step.stage is Stage.FETCH:
            fetched = verdict
        rejected += verdict.rejected
        before, before_attempt = verdict, latest.job.attempt

    return Batch(index=index, fetched=fetched, published=before, rejected=rejected, failures=tuple(failures))


def _given_up(job: JobView, now: datetime) -> Failure | None:
    obstacle = job.pod.obstacle if job.pod else None
    if obstacle is None or obstacle.kind == "Unschedulable" or now - obstacle.since < START_GRACE:
        return None
    waited = int(START_GRACE.total_seconds())
    return Failure(
        reason=obstacle.kind,
        message=f"the pod has not started for {waited} s: {obstacle.message}",
        permanent=True,
    )


def _checked(
    rules: Rules, step: Step, result: StageResult, before: StageResult | None, *, fetch_accounted: bool
) -> StageResult | Failure:
    """Hold a result to what the stage was asked: no row lost between stages, no chain that stands still."""
    if before is not None and result.read != before.written:
        return Failure(
            reason="RowsMismatch",
            message=f"read {result.read} rows of the {before.written} that the stage before handed on",
        )
    if step.stage is not Stage.FETCH or fetch_accounted:
        return result
    changed = _changed(rules.again, result) if rules.again is not None else None
    if changed is not None:
        return changed
    if rules.fetch_limit is not None and result.read > rules.fetch_limit:
        return Failure(
            reason="LimitExceeded",
            message=f"read {result.read} records, at most {rules.fetch_limit} were asked for",
            permanent=True,
        )
    if rules.chained and not result.exhausted:
        if result.next_cursor is None:
            return Failure(reason="ResultInvalid", message="neither exhausted nor a nextCursor in the result")
        if result.next_cursor == rules.cursor:
            return Failure(
                reason="NoProgress",
                message="the fetch returned the cursor that it was given, and did not say exhausted",
                permanent=True,
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
    return Failure(reason="SourceChanged", message=message, permanent=True)
