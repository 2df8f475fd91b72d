"""The process's memory of each run beside the watched objects: one record for each run, dropped in one place.

No record has to survive a restart: a new process asks the API server, or is refused once more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final

from ingestrun.model.status import AttemptId
from ingestrun.planner.actions import CreateRejection
from ingestrun.planner.batch.attempt import Attempt
from ingestrun.planner.batch.obstacle import Obstacle
from ingestrun.planner.pool.requests import Answer, Replaced, WorkerRequest

POD_GRACE_SECONDS: Final = 0.5
"""Seconds that an ended Job waits for the watched end of its pod, because the two watches race. Then the pods are
listed."""


@dataclass(slots=True, kw_only=True)
class RunMemory:
    """The record of one run. A pass takes it once, at its beginning, and hands it on to the functions that it calls."""

    version: str | None = None
    """The newest resourceVersion that a pass has taken up: it has planned from it, or written it itself. So a watch
    event that shows this version needs no look."""
    observed: bool = False
    """A pass of this process has observed the run as a whole."""
    must_read: bool = False
    """True if the run has to be read from the API server before the next plan: the cached one is old."""
    rejection: CreateRejection | None = None
    """The API server's refusal of the run's last create, if it has accepted none since."""
    unanswered_create: bool | None = None
    """True if a create may still reach the API server, because its answer was lost or because an earlier process sent
    it. None until the first pass."""
    skipped: frozenset[AttemptId] = frozenset()
    """The attempts that a cancel has kept from starting, logged already."""
    sidecars_told: frozenset[tuple[str, ...]] = frozenset()
    """The containers, by their names in one pod, that were ended, of which an Event was posted already."""
    sidecars_refused: frozenset[tuple[str, ...]] = frozenset()
    """The containers that the API server does not let the operator end, logged already."""
    awaiting_pods: dict[str, float | None] = field(default_factory=dict)
    """Time (monotonic) since which the end of an ended Job's pod is awaited, by the Job's UID. None: the
    pods were listed since then, and its pod was not among them or had not ended."""
    told: frozenset[str] = frozenset()
    """The troubles of the run that were told since its last pass that went well, so that a retry does not repeat them.
    Each is the reason of an Event, or the name of an error."""
    drain_checked_at: datetime | None = None
    """Time at which the Jobs of the ended run were last listed live."""
    obstacles: dict[str, Obstacle] = field(default_factory=dict)
    """The obstacle to each Job's start, by the Job's UID, also of one that has ended: for its failure's message."""

    requests: dict[WorkerRequest, asyncio.Future[Answer]] = field(default_factory=dict)
    """The requests of the pool's workers that wait for an answer."""

    holds: dict[tuple[int, int, int], float] = field(default_factory=dict)
    """Time (monotonic) since which this process has known of a worker's hold on an attempt at a batch, by worker, batch
    and attempt."""

    def note_holds(self, held: Iterable[tuple[int, int, int]], *, now: float) -> Mapping[int, float]:
        """Note the attempts that workers hold, in place of those noted before; return for how long each worker has."""
        self.holds = {hold: self.holds.get(hold, now) for hold in held}
        return {hold[0]: now - since for hold, since in self.holds.items()}

    def answer(self, answers: Mapping[WorkerRequest, Answer]) -> None:
        """Give these answers; a worker that has hung up meanwhile asks again."""
        for request, answer in answers.items():
            waiting = self.requests.pop(request, None)
            if waiting is not None and not waiting.done():
                waiting.set_result(answer)

    def keep_obstacles(self, attempts: Iterable[Attempt]) -> None:
        """Note the obstacles of these attempts, of all that the run has, and forget those of Jobs that are gone."""
        found = {attempt.job.uid: attempt.obstacle or attempt.last_obstacle for attempt in attempts}
        self.obstacles = {uid: obstacle for uid, obstacle in found.items() if obstacle is not None}

    def await_pods(self, job_uids: Iterable[str], *, now: float) -> tuple[frozenset[str], bool]:
        """Note the ended Jobs whose pod's end has not been seen (`now` is monotonic), in place of those noted before.

        Returns the Jobs that are still within the grace, and whether that of another is over, so that pods are listed.
        """
        self.awaiting_pods = {uid: self.awaiting_pods.get(uid, now) for uid in job_uids}
        waiting = {uid: since for uid, since in self.awaiting_pods.items() if since is not None}
        young = frozenset(uid for uid, since in waiting.items() if now - since < POD_GRACE_SECONDS)
        return young, len(young) < len(waiting)

    def keep_awaiting(self, young: Collection[str]) -> None:
        """Await the pods of these Jobs alone: of others, what a list lacks is missing for good."""
        self.awaiting_pods = {uid: since if uid in young else None for uid, since in self.awaiting_pods.items()}

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

    def has_taken_up(self, uid: str, version: str) -> bool:
        """Tell whether a pass of the run has taken up that version."""
        memory = self._by_uid.get(uid)
        return memory is not None and memory.version == version

    def forget(self, uid: str) -> None:
        """Drop the record of a run that is gone, or has ended and needs nothing more."""
        memory = self._by_uid.pop(uid, None)
        if memory is not None:
            memory.answer(dict.fromkeys(memory.requests, Replaced("the run is over, or gone")))
