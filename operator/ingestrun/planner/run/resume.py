"""The resuming of an ended run by another (`spec.resumeFrom`): once, and before the other claims its first batch.

The steps, each decided from the state alone, so that a restart between any two is harmless:

1. wait until the other run has ended and is drained, because only then its published batches are known;
2. refuse if the two do not fit, with a sentence;
3. write `resumedBy` into the other run, by compare-and-set, so that a second run that resumes it finds that there;
4. take over in the same write that claims the first batches. From then on the other run is not needed any more.

With a saved state there may be no other run. The remaining runs of its chain of resumes are judged likewise. A run
that ended in exactly this state is claimed as if named. Any other run of the chain is ahead of the saved state, so the
user has to name that run.

Batches keep their indexes and are published under the first run's UID, so a batch whose publish was not
observed is published over itself, and not a second time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from ingestrun.model.resume import SavedState
from ingestrun.model.run import IngestRun
from ingestrun.model.size_budget import SAVED_STATE_BYTES, UNPUBLISHED_BYTES
from ingestrun.model.status import BatchesStatus, IngestRunStatus, Phase, ResumedByStatus, ResumedFromStatus
from ingestrun.model.text import pluralize
from ingestrun.planner.actions import ClaimPredecessor, Decision, Plan, Predecessor
from ingestrun.planner.batch.ledger import claimable
from ingestrun.planner.run.completion import failed
from ingestrun.planner.run.progress import (
    RunProgress,
    differences,
    progress_of_run,
    progress_of_saved_state,
    unpublished_bytes,
    unrecoverable,
)
from ingestrun.planner.snapshot import Snapshot
from ingestrun.planner.status import conditions as c
from ingestrun.planner.status.conditions import ConditionUpdate
from ingestrun.planner.status.events import (
    PREDECESSOR_HELD,
    WAITING_FOR_DELETION,
    WAITING_FOR_DRAIN,
    WAITING_FOR_END,
    Event,
    normal,
)
from ingestrun.planner.status.writer import active_conditions, saved_state_bytes

RECHECK: Final = timedelta(seconds=15)
"""Interval at which a waiting run looks at the run it waits for, in case an event is lost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TakenOver:
    """The status that this run begins with, and an Event about it."""

    status: IngestRunStatus
    event: Event


def must_resume(run: IngestRun) -> bool:
    """Tell whether the run has still to resume another. A cancelled run does not: its cancel waits for no other run."""
    return _may_resume(run) and not run.spec.cancel and run.spec.resume_from is not None


def resume(snapshot: Snapshot) -> TakenOver | Decision | Plan | None:
    """Decide the initial status of an active run, or the action before it; None if there is nothing to resume."""
    run, predecessors = snapshot.run, snapshot.predecessors
    wanted = run.spec.resume_from
    if wanted is None or not _may_resume(run):
        return None
    if predecessors is None:
        return Plan(status=run.status, requeue_at=snapshot.now)
    if wanted.saved_state is not None:
        return _resume_saved(snapshot, wanted.saved_state, predecessors)
    if not predecessors:
        message = f"there is no run {wanted.name}: name one that exists, or give resumeFrom.savedState if its was kept"
        return failed(snapshot, run.status, "ResumeSourceNotFound", message)
    (predecessor,) = predecessors
    wait = _wait_reason(predecessor.run)
    if wait is not None and not _resume_each_other(run, predecessor.run):
        return _wait(snapshot, *wait)
    return _resume_run(snapshot, predecessor)


def _resume_saved(snapshot: Snapshot, saved: SavedState, chain: Sequence[Predecessor]) -> TakenOver | Decision | Plan:
    """Decide for a saved state. `chain` has the runs that still exist of its run and of those that resumed it."""
    run = snapshot.run
    try:
        progress = progress_of_saved_state(saved)
    except ValueError as error:
        return _refuse(snapshot, str(error))
    refusal = _saved_state_too_large(run) or _mismatch(run, progress) or _still_active(saved, chain)
    if refusal is not None:
        return _refuse(snapshot, refusal)
    for each in chain:
        wait = _deletion_wait(each.run) or _wait_reason(each.run)
        if wait is not None:
            return _wait(snapshot, *wait)
    # Tips of the chain: runs that no other has resumed. If a run's successor was deleted, the run may be older than the
    # saved state.
    tips = [each for each in chain if _claim_of_another(run, each) is None]
    same = next((tip for tip in tips if progress_of_run(tip.run).leaves_same_as(progress)), None)
    if same is not None:
        return _resume_run(snapshot, same)
    refusal = _ahead_of_saved_state(saved, tips) or next(_claims_of_saved_state(run, progress, chain), None)
    return _refuse(snapshot, refusal) if refusal is not None else _take_over(run, progress, predecessor=None)


def _saved_state_too_large(run: IngestRun) -> str | None:
    size = saved_state_bytes(run.spec)
    if size <= SAVED_STATE_BYTES:
        return None
    return f"the saved state has {size} bytes, and a run's object has room for {SAVED_STATE_BYTES}"


def _still_active(saved: SavedState, chain: Sequence[Predecessor]) -> str | None:
    active = next((each.run for each in chain if not _is_leaving(each.run)), None)
    if active is None:
        return None
    return f"run {_describe_relation(active, saved)}, and has not ended: {_resume_hint(active)}"


def _ahead_of_saved_state(saved: SavedState, tips: Sequence[Predecessor]) -> str | None:
    """Return why the tips of the chain, none of which ended in the saved state, have to be resumed instead."""
    newest = max((tip.run for tip in tips), key=lambda old: old.metadata.creation_timestamp, default=None)
    if newest is None:
        return None
    message = f"run {_describe_relation(newest, saved)}, and has ended in another state: {_resume_hint(newest)}"
    return f"{message}, or delete it first"


def _claims_of_saved_state(run: IngestRun, progress: RunProgress, chain: Sequence[Predecessor]) -> Iterator[str]:
    """Yield the claims of other runs to the saved state, as sentences."""
    uids = {each.run.metadata.uid for each in chain}
    for each in chain:
        successor = _successor(each)
        if successor is not None:
            superseded = successor.metadata.uid in uids
        else:
            superseded = not progress_of_run(each.run).leaves_same_as(progress)
        claimed = _already_resumed(run, each) if not superseded else None
        if claimed is not None:
            yield f"{claimed}; or delete run {each.run.metadata.name} first"


def _resume_run(snapshot: Snapshot, predecessor: Predecessor) -> TakenOver | Decision | Plan:
    """Claim a run that is drained, then take it over; or refuse."""
    run, old = snapshot.run, predecessor.run
    refusal = _refusal_reason(run, predecessor)
    if refusal is not None:
        return _refuse(snapshot, refusal)
    holder = old.status.resumed_by
    if holder is None or holder.uid != run.metadata.uid:
        claimed = old.status.replace(resumed_by=ResumedByStatus(name=run.metadata.name, uid=run.metadata.uid))
        claim = ClaimPredecessor(of=old, status=claimed)
        return Plan(status=run.status, claim_predecessor=claim, requeue_at=snapshot.now)
    return _take_over(run, progress_of_run(old), predecessor=old)


def _may_resume(run: IngestRun) -> bool:
    return run.status.resumed_from is None and not run.spec.suspend and not run.status.ended


def _wait_reason(old: IngestRun) -> tuple[str, str] | None:
    """Return why the ended run cannot be resumed yet, as reason and message."""
    name, phase = old.metadata.name, old.status.phase
    if old.unreadable:
        return PREDECESSOR_HELD, f"run {name}, which this one resumes, is held: {'; '.join(old.unreadable)}"
    if phase is None or not phase.ended:
        return WAITING_FOR_END, f"run {name}, which this one resumes, has not ended: cancel it, or wait"
    if not old.status.drained:
        return WAITING_FOR_DRAIN, f"run {name}, which this one resumes, is {phase.value}, but its last pods still run"
    return None


def _is_leaving(old: IngestRun) -> bool:
    """Tell whether the run has ended, or is about to."""
    return old.metadata.deletion_timestamp is not None or old.status.ended


def _deletion_wait(old: IngestRun) -> tuple[str, str] | None:
    if old.metadata.deletion_timestamp is None:
        return None
    return WAITING_FOR_DELETION, f"run {old.metadata.name}, of the same saved state, is being deleted"


def _describe_relation(old: IngestRun, saved: SavedState) -> str:
    of = "is the one of the saved state" if old.metadata.uid == saved.uid else "goes on from the saved state"
    return f"{old.metadata.name} {of}"


def _resume_hint(old: IngestRun) -> str:
    return f"{'' if old.status.ended else 'once it has, '}resume from it (resumeFrom: {{name: {old.metadata.name}}})"


def _resume_each_other(run: IngestRun, old: IngestRun) -> bool:
    theirs = old.spec.resume_from
    return theirs is not None and theirs.name == run.metadata.name and old.status.resumed_from is None


def _wait(snapshot: Snapshot, reason: str, message: str) -> Decision:
    reconciling = ConditionUpdate(type=c.RECONCILING, status="True", reason=reason, message=message)
    return Decision(
        plan=Plan(status=snapshot.run.status, requeue_at=snapshot.now + RECHECK),
        phase=Phase.PENDING,
        conditions=active_conditions(Phase.PENDING, reconciling),
    )


def _refuse(snapshot: Snapshot, message: str) -> Decision:
    return failed(snapshot, snapshot.run.status, "ResumeRefused", message)


def _refusal_reason(run: IngestRun, predecessor: Predecessor) -> str | None:
    """Return why the run cannot resume the predecessor, which has ended; None if it can."""
    old = predecessor.run
    name = old.metadata.name
    if _resume_each_other(run, old):
        return f"run {name} is itself to resume this one: one of them must go without resumeFrom"
    if old.spec.resume_from is not None and old.status.resumed_from is None:
        first = old.spec.resume_from.name
        instead = f"run {first}" if first is not None else "the saved state that it was given"
        return f"run {name} ended before it had taken anything over: resume from {instead} instead"
    claimed = _already_resumed(run, predecessor)
    if claimed is not None:
        return claimed
    differing = next(differences(old.spec, run.spec), None)
    if differing is not None:
        return f"spec.{differing} is not that of run {name}: a resumed run reads and publishes the same"
    return _mismatch(run, progress_of_run(old))


def _successor(predecessor: Predecessor) -> IngestRun | None:
    """Return the run that has claimed the predecessor, if it still exists, because another may have its name by now."""
    holder, resumer = predecessor.run.status.resumed_by, predecessor.resumer
    return resumer if holder is not None and resumer is not None and resumer.metadata.uid == holder.uid else None


def _already_resumed(run: IngestRun, predecessor: Predecessor) -> str | None:
    """Return, as a sentence, that another run has claimed the predecessor; None if it is free."""
    name, holder = predecessor.run.metadata.name, _claim_of_another(run, predecessor)
    if holder is None:
        return None
    if _successor(predecessor) is None:
        return (
            f"run {name} was resumed by run {holder.name}, which is gone: "
            "resume from that one's saved state, if it was kept"
        )
    return (
        f"run {name} is already resumed by run {holder.name}: once that one has ended, "
        f"resume from it (resumeFrom: {{name: {holder.name}}})"
    )


def _claim_of_another(run: IngestRun, predecessor: Predecessor) -> ResumedByStatus | None:
    """Return another run's claim to the predecessor; None if there is none, or it was given up.

    A run gives its claim up if it ends before it has taken over, because a cancel came in between.
    """
    holder, successor = predecessor.run.status.resumed_by, _successor(predecessor)
    if holder is None or holder.uid == run.metadata.uid:
        return None
    given_up = (
        successor is not None
        and not successor.unreadable
        and successor.status.resumed_from is None
        and successor.status.ended
    )
    return None if given_up else holder


def _mismatch(run: IngestRun, progress: RunProgress) -> str | None:
    """Return why the run cannot go on from this progress; None if it can."""
    batches = progress.initial_batches(run.spec)
    chained = run.spec.batches.partitions is None
    mismatch = _chain_mismatch(progress, batches) if chained else _partitions_mismatch(run, progress, batches)
    if mismatch is None and not batches.replay and not claimable(run.spec, batches, progress.records):
        done = pluralize(len(batches.published), "batch is", "batches are")
        return f"nothing is left of {progress.of}: {done} published, and none is missing"
    return mismatch


def _partitions_mismatch(run: IngestRun, progress: RunProgress, batches: BatchesStatus) -> str | None:
    partitions = run.spec.batches.partitions
    if progress.unpublished or progress.cursor is not None or progress.exhausted:
        return f"{progress.of} is that of a cursor chain, and this run has partitions"
    if partitions is not None and batches.claimed.end > partitions.total:
        total = pluralize(partitions.total, "batch", "batches")
        return f"{progress.of} has batch {batches.claimed.end - 1}, and this run has {total}"
    return None


def _chain_mismatch(progress: RunProgress, batches: BatchesStatus) -> str | None:
    unknown = unrecoverable(batches)
    if unknown:
        return (
            f"where batch {unknown} of {progress.of} began is not known: a status has room for about 40 unpublished "
            "batches of a chain. Ingest anew, from batches.cursor.start, what is not published"
        )
    if batches.claimed and progress.cursor is None and not progress.exhausted:
        return f"{progress.of} has no cursor: copy it as well"
    size = unpublished_bytes(progress.unpublished)
    if size > UNPUBLISHED_BYTES + len(progress.unpublished):
        return f"{progress.of} has too many unpublished batches: {size} bytes, at most {UNPUBLISHED_BYTES} can be kept"
    return None


def _take_over(run: IngestRun, progress: RunProgress, *, predecessor: IngestRun | None) -> TakenOver:
    batches = progress.initial_batches(run.spec)
    meta = predecessor.metadata if predecessor is not None else None
    status = run.status.replace(
        batches=batches,
        records=progress.records,
        cursor=progress.cursor,
        source_digest=progress.source_digest,
        resumed_from=ResumedFromStatus(
            name=meta.name if meta is not None else None,
            uid=meta.uid if meta is not None else None,
            origin_uid=progress.origin_uid,
        ),
    )
    again = f", again: batch {batches.replay}" if batches.replay else ""
    published = pluralize(len(batches.published), "batch", "batches")
    note = f"goes on from {progress.of}: {published} published before{again}"
    return TakenOver(status=status, event=normal("ResumedFrom", note, action="Resume"))
