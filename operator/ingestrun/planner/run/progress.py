"""The batches of a chain that are fetched and not published: where each began, so that it can be fetched again.

A chain's cursor has moved past them, so nothing else knows. They are written with the accounting of the fetch and
dropped with that of the publish, in writes that happen anyway.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from ingestrun.model.ranges import IndexRanges
from ingestrun.model.resume import UnpublishedBatch, cursor_digest
from ingestrun.model.run import IngestRun
from ingestrun.model.status import BatchesStatus, IngestRunStatus
from ingestrun.planner.batch.ledger import cursor_of
from ingestrun.planner.batch.state import BatchState

UNPUBLISHED_BYTES: Final = 3072
"""How much of the status they may take: about forty with cursors of 20 characters, five with the longest."""
FREE_BYTES: Final = 512
"""So much is never too much."""
STATUS_BYTES: Final = 10 * 1024
"""The status with them: where it is so full of other things, less is kept."""


def with_unpublished(run: IngestRun, status: IngestRunStatus, seen: Sequence[BatchState]) -> IngestRunStatus:
    """The status with the gaps as they are now: `run` has the status before, `seen` what has ended since."""
    before = run.status.batches
    if run.spec.batches.cursor is None:
        return status
    known = {gap.batch for gap in before.unpublished}
    opened = [
        UnpublishedBatch(
            batch=batch.index,
            cursor=cursor_of(run, run.status),
            read=batch.fetched.read,
            next=cursor_digest(batch.fetched.next_cursor) if batch.fetched.next_cursor is not None else None,
        )
        for batch in seen
        if batch.fetched is not None and batch.index not in before.fetched and batch.index not in known
    ]
    gaps = [gap for gap in (*before.unpublished, *opened) if gap.batch not in status.batches.published]
    if gaps == before.unpublished:
        return status
    return status.replace(batches=status.batches.replace(unpublished=_fit(status, gaps)))


def unrecoverable(batches: BatchesStatus) -> IndexRanges:
    """Those that are to be done again whose beginning is not known any more, for want of room."""
    return batches.replay - IndexRanges(gap.batch for gap in batches.unpublished)


def unpublished_bytes(gaps: Iterable[UnpublishedBatch]) -> int:
    """Their bytes in the status."""
    return sum(len(gap.model_dump_json(by_alias=True, exclude_none=True).encode()) + 1 for gap in gaps)


def _fit(status: IngestRunStatus, gaps: list[UnpublishedBatch]) -> list[UnpublishedBatch]:
    """As many as there is room for. What is still to be fetched again is always kept; of the rest, the failed first.

    A batch in flight will most likely be published, and so needs it least.
    """
    if unpublished_bytes(gaps) <= FREE_BYTES:
        return gaps
    bare = status.replace(batches=status.batches.replace(unpublished=[]))
    left = min(UNPUBLISHED_BYTES, STATUS_BYTES - len(bare.model_dump_json(by_alias=True, exclude_none=True).encode()))
    kept = []
    for gap in sorted(gaps, key=lambda gap: _rank(status.batches, gap)):
        size = unpublished_bytes([gap])
        if size <= left or gap.batch not in status.batches.fetched:
            kept.append(gap)
            left -= size
    return sorted(kept, key=lambda gap: gap.batch)


def _rank(batches: BatchesStatus, gap: UnpublishedBatch) -> tuple[int, int]:
    need = 0 if gap.batch not in batches.fetched else 1 if gap.batch in batches.failed else 2
    return need, gap.batch
