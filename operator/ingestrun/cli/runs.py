"""A run as the plugin shows it, read from its JSON.

The models of `ingestrun.model` read more, and check it, but take longer to import than a command may take to start. So
this reads the few fields that are shown, and takes a status that it does not understand as one without them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from functools import cached_property
from typing import Any, Final

from ingestrun.model.lineage import parents_of
from ingestrun.model.names import GROUP, KIND, RunKey
from ingestrun.model.phase import Phase, is_final
from ingestrun.model.ranges import IndexRanges
from ingestrun.model.times import parse_time

SINGULAR: Final = KIND.lower()
FULL_SINGULAR: Final = f"{SINGULAR}.{GROUP}"
"""The name of the kind with which kubectl begins its messages."""

Json = dict[str, Any]


class Run:
    """A view of a run's JSON."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        self.body = body
        self.meta: Mapping[str, Any] = body["metadata"]
        self.spec: Mapping[str, Any] = body.get("spec") or {}
        self.status: Mapping[str, Any] = body.get("status") or {}
        self.batches: Mapping[str, Any] = self.status.get("batches") or {}
        self.cancellation: Mapping[str, Any] = self.status.get("cancellation") or {}

    @property
    def key(self) -> RunKey:
        """The run's identity."""
        return RunKey.of(self.body)

    @property
    def name(self) -> str:
        """The run's name."""
        return str(self.meta["name"])

    @property
    def namespace(self) -> str:
        """The run's namespace."""
        return str(self.meta["namespace"])

    @property
    def uid(self) -> str:
        """The run's UID."""
        return str(self.meta["uid"])

    @property
    def resource_version(self) -> str:
        """The version of the object as it was read."""
        return str(self.meta["resourceVersion"])

    @property
    def reference(self) -> str:
        """The run as `kubectl get -o name` prints it."""
        return f"{FULL_SINGULAR}/{self.name}"

    @property
    def phase(self) -> str:
        """The phase; Pending until the operator has seen the run."""
        return str(self.status.get("phase") or Phase.PENDING)

    @property
    def ended(self) -> bool:
        """Tell whether the phase is final."""
        return is_final(self.phase)

    @property
    def cancel_requested(self) -> bool:
        """Tell whether the spec asks for a cancel."""
        return self.spec.get("cancel") is True

    @property
    def created(self) -> datetime:
        """The time of its creation."""
        return parse_time(self.meta["creationTimestamp"])

    @property
    def started(self) -> datetime | None:
        """The time when its first batch was begun."""
        return _time(self.status.get("startTime"))

    @property
    def completed(self) -> datetime | None:
        """The time of its end."""
        return _time(self.status.get("completionTime"))

    @property
    def parents(self) -> list[RunKey]:
        """The runs above it."""
        return parents_of(self.body)

    def condition(self, kind: str) -> Mapping[str, Any]:
        """Return the condition of that type; empty if there is none."""
        return next((it for it in self.status.get("conditions") or () if it.get("type") == kind), {})

    def holds(self, kind: str) -> bool:
        """Tell whether a condition is True."""
        return self.condition(kind).get("status") == "True"

    def since(self, kind: str) -> datetime | None:
        """Return the time of a condition's last transition."""
        return _time(self.condition(kind).get("lastTransitionTime"))

    @property
    def reason(self) -> str:
        """The reason of the condition Succeeded, in one word."""
        return str(self.condition("Succeeded").get("reason") or "")

    @property
    def message(self) -> str:
        """The same in a sentence."""
        return str(self.condition("Succeeded").get("message") or "")

    @property
    def drained(self) -> bool:
        """Tell whether the run and its last pod have ended."""
        return self.ended and self.holds("Drained")

    def indexes(self, field: str) -> IndexRanges:
        """Return the batches of a field of `status.batches`; none if it is not understood."""
        return _ranges(self.batches.get(field))

    def late(self, field: str) -> IndexRanges:
        """Return the batches of a field of `status.cancellation`."""
        return _ranges(self.cancellation.get(field))

    @cached_property
    def published(self) -> int:
        """The number of published batches."""
        return len(self.indexes("published"))

    @property
    def total(self) -> int | None:
        """The number of batches; None where it is not known before the end."""
        partitions = (self.spec.get("batches") or {}).get("partitions") or {}
        if partitions.get("values"):
            return len(partitions["values"])
        count = partitions.get("count")
        return int(count) if count is not None else None

    @property
    def progress(self) -> str:
        """The batches published, of how many where that is known."""
        return f"{self.published}/{self.total}" if self.total is not None else str(self.published)

    def records(self, field: str) -> int:
        """Return a count of `status.records`."""
        return int((self.status.get("records") or {}).get(field) or 0)

    def age(self, now: datetime) -> timedelta:
        """Return the time since its creation."""
        return now - self.created

    def duration(self, now: datetime) -> timedelta | None:
        """Return the time from its start to its end, or until now; None if it has not begun."""
        if self.started is None:
            return None
        return (self.completed or now) - self.started


def _time(text: object) -> datetime | None:
    return parse_time(text) if isinstance(text, str) else None


def _ranges(text: object) -> IndexRanges:
    try:
        return IndexRanges.parse(text) if isinstance(text, str) else IndexRanges()
    except ValueError:
        return IndexRanges()


def descendants(root: RunKey, runs: Iterable[Run]) -> list[Run]:
    """Return the runs below a run, each level after the one above it, in the order of their names."""
    below: dict[RunKey, list[Run]] = {}
    for run in runs:
        for parent in run.parents:
            below.setdefault(parent, []).append(run)
    found: dict[RunKey, Run] = {}
    level = [root]
    while level:
        children = sorted((run for key in level for run in below.get(key, ())), key=lambda run: run.name)
        fresh = {run.key: run for run in children if run.key not in found and run.key != root}
        found |= fresh
        level = list(fresh)
    return list(found.values())
