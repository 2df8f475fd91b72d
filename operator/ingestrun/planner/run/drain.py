"""What is left for a run that has ended: the drain, the clean-up, the last sweep. Nothing here writes a phase.

Drain: what has started may finish, what has not never starts. Terminate: what has started gets SIGTERM. Either
way `Drained` is said only from a live list of Jobs and pods, and once more a minute later the Jobs are listed,
for a create that was under way when the run ended and landed late.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Final

from ingestrun.model.contract import StageResult
from ingestrun.model.ranges import IndexRanges
from ingestrun.model.run import IngestRun
from ingestrun.model.spec import CancellationPolicy
from ingestrun.model.status import CancellationStatus, ChildrenStatus, IngestRunStatus, OnCancelStatus, Phase
from ingestrun.planner.actions import CancelledParent, ChildRun, CreateJob, DeleteJob, DeletePod, LivePods, Plan
from ingestrun.planner.batch.attempt import Attempt, JobState, ObservedPod
from ingestrun.planner.batch.failure_policy import Failure, outcome_of
from ingestrun.planner.batch.ledger import in_flight
from ingestrun.planner.batch.pipeline import on_cancel_step, steps_of
from ingestrun.planner.batch.state import CAPACITY_OBSTACLES, NextAttempt, start_timed_out
from ingestrun.planner.jobs.retention import jobs_expire_at, jobs_to_delete_after_end, jobs_to_delete_except_kept
from ingestrun.planner.run.cancel import cancel_cleared_event, policy_of, skipped_starts
from ingestrun.planner.run.completion import unstarted_jobs
from ingestrun.planner.run.resume import published_after_end
from ingestrun.planner.status import conditions as c
from ingestrun.planner.status.conditions import ConditionUpdate
from ingestrun.planner.status.events import Event
from ingestrun.planner.status.writer import finish_status, pluralize

DRAIN_RECHECK: Final = timedelta(seconds=15)
SWEEP_AFTER: Final = timedelta(seconds=60)
"""When an ended run's Jobs are listed once more: longer than any request that was under way can take to land."""
STUCK_AFTER: Final = timedelta(seconds=60)
"""How long after the end of its grace a pod that still exists is called stuck."""
NAMED_CHILDREN: Final = 20


def drain(
    run: IngestRun,
    jobs: Sequence[Attempt],
    clean_up: Attempt | None,
    *,
    now: datetime,
    live: LivePods | None,
    parent: CancelledParent | None,
    children: Sequence[ChildRun],
) -> Plan:
    """Decide for an ended run. `clean_up` is the Job of `spec.onCancel`; the others are in `jobs`."""
    status = _updated_record(run, parent=parent, children=children, now=now)
    tell = _cancel_cleared_events(run)
    skips = skipped_starts(run, jobs, now=now) if status.phase is Phase.CANCELLED else ()
    drained = status.condition(c.DRAINED)
    if drained is None or drained.status != "True":
        done = _await_drain(run, status, jobs, now=now, live=live)
    else:
        done = _after_drain(run, status, jobs, clean_up, now=now, live=live)
    return Plan(
        status=done.status,
        creates=done.creates,
        pod_deletions=done.pod_deletions,
        job_deletions=done.job_deletions,
        bulk_deletion=done.bulk_deletion,
        skips=skips,
        # The cancel itself may have left the arming to here.
        fence=done.fence if done.fence is not None or status.phase is not Phase.CANCELLED else True,
        events=tell,
        expirable=done.expirable,
        requeue_at=done.requeue_at,
    )


def _await_drain(
    run: IngestRun, status: IngestRunStatus, jobs: Sequence[Attempt], *, now: datetime, live: LivePods | None
) -> Plan:
    if live is None:
        return Plan(status=status, requeue_at=now)
    waiting = {job.job.uid for job in jobs if job.state is JobState.WAITING}
    pods = [pod for pod in live.pods if not pod.ended]
    terminate = status.cancellation is not None and status.cancellation.policy is CancellationPolicy.TERMINATE
    unfinished = sum(1 for job in jobs if not job.state.finished)
    if not unfinished and not pods:
        return Plan(
            status=_drained_status(run, status, jobs, now=now),
            bulk_deletion=jobs_to_delete_except_kept(run, jobs) if terminate else None,
            requeue_at=now,
        )
    stuck = [pod for pod in pods if pod.deleting_until is not None and now >= pod.deleting_until + STUCK_AFTER]
    reason, message = "Draining", pluralize(max(unfinished, len(pods)), "pod has", "pods have") + " not ended"
    if stuck:
        reason, message = "PodStuckTerminating", _stuck_message(stuck)
    return Plan(
        status=finish_status(
            run,
            status,
            phase=None,
            claims=[ConditionUpdate(type=c.DRAINED, status="False", reason=reason, message=message)],
            now=now,
        ),
        pod_deletions=tuple(
            DeletePod(name=pod.name, uid=pod.uid, grace_seconds=run.spec.cancellation.grace_period_seconds)
            for pod in pods
            if terminate and pod.deleting_until is None and pod.job_uid not in waiting
        ),
        job_deletions=unstarted_jobs(jobs),
        requeue_at=now + DRAIN_RECHECK,
    )


def _after_drain(
    run: IngestRun,
    status: IngestRunStatus,
    jobs: Sequence[Attempt],
    clean_up: Attempt | None,
    *,
    now: datetime,
    live: LivePods | None,
) -> Plan:
    status, creates = _advance_clean_up(run, status, clean_up, now=now)
    sweep_at = (status.completion_time or now) + SWEEP_AFTER
    late = tuple(
        DeleteJob(job=job.job) for job in jobs if live is not None and not job.state.finished and not job.job.deleting
    )
    if (
        clean_up is not None
        and clean_up.state is JobState.WAITING
        and not clean_up.job.deleting
        and _clean_up_failed(status)
    ):
        late = (*late, DeleteJob(job=clean_up.job, pod=clean_up.pod))  # it is given up: it must not start after all
    unfinished = status.cancellation is not None and (
        _clean_up_active(status.cancellation) or _children_pending(status.cancellation)
    )
    over = now >= sweep_at
    swept = over and live is not None and not late
    found = (*jobs, *((clean_up,) if clean_up is not None else ()))
    go_at = jobs_expire_at(run) if found else None
    if go_at is not None and go_at <= now:
        go_at = None
    return Plan(
        status=status,
        creates=creates,
        job_deletions=late,
        bulk_deletion=jobs_to_delete_after_end(run, found, now=now) if swept and not unfinished else None,
        fence=False if swept else None,
        expirable=swept and not unfinished,
        requeue_at=sweep_at if not over else now + DRAIN_RECHECK if unfinished or late else go_at,
    )


def _drained_status(
    run: IngestRun, status: IngestRunStatus, jobs: Sequence[Attempt], *, now: datetime
) -> IngestRunStatus:
    """Drained: what was in flight is told apart, batch by batch."""
    claims = [
        ConditionUpdate(type=c.DRAINED, status="True", reason="Drained", message="no pod of this run is left running"),
        ConditionUpdate(type=c.RECONCILING, status="False", reason="Finished"),
    ]
    # What was parked was of use until here.
    status = status.replace(after_end=published_after_end(run, jobs), batches=status.batches.replace(checkpoints=[]))
    if status.cancellation is not None:
        publish = steps_of(run.spec)[-1].index
        ended = {
            job.job.batch: outcome_of(job)
            for job in jobs
            if job.job.step == publish and job.state is JobState.SUCCEEDED
        }
        flight = in_flight(status.batches)
        late = IndexRanges(batch for batch, verdict in ended.items() if isinstance(verdict, StageResult))
        lost = IndexRanges(
            batch
            for batch, verdict in ended.items()
            if isinstance(verdict, Failure) and verdict.reason == "ResultMissing"
        )
        status = status.replace(
            cancellation=status.cancellation.replace(
                drained_at=now,
                published=flight - (flight - late),
                unknown=flight - (flight - lost),
                not_published=flight - late - lost,
            ),
        )
    return finish_status(run, status, phase=None, claims=claims, now=now)


def _advance_clean_up(
    run: IngestRun, status: IngestRunStatus, job: Attempt | None, *, now: datetime
) -> tuple[IngestRunStatus, tuple[CreateJob, ...]]:
    """The clean-up, one step on. It is claimed before it is created, and never created again once it was seen."""
    record = status.cancellation
    step = on_cancel_step(run.spec)
    if record is None or step is None:
        return status, ()
    create = CreateJob(start=NextAttempt(batch=0, step=step, attempt=0, input_attempt=None))
    before = record.on_cancel
    creates: tuple[CreateJob, ...] = ()
    if before is None:
        after, creates = OnCancelStatus(state="Claimed"), (create,)
    elif before.state == "Claimed" and job is None:
        return status, (create,)
    elif before.state in ("Succeeded", "Failed"):
        return status, ()
    elif job is None:
        after = OnCancelStatus(state="Failed", message="its Job is gone, and its result with it")
    elif not job.state.finished:
        after = _clean_up_progress(job, now=now)
    else:
        after = _clean_up_result(job)
    status = status.replace(cancellation=record.replace(on_cancel=after))
    return finish_status(run, status, phase=None, claims=(), now=now), creates


def _clean_up_progress(job: Attempt, *, now: datetime) -> OnCancelStatus:
    """It runs, or waits: for room as long as it takes, for what will be refused again no longer than a stage does."""
    refused = start_timed_out(job, now)
    if refused is not None:
        return OnCancelStatus(state="Failed", message=f"{refused.reason}: {refused.message}")
    obstacle = job.obstacle
    full = obstacle is not None and obstacle.kind in CAPACITY_OBSTACLES
    return OnCancelStatus(state="Running", message=f"waits for room: {obstacle.message}" if obstacle and full else "")


def _clean_up_result(job: Attempt) -> OnCancelStatus:
    """Its exit code says it all: nothing is handed on, so no result is asked for. But cut short it is not done."""
    verdict = outcome_of(job)
    cut_short = isinstance(verdict, Failure) and verdict.reason == "DeadlineExceeded"
    if job.state is JobState.SUCCEEDED and not cut_short:
        return OnCancelStatus(state="Succeeded")
    why = f"{verdict.reason}: {verdict.message}" if isinstance(verdict, Failure) else ""
    return OnCancelStatus(state="Failed", message=why)


def _clean_up_active(record: CancellationStatus) -> bool:
    return record.on_cancel is not None and record.on_cancel.state in ("Claimed", "Running")


def _clean_up_failed(status: IngestRunStatus) -> bool:
    record = status.cancellation
    return record is not None and record.on_cancel is not None and record.on_cancel.state == "Failed"


def _children_pending(record: CancellationStatus) -> bool:
    """Whether runs below have not followed yet: what becomes of them is still to be told."""
    return record.children is not None and record.children.waiting > 0


def _updated_record(
    run: IngestRun, *, parent: CancelledParent | None, children: Sequence[ChildRun], now: datetime
) -> IngestRunStatus:
    """The status with what may still change in it: the policy, once, to Terminate; what the runs below have come to."""
    record = run.status.cancellation
    status = run.status
    if record is not None:
        status = status.replace(
            cancellation=record.replace(policy=policy_of(run, parent), children=_children_status(record, children)),
        )
    return finish_status(run, status, phase=None, claims=(), now=now)


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
    """The answer to a `spec.cancel` that was taken back; once, as the write notes the generation."""
    record, status = run.status.cancellation, run.status
    if record is None or record.parent is not None or run.spec.cancel:
        return ()
    cancelled = status.condition(c.CANCELLED)
    if cancelled is not None and cancelled.reason != "Requested":
        return ()  # the operator's own: no request was taken back
    if status.observed_generation == run.metadata.generation:
        return ()
    return (cancel_cleared_event(run),)


def _stuck_message(pods: Sequence[ObservedPod]) -> str:
    first = pods[0]
    more = f" and {len(pods) - 1} more" if len(pods) > 1 else ""
    return (
        f"pod {first.name} on node {first.node or '?'}{more} should have ended and has not: look at the node; "
        "if it is gone for good, delete the pod with --grace-period=0 --force"
    )
