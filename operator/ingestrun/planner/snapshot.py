"""The snapshot that one plan is made from: a run and its observed objects, with derived values computed once."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property

from ingestrun.model.run import IngestRun
from ingestrun.model.status import AttemptId, IngestRunStatus
from ingestrun.planner.actions import CancelledParent, ChildRun, CreateRejection, LivePods, Predecessor
from ingestrun.planner.batch.attempt import Attempt
from ingestrun.planner.batch.ledger import batch_states, update_counters
from ingestrun.planner.batch.pipeline import ON_CANCEL_STEP
from ingestrun.planner.batch.state import BatchState
from ingestrun.planner.pool.batches import pool_batch_states, release
from ingestrun.planner.pool.requests import WorkerRequest
from ingestrun.planner.run.concurrency import ConcurrentRun
from ingestrun.planner.run.fair_sharing import Capacity
from ingestrun.planner.run.progress import with_unpublished


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Input of the planner. Properties are computed when first read, because an ended run needs few of them."""

    run: IngestRun
    attempts: Sequence[Attempt]
    """All known Jobs of the run, each with its pod; the Job of `spec.onCancel` is included."""
    now: datetime
    rejection: CreateRejection | None = None
    """The API server's refusal of the run's last create, if it has accepted none since."""
    live: LivePods | None = None
    """Live pods, if `attempts` were listed from the API server just now. Only they show that a run is drained."""
    parent: CancelledParent | None = None
    """A run above this one that is Cancelled with `cascade`."""
    children: Sequence[ChildRun] = ()
    """The direct children of this run; they matter once this run is Cancelled."""
    peers: Sequence[ConcurrentRun] = ()
    """The other runs of the same concurrency key; listed live before a first batch may be claimed."""
    predecessors: Sequence[Predecessor] | None = None
    """The runs that `spec.resumeFrom` is about, until this run has taken over: the run that it names, or the remaining
    runs of a saved state's chain of resumes. None: they were not looked up."""
    skipped: Collection[AttemptId] = ()
    """The attempts that a cancel has kept from starting so far."""
    capacity: Capacity | None = None
    """Room that the operator's limits and the namespace's quota leave for this run; None: no limit."""

    overdue: Collection[int] = ()
    """The workers that have held one attempt at a batch for longer than all of its stages may take together."""
    requests: Sequence[WorkerRequest] = ()
    """The requests of the pool's workers that wait for an answer, in the order in which they came."""

    @cached_property
    def stages(self) -> list[Attempt]:
        """Return the attempts of the batches' stages: all but the workers of a pool and the clean-up."""
        return [attempt for attempt in self.attempts if attempt.step != ON_CANCEL_STEP and not attempt.worker]

    @cached_property
    def workers(self) -> list[Attempt]:
        """Return the Jobs of the pool's workers; `batch` is the worker's number."""
        return [attempt for attempt in self.attempts if attempt.worker]

    @cached_property
    def orphaned_workers(self) -> frozenset[int]:
        """Return the workers whose pod has not ended although their Job is gone, as far as a live list shows."""
        known = {attempt.batch for attempt in self.workers}
        pods = self.live.pods if self.live is not None else ()
        return frozenset(
            pod.worker for pod in pods if pod.worker is not None and pod.worker not in known and not pod.ended
        )

    @cached_property
    def started(self) -> list[Attempt]:
        """Return all that a run starts for its batches: the stages, or the workers of its pool."""
        return [attempt for attempt in self.attempts if attempt.step != ON_CANCEL_STEP]

    @cached_property
    def clean_up(self) -> Attempt | None:
        """Return the attempt of `spec.onCancel`; None if it has no Job."""
        return next((attempt for attempt in self.attempts if attempt.step == ON_CANCEL_STEP), None)

    @cached_property
    def batches(self) -> list[BatchState]:
        """Return the state of each batch that is in flight by the stored status."""
        if self.run.spec.pooled:
            return pool_batch_states(
                self.run, self.workers, self.requests, orphaned=self.orphaned_workers, now=self.now
            )
        return batch_states(self.run, self.stages, now=self.now)

    @cached_property
    def status(self) -> IngestRunStatus:
        """Return the status with newly ended fetches and batches counted; phase and conditions are not updated."""
        chained = self.run.spec.batches.cursor is not None
        counted = update_counters(self.run.status, self.batches, chained=chained, now=self.now)
        if self.run.spec.pooled:
            counted = release(counted, self.batches)
        return with_unpublished(self.run, counted, self.batches)

    @cached_property
    def in_flight(self) -> list[BatchState]:
        """Return the `batches` that are still in flight once the newly ended ones are counted."""
        left = self.status.batches.in_flight
        return [batch for batch in self.batches if batch.index in left]
