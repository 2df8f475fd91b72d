"""The schedule of a pool: who gets batches and permissions, what else is answered, and which workers are started.

A batch is claimed, and a permission given, by the status that this plan stores; the worker hears of it afterwards. So a
cancel and a claim race by compare-and-set.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import timedelta
from functools import cached_property
from typing import Any, Final

from ingestrun.model.pool import Claim, ClaimAnswer, ClaimRequest, FetchedAnswer, FetchedRequest, PublishAnswer
from ingestrun.model.ranges import IndexRanges
from ingestrun.model.status import ExecutionStatus, WorkerStatus
from ingestrun.planner.actions import CreateJob, DeleteJob, DeletePod
from ingestrun.planner.batch.attempt import Attempt
from ingestrun.planner.batch.failure_policy import Failure, FailureAction, RetryBudget, outcome_of, rule_of
from ingestrun.planner.batch.ledger import claimable, next_claims
from ingestrun.planner.batch.pipeline import Step, worker_step
from ingestrun.planner.batch.pod_start import holds, start_timed_out
from ingestrun.planner.batch.retry import FREE_DISRUPTIONS, MemoryLimit, memory_limit_of, retry_delay
from ingestrun.planner.batch.state import BatchState, NextAttempt
from ingestrun.planner.pool.batches import WORKER_LOST
from ingestrun.planner.pool.requests import Answer, Replaced, WorkerRequest
from ingestrun.planner.run.backpressure import Backpressure, room_of
from ingestrun.planner.run.fair_sharing import ought_to_yield
from ingestrun.planner.run.progress import has_room_for_unpublished
from ingestrun.planner.run.schedule import Schedule, fetch_inputs, with_claimed
from ingestrun.planner.snapshot import Snapshot

REPLACED: Final = "the run does not count on this worker any more"
SUSPENDED: Final = "the run is suspended"
NO_WORK: Final = "there is no batch left for this worker"
TOO_MANY: Final = "the run has more workers than its parallelism allows now"
TOO_SMALL: Final = "the batches that are left need a worker with more memory"
YIELDS: Final = "another run has fewer workers, and waits for this one's place"
ORPHAN_RECHECK: Final = timedelta(seconds=5)
"""Interval of looking whether the pod of a worker has ended whose Job is gone."""
KEPT_WORKERS: Final = 3
"""Ended workers whose Jobs stay for their logs while the run goes on."""


def pool_schedule(snapshot: Snapshot, *, may_start: bool) -> Schedule:
    """Decide what the workers are answered, and which workers are started. Without `may_start` nothing begins."""
    return _PoolSchedule(snapshot, may_start=may_start).schedule()


class _PoolSchedule:
    """The decision about one pool. Each step takes the status one further."""

    def __init__(self, snapshot: Snapshot, *, may_start: bool) -> None:
        self._snapshot = snapshot
        self._may_start = may_start
        self._run = snapshot.run
        self._now = snapshot.now
        self._status = snapshot.status
        self._jobs = {attempt.batch: attempt for attempt in snapshot.workers}
        """The workers' Jobs by the number of the worker."""
        self._workers: dict[int, WorkerStatus] = {}
        """The workers that have a Job and have not ended, by number."""
        self._orphaned: list[WorkerStatus] = []
        """The workers whose Job is gone, and whose pod has not ended: they are awaited, and get nothing more."""
        self._waiting = [batch for batch in snapshot.in_flight if batch.next_attempt is not None]
        """The batches that no worker holds."""
        self._leaving = {
            request.worker
            for request in snapshot.requests
            if isinstance(request.body, ClaimRequest) and request.body.leaving is not None
        }
        """The workers that say that they end: an older claim of theirs may still wait, and nobody reads its answer."""
        self._answers: dict[WorkerRequest, Answer] = {}
        self._rechecks = [at for batch in self._waiting if (at := batch.not_before) is not None and at > self._now]
        self._misses_jobs = any(
            failure.reason == WORKER_LOST for batch in snapshot.batches for failure in batch.failures
        )
        self._failure: tuple[str, str] | None = None

    def schedule(self) -> Schedule:
        """Return what follows from all steps together."""
        self._take_off_ended()
        for request in self._snapshot.requests:
            answer = self._answer(request)
            if answer is None and request.reports:
                answer = ClaimAnswer(wait=True)  # the reports are stored: the worker need not repeat them
            if answer is not None:
                self._answers[request] = answer
        backpressure, number = self._room()
        creates = tuple(self._new_workers(number))
        workers = sorted((*self._workers.values(), *self._orphaned), key=lambda entry: entry.worker)
        self._status = self._status.replace(workers=workers or None)
        return Schedule(
            status=self._status,
            creates=creates,
            backpressure=backpressure,
            rechecks=tuple(self._rechecks),
            job_deletions=tuple(self._jobs_to_delete()),
            pod_deletions=tuple(self._overdue_pods()),
            answers=self._answers,
            misses_jobs=self._misses_jobs,
            failure=self._failure,
        )

    # ---- workers that have ended

    def _take_off_ended(self) -> None:
        """Take the workers off the status that have ended, or will not start; those that failed idle are counted."""
        before = self._run.status
        ended = self._status.batches.published | self._status.batches.failed
        if ended != before.batches.published | before.batches.failed and self._status.execution is not None:
            self._set_execution(worker_failures=None, worker_retry_at=None)
        held = {entry.worker for entry in before.workers or () if entry.batch is not None}
        failures = []
        for entry in self._status.workers or ():
            job = self._jobs.get(entry.worker)
            if job is None:
                self._misses_jobs = True
                if entry.worker in self._snapshot.orphaned_workers:
                    self._orphaned.append(entry.replace(leaving=True))
                    self._rechecks.append(self._now + ORPHAN_RECHECK)
                continue
            failure = self._end_of(job)
            if failure is None:
                self._workers[entry.worker] = entry
                continue
            if not job.state.finished:
                self._rechecks.append(self._now)  # its Job is deleted once the status is stored
            if entry.worker not in held and not entry.leaving:
                failures.append(failure)
        for failure in failures:
            self._count_failure(failure)

    def _end_of(self, job: Attempt) -> Failure | None:
        """Return how a worker has ended, or that it is given up before it has started; None if it has done neither.

        One that was not told to end has failed, however it ended.
        """
        if not job.state.finished:
            return start_timed_out(job, step=self._step, graces=self._run.spec.pod_start, now=self._now)
        outcome = outcome_of(job)
        if isinstance(outcome, Failure):
            return outcome
        return Failure(reason="ResultMissing", message="the worker has ended before it was told to")

    def _count_failure(self, failure: Failure) -> None:
        """Count a worker that has failed without a batch. Too many in a row, or one for good, end the run."""
        rule, failures = rule_of(failure.reason), (self._execution.worker_failures or 0) + 1
        allowed = FREE_DISRUPTIONS if rule.budget is RetryBudget.DISRUPTIONS else self._run.spec.retries
        final = rule.action in (FailureAction.FAIL_RUN, FailureAction.FAIL_BATCH) or failures > allowed
        if final and not self._workers:
            self._failure = (failure.reason, f"the pool has no worker: {failure.message}")
        delay = retry_delay(self._run.spec.backoff, identity=f"{self._run.metadata.uid}/workers", attempt=failures - 1)
        self._set_execution(worker_failures=failures, worker_retry_at=self._now + delay)

    # ---- answers

    def _answer(self, request: WorkerRequest) -> Answer | None:
        """Answer a request; None: it goes on waiting."""
        entry = self._workers.get(request.worker)
        if entry is None:
            return Replaced(REPLACED)
        body = request.body
        if isinstance(body, ClaimRequest):
            return self._answer_claim(entry, body)
        holds_it = (entry.batch, entry.batch_attempt or 0) == (body.batch, body.attempt)
        message = None if holds_it else f"attempt {body.attempt} at batch {body.batch} is not this worker's any more"
        if isinstance(body, FetchedRequest):
            return FetchedAnswer(accepted=holds_it, message=message)
        if holds_it:
            batches = self._status.batches
            publishing = (batches.publishing or IndexRanges()) | IndexRanges([body.batch])
            self._status = self._status.replace(batches=batches.replace(publishing=publishing))
        return PublishAnswer(granted=holds_it, message=message)

    def _answer_claim(self, entry: WorkerStatus, body: ClaimRequest) -> ClaimAnswer | None:
        if entry.worker in self._leaving or entry.leaving:
            return self._send_away(entry, body.leaving or NO_WORK)
        if entry.batch is not None:
            return ClaimAnswer(claim=self._claim_of(entry.batch, entry.batch_attempt or 0))
        away = self._reason_to_send_away()
        if away is not None:
            return self._send_away(entry, away)
        if not self._may_start:
            return None
        return self._claim_for(entry)

    def _reason_to_send_away(self) -> str | None:
        """Return why an idle worker is not to take a further batch, whatever there is to do."""
        if self._run.spec.suspend:
            return SUSPENDED
        staying = len(self._staying)
        if staying > self._run.spec.max_workers:
            return TOO_MANY
        capacity = self._snapshot.capacity
        # One at a time, because the limits still count the place of one that is leaving.
        nobody_leaves = staying == len(self._workers)
        if capacity is not None and nobody_leaves and ought_to_yield(capacity, active=staying):
            return YIELDS
        return None

    def _claim_for(self, entry: WorkerStatus) -> ClaimAnswer | None:
        """Hand out a batch: one that waits, else a new one. Without one the worker waits, or is not needed any more."""
        due, job = self._due, self._jobs[entry.worker]
        chosen = next((batch for batch in due if _fits(batch, job)), None)
        if chosen is not None and chosen.next_attempt is not None:
            self._waiting.remove(chosen)
            return self._hand_out(entry, chosen.index, chosen.next_attempt.number)
        if self._new_claims():
            (index,) = next_claims(self._status.batches, 1)
            self._status = with_claimed(self._status, IndexRanges([index]), now=self._now)
            return self._hand_out(entry, index, 0)
        if due:
            return self._send_away(entry, TOO_SMALL)
        idle = sum(1 for other in self._staying if other.batch is None)
        return self._send_away(entry, NO_WORK) if idle > self._work_to_come() else None

    def _hand_out(self, entry: WorkerStatus, batch: int, attempt: int) -> ClaimAnswer:
        self._workers[entry.worker] = entry.replace(batch=batch, batch_attempt=attempt or None)
        batches = self._status.batches
        kept = [each.replace(not_before=None) if each.batch == batch else each for each in batches.checkpoints]
        self._status = self._status.replace(batches=batches.replace(checkpoints=kept))
        return ClaimAnswer(claim=self._claim_of(batch, attempt))

    def _claim_of(self, batch: int, attempt: int) -> Claim:
        """Describe a claimed batch to its worker: the same at each call until its fetch is counted."""
        told = fetch_inputs(self._run, self._status, batch)
        return Claim(
            batch=batch,
            attempt=attempt,
            cursor=told.cursor,
            limit=told.limit,
            state=told.state,
            source_digest=told.source_digest,
            partition=self._run.spec.batches.partitions is not None,
            idempotency_key=f"{self._run.origin_uid}/{batch}",
        )

    def _send_away(self, entry: WorkerStatus, why: str) -> ClaimAnswer:
        """Tell a worker to end. Its entry stays until it has, with a batch of which it does not know any more."""
        self._workers[entry.worker] = entry.replace(leaving=True)
        return ClaimAnswer(exit=why)

    # ---- what there is to do

    @property
    def _staying(self) -> list[WorkerStatus]:
        """The workers that were not told to end."""
        return [entry for entry in self._workers.values() if not entry.leaving]

    @property
    def _due(self) -> list[BatchState]:
        """The batches that a worker may take now."""
        return [
            batch for batch in self._waiting if batch.next_attempt is not None and batch.next_attempt.due(self._now)
        ]

    def _new_claims(self) -> int:
        """Return how many new batches may be claimed now."""
        status, spec = self._status, self._run.spec
        if not has_room_for_unpublished(status.batches, chained=spec.batches.cursor is not None):
            return 0
        free = spec.parallelism - len(status.batches.in_flight)
        return max(0, min(free, claimable(spec, status.batches, status.records)))

    def _work_to_come(self) -> int:
        """Return for how many idle workers there may still be work; for all of them while a chain goes on."""
        spec, status = self._run.spec, self._status
        limit_reached = spec.batches.limit is not None and status.records.fetched >= spec.batches.limit
        if spec.batches.cursor is not None and not status.batches.exhausted and not limit_reached:
            return spec.max_workers
        return len(self._waiting)

    # ---- starts

    def _room(self) -> tuple[Backpressure | None, int]:
        """Return what keeps the pool from having the workers that it wants, and how many are started now."""
        if not self._may_start:
            return None, 0
        jobs = [self._jobs[number] for number in self._workers]
        held = next((job for job in jobs if job.obstacle is not None and holds(job.obstacle)), None)
        if held is not None and held.obstacle is not None:
            if any(job.obstacle is None for job in jobs):
                return None, 0  # the others go on, and one more would wait as well
            message = f"worker {held.batch}: {held.obstacle.message}"
            return Backpressure(reason=held.obstacle.kind, message=message, retry_at=None), 0
        wanted = self._wanted()
        backpressure = room_of(self._snapshot, wants=wanted)
        if backpressure is None:
            return None, wanted
        if backpressure.retry_at is not None and backpressure.retry_at > self._now:
            self._rechecks.append(backpressure.retry_at)
        return backpressure, min(wanted, backpressure.admitted)

    def _wanted(self) -> int:
        """Return how many more workers there is work for; none during the backoff after one that failed idle."""
        retry_at = self._execution.worker_retry_at
        if retry_at is not None and retry_at > self._now:
            self._rechecks.append(retry_at)
            return 0
        busy = sum(1 for entry in self._staying if entry.batch is not None)
        demand = min(self._run.spec.max_workers, busy + len(self._due) + self._new_claims())
        return max(0, demand - len(self._staying))

    def _new_workers(self, number: int) -> Iterator[CreateJob]:
        """Take new workers into the status, and yield their creates. None has a number that another has had."""
        if not number:
            return
        first = self._execution.started
        limit = max([self._execution.memory_limit or 0, *(_memory(batch) for batch in self._waiting)])
        self._set_execution(started=first + number, memory_limit=limit or None)
        for worker in range(first, first + number):
            self._workers[worker] = WorkerStatus(worker=worker)
            yield CreateJob(
                attempt=NextAttempt(
                    batch=worker,
                    step=self._step,
                    number=0,
                    input_attempt=None,
                    memory=MemoryLimit(limit=limit) if limit else None,
                )
            )

    def _jobs_to_delete(self) -> Iterator[DeleteJob]:
        """Yield the Jobs of workers that the stored status does not have: unfinished ones, the oldest that ended."""
        known = {entry.worker for entry in self._run.status.workers or ()} | self._workers.keys()
        strays = [job for worker, job in self._jobs.items() if worker not in known and not job.job.deleting]
        ended = sorted((job for job in strays if job.state.finished), key=lambda job: job.batch)
        capacity = self._snapshot.capacity
        keep = 0 if capacity is not None and capacity.pressed else KEPT_WORKERS
        for job in (*_without_last(ended, keep), *(job for job in strays if not job.state.finished)):
            yield DeleteJob(job=job.job, why="the run does not count on this worker any more")

    def _overdue_pods(self) -> Iterator[DeletePod]:
        """Yield the deletions of pods of workers that are frozen or cut off: their end releases the batches.

        A worker keeps the deadlines of the stages by itself, so one that works is not among them.
        """
        for worker in self._snapshot.overdue:
            pod = self._jobs[worker].pod if worker in self._jobs else None
            if pod is not None and not pod.ended and pod.deleting_until is None:
                yield DeletePod(name=pod.name, uid=pod.uid, grace_seconds=None)

    # ---- the state of the pool

    @cached_property
    def _step(self) -> Step:
        """Return what a worker is as a step: once, because it takes all stages of the spec."""
        return worker_step(self._run.spec)

    @property
    def _execution(self) -> ExecutionStatus:
        return self._status.execution or ExecutionStatus(mode=self._run.spec.execution.mode)

    def _set_execution(self, **changes: Any) -> None:
        self._status = self._status.replace(execution=self._execution.replace(**changes))


def _without_last(jobs: Sequence[Attempt], number: int) -> Sequence[Attempt]:
    return jobs[: max(0, len(jobs) - number)]


def _fits(batch: BatchState, worker: Attempt) -> bool:
    """Tell whether a worker has the memory that the batch needs, because an attempt with less was killed for it."""
    has = memory_limit_of(worker)
    return has is None or has >= _memory(batch)


def _memory(batch: BatchState) -> int:
    following = batch.next_attempt
    return following.memory.limit if following is not None and following.memory is not None else 0
