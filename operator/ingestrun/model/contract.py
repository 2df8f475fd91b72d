"""The container contract, version 1: the environment of a stage's container, and the result that it leaves.

The names are defined here alone. The operator sets them, the built-in worker reads them, and docs/contract.md
explains them to users who bring their own image.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from pydantic.alias_generators import to_camel

from ingestrun.model.text import truncate_bytes

VERSION: Final = "v1"

ENV_CONTRACT: Final = "INGEST_CONTRACT"
ENV_RUN_NAME: Final = "INGEST_RUN_NAME"
ENV_RUN_NAMESPACE: Final = "INGEST_RUN_NAMESPACE"
ENV_RUN_UID: Final = "INGEST_RUN_UID"
ENV_BATCH: Final = "INGEST_BATCH"
"""The batch's index from 0, in decimal."""
ENV_STAGE: Final = "INGEST_STAGE"
"""`fetch`, `hook` or `publish`."""
ENV_HOOK: Final = "INGEST_HOOK"
"""The hook's name; set in hook stages only."""
ENV_ATTEMPT: Final = "INGEST_ATTEMPT"
"""The attempt's number from 0; a retry has the next number."""
ENV_CURSOR: Final = "INGEST_CURSOR"
"""Fetch only. In a cursor chain: the `nextCursor` of the batch before, empty for the first batch. With partitions: the
partition's value, or its index if only a count is given."""
ENV_PARTITIONS: Final = "INGEST_PARTITIONS"
"""Fetch only, in partition mode: how many partitions there are."""
ENV_PARTITION_FILE: Final = "INGEST_PARTITION_FILE"
"""Fetch only, with a list of partitions in a file: the path of that file, one partition a line. The batch's own line is
the one with the number `INGEST_CURSOR`, from 0."""
PARTITION_MAX_BYTES: Final = 1024
"""Most bytes in a line of that file that the built-in worker takes, without the line's end."""
ENV_SOURCE_DIGEST: Final = "INGEST_SOURCE_DIGEST"
"""Fetch only: the `sourceDigest` of the run, from the first of its fetches that returned one. Unset: none has."""
ENV_STATE: Final = "INGEST_STATE"
"""Fetch only, in a cursor chain: the `state` of the batch before. Unset if there is none, and for a batch that a
resumed run fetches again."""
ENV_LIMIT: Final = "INGEST_LIMIT"
"""Fetch only: the most records to read. Unset: no limit."""
ENV_INPUT: Final = "INGEST_INPUT"
"""The directory that the stage before wrote. Unset for fetch."""
ENV_OUTPUT: Final = "INGEST_OUTPUT"
"""The directory for what this stage hands on. It is this attempt's own, and does not exist yet. Unset for publish."""
ENV_REJECTS: Final = "INGEST_REJECTS"
"""The directory for rejected rows, each with its reason. It is this attempt's own. Set for hooks."""
ENV_CANCEL_REASON: Final = "INGEST_CANCEL_REASON"
"""Clean-up only, as the next three: `spec.cancellation.reason`; empty if there is none."""
ENV_CANCEL_POLICY: Final = "INGEST_CANCEL_POLICY"
"""`Drain` or `Terminate`."""
ENV_CANCEL_REQUESTED_BY: Final = "INGEST_CANCEL_REQUESTED_BY"
"""The requester of the cancel, as in the status."""
ENV_PUBLISHED: Final = "INGEST_PUBLISHED"
"""The published batches as index ranges ("0-41,43"), including those that were published after the cancel."""
ENV_WORKSPACE: Final = "INGEST_WORKSPACE"
"""The path at which the workspace volume is mounted; unset if the run has none."""
ENV_CONFIG: Final = "INGEST_CONFIG"
"""The configuration of the built-in source, hook or sink, as JSON. Unset for other images."""
MAX_VARIABLE_BYTES: Final = 32 * 4096
"""Most bytes that Linux gives a process as one variable (MAX_ARG_STRLEN): the name, "=", the value, and a zero byte."""
ENV_IDEMPOTENCY_KEY: Final = "INGEST_IDEMPOTENCY_KEY"
"""`<run uid>/<batch>`, the same for every attempt. Publishing twice under one key leaves one result. A run that resumes
another uses the UID of that run, so that a batch which is done again is still the same batch."""
ENV_CANCELLATION_URL: Final = "INGEST_CANCELLATION_URL"
"""The URL that answers whether this run is cancelled (GET, JSON). Unset if the operator offers no check."""
ENV_CANCELLATION_TOKEN: Final = "INGEST_CANCELLATION_TOKEN"  # noqa: S105  (the variable's name)
"""The bearer token for that URL. It is valid for its run alone, for 30 days and the stage's deadline."""
ENV_CANCELLATION_CA: Final = "INGEST_CANCELLATION_CA"
"""The CA, in PEM, by which the server of that URL is verified. Unset: one that the image knows, or plain HTTP."""

CONFIG_MAX_BYTES: Final = MAX_VARIABLE_BYTES - len(f"{ENV_CONFIG}=\0")
"""Most bytes of a configuration: it is one variable."""

EXIT_DONE: Final = 0
EXIT_PERMANENT: Final = 65
"""The failure is permanent, so a retry can't help (sysexits' EX_DATAERR). Any other code but 0 is retried."""

WORKSPACE_MOUNT: Final = "/workspace"
RUNS_DIRECTORY: Final = ".ingestrun"
"""The directory of the workspace that has what runs hand on from stage to stage, by the run's UID."""
TERMINATION_LOG: Final = "/dev/termination-log"
"""The file for a container's result: Kubernetes' default terminationMessagePath."""

RESULT_MAX_BYTES: Final = 1024
CURSOR_MAX_CHARS: Final = 512
STATE_MAX_CHARS: Final = 112
SOURCE_DIGEST_MAX_CHARS: Final = 64
"""Room for a SHA-256 in hexadecimal digits."""


NO_PROGRESS: Final = "NoProgress"
"""The source repeats itself, so that reading it would never end."""
SOURCE_CHANGED: Final = "SourceChanged"
"""The source is not the one that the run's other fetches have read."""
PERMANENT_REASONS: Final = frozenset({NO_PROGRESS, SOURCE_CHANGED})
"""Reasons that a container can give for a failure for good; any other is shown as `PermanentError`."""


class Stage(StrEnum):
    """The kinds of stage that a batch passes, in order (there may be no hook, or several), and the clean-up."""

    FETCH = "fetch"
    HOOK = "hook"
    PUBLISH = "publish"
    ON_CANCEL = "on-cancel"
    """The clean-up after a cancel, which is no stage of a batch."""
    WORKER = "worker"
    """A worker of a pool, which takes batches through all their stages."""


class Outcome(StrEnum):
    """The outcome that a container reports. Only `done` together with exit code 0 is a success.

    With `cancelled` (exit code 0) the container has asked whether its run is cancelled, and has stopped without handing
    anything on.
    """

    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


class ResultError(ValueError):
    """A result that is not valid; the text has the reason, and may be shown to the user."""


Count = Annotated[int, Field(ge=0, le=2**53)]
Cursor = Annotated[str, StringConstraints(max_length=CURSOR_MAX_CHARS, pattern=r"^[^\x00-\x1f\x7f]*$")]
State = Annotated[str, StringConstraints(max_length=STATE_MAX_CHARS, pattern=r"^[\x20-\x7e]*$")]
SourceDigest = Annotated[
    str, StringConstraints(min_length=1, max_length=SOURCE_DIGEST_MAX_CHARS, pattern=r"^[\x21-\x7e]+$")
]


class StageResult(BaseModel):
    """The JSON object that a container leaves in its termination message, at most 1 KiB.

    `read` counts the rows that came in (from the source, or from the stage before), `written` the rows that were handed
    on, `rejected` the rows that were put in quarantine. `source_digest` identifies what all fetches of the run share:
    two fetches of one run that return different ones have read different sources. `state` is for the chain's next
    fetch. `reason` is that of a failure for good (exit code 65), if it is one of `PERMANENT_REASONS`.
    """

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="ignore", frozen=True, strict=True)

    v: Literal["v1"]
    outcome: Annotated[Outcome, Field(strict=False)]
    read: Count = 0
    written: Count = 0
    rejected: Count = 0
    next_cursor: Cursor | None = None
    exhausted: bool = False
    source_digest: SourceDigest | None = None
    state: State | None = None
    reason: Annotated[str, StringConstraints(max_length=64)] | None = None
    manifest: Annotated[str, StringConstraints(max_length=256)] | None = None
    message: Annotated[str, StringConstraints(max_length=512)] | None = None


def parse_result(text: str | None) -> StageResult:
    """Parse a termination message.

    Raises:
        ResultError: it is empty, larger than 1 KiB, no JSON, or not of this contract version.
    """
    if not text or not text.strip():
        raise ResultError("the container left no result in its termination message")
    size = len(text.encode())
    if size > RESULT_MAX_BYTES:
        raise ResultError(f"the result has {size} bytes, at most {RESULT_MAX_BYTES} are allowed")
    try:
        return StageResult.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "result"
        raise ResultError(f"the result is not valid under contract {VERSION}: {where}: {first['msg']}") from None


def render_result(result: StageResult) -> str:
    """Return a result as a container has to leave it. To fit into 1 KiB the message is cut, never the counts."""
    text = result.model_dump_json(by_alias=True, exclude_none=True)
    excess = len(text.encode()) - RESULT_MAX_BYTES
    if excess > 0 and result.message:
        shorter = truncate_bytes(result.message, len(result.message.encode()) - excess)
        return render_result(result.model_copy(update={"message": shorter or None}))
    return text
