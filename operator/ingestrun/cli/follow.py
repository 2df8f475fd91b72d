"""Following of runs: a list, and then a watch from the version of that list on, so that no change is missed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime, timedelta
from typing import Final

from ingestrun.cli.client import Api, Listed, WatchExpired
from ingestrun.cli.runs import Run
from ingestrun.model.names import RunKey

DELETED: Final = "DELETED"
_WATCH_SECONDS: Final = 240.0


class Clock:
    """The server's time: that of an answer, and what has passed here since."""

    def __init__(self, at: datetime) -> None:
        self._at, self._since = at, time.monotonic()

    def now(self) -> datetime:
        """Return the server's time."""
        return self._at + timedelta(seconds=time.monotonic() - self._since)


class Follower:
    """The runs of one namespace, or of all, as they change."""

    def __init__(
        self, api: Api, scope: str | None, *, selector: str | None = None, field_selector: str | None = None
    ) -> None:
        """List the runs. Raises CliError."""
        self._api = api
        self._scope = scope
        self._selector = selector
        self._field_selector = field_selector
        self.runs: dict[RunKey, Run] = {}
        self.clock = Clock(self._list().at)

    def _list(self) -> Listed:
        listed = self._api.runs(self._scope, selector=self._selector, field_selector=self._field_selector)
        self.runs = {run.key: run for run in map(Run, listed.items)}
        self._version = listed.resource_version
        return listed

    def changes(self, seconds: float) -> Iterator[tuple[str, Run]]:
        """Yield each change with its kind, until so many seconds have passed or the watch ends. Raises CliError."""
        try:
            watched = self._api.watch_runs(
                self._scope,
                self._version,
                seconds=min(seconds, _WATCH_SECONDS),
                selector=self._selector,
                field_selector=self._field_selector,
            )
            for kind, body in watched:
                self._version = body["metadata"]["resourceVersion"]
                run = Run(body)
                if kind == DELETED:
                    self.runs.pop(run.key, None)
                else:
                    self.runs[run.key] = run
                yield kind, run
        except WatchExpired:
            before = self.runs
            self._list()
            yield from ((DELETED, run) for key, run in before.items() if key not in self.runs)
            yield from (("MODIFIED", run) for run in self.runs.values())

    def until(self, keys: Iterable[RunKey], done: Callable[[Run], bool], *, deadline: float) -> set[RunKey]:
        """Wait until each of the runs is done or deleted, and return those that are not by the deadline.

        The deadline is a time of `time.monotonic`. Raises CliError.
        """
        pending = {key for key in keys if key in self.runs and not done(self.runs[key])}
        while pending and (left := deadline - time.monotonic()) > 0:
            for kind, run in self.changes(left):
                if kind == DELETED or done(run):
                    pending.discard(run.key)
                if not pending or time.monotonic() >= deadline:
                    break
        return pending
