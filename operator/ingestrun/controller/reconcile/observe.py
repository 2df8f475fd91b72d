"""The first part of a pass: the snapshot that a plan is made from, except the capacity.

The capacity is missing because `observe` awaits answers of the API server, and other runs are planned meanwhile:
`Reconciler` takes it in the same synchronous step that plans and reserves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

import structlog

from ingestrun.controller.reconcile.start_events import StartEvents
from ingestrun.controller.state.cache import RunCache, read_run
from ingestrun.controller.state.memory import RunMemory
from ingestrun.kube.errors import NotFound
from ingestrun.kube.protocol import Cluster, RunKey
from ingestrun.kube.server_clock import Clock
from ingestrun.model.lineage import cancelled_with_cascade, parents_of
from ingestrun.model.pool import ReportOutcome
from ingestrun.model.run import IngestRun, has_ended
from ingestrun.model.spec import CancellationPolicy
from ingestrun.model.status import Phase
from ingestrun.planner.actions import CancelledParent, ChildRun, LivePods, Predecessor
from ingestrun.planner.batch.attempt import (
    Attempt,
    JobState,
)
from ingestrun.planner.batch.failure_policy import WORKER_CANCELLED, Failure, outcome_of
from ingestrun.planner.batch.pipeline import hold_limit
from ingestrun.planner.run.backpressure import rejection_in_status
from ingestrun.planner.run.concurrency import ConcurrentRun
from ingestrun.planner.snapshot import Snapshot

logger = structlog.get_logger("ingestrun")


@dataclass(frozen=True, slots=True)
class Wait:
    """Result of an observation that gives nothing to plan yet."""

    seconds: float


class Observer:
    """Observer of one run: from the cache, and live from the API server if the cache is not enough."""

    def __init__(
        self,
        cluster: Cluster,
        cache: RunCache,
        *,
        clock: Callable[[], datetime],
        monotonic: Clock,
        drain_pause_seconds: float,
    ) -> None:
        """Take the server's time from `clock`, and durations from `monotonic`, which no correction of a clock moves."""
        self._cluster = cluster
        self._cache = cache
        self._clock = clock
        self._monotonic = monotonic
        self._drain_pause = timedelta(seconds=drain_pause_seconds)
        self._start_events = StartEvents(cluster, cache.usage)

    async def observe(
        self,
        key: RunKey,
        run: IngestRun,
        memory: RunMemory,
        *,
        peers: Sequence[ConcurrentRun],
        predecessors: Sequence[Predecessor] | None,
    ) -> Snapshot | Wait:
        """Return a snapshot that lacks its capacity. Raises KubeError when the API server could not be asked."""
        ended = run.status.ended
        if memory.unanswered_create is None:
            # A claim is stored before its first create is sent. So a run first seen without a claim can't have
            # creates by an earlier process.
            memory.unanswered_create = bool(run.status.batches.claimed or run.unreadable)
        pause = self._drain_pause_left(run, memory)
        if pause > 0 and not memory.requests:
            return Wait(pause)
        live = None
        synced = self._cache.has_synced(run.metadata.uid)
        if (ended and pause <= 0) or not synced:
            live = await self._list_live(run, memory)
        first_pass = not memory.observed
        if first_pass and not ended and memory.rejection is None:
            memory.rejection = rejection_in_status(run, now=self._clock())
        attempts = await self._await_pod_results(run, memory)
        attempts = await self._explain_starts(key, run, memory, attempts)
        ask_parents = first_pass or not synced or self._pod_saw_cancel(key, attempts, memory)
        parent = await self._cancelled_parent(key, ask=ask_parents)
        memory.observed = True
        return Snapshot(
            run=run,
            attempts=attempts,
            now=self._clock(),
            rejection=memory.rejection,
            live=live,
            parent=parent,
            children=self._children(key) if ended else (),
            peers=peers,
            predecessors=predecessors,
            skipped=memory.skipped,
            overdue=self._overdue(run, memory),
            requests=tuple(memory.requests),
        )

    def _overdue(self, run: IngestRun, memory: RunMemory) -> frozenset[int]:
        """Return the workers that have held their batch for too long, since this process has known of it."""
        entries = [entry for entry in run.status.workers or () if entry.batch is not None]
        held = [(entry.worker, entry.batch or 0, entry.batch_attempt or 0) for entry in entries]
        times = memory.note_holds(held, now=self._monotonic())
        if not times:
            return frozenset()
        allowed = hold_limit(run.spec).total_seconds()
        return frozenset(worker for worker, seconds in times.items() if seconds >= allowed)

    def _drain_pause_left(self, run: IngestRun, memory: RunMemory) -> float:
        """Return the seconds for which an ended run is left alone.

        It is observed by two live lists, so not at every event of its pods. A change of its spec counts at once.
        """
        if not run.status.ended or memory.drain_checked_at is None:
            return 0.0
        if run.metadata.generation != run.status.observed_generation:
            return 0.0
        return (memory.drain_checked_at + self._drain_pause - self._clock()).total_seconds()

    async def _list_live(self, run: IngestRun, memory: RunMemory) -> LivePods:
        """Take the run's Jobs and pods from the server, in place of those that the watches have shown."""
        meta = run.metadata
        # Jobs first, because a pod is told by them to be a stranger's.
        listed = await self._cluster.list_jobs(namespace=meta.namespace, run_uid=meta.uid)
        jobs = [job for body in listed if (job := self._cache.own_job(body)) is not None]
        listed = await self._cluster.list_pods(namespace=meta.namespace, run_uid=meta.uid)
        pods = [pod for body in listed if (pod := self._cache.own_pod(body)) is not None]
        self._cache.replace_children(meta.uid, jobs, pods)
        memory.drain_checked_at = self._clock()
        return LivePods(pods=tuple(pods))

    async def _await_pod_results(self, run: IngestRun, memory: RunMemory) -> list[Attempt]:
        """Return the run's attempts; an ended Job whose pod's end has not arrived yet still counts as running.

        Once the grace is over the pods are listed. A pod that is not in this list is missing for good.
        """
        uid = run.metadata.uid
        self._cache.date_vanished(uid, now=self._clock())
        attempts = self._cache.attempts(uid)
        over = run.status.batches.published | run.status.batches.failed
        lacking = [
            attempt
            for attempt in attempts
            if _lacks_pod_result(attempt) and (attempt.worker or attempt.batch not in over)
        ]
        if not lacking:
            memory.awaiting_pods = {}
            return attempts
        young, grace_is_over = memory.await_pods([attempt.job.uid for attempt in lacking], now=self._monotonic())
        if grace_is_over:
            await self._list_live(run, memory)
            attempts = self._cache.attempts(uid)
            memory.keep_awaiting(young)
        return [
            replace(attempt, state=JobState.RUNNING) if attempt.job.uid in young else attempt for attempt in attempts
        ]

    async def _explain_starts(
        self, key: RunKey, run: IngestRun, memory: RunMemory, attempts: list[Attempt]
    ) -> list[Attempt]:
        """Return the attempts; those that do not start with the reason, as far as it matters to the run."""
        now = self._clock()
        if not run.status.ended:
            return await self._start_events.explain_and_count(key, run.metadata.uid, memory, attempts, now=now)
        if run.status.cancellation is not None and run.status.cancellation.on_cancel is not None:
            return await self._start_events.explain(key.namespace, memory, attempts, now=now)
        return attempts

    async def _cancelled_parent(self, key: RunKey, *, ask: bool) -> CancelledParent | None:
        """Return a run above this one that is Cancelled with `cascade`, if there is one.

        With `ask`, the server is asked rather than the cache, because a run created after its parent's cancel must
        not start anything while the watch has not shown that cancel. A parent that does not exist does not count.
        """
        for parent in _parents_of(self._cache, key):
            if ask:
                try:
                    await read_run(self._cluster, self._cache, parent)
                except NotFound:
                    continue
            found = _cancel_from(self._cache, parent)
            if found is not None:
                return found
        return None

    def _pod_saw_cancel(self, key: RunKey, attempts: list[Attempt], memory: RunMemory) -> bool:
        """Tell whether a pod of a run with parents has stopped for a cancel that is not known here.

        The cancellation check has reported the parent's cancel to it, which the watch may not have shown here yet.
        """
        if not _parents_of(self._cache, key) or self._cache.cancel_requested(key):
            return False
        reports = (report for request in memory.requests for report in request.reports)
        if any(report.outcome is ReportOutcome.CANCELLED for report in reports):
            return True
        outcomes = (outcome_of(attempt) for attempt in attempts if attempt.state is JobState.SUCCEEDED)
        return any(isinstance(outcome, Failure) and outcome.reason == WORKER_CANCELLED for outcome in outcomes)

    def _children(self, key: RunKey) -> list[ChildRun]:
        found = []
        for body in self._cache.children_of(key):
            phase = Phase(body["status"]["phase"]) if has_ended(body) else None
            found.append(ChildRun(name=body["metadata"]["name"], phase=phase))
        return found


async def refresh(cluster: Cluster, cache: RunCache, key: RunKey) -> None:
    """Read a run from the API server into the cache. A run that is gone is forgotten."""
    try:
        await read_run(cluster, cache, key)
    except NotFound:
        cache.remove_run(key)


def watched_cancelled_parent(cache: RunCache, key: RunKey) -> CancelledParent | None:
    """Return a run above this one that is Cancelled with `cascade`, as far as the watches have shown."""
    found = (_cancel_from(cache, parent) for parent in _parents_of(cache, key))
    return next((parent for parent in found if parent is not None), None)


def _parents_of(cache: RunCache, key: RunKey) -> list[RunKey]:
    body = cache.run(key)
    return parents_of(body) if body is not None else []


def _cancel_from(cache: RunCache, parent: RunKey) -> CancelledParent | None:
    """Return a parent's cancel for its direct children; None if it is not cancelled, or does not cascade."""
    body = cache.run(parent)
    if body is None or not cancelled_with_cascade(body):
        return None
    record = cache.parsed(parent).status.cancellation
    if record is None:  # not understood, but the cancel is
        return CancelledParent(name=parent.name, reason=None, requested_by=None, policy=CancellationPolicy.DRAIN)
    return CancelledParent(
        name=parent.name,
        reason=record.reason,
        requested_by=record.requested_by,
        policy=record.policy or CancellationPolicy.DRAIN,
    )


def _lacks_pod_result(attempt: Attempt) -> bool:
    """Tell whether the Job has ended, and the end of its pod has not been seen."""
    if not attempt.state.finished or (attempt.pod is not None and attempt.pod.ended):
        return False
    return attempt.job.reason != "DeadlineExceeded"  # of the Job itself: its controller has deleted the pod
