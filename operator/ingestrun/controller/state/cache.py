"""The cache of runs: the newest body of each that was seen, and the facts of its Jobs and pods.

Nothing in it is trusted with a start, because every status write carries the resourceVersion that was planned from, and
an old one is refused. Facts arrive late or not at all; then a pass changes nothing, or is repeated.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Final

import structlog

from ingestrun.controller.state.compact import BodyCompactor
from ingestrun.controller.state.memory import RunMemories
from ingestrun.controller.state.strangers import Strangers
from ingestrun.controller.state.usage import Usage
from ingestrun.kube.protocol import Cluster, Object, RunKey
from ingestrun.model import names
from ingestrun.model.lineage import parents_of
from ingestrun.model.run import IngestRun, cancel_requested, has_ended
from ingestrun.planner.batch.attempt import (
    JOB_DELETED,
    Attempt,
    JobState,
    ObservedJob,
    ObservedPod,
    attempt_of,
    ended_by_suspension,
    read_job,
    read_pod,
)
from ingestrun.planner.batch.ownership import OrphanedJob, foreign_job_reason, foreign_pod_reason
from ingestrun.planner.batch.pipeline import ON_CANCEL_STEP
from ingestrun.planner.run.concurrency import ConcurrentRun, concurrency_key_of

logger = structlog.get_logger("ingestrun")

MAX_PARSED: Final = 100
"""Runs that are kept as parsed: as many as a burst of events is about."""


class Change(enum.Enum):
    """Importance of what an event has changed."""

    NONE = enum.auto()
    """The facts are as they were."""
    MINOR = enum.auto()
    """Only facts have changed that a later pass may take into account as well: a pod got a node, or runs."""
    MAJOR = enum.auto()
    """The run has to be looked at now."""


@dataclass(slots=True)
class _Children:
    jobs: dict[str, ObservedJob] = field(default_factory=dict)
    pods: dict[str, ObservedPod] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)
    """Jobs whose stage is over by their pod; the Job controller reports that a second or two later, or when the last
    other container of the pod has ended."""
    active: set[str] = field(default_factory=set)
    """The unfinished Jobs, as the operator's limits count them."""
    vanished: dict[str, datetime | None] = field(default_factory=dict)
    """Jobs that somebody else has deleted, and the time at which a pass first saw that. What is known of them is kept
    until the status accounts for them."""
    synced: bool = False
    """The Jobs were listed from the server since this process began. Before, a missing Job means nothing."""

    def attempt(self, job_uid: str) -> Attempt | None:
        """Return a Job with its pods; None if the Job is not known."""
        job = self.jobs.get(job_uid)
        return self.judge(job, [pod for pod in self.pods.values() if pod.job_uid == job_uid]) if job else None

    def judge(self, job: ObservedJob, pods: Sequence[ObservedPod]) -> Attempt:
        """Put a Job and its pods together. Without its Job's end, that of its pod counts, or that the pod is gone."""
        if job.uid in self.vanished and job.finished is None and all(pod.ended for pod in pods):
            at = self.vanished[job.uid]
            reason = None if pods else JOB_DELETED
            job = replace(job, finished=JobState.FAILED, finished_at=at, reason=reason)
        return attempt_of(job, pods)


class RunCache:
    """The view that one process has of all runs. Not thread-safe: everything happens on one event loop."""

    def __init__(self, usage: Usage) -> None:
        """Keep `usage` up to date with each Job that comes, ends or goes."""
        self.usage = usage
        usage.holders = self.runs_with_jobs
        self.memories = RunMemories()
        self.strangers = Strangers()
        self._compactor = BodyCompactor()
        self._runs: dict[RunKey, Object] = {}
        self._keys: dict[str, RunKey] = {}
        self._children: dict[str, _Children] = {}
        self._archived: set[str] = set()
        self._keeping: set[str] = set()
        self._runs_below: dict[RunKey, set[RunKey]] = {}
        self._parsed: dict[RunKey, tuple[Object, IngestRun]] = {}
        self._peers: dict[tuple[str, str], set[RunKey]] = {}
        self._resuming: dict[RunKey, set[RunKey]] = {}
        self._changed_since_sync: set[str] | None = None
        self.went_back = asyncio.Event()
        """Set once a live read has shown that the API server's data were restored from a backup. Then the watches wait
        for versions that were given out before, and are to come again."""

    # ---- runs

    def run(self, key: RunKey) -> Object | None:
        """Return the newest body seen."""
        return self._runs.get(key)

    def parsed(self, key: RunKey) -> IngestRun:
        """Return the newest body seen, parsed once for all who ask. Raises ValueError as `IngestRun.read` does."""
        body = self._runs[key]
        known = self._parsed.pop(key, None)
        if known is None or known[0] is not body:
            known = (body, IngestRun.read(body))
        while len(self._parsed) >= MAX_PARSED:
            del self._parsed[next(iter(self._parsed))]  # the one that was asked for longest ago
        self._parsed[key] = known
        return known[1]

    def keys(self) -> list[RunKey]:
        """Return all runs known."""
        return list(self._runs)

    def key_of(self, run_uid: str) -> RunKey | None:
        """Return which run has that UID; None if it has not been seen yet, or is gone."""
        return self._keys.get(run_uid)

    def upsert_run(self, body: Object, *, asked: Object | None = None) -> RunKey:
        """Take a run's body, unless it, or a newer one, is known already.

        `asked` is the body that was known when a live read was sent. If it is still the one that is known, the answer
        is newer, even under an older resourceVersion: then the API server's data were restored from a backup, and
        nothing that was known of the run counts any more.
        """
        key = RunKey.of(body)
        before = self._runs.get(key)
        if before is not None and _resource_version(before) == _resource_version(body):
            return key
        if before is not None and self.knows_newer(body):
            if before is not asked:
                return key
            self.went_back.set()
            self.remove_run(key)
        elif before is not None and before["metadata"]["uid"] != body["metadata"]["uid"]:
            self.remove_run(key)
        body = self._compactor.compact(body, before=before)
        self._runs[key] = body
        self._keys[body["metadata"]["uid"]] = key
        try:
            self._index(key, body)
        except Exception as error:  # any, because a newer CRD may give these fields another form: the run is held
            logger.warning(
                "what the run refers to cannot be read", run=key.name, namespace=key.namespace, why=str(error)
            )
        return key

    def knows_newer(self, body: Object) -> bool:
        """Tell whether a newer body of the run of that name is known."""
        before = self._runs.get(RunKey.of(body))
        return before is not None and _version(before) > _version(body)

    def known(self) -> dict[RunKey, Object]:
        """Return the newest bodies seen so far, which a live list must not make older (`upsert_run`)."""
        return dict(self._runs)

    def _index(self, key: RunKey, body: Object) -> None:
        """Note the runs to which this one refers."""
        for parent in parents_of(body):
            self._runs_below.setdefault(parent, set()).add(key)
        group = _concurrency_group(body)
        if group is not None:
            if ConcurrentRun.read(body).over:
                self._leave_group(group, key)
            else:
                self._peers.setdefault(group, set()).add(key)
        predecessor = awaited_predecessor(body)
        if predecessor is not None:
            self._resuming.setdefault(predecessor, set()).add(key)

    def peers_of(self, body: Object) -> list[Object]:
        """Return the runs of this one's namespace and concurrency key, itself included, that are not over yet."""
        group = _concurrency_group(body)
        return [self._runs[key] for key in sorted(self._peers.get(group, ()), key=str)] if group else []

    def resuming_runs(self, key: RunKey) -> list[RunKey]:
        """Return the runs that wait to resume this one, as far as they have been seen."""
        known = [run for run in sorted(self._resuming.get(key, ()), key=str) if run in self._runs]
        return [run for run in known if awaited_predecessor(self._runs[run]) == key]

    def children_of(self, key: RunKey) -> list[Object]:
        """Return the runs right below this one, as far as they have been seen, in the order of their names."""
        below = sorted(self._runs_below.get(key, ()), key=str)
        found = [self._runs[child] for child in below if child in self._runs]
        return [body for body in found if key in parents_of(body)]

    def cancel_requested(self, key: RunKey) -> bool:
        """Tell whether the newest body asks for a cancel; True as well when the run is gone or being deleted."""
        body = self._runs.get(key)
        if body is None or "deletionTimestamp" in body["metadata"]:
            return True
        return cancel_requested(body)

    def cancel_pending(self, key: RunKey) -> bool:
        """Tell whether the newest body asks for a cancel that has not been applied yet."""
        body = self._runs.get(key)
        return body is not None and cancel_requested(body) and not self.ended(key)

    def ended(self, key: RunKey) -> bool:
        """Tell whether the run has ended, as far as has been seen: only its drain and its clean-up are left."""
        return has_ended(self._runs.get(key, {}))

    def remove_run(self, key: RunKey) -> None:
        """Drop all that is kept of a run that is gone: its body, its children's facts, its record in `memories`."""
        body = self._runs.pop(key, None)
        self._parsed.pop(key, None)
        if body is None:
            return
        uid = body["metadata"]["uid"]
        for parent in parents_of(body):
            self._runs_below.get(parent, set()).discard(key)
        group = _concurrency_group(body)
        if group is not None:
            self._leave_group(group, key)
        predecessor = predecessor_named_by(body)
        if predecessor is not None:
            self._resuming.get(predecessor, set()).discard(key)
        self._keys.pop(uid, None)
        self._drop_children(uid)
        self.memories.forget(uid)
        self._archived.discard(uid)
        self._keeping.discard(uid)
        self.strangers.run_gone(uid)

    def archive(self, run_uid: str) -> None:
        """Keep no facts of this run's children any more, because it has ended and needs nothing."""
        if self._of(run_uid).jobs:
            self._keeping.add(run_uid)
        self._drop_children(run_uid)
        self.memories.forget(run_uid)
        self._archived.add(run_uid)

    def unarchive(self, run_uid: str) -> None:
        """Keep facts of this run's children again, because its spec has changed since it was archived."""
        self._archived.discard(run_uid)
        self._keeping.discard(run_uid)

    def runs_with_jobs(self, namespace: str) -> list[RunKey]:
        """Return the runs of the namespace that have Jobs, those of ended runs that were kept included."""
        holding = self._keeping | {uid for uid, children in self._children.items() if children.jobs}
        keys = [self._keys[uid] for uid in sorted(holding) if uid in self._keys]
        return [key for key in keys if key.namespace == namespace]

    def may_give_back(self, run_uid: str, namespace: str) -> bool:
        """Tell whether an archived run keeps Jobs while a quota that counts them starves its namespace."""
        return run_uid in self._keeping and self.usage.is_starved(namespace)

    def is_archived(self, run_uid: str) -> bool:
        """Tell whether nothing is left to be done for the run."""
        return run_uid in self._archived

    # ---- Jobs and pods

    def own_job(self, body: Object, *, gone: bool = False) -> ObservedJob | None:
        """Read a Job that carries the label of a run; return None, and ignore it, if it is not that run's own."""
        why, meta = foreign_job_reason(body), body["metadata"]
        if why is None or gone:
            self.strangers.forget(meta["uid"])
        if why is None:
            return read_job(body)
        if not gone:
            self.strangers.note_job(body, why)
        # It may have been the run's own until its owner was taken from it.
        run_uid = meta["labels"].get(names.LABEL_RUN_UID)
        if run_uid in self._children and meta["uid"] in self._children[run_uid].jobs:
            self.remove_job(run_uid=run_uid, job_uid=meta["uid"])
        return None

    def orphans(self) -> list[OrphanedJob]:
        """Return the Jobs that may be orphans, as far as the watches have shown."""
        return self.strangers.orphans(self._keys.keys())

    def own_pod(self, body: Object, *, gone: bool = False) -> ObservedPod | None:
        """Read a pod that carries the label of a run; return None, and ignore it, if it does not belong to that run."""
        why = foreign_pod_reason(body)
        if why is None and self.strangers.is_of_foreign_job(body):
            why = "its Job is not the run's own"
        meta = body["metadata"]
        if why is None or gone:
            self.strangers.forget(meta["uid"])
        if why is None:
            return read_pod(body)
        if not gone:
            self.strangers.note_pod(body, why)
        run_uid = meta["labels"].get(names.LABEL_RUN_UID)
        if run_uid in self._children:
            self._children[run_uid].pods.pop(meta["uid"], None)
        return None

    def upsert_job(self, job: ObservedJob) -> Change:
        """Take a Job's facts, unless newer ones are known."""
        if job.run_uid in self._archived:
            return Change.NONE
        children = self._touched(job.run_uid)
        if job.uid in children.vanished:
            return Change.NONE
        before = children.jobs.get(job.uid)
        if before is not None and _number(job.resource_version) < _number(before.resource_version):
            return Change.NONE
        shown = _essence(children.attempt(job.uid))
        children.jobs[job.uid] = job
        self.usage.job_exists(job.run_uid, job.name)
        self._count(job.run_uid, job, new=before is None)
        if before is not None and replace(before, resource_version=job.resource_version) == job:
            return Change.NONE
        return Change.MINOR if _essence(children.attempt(job.uid)) == shown else Change.MAJOR

    def remove_job(self, *, run_uid: str, job_uid: str) -> None:
        """Drop a Job that is gone."""
        children = self._touched(run_uid)
        job = children.jobs.pop(job_uid, None)
        if job is None:
            return
        if job_uid in children.vanished:
            del children.vanished[job_uid]
        else:
            self._count(run_uid, job, gone=True)
        for pod_uid in [uid for uid, pod in children.pods.items() if pod.job_uid == job_uid and pod.ended]:
            del children.pods[pod_uid]

    def job_vanished(self, *, run_uid: str, job_uid: str) -> None:
        """Keep what is known of a Job that somebody else has deleted: its result may be needed, or its attempt count.

        The operator's own deletions are taken off by `remove_job`.
        """
        children = self._touched(run_uid)
        job = children.jobs.get(job_uid)
        if job is None or job_uid in children.vanished:
            return
        self._count(run_uid, job, gone=True)
        children.jobs[job_uid] = replace(job, deleting=True)
        children.vanished[job_uid] = None

    def date_vanished(self, run_uid: str, *, now: datetime) -> None:
        """Note the time for the Jobs that have vanished since the last pass, because backoffs count from it."""
        vanished = self._of(run_uid).vanished
        vanished.update({uid: now for uid, at in vanished.items() if at is None})

    def forget_vanished(self, run_uid: str, accounted: Callable[[Attempt], bool]) -> None:
        """Drop the vanished Jobs of which nothing is needed any more."""
        children = self._of(run_uid)
        for job_uid in list(children.vanished):
            attempt = children.attempt(job_uid)
            if attempt is None or accounted(attempt):
                self.remove_job(run_uid=run_uid, job_uid=job_uid)

    def upsert_pod(self, pod: ObservedPod) -> Change:
        """Take a pod's facts."""
        if pod.run_uid in self._archived:
            return Change.NONE
        children = self._touched(pod.run_uid)
        before = children.pods.get(pod.uid)
        shown = _essence(children.attempt(pod.job_uid))
        children.pods[pod.uid] = pod
        job = children.jobs.get(pod.job_uid) if pod.job_uid not in children.vanished else None
        attempt = children.attempt(pod.job_uid)
        newly_ended = pod.ended and pod.job_uid not in children.done and attempt is not None and attempt.state.finished
        if job is not None and newly_ended:
            children.done.add(job.uid)
            self._count(pod.run_uid, job)
        if before is not None and _is_same(before, pod):
            return Change.NONE
        return Change.MINOR if job and _essence(attempt) == shown else Change.MAJOR

    def remove_pod(self, *, run_uid: str, pod_uid: str) -> None:
        """Drop a pod that is gone. What it left is kept as long as its Job is, because the Job may still be judged."""
        children = self._touched(run_uid)
        pod = children.pods.get(pod_uid)
        job = children.jobs.get(pod.job_uid) if pod is not None else None
        if pod is not None and (not pod.ended or job is None or ended_by_suspension(job, pod)):
            del children.pods[pod_uid]

    def replace_children(self, run_uid: str, jobs: Iterable[ObservedJob], pods: Iterable[ObservedPod]) -> None:
        """Take a live list in place of what the watches have shown."""
        children = self._touched(run_uid)
        found = {job.uid: job for job in jobs}
        for job in [job for uid, job in children.jobs.items() if uid not in found]:
            self.job_vanished(run_uid=run_uid, job_uid=job.uid)
        for job in found.values():
            known = job.uid in children.jobs and job.uid not in children.vanished
            children.vanished.pop(job.uid, None)
            children.jobs[job.uid] = job
            self._count(run_uid, job, new=not known)
        self.usage.jobs_listed(run_uid)
        listed = {pod.uid: pod for pod in pods}
        kept = {uid: pod for uid, pod in children.pods.items() if pod.ended and pod.job_uid in children.jobs}
        children.pods = kept | listed
        for pod in listed.values():
            self.upsert_pod(pod)
        children.synced = True

    def has_synced(self, run_uid: str) -> bool:
        """Tell whether the run's Jobs have been listed live by this process."""
        return run_uid in self._children and self._children[run_uid].synced

    def invalidate(self, run_uid: str) -> None:
        """Have the run's Jobs listed live once more at the next pass."""
        if run_uid in self._children:
            self._children[run_uid].synced = False

    def attempts(self, run_uid: str) -> list[Attempt]:
        """Return the run's Jobs with their pods."""
        children = self._of(run_uid)
        by_job: dict[str, list[ObservedPod]] = {}
        for pod in children.pods.values():
            by_job.setdefault(pod.job_uid, []).append(pod)
        return [children.judge(job, by_job.get(job.uid, ())) for job in children.jobs.values()]

    # ---- one list of everything

    def begin_sync(self) -> None:
        """Note from now on which runs' Jobs or pods change while all of them are listed from the server."""
        self._changed_since_sync = set()
        self.strangers.begin_sync()

    def finish_sync(self, jobs: Mapping[str, Iterable[ObservedJob]], pods: Mapping[str, Iterable[ObservedPod]]) -> None:
        """Take the lists, by run UID, in place of what the watches have shown.

        The Jobs of a run that has changed meanwhile are listed live at its next pass instead, because its part of the
        lists may be older than what is known.
        """
        changed = self._changed_since_sync or set()
        self._changed_since_sync = None
        self.strangers.finish_sync()
        for run_uid in self._keys:
            if run_uid in changed:
                self.invalidate(run_uid)
            elif run_uid not in self._archived:
                self.replace_children(run_uid, jobs.get(run_uid, ()), pods.get(run_uid, ()))
        self.prune_orphans()

    def prune_orphans(self) -> None:
        """Drop the Jobs of runs that are not known: the runs are gone, and no event will show that."""
        for run_uid in [uid for uid in self._children if uid not in self._keys]:
            self._drop_children(run_uid)

    # ---- inside

    def _leave_group(self, group: tuple[str, str], key: RunKey) -> None:
        keys = self._peers.get(group, set())
        keys.discard(key)
        if not keys:
            self._peers.pop(group, None)

    def _of(self, run_uid: str) -> _Children:
        return self._children.setdefault(run_uid, _Children())

    def _touched(self, run_uid: str) -> _Children:
        if self._changed_since_sync is not None:
            self._changed_since_sync.add(run_uid)
        return self._of(run_uid)

    def _count(self, run_uid: str, job: ObservedJob, *, new: bool = False, gone: bool = False) -> None:
        """Bring the count of Jobs up to date with what has just been learned of one."""
        children = self._of(run_uid)
        before = job.uid in children.active
        after = not gone and job.finished is None and job.uid not in children.done and job.step != ON_CANCEL_STEP
        if after:
            children.active.add(job.uid)
        else:
            children.active.discard(job.uid)
        if gone:
            children.done.discard(job.uid)
        if before != after or new or gone:
            self.usage.adjust(run_uid, job.namespace, active=after - before, jobs=new - gone)

    def _drop_children(self, run_uid: str) -> None:
        if run_uid in self._children:
            for job_uid in list(self._children[run_uid].jobs):
                self.remove_job(run_uid=run_uid, job_uid=job_uid)
            del self._children[run_uid]
        self.usage.forget(run_uid)


async def read_run(cluster: Cluster, cache: RunCache, key: RunKey) -> Object:
    """Read a run from the API server into the cache, and return it as read. Raises KubeError."""
    asked = cache.run(key)
    body = await cluster.get_run(key)
    cache.upsert_run(body, asked=asked)
    return body


def predecessor_named_by(body: Object) -> RunKey | None:
    """Return the run that `spec.resumeFrom` names."""
    name = ((body.get("spec") or {}).get("resumeFrom") or {}).get("name")
    return RunKey.of(body).sibling(name) if name else None


def awaited_predecessor(body: Object) -> RunKey | None:
    """Return the run that this one has still to take over from; None if there is none."""
    if "resumedFrom" in (body.get("status") or {}) or has_ended(body):
        return None
    return predecessor_named_by(body)


def _essence(attempt: Attempt | None) -> object:
    """Return what of an attempt a pass has to look at now; the rest can wait for the next pass.

    Not whether its pod has a node, or runs: that moves a run's deadlines, which are worked out anew when they are over.
    """
    if attempt is None:
        return None
    state = attempt.state if attempt.state.finished else JobState.WAITING
    pod_ended = attempt.pod is not None and attempt.pod.ended
    return state, attempt.obstacle, attempt.queued, attempt.job.deleting, pod_ended


def _is_same(before: ObservedPod, pod: ObservedPod) -> bool:
    """Tell whether nothing has changed but the step of a pod's start, for which a look is planned already."""
    wait = pod.wait if before.wait is not None and pod.wait is not None else before.wait
    return replace(before, resource_version=pod.resource_version, wait=wait) == pod


def _concurrency_group(body: Object) -> tuple[str, str] | None:
    key = concurrency_key_of(body)
    return None if key is None else (body["metadata"]["namespace"], key)


def _resource_version(body: Object) -> str:
    return str(body["metadata"].get("resourceVersion", ""))


def _version(body: Object) -> int:
    return _number(_resource_version(body))


def _number(resource_version: str) -> int:
    """Read a resourceVersion: those of one resource compare as numbers (KEP-5504); any other text counts as newest."""
    return int(resource_version) if resource_version.isdigit() else 2**63
