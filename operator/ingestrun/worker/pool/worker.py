"""A pool's worker: claims a batch, takes it through its stages, reports it with the next claim, until there is none."""

from __future__ import annotations

import signal
import sys
import time
import traceback
from collections.abc import Mapping
from functools import partial
from typing import Final

from ingestrun.model import contract
from ingestrun.model.contract import Outcome, StageResult
from ingestrun.model.pool import (
    ENV_WORKER,
    LOG_MAX_CHARS,
    MESSAGE_MAX_CHARS,
    REASON_DEADLINE,
    Claim,
    ClaimAnswer,
    ClaimRequest,
    Report,
    ReportOutcome,
)
from ingestrun.model.text import pluralize, truncate
from ingestrun.worker.cancellation import CancellationClient
from ingestrun.worker.errors import PermanentError, to_worker_error
from ingestrun.worker.logs import log_event
from ingestrun.worker.pool.client import Backoff, EndedError, NoAnswerError, PoolClient
from ingestrun.worker.pool.courier import FetchedCourier
from ingestrun.worker.pool.course import Abandoned, BatchCourse, DeadlineExceeded
from ingestrun.worker.pool.memory import MemoryBound, limit_bytes, release_memory, resident_bytes
from ingestrun.worker.pool.settings import Settings, read_settings
from ingestrun.worker.pool.watch import CancellationWatch
from ingestrun.worker.pool.watchdog import Watchdog
from ingestrun.worker.result import failed_result, write_result
from ingestrun.worker.shutdown import EXIT_STOPPED, Cancelled, Stop, Stopped

CLAIM_WAIT_SECONDS: Final = 25.0
_GOODBYE_SECONDS: Final = 2.0
_HUNG_GOODBYE_SECONDS: Final = 5.0
_FRAMES: Final = 8


def run_worker(env: Mapping[str, str], stop: Stop) -> int:
    """Work until there is nothing more to do, write a result, and return the exit code.

    0: there is no more batch, the run has ended, or another worker takes this one's place; 65: the environment is not
    usable; 143: SIGTERM; 1: the operator refuses this worker, or it failed by itself.
    """
    try:
        worker = PoolWorker(read_settings(env), stop)
        code, message = worker.work()
        batches = worker.batches
    except PermanentError as error:
        code, message, batches = contract.EXIT_PERMANENT, str(error), 0
    except Exception as error:
        traceback.print_exc()
        code, message, batches = 1, str(to_worker_error(error)), 0
    stop.ignore_signals()
    text = f"{pluralize(batches, 'batch', 'batches')} done: {message}" if code == contract.EXIT_DONE else message
    result = failed_result(text)
    if code == contract.EXIT_DONE:
        result = StageResult(v=contract.VERSION, outcome=Outcome.DONE, message=truncate(text, MESSAGE_MAX_CHARS))
    write_result(env, result)
    log_event(env, "worker ends", exit_code=code, batches=batches, message=message)
    return code


class PoolWorker:
    """One worker, with one batch at a time."""

    def __init__(self, settings: Settings, stop: Stop) -> None:
        """Prepare; nothing is sent yet."""
        self.batches = 0
        """The batches that were taken, however they ended."""
        self._settings = settings
        self._began = time.monotonic()
        self._stop = stop
        self._log_event = partial(log_event, settings.env)
        self._client = self._new_client()
        self._courier = FetchedCourier(self._new_client())
        check = CancellationClient.from_env(settings.env, self._log_event)
        self._watch = CancellationWatch(check, stop.interrupt, self._log_event)
        self._watchdog = Watchdog(self._say_that_it_hangs)
        self._memory = MemoryBound(limit_bytes())
        self._reports: list[Report] = []
        self._held: BatchCourse | None = None
        """The batch that was claimed and of which there is no report yet."""
        self._leaving: str | None = None

    def work(self) -> tuple[int, str]:
        """Claim and work; return the exit code and why the worker ends."""
        self._stop.install_interrupt()
        self._stop.set_cancellation_client(self._watch)
        env = self._settings.env
        self._log_event("worker starts", worker=env.get(ENV_WORKER))
        try:
            while True:
                answer = self._claim()
                if answer.claim is None:
                    return contract.EXIT_DONE, answer.cancelled or answer.exit or self._leaving or "no more batches"
                self._take(answer.claim)
        except EndedError as error:
            return error.code, str(error)
        except Stopped:
            self._stop.ignore_signals()
            if self._held is not None:
                self._reports.append(_report(self._held, ReportOutcome.STOPPED, message="stopped by SIGTERM"))
            self._leave("stopped by SIGTERM", _GOODBYE_SECONDS, self._client, self._reports)
            return EXIT_STOPPED, "stopped by SIGTERM"

    def _claim(self) -> ClaimAnswer:
        """Hand in the reports and ask for a batch until there is an answer; or say that the worker leaves.

        Raises:
            EndedError: the run is gone, or this worker is not wanted any more.
            Stopped: SIGTERM came.
        """
        backoff, unanswered = Backoff(), False
        while True:
            if self._stop.sigterm_received:
                raise Stopped
            leaving = self._watch.stop_reason() or self._leaving
            request = ClaimRequest(
                reports=tuple(self._reports), wait_seconds=0 if leaving else CLAIM_WAIT_SECONDS, leaving=leaving
            )
            try:
                answer = self._client.claim(request)
            except NoAnswerError as error:
                if not unanswered:
                    self._log_event("the operator gives no answer, asking again", why=str(error))
                unanswered = True
                time.sleep(backoff.pause(error))
                continue
            self._reports.clear()
            backoff = Backoff()
            if answer.cancelled is not None:
                self._log_event("ingest run cancelled, ending", why=answer.cancelled)
            if leaving is not None:
                return ClaimAnswer(cancelled=answer.cancelled) if answer.cancelled else ClaimAnswer(exit=leaving)
            if not answer.wait:
                return answer

    def _take(self, claim: Claim) -> None:
        """Take a batch through its stages, and keep the report.

        Raises:
            EndedError: the run is gone, or this worker is not wanted any more; then there is no report.
            Stopped: SIGTERM came.
        """
        course = self._held = BatchCourse(
            claim, self._settings.stages, self._stop, client=self._client, courier=self._courier, watch=self._watch
        )
        self._watch.start()
        self._log_batch(claim, "batch claimed")
        signal.signal(signal.SIGALRM, lambda *_: course.on_alarm())
        self._watchdog.watch(course)
        try:
            report = self._attempt(claim, course)
            self._stop.ignore_signals()
        finally:
            course.close()
            self._watchdog.watch(None)
        if report is not None:
            self._reports.append(report)
            failed_in = course.stage if report.outcome is ReportOutcome.FAILED else None
            fields = report.model_dump(mode="json", by_alias=True, exclude_none=True, exclude=_IDENTITY)
            self._log_batch(claim, "batch ended", failed_in, **fields)
        self._held = None
        self.batches += 1
        self._leaving = self._leaving or self._reason_to_leave()
        self._stop.end_batch()

    def _attempt(self, claim: Claim, course: BatchCourse) -> Report | None:
        """Run the pipeline; return what to report, or None if the batch is not this worker's any more."""
        # After the first claim, because the worker is to ask for it soon.
        from ingestrun.worker.context import read_context
        from ingestrun.worker.pipeline import run_batch

        stages = range(len(self._settings.stages))
        error: BaseException | None = None
        try:
            try:
                course.begin()
                contexts = [read_context(self._settings.stage_env(claim, index)) for index in stages]
                result = run_batch(contexts, self._stop, course)
            except BaseException as raised:
                error = raised
            self._stop.end_interruptions()
        except (Cancelled, Abandoned, DeadlineExceeded, EndedError) as late:
            # An interrupt comes once in a batch at most, so it comes here or above.
            error = late
        if error is not None:
            return self._report_of(error, course)
        return _report(
            course, ReportOutcome.DONE, written=result.written, rejected=result.rejected, manifest=result.manifest
        )

    def _report_of(self, error: BaseException, course: BatchCourse) -> Report | None:
        match error:
            case Cancelled():
                self._log_batch(course.claim, "ingest run cancelled, skipping", course.stage, why=str(error))
                return _report(course, ReportOutcome.CANCELLED, message=str(error))
            case Abandoned():
                what = "the batch is not this worker's any more, skipping"
                self._log_batch(course.claim, what, course.stage, why=str(error))
                return None
            case DeadlineExceeded():
                return self._failure(course, str(error), reason=REASON_DEADLINE)
            case Exception() if not isinstance(error, EndedError):
                return self._failure_of(error, course)
        raise error

    def _failure_of(self, error: Exception, course: BatchCourse) -> Report:
        failure = to_worker_error(error)
        log = None
        if failure is not error:
            traceback.print_exception(error)
            log = _frames(error)
        if isinstance(error, MemoryError):
            self._leaving = "out of memory"
        return self._failure(
            course,
            str(failure),
            reason=failure.reason if isinstance(failure, PermanentError) else None,
            permanent=failure.permanent,
            rejected=failure.rejected or None,
            log=log,
        )

    def _failure(self, course: BatchCourse, message: str, **more: object) -> Report:
        stage = self._settings.stages[course.stage].label
        return _report(course, ReportOutcome.FAILED, stage=stage, message=message, **more)

    def _reason_to_leave(self) -> str | None:
        most = self._settings.max_batches
        if most is not None and self.batches >= most:
            return f"recycled after {pluralize(self.batches, 'batch', 'batches')}"
        longest = self._settings.max_seconds
        if longest is not None and time.monotonic() - self._began >= longest:
            return f"recycled after {longest} s"
        self._memory.add_batch(resident_bytes())
        if self._memory.growth(resident_bytes()) is None:
            return None
        release_memory()
        grown = self._memory.growth(resident_bytes())
        return f"recycled: {grown}" if grown else None

    def _leave(self, why: str, seconds: float, client: PoolClient, reports: list[Report]) -> None:
        """Hand in the reports and say that this worker takes no batch any more; try for so many seconds."""
        until = time.monotonic() + seconds
        backoff = Backoff()
        while (left := until - time.monotonic()) > 0:
            try:
                client.claim(ClaimRequest(reports=tuple(reports), leaving=why), timeout=left)
            except NoAnswerError as error:
                time.sleep(max(0.0, min(backoff.pause(error), until - time.monotonic())))
            except EndedError:
                return
            else:
                return

    def _say_that_it_hangs(self, course: BatchCourse) -> None:
        """Report the batch of a stage that can't be interrupted; the watchdog ends the process then.

        Of a commit that hangs it is not known whether it publishes, so nothing is reported of it.
        """
        stage = self._settings.stages[course.stage].label
        message = f"{course.exceeded_message()}, and could not be interrupted: the worker was ended"
        reports = [*self._reports]
        if not course.committing:
            reports.append(self._failure(course, message, reason=REASON_DEADLINE))
        self._log_batch(course.claim, "stage hangs, the worker ends", course.stage, committing=course.committing)
        write_result(self._settings.env, failed_result(f"batch {course.claim.batch}, {stage}: {message}"))
        self._leave(f"{stage} hangs", _HUNG_GOODBYE_SECONDS, self._new_client(), reports)
        sys.stdout.flush()

    def _new_client(self) -> PoolClient:
        return PoolClient(self._settings.url, self._settings.token, self._settings.ca)

    def _log_batch(self, claim: Claim, event: str, stage: int | None = None, **fields: object) -> None:
        env = {
            **self._settings.env,
            contract.ENV_BATCH: str(claim.batch),
            contract.ENV_ATTEMPT: str(claim.attempt),
        }
        if stage is not None:
            env |= {name: self._settings.stage_env(claim, stage).get(name, "") for name in _STAGE_VARIABLES}
        log_event(env, event, **fields)


_IDENTITY: Final = {"batch", "attempt", "stage"}
"""The fields of a report that every line of the log has by itself."""
_STAGE_VARIABLES: Final = (contract.ENV_STAGE, contract.ENV_HOOK)


def _report(course: BatchCourse, outcome: ReportOutcome, *, message: str | None = None, **more: object) -> Report:
    text = None if message is None else truncate(message, MESSAGE_MAX_CHARS)
    claim = course.claim
    return Report.model_validate(
        {
            "batch": claim.batch,
            "attempt": claim.attempt,
            "outcome": outcome,
            "fetched": course.fetched_result,
            "message": text,
            **more,
        }
    )


def _frames(error: Exception) -> str:
    """Return where an unforeseen error was raised, without its text, which may hold anything."""
    frames = traceback.extract_tb(error.__traceback__)[-_FRAMES:]
    lines = [f"{frame.filename.rpartition('/')[2]}:{frame.lineno} in {frame.name}" for frame in frames]
    return truncate("\n".join(lines), LOG_MAX_CHARS)
