"""The process's memory of each run beside the watched objects: one record for each run, dropped in one place.

No record has to survive a restart: a new process asks the API server, or is refused once more.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime

from ingestrun.model.status import AttemptId
from ingestrun.planner.actions import CreateRejection


@dataclass(slots=True, kw_only=True)
class RunMemory:
    """The record of one run. A pass takes it once, at its beginning, and hands it on to the functions that it calls."""

    must_read: bool = False
    """True if the run has to be read from the API server before the next plan: the cached one is old."""
    rejection: CreateRejection | None = None
    """The API server's refusal of the run's last create, if it has accepted none since."""
    unanswered_create: bool | None = None
    """True if a create may still reach the API server, because its answer was lost or because an earlier process sent
    it. None until the first pass."""
    skipped: frozenset[AttemptId] = frozenset()
    """The attempts that a cancel has kept from starting, logged already."""
    awaiting_pods: dict[str, float | None] = field(default_factory=dict)
    """Time (monotonic) since which the end of an ended Job's pod is awaited, by the Job's UID. None: the
    pods were listed since then, and its pod was not among them or had not ended."""
    drain_checked_at: datetime | None = None
    """Time at which the Jobs of the ended run were last listed live."""

    @property
    def awaits_pods(self) -> bool:
        """Tell whether the end of a pod may still arrive."""
        return any(since is not None for since in self.awaiting_pods.values())


class RunMemories:
    """The records of all runs, by UID. `RunCache` forgets a run's record together with its other entries."""

    def __init__(self) -> None:
        self._by_uid: dict[str, RunMemory] = {}

    def recall(self, uid: str) -> RunMemory:
        """Return the record of a run that is in the cache; an empty one at first."""
        return self._by_uid.setdefault(uid, RunMemory())

    def forget(self, uid: str) -> None:
        """Drop the record of a run that is gone, or has ended and needs nothing more."""
        self._by_uid.pop(uid, None)
