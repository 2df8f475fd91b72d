"""How a run takes over what an ended one has left (`spec.resumeFrom`): once, and before it claims its first batch.

In this order, each step decided from the state alone, so that a restart between any two is harmless:

1. wait until the other run has ended and is drained: only then is it known what has been published;
2. refuse where the two don't fit, with a sentence;
3. write `resumedBy` into the other run, by compare-and-set: a second run that resumes it finds that there;
4. take over in the same write that claims the first batches. From then on the other run is not needed any more.

With a saved state there may be no other run. What is left of its row of resumes is judged likewise: one that has
ended in this very state is claimed as if it were named; any other has got further, or is about to, and is to be named.

Batches keep their indexes and are published under the first run's UID, so one that had landed without anybody's
knowing is put there again, not beside.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from ingestrun.model.contract import StageResult
from ingestrun.model.ranges import IndexRanges
from ingestrun.model.resume import LandedRecords, SavedState, UnpublishedBatch
from ingestrun.model.run import IngestRun
from ingestrun.model.spec import Container, IngestRunSpec
from ingestrun.model.stages import STAGE_SETTINGS
from ingestrun.model.status import (
    AfterEndStatus,
    BatchesStatus,
    IngestRunStatus,
    Phase,
    RecordsStatus,
    ResumedByStatus,
    ResumedFromStatus,
)
from ingestrun.planner.actions import ClaimPredecessor, Plan, Predecessor
from ingestrun.planner.batch.attempt import Attempt, JobState
from ingestrun.planner.batch.failure_policy import outcome_of
from ingestrun.planner.batch.ledger import claimable, in_flight, parked_of
from ingestrun.planner.batch.pipeline import steps_of
from ingestrun.planner.batch.state import is_checkpointed
from ingestrun.planner.run.completion import failed_before_start
from ingestrun.planner.run.progress import UNPUBLISHED_BYTES, unpublished_bytes, unrecoverable
from ingestrun.planner.status import conditions as c
from ingestrun.planner.status.conditions import ConditionUpdate
from ingestrun.planner.status.events import Event, normal
from ingestrun.planner.status.writer import SAVED_BYTES, active_conditions, finish_status, pluralize, saved_state_bytes

LOOK_AGAIN: Final = timedelta(seconds=15)
"""How often a waiting run looks at the one it waits for, should the news of it be lost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TakenOver:
    """The status that this run begins with, and what to tell people about it."""

    status: IngestRunStatus
    tell: Event


@dataclass(frozen=True, slots=True, kw_only=True)
class RunProgress:
    """What an ended run has left, whether read from it or saved by a user."""

    of: str
    uid: str
    fetched: IndexRanges
    published: IndexRanges
    unpublished: tuple[UnpublishedBatch, ...]
    exhausted: bool
    cursor: str | None
    records: RecordsStatus

    def goes_on_like(self, other: RunProgress) -> bool:
        """Whether the same is left to be done. What was counted so far may differ."""
        left = (self.published, self.unpublished, self.exhausted, self.cursor)
        return left == (other.published, other.unpublished, other.exhausted, other.cursor)


def must_resume(run: IngestRun) -> bool:
    """Whether the run has still to take over from another. A cancel waits for no news of other runs."""
    return _may_resume(run) and not run.spec.cancel and run.spec.resume_from is not None


def resume(run: IngestRun, predecessors: Sequence[Predecessor] | None, *, now: datetime) -> TakenOver | Plan | None:
    """Decide for an active run: what it begins with, or what to do first; None where nothing is to be taken over."""
    wanted = run.spec.resume_from
    if wanted is None or not _may_resume(run):
        return None
    if predecessors is None:
        return Plan(status=run.status, requeue_at=now)
    if wanted.saved_state is not None:
        return _resume_saved(run, wanted.saved_state, predecessors, now=now)
    if not predecessors:
        message = f"there is no run {wanted.name}: name one that exists, or give resumeFrom.savedState if its was kept"
        return Plan(status=failed_before_start(run, "ResumeSourceNotFound", message, now=now), requeue_at=now)
    (predecessor,) = predecessors
    old = predecessor.run
    why = _wait_reason(old)
    if why is not None and not _each_other(run, old):
        return _wait(run, *why, now=now)
    return _go_on_from(run, predecessor, now=now)


def _resume_saved(run: IngestRun, saved: SavedState, row: Sequence[Predecessor], *, now: datetime) -> TakenOver | Plan:
    """Decide for a saved state. `row`: the run that it was copied from and those that went on from it, where any is."""
    try:
        rest = progress_of_saved_state(saved)
    except ValueError as error:
        return _refuse(run, str(error), now=now)
    unfit, size = _mismatch(run, rest), saved_state_bytes(run.spec)
    if size > SAVED_BYTES:
        unfit = f"the saved state has {size} bytes, and a run's object has room for {SAVED_BYTES}"
    if unfit is not None:
        return _refuse(run, unfit, now=now)
    active = next((each.run for each in row if not _is_leaving(each.run)), None)
    if active is not None:
        return _refuse(
            run, f"run {_describe_relation(active, saved)}, and has not ended: {_resume_hint(active)}", now=now
        )
    for each in row:
        why = _deletion_wait(each.run) or _wait_reason(each.run)
        if why is not None:
            return _wait(run, *why, now=now)
    row_uids = {each.run.metadata.uid for each in row}
    # Where a row ends: those that no other has gone on from. One whose heir is gone may be far behind the saved state.
    ends = [each for each in row if _claim_of_another(run, each) is None]
    same = [each for each in ends if progress_of_run(each.run).goes_on_like(rest)]
    if same:
        return _go_on_from(run, same[0], now=now)
    if ends:
        newest = max((each.run for each in ends), key=lambda old: old.metadata.creation_timestamp)
        message = f"run {_describe_relation(newest, saved)}, and has ended in another state: {_resume_hint(newest)}"
        return _refuse(run, f"{message}, or delete it first", now=now)
    for each in row:
        heir = _heir(each)
        behind = heir.metadata.uid in row_uids if heir is not None else not progress_of_run(each.run).goes_on_like(rest)
        if not behind and (claimed := _already_resumed(run, each)) is not None:
            return _refuse(run, f"{claimed}; or delete run {each.run.metadata.name} first", now=now)
    return _take_over(run, rest, by_name=None)


def _go_on_from(run: IngestRun, predecessor: Predecessor, *, now: datetime) -> TakenOver | Plan:
    """Claim the rest of a run that is drained, then take it over; or refuse."""
    old = predecessor.run
    why_not = _refusal_reason(run, predecessor)
    if why_not is not None:
        return _refuse(run, why_not, now=now)
    holder = old.status.resumed_by
    if holder is None or holder.uid != run.metadata.uid:
        claimed = old.status.replace(resumed_by=ResumedByStatus(name=run.metadata.name, uid=run.metadata.uid))
        return Plan(status=run.status, claim_predecessor=ClaimPredecessor(of=old, status=claimed), requeue_at=now)
    return _take_over(run, progress_of_run(old), by_name=old)


def is_drained(run: IngestRun) -> bool:
    """Whether the run has ended and nothing of it is left running: its rest changes no more."""
    return _wait_reason(run) is None


def published_after_end(run: IngestRun, jobs: Sequence[Attempt]) -> AfterEndStatus | None:
    """What of the batches in flight at the run's end was published after all; asked of a live list, once drained."""
    publish = steps_of(run.spec)[-1].index
    flight = in_flight(run.status.batches)
    parked = parked_of(run.status.batches)
    results: dict[tuple[int, int], StageResult] = {}
    for job in sorted(jobs, key=lambda job: job.job.attempt):
        entry = parked.get(job.job.batch)
        if entry is not None and is_checkpointed(entry, job):
            continue
        verdict = outcome_of(job) if job.job.batch in flight and job.state is JobState.SUCCEEDED else None
        if isinstance(verdict, StageResult):
            results[job.job.batch, job.job.step] = verdict
    published = {batch: result.written for (batch, step), result in results.items() if step == publish}
    if not published:
        return None
    rejected = sum(result.rejected for (batch, _), result in results.items() if batch in published)
    rejected += sum(entry.rejected or 0 for batch, entry in parked.items() if batch in published)
    return AfterEndStatus(
        published=IndexRanges(published),
        records=LandedRecords(
            published=sum(published.values()),
            rejected=rejected,
        ),
    )


def _may_resume(run: IngestRun) -> bool:
    return run.status.resumed_from is None and not run.spec.suspend and not run.status.ended


def _wait_reason(old: IngestRun) -> tuple[str, str] | None:
    name, phase = old.metadata.name, old.status.phase
    if phase is None or not phase.ended:
        return "WaitingForEnd", f"run {name}, which this one resumes, has not ended: cancel it, or wait"
    done = old.status.condition(c.DRAINED)
    if done is None or done.status != "True":
        return "WaitingForDrain", f"run {name}, which this one resumes, is {phase.value}, but its last pods still run"
    return None


def _is_leaving(old: IngestRun) -> bool:
    """Whether the run has ended, or is on its way out."""
    return old.metadata.deletion_timestamp is not None or old.status.ended


def _deletion_wait(old: IngestRun) -> tuple[str, str] | None:
    if old.metadata.deletion_timestamp is None:
        return None
    return "WaitingForDeletion", f"run {old.metadata.name}, of the same saved state, is being deleted"


def _describe_relation(old: IngestRun, saved: SavedState) -> str:
    of = "is the one of the saved state" if old.metadata.uid == saved.uid else "goes on from the saved state"
    return f"{old.metadata.name} {of}"


def _resume_hint(old: IngestRun) -> str:
    return f"{'' if old.status.ended else 'once it has, '}resume from it (resumeFrom: {{name: {old.metadata.name}}})"


def _each_other(run: IngestRun, old: IngestRun) -> bool:
    theirs = old.spec.resume_from
    return theirs is not None and theirs.name == run.metadata.name and old.status.resumed_from is None


def _wait(run: IngestRun, reason: str, message: str, *, now: datetime) -> Plan:
    claims = active_conditions(
        Phase.PENDING, ConditionUpdate(type=c.RECONCILING, status="True", reason=reason, message=message)
    )
    return Plan(
        status=finish_status(run, run.status, phase=Phase.PENDING, claims=claims, now=now),
        requeue_at=now + LOOK_AGAIN,
    )


def _refuse(run: IngestRun, message: str, *, now: datetime) -> Plan:
    return Plan(status=failed_before_start(run, "ResumeRefused", message, now=now), requeue_at=now)


def _refusal_reason(run: IngestRun, predecessor: Predecessor) -> str | None:
    """Why the run can't resume that one, which has ended; None where it can."""
    old = predecessor.run
    name = old.metadata.name
    if _each_other(run, old):
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


def _heir(predecessor: Predecessor) -> IngestRun | None:
    """The run that has claimed the rest, if it is still there: another may have its name by now."""
    holder, resumer = predecessor.run.status.resumed_by, predecessor.resumer
    return resumer if holder is not None and resumer is not None and resumer.metadata.uid == holder.uid else None


def _already_resumed(run: IngestRun, predecessor: Predecessor) -> str | None:
    """That another run has claimed the rest, as a sentence; None where it is free."""
    name, holder = predecessor.run.metadata.name, _claim_of_another(run, predecessor)
    if holder is None:
        return None
    if _heir(predecessor) is None:
        return (
            f"run {name} was resumed by run {holder.name}, which is gone: "
            "resume from that one's saved state, if it was kept"
        )
    return (
        f"run {name} is already resumed by run {holder.name}: once that one has ended, "
        f"resume from it (resumeFrom: {{name: {holder.name}}})"
    )


def _claim_of_another(run: IngestRun, predecessor: Predecessor) -> ResumedByStatus | None:
    """The claim of another run to the rest; None where there is none, or it was let go.

    A run lets go if it ends without having taken over what it had claimed: a cancel came in between.
    """
    holder, heir = predecessor.run.status.resumed_by, _heir(predecessor)
    if holder is None or holder.uid == run.metadata.uid:
        return None
    let_go = heir is not None and heir.status.resumed_from is None and heir.status.ended
    return None if let_go else holder


def progress_of_run(old: IngestRun) -> RunProgress:
    status, late = old.status, old.status.after_end or AfterEndStatus()
    return _progress(
        of=f"run {old.metadata.name}",
        uid=old.origin_uid,
        batches=status.batches,
        late=late.published,
        cursor=status.cursor,
        records=status.records,
        landed_records=late.records,
    )


def progress_of_saved_state(saved: SavedState) -> RunProgress:
    """Read a saved state.

    Raises:
        ValueError: its index ranges are not well-formed, or a batch is twice among the gaps.
    """
    numbers = [gap.batch for gap in saved.batches.unpublished]
    if len(set(numbers)) != len(numbers):
        raise ValueError("the saved state has a batch twice in batches.unpublished")
    batches = BatchesStatus(
        fetched=_ranges("batches.fetched", saved.batches.fetched),
        published=_ranges("batches.published", saved.batches.published),
        exhausted=saved.batches.exhausted,
        unpublished=sorted(saved.batches.unpublished, key=lambda gap: gap.batch),
    )
    return _progress(
        of="the saved state",
        uid=saved.uid,
        batches=batches,
        late=_ranges("afterEnd.published", saved.after_end.published),
        cursor=saved.cursor,
        records=RecordsStatus(**saved.records.model_dump()),
        landed_records=saved.after_end.records,
    )


def _ranges(field: str, text: str) -> IndexRanges:
    try:
        return IndexRanges.parse(text)
    except ValueError as error:
        raise ValueError(f"{field} of the saved state: {error}") from None


def _progress(
    *,
    of: str,
    uid: str,
    batches: BatchesStatus,
    late: IndexRanges,
    cursor: str | None,
    records: RecordsStatus,
    landed_records: LandedRecords,
) -> RunProgress:
    published = batches.published | late
    return RunProgress(
        of=of,
        uid=uid,
        fetched=batches.fetched | published,
        published=published,
        unpublished=tuple(gap for gap in batches.unpublished if gap.batch not in published),
        exhausted=batches.exhausted,
        cursor=cursor,
        records=RecordsStatus(
            fetched=records.fetched,
            rejected=records.rejected + landed_records.rejected,
            published=records.published + landed_records.published,
        ),
    )


def _initial_batches(spec: IngestRunSpec, rest: RunProgress) -> BatchesStatus:
    """What the run's ranges begin with. A batch that was being fetched at the end begins where the chain stands."""
    chained = spec.batches.cursor is not None
    end = max(rest.fetched.end, *(gap.batch + 1 for gap in rest.unpublished), 0)
    claimed = IndexRanges.span(0, end - 1)
    return BatchesStatus(
        claimed=claimed,
        # Partitions that were read stay so: what they read is counted once. A chain's are checked against their gaps.
        fetched=rest.published if chained else rest.fetched,
        published=rest.published,
        replay=claimed - rest.published,
        unpublished=list(rest.unpublished),
        exhausted=rest.exhausted,
    )


def _mismatch(run: IngestRun, rest: RunProgress) -> str | None:
    """Why that rest can't be done by this run; None where it can."""
    spec = run.spec
    begun = _initial_batches(spec, rest)
    if spec.batches.partitions is not None:
        if rest.unpublished or rest.cursor is not None or rest.exhausted:
            return f"{rest.of} is that of a cursor chain, and this run has partitions"
        if begun.claimed.end > spec.batches.partitions.total:
            total = spec.batches.partitions.total
            return (
                f"{rest.of} has batch {begun.claimed.end - 1}, and this run has {pluralize(total, 'batch', 'batches')}"
            )
    else:
        unknown = unrecoverable(begun)
        if unknown:
            return (
                f"where batch {unknown} of {rest.of} began is not known: a status has room for about 40 unpublished "
                "batches of a chain. Ingest anew, from batches.cursor.start, what is not published"
            )
        if begun.claimed and rest.cursor is None and not rest.exhausted:
            return f"{rest.of} has no cursor: copy it as well"
        if unpublished_bytes(rest.unpublished) > UNPUBLISHED_BYTES + len(rest.unpublished):
            size = unpublished_bytes(rest.unpublished)
            return f"{rest.of} has too many unpublished batches: {size} bytes, at most {UNPUBLISHED_BYTES} can be kept"
    if not begun.replay and not claimable(spec, begun, rest.records):
        done = pluralize(len(begun.published), "batch is", "batches are")
        return f"nothing is left of {rest.of}: {done} published, and none is missing"
    return None


def _take_over(run: IngestRun, rest: RunProgress, *, by_name: IngestRun | None) -> TakenOver:
    begun = _initial_batches(run.spec, rest)
    meta = by_name.metadata if by_name is not None else None
    status = run.status.replace(
        batches=begun,
        records=rest.records,
        cursor=rest.cursor,
        resumed_from=ResumedFromStatus(
            name=meta.name if meta is not None else None,
            uid=meta.uid if meta is not None else None,
            origin_uid=rest.uid,
        ),
    )
    again = f", again: batch {begun.replay}" if begun.replay else ""
    note = f"goes on from {rest.of}: {pluralize(len(begun.published), 'batch', 'batches')} published before{again}"
    return TakenOver(status=status, tell=normal("ResumedFrom", note, action="Resume"))


def differences(old: IngestRunSpec, new: IngestRunSpec) -> Iterator[str]:
    """The fields, as paths, in which two runs differ that must be the same for one to do the other's rest.

    What is read and where it is published must be. How may differ, as it is often why a run failed: an image's
    tag, resources, time-outs, hooks, credentials, `batches.size` and `limit`.
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
    for how in ("timeoutSeconds", "authorization"):
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
    told = container.model_dump(by_alias=True, exclude_none=True, include={"command", "args", "env", "env_from"})
    return {"image": _repository(container.image), **told}


def _repository(image: str) -> str:
    """An image's name without tag and digest."""
    path, slash, last = image.partition("@")[0].rpartition("/")
    return f"{path}{slash}{last.partition(':')[0]}"
