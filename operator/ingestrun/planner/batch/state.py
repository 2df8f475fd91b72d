"""The state of one batch, derived from its attempts. The status only records whether the batch is claimed or done.

Ended Jobs may vanish (a TTL, a user) or have to (a quota counts them, or their pods). So each Job carries the values of
the Jobs before it that it needs (a `Checkpoint`, in an annotation), and while a batch waits for its next Job, the
status may keep them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Final

from ingestrun.model.contract import NO_PROGRESS, SOURCE_CHANGED, Stage, StageResult
from ingestrun.model.resume import UnpublishedBatch, cursor_digest, mark_of_cursor
from ingestrun.model.size_budget import MESSAGE_CHARS
from ingestrun.model.spec import Backoff, OutOfMemory, PodStart
from ingestrun.model.status import AttemptId, Checkpoint, StageFailure
from ingestrun.model.text import pluralize, truncate
from ingestrun.planner.batch.attempt import Attempt
from ingestrun.planner.batch.failure_policy import Failure, outcome_of
from ingestrun.planner.batch.obstacle import Obstacle
from ingestrun.planner.batch.pipeline import Step
from ingestrun.planner.batch.pod_start import gives_up_at, start_timed_out
from ingestrun.planner.batch.retry import (
    FREE_DISRUPTIONS,
    BudgetsUsed,
    MemoryLimit,
    RetryDecision,
    RetryPolicy,
    decide_retry,
    memory_limit_of,
)

JOB_MISSING: Final = "JobMissing"
"""The failure of a batch that lacks a Job which cannot be repeated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NextAttempt:
    """The next Job that a batch needs, not before `not_before`."""

    batch: int
    step: Step
    number: int
    """Number of the attempt among those of the stage, from 0."""
    input_attempt: int | None
    """Number of the attempt of the stage before that wrote this attempt's input; None for fetch."""
    not_before: datetime | None = None
    memory: MemoryLimit | None = None
    """The memory limit, if it is not the spec's because an earlier attempt was killed for memory."""
    checkpoint: Checkpoint | None = None
    """The state of the batch that the Job carries; None for the first Job of a batch."""

    @property
    def id(self) -> AttemptId:
        """Return the identity of the attempt."""
        return AttemptId(self.batch, self.step.label, self.number)

    def due(self, now: datetime) -> bool:
        """Tell whether its backoff is over."""
        return self.not_before is None or self.not_before <= now


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchState:
    """State of a claimed batch. At most one of `next_attempt`, `running`, `failed` and `published` is set."""

    index: int
    fetched: StageResult | None = None
    """The fetch's result; None until the fetch is done."""
    published: StageResult | None = None
    rejected: int = 0
    next_attempt: NextAttempt | None = None
    running: Attempt | None = None
    held: bool = False
    """In a pool: True if a worker may still go on with it."""
    running_until: datetime | None = None
    """Time at which the running Job is given up if its pod has not started; None if that is not so limited."""
    failed: StageFailure | None = None
    failures: tuple[StageFailure, ...] = ()
    """All failed attempts whose Jobs are still there, the final one included."""
    retried: tuple[tuple[str, str], ...] = ()
    """Stage and reason of each attempt that was retried, or is to be; without those that a checkpoint has counted."""
    checkpoint: Checkpoint | None = None
    """Checkpoint for the attempt that runs or is next, which the status has to keep so that the batch's ended Jobs
    can be deleted. None if there can be none, or nothing is to be kept."""
    refetched: bool = False
    """True if the batch is to be fetched again, because its Jobs are gone and later batches built on its result."""

    @property
    def not_before(self) -> datetime | None:
        """Return the end of the backoff before its next attempt; None without one."""
        return self.next_attempt.not_before if self.next_attempt is not None else None

    @property
    def obstacle(self) -> Obstacle | None:
        """Return why the running Job's pod does not start or cannot be created; None if nothing prevents it."""
        return self.running.obstacle if self.running is not None else None


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchContext:
    """Inputs that the state of one batch depends on, beside its attempts."""

    run_uid: str
    steps: tuple[Step, ...]
    backoff: Backoff
    out_of_memory: OutOfMemory | None
    pod_start: PodStart
    chained: bool
    """True for a cursor chain, in which a fetch cannot be repeated once the cursor has moved on."""
    cursor: str
    """Cursor with which the chain's newest fetch began; meaningless once that fetch is counted."""
    fetch_limit: int | None
    now: datetime
    fetch_counted: bool = False
    """True if the status has the batch's fetch in its counts."""
    replayed: UnpublishedBatch | None = None
    """The batch's fetch in the run that this run resumes; the batches after it continue from that fetch."""
    checkpoint: Checkpoint | None = None
    """The values that the status keeps of those of the batch's Jobs that may be deleted."""
    refetchable: bool = False
    """True if the status knows the cursor that the batch's counted fetch began with."""
    source_digest: str | None = None
    """The digest of what the run's fetches read from; None if no fetch has returned one yet."""
    cursor_mark: str | None = None
    """Digest of the cursor with which the latest batch began whose index is a power of two."""


def is_checkpointed(checkpoint: Checkpoint, attempt: Attempt) -> bool:
    """Tell whether the checkpoint has all values of the attempt's Job that are needed."""
    reached = (checkpoint.stage or 0, checkpoint.attempt or 0)
    return attempt.batch == checkpoint.batch and (attempt.step, attempt.number) < reached


def batch_state(context: BatchContext, index: int, attempts: Sequence[Attempt]) -> BatchState:
    """Derive the state of batch `index` from its attempts (in any order).

    A missing Job makes the batch fail, unless its stage can be repeated without harm, because a missing Job is never a
    success.
    """
    walk = _StageWalk(context, index, attempts)
    for step in context.steps[walk.first :]:
        state = walk.through(step)
        if state is not None:
            return state
    return walk.state(published=walk.result)


class _StageWalk:
    """Walk of one batch through its stages in order, up to the first stage that is not done."""

    def __init__(self, context: BatchContext, index: int, attempts: Sequence[Attempt]) -> None:
        checkpoint = context.checkpoint or Checkpoint(batch=index)
        self._context = context
        self._index = index
        self._checkpoint = checkpoint
        self._by_step: dict[int, list[Attempt]] = {}
        for attempt in sorted(attempts, key=lambda attempt: attempt.number):
            if not is_checkpointed(checkpoint, attempt):
                self._by_step.setdefault(attempt.step, []).append(attempt)
        self._reached = max(self._by_step, default=0)
        self._failures: list[StageFailure] = []
        self._retried: list[tuple[str, str]] = []
        self._fetched: StageResult | None = None
        self._rejected = checkpoint.rejected or 0
        self._handed_on = checkpoint.written
        """Rows that the stage before has handed on; None if their number is not known."""
        self.first = checkpoint.stage or 0
        self._input_attempt = (checkpoint.input_attempt or 0) if self.first else None
        self.result: StageResult | None = None
        """Result of the last stage that is done."""

    def state(
        self,
        *,
        published: StageResult | None = None,
        next_attempt: NextAttempt | None = None,
        running: Attempt | None = None,
        running_until: datetime | None = None,
        failed: StageFailure | None = None,
        checkpoint: Checkpoint | None = None,
        refetched: bool = False,
    ) -> BatchState:
        """Return the state in which the walk ends."""
        return BatchState(
            index=self._index,
            fetched=self._fetched,
            published=published,
            rejected=self._rejected,
            next_attempt=next_attempt,
            running=running,
            running_until=running_until,
            failed=failed,
            failures=tuple(self._failures),
            retried=tuple(self._retried),
            checkpoint=checkpoint,
            refetched=refetched,
        )

    def through(self, step: Step) -> BatchState | None:
        """Take one stage; return the batch's state if the walk ends there, None if the stage is done."""
        attempts = self._by_step.get(step.index, [])
        if not attempts:
            return self._without_attempts(step)
        latest = attempts[-1]
        used = self._count_earlier(step, attempts, before=latest.number)
        if not latest.state.finished:
            graces, now = self._context.pod_start, self._context.now
            refused = start_timed_out(latest, step=step, graces=graces, now=now)
            if refused is None:
                return self.state(
                    running=latest,
                    running_until=gives_up_at(latest, step=step, graces=graces),
                    checkpoint=self._checkpoint_of_running(step, latest, used),
                )
            return self._after_failure(step, latest, refused, used, at=self._context.now)
        outcome = outcome_of(latest)
        if isinstance(outcome, StageResult):
            outcome = self._verified(step, outcome)
        if isinstance(outcome, Failure):
            return self._after_failure(step, latest, outcome, used, at=latest.ended_at or self._context.now)
        if step.stage is Stage.FETCH:
            self._fetched = outcome
        self._rejected += outcome.rejected
        self.result, self._handed_on, self._input_attempt = outcome, outcome.written, latest.number
        return None

    def _without_attempts(self, step: Step) -> BatchState | None:
        if step.index < self._reached:
            # A later stage was started, so this one was done.
            self._recall(step)
            return None
        repeatable = not (self._context.chained and self._context.fetch_counted)
        if self._input_attempt is None and not (step.index == 0 and repeatable):
            return self._without_result(step)
        number, used = self._first_attempt(step)
        limit = self._checkpoint.memory_limit if number else None
        following = NextAttempt(
            batch=self._index,
            step=step,
            number=number,
            input_attempt=self._input_attempt,
            memory=MemoryLimit(limit=limit) if limit is not None else None,
        )
        checkpoint = self._checkpoint_for(following, used)
        return self.state(next_attempt=replace(following, checkpoint=checkpoint), checkpoint=checkpoint)

    def _without_result(self, step: Step) -> BatchState:
        """Return the state of a batch whose next stage can't begin, because a result is gone and nothing kept it.

        A batch of a chain is fetched again from its cursor, as in a run that resumes another: it has to end where the
        next one began. Bounded like a disruption; a later attempt, because a pod of the first may be left.
        """
        missing = Failure(reason=JOB_MISSING, message="the Job of the stage before is gone, and its result with it")
        before = self._checkpoint
        disruptions = (before.disruptions or 0) + 1
        again = self._context.refetchable and disruptions <= FREE_DISRUPTIONS
        explanation = f"fetched again, {disruptions} of {FREE_DISRUPTIONS} times" if again else ""
        failed = self._failure(step, 0, missing, explanation, self._context.now)
        self._failures.append(failed)
        if not again:
            return self.state(failed=failed)
        attempt = (before.attempt or 0) + 1 if not before.stage else disruptions
        checkpoint = Checkpoint(batch=self._index, attempt=attempt, disruptions=disruptions)
        return self.state(refetched=True, checkpoint=checkpoint)

    def _recall(self, step: Step) -> None:
        """Take what a vanished stage has handed on from the Job of the stage after it, if that carries it."""
        later = self._by_step.get(step.index + 1, ())
        carried = next((found for attempt in later if (found := carried_checkpoint(attempt)) is not None), None)
        if carried is None or carried.stage != step.index + 1:
            self._handed_on, self._input_attempt = None, None
            return
        self._handed_on, self._input_attempt = carried.written, carried.input_attempt or 0
        self._rejected = carried.rejected or 0

    def _after_failure(
        self, step: Step, latest: Attempt, failure: Failure, used: BudgetsUsed, *, at: datetime
    ) -> BatchState:
        """Decide between a retry and the end of the batch."""
        decision = self._decide(step, latest, failure, used)
        input_known = step.index == 0 or self._input_attempt is not None
        explanation = decision.explanation if input_known else ""
        failed = self._failure(step, latest.number, failure, explanation, at)
        self._failures.append(failed)
        if not (decision.retried and input_known):
            return self.state(failed=failed)
        following = NextAttempt(
            batch=self._index,
            step=step,
            number=latest.number + 1,
            input_attempt=self._input_attempt,
            not_before=at + decision.delay,
            memory=decision.memory or self._raised_memory(latest),
        )
        self._retried.append((failed.stage, failed.reason))
        # A Job that was given up before it started has not ended, so a checkpoint could not replace it.
        checkpoint = self._checkpoint_for(following, decision.used)
        return self.state(
            next_attempt=replace(following, checkpoint=checkpoint),
            checkpoint=checkpoint if latest.state.finished else None,
        )

    def _first_attempt(self, step: Step) -> tuple[int, BudgetsUsed]:
        """Return the first attempt that the checkpoint does not cover, and the budgets used by those before it."""
        if step.index != self.first:
            return 0, BudgetsUsed()
        return self._checkpoint.attempt or 0, budgets_of(self._checkpoint)

    def _checkpoint_of_running(self, step: Step, running: Attempt, used: BudgetsUsed) -> Checkpoint | None:
        """Return the checkpoint that keeps all that the running attempt, and what follows it, needs of earlier Jobs."""
        if step.index and self._input_attempt is None:
            return None
        limit = running.job.memory_limit if running.number else None
        same = NextAttempt(
            batch=self._index,
            step=step,
            number=running.number,
            input_attempt=self._input_attempt,
            memory=MemoryLimit(limit=limit) if limit is not None else None,
        )
        return self._checkpoint_for(same, used)

    def _checkpoint_for(self, following: NextAttempt, used: BudgetsUsed) -> Checkpoint | None:
        """Return the checkpoint that the status has to keep for the next attempt; None if the batch has had no Job."""
        if following.step.index == 0 and not following.number:
            return None
        return Checkpoint(
            batch=self._index,
            stage=following.step.index or None,
            attempt=following.number or None,
            input_attempt=following.input_attempt or None,
            written=self._handed_on,
            rejected=self._rejected or None,
            retries=used.retries or None,
            memory_retries=used.memory or None,
            disruptions=used.disruptions or None,
            memory_limit=following.memory.limit if following.memory is not None else None,
        )

    def _count_earlier(self, step: Step, attempts: Sequence[Attempt], *, before: int) -> BudgetsUsed:
        """Note the attempts before number `before`, all of them failed; return the budgets that they have used.

        What a vanished attempt has used is known if the next one carries it.
        """
        by_number = {attempt.number: attempt for attempt in attempts}
        first, used = self._first_attempt(step)
        missing = False
        for number in range(first, before + 1):
            attempt = by_number.get(number)
            carried = carried_checkpoint(attempt) if attempt is not None and missing else None
            if carried is not None:
                used = budgets_of(carried)
            if number == before:
                break
            missing = attempt is None
            if attempt is None:
                used = replace(used, retries=used.retries + 1)
                self._retried.append((step.label, JOB_MISSING))
                continue
            outcome = outcome_of(attempt)
            if isinstance(outcome, StageResult):
                # It was rejected when it was the latest: by the stage before, or by a cursor that has moved on since.
                outcome = _row_mismatch(step, outcome, self._handed_on) or Failure(
                    reason="ResultInvalid", message="the result could not be accepted"
                )
            decision = self._decide(step, attempt, outcome, used)
            used = decision.used
            at = attempt.ended_at or self._context.now
            failure = self._failure(step, number, outcome, decision.explanation, at)
            if failure.reason != JOB_MISSING:
                self._failures.append(failure)
            self._retried.append((failure.stage, failure.reason))
        return used

    def _decide(self, step: Step, attempt: Attempt, failure: Failure, used: BudgetsUsed) -> RetryDecision:
        context = self._context
        return decide_retry(
            failure,
            policy=RetryPolicy(retries=step.retries, out_of_memory=context.out_of_memory, backoff=context.backoff),
            used=used,
            memory_limit=memory_limit_of(attempt),
            identity=f"{context.run_uid}/{self._index}/{step.index}",
        )

    def _raised_memory(self, latest: Attempt) -> MemoryLimit | None:
        """Return the raised memory limit of the latest attempt, which later attempts keep after any failure."""
        if self._context.out_of_memory is None or latest.job.memory_limit is None:
            return None
        return MemoryLimit(limit=latest.job.memory_limit)

    def _failure(self, step: Step, number: int, failure: Failure, explanation: str, at: datetime) -> StageFailure:
        return stage_failure(self._index, step.label, number, failure, explanation, at)

    def _verified(self, step: Step, result: StageResult) -> StageResult | Failure:
        """Check a result against the stage's task: no row may be lost, and a chain's cursor must move."""
        mismatch = _row_mismatch(step, result, self._handed_on)
        if mismatch is not None:
            return mismatch
        if step.stage is not Stage.FETCH or self._context.fetch_counted:
            return result
        return failed_fetch(self._context, self._index, result) or result


def carried_checkpoint(attempt: Attempt) -> Checkpoint | None:
    """Return the state of the batch that the attempt's Job carries; None without one that can be read."""
    text = attempt.job.checkpoint
    if text is None:
        return None
    try:
        carried = Checkpoint.model_validate_json(text)
    except ValueError:  # somebody has edited it
        return None
    same = (carried.batch, carried.stage or 0, carried.attempt or 0) == attempt.order
    return carried if same else None


def stage_failure(
    batch: int, stage: str, number: int, failure: Failure, explanation: str, at: datetime
) -> StageFailure:
    """Return the status's entry for a failed attempt, with the failure and the decision that follows."""
    room = MESSAGE_CHARS - (len(explanation) + 2 if explanation else 0)
    why = truncate(failure.message, room)
    return StageFailure(
        batch=batch,
        stage=stage,
        attempt=number,
        reason=failure.reason,
        message=f"{why}; {explanation}" if explanation else why,
        time=at,
        log=failure.log,
    )


def budgets_of(checkpoint: Checkpoint) -> BudgetsUsed:
    """Return the budgets that the attempts before a checkpoint have used."""
    return BudgetsUsed(
        retries=checkpoint.retries or 0,
        memory=checkpoint.memory_retries or 0,
        disruptions=checkpoint.disruptions or 0,
    )


def failed_fetch(context: BatchContext, index: int, result: StageResult) -> Failure | None:
    """Return why the result of a fetch cannot be accepted; None if it can."""
    changed = _other_source(context.source_digest, result)
    if changed is None and context.replayed is not None:
        changed = _source_changed(context.replayed, result)
    if changed is not None:
        return changed
    if context.fetch_limit is not None and result.read > context.fetch_limit:
        return Failure(
            reason="LimitExceeded",
            message=f"read {pluralize(result.read, 'record')}, at most {context.fetch_limit} were asked for",
        )
    if context.chained and not result.exhausted:
        if result.next_cursor is None:
            return Failure(reason="ResultInvalid", message="neither exhausted nor a nextCursor in the result")
        if result.next_cursor == context.cursor:
            return Failure(
                reason=NO_PROGRESS,
                message="the fetch returned the cursor that it was given, and did not say exhausted",
            )
        return _circle(context, index, result.next_cursor) if context.replayed is None else None
    return None


def marks_cursor(index: int) -> bool:
    """Tell whether the status keeps the digest of the cursor with which the batch begins: its index is a power of two.

    So a circle of any length is found with one digest, before the batches go round for the fourth time (Brent's way).
    """
    return index.bit_count() == 1


def _circle(context: BatchContext, index: int, cursor: str) -> Failure | None:
    """Return a failure if the chain is back at the cursor that the status has marked."""
    if context.cursor_mark is None or mark_of_cursor(cursor) != context.cursor_mark:
        return None
    marked = 1 << (index.bit_length() - 1)
    return Failure(
        reason=NO_PROGRESS,
        message=f"the fetch returned the cursor with which batch {marked} began, and did not say exhausted: "
        f"the source goes in a circle, from batch {marked} to batch {index}",
    )


def _other_source(digest: str | None, result: StageResult) -> Failure | None:
    """Return a failure if the fetch has not read from what the run's other fetches have read from.

    Batches of one list are parts of a whole, and parts of different lists have gaps and overlaps.
    """
    if digest is None or result.source_digest == digest:
        return None
    told = f"has read {result.source_digest[:12]}" if result.source_digest is not None else "does not say what it read"
    message = (
        f"the source is not the one that the run began with: the fetch {told}, and the fetches before it "
        f"have read {digest[:12]} (sourceDigest), so records would be missed or doubled"
    )
    return Failure(reason=SOURCE_CHANGED, message=message)


def _source_changed(before: UnpublishedBatch, result: StageResult) -> Failure | None:
    """Return a failure if a replayed batch does not end where the next one began, as rows would be lost or repeated."""
    cursor = result.next_cursor
    if result.read != before.read:
        what = f"read {pluralize(result.read, 'record')} where the run that is resumed read {before.read}"
    elif before.next is not None and cursor is not None and cursor_digest(cursor) != before.next:
        what = "ended at another cursor than in the run that is resumed"
    else:
        return None
    message = f"the source has changed: the batch {what}, and the batch after it began there"
    return Failure(reason=SOURCE_CHANGED, message=message)


def _row_mismatch(step: Step, result: StageResult, handed_on: int | None) -> Failure | None:
    """Return a failure if rows went missing, or appeared, between two stages or inside one."""
    if handed_on is not None and result.read != handed_on:
        return Failure(
            reason="RowsMismatch",
            message=f"read {pluralize(result.read, 'row')} of the {handed_on} that the stage before handed on",
        )
    if step.stage is not Stage.FETCH and result.read != result.written + result.rejected:
        return Failure(
            reason="RowsMismatch",
            message=f"read {pluralize(result.read, 'row')}, but wrote {result.written} and rejected {result.rejected}",
        )
    return None
