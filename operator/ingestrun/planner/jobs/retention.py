"""The retention of Jobs: none is deleted before the stored status counts its batch, and many go by one call.

While a run goes on, Jobs of published and of failed batches are deleted as soon as there are enough of them to be
worth a call. The Jobs of the newest failed batches stay with their pods, so that `kubectl logs` can show their logs.
A minute after the end all other Jobs are deleted; with `secondsAfterFinished` the kept Jobs are deleted after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Final

from ingestrun.model.ranges import IndexRanges
from ingestrun.model.run import IngestRun
from ingestrun.planner.actions import DeleteJobs
from ingestrun.planner.batch.attempt import Attempt
from ingestrun.planner.batch.pipeline import ON_CANCEL_STEP
from ingestrun.planner.batch.state import is_checkpointed

DELETE_BATCHES: Final = 32
"""Number of batches whose Jobs one call deletes while the run goes on, so that each batch costs a 32nd of a call."""
MAX_DELETE_BATCHES: Final = 512
"""Most batches that one call may name, because their numbers are part of a URL (seven characters and a comma each)."""


def jobs_to_delete(run: IngestRun, attempts: Sequence[Attempt]) -> DeleteJobs | None:
    """Return the Jobs that may be deleted while the run goes on; None while there are too few to be worth a call.

    The stored status decides, and not the planned one, so that deleted Jobs are counted even if the plan's own write
    fails.
    """
    batches = run.status.batches
    kept = kept_failed_batches(run)
    ended = {
        attempt.batch
        for attempt in attempts
        if not attempt.job.deleting
        and (attempt.batch in batches.published or attempt.batch in batches.failed)
        and attempt.batch not in kept
    }
    if len(ended) < DELETE_BATCHES:
        return None
    return DeleteJobs(batches=IndexRanges(sorted(ended)[:MAX_DELETE_BATCHES]))


def jobs_to_delete_after_end(
    run: IngestRun, attempts: Sequence[Attempt], *, now: datetime, keep: bool = True
) -> DeleteJobs | None:
    """Return the Jobs that may be deleted once the run has ended and its status is Drained; None if none is left.

    Without `keep` also those that the run's retention would keep.
    """
    expire_at = jobs_expire_at(run)
    if not keep or (expire_at is not None and now >= expire_at):
        return DeleteJobs(batches=None, clean_up=True) if attempts else None
    return jobs_to_delete_except_kept(run, [attempt for attempt in attempts if attempt.step != ON_CANCEL_STEP])


def jobs_to_delete_except_kept(run: IngestRun, attempts: Sequence[Attempt]) -> DeleteJobs | None:
    """Return all Jobs but those of the newest failed batches; None if none is left.

    The status of a run that has Failed does not record the ends of the batches that were in flight. Their Jobs are
    the only trace, and stay as well. A cancelled run's status does record them.
    """
    kept = kept_failed_batches(run)
    if run.status.cancellation is None:
        kept = kept | run.status.batches.in_flight
    if all(attempt.job.deleting or (attempt.batch in kept and not attempt.worker) for attempt in attempts):
        return None
    return DeleteJobs(batches=None, kept=kept)


def is_accounted(run: IngestRun, attempt: Attempt) -> bool:
    """Tell whether the stored status has all that is needed of an attempt: its batch's end, or a checkpoint."""
    batches = run.status.batches
    if run.status.drained:
        return True
    if attempt.worker:
        return all(entry.worker != attempt.batch for entry in run.status.workers or ())
    if attempt.batch not in batches.in_flight:
        return True
    checkpoint = batches.checkpoint_by_batch.get(attempt.batch)
    return checkpoint is not None and is_checkpointed(checkpoint, attempt)


def jobs_expire_at(run: IngestRun) -> datetime | None:
    """Return when an ended run's last Jobs are deleted; None: with the run."""
    seconds = run.spec.job_retention.seconds_after_finished
    if seconds is None or run.status.completion_time is None:
        return None
    return run.status.completion_time + timedelta(seconds=seconds)


def kept_failed_batches(run: IngestRun) -> IndexRanges:
    """Return the newest failed batches, whose Jobs stay for their logs. By index, the order in which they began."""
    number = run.spec.job_retention.failed_batches
    return IndexRanges(list(run.status.batches.failed)[-number:] if number else ())
