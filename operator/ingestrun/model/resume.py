"""The state from which an ended run can be resumed: `spec.resumeFrom`, and the part of the status that feeds it."""

from __future__ import annotations

import hashlib
from typing import Annotated, Self

from pydantic import Field, StringConstraints, model_validator

from ingestrun.model.base import KubeModel
from ingestrun.model.contract import CURSOR_MAX_CHARS, SourceDigest
from ingestrun.model.worker import exactly_one

MAX_SAVED_GAPS = 100

Count = Annotated[int, Field(ge=0)]
RangesText = Annotated[str, StringConstraints(max_length=3072)]
"""Index ranges as a user gives them. The planner parses them, so that an error in them becomes a readable message."""


class UnpublishedBatch(KubeModel):
    """A batch of a cursor chain that is fetched and not published, with what is needed to fetch it again.

    `next` is the digest of the cursor with which the batch after it began. It is None if this batch was the last, so
    that its fetch reported `exhausted` and no cursor.
    """

    batch: Count
    cursor: Annotated[str, StringConstraints(max_length=CURSOR_MAX_CHARS)] = ""
    read: Count
    next: Annotated[str, StringConstraints(max_length=16)] | None = None


def cursor_digest(cursor: str) -> str:
    """Return a short digest of a cursor, by which two cursors can be compared."""
    return hashlib.sha256(cursor.encode()).hexdigest()[:8]


def mark_of_cursor(cursor: str) -> str:
    """Return the digest by which a chain recognizes a cursor: longer, because each of a million batches compares it."""
    return hashlib.sha256(cursor.encode()).hexdigest()[:16]


class SavedBatches(KubeModel):
    """The part of `status.batches` that a resumed run needs."""

    fetched: RangesText = ""
    published: RangesText = ""
    exhausted: bool = False
    unpublished: Annotated[list[UnpublishedBatch], Field(max_length=MAX_SAVED_GAPS)] = []


class SavedRecords(KubeModel):
    """`status.records`."""

    fetched: Count = 0
    rejected: Count = 0
    published: Count = 0


class LandedRecords(KubeModel):
    """The rows of batches that were published after their run had ended."""

    rejected: Count = 0
    published: Count = 0


class SavedAfterEnd(KubeModel):
    """`status.afterEnd`."""

    published: RangesText = ""
    records: LandedRecords = LandedRecords()


class SavedState(KubeModel):
    """The state of an ended run, copied from its status while the run existed."""

    uid: Annotated[str, StringConstraints(min_length=1, max_length=63, pattern=r"^[A-Za-z0-9][A-Za-z0-9.-]*$")]
    batches: SavedBatches = SavedBatches()
    cursor: Annotated[str, StringConstraints(max_length=CURSOR_MAX_CHARS)] | None = None
    source_digest: SourceDigest | None = None
    records: SavedRecords = SavedRecords()
    after_end: SavedAfterEnd = SavedAfterEnd()


class ResumeFrom(KubeModel):
    """The ended run to resume, by name or by its saved state; exactly one of the two."""

    name: (
        Annotated[
            str,
            StringConstraints(min_length=1, max_length=253, pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"),
        ]
        | None
    ) = None
    saved_state: SavedState | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        exactly_one(self, "name", "saved_state")
        return self
