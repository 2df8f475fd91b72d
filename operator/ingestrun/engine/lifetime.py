"""How long a run may take, how long it may stand still, and how long it stays: from the spec to moments in time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from typing import Final

from ingestrun.engine import conditions as c
from ingestrun.engine.batches import Batch
from ingestrun.engine.decisions import Cause
from ingestrun.engine.facts import JobState, JobView
from ingestrun.model.names import OPERATOR_NAME
from ingestrun.model.run import IngestRun
from ingestrun.model.status import IngestRunStatus

FIRST_ATTEMPT: Final = 0


def deadline_of(run: IngestRun, status: IngestRunStatus, *, now: datetime) -> datetime | None:
    """When the run has taken too long; None without a limit, before the start and while it is suspended."""
    seconds, since = run.spec.active_deadline_seconds, _going_since(run, status, now=now)
    if seconds is None or since is None:
        return None
    return since + timedelta(seconds=seconds)


def stale_at(
    run: IngestRun, status: IngestRunStatus, flight: Sequence[Batch], jobs: Iterable[JobView], *, now: datetime
) -> datetime | None:
    """When the run will have stood still for too long; None where that does not count now.

    Progress is what can happen once only: a stage gets its node for the first time (so the one before has ended
    well), a fetch or a batch is accounted for. A retry is none, or a run that fails and retries for ever would
    never stand still. As long as it is backpressured with nothing running, and as long as all that it has are Jobs
    that wait for a node or for their admission, standing still is not the run's doing: its time begins anew afterwards.
    """
    seconds, since = run.spec.stale_after_seconds, _going_since(run, status, now=now)
    jobs = list(jobs)
    if seconds is None or since is None or _queued(flight):
        return None
    moments = [since, status.last_progress_time]
    if not any(job.state is JobState.RUNNING for job in jobs):
        moments.append(_over_since(status, c.BACKPRESSURED, now=now))
    moments += [job.pod.placed_at for job in jobs if job.pod is not None and job.job.attempt == FIRST_ATTEMPT]
    return max(moment for moment in moments if moment is not None) + timedelta(seconds=seconds)


def stale(run: IngestRun) -> Cause:
    """Why a run that has stood still is cancelled."""
    return Cause(
        kind="Stale",
        reason=f"no progress for {run.spec.stale_after_seconds} s (staleAfterSeconds)",
        requested_by=OPERATOR_NAME,
    )


def expiry_of(run: IngestRun) -> datetime | None:
    """When an ended run is to be deleted; None where it stays. That it is quiet is not asked here."""
    seconds, ended = run.spec.ttl_seconds_after_finished, run.status.completion_time
    if seconds is None or ended is None or run.metadata.deletion_timestamp is not None:
        return None
    return ended + timedelta(seconds=seconds)


def _going_since(run: IngestRun, status: IngestRunStatus, *, now: datetime) -> datetime | None:
    """Since when the run's time counts: its start or, as with a Job, the latest time that it was resumed."""
    if run.spec.suspend or status.start_time is None:
        return None
    resumed = _over_since(status, c.SUSPENDED, now=now)
    return max(status.start_time, resumed) if resumed is not None else status.start_time


def _over_since(status: IngestRunStatus, kind: str, *, now: datetime) -> datetime | None:
    """Since when a condition that held does not any more: now, if the status has yet to say so."""
    condition = status.condition(kind)
    if condition is None:
        return None
    return now if condition.status == "True" else condition.last_transition_time


def _queued(flight: Sequence[Batch]) -> bool:
    """Whether the run's only Jobs are ones that wait for a node, or to be admitted to a queue."""
    running = [batch.running for batch in flight if batch.running is not None]
    waits = [
        job.state is JobState.WAITING
        and job.job.attempt == FIRST_ATTEMPT
        and (job.pod is None or job.pod.placed_at is None)
        for job in running
    ]
    return bool(waits) and all(waits)
