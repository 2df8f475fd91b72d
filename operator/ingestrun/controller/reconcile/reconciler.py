"""One pass for one run: observe, plan, act. Whatever woke it, it decides from the state alone.

The order of effects is what the promises hang on:

1. The status is written first, with the resourceVersion that was planned from. A batch is claimed by that
   write before its Job is created; a cancel that came in between makes the write conflict.
2. Jobs are created only after such a write in the same pass, or after a GET that shows the planned version:
   either way the API server, not the cache, has just said that this run is not cancelled.
3. Between two creates the newest watched request to cancel is looked at, so a cancel never waits behind them.

Passes for one run never overlap (`queue`), and one replica acts (`lease`). So when `phase=Cancelled` is
written, every create of this run has been answered, or has timed out; a timed-out one is swept (`plan`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import structlog

from ingestrun.controller.reconcile.execute import JobCreator
from ingestrun.controller.reconcile.gates import ConcurrencyGate, ResumeGate, claim_predecessor
from ingestrun.controller.reconcile.observe import PodCreationFailures
from ingestrun.controller.reconcile.recorder import EventRecorder
from ingestrun.controller.state.cache import RunCache, cancelled_with_cascade, parents_of
from ingestrun.kube.errors import (
    Conflict,
    KubeError,
    NotFound,
)
from ingestrun.kube.protocol import Cluster, Object, RunKey
from ingestrun.model import names
from ingestrun.model.run import IngestRun
from ingestrun.model.spec import CancellationPolicy
from ingestrun.model.status import IngestRunStatus, Phase
from ingestrun.planner.actions import CancelledParent, ChildRun, DeleteJob, LivePods, Plan, Predecessor
from ingestrun.planner.batch.attempt import Attempt, JobState, MalformedJobError, read_job, read_pod
from ingestrun.planner.batch.failure_policy import WORKER_CANCELLED, Failure, outcome_of
from ingestrun.planner.batch.pipeline import ON_CANCEL_STEP
from ingestrun.planner.batch.state import JOB_MISSING
from ingestrun.planner.jobs.manifest import CheckEndpointFor, WorkerImage, delete_selector, job_name
from ingestrun.planner.plan import plan
from ingestrun.planner.run.backpressure import rejection_in_status
from ingestrun.planner.run.completion import expiry_of
from ingestrun.planner.run.concurrency import ConcurrentRun
from ingestrun.planner.snapshot import Snapshot
from ingestrun.planner.status.events import normal

logger = structlog.get_logger("ingestrun")

MAX_ROUNDS: Final = 8
"""How often one pass starts over because the run changed under it, before the queue's backoff takes over."""
DRAIN_PAUSE_SECONDS: Final = 1.0
"""Between a cancel and the first look at its drain, and between two such looks."""
POD_GRACE_SECONDS: Final = 0.5
"""An ended Job whose pod's end has not been seen: the two watches race; after this long the pods are listed."""
_LISTED: Final = -math.inf
"""In place of the moment since which a pod's end is waited for: it has been looked for live, and is not there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Retry:
    """The pass starts over at once: what it planned from is no longer so."""


class Reconciler:
    """Brings runs forward through a `Cluster`. Keeps nothing that a restart may not lose."""

    def __init__(
        self,
        cluster: Cluster,
        store: RunCache,
        *,
        worker: WorkerImage,
        instance: str,
        check: CheckEndpointFor | None = None,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        drain_pause_seconds: float = DRAIN_PAUSE_SECONDS,
        defer: Callable[[Awaitable[None]], None] | None = None,
    ) -> None:
        self._cluster = cluster
        self._store = store
        self._podless = PodCreationFailures(cluster, store.usage)
        self._clock = clock
        self._teller = EventRecorder(cluster, instance=instance, clock=clock, defer=defer)
        self._must_read: set[RunKey] = set()
        self._starter = JobCreator(
            cluster, store, worker=worker, check=check, clock=clock, must_read=self._must_read.add
        )
        self._unclear: dict[str, dict[str, float]] = {}
        self._drain_pause = timedelta(seconds=drain_pause_seconds)
        self._looked: dict[str, datetime] = {}
        self._turns = ConcurrencyGate(cluster, store)
        self._resumptions = ResumeGate(cluster, store)

    async def reconcile(self, key: RunKey, trigger: str) -> float | None:
        """Look at one run and do what is due.

        Returns in how many seconds to look again, or None. Raises KubeError when the API server could not be
        asked or told: the queue comes back.
        """
        for _ in range(MAX_ROUNDS):
            body = await self._current(key)
            if body is None:
                return None
            try:
                run = self._store.parsed(key)
            except ValueError as error:
                logger.error("the run cannot be read: it was stored under another CRD", run=str(key), error=str(error))
                return None
            if self._store.is_archived(run.metadata.uid):
                if run.metadata.generation == run.status.observed_generation:
                    return await self._expire(key, run)
                self._store.unarchive(run.metadata.uid)  # what its Jobs may stay for may have changed
            try:
                async with self._turns.take(key, run) as rivals, self._resumptions.take(key, run) as predecessors:
                    outcome = await self._round(key, run, rivals, predecessors, trigger)
            except KubeError:
                self._store.usage.withdraw(run.metadata.uid)
                raise
            finally:
                self._store.usage.release(run.metadata.uid)
            if not isinstance(outcome, _Retry):
                return outcome
        raise KubeError(f"the run changed {MAX_ROUNDS} times under one pass")

    async def _current(self, key: RunKey) -> Object | None:
        if key in self._must_read or self._store.run(key) is None:
            try:
                self._store.upsert_run(await self._cluster.get_run(key))
            except NotFound:
                self.forget(key)
            self._must_read.discard(key)
        return self._store.run(key)

    async def _round(
        self,
        key: RunKey,
        run: IngestRun,
        rivals: Sequence[ConcurrentRun],
        predecessors: Sequence[Predecessor] | None,
        trigger: str,
    ) -> float | _Retry | None:
        uid = run.metadata.uid
        ended = run.status.ended
        live = None
        primed = self._store.has_synced(uid)
        self._starter.observe(run)
        if ended:
            # A draining run is looked at live, by two lists: not at every event of its pods.
            wait = self._drain_pause - (self._clock() - self._looked.get(uid, datetime.min.replace(tzinfo=UTC)))
            if wait.total_seconds() > 0 and run.metadata.generation == run.status.observed_generation:
                return wait.total_seconds()
        if ended or not primed:
            live = await self._list_live(run)
            if not ended and not primed and (refusal := rejection_in_status(run, now=self._clock())) is not None:
                self._starter.restore_rejection(uid, refusal)
        jobs, unclear = await self._judgeable(run, self._store.attempts(uid))
        if not ended:
            jobs = await self._podless.explained(key, run, jobs, now=self._clock())
        elif run.status.cancellation is not None and run.status.cancellation.on_cancel is not None:
            jobs = await self._podless.reasons(key.namespace, jobs, now=self._clock())
        snapshot = Snapshot(
            run=run,
            attempts=jobs,
            now=self._clock(),
            rejection=self._starter.rejection(uid),
            live=live if ended else None,
            parent=await self._cancelled_parent(key, ask=not primed or self._heard(key, jobs)),
            children=self._children(key) if ended else (),
            peers=rivals,
            predecessors=predecessors,
            skipped=self._teller.skipped(uid),
            # The last to be asked for: nothing is awaited between the snapshot and the reservation of what it grants.
            capacity=self._store.usage.snapshot(uid, key.namespace, now=self._clock()),
        )
        planned = plan(snapshot)
        if live is None and _lacks_a_job(run.status, planned.status):
            self._store.invalidate(uid)  # a watch may lag behind; what is missing in a live list is gone
            return _Retry()
        if planned.claim_predecessor is not None:
            await claim_predecessor(self._cluster, self._store, planned.claim_predecessor)
            return _Retry()
        stages = [create for create in planned.creates if create.start.step.index != ON_CANCEL_STEP]
        self._store.usage.reserve(
            key, uid, [job_name(run, create) for create in stages], unmet_demand=planned.unmet_demand
        )
        in_doubt = not ended and planned.fence and self._starter.has_unanswered_create(uid)
        asked_by = run.metadata.cancel_requested_by if run.spec.cancel else None
        if in_doubt and await self._fence(key, run, wanted=True, asked_by=asked_by):
            # A create may still arrive: the fence has to stand when Cancelled is stored.
            return _Retry()
        if ended:
            self._teller.log_skips(key, run, planned, trigger)

        stored, run_now = run.status, run
        if _json(planned.status) != _json(run.status):
            written = await self._write(key, run, planned.status)
            if written is None:
                return _Retry()
            run_now = written
            self._teller.log_failures(key, stored, run_now, planned)
            await self._teller.tell(run_now, planned.events)
            self._teller.log_phase(key, stored, run_now)
            if run_now.status.phase is Phase.CANCELLED and not ended:
                # The drain can wait a moment; the other runs that were cancelled in this second can't.
                self._looked[uid] = self._clock()
        elif planned.creates:
            fresh = await self._cluster.get_run(key)
            self._store.upsert_run(fresh)
            if fresh["metadata"]["resourceVersion"] != run.metadata.resource_version:
                return _Retry()
        if not ended:
            self._teller.log_skips(key, run_now, planned, trigger)

        if not await self._create_all(key, run_now, planned):
            return _Retry()
        await self._delete_all(run_now, planned)
        if ended and planned.fence is not None:
            await self._fence(key, run_now, wanted=planned.fence)
        look = self._next_look(run_now, planned, unclear=unclear)
        return await self._expire(key, run_now, look) if planned.expirable else look

    async def _list_live(self, run: IngestRun) -> LivePods:
        """Take the run's Jobs and pods from the server, in place of what the watches have shown."""
        meta = run.metadata
        jobs, pods = [], []
        for body in await self._cluster.list_jobs(namespace=meta.namespace, run_uid=meta.uid):
            try:
                jobs.append(read_job(body))
            except MalformedJobError as error:
                logger.warning(
                    "ignoring a Job that is not ours", run=meta.name, namespace=meta.namespace, why=str(error)
                )
        for body in await self._cluster.list_pods(namespace=meta.namespace, run_uid=meta.uid):
            pod = read_pod(body)
            if pod is not None:
                pods.append(pod)
        self._store.replace_children(meta.uid, jobs, pods)
        self._looked[meta.uid] = self._clock()
        return LivePods(pods=tuple(pods))

    async def _cancelled_parent(self, key: RunKey, *, ask: bool) -> CancelledParent | None:
        """A run above this one that is Cancelled with `cascade`, if there is one.

        With `ask`, the server is asked rather than the cache: a run created after its parent's cancel must not
        start anything because the news are still on their way. A parent that does not exist is none.
        """
        body = self._store.run(key)
        for above in parents_of(body) if body is not None else ():
            if ask:
                try:
                    self._store.upsert_run(await self._cluster.get_run(above))
                except NotFound:
                    continue
            found = self._store.run(above)
            if found is None or not cancelled_with_cascade(found):
                continue
            record = IngestRunStatus.model_validate(found["status"]).cancellation
            if record is not None:
                return CancelledParent(
                    name=above.name,
                    reason=record.reason,
                    requested_by=record.requested_by,
                    policy=record.policy or CancellationPolicy.DRAIN,
                )
        return None

    def _heard(self, key: RunKey, jobs: list[Attempt]) -> bool:
        """Whether a pod of a run with parents has stopped for a cancel that is not known here.

        The check has told it of the parent's, which may be news that are still on their way to this process.
        """
        body = self._store.run(key)
        if body is None or not parents_of(body) or self._store.cancel_requested(key):
            return False
        verdicts = (outcome_of(job) for job in jobs if job.state is JobState.SUCCEEDED)
        return any(isinstance(verdict, Failure) and verdict.reason == WORKER_CANCELLED for verdict in verdicts)

    def _children(self, key: RunKey) -> list[ChildRun]:
        found = []
        for body in self._store.children_of(key):
            phase = (body.get("status") or {}).get("phase")
            found.append(ChildRun(name=body["metadata"]["name"], phase=Phase(phase) if phase else None))
        return found

    async def _fence(self, key: RunKey, run: IngestRun, *, wanted: bool, asked_by: str | None = None) -> bool:
        """Put the label on that the fence selects by, or take it off; whether the run has got it by that.

        Before Cancelled is stored the label is what the cancel hangs on, should the request be taken back meanwhile; so
        `asked_by` goes along, which would be gone with it. The fence is a second lock: that it can't be set never
        holds up a cancel.
        """
        if (run.metadata.labels.get(names.LABEL_CANCELLED) == "true") == wanted:
            return False
        try:
            patch: Object = {"metadata": {"labels": {names.LABEL_CANCELLED: "true" if wanted else None}}}
            if asked_by is not None:
                patch["metadata"]["annotations"] = {names.ANNOTATION_REQUESTED_BY: asked_by}
            self._store.upsert_run(await self._cluster.patch_run(key, patch=patch))
        except NotFound:
            self._must_read.add(key)
            return True
        except KubeError as error:
            logger.warning("the label of the fence could not be set", run=str(key), wanted=wanted, error=str(error))
            return False
        return wanted

    async def _judgeable(self, run: IngestRun, jobs: list[Attempt]) -> tuple[list[Attempt], bool]:
        """The Jobs as they may be judged: an ended one whose pod's end has not arrived yet still counts as running.

        Returns them, and whether any is waited for. Once the grace is over the pods are listed; what is not
        there then is missing for good.
        """
        settled = run.status.batches.published | run.status.batches.failed
        awaited = [
            job
            for job in jobs
            if job.state.finished
            and (job.pod is None or not job.pod.ended)
            and job.job.reason != "DeadlineExceeded"  # of the Job itself: its controller has deleted the pod
            and job.job.batch not in settled
        ]
        if not awaited:
            self._unclear.pop(run.metadata.uid, None)
            return jobs, False
        clock = time.monotonic()
        before = self._unclear.get(run.metadata.uid, {})
        since = self._unclear[run.metadata.uid] = {job.job.uid: before.get(job.job.uid, clock) for job in awaited}
        young = {uid for uid, first in since.items() if clock - first < POD_GRACE_SECONDS}
        if any(uid not in young and first != _LISTED for uid, first in since.items()):
            await self._list_live(run)
            jobs = self._store.attempts(run.metadata.uid)
            since.update({uid: _LISTED for uid in since if uid not in young})
        return [replace(job, state=JobState.RUNNING) if job.job.uid in young else job for job in jobs], bool(young)

    async def _write(self, key: RunKey, run: IngestRun, status: IngestRunStatus) -> IngestRun | None:
        """Write the status; None when the run has changed or gone: then nothing was done, and it is read anew."""
        try:
            body = await self._cluster.write_status(
                key, resource_version=run.metadata.resource_version, status=_json(status)
            )
        except (Conflict, NotFound):
            self._must_read.add(key)
            return None
        except KubeError:
            self._must_read.add(key)
            raise
        self._store.upsert_run(body)
        newest = self._store.parsed(key)
        same = newest.metadata.resource_version == body["metadata"]["resourceVersion"]
        return newest if same else IngestRun.read(body)

    async def _create_all(self, key: RunKey, run: IngestRun, planned: Plan) -> bool:
        """Create the planned Jobs one after another; False when the pass has to start over."""
        cancelled = run.status.phase is Phase.CANCELLED  # then the one create that is planned is the clean-up's
        for create in planned.creates:
            if not cancelled and (self._store.cancel_requested(key) or await self._cancelled_parent(key, ask=False)):
                return False
            if not cancelled and self._turns.replaced(key, run):
                return False
            if not await self._starter.create(key, run, create):
                return False
        return True

    async def _delete_all(self, run: IngestRun, planned: Plan) -> None:
        meta = run.metadata
        for pod in planned.pod_deletions:
            await self._cluster.delete_pod(
                namespace=meta.namespace, name=pod.name, uid=pod.uid, grace_seconds=pod.grace_seconds
            )
            logger.info("pod told to end", run=meta.name, namespace=meta.namespace, uid=meta.uid, pod=pod.name)
        for delete in planned.job_deletions:
            await self._delete(run, delete)
        if planned.bulk_deletion is not None:
            await self._cluster.delete_jobs(
                namespace=meta.namespace, selector=delete_selector(meta.uid, planned.bulk_deletion)
            )
            for job in self._store.attempts(meta.uid):
                if job.job.batch in (planned.bulk_deletion.batches or ()):
                    self._store.remove_job(run_uid=meta.uid, job_uid=job.job.uid)

    async def _delete(self, run: IngestRun, delete: DeleteJob) -> None:
        """Delete a Job, its pod first: only while the server agrees that it is as it was when it was judged."""
        meta, job, pod = run.metadata, delete.job, delete.pod
        if pod is not None and not pod.ended and pod.deleting_until is None:
            try:
                await self._cluster.delete_pod(
                    namespace=meta.namespace, name=pod.name, uid=pod.uid, resource_version=pod.resource_version
                )
            except Conflict:
                self._looked.pop(meta.uid, None)  # it has changed, perhaps started: judged anew at the next look
                return
        await self._cluster.delete_job(namespace=meta.namespace, name=job.name, uid=job.uid)
        self._store.remove_job(run_uid=meta.uid, job_uid=job.uid)
        logger.info(
            "job deleted", run=meta.name, namespace=meta.namespace, uid=meta.uid,
            batch=job.batch, job=job.name, why=delete.why,
        )  # fmt: skip

    def _next_look(self, run: IngestRun, planned: Plan, *, unclear: bool) -> float | None:
        uid = run.metadata.uid
        if run.status.ended and planned.requeue_at is None:
            self._drop(uid)
            self._store.archive(uid)
            return None
        delay = None
        if planned.requeue_at is not None:
            delay = max(0.0, (planned.requeue_at - self._clock()).total_seconds())
        if unclear:
            delay = min(POD_GRACE_SECONDS, delay if delay is not None else POD_GRACE_SECONDS)
        return delay

    async def _expire(self, key: RunKey, run: IngestRun, look: float | None = None) -> float | None:
        """Delete a settled run whose time has come. Returns in how many seconds to look again: `look`, or earlier."""
        expiry = expiry_of(run)
        if expiry is None:
            return look
        wait = (expiry - self._clock()).total_seconds()
        if wait > 0:
            return wait if look is None else min(look, wait)
        meta = run.metadata
        try:
            await self._cluster.delete_run(key, uid=meta.uid, resource_version=meta.resource_version)
        except Conflict:
            self._must_read.add(key)  # changed meanwhile, perhaps the very field
            return 0.0
        seconds = run.spec.ttl_seconds_after_finished
        logger.info("ingest run deleted, its time is over", run=meta.name, namespace=meta.namespace, uid=meta.uid,
                    phase=run.status.phase, ttl_seconds_after_finished=seconds)  # fmt: skip
        note = f"deleted, as ttlSecondsAfterFinished of {seconds} says; it had ended as {run.status.phase}"
        await self._teller.tell(run, [normal("Expired", note, action="Delete")])
        self.forget(key)
        return None

    def forget(self, key: RunKey) -> None:
        """Drop all that is kept of a run that is gone."""
        body = self._store.run(key)
        if body is not None:
            self._drop(body["metadata"]["uid"])
        self._store.remove_run(key)

    def _drop(self, uid: str) -> None:
        self._starter.forget(uid)
        self._teller.forget(uid)
        self._unclear.pop(uid, None)
        self._looked.pop(uid, None)


def _lacks_a_job(before: IngestRunStatus, after: IngestRunStatus) -> bool:
    """Whether a batch is to fail for a Job that is not there, as far as is known."""
    known = {failure.id for failure in before.failures}
    return any(failure.reason == JOB_MISSING and failure.id not in known for failure in after.failures)


def _json(status: IngestRunStatus) -> dict[str, Any]:
    return status.model_dump(mode="json", by_alias=True, exclude_none=True)
