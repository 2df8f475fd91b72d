"""Reports that a pool's workers make after the end of their run: of what had permission to publish, and landed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from ingestrun.model.pool import (
    ClaimAnswer,
    ClaimRequest,
    FetchedAnswer,
    FetchedRequest,
    PublishAnswer,
    Report,
    ReportOutcome,
)
from ingestrun.model.ranges import IndexRanges
from ingestrun.model.resume import LandedRecords
from ingestrun.model.status import AfterEndStatus, IngestRunStatus, Phase
from ingestrun.planner.pool.requests import Answer, WorkerRequest


def with_late_reports(status: IngestRunStatus, requests: Sequence[WorkerRequest]) -> IngestRunStatus:
    """Return the status of an ended run with what its workers report; a batch is released by its report alone.

    One without a report stays with its worker, because it is not known whether it was published.
    """
    for request in requests:
        for report in request.reports:
            status = _with_report(status, request.worker, report)
    return status


def _with_report(status: IngestRunStatus, worker: int, report: Report) -> IngestRunStatus:
    entries = status.workers or []
    entry = next((each for each in entries if each.worker == worker), None)
    if entry is None or (entry.batch, entry.batch_attempt or 0) != (report.batch, report.attempt):
        return status
    released = [each if each is not entry else each.replace(batch=None, batch_attempt=None) for each in entries]
    status = status.replace(workers=released)
    if report.outcome is not ReportOutcome.DONE or report.batch not in _permitted(status):
        return status
    before = status.after_end or AfterEndStatus()
    return status.replace(
        after_end=AfterEndStatus(
            published=before.published | IndexRanges([report.batch]),
            records=LandedRecords(
                published=before.records.published + (report.written or 0),
                rejected=before.records.rejected + (report.rejected or 0),
            ),
        )
    )


def _permitted(status: IngestRunStatus) -> IndexRanges:
    """Return the batches that may be published: one whose earlier attempt had permission may be found published."""
    earlier = (checkpoint.batch for checkpoint in status.batches.checkpoints if checkpoint.may_have_landed)
    return (status.batches.publishing or IndexRanges()) | IndexRanges(earlier)


def unreported(status: IngestRunStatus) -> IndexRanges:
    """Return the batches of which an attempt had permission to publish, and of which nobody knows whether it has."""
    held = IndexRanges(entry.batch for entry in status.workers or () if entry.batch is not None)
    publishing = status.batches.publishing or IndexRanges()
    earlier = IndexRanges(checkpoint.batch for checkpoint in status.batches.checkpoints if checkpoint.may_have_landed)
    told = status.after_end.published if status.after_end is not None else IndexRanges()
    return (publishing - (publishing - held) | earlier) - told


def answers_after_end(phase: Phase | None, requests: Iterable[WorkerRequest]) -> Mapping[WorkerRequest, Answer]:
    """Return the answer to each request: nothing more is to be done for the run."""
    why = f"the run is {phase.value if phase is not None else 'over'}"
    return {request: _answer(request, why) for request in requests}


def _answer(request: WorkerRequest, why: str) -> Answer:
    if isinstance(request.body, ClaimRequest):
        return ClaimAnswer(cancelled=why)
    if isinstance(request.body, FetchedRequest):
        return FetchedAnswer(cancelled=why)
    return PublishAnswer(cancelled=why)
