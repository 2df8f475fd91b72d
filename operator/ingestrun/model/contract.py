"""The container contract, version 1: what a stage's container is told, and what it says back.

The one home of the names: the operator writes them, the built-in worker reads them, and docs/contract.md
explains them to those who bring their own image.
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
"""From 0; a retry has the next number."""
ENV_CURSOR: Final = "INGEST_CURSOR"
"""Fetch only. A cursor chain: what the batch before returned as `nextCursor`, empty for the first batch.
Partitions: the partition's value, or its index where only a count is given."""
ENV_PARTITIONS: Final = "INGEST_PARTITIONS"
"""Fetch only, in partition mode: how many partitions there are."""
ENV_PARTITION_FILE: Final = "INGEST_PARTITION_FILE"
"""Fetch only, with a list of partitions in a file: that file, one partition a line. The batch's own is the line with
the number `INGEST_CURSOR`, from 0."""
PARTITION_MAX_BYTES: Final = 1024
"""How long a line of that file may be for the built-in worker, without its end."""
ENV_LIMIT: Final = "INGEST_LIMIT"
"""Fetch only: read at most so many records. Unset: no bound."""
ENV_INPUT: Final = "INGEST_INPUT"
"""A directory: what the stage before wrote. Unset for fetch."""
ENV_OUTPUT: Final = "INGEST_OUTPUT"
"""A directory for what this stage hands on; of this attempt alone, not yet existing. Unset for publish."""
ENV_REJECTS: Final = "INGEST_REJECTS"
"""A directory for rows put in quarantine, each with its reason; of this attempt alone. Set for hooks."""
ENV_CANCEL_REASON: Final = "INGEST_CANCEL_REASON"
"""Clean-up only, as the next three: `spec.cancellation.reason`; empty where none was given."""
ENV_CANCEL_POLICY: Final = "INGEST_CANCEL_POLICY"
"""`Drain` or `Terminate`."""
ENV_CANCEL_REQUESTED_BY: Final = "INGEST_CANCEL_REQUESTED_BY"
"""Who asked for the cancel, as the status has it."""
ENV_PUBLISHED: Final = "INGEST_PUBLISHED"
"""The batches that are published, as index ranges ("0-41,43"); those that landed after the cancel included."""
ENV_WORKSPACE: Final = "INGEST_WORKSPACE"
"""Where the workspace volume is mounted; unset where the run has none."""
ENV_CONFIG: Final = "INGEST_CONFIG"
"""JSON: the configuration of the built-in source, hook or sink. Unset for one's own images."""
ENV_IDEMPOTENCY_KEY: Final = "INGEST_IDEMPOTENCY_KEY"
"""`<run uid>/<batch>`: the same for every attempt. Publishing twice under one key leaves one result.
A run that resumes another has that one's UID in it, so that a batch which is done again is still the same batch."""
ENV_CANCELLATION_URL: Final = "INGEST_CANCELLATION_URL"
"""Where to ask whether this run is cancelled: GET, answered in JSON. Unset where the operator offers no check."""
ENV_CANCELLATION_TOKEN: Final = "INGEST_CANCELLATION_TOKEN"  # noqa: S105  (the variable's name)
"""The bearer token of that question; for its run alone, and for 30 days and the stage's deadline."""

EXIT_DONE: Final = 0
EXIT_PERMANENT: Final = 65
"""A failure that a retry can't mend (sysexits' EX_DATAERR). Any other code but 0 is retried."""

WORKSPACE_MOUNT: Final = "/workspace"
TERMINATION_LOG: Final = "/dev/termination-log"
"""Where a container writes its result: Kubernetes' default terminationMessagePath."""

RESULT_MAX_BYTES: Final = 1024
CURSOR_MAX_CHARS: Final = 512


class Stage(StrEnum):
    """The three kinds of stage that a batch passes, in order, hooks may be none or several; and the clean-up."""

    FETCH = "fetch"
    HOOK = "hook"
    PUBLISH = "publish"
    ON_CANCEL = "on-cancel"
    """No stage of a batch: the clean-up after a cancel."""


class Outcome(StrEnum):
    """What a container says of itself. Only `done` together with exit code 0 is a success.

    `cancelled` (exit code 0): it asked, was told that its run is cancelled, and stopped with nothing handed on.
    """

    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


class ResultError(ValueError):
    """A result that can't be taken; its text says why, fit to be shown to the user."""


Count = Annotated[int, Field(ge=0, le=2**53)]
Cursor = Annotated[str, StringConstraints(max_length=CURSOR_MAX_CHARS, pattern=r"^[^\x00-\x1f\x7f]*$")]


class StageResult(BaseModel):
    """The JSON object that a container leaves in its termination message, at most 1 KiB.

    `read` is what came in (from the source, or from the stage before), `written` what was handed on,
    `rejected` what was put in quarantine.
    """

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="ignore", frozen=True, strict=True)

    v: Literal["v1"]
    outcome: Annotated[Outcome, Field(strict=False)]
    read: Count = 0
    written: Count = 0
    rejected: Count = 0
    next_cursor: Cursor | None = None
    exhausted: bool = False
    manifest: Annotated[str, StringConstraints(max_length=256)] | None = None
    message: Annotated[str, StringConstraints(max_length=512)] | None = None


def parse_result(text: str | None) -> StageResult:
    """Read a termination message.

    Raises:
        ResultError: nothing there, more than 1 KiB, no JSON, or not of this contract version.
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
    """Write a result as a container has to leave it; a message too long for 1 KiB is cut, never the counts."""
    text = result.model_dump_json(by_alias=True, exclude_none=True)
    excess = len(text.encode()) - RESULT_MAX_BYTES
    if excess > 0 and result.message:
        shorter = truncate_bytes(result.message, len(result.message.encode()) - excess)
        return render_result(result.model_copy(update={"message": shorter or None}))
    return text
