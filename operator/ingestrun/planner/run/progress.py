"""The progress of a run: its fetched but unpublished batches, and the state that it leaves to a run that resumes it.

A chain's cursor has moved past its unpublished batches, so their own cursors have to be stored.
They are written with the count of the fetch and dropped with that of the publish, in writes that happen anyway.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from ingestrun.model.contract import CURSOR_MAX_CHARS
from ingestrun.model.ranges import IndexRanges
from ingestrun.model.resume import LandedRecords, SavedState, UnpublishedBatch, cursor_digest
from ingestrun.model.run import IngestRun
from ingestrun.model.size_budget import UNPUBLISHED_BYTES, UNPUBLISHED_FREE_BYTES, UNPUBLISHED_STATUS_BYTES
from ingestrun.model.spec import Container, IngestRunSpec
from ingestrun.model.stages import STAGE_SETTINGS
from ingestrun.model.status import AfterEndStatus, BatchesStatus, IngestRunStatus, RecordsStatus
from ingestrun.planner.batch.ledger import cursor_of
from ingestrun.planner.batch.state import BatchState
from ingestrun.planner.jobs.image_pins import repository

_MAX_ENTRY_BYTES: Final = CURSOR_MAX_CHARS + 64
"""Bytes of an entry of `batches.unpublished` with the longest cursor."""


def with_unpublished(run: IngestRun, status: IngestRunStatus, seen: Sequence[BatchState]) -> IngestRunStatus:
    """Return the status with the unpublished batches as they are now.

    `run` has the status before, `seen` the batches that have ended since.
    """
    before = run.status.batches
    if run.spec.batches.cursor is None:
        return status
    known = {batch.batch for batch in before.unpublished}
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
    unpublished = [batch for batch in (*before.unpublished, *opened) if batch.batch not in status.batches.published]
    if unpublished == before.unpublished:
        return status
    return status.replace(batches=status.batches.replace(unpublished=_fit(status, unpublished)))


def unrecoverable(batches: BatchesStatus) -> IndexRanges:
    """Return the batches to replay whose cursor is not known any more, because the status had no room for it."""
    return batches.replay - IndexRanges(batch.batch for batch in batches.unpublished)


def has_room_for_unpublished(batches: BatchesStatus, *, chained: bool) -> bool:
    """Tell whether the status has room for the cursor of one more batch of a chain.

    No Job of a pool keeps a batch's results, so a batch whose cursor is not known could not be tried again.
    """
    return not chained or unpublished_bytes(batches.unpublished) + _MAX_ENTRY_BYTES <= UNPUBLISHED_BYTES


def unpublished_bytes(unpublished: Iterable[UnpublishedBatch]) -> int:
    """Return the number of bytes that the entries take in the status."""
    return sum(batch.json_bytes() + 1 for batch in unpublished)


def _fit(status: IngestRunStatus, unpublished: list[UnpublishedBatch]) -> list[UnpublishedBatch]:
    """Return the entries that there is room for: always those still to be replayed; of the rest, failed batches first.

    A batch in flight will most likely be published, so it needs its entry least.
    """
    if unpublished_bytes(unpublished) <= UNPUBLISHED_FREE_BYTES:
        return unpublished
    bare = status.replace(batches=status.batches.replace(unpublished=[]))
    rest = bare.json_bytes()
    left = min(UNPUBLISHED_BYTES, UNPUBLISHED_STATUS_BYTES - rest)
    kept = []
    for batch in sorted(unpublished, key=lambda batch: _rank(status.batches, batch)):
        size = unpublished_bytes([batch])
        if size <= left or batch.batch not in status.batches.fetched:
            kept.append(batch)
            left -= size
    return sorted(kept, key=lambda batch: batch.batch)


def _rank(batches: BatchesStatus, batch: UnpublishedBatch) -> tuple[int, int]:
    need = 0 if batch.batch not in batches.fetched else 1 if batch.batch in batches.failed else 2
    return need, batch.batch


@dataclass(frozen=True, slots=True, kw_only=True)
class RunProgress:
    """Progress of an ended run, read from the run or from a state that a user has saved."""

    of: str
    """Name of the run or the saved state, for messages."""
    origin_uid: str
    fetched: IndexRanges
    published: IndexRanges
    unpublished: tuple[UnpublishedBatch, ...]
    exhausted: bool
    cursor: str | None
    records: RecordsStatus
    source_digest: str | None

    def leaves_same_as(self, other: RunProgress) -> bool:
        """Tell whether the same is left to be done. The counts so far may differ."""
        left = (self.published, self.unpublished, self.exhausted, self.cursor)
        return left == (other.published, other.unpublished, other.exhausted, other.cursor)

    def initial_batches(self, spec: IngestRunSpec) -> BatchesStatus:
        """Return the initial ranges of a run that resumes from this progress.

        A batch that was being fetched at the end begins where the chain stands.
        """
        chained = spec.batches.cursor is not None
        end = max(self.fetched.end, *(batch.batch + 1 for batch in self.unpublished), 0)
        claimed = IndexRanges.span(0, end - 1)
        return BatchesStatus(
            claimed=claimed,
            # Partitions that were read are not read again, because their rows are counted once. Batches of a chain are
            # fetched again, and checked against their first fetch.
            fetched=self.published if chained else self.fetched,
            published=self.published,
            replay=claimed - self.published,
            unpublished=list(self.unpublished),
            exhausted=self.exhausted,
        )


def progress_of_run(ended: IngestRun) -> RunProgress:
    """Return the progress of an ended run, including the batches that were published after its end."""
    status, late = ended.status, ended.status.after_end or AfterEndStatus()
    return _progress(
        of=f"run {ended.metadata.name}",
        origin_uid=ended.origin_uid,
        batches=status.batches,
        late=late.published,
        cursor=status.cursor,
        records=status.records,
        landed_records=late.records,
        source_digest=status.source_digest,
    )


def progress_of_saved_state(saved: SavedState) -> RunProgress:
    """Read a saved state.

    Raises:
        ValueError: its index ranges are not well-formed, or a batch is twice among the unpublished.
    """
    numbers = [batch.batch for batch in saved.batches.unpublished]
    if len(set(numbers)) != len(numbers):
        raise ValueError("the saved state has a batch twice in batches.unpublished")
    batches = BatchesStatus(
        fetched=_ranges("batches.fetched", saved.batches.fetched),
        published=_ranges("batches.published", saved.batches.published),
        exhausted=saved.batches.exhausted,
        unpublished=sorted(saved.batches.unpublished, key=lambda batch: batch.batch),
    )
    return _progress(
        of="the saved state",
        origin_uid=saved.uid,
        batches=batches,
        late=_ranges("afterEnd.published", saved.after_end.published),
        cursor=saved.cursor,
        records=RecordsStatus(**saved.records.model_dump()),
        landed_records=saved.after_end.records,
        source_digest=saved.source_digest,
    )


def _ranges(field: str, text: str) -> IndexRanges:
    try:
        return IndexRanges.parse(text)
    except ValueError as error:
        raise ValueError(f"{field} of the saved state: {error}") from None


def _progress(
    *,
    of: str,
    origin_uid: str,
    batches: BatchesStatus,
    late: IndexRanges,
    cursor: str | None,
    records: RecordsStatus,
    landed_records: LandedRecords,
    source_digest: str | None,
) -> RunProgress:
    published = batches.published | late
    return RunProgress(
        of=of,
        origin_uid=origin_uid,
        fetched=batches.fetched | published,
        published=published,
        unpublished=tuple(batch for batch in batches.unpublished if batch.batch not in published),
        exhausted=batches.exhausted,
        cursor=cursor,
        records=RecordsStatus(
            fetched=records.fetched,
            rejected=records.rejected + landed_records.rejected,
            published=records.published + landed_records.published,
        ),
        source_digest=source_digest,
    )


def differences(old: IngestRunSpec, new: IngestRunSpec) -> Iterator[str]:
    """Yield the fields, as paths, in which two runs differ and must not, if one is to resume the other.

    The data that is read and the target it is published to must be the same. Settings that may have made the run fail
    may differ: an image's tag, resources, time-outs, hooks, credentials, `batches.size` and `limit`.
    """
    yield from _differing("", _comparable_spec(old), _comparable_spec(new))


def _differing(path: str, old: Any, new: Any) -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _differing(f"{path}.{key}" if path else key, old.get(key), new.get(key))
    elif old != new:
        yield path


def _comparable_spec(spec: IngestRunSpec) -> dict[str, Any]:
    batches = spec.batches.model_dump(by_alias=True, exclude_none=True, exclude={"size", "limit"})
    source = (
        spec.source.model_dump(by_alias=True, exclude_none=True, exclude=set(STAGE_SETTINGS)) if spec.source else {}
    )
    for how in ("timeoutSeconds", "authorization", "allowRepeatedPages"):
        source.get("http", {}).pop(how, None)
    return {
        "source": source,
        "fetch": _comparable_container(spec.fetch),
        "sink": spec.sink.model_dump(by_alias=True, exclude_none=True, exclude=set(STAGE_SETTINGS))
        if spec.sink
        else None,
        "publish": _comparable_container(spec.publish),
        "workspace": spec.workspace.model_dump(by_alias=True) if spec.workspace else None,
        "batches": batches,
    }


def _comparable_container(container: Container | None) -> dict[str, Any] | None:
    if container is None:
        return None
    described = container.model_dump(by_alias=True, exclude_none=True, include={"command", "args", "env", "env_from"})
    return {"image": repository(container.image), **described}
