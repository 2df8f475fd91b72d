"""The course of one batch in a pool's worker: which stage is at work, its deadline, the cursor, the permission."""

from __future__ import annotations

import math
import signal
import time
from typing import Final

from ingestrun.model.contract import StageResult
from ingestrun.model.pool import Claim, Fetched, FetchedAnswer, FetchedRequest, PublishRequest, WorkerStage
from ingestrun.model.text import pluralize
from ingestrun.worker.pool.client import Backoff, EndedError, NoAnswerError, PoolClient
from ingestrun.worker.pool.courier import FetchedCourier
from ingestrun.worker.pool.watch import CancellationWatch
from ingestrun.worker.shutdown import Cancelled, Stop

GRACE_SECONDS: Final = 10.0
"""Seconds that a stage has to stop after its deadline, before the whole worker is ended in its place."""
COMMIT_SECONDS: Final = 300.0
"""Seconds for the commit, where stages have deadlines; a volume that hangs for longer ends the worker."""


class Abandoned(BaseException):
    """The batch is not this worker's any more, so nothing is reported of it. Not an `Exception`, as `Stopped`."""


class DeadlineExceeded(BaseException):
    """A stage took longer than its deadline. Not an `Exception`, so that no handler of ordinary errors catches it."""


class BatchCourse:
    """The course of one attempt at a batch, as `pipeline.Course`."""

    def __init__(
        self,
        claim: Claim,
        stages: tuple[WorkerStage, ...],
        stop: Stop,
        *,
        client: PoolClient,
        courier: FetchedCourier,
        watch: CancellationWatch,
    ) -> None:
        """Prepare; the batch has not begun yet."""
        self.claim = claim
        self.fetched_result: Fetched | None = None
        self.committing = False
        """True from the permission on."""
        self.kill_at: float | None = None
        """The monotonic time at which the watchdog ends the worker, because a stage can't be interrupted."""
        self._stages = stages
        self._stop = stop
        self._client = client
        self._courier = courier
        self._watch = watch
        self._number = 0
        self._stage = 0
        self._entered: set[int] = set()
        self._since = 0.0
        self._spent = [0.0] * len(stages)
        self._timed = any(stage.deadline_seconds is not None for stage in stages)
        self._owner: dict[str, str] = {}

    @property
    def stage(self) -> int:
        """The index of the stage that is at work, or that was when the batch failed."""
        return self._stage

    def begin(self) -> None:
        """Begin: from here on the batch may be interrupted."""
        self._number = self._stop.begin_batch()
        self._since = time.monotonic()

    def enter(self, stage: int) -> int:
        """Let the time run for this stage, as `pipeline.Course`.

        Raises:
            DeadlineExceeded: it has no time left.
            Cancelled: the run is cancelled, and the stage has not begun yet.
            Stopped: as Cancelled, for SIGTERM.
        """
        now = time.monotonic()
        before = self._stage
        self._spent[before] += now - self._since
        self._stage, self._since = stage, now
        if stage not in self._entered:
            self._entered.add(stage)
            self._stop.raise_if_stopped()
        self._arm(now)
        return before

    def fetched(self, result: StageResult) -> None:
        """Keep the fetch's result, and send it on its way if the chain waits for it; as `pipeline.Course`."""
        self.fetched_result = Fetched(
            read=result.read,
            next_cursor=result.next_cursor,
            exhausted=result.exhausted,
            source_digest=result.source_digest,
            state=result.state,
        )
        if not self.claim.partition:
            request = FetchedRequest(batch=self.claim.batch, attempt=self.claim.attempt, fetched=self.fetched_result)
            self._courier.send(request, self._on_fetched_answer)

    def await_permission(self, written: int, rejected: int) -> None:
        """Ask for the permission to publish until there is an answer, as `pipeline.Course`.

        The time that the operator needs counts for no deadline.

        Raises:
            Cancelled: the run is cancelled.
            Abandoned: the batch is not this worker's any more.
            EndedError: the run is gone, or this worker is.
            Stopped: SIGTERM came.
        """
        self._disarm()
        self._take_over()
        self._stop.raise_if_stopped()
        self._courier.drop()
        if self.fetched_result is None:
            raise AssertionError("the permission is asked for before the fetch is over")
        request = PublishRequest(
            batch=self.claim.batch,
            attempt=self.claim.attempt,
            fetched=self.fetched_result,
            written=written,
            rejected=rejected,
        )
        backoff = Backoff()
        while True:
            try:
                answer = self._client.publish(request)
                break
            except NoAnswerError as error:
                self._stop.wait(backoff.pause(error))
        if answer.cancelled is not None:
            self._watch.tell(answer.cancelled)
            raise Cancelled(f"{answer.cancelled}, stopped before the commit of {pluralize(written, 'row')}", written)
        if not answer.granted:
            raise Abandoned(answer.message or "no permission to publish")
        self._stop.ignore_signals()
        self.committing = True
        if self._timed:
            self.kill_at = time.monotonic() + COMMIT_SECONDS

    def on_alarm(self) -> None:
        """Interrupt the stage at work if its time is over; the handler of SIGALRM calls this in the main thread."""
        if self.kill_at is None:
            return
        left = self._left(time.monotonic())
        if left > 0:  # the timer's clock is another
            signal.setitimer(signal.ITIMER_REAL, left)
        else:
            self._stop.interrupt(self._number, self._exceeded())

    def give_up(self) -> bool:
        """Let the watchdog end the worker, after the grace; False if the stages have ended in this very moment."""
        return self.committing or self._owner.setdefault("", "watchdog") == "watchdog"

    def close(self) -> None:
        """End the course: no deadline any more, and no message about the fetch."""
        self._disarm()
        self._take_over()
        self._courier.drop()

    def exceeded_message(self) -> str:
        """Return the sentence about the deadline of the stage at work."""
        return f"took longer than its deadline of {self._stages[self._stage].deadline_seconds} s"

    def _exceeded(self) -> DeadlineExceeded:
        return DeadlineExceeded(self.exceeded_message())

    def _take_over(self) -> None:
        """Decide with the watchdog, for good, who ends the batch: one step, which no signal can divide."""
        if self._owner.setdefault("", "main") == "watchdog":
            while True:  # it ends the process
                time.sleep(1)

    def _left(self, now: float) -> float:
        deadline = self._stages[self._stage].deadline_seconds
        return math.inf if deadline is None else deadline - self._spent[self._stage] - (now - self._since)

    def _arm(self, now: float) -> None:
        if not self._timed:
            return
        left = self._left(now)
        if left <= 0:
            raise self._exceeded()
        if left == math.inf:
            self._disarm()
            return
        self.kill_at = now + left + GRACE_SECONDS
        signal.setitimer(signal.ITIMER_REAL, left)

    def _disarm(self) -> None:
        if self._timed:
            self.kill_at = None
            signal.setitimer(signal.ITIMER_REAL, 0)

    def _on_fetched_answer(self, answer: FetchedAnswer | EndedError) -> None:
        if isinstance(answer, EndedError):
            self._stop.interrupt(self._number, answer)
        elif answer.cancelled is not None:
            self._watch.tell(answer.cancelled)
            self._stop.interrupt()
        elif not answer.accepted:
            self._stop.interrupt(self._number, Abandoned(answer.message or "the fetch is not accepted"))
