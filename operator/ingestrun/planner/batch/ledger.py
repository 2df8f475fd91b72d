"""The counts of a run: which batches are in flight, what may be claimed, and how ended batches are counted."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from itertools import islice
from typing import Final

from ingestrun.model.ranges import IndexRanges
from ingestrun.model.resume import UnpublishedBatch
from ingestrun.model.run import IngestRun
from ingestrun.model.spec import IngestRunSpec
from ingestrun.model.status import (
    BatchesStatus,
    Checkpoint,
    IngestRunStatus,
    RecordsStatus,
    RetryCount,
    StageFailure,
)
from ingestrun.planner.batch.attempt import Attempt
from ingestrun.planner.batch.pipeline import steps_of
from ingestrun.planner.batch.state import BatchContext, BatchState, batch_state

KEPT_FAILURES: Final = 4
"""How many failed attempts the status shows: the latest ones."""
KEPT_LOGS: Final = 2
"""How many of those keep the last lines of their log."""


def in_flight(batches: BatchesStatus) -> IndexRanges:
    """The batches that are claimed by this run and not accounted for yet."""
    return batches.claimed - batches.published - batches.failed - batches.replay


def pending_gaps(batches: BatchesStatus) -> dict[int, UnpublishedBatch]:
    """The gaps that this run has to fetch again and has not yet, by batch: none but in a run that resumes another."""
    return {gap.batch: gap for gap in batches.unpublished if gap.batch not in batches.fetched}


def parked_of(batches: BatchesStatus) -> dict[int, Checkpoint]:
    """What is kept of batches whose ended Jobs may be gone, by batch: none but under a quota that counts those."""
    return {entry.batch: entry for entry in batches.checkpoints}


def claimable(spec: IngestRunSpec, batches: BatchesStatus, records: RecordsStatus) -> int:
    """How many more batches may be claimed now, `parallelism` apart.

    A chain's next batch needs the cursor of the one before, so there is at most one; and none once the source
    has said `exhausted` or `limit` records have been read. What a run that this one resumes has left comes on top:
    where each of those begins is known.
    """
    if spec.batches.partitions is not None:
        return spec.batches.partitions.total - batches.claimed.first_gap + len(batches.replay)
    limit_reached = spec.batches.limit is not None and records.fetched >= spec.batches.limit
    chain_waits = bool(batches.claimed - batches.fetched - IndexRanges(pending_gaps(batches)))
    return len(batches.replay) + (0 if batches.exhausted or limit_reached or chain_waits else 1)


def next_claims(batches: BatchesStatus, number: int) -> IndexRanges:
    """The next batches to claim: first what is to be done again, then new ones."""
    again = IndexRanges(islice(batches.replay, number))
    first = batches.claimed.first_gap
    return again | IndexRanges.span(first, first + number - len(again) - 1)


def fetch_limit(spec: IngestRunSpec, records: RecordsStatus) -> int | None:
    """How many records the chain's next fetch may read; None for partitions, which are read whole."""
    if spec.batches.cursor is None:
        return None
    if spec.batches.limit is None:
        return spec.batches.size
    return min(spec.batches.size, spec.batches.limit - records.fetched)


def cursor_of(run: IngestRun, status: IngestRunStatus) -> str:
    if status.cursor is not None:
        return status.cursor
    return run.spec.batches.cursor.start if run.spec.batches.cursor is not None else ""


def merge_failures(old: Iterable[StageFailure], seen: Iterable[StageFailure]) -> list[StageFailure]:
    """The latest failed attempts of both, each once: the same whatever the order they were seen in."""
    by_key = {failure.key: failure for failure in (*seen, *old)}
    latest = sorted(by_key.values(), key=lambda failure: (failure.time.replace(microsecond=0), failure.key))
    return [
        failure if n < KEPT_LOGS else failure.model_copy(update={"log": None})
        for n, failure in enumerate(reversed(latest[-KEPT_FAILURES:]))
    ][::-1]


def batch_states(run: IngestRun, jobs: Sequence[Attempt], *, now: datetime) -> list[BatchState]:
    spec, status = run.spec, run.status
    by_batch: Mapping[int, list[Attempt]] = defaultdict(list)
    for job in jobs:
        by_batch[job.job.batch].append(job)
    rules = BatchContext(
        run_uid=run.metadata.uid,
        steps=steps_of(spec),
        backoff=spec.backoff,
        out_of_memory=spec.out_of_memory,
        chained=spec.batches.cursor is not None,
        cursor=cursor_of(run, status),
        fetch_limit=fetch_limit(spec, status.records),
        now=now,
    )
    gaps, parked = pending_gaps(status.batches), parked_of(status.batches)

    def rules_of(index: int) -> BatchContext:
        own, gap = replace(rules, checkpoint=parked.get(index)), gaps.get(index)
        return own if gap is None else replace(own, cursor=gap.cursor, fetch_limit=replay_limit(gap), replayed=gap)

    return [
        batch_state(rules_of(index), index, by_batch[index], fetch_accounted=index in status.batches.fetched)
        for index in in_flight(status.batches)
    ]


def replay_limit(gap: UnpublishedBatch) -> int:
    """What a batch that is fetched again may read: what it read before, as the next one began after that.

    One that read none is let read one: a limit of 0 is none that the contract knows, and what it reads is checked.
    """
    return max(1, gap.read)


def update_counters(
    old: IngestRunStatus, seen: Sequence[BatchState], *, chained: bool, now: datetime
) -> IngestRunStatus:
    """Take newly ended fetches and batches into the counts: cursor, ranges and records move in one write."""
    batches, records, cursor = old.batches, old.records, old.cursor
    fetched = [batch for batch in seen if batch.fetched is not None and batch.index not in batches.fetched]
    # A batch that is done again was counted when it was first fetched, and the chain has gone on from it since.
    again = pending_gaps(batches)
    first = [batch for batch in fetched if batch.index not in again]
    published = [batch for batch in seen if batch.published is not None]
    failed = [batch for batch in seen if batch.failed is not None]
    for batch in first:
        assert batch.fetched is not None  # noqa: S101  (for the type checker; just filtered)
        if chained:
            cursor = batch.fetched.next_cursor if batch.fetched.next_cursor is not None else cursor
    batches = batches.replace(
        fetched=batches.fetched | IndexRanges(batch.index for batch in fetched),
        published=batches.published | IndexRanges(batch.index for batch in published),
        failed=batches.failed | IndexRanges(batch.index for batch in failed),
        exhausted=batches.exhausted or (chained and any(b.fetched.exhausted for b in first if b.fetched)),
    )
    flight = in_flight(batches)
    batches = batches.replace(checkpoints=[entry for entry in batches.checkpoints if entry.batch in flight])
    records = RecordsStatus(
        fetched=records.fetched + sum(batch.fetched.read for batch in first if batch.fetched),
        rejected=records.rejected + sum(batch.rejected for batch in published),
        published=records.published + sum(batch.published.written for batch in published if batch.published),
    )
    return old.replace(
        batches=batches,
        records=records,
        cursor=cursor,
        failures=merge_failures(old.failures, (failure for batch in seen for failure in batch.failures)),
        retries=add_retries(old.retries, (retry for batch in (*published, *failed) for retry in batch.retried)),
        last_progress_time=now if (fetched or published or failed) else old.last_progress_time,
    )


# How often which stage was retried and why: `status.retries`, bounded, each retry counted once.
#
# A batch's retries are counted in the write that accounts for it, from its attempts, which are all there until
# then: whatever is repeated after a restart, that write is made once.
#

RETRIES_BYTES: Final = 450
"""Of all entries as JSON, about eight; what has no room is counted under `OTHER`."""
OTHER: Final = "Other"
_ENTRY_BYTES: Final = len('{"stage":"","reason":"","count":1234567890},')


def add_retries(old: Iterable[RetryCount], retried: Iterable[tuple[str, str]]) -> list[RetryCount]:
    """The old counts, and the newly retried attempts, each as (stage, reason), in the order they were seen."""
    counts = {(entry.stage, entry.reason): entry.count for entry in old}
    other = (OTHER, OTHER)
    for key in retried:
        if key not in counts and not _fits(counts.keys() - {other}, key):
            key = other
        counts[key] = counts.get(key, 0) + 1
    rest = counts.pop(other, None)
    if rest is not None:
        counts[other] = rest  # last, where people look for the rest
    return [RetryCount(stage=stage, reason=reason, count=count) for (stage, reason), count in counts.items()]


def _fits(known: Iterable[tuple[str, str]], new: tuple[str, str]) -> bool:
    """Whether one more entry fits, with the one for the rest beside it."""
    entries = [*known, new, (OTHER, OTHER)]
    return sum(len(stage.encode()) + len(reason.encode()) + _ENTRY_BYTES for stage, reason in entries) <= RETRIES_BYTES
