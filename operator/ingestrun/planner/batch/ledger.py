"""The ledger of a run: the batches that may be claimed next, and the counts of ended fetches and batches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from itertools import chain, islice
from typing import Final

from ingestrun.model.contract import StageResult
from ingestrun.model.ranges import IndexRanges
from ingestrun.model.resume import UnpublishedBatch, mark_of_cursor
from ingestrun.model.run import IngestRun
from ingestrun.model.size_budget import KEPT_FAILURES, KEPT_LOGS, RETRIES_BYTES
from ingestrun.model.spec import IngestRunSpec
from ingestrun.model.status import BatchesStatus, IngestRunStatus, RecordsStatus, RetryCount, StageFailure
from ingestrun.planner.batch.attempt import Attempt
from ingestrun.planner.batch.pipeline import steps_of
from ingestrun.planner.batch.state import BatchContext, BatchState, batch_state, marks_cursor

OTHER: Final = "Other"
_ENTRY_BYTES: Final = len('{"stage":"","reason":"","count":1234567890},')


def claimable(spec: IngestRunSpec, batches: BatchesStatus, records: RecordsStatus) -> int:
    """Return how many more batches may be claimed now, `parallelism` apart.

    A chain's next batch needs the cursor of the one before, so at most one may be claimed, and none once the source
    has reported `exhausted` or `limit` records have been read. The batches to replay are added, because the cursor of
    each is known.
    """
    if spec.batches.partitions is not None:
        return spec.batches.partitions.total - batches.claimed.first_gap + len(batches.replay)
    limit_reached = spec.batches.limit is not None and records.fetched >= spec.batches.limit
    chain_waits = bool(batches.claimed - batches.fetched - IndexRanges(batches.pending_replays))
    return len(batches.replay) + (0 if batches.exhausted or limit_reached or chain_waits else 1)


def next_claims(batches: BatchesStatus, number: int) -> IndexRanges:
    """Return the next batches to claim: first those to replay, then new ones."""
    replayed = IndexRanges(islice(batches.replay, number))
    first = batches.claimed.first_gap
    return replayed | IndexRanges.span(first, first + number - len(replayed) - 1)


def fetch_limit(spec: IngestRunSpec, records: RecordsStatus) -> int | None:
    """Return how many records the chain's next fetch may read; None for partitions, which are read whole."""
    if spec.batches.cursor is None:
        return None
    if spec.batches.limit is None:
        return spec.batches.size
    return min(spec.batches.size, spec.batches.limit - records.fetched)


def replay_limit(replayed: UnpublishedBatch) -> int:
    """Return how many records a replayed batch may read: as many as before, because the next one began after them.

    At least 1: the contract has no limit of 0. A batch that first read nothing is checked against that afterwards.
    """
    return max(1, replayed.read)


def cursor_of(run: IngestRun, status: IngestRunStatus) -> str:
    """Return the cursor with which the chain's next fetch begins."""
    if status.cursor is not None:
        return status.cursor
    return run.spec.batches.cursor.start if run.spec.batches.cursor is not None else ""


def batch_contexts(run: IngestRun, *, now: datetime) -> Callable[[int], BatchContext]:
    """Return the function that gives the context of each batch in flight, without the digest of what is read."""
    spec, status = run.spec, run.status
    common = BatchContext(
        run_uid=run.metadata.uid,
        steps=steps_of(spec),
        backoff=spec.backoff,
        out_of_memory=spec.out_of_memory,
        pod_start=spec.pod_start,
        chained=spec.batches.cursor is not None,
        cursor=cursor_of(run, status),
        fetch_limit=fetch_limit(spec, status.records),
        cursor_mark=status.cursor_mark,
        now=now,
    )
    replays, checkpoints = status.batches.pending_replays, status.batches.checkpoint_by_batch
    unpublished = {batch.batch for batch in status.batches.unpublished}

    def context_of(index: int) -> BatchContext:
        counted = index in status.batches.fetched
        own = replace(
            common,
            checkpoint=checkpoints.get(index),
            fetch_counted=counted,
            refetchable=counted and index in unpublished,
        )
        replayed = replays.get(index)
        if replayed is None:
            return own
        return replace(own, cursor=replayed.cursor, fetch_limit=replay_limit(replayed), replayed=replayed)

    return context_of


def batch_states(run: IngestRun, attempts: Sequence[Attempt], *, now: datetime) -> list[BatchState]:
    """Derive the state of each batch that is in flight by the stored status."""
    by_batch: Mapping[int, list[Attempt]] = defaultdict(list)
    for attempt in attempts:
        by_batch[attempt.batch].append(attempt)
    context_of = batch_contexts(run, now=now)
    states, digest = [], run.status.source_digest
    for index in run.status.batches.in_flight:
        state = batch_state(replace(context_of(index), source_digest=digest), index, by_batch[index])
        # Of fetches that end at once, the one of the first batch is what the others are compared with.
        digest = digest or (state.fetched.source_digest if state.fetched is not None else None)
        states.append(state)
    return states


def update_counters(
    old: IngestRunStatus, seen: Sequence[BatchState], *, chained: bool, now: datetime
) -> IngestRunStatus:
    """Count newly ended fetches and batches: cursor, ranges and records move in one write."""
    fetched = _newly_fetched(old.batches, seen)
    first_time = _first_fetched(old.batches, fetched)
    published = [batch for batch in seen if batch.published is not None]
    failed = [batch for batch in seen if batch.failed is not None]
    batches = _moved_ranges(old.batches, fetched=fetched, published=published, failed=failed)
    batches = _without_refetched(batches, [batch for batch in seen if batch.refetched])
    if chained and any(result.exhausted for result in first_time.values()):
        batches = batches.replace(exhausted=True)
    moved = _moved_cursor(old, first_time) if chained else old
    return moved.replace(
        batches=batches,
        records=_counted_records(old.records, fetched=first_time.values(), published=published),
        source_digest=old.source_digest or _source_digest(fetched.values()),
        failures=merge_failures(old.failures, chain.from_iterable(batch.failures for batch in seen)),
        retries=add_retries(old.retries, chain.from_iterable(batch.retried for batch in (*published, *failed))),
        last_progress_time=now if any((fetched, published, failed)) else old.last_progress_time,
    )


def _newly_fetched(old: BatchesStatus, seen: Iterable[BatchState]) -> dict[int, StageResult]:
    return {batch.index: batch.fetched for batch in seen if batch.fetched and batch.index not in old.fetched}


def _first_fetched(old: BatchesStatus, fetched: Mapping[int, StageResult]) -> dict[int, StageResult]:
    """Return the results that count, and that the chain goes on from.

    A replayed batch was counted when it was first fetched, and the chain has gone on from it since.
    """
    replays = old.pending_replays
    return {index: result for index, result in fetched.items() if index not in replays}


def _counted_records(
    old: RecordsStatus, *, fetched: Iterable[StageResult], published: Sequence[BatchState]
) -> RecordsStatus:
    return RecordsStatus(
        fetched=old.fetched + sum(result.read for result in fetched),
        rejected=old.rejected + sum(batch.rejected for batch in published),
        published=old.published + sum(batch.published.written for batch in published if batch.published),
    )


def _moved_ranges(
    old: BatchesStatus, *, fetched: Iterable[int], published: Iterable[BatchState], failed: Iterable[BatchState]
) -> BatchesStatus:
    batches = old.replace(
        fetched=old.fetched | IndexRanges(fetched),
        published=old.published | IndexRanges(batch.index for batch in published),
        failed=old.failed | IndexRanges(batch.index for batch in failed),
    )
    in_flight = batches.in_flight
    kept = [checkpoint for checkpoint in batches.checkpoints if checkpoint.batch in in_flight]
    return batches.replace(checkpoints=kept)


def _without_refetched(batches: BatchesStatus, refetched: Sequence[BatchState]) -> BatchesStatus:
    """Return the batches with those to be fetched again as not fetched: their entries under `unpublished` say where."""
    if not refetched:
        return batches
    checkpoints = batches.checkpoint_by_batch
    checkpoints |= {batch.index: batch.checkpoint for batch in refetched if batch.checkpoint is not None}
    return batches.replace(
        fetched=batches.fetched - IndexRanges(batch.index for batch in refetched),
        checkpoints=[checkpoints[index] for index in sorted(checkpoints)],
    )


def _moved_cursor(old: IngestRunStatus, fetched: Mapping[int, StageResult]) -> IngestRunStatus:
    """Return the status with the cursor after these fetches, of which a chain has one at most."""
    for index, result in fetched.items():
        cursor = result.next_cursor
        if cursor is not None:
            mark = mark_of_cursor(cursor) if marks_cursor(index + 1) else old.cursor_mark
            return old.replace(cursor=cursor, cursor_state=result.state, cursor_mark=mark)
    return old


def _source_digest(fetched: Iterable[StageResult]) -> str | None:
    """Return the first digest among the results, which `batch_states` has found to be equal."""
    return next((result.source_digest for result in fetched if result.source_digest is not None), None)


def merge_failures(old: Iterable[StageFailure], seen: Iterable[StageFailure]) -> list[StageFailure]:
    """Return the latest failed attempts of both, each once; the result does not depend on the order of observation."""
    by_id = {failure.id: failure for failure in (*seen, *old)}
    latest = sorted(by_id.values(), key=lambda failure: (failure.time.replace(microsecond=0), failure.id))
    return [
        failure if n < KEPT_LOGS else failure.replace(log=None)
        for n, failure in enumerate(reversed(latest[-KEPT_FAILURES:]))
    ][::-1]


def add_retries(old: Iterable[RetryCount], retried: Iterable[tuple[str, str]]) -> list[RetryCount]:
    """Return `status.retries` with newly retried attempts, each as (stage, reason), in the order they were seen.

    The list is bounded, and each retry is counted once, because a batch's retries are counted in the write that counts
    the batch, from its attempts, which are all there until then.
    """
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
    """Tell whether one more entry fits, with the one for the rest beside it."""
    entries = [*known, new, (OTHER, OTHER)]
    return sum(len(stage.encode()) + len(reason.encode()) + _ENTRY_BYTES for stage, reason in entries) <= RETRIES_BYTES
