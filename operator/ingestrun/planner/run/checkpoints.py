"""Checkpoints: what the next Jobs of batches in flight need, kept in the status so that their ended Jobs may go.

A batch's ended Jobs are not needed once its next Job is there, because that one carries the same values. Until then the
status keeps them where the ended Jobs may vanish, or have to: while the run is suspended, which may last for weeks;
when somebody else has deleted one of them; and under a quota that counts what has ended. Only under such a quota does
the operator delete them itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from ingestrun.model.size_budget import CHECKPOINTS_STATUS_BYTES, MAX_CHECKPOINTS
from ingestrun.model.status import Checkpoint, IngestRunStatus
from ingestrun.planner.actions import DeleteJob
from ingestrun.planner.batch.attempt import Attempt
from ingestrun.planner.batch.ledger import add_retries
from ingestrun.planner.batch.state import BatchState, is_checkpointed
from ingestrun.planner.snapshot import Snapshot


def with_checkpoints(status: IngestRunStatus, batches: Iterable[BatchState]) -> IngestRunStatus:
    """Return the status with these batches checkpointed, as far as it has room for them.

    The retries of a newly checkpointed batch are counted here, because its failed attempts are not there any more when
    the batch is counted.
    """
    checkpoints = status.batches.checkpoint_by_batch
    newly = []
    for batch in batches:
        entry = batch.checkpoint
        if entry is None or checkpoints.get(batch.index) == entry or not _fits(status, checkpoints, entry):
            continue
        checkpoints[batch.index] = entry
        newly.append(batch)
    if not newly:
        return status
    return status.replace(
        batches=status.batches.replace(checkpoints=[checkpoints[index] for index in sorted(checkpoints)]),
        retries=add_retries(status.retries, (retry for batch in newly for retry in batch.retried)),
    )


def free_places(
    status: IngestRunStatus, waiting: Sequence[BatchState], attempts: Iterable[Attempt], *, places: int
) -> IngestRunStatus:
    """Return the status with enough of the waiting batches checkpointed to free `places` places of a quota on Jobs.

    Batches that are checkpointed already free their places too.
    """
    holds = Counter(attempt.batch for attempt in attempts if not attempt.job.deleting)
    for batch in waiting:
        if places <= 0:
            break
        if batch.checkpoint is None or not holds[batch.index]:
            continue
        status = with_checkpoints(status, [batch])
        if batch.index in status.batches.checkpoint_by_batch:
            places -= holds[batch.index]
    return status


def suspended_batches(snapshot: Snapshot) -> list[BatchState]:
    """Return the batches to checkpoint because the run is suspended: all that wait for their next Job."""
    return [batch for batch in snapshot.in_flight if batch.next_attempt is not None]


def vanishing_batches(snapshot: Snapshot, *, created: Iterable[int]) -> list[BatchState]:
    """Return the batches to checkpoint because somebody has deleted one of their Jobs, and the next has to wait."""
    vanishing = {attempt.batch for attempt in snapshot.stages if attempt.job.deleting and attempt.state.finished}
    vanishing -= set(created)
    return [batch for batch in snapshot.in_flight if batch.index in vanishing and batch.next_attempt is not None]


def batches_that_hold_room(snapshot: Snapshot) -> list[BatchState]:
    """Return the batches to checkpoint because their ended Jobs have pods that a quota counts."""
    ended: dict[int, list[Attempt]] = {}
    for attempt in snapshot.stages:
        if attempt.state.finished and not attempt.job.deleting:
            ended.setdefault(attempt.batch, []).append(attempt)
    return [
        batch
        for batch in snapshot.in_flight
        if batch.checkpoint is not None
        and any(is_checkpointed(batch.checkpoint, attempt) for attempt in ended.get(batch.index, ()))
    ]


def checkpointed_jobs(snapshot: Snapshot) -> tuple[DeleteJob, ...]:
    """Return the deletions of Jobs of which the stored status keeps all that is needed, if a quota counts them."""
    if snapshot.capacity is None or not snapshot.capacity.pressed:
        return ()
    checkpoints = snapshot.run.status.batches.checkpoint_by_batch
    return tuple(
        DeleteJob(job=attempt.job, why="kept in the status, to make room")
        for attempt in snapshot.stages
        if attempt.state.finished
        and not attempt.job.deleting
        and attempt.batch in checkpoints
        and is_checkpointed(checkpoints[attempt.batch], attempt)
    )


def _fits(status: IngestRunStatus, checkpoints: dict[int, Checkpoint], entry: Checkpoint) -> bool:
    """Tell whether the status has room for one more: always for the first few, and for more while it is short."""
    if entry.batch in checkpoints or len(checkpoints) < MAX_CHECKPOINTS:
        return True
    bare = status.replace(batches=status.batches.replace(checkpoints=[]))
    size = bare.json_bytes() + sum(each.json_bytes() + 1 for each in (*checkpoints.values(), entry))
    return size <= CHECKPOINTS_STATUS_BYTES
