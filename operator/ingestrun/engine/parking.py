"""Room under a quota on Jobs, which counts ended ones too: what they have come to is put in the status, and they go.

Without it batches in flight that each hold ended Jobs and wait for one more could use a quota up and wait for ever.
So where a Job is refused for want of room, batches that wait are parked, the first ones first: one status write says
all that their next Jobs need (`Parked`), and only when it is stored are the Jobs deleted, each by its UID. Nothing is
done twice. What comes free goes to the run's parked batches before its others (`plan`), so whoever has taken the last
place can be parked in turn: a quota of one Job is enough to get on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Final

from ingestrun.engine.accounting import parked_of, with_
from ingestrun.engine.batches import Batch, covers
from ingestrun.engine.decisions import Delete
from ingestrun.engine.facts import JobView
from ingestrun.engine.history import counted_retries
from ingestrun.model.run import IngestRun
from ingestrun.model.status import IngestRunStatus

MAX_PARKED: Final = 6
"""How many batches are parked at once: about 100 bytes each in a status that has other things to tell."""


def with_parked(
    status: IngestRunStatus, waiting: Sequence[Batch], jobs: Iterable[JobView], *, places: int
) -> IngestRunStatus:
    """The status with as many of the batches parked that wait for a Job as it takes to free so many places.

    Those that are parked already free theirs too. A retry that is parked is counted here: its failed attempts are not
    there any more when the batch is accounted for.
    """
    holds = Counter(job.job.batch for job in jobs if not job.job.deleting)
    parked = parked_of(status.batches)
    newly = []
    for batch in waiting:
        if places <= 0:
            break
        entry = batch.parks
        if entry is None or not holds[batch.index] or (batch.index not in parked and len(parked) >= MAX_PARKED):
            continue
        places -= holds[batch.index]
        if parked.get(batch.index) != entry:
            parked[batch.index] = entry
            newly.append(batch)
    if not newly:
        return status
    return with_(
        status,
        batches=with_(status.batches, parked=[parked[index] for index in sorted(parked)]),
        retries=counted_retries(status.retries, (retry for batch in newly for retry in batch.retried)),
    )


def holds_room(flight: Sequence[Batch], jobs: Iterable[JobView]) -> bool:
    """Whether a batch in flight has a Job: it will end, or be parked, or go, and its place be free."""
    indexes = {batch.index for batch in flight}
    return any(job.job.batch in indexes for job in jobs)


def unneeded(run: IngestRun, jobs: Iterable[JobView]) -> tuple[Delete, ...]:
    """The Jobs of which the stored status keeps all that is needed."""
    parked = parked_of(run.status.batches)
    return tuple(
        Delete(job=job.job, why="kept in the status, to make room")
        for job in jobs
        if job.state.finished
        and not job.job.deleting
        and job.job.batch in parked
        and covers(parked[job.job.batch], job)
    )
