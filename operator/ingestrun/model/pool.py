"""The pool's protocol, version 1: the environment of a worker, and the messages between it and the operator.

A worker asks by POST; each message is one JSON object. A worker has one batch at a time, and all that it says about it
is idempotent by the batch and the attempt. docs/contract.md explains the protocol to those who write a worker.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError, model_validator
from pydantic.alias_generators import to_camel

from ingestrun.model import contract
from ingestrun.model.contract import Count, Cursor, SourceDigest, Stage, State

ENV_POOL_URL: Final = "INGEST_POOL_URL"
"""The base URL of the run's pool; `claim`, `fetched` and `publish` are below it. Set: the container is a worker."""
ENV_POOL_TOKEN: Final = "INGEST_POOL_TOKEN"  # noqa: S105  (the variable's name)
"""The bearer token for that URL. It is valid for one run, and for one worker of it."""
ENV_POOL_CA: Final = "INGEST_POOL_CA"
"""The certificate, in PEM, of the authority that signed the operator's. Unset: the system's authorities."""
ENV_WORKER: Final = "INGEST_WORKER"
"""The worker's number from 0, in decimal: one that takes another's place has a number of its own."""
ENV_STAGES: Final = "INGEST_STAGES"
"""The stages that a batch passes, in order, as a JSON list of `WorkerStage`."""
ENV_MAX_BATCHES: Final = "INGEST_MAX_BATCHES"
"""The number of batches after which a worker ends, so that another takes its place. Unset: it does not."""

ENV_MAX_SECONDS: Final = "INGEST_MAX_SECONDS"
"""The seconds after which a worker takes no further batch and ends, before its pod's deadline. Unset: it does not."""

CLAIM: Final = "claim"
FETCHED: Final = "fetched"
PUBLISH: Final = "publish"
WAIT_PARAMETER: Final = "wait"
"""The query parameter of the cancellation check: the most seconds for which an answer may be held back."""

BODY_MAX_BYTES: Final = 65_536
REPORTS_MAX: Final = 8
WAIT_MAX_SECONDS: Final = 30
MESSAGE_MAX_CHARS: Final = 512
LOG_MAX_CHARS: Final = 1024


def config_variable(index: int) -> str:
    """Return the variable that has the configuration of the stage with this index in `INGEST_STAGES`."""
    return f"{contract.ENV_CONFIG}_{index}"


class Message(BaseModel):
    """A part of the protocol: camelCase outside, immutable inside. Unknown fields are of a later version: ignored."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="ignore", frozen=True, strict=True)

    def render(self) -> bytes:
        """Return the message as JSON; what is null is left out."""
        return self.model_dump_json(by_alias=True, exclude_none=True).encode()


Index = Annotated[int, Field(ge=0, le=2**53)]
Sentence = Annotated[str, StringConstraints(max_length=MESSAGE_MAX_CHARS)]
StageName = Annotated[str, StringConstraints(max_length=80, pattern=r"^(fetch|publish|hook [^\s]+)$")]


class WorkerStage(Message):
    """A stage that a worker takes its batches through; `deadline_seconds` is for one batch."""

    stage: Annotated[Stage, Field(strict=False)]
    name: Annotated[str, StringConstraints(min_length=1, max_length=63)]
    deadline_seconds: Annotated[int, Field(ge=1)] | None = None

    @property
    def label(self) -> str:
        """The stage as reports name it: `fetch`, `hook NAME` or `publish`."""
        return f"hook {self.name}" if self.stage is Stage.HOOK else self.stage.value


_STAGES: Final = TypeAdapter(tuple[WorkerStage, ...])


def render_stages(stages: tuple[WorkerStage, ...]) -> str:
    """Return the value of `INGEST_STAGES`."""
    return _STAGES.dump_json(stages, by_alias=True, exclude_none=True).decode()


def parse_stages(text: str) -> tuple[WorkerStage, ...]:
    """Parse the value of `INGEST_STAGES`.

    Raises:
        ValueError: it is no list of stages, or not one that begins with fetch, ends with publish and has hooks between.
    """
    try:
        stages = _STAGES.validate_json(text)
    except ValidationError as error:
        raise ValueError(f"{ENV_STAGES} is not valid: {first_fault(error)}") from None
    kinds = [stage.stage for stage in stages]
    if len(kinds) < 2 or kinds != [Stage.FETCH, *[Stage.HOOK] * (len(kinds) - 2), Stage.PUBLISH]:
        raise ValueError(f"{ENV_STAGES} has to begin with fetch and end with publish, with hooks alone between them")
    return stages


class Fetched(Message):
    """The result of a batch's fetch: the part of `StageResult` that decides how its chain goes on."""

    read: Count
    next_cursor: Cursor | None = None
    exhausted: bool = False
    source_digest: SourceDigest | None = None
    state: State | None = None


class ReportOutcome(StrEnum):
    """The end of one attempt at a batch in a worker. Only with `done` is anything published."""

    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    """The worker stopped the batch because the run is cancelled."""
    STOPPED = "stopped"
    """The worker stopped the batch because of SIGTERM."""


class Report(Message):
    """The end of one attempt at a batch.

    `fetched` is there if the fetch was over. `written` (rows published), `rejected` (rows in quarantine, of all hooks)
    and `manifest` are of a batch that is done; `rejected` also of one that failed because of them. `stage`, `reason`,
    `permanent` and `log` (the end of a traceback, say) are of one that failed. `reason` is one of
    `contract.PERMANENT_REASONS`, or `REASON_DEADLINE`, or none.
    """

    batch: Index
    attempt: Index
    outcome: Annotated[ReportOutcome, Field(strict=False)]
    fetched: Fetched | None = None
    written: Count | None = None
    rejected: Count | None = None
    manifest: Annotated[str, StringConstraints(max_length=256)] | None = None
    stage: StageName | None = None
    reason: Annotated[str, StringConstraints(max_length=64)] | None = None
    permanent: bool | None = None
    message: Sentence | None = None
    log: Annotated[str, StringConstraints(max_length=LOG_MAX_CHARS)] | None = None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.outcome is ReportOutcome.DONE and None in (self.fetched, self.written, self.rejected):
            raise ValueError("a batch that is done has fetched, written and rejected")
        if self.outcome is ReportOutcome.FAILED and None in (self.stage, self.message):
            raise ValueError("a batch that failed has its stage and a message")
        return self


REASON_DEADLINE: Final = "DeadlineExceeded"
"""The reason of a batch of which a stage took longer than its deadline."""


class ClaimRequest(Message):
    """The reports that the operator has not yet acknowledged, and the wish for a batch.

    With `leaving`, a sentence that says why, the worker takes no batch any more: the reports are stored, and the
    answer is `exit` or `cancelled`, at once.
    """

    v: Literal["v1"] = contract.VERSION
    reports: Annotated[tuple[Report, ...], Field(max_length=REPORTS_MAX, strict=False)] = ()
    wait_seconds: Annotated[float, Field(ge=0, le=WAIT_MAX_SECONDS)] = 0
    leaving: Sentence | None = None


class Claim(Message):
    """One attempt at a batch, handed to a worker. The fields are those of the variables of the same name."""

    batch: Index
    attempt: Index
    cursor: Cursor | None = None
    """In partition mode: the partition, or its index. Null: empty, as for a chain's first batch."""
    limit: Annotated[int, Field(ge=1)] | None = None
    state: State | None = None
    source_digest: SourceDigest | None = None
    partition: bool = False
    """True if the batch is a partition, and so no part of a chain."""
    idempotency_key: Annotated[str, StringConstraints(min_length=1, max_length=128)]


class ClaimAnswer(Message):
    """The answer to a claim; exactly one field. All reports of the request have been stored when it is given."""

    claim: Claim | None = None
    exit: Sentence | None = None
    """There is nothing more for this worker."""
    cancelled: Sentence | None = None
    """The run is cancelled, has ended, or is deleted."""
    wait: Literal[True] | None = None
    """There was nothing to do: ask again."""

    @model_validator(mode="after")
    def _one(self) -> Self:
        if sum(field is not None for field in (self.claim, self.exit, self.cancelled, self.wait)) != 1:
            raise ValueError("the answer has exactly one of claim, exit, cancelled and wait")
        return self


class FetchedRequest(Message):
    """The result of a chain's fetch, sent before the batch is done so that the next one can be claimed."""

    v: Literal["v1"] = contract.VERSION
    batch: Index
    attempt: Index
    fetched: Fetched


class FetchedAnswer(Message):
    """The answer to it; exactly one of the first two. Not accepted: the batch is not this worker's any more."""

    accepted: bool | None = None
    cancelled: Sentence | None = None
    message: Sentence | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.accepted is None) is (self.cancelled is None):
            raise ValueError("the answer has exactly one of accepted and cancelled")
        return self


class PublishRequest(Message):
    """The request for the permission to publish, sent when all but the commit is done."""

    v: Literal["v1"] = contract.VERSION
    batch: Index
    attempt: Index
    fetched: Fetched
    written: Count
    rejected: Count


class PublishAnswer(Message):
    """The answer to it; exactly one of the first two. Not granted: the batch is not this worker's any more."""

    granted: bool | None = None
    cancelled: Sentence | None = None
    message: Sentence | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.granted is None) is (self.cancelled is None):
            raise ValueError("the answer has exactly one of granted and cancelled")
        return self


class ErrorAnswer(Message):
    """The body of any answer but 200."""

    error: Annotated[str, StringConstraints(max_length=64)]
    message: Sentence | None = None


def first_fault(error: ValidationError) -> str:
    """Return the first fault of a message: the field and what is wrong, without the value, which may be a secret."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{where}: {first['msg']}" if where else str(first["msg"])
