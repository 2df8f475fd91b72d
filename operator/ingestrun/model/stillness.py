"""Staleness of runs as people judge it: for how long a run has made no progress, by its own times and its Jobs'."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any, Final

from ingestrun.model.names import LABEL_ATTEMPT
from ingestrun.model.phase import Phase
from ingestrun.model.times import parse_time

_STALE_PHASES: Final = (None, Phase.PENDING, Phase.RUNNING)


def may_be_stale(run: Mapping[str, Any], *, cancelled: bool) -> bool:
    """Tell whether a run, as JSON, should be making progress: it is not suspended, nor over, nor about to be.

    `cancelled` is whether it is asked to be cancelled, as far as the caller can tell.
    """
    leaves = cancelled or "deletionTimestamp" in run["metadata"]
    suspended = (run.get("spec") or {}).get("suspend") is True
    return (run.get("status") or {}).get("phase") in _STALE_PHASES and not suspended and not leaves


def last_progress(run: Mapping[str, Any], jobs: Iterable[Mapping[str, Any]] = ()) -> datetime:
    """Return when a run, as JSON, last made progress.

    Progress is what can happen only once: the run is created, a batch is fetched, published or given up, a stage begins
    for the first time or ends well. A retry is none. A run that was suspended, or had no room, begins anew with the end
    of that.
    """
    status = run.get("status") or {}
    moments = [run["metadata"]["creationTimestamp"], status.get("startTime"), status.get("lastProgressTime")]
    moments += [
        condition.get("lastTransitionTime")
        for condition in status.get("conditions") or ()
        if condition.get("type") in ("Suspended", "Backpressured") and condition.get("status") == "False"
    ]
    for job in jobs:
        of_job = job.get("status") or {}
        if (job["metadata"].get("labels") or {}).get(LABEL_ATTEMPT) == "0":
            moments.append(of_job.get("startTime"))
        if of_job.get("succeeded"):
            moments.append(of_job.get("completionTime"))
    return max(parse_time(moment) for moment in moments if moment)
