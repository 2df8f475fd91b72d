"""The passes after the end of a run: the drain, the clean-up and the last sweep. No function here changes the phase.

Drain: pods that have started may finish, others never start. Terminate: pods that have started get SIGTERM. Either way
the run is `Drained` only by a live list of Jobs and pods. A minute after the end the Jobs are listed once more, for a
create that was under way when the run ended and arrived late.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Final

from ingestrun.model.contract import StageResult
from ingestrun.model.ranges import IndexRanges
from ingestrun.model.resume import LandedRecords
from ingestrun.model.run import IngestRun
from ingestrun.model.size_budget import NAMED_CHILDREN
from ingestrun.model.spec import CancellationPolicy
from ingestrun.model.status import (
    AfterEndStatus,
    CancellationStatus,
    ChildrenStatus,
    IngestRunStatus,
    OnCancelStatus,
    Phase,
)
from ingestrun.model.text import pluralize
from ingestrun.planner.actions import (
    ChildRun,
    CreateJob,
    CreateRejection,
    Decision,
    DeleteJob,
    DeleteJobs,
    DeletePod,
    Plan,
)
from ingestrun.planner.batch.attempt import JOB_DELETED, Attempt, JobState, ObservedPod, stuck_message
from ingestrun.planner.batch.failure_policy import Failure, outcome_of
from ingestrun.planner.batch.pipeline import Step, on_cancel_step, steps_of
from ingestrun.planner.batch.pod_start import start_timed_out
from ingestrun.planner.batch.state import NextAttempt, is_checkpointed
from ingestrun.planner.jobs.retention import jobs_expire_at, jobs_to_delete_after_end, jobs_to_delete_except_kept
from ingestrun.planner.jobs.sidecars import left_running_words
from ingestrun.planner.pool.late_reports import answers_after_end, unreported, with_late_reports
from ingestrun.planner.run.cancel import cancel_cleared_event, policy_of, skipped_starts
from ingestrun.planner.run.completion import FULL
from ingestrun.planner.snapshot import Snapshot
from ingestrun.planner.status import conditions as c
from ingestrun.planner.status.conditions import ConditionUpdate
from ingestrun.planner.status.events import Event

DRAIN_RECHECK: Final = timedelta(seconds=15)
SWEEP_AFTER: Final = timedelta(seconds=60)
"""Time after the end at which the Jobs are listed once more, longer than any request under way takes to arrive."""


def drain(snapshot: Snapshot) -> Decision:
    """Decide for an ended run."""
    run = snapshot.run
    status = with_late_reports(_updated_record(snapshot), snapshot.requests)
    decision = _after_drain(snapshot, status) if run.status.drained else _await_drain(snapshot, status)
    cancelled = status.phase is Phase.CANCELLED
    plan = decision.plan
    return replace(
        decision,
        plan=replace(
            plan,
            # Once the run is drained all have been told; a restart does not repeat them.
            skips=skipped_starts(snapshot) if cancelled and not run.status.drained else (),
            # The cancel itself may have left the fence to this pass.
            fence=True if cancelled and plan.fence is None else plan.fence,
            events=_cancel_cleared_events(run),
            answers=answers_after_end(run.status.phase, snapshot.requests),
        ),
    )


def _await_drain(snapshot: Snapshot, status: IngestRunStatus) -> Decision:
    if snapshot.live is None:
        return Decision(plan=Plan(status=status, requeue_at=snapshot.now))
    pods = [pod for pod in snapshot.live.pods if not pod.ended]
    terminate = status.cancellation is not None and status.cancellation.policy is CancellationPolicy.TERMINATE
    unfinished = sum(1 for attempt in snapshot.started if not attempt.container_ended)
    if not unfinished and not pods:
        return _drained(snapshot, status, terminate=terminate)
    reason, message = "Draining", pluralize(max(unfinished, len(pods)), "pod has", "pods have") + " not ended"
    stuck = [pod for pod in pods if pod.is_stuck(snapshot.now)]
    if stuck:
        reason, message = c.POD_STUCK_TERMINATING, stuck_message(stuck)
    return Decision(
        plan=Plan(
            status=status,
            pod_deletions=tuple(_pods_to_terminate(snapshot, pods)) if terminate else (),
            job_deletions=(*unstarted_jobs(snapshot.started), *_deleted_with_their_pods(snapshot.started)),
            requeue_at=snapshot.now + DRAIN_RECHECK,
        ),
        conditions=[ConditionUpdate(type=c.DRAINED, status="False", reason=reason, message=message)],
    )


def _pods_to_terminate(snapshot: Snapshot, pods: Sequence[ObservedPod]) -> Iterator[DeletePod]:
    """Yield the deletions of started pods; those that have not started are deleted with their Jobs."""
    waiting = {attempt.job.uid for attempt in snapshot.started if attempt.state is JobState.WAITING}
    grace = snapshot.run.spec.cancellation.grace_period_seconds
    for pod in pods:
        if pod.deleting_until is None and pod.job_uid not in waiting:
            yield DeletePod(name=pod.name, uid=pod.uid, grace_seconds=grace)


def unstarted_jobs(attempts: Sequence[Attempt]) -> tuple[DeleteJob, ...]:
    """Return the Jobs whose pods have not started, to be deleted if that is still so.

    The attempts must be listed live, because the cache may be a moment old, and a pod that has started
    since would be ended with its work, or with the only trace of what it has published.
    """
    return tuple(
        DeleteJob(job=attempt.job, pod=attempt.pod)
        for attempt in attempts
        if attempt.state is JobState.WAITING and not attempt.job.deleting
    )


def _deleted_with_their_pods(attempts: Sequence[Attempt]) -> Iterator[DeleteJob]:
    """Yield the deletions of Jobs whose container has ended while their pod is deleted, so that nothing starts anew.

    Another container of the pod may take its whole grace period. Until then the Job has not failed, and could be
    suspended and resumed; without its Job, the pod is not waited for.
    """
    for attempt in attempts:
        if (
            attempt.pod is not None
            and attempt.pod.left_running
            and not attempt.container_ended
            and not attempt.job.deleting
        ):
            yield DeleteJob(job=attempt.job, why="its container has ended, and its pod is being deleted")


def _drained(snapshot: Snapshot, status: IngestRunStatus, *, terminate: bool) -> Decision:
    """Declare the run drained, and account for the batches that were in flight, one by one."""
    run, now = snapshot.run, snapshot.now
    erase = terminate and not run.unreadable
    late = _late_results(snapshot, status)
    if not run.unreadable:
        # The checkpoints were of use until here, because they hold the counts of rejected rows.
        batches = status.batches.replace(checkpoints=[], publishing=None)
        status = status.replace(after_end=late.after_end, batches=batches, workers=None)
    if status.cancellation is not None:
        published = late.after_end.published if late.after_end is not None else IndexRanges()
        record = status.cancellation.replace(
            drained_at=now,
            published=published,
            unknown=late.unknown,
            not_published=run.status.batches.in_flight - published - late.unknown,
        )
        status = status.replace(cancellation=record)
    return Decision(
        plan=Plan(
            status=status,
            bulk_deletion=jobs_to_delete_except_kept(run, snapshot.started) if erase else None,
            requeue_at=now,
        ),
        conditions=[
            ConditionUpdate(type=c.DRAINED, status="True", reason="Drained", message=_drained_message(snapshot)),
        ],
    )


def _drained_message(snapshot: Snapshot) -> str:
    left = left_running_words(snapshot.live.pods if snapshot.live is not None else ())
    return f"no stage of this run is left running; {left}" if left else "no pod of this run is left running"


@dataclass(frozen=True, slots=True, kw_only=True)
class LateResults:
    """Results, after the end of the run, of the batches in flight."""

    after_end: AfterEndStatus | None
    """The published batches; None if there are none."""
    unknown: IndexRanges
    """Batches whose publish ended well, or was deleted before its end was seen, and whose result is gone."""


def _late_results(snapshot: Snapshot, status: IngestRunStatus) -> LateResults:
    if snapshot.run.spec.pooled and not snapshot.run.unreadable:
        return LateResults(after_end=status.after_end, unknown=unreported(status))
    return published_after_end(snapshot.run, snapshot.stages)


def published_after_end(run: IngestRun, attempts: Sequence[Attempt]) -> LateResults:
    """Return the results of batches that were in flight at the run's end and were published after all.

    The attempts must be listed live once the run is drained; their order does not matter. A batch is published if any
    attempt of its publish succeeded, even if others failed. Of a run that is not understood nothing is known.
    """
    if run.unreadable:
        return LateResults(after_end=None, unknown=run.status.batches.in_flight)
    publish = steps_of(run.spec)[-1].index
    results: dict[tuple[int, int], StageResult] = {}
    lost = _deleted_publishes(run, attempts, publish=publish)
    for attempt in _ended_well(run, attempts):
        outcome = outcome_of(attempt)
        if isinstance(outcome, StageResult):
            results[attempt.batch, attempt.step] = outcome
        elif outcome.reason == "ResultMissing" and attempt.step == publish:
            lost.add(attempt.batch)
    written = {batch: result.written for (batch, step), result in results.items() if step == publish}
    unknown = IndexRanges(lost - written.keys())
    if not written:
        return LateResults(after_end=None, unknown=unknown)
    rejected = sum(result.rejected for (batch, _), result in results.items() if batch in written)
    checkpoints = run.status.batches.checkpoints
    rejected += sum(checkpoint.rejected or 0 for checkpoint in checkpoints if checkpoint.batch in written)
    records = LandedRecords(published=sum(written.values()), rejected=rejected)
    return LateResults(after_end=AfterEndStatus(published=IndexRanges(written), records=records), unknown=unknown)


def _deleted_publishes(run: IngestRun, attempts: Sequence[Attempt], *, publish: int) -> set[int]:
    """Return the batches in flight whose publish was deleted, so that its end is not known."""
    deleted = [attempt for attempt in attempts if attempt.job.reason == JOB_DELETED and attempt.step == publish]
    return {attempt.batch for attempt in deleted if attempt.batch in run.status.batches.in_flight}


def _ended_well(run: IngestRun, attempts: Sequence[Attempt]) -> Iterator[Attempt]:
    """Yield the attempts of batches in flight that ended with 0 and that no checkpoint has counted, the latest last."""
    in_flight, checkpoints = run.status.batches.in_flight, run.status.batches.checkpoint_by_batch
    for attempt in sorted(attempts, key=lambda attempt: attempt.number):
        checkpoint = checkpoints.get(attempt.batch)
        counted = checkpoint is not None and is_checkpointed(checkpoint, attempt)
        if attempt.batch in in_flight and attempt.state is JobState.SUCCEEDED and not counted:
            yield attempt


def _after_drain(snapshot: Snapshot, status: IngestRunStatus) -> Decision:
    """Run the clean-up, sweep once, then delete Jobs by their retention."""
    now = snapshot.now
    status, creates = _advance_clean_up(snapshot, status)
    sweep_at = (status.completion_time or now) + SWEEP_AFTER
    late = _late_jobs(snapshot, status)
    record = status.cancellation
    unfinished = record is not None and (_clean_up_active(record) or _children_pending(record))
    swept = now >= sweep_at and snapshot.live is not None and not late
    finished = swept and not unfinished
    if now < sweep_at:
        requeue_at: datetime | None = sweep_at
    elif unfinished or late:
        requeue_at = now + DRAIN_RECHECK
    else:
        requeue_at = _next_expiry(snapshot) if not snapshot.run.unreadable else None
    return Decision(
        plan=Plan(
            status=status,
            creates=creates,
            job_deletions=late,
            bulk_deletion=_jobs_to_delete(snapshot, finished=finished, late=late),
            fence=False if swept else None,
            expirable=finished,
            requeue_at=requeue_at,
        )
    )


def _jobs_to_delete(snapshot: Snapshot, *, finished: bool, late: Sequence[DeleteJob]) -> DeleteJobs | None:
    """Return the Jobs that go by their retention. Where a quota counts them they go sooner, and none is kept.

    Those of a run that is not understood stay, as does the run.
    """
    run, capacity = snapshot.run, snapshot.capacity
    if run.unreadable:
        return None
    if finished:
        starved = capacity is not None and capacity.starved
        return jobs_to_delete_after_end(run, snapshot.attempts, now=snapshot.now, keep=not starved)
    if capacity is None or not capacity.pressed or late or snapshot.live is None:
        return None
    return jobs_to_delete_except_kept(run, snapshot.started)


def _next_expiry(snapshot: Snapshot) -> datetime | None:
    """Return when the retention of the run's last Jobs is over, if it has any and it is not over yet."""
    expire_at = jobs_expire_at(snapshot.run) if snapshot.attempts else None
    return expire_at if expire_at is not None and expire_at > snapshot.now else None


def _late_jobs(snapshot: Snapshot, status: IngestRunStatus) -> tuple[DeleteJob, ...]:
    """Return Jobs that arrived after the drain, and the Job of an abandoned clean-up, which must not start any more."""
    clean_up = snapshot.clean_up
    late: tuple[DeleteJob, ...] = ()
    if snapshot.live is not None:
        late = tuple(
            DeleteJob(job=attempt.job)
            for attempt in snapshot.started
            if not attempt.container_ended and not attempt.job.deleting
        )
    if clean_up is None or clean_up.state is not JobState.WAITING or clean_up.job.deleting:
        return late
    return (*late, DeleteJob(job=clean_up.job, pod=clean_up.pod)) if _clean_up_failed(status) else late


def _advance_clean_up(snapshot: Snapshot, status: IngestRunStatus) -> tuple[IngestRunStatus, tuple[CreateJob, ...]]:
    """Take the clean-up one step further. It is claimed before it is created, and not created again once seen."""
    record, step, clean_up = status.cancellation, on_cancel_step(snapshot.run.spec), snapshot.clean_up
    if record is None or step is None or snapshot.run.unreadable:
        return status, ()
    before = record.on_cancel
    create = CreateJob(attempt=NextAttempt(batch=0, step=step, number=0, input_attempt=None))
    if before is None:
        claimed = record.replace(on_cancel=OnCancelStatus(state="Claimed"))
        return status.replace(cancellation=claimed), (create,)
    if before.state in ("Succeeded", "Failed"):
        return status, ()
    if clean_up is None and before.state == "Claimed":
        refused = _refused_clean_up(before, snapshot.rejection)
        due = refused.state == "Claimed" and (snapshot.rejection is None or snapshot.now >= snapshot.rejection.retry_at)
        return status.replace(cancellation=record.replace(on_cancel=refused)), (create,) if due else ()
    return status.replace(cancellation=record.replace(on_cancel=_clean_up_status(snapshot, step, clean_up))), ()


def _refused_clean_up(before: OnCancelStatus, rejection: CreateRejection | None) -> OnCancelStatus:
    """Return the status of a clean-up that is claimed and has no Job yet: given up if the server will never take it."""
    if rejection is None:
        return before
    return OnCancelStatus(
        state="Failed" if rejection.permanent else "Claimed", message=f"{rejection.reason}: {rejection.message}"
    )


def _clean_up_status(snapshot: Snapshot, step: Step, clean_up: Attempt | None) -> OnCancelStatus:
    if clean_up is None:
        return OnCancelStatus(state="Failed", message="its Job is gone, and its result with it")
    return _clean_up_result(clean_up) if clean_up.state.finished else _clean_up_progress(snapshot, step, clean_up)


def _clean_up_progress(snapshot: Snapshot, step: Step, clean_up: Attempt) -> OnCancelStatus:
    """Return the status of a clean-up that runs, or waits.

    The wait for room is not limited; any other obstacle of its pod is waited for no longer than with a stage.
    """
    refused = start_timed_out(clean_up, step=step, graces=snapshot.run.spec.pod_start, now=snapshot.now)
    if refused is not None:
        return OnCancelStatus(state="Failed", message=f"{refused.reason}: {refused.message}")
    obstacle = clean_up.obstacle
    if obstacle is None:
        return OnCancelStatus(state="Running")
    waits = "waits for room" if obstacle.kind in FULL else "has not started"
    return OnCancelStatus(state="Running", message=f"{waits}: {obstacle.message}")


def _clean_up_result(clean_up: Attempt) -> OnCancelStatus:
    """Return how a clean-up ended. Its exit code decides, because it hands nothing on; one cut short is not done."""
    outcome = outcome_of(clean_up)
    cut_short = isinstance(outcome, Failure) and outcome.reason == "DeadlineExceeded"
    if clean_up.state is JobState.SUCCEEDED and not cut_short:
        return OnCancelStatus(state="Succeeded")
    why = f"{outcome.reason}: {outcome.message}" if isinstance(outcome, Failure) else ""
    return OnCancelStatus(state="Failed", message=why)


def _clean_up_active(record: CancellationStatus) -> bool:
    return record.on_cancel is not None and record.on_cancel.state in ("Claimed", "Running")


def _clean_up_failed(status: IngestRunStatus) -> bool:
    record = status.cancellation
    return record is not None and record.on_cancel is not None and record.on_cancel.state == "Failed"


def _children_pending(record: CancellationStatus) -> bool:
    """Tell whether runs below have not followed yet, so that their record is not complete."""
    return record.children is not None and record.children.waiting > 0


def _updated_record(snapshot: Snapshot) -> IngestRunStatus:
    """Return the status with the parts of a cancel's record that may still change: the policy and the runs below."""
    run, status = snapshot.run, snapshot.run.status
    record = status.cancellation
    if record is None:
        return status
    policy, children = policy_of(run, snapshot.parent), _children_status(record, snapshot.children)
    return status.replace(cancellation=record.replace(policy=policy, children=children))


def _children_status(record: CancellationStatus, children: Sequence[ChildRun]) -> ChildrenStatus | None:
    if not record.cascade or not children:
        return record.children
    ended = sorted(child.name for child in children if child.phase in (Phase.SUCCEEDED, Phase.FAILED))
    cancelled = sum(1 for child in children if child.phase is Phase.CANCELLED)
    return ChildrenStatus(
        cancelled=cancelled,
        ended_before=len(ended),
        ended_before_names=ended[:NAMED_CHILDREN],
        waiting=len(children) - cancelled - len(ended),
    )


def _cancel_cleared_events(run: IngestRun) -> tuple[Event, ...]:
    """Return the Event that answers a `spec.cancel` taken back; once only, because the write notes the generation."""
    record, status = run.status.cancellation, run.status
    if record is None or record.parent is not None or run.spec.cancel:
        return ()
    cancelled = status.condition(c.CANCELLED)
    if cancelled is not None and cancelled.reason != "Requested":
        return ()  # the operator cancelled it by itself, so no request was taken back
    if status.observed_generation == run.metadata.generation:
        return ()
    return (cancel_cleared_event(run),)
