"""Staleness: for how long a run makes no progress by the API server's clock; the rule is in `model.stillness`."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta

from ingestrun.cli.runs import Json, Run
from ingestrun.model import stillness


def may_be_stale(run: Run) -> bool:
    """Tell whether a run should be making progress: it is neither suspended, nor over, nor about to be."""
    return stillness.may_be_stale(run.body, cancelled=run.cancel_requested)


def last_progress(run: Run, jobs: Iterable[Json] = ()) -> datetime:
    """Return when a run last made progress, by its status and its Jobs."""
    return stillness.last_progress(run.body, jobs)


def stands_still(run: Run, now: datetime, jobs: Iterable[Json] = ()) -> timedelta:
    """Return for how long a run has made no progress; `now` is the server's time."""
    return now - last_progress(run, jobs)
