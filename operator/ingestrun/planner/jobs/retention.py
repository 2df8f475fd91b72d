"""Which child Jobs may go, and when: never before the stored status accounts for their batch, and many by one call.

While a run goes on, Jobs of published and of failed batches are deleted as soon as there are enough of them to be
worth a call. The Jobs of the newest failed batches stay with their pods, so that `kubectl logs` has something to
show. A minute after the end all others go; with `secondsAfterFinished` these do, too, when their time has come.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Final

from ingestrun.model.ranges import IndexRanges
from ingestrun.model.run import IngestRun
from ingestrun.planner.actions import DeleteJobs
from ingestrun.planner.batch.attempt import Attempt
from ingestrun.planner.batch.ledger import in_flight
from ingestrun.planner.batch.pipeline import ON_CANCEL_STEP

DELETE_BATCHES: Final = 32
"""How many batches' Jobs are deleted by one call while the run goes on: what each batch pays is a 32nd of a call."""
MAX_DELETE_BATCHES: Final = 512
"""How many batches one call may name: their numbers are part of a URL, seven characters each and a comma."""


def jobs_to_delete(run: IngestRun, jobs: Sequence[Attempt]) -> DeleteJobs | None:
    """The Jobs that may go while the run goes on; None while there are too few to be worth a call.

    Judged by the status as it is stored, not as the plan has it: what is deleted is then accounted for whatever
    becomes of the plan's own write.
    """
    batches = run.status.batches
    kept = kept_failed_batches(run)
    done = {
        job.job.batch
        for job in jobs
        if not job.job.deleting
        and (job.job.batch in batches.published or job.job.batch in batches.failed)
        and job.job.batch not in kept
    }
    if len(done) < DELETE_BATCHES:
        return None
    return DeleteJobs(batches=IndexRanges(sorted(done)[:MAX_DELETE_BATCHES]))


def jobs_to_delete_after_end(run: IngestRun, jobs: Sequence[Attempt], *, now: datetime) -> DeleteJobs | None:
    """The Jobs that may go once the run has ended, and its status says that it is drained; None: none is left."""
    goes_at = jobs_expire_at(run)
    if goes_at is not None and now >= goes_at:
        return DeleteJobs(batches=None, clean_up=True) if jobs else None
    return jobs_to_delete_except_kept(run, [job for job in jobs if job.job.step != ON_CANCEL_STEP])


def jobs_to_delete_except_kept(run: IngestRun, jobs: Sequence[Attempt]) -> DeleteJobs | None:
    """All but those of the newest failed batches; None where none is left.

    The status of a run that has Failed does not say what became of the batches that were in flight: their Jobs are
    the only trace, and stay as well. A cancelled run's status does say it.
    """
    kept = kept_failed_batches(run)
    if run.status.cancellation is None:
        kept = kept | in_flight(run.status.batches)
    if all(job.job.deleting or job.job.batch in kept for job in jobs):
        return None
    return DeleteJobs(batches=None, kept=kept)


def jobs_expire_at(run: IngestRun) -> datetime | None:
    """When an ended run's last Jobs go; None: with the run."""
    seconds = run.spec.job_retention.seconds_after_finished
    if seconds is None or run.status.completion_time is None:
        return None
    return run.status.completion_time + timedelta(seconds=seconds)


def kept_failed_batches(run: IngestRun) -> IndexRanges:
    """The newest failed batches, whose Jobs stay for their logs. By index: it is the order in which they were begun."""
    number = run.spec.job_retention.failed_batches
    return IndexRanges(list(run.status.batches.failed)[-number:] if number else ())
