"""Staleness: how long ago a run last made progress, judged by the API server's clock."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Final

from ingestrun.cli.runs import Json, Run
from ingestrun.model.names import LABEL_ATTEMPT
from ingestrun.model.phase import Phase
from ingestrun.model.times import parse_time

STALE_PHASES: Final = frozenset({Phase.PENDING, Phase.RUNNING})
"""Phases of a run that can be stale. A suspended one was told to stand still."""


def may_be_stale(run: Run) -> bool:
    """Tell whether a run should be making progress: it is neither suspended, nor over, nor about to be."""
    suspended = run.spec.get("suspend") is True
    leaves = run.cancel_requested or "deletionTimestamp" in run.meta
    return run.phase in STALE_PHASES and not suspended and not leaves


def last_progress(run: Run, jobs: Iterable[Json] = ()) -> datetime:
    """Return when a run last made progress, by its status and its Jobs.

    Progress is what can happen only once: the run is created, a batch is fetched, published or given up, a stage begins
    for the first time or ends well. A retry is none. A run that was suspended, or had no room, begins anew with the end
    of that.
    """
    moments = [run.created, run.started, _time(run.status.get("lastProgressTime"))]
    moments += [
        run.since(kind) for kind in ("Suspended", "Backpressured") if run.condition(kind).get("status") == "False"
    ]
    for job in jobs:
        status = job.get("status") or {}
        if (job["metadata"].get("labels") or {}).get(LABEL_ATTEMPT) == "0":
            moments.append(_time(status.get("startTime")))
        if status.get("succeeded"):
            moments.append(_time(status.get("completionTime")))
    return max(moment for moment in moments if moment is not None)


def stands_still(run: Run, now: datetime, jobs: Iterable[Json] = ()) -> timedelta:
    """Return for how long a run has made no progress; `now` is the server's time."""
    return now - last_progress(run, jobs)


def _time(text: object) -> datetime | None:
    return parse_time(text) if isinstance(text, str) else None
