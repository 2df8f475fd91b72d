"""The snapshot that one plan is made from: a run and all that was observed of it, with what follows computed once."""

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
from ingestrun.planner.run.concurrency import ConcurrentRun
from ingestrun.planner.run.fair_sharing import Capacity
from ingestrun.planner.run.progress import with_unpublished


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """All that the planner may look at. Properties are computed when first read, because an ended run needs few."""

    run: IngestRun
    attempts: Sequence[Attempt]
    """All Jobs known of the run, each with its pod; that of `spec.onCancel` included."""
    now: datetime
    rejection: CreateRejection | None = None
    """Why the API server refused the run's last create, if it has accepted none since."""
    live: LivePods | None = None
    """Set if `attempts` were listed from the API server just now. An ended run is judged drained by nothing else."""
    parent: CancelledParent | None = None
    """A run above this one that is Cancelled with `cascade`."""
    children: Sequence[ChildRun] = ()
    """The runs right below this one; of interest once this one is Cancelled itself."""
    peers: Sequence[ConcurrentRun] = ()
    """The other runs of the same concurrency key; listed live before a first batch may be claimed."""
    predecessors: Sequence[Predecessor] | None = None
    """The runs that `spec.resumeFrom` is about, until this one has taken over: the one that it names, or those left of
    a saved state's chain of resumes. None: nobody has looked."""
    skipped: Collection[AttemptId] = ()
    """What a cancel has kept from starting so far."""
    capacity: Capacity | None = None
    """What the operator's limits and the namespace's quota leave for this run; None: no limit."""

    @cached_property
    def stages(self) -> list[Attempt]:
        """The attempts of the batches' stages, without the clean-up."""
        return [attempt for attempt in self.attempts if attempt.step != ON_CANCEL_STEP]

    @cached_property
    def clean_up(self) -> Attempt | None:
        """The Job of `spec.onCancel`, if it is there."""
        return next((attempt for attempt in self.attempts if attempt.step == ON_CANCEL_STEP), None)

    @cached_property
    def batches(self) -> list[BatchState]:
        """Where each batch stands that the stored status has in flight."""
        return batch_states(self.run, self.stages, now=self.now)

    @cached_property
    def status(self) -> IngestRunStatus:
        """The stored status with newly ended fetches and batches counted; phase and conditions are still the old."""
        chained = self.run.spec.batches.cursor is not None
        counted = update_counters(self.run.status, self.batches, chained=chained, now=self.now)
        return with_unpublished(self.run, counted, self.batches)

    @cached_property
    def in_flight(self) -> list[BatchState]:
        """Those of `batches` that are still in flight once the newly ended ones are counted."""
        left = self.status.batches.in_flight
        return [batch for batch in self.batches if batch.index in left]
