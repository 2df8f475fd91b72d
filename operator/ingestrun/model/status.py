"""`status` of an IngestRun. Its size is bounded, independent of the number of batches."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Literal, NamedTuple

from pydantic import BeforeValidator, Field, PlainSerializer

from ingestrun.model.base import KubeModel
from ingestrun.model.phase import Phase as Phase
from ingestrun.model.phase import is_final as is_final
from ingestrun.model.ranges import IndexRanges
from ingestrun.model.resume import LandedRecords, UnpublishedBatch
from ingestrun.model.spec import CancellationPolicy, ExecutionMode


def _ranges(value: object) -> object:
    return IndexRanges.parse(value) if isinstance(value, str) else value


def _micro_free(value: datetime) -> str:
    return value.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


Ranges = Annotated[IndexRanges, BeforeValidator(_ranges), PlainSerializer(str, return_type=str)]
Time = Annotated[datetime, PlainSerializer(_micro_free, return_type=str)]
"""A time in UTC and whole seconds, as Kubernetes' metav1.Time."""
Count = Annotated[int, Field(ge=0)]


class Condition(KubeModel):
    """A condition, as Kubernetes' metav1.Condition."""

    type: str
    status: Literal["True", "False", "Unknown"]
    reason: str
    message: str = ""
    last_transition_time: Time
    observed_generation: int | None = None


class Checkpoint(KubeModel):
    """The state of a batch in flight that its next Job needs, so that the Jobs before that one are not needed any more.

    The status has it while the next Job is not there yet, and an annotation of that Job afterwards.

    Its next Job is attempt `attempt` of stage `stage`, counted from 0 as in the Jobs' labels. Fields that are 0 or have
    no value are left out.
    """

    batch: Count
    stage: Count | None = None
    attempt: Count | None = None
    input_attempt: Count | None = None
    """The attempt of the stage before that wrote its input, if it was not the first."""
    written: Count | None = None
    """Rows that the stage before has handed on."""
    rejected: Count | None = None
    """Rows that the stages so far have rejected."""
    retries: Count | None = None
    memory_retries: Count | None = None
    disruptions: Count | None = None
    """The share of the stage's three retry budgets that its attempts so far have used."""
    memory_limit: Count | None = None
    """The memory limit of its next attempt in bytes, if it is not the spec's."""
    not_before: Time | None = None
    """In a pool: the end of the backoff before its next attempt."""
    may_have_landed: bool | None = None
    """In a pool: True if a worker had permission to publish it, and has ended without a word about it."""


class BatchesStatus(KubeModel):
    """The progress of all batches, as index ranges ("0-41,43")."""

    model_config = KubeModel.model_config | {"arbitrary_types_allowed": True}

    claimed: Ranges = IndexRanges()
    fetched: Ranges = IndexRanges()
    published: Ranges = IndexRanges()
    failed: Ranges = IndexRanges()
    replay: Ranges = IndexRanges()
    publishing: Ranges | None = None
    """In a pool: the batches whose workers have permission to publish."""
    unpublished: list[UnpublishedBatch] = []
    checkpoints: list[Checkpoint] = []
    active: Count = 0
    exhausted: bool = False
    progress: str = ""

    @property
    def in_flight(self) -> IndexRanges:
        """Return the batches that this run has claimed and not counted as ended yet."""
        return self.claimed - self.published - self.failed - self.replay

    @property
    def pending_replays(self) -> dict[int, UnpublishedBatch]:
        """Return by index the batches that this run has to fetch again; only a run that resumes another has any."""
        return {batch.batch: batch for batch in self.unpublished if batch.batch not in self.fetched}

    @property
    def checkpoint_by_batch(self) -> dict[int, Checkpoint]:
        """Return the checkpoints by batch: of batches whose ended Jobs are not needed any more, or may vanish."""
        return {checkpoint.batch: checkpoint for checkpoint in self.checkpoints}


class RecordsStatus(KubeModel):
    """Rows, counted once for each batch: `fetched` when its fetch ends, the others when it is published."""

    fetched: Count = 0
    rejected: Count = 0
    published: Count = 0


class AttemptId(NamedTuple):
    """The identity of an attempt among the attempts of one run."""

    batch: int
    stage: str
    """The stage's name in messages: `fetch`, `hook NAME` or `publish`."""
    attempt: int
    """The number of the attempt, from 0."""


class StageFailure(KubeModel):
    """One failed attempt of a stage, and the reason of its failure."""

    batch: Count
    stage: str
    attempt: Count
    reason: str
    message: str
    time: Time
    log: str | None = None
    """The last lines of the container's log, for the newest failures."""

    @property
    def id(self) -> AttemptId:
        """Return the identity of the attempt."""
        return AttemptId(self.batch, self.stage, self.attempt)


class ImagePin(KubeModel):
    """The image that some stages of the run use since the run's first pods."""

    model_config = KubeModel.model_config | {"arbitrary_types_allowed": True}

    steps: Ranges
    image: str | None = None
    digest: str | None = None


class ExecutionStatus(KubeModel):
    """The state of a pool that is not about one worker."""

    mode: ExecutionMode
    started: Count = 0
    """The number of workers that were started so far, so that no two have the same number."""
    memory_limit: Count | None = None
    """The memory limit of new workers in bytes, if it was raised."""
    worker_failures: Count | None = None
    """The number of workers that have failed without a batch since one last ended a batch."""
    worker_retry_at: Time | None = None
    """The end of the backoff after such a failure."""


class WorkerStatus(KubeModel):
    """A worker of a pool, from the write before its Job is created to the one after its end."""

    worker: Count
    """Its number, which no other worker of the run has."""
    batch: Count | None = None
    """The batch that it has claimed."""
    batch_attempt: Count | None = None
    """The number of the attempt at it, if it is not the first."""
    leaving: bool | None = None
    """True once it was told to end."""


class RetryCount(KubeModel):
    """The number of retries of a stage for one reason, in all batches that are published or failed."""

    stage: str
    reason: str
    count: Count


class ChildrenStatus(KubeModel):
    """The children of a run on which a cascading cancel has acted."""

    cancelled: Count = 0
    ended_before: Count = 0
    ended_before_names: list[str] = []
    waiting: Count = 0


class OnCancelStatus(KubeModel):
    """The clean-up Job: `Claimed` before it is created, `Running` once it has been observed, then its outcome."""

    state: Literal["Claimed", "Running", "Succeeded", "Failed"]
    message: str = ""


class CancellationStatus(KubeModel):
    """The record of a cancel: its reason, its time, and the outcome of the batches that were in flight."""

    model_config = KubeModel.model_config | {"arbitrary_types_allowed": True}

    reason: str | None = None
    requested_by: str | None = None
    policy: CancellationPolicy | None = None
    cascade: bool = False
    parent: str | None = None
    accepted_at: Time
    active_batches: Count = 0
    drained_at: Time | None = None
    published: Ranges = IndexRanges()
    not_published: Ranges = IndexRanges()
    unknown: Ranges = IndexRanges()
    children: ChildrenStatus | None = None
    on_cancel: OnCancelStatus | None = None


class AfterEndStatus(KubeModel):
    """The batches that were published after the run had ended; they are counted nowhere else."""

    model_config = KubeModel.model_config | {"arbitrary_types_allowed": True}

    published: Ranges = IndexRanges()
    records: LandedRecords = LandedRecords()


class ResumedFromStatus(KubeModel):
    """The run that this one resumes. `originUid` is that of the first run in the chain, for the idempotency keys."""

    name: str | None = None
    uid: str | None = None
    origin_uid: str


class ResumedByStatus(KubeModel):
    """The only run that may resume this one."""

    name: str
    uid: str


class IngestRunStatus(KubeModel):
    """The observed state of a run."""

    observed_generation: int = -1
    phase: Phase | None = None
    conditions: list[Condition] = []
    batches: BatchesStatus = BatchesStatus()
    records: RecordsStatus = RecordsStatus()
    cursor: str | None = None
    cursor_state: str | None = None
    cursor_mark: str | None = None
    source_digest: str | None = None
    failures: list[StageFailure] = []
    images: list[ImagePin] = []
    execution: ExecutionStatus | None = None
    workers: list[WorkerStatus] | None = None
    retries: list[RetryCount] = []
    start_time: Time | None = None
    completion_time: Time | None = None
    duration: str | None = None
    """The time from the start to the end, because a column of `kubectl get` can't compute it."""
    last_progress_time: Time | None = None
    cancellation: CancellationStatus | None = None
    after_end: AfterEndStatus | None = None
    resumed_from: ResumedFromStatus | None = None
    resumed_by: ResumedByStatus | None = None

    @property
    def ended(self) -> bool:
        """Tell whether the run is in a final phase."""
        return self.phase is not None and self.phase.ended

    @property
    def drained(self) -> bool:
        """Tell whether the run and its last pod have ended, so that nothing of the run can write any more."""
        condition = self.condition("Drained")
        return self.ended and condition is not None and condition.status == "True"

    def condition(self, kind: str) -> Condition | None:
        """Return the condition of that type, if there is one."""
        return next((condition for condition in self.conditions if condition.type == kind), None)
