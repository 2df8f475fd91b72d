"""One pass for one run: observe, plan, execute. It decides from the state alone, independent of the trigger."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Final

import structlog

from ingestrun.controller.logs import about_run
from ingestrun.controller.reconcile.execute import RETRY, Done, Executor, JobCreator, Retry
from ingestrun.controller.reconcile.gates import ConcurrencyGate, ResumeGate
from ingestrun.controller.reconcile.observe import Observer, Wait, refresh
from ingestrun.controller.reconcile.recorder import EventRecorder
from ingestrun.controller.state.cache import RunCache
from ingestrun.controller.state.memory import RunMemory
from ingestrun.kube.errors import KubeError
from ingestrun.kube.protocol import Cluster, Object, RunKey
from ingestrun.kube.server_clock import CLOCK, Clock
from ingestrun.model.run import IngestRun
from ingestrun.planner.actions import Plan, Predecessor
from ingestrun.planner.batch.pipeline import ON_CANCEL_STEP
from ingestrun.planner.jobs.manifest import POD_USER, CheckEndpointFor, WorkerImage, job_name
from ingestrun.planner.plan import plan
from ingestrun.planner.run.concurrency import ConcurrentRun
from ingestrun.planner.snapshot import Snapshot

logger = structlog.get_logger("ingestrun")

MAX_ROUNDS: Final = 8
"""Most times that a pass starts over because the run changed meanwhile, before the queue's backoff takes over."""
DRAIN_PAUSE_SECONDS: Final = 1.0
"""Seconds between a cancel and the first look at its drain, and between two such looks."""


class Reconciler:
    """Reconciler of runs through a `Cluster`. It keeps no state that a restart may not lose.

    `clock` is the API server's (`kube.server_clock`), because plans compare it with times that the server has set.
    """

    def __init__(
        self,
        cluster: Cluster,
        cache: RunCache,
        *,
        worker: WorkerImage,
        instance: str,
        clock: Callable[[], datetime],
        monotonic: Clock = CLOCK,
        user: int | None = POD_USER,
        check: CheckEndpointFor | None = None,
        drain_pause_seconds: float = DRAIN_PAUSE_SECONDS,
        defer: Callable[[Awaitable[None]], None] | None = None,
    ) -> None:
        self._cluster = cluster
        self._cache = cache
        self._clock = clock
        self._concurrency = ConcurrencyGate(cluster, cache)
        self._resume = ResumeGate(cluster, cache)
        self._observer = Observer(
            cluster, cache, clock=clock, monotonic=monotonic, drain_pause_seconds=drain_pause_seconds
        )
        self._recorder = EventRecorder(cluster, instance=instance, clock=clock, defer=defer)
        self._executor = Executor(
            cluster,
            cache,
            JobCreator(cluster, cache, worker=worker, user=user, check=check, clock=clock),
            self._recorder,
            self._concurrency,
            clock=clock,
        )

    async def reconcile(self, key: RunKey, trigger: str) -> float | None:
        """Reconcile one run.

        Returns the seconds until the next pass, or None. Raises KubeError when a call to the API server failed; then
        the queue retries.
        """
        for _ in range(MAX_ROUNDS):
            body = await self._current(key)
            if body is None:
                return None
            uid = body["metadata"]["uid"]
            with about_run(name=key.name, namespace=key.namespace, uid=uid):
                outcome = await self._round(key, uid, trigger)
            if outcome is not RETRY:
                return outcome.requeue_after
        raise KubeError(f"the run changed {MAX_ROUNDS} times under one pass")

    async def _current(self, key: RunKey) -> Object | None:
        """Return the newest body of the run, read from the API server if the cache is known to be outdated."""
        body = self._cache.run(key)
        memory = self._cache.memories.recall(body["metadata"]["uid"]) if body is not None else None
        if memory is None or memory.must_read:
            await refresh(self._cluster, self._cache, key)
            if memory is not None:
                memory.must_read = False
        return self._cache.run(key)

    async def _round(self, key: RunKey, uid: str, trigger: str) -> Done | Retry:
        # Taken once, so that a run which goes meanwhile leaves no record behind.
        memory = self._cache.memories.recall(uid)
        run = self._cache.parsed(key)
        memory.version = run.metadata.resource_version
        if self._cache.is_archived(uid):
            settled = run.metadata.generation == run.status.observed_generation
            if settled and not self._cache.may_give_back(uid, key.namespace):
                return await self._executor.expire(key, run)
            self._cache.unarchive(uid)  # the retention of its Jobs may have changed, or gives way to a quota
        try:
            async with (
                self._concurrency.peers(key, run) as peers,
                self._resume.predecessors(key, run) as predecessors,
            ):
                return await self._reconcile_once(key, run, memory, peers, predecessors, trigger)
        except Exception as error:
            self._cache.usage.withdraw(uid)
            await self._recorder.tell_failure(run, memory, error)
            raise
        finally:
            self._cache.usage.release(uid)

    async def _reconcile_once(
        self,
        key: RunKey,
        run: IngestRun,
        memory: RunMemory,
        peers: Sequence[ConcurrentRun],
        predecessors: Sequence[Predecessor] | None,
        trigger: str,
    ) -> Done | Retry:
        observed = await self._observer.observe(key, run, memory, peers=peers, predecessors=predecessors)
        if isinstance(observed, Wait):
            return Done(observed.seconds)
        snapshot, planned = self._plan(key, observed)
        outcome = await self._executor.execute(key, snapshot, planned, memory, trigger=trigger)
        if outcome is not RETRY:
            memory.told = frozenset()
        return outcome

    def _plan(self, key: RunKey, observed: Snapshot) -> tuple[Snapshot, Plan]:
        """Plan within the capacity that is left, and reserve the Jobs that the plan starts.

        Not a coroutine, so that no other run can be planned in between, because both could be granted one slot.
        """
        run, usage = observed.run, self._cache.usage
        capacity = usage.snapshot(run.metadata.uid, key.namespace, now=self._clock())
        snapshot = replace(observed, capacity=capacity)
        try:
            planned = plan(snapshot)
        except Exception as error:  # any, because a status may be edited into what no version would write
            logger.warning("the run cannot be planned, and is held", error=str(error), exc_info=True)
            why = f"what the status says cannot be ({type(error).__name__}, see the operator's log)"
            snapshot = replace(snapshot, run=run.held(self._cache.run(key) or {}, why))
            planned = plan(snapshot)
        # The clean-up of a cancelled run needs no slot.
        starts = [create for create in planned.creates if create.attempt.step.index != ON_CANCEL_STEP]
        job_names = [job_name(run, create) for create in starts]
        usage.reserve(key, run.metadata.uid, job_names, unmet_demand=planned.unmet_demand)
        return snapshot, planned
