"""The last part of a pass: carry a plan out. The guarantees depend on the order of effects:

1. The status is written first, with the resourceVersion that was planned from. A batch is claimed by that
   write before its Job is created; a cancel that came in between makes the write conflict.
2. Jobs are created only after such a write in the same pass, or after a GET that shows the planned version:
   in both cases the API server, not the cache, has just confirmed that this run is not cancelled.
3. Between two creates the newest watched request to cancel is looked at, so a cancel never waits behind them.

Passes for one run never overlap (`watch.workqueue`), and one replica acts (`kube.leader_election`). So when
`phase=Cancelled` is written, every create of this run has been answered, or has timed out; a timed-out one is swept
(`planner.run.drain`). If a create may still arrive, the fence is armed before that write.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import structlog

from ingestrun.controller.reconcile.gates import ConcurrencyGate, claim_predecessor
from ingestrun.controller.reconcile.observe import refresh, watched_cancelled_parent
from ingestrun.controller.reconcile.recorder import REFUSALS, EventRecorder
from ingestrun.controller.state.cache import RunCache, read_run
from ingestrun.controller.state.memory import POD_GRACE_SECONDS, RunMemory
from ingestrun.kube.errors import (
    AlreadyExists,
    Conflict,
    Denied,
    Forbidden,
    Invalid,
    KubeError,
    NamespaceTerminating,
    NotFound,
    QuotaExceeded,
    Unknown,
    WebhookUnavailable,
)
from ingestrun.kube.protocol import Cluster, Object, RunKey
from ingestrun.model import names
from ingestrun.model.contract import Stage
from ingestrun.model.run import IngestRun
from ingestrun.model.status import IngestRunStatus, Phase
from ingestrun.planner.actions import CreateJob, CreateRejection, DeleteJob, DeleteJobs, Plan
from ingestrun.planner.batch.attempt import END_DEADLINE, read_pod
from ingestrun.planner.batch.failure_policy import FailureAction, rule_of
from ingestrun.planner.batch.state import JOB_MISSING
from ingestrun.planner.jobs.manifest import (
    CheckEndpointFor,
    WorkerImage,
    adoptable,
    changed_at_creation,
    delete_selector,
    job_manifest,
)
from ingestrun.planner.jobs.retention import is_accounted
from ingestrun.planner.run.backpressure import retry_interval
from ingestrun.planner.run.completion import expiry_of
from ingestrun.planner.snapshot import Snapshot
from ingestrun.planner.status.events import HELD, normal
from ingestrun.planner.status.writer import status_patch

logger = structlog.get_logger("ingestrun")


class Retry(enum.Enum):
    """The type of `RETRY`, its one member."""

    RETRY = enum.auto()


RETRY: Final = Retry.RETRY
"""The pass has to start over at once, because its snapshot is outdated."""


@dataclass(frozen=True, slots=True)
class Done:
    """The plan is carried out."""

    requeue_after: float | None = None
    """Seconds after which the run is reconciled again; None: not before an event of it."""


class Executor:
    """Carries plans out through a `Cluster`."""

    def __init__(
        self,
        cluster: Cluster,
        cache: RunCache,
        creator: JobCreator,
        recorder: EventRecorder,
        concurrency: ConcurrencyGate,
        *,
        clock: Callable[[], datetime],
    ) -> None:
        self._cluster = cluster
        self._cache = cache
        self._creator = creator
        self._recorder = recorder
        self._concurrency = concurrency
        self._clock = clock

    async def execute(
        self, key: RunKey, snapshot: Snapshot, plan: Plan, memory: RunMemory, *, trigger: str
    ) -> Done | Retry:
        """Carry the plan out, in the order that the module describes. Raises KubeError: the pass has failed."""
        run, ended = snapshot.run, snapshot.run.status.ended
        if snapshot.live is None and (plan.misses_jobs or _lacks_a_job(run.status, plan.status)):
            self._cache.invalidate(run.metadata.uid)  # a watch may lag behind; a Job missing in a live list is gone
            return RETRY
        if plan.claim_predecessor is not None:
            await claim_predecessor(self._cluster, self._cache, plan.claim_predecessor)
            return RETRY
        if await self._arm_fence_in_doubt(key, run, plan, memory):
            return RETRY
        if ended:
            self._recorder.log_skips(memory, plan, trigger=trigger)
        stored = await self._store_status(key, run, plan, memory)
        if stored is None:
            return RETRY
        memory.answer(plan.answers)  # not before the status is stored that holds the claims and permissions
        if not ended:
            self._recorder.log_skips(memory, plan, trigger=trigger)  # not before the cancel is stored
        if not await self._create_all(key, stored, plan, memory):
            return RETRY
        await self._end_all(stored, plan, memory)
        await self._delete_all(stored, plan, memory)
        if ended and plan.fence is not None:
            await self._set_fence(key, stored, memory, armed=plan.fence)
            if memory.must_read:
                return RETRY
        return await self._finish(key, stored, plan, memory)

    async def expire(self, key: RunKey, run: IngestRun, *, requeue_after: float | None = None) -> Done:
        """Delete a run that needs nothing more, if its `ttlSecondsAfterFinished` is over; else look again by then."""
        expiry = expiry_of(run)
        if expiry is None:
            return Done(requeue_after)
        wait = (expiry - self._clock()).total_seconds()
        if wait > 0:
            return Done(wait if requeue_after is None else min(requeue_after, wait))
        meta = run.metadata
        try:
            await self._cluster.delete_run(key, uid=meta.uid, resource_version=meta.resource_version)
        except Conflict:
            await refresh(self._cluster, self._cache, key)  # it has changed, perhaps this very field
            return Done(0.0)
        seconds = run.spec.ttl_seconds_after_finished
        logger.info("ingest run deleted, its time is over", phase=run.status.phase, ttl_seconds_after_finished=seconds)
        note = f"deleted, as ttlSecondsAfterFinished of {seconds} says; it had ended as {run.status.phase}"
        await self._recorder.post(run, [normal("Expired", note, action="Delete")])
        self._cache.remove_run(key)
        return Done()

    # ---- the status

    async def _store_status(self, key: RunKey, run: IngestRun, plan: Plan, memory: RunMemory) -> IngestRun | None:
        """Write the status if it has changed, and report the changes; else confirm the run if a Job is to be created.

        Returns the run as it is stored; None if it has changed meanwhile or is gone. Then no effect has happened.
        """
        patch = status_patch(run, plan.status)
        if not patch:
            return run if not plan.creates or await self._is_newest(key, run) else None
        try:
            stored = await self._write(key, run, patch, memory)
        except REFUSALS:
            for event in plan.events:
                if event.reason == HELD:  # true all the same
                    await self._recorder.tell_once(run, memory, event)
            raise
        if stored is None:
            return None
        await self._recorder.tell(run, stored, plan)
        if stored.status.phase is Phase.CANCELLED and not run.status.ended:
            # The drain can wait a moment; the other runs that were cancelled in this second can't.
            memory.drain_checked_at = self._clock()
        return stored

    async def _write(self, key: RunKey, run: IngestRun, status: Object, memory: RunMemory) -> IngestRun | None:
        try:
            body = await self._cluster.write_status(key, resource_version=run.metadata.resource_version, status=status)
        except (Conflict, NotFound):
            memory.must_read = True
            return None
        except KubeError:
            memory.must_read = True
            raise
        self._cache.upsert_run(body)
        memory.version = body["metadata"]["resourceVersion"]
        newest = self._cache.parsed(key)
        same = newest.metadata.resource_version == body["metadata"]["resourceVersion"]
        return newest if same else IngestRun.read(body)

    async def _is_newest(self, key: RunKey, run: IngestRun) -> bool:
        fresh = await read_run(self._cluster, self._cache, key)
        return bool(fresh["metadata"]["resourceVersion"] == run.metadata.resource_version)

    # ---- the fence

    async def _arm_fence_in_doubt(self, key: RunKey, run: IngestRun, plan: Plan, memory: RunMemory) -> bool:
        """Arm the fence before Cancelled is stored, if a create may still arrive. Returns whether to start over."""
        if run.status.ended or not plan.fence or not memory.unanswered_create:
            return False
        asked_by = run.metadata.cancel_requested_by if run.spec.cancel else None
        return await self._set_fence(key, run, memory, armed=True, asked_by=asked_by)

    async def _set_fence(
        self, key: RunKey, run: IngestRun, memory: RunMemory, *, armed: bool, asked_by: str | None = None
    ) -> bool:
        """Add or remove the label by which the fence selects the run. Returns whether the pass has to start over.

        Before Cancelled is stored, the cancel depends on this label if the request is taken back meanwhile. The name
        of the user would be gone with the request, so `asked_by` is stored along with the label. The fence is a second
        lock: a failure to set it never holds up a cancel.
        """
        if (run.metadata.labels.get(names.LABEL_CANCELLED) == "true") == armed:
            return False
        patch: dict[str, Any] = {"labels": {names.LABEL_CANCELLED: "true" if armed else None}}
        if asked_by is not None:
            patch["annotations"] = {names.ANNOTATION_REQUESTED_BY: asked_by}
        try:
            self._cache.upsert_run(await self._cluster.patch_run(key, patch={"metadata": patch}))
        except NotFound:
            memory.must_read = True
            return True
        except KubeError as error:
            logger.warning("the label of the fence could not be set", armed=armed, error=str(error))
            return False
        return armed

    # ---- the Jobs

    async def _create_all(self, key: RunKey, run: IngestRun, plan: Plan, memory: RunMemory) -> bool:
        """Create the planned Jobs one after another; return False when the pass has to start over."""
        cancelled = run.status.phase is Phase.CANCELLED  # then the one create that is planned is the clean-up's
        for create in plan.creates:
            if not cancelled and self._is_stopped(key, run):
                return False
            if not await self._creator.create(run, create, memory):
                return False
        return True

    def _is_stopped(self, key: RunKey, run: IngestRun) -> bool:
        """Tell whether a cancel of the run or of a run above it, or a run that replaces it, was watched meanwhile."""
        return (
            self._cache.cancel_requested(key)
            or watched_cancelled_parent(self._cache, key) is not None
            or self._concurrency.is_replaced(key, run)
        )

    async def _end_all(self, run: IngestRun, plan: Plan, memory: RunMemory) -> None:
        """End what is left of pods whose stage is over. What the server refuses ends by itself, or with its Job."""
        for end in plan.pod_ends:
            try:
                body = await self._cluster.set_pod_deadline(
                    namespace=run.metadata.namespace, name=end.name, uid=end.uid, seconds=END_DEADLINE
                )
            except NotFound:
                continue
            except (Forbidden, Invalid) as error:
                if end.containers not in memory.sidecars_refused:
                    memory.sidecars_refused |= {end.containers}
                    logger.warning(
                        "a sidecar cannot be ended", pod=end.name, containers=end.containers, error=str(error)
                    )
                continue
            self._cache.upsert_pod(read_pod(body))  # so that the next pass does not tell it once more
            await self._recorder.report_end(run, end, memory)

    async def _delete_all(self, run: IngestRun, plan: Plan, memory: RunMemory) -> None:
        meta = run.metadata
        for pod in plan.pod_deletions:
            await self._cluster.delete_pod(
                namespace=meta.namespace, name=pod.name, uid=pod.uid, grace_seconds=pod.grace_seconds
            )
            logger.info("pod told to end", pod=pod.name)
        for delete in plan.job_deletions:
            await self._delete(run, delete, memory)
        if plan.bulk_deletion is not None:
            await self._delete_many(run, plan.bulk_deletion)

    async def _delete_many(self, run: IngestRun, deletion: DeleteJobs) -> None:
        """Delete many Jobs by one call; one by one if a selector would find a Job that is not the run's own as well."""
        meta = run.metadata
        jobs = [attempt.job for attempt in self._cache.attempts(meta.uid) if deletion.covers(attempt)]
        if self._cache.strangers.has_jobs_with_labels_of(meta.uid):
            for job in jobs:
                await self._cluster.delete_job(namespace=meta.namespace, name=job.name, uid=job.uid)
        else:
            await self._cluster.delete_jobs(namespace=meta.namespace, selector=delete_selector(meta.uid, deletion))
        for job in jobs:
            self._cache.remove_job(run_uid=meta.uid, job_uid=job.uid)

    async def _delete(self, run: IngestRun, delete: DeleteJob, memory: RunMemory) -> None:
        """Delete a Job, its pod first: only while by the server the pod is unchanged since it was judged."""
        meta, job, pod = run.metadata, delete.job, delete.pod
        if pod is not None and not pod.ended and pod.deleting_until is None:
            try:
                await self._cluster.delete_pod(
                    namespace=meta.namespace, name=pod.name, uid=pod.uid, resource_version=pod.resource_version
                )
            except Conflict:
                memory.drain_checked_at = None  # it has changed, perhaps started: judged anew at the next look
                return
        await self._cluster.delete_job(namespace=meta.namespace, name=job.name, uid=job.uid)
        self._cache.remove_job(run_uid=meta.uid, job_uid=job.uid)
        subject = {"worker": job.batch} if job.worker else {"batch": job.batch}
        logger.info("job deleted", **subject, job=job.name, why=delete.why)

    # ---- the next look

    async def _finish(self, key: RunKey, run: IngestRun, plan: Plan, memory: RunMemory) -> Done:
        requeue_after = None
        if plan.requeue_at is not None:
            requeue_after = max(0.0, (plan.requeue_at - self._clock()).total_seconds())
        self._cache.forget_vanished(run.metadata.uid, lambda attempt: is_accounted(run, attempt))
        if run.status.ended and requeue_after is None:
            self._cache.archive(run.metadata.uid)
        elif memory.awaits_pods:
            requeue_after = min(POD_GRACE_SECONDS, requeue_after if requeue_after is not None else POD_GRACE_SECONDS)
        if plan.expirable:
            return await self.expire(key, run, requeue_after=requeue_after)
        return Done(requeue_after)


class JobCreator:
    """Creates Jobs one by one, and keeps refused and unanswered creates in the run's memory."""

    def __init__(
        self,
        cluster: Cluster,
        cache: RunCache,
        *,
        worker: WorkerImage,
        user: int | None,
        check: CheckEndpointFor | None,
        clock: Callable[[], datetime],
    ) -> None:
        self._cluster = cluster
        self._cache = cache
        self._worker = worker
        self._user = user
        self._check = check
        self._clock = clock

    async def create(self, run: IngestRun, create: CreateJob, memory: RunMemory) -> bool:
        """Create a Job, or adopt the one that an earlier try has left.

        Returns False when the pass has to start over. Raises KubeError when the server could not be asked.
        """
        attempt, namespace = create.attempt, run.metadata.namespace
        check = self._check(run, create) if self._check is not None else None
        manifest = job_manifest(run, create, worker=self._worker, check=check, user=self._user)
        name = manifest["metadata"]["name"]
        try:
            job = await self._create_or_find(manifest)
        except (QuotaExceeded, Forbidden, Invalid, NamespaceTerminating, WebhookUnavailable) as error:
            reason, message = _describe(error, run, create, job_name=name)
            self._reject(run, memory, reason, message)
            return False
        except Unknown:
            memory.unanswered_create = True
            self._cache.usage.mark_unanswered(run.metadata.uid, name)
            self._cache.invalidate(run.metadata.uid)
            raise
        except NotFound:
            # The namespace is gone, or the adopted Job went meanwhile: look again from the start.
            memory.must_read = True
            raise
        except BaseException:
            memory.unanswered_create = True
            raise
        own = self._cache.own_job(job) if adoptable(run, create, job) else None
        if own is None:
            self._reject(run, memory, "NameTaken", _taken(run, job))
            return False
        change = changed_at_creation(manifest, job)
        if change is not None and attempt.step.stage is not Stage.ON_CANCEL:
            await self._cluster.delete_job(namespace=namespace, name=name, uid=own.uid)
            self._reject(
                run,
                memory,
                "JobChanged",
                f"{create.subject}: an admission policy or webhook has changed {change}: "
                f"exempt Jobs with the label {names.LABEL_RUN_UID} from it",
            )
            return False
        self._cache.upsert_job(own)
        self._cache.usage.job_admitted(namespace)
        raised = {"memory": str(attempt.memory)} if attempt.memory is not None else {}
        if create.worker:
            logger.info("worker started", worker=attempt.batch, job=name, **raised)
        else:
            logger.info(
                "job created", batch=attempt.batch, stage=attempt.step.label, attempt=attempt.number, job=name, **raised
            )
        if memory.rejection is None:
            return True
        memory.rejection = None
        return False  # the first Job after a rejection: there is room again, and the plan may be a larger one

    async def _create_or_find(self, manifest: Object) -> Object:
        """Return the Job of that name as it is stored, whose ever it is."""
        meta = manifest["metadata"]
        try:
            return await self._cluster.create_job(manifest)
        except AlreadyExists:
            return await self._cluster.get_job(namespace=meta["namespace"], name=meta["name"])

    def _reject(self, run: IngestRun, memory: RunMemory, reason: str, message: str) -> None:
        """Remember that the server refused a Job; the next plan reports it."""
        retry_at = self._clock() + retry_interval(run)
        permanent = rule_of(reason).action is FailureAction.FAIL_RUN
        memory.rejection = CreateRejection(reason=reason, message=message, retry_at=retry_at, permanent=permanent)
        if reason == "QuotaExceeded":
            self._cache.usage.quota_refused(run.metadata.namespace, message, until=retry_at)
        logger.warning("job refused", reason=reason, why=message)


def _describe(error: KubeError, run: IngestRun, create: CreateJob, *, job_name: str) -> tuple[str, str]:
    """Return the reason and the message for a create that was refused."""
    where = create.subject
    match error:
        case QuotaExceeded():
            # Without the Job's name the sentence is the same for each Job, so that a status need not change.
            return "QuotaExceeded", str(error).replace(f'"{job_name}" ', "")
        case Denied():
            return "AdmissionDenied", f"{where}: {error}"
        case Forbidden():
            return "Forbidden", f"the operator lacks a right that an administrator has to grant: {error}"
        case Invalid():
            return "JobRefused", f"{where}: {error}"
        case NamespaceTerminating():
            namespace = run.metadata.namespace
            return "NamespaceTerminating", f"namespace {namespace} is being deleted: nothing can start there"
        case _:
            return "WebhookUnavailable", str(error)


def _taken(run: IngestRun, found: Object) -> str:
    """Return the sentence about a Job that has the name of one of the run's, and is not the run's own."""
    name, references = found["metadata"]["name"], found["metadata"].get("ownerReferences") or ()
    owner = next((reference for reference in references if reference.get("controller")), None)
    if owner is not None and owner["uid"] == run.metadata.uid:
        return f"Job {name}, which this run owns, lacks labels that the operator gives: does a policy change them?"
    whose = f"{owner['kind']} {owner['name']} owns it" if owner is not None else "nothing owns it"
    return f"a Job {name} exists that is not of this run ({whose}): delete it, and create a new run"


def _lacks_a_job(before: IngestRunStatus, after: IngestRunStatus) -> bool:
    """Tell whether a batch is to fail because of a Job that is missing, as far as is known."""
    known = {failure.id for failure in before.failures}
    if before.batches.fetched - after.batches.fetched:
        return True  # one is to be fetched again
    return any(failure.reason == JOB_MISSING and failure.id not in known for failure in after.failures)
