"""What the watches have shown: the newest body of each run, and the facts of its Jobs and pods.

Nothing in here is trusted with a start: every status write carries the resourceVersion that was planned
from, and an old one is refused. Facts arrive late or not at all; then a pass changes nothing, or is repeated.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from ingestrun.controller.state.memory import RunMemories
from ingestrun.controller.state.usage import Usage
from ingestrun.kube.protocol import Object, RunKey
from ingestrun.model import names
from ingestrun.model.run import IngestRun, cancel_requested
from ingestrun.planner.batch.attempt import Attempt, ObservedJob, ObservedPod, attempt_of, ended_by_suspension
from ingestrun.planner.batch.pipeline import ON_CANCEL_STEP
from ingestrun.planner.run.concurrency import ConcurrentRun, concurrency_key_of

MAX_PARSED: Final = 500
"""How many runs are kept as read: what a burst of events is about."""


@dataclass(slots=True)
class _Children:
    jobs: dict[str, ObservedJob] = field(default_factory=dict)
    pods: dict[str, ObservedPod] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)
    """Jobs whose pod has ended well: the Job controller says so of the Job a second or two later."""
    active: set[str] = field(default_factory=set)
    """The unfinished Jobs, as the operator's caps count them."""
    primed: bool = False
    """Whether the Jobs were listed from the server since this process began: before, none missing means nothing."""


class RunCache:
    """One process's view of all runs. Not thread-safe: everything happens on one event loop."""

    def __init__(self, usage: Usage | None = None) -> None:
        """`usage` is told of each Job that comes, ends or goes."""
        self.usage = usage or Usage()
        self.memories = RunMemories()
        self._runs: dict[RunKey, Object] = {}
        self._keys: dict[str, RunKey] = {}
        self._children: dict[str, _Children] = {}
        self._closed: set[str] = set()
        self._below: dict[RunKey, set[RunKey]] = {}
        self._parsed: dict[RunKey, tuple[Object, IngestRun]] = {}
        self._sharing: dict[tuple[str, str], set[RunKey]] = {}
        self._resumers: dict[RunKey, set[RunKey]] = {}

    def run(self, key: RunKey) -> Object | None:
        """The newest body seen."""
        return self._runs.get(key)

    def parsed(self, key: RunKey) -> IngestRun:
        """The newest body seen, read once however often it is asked for. Raises ValueError as `IngestRun.read` does."""
        body = self._runs[key]
        known = self._parsed.get(key)
        if known is None or known[0] is not body:
            if len(self._parsed) >= MAX_PARSED:
                self._parsed.clear()
            known = self._parsed[key] = (body, IngestRun.read(body))
        return known[1]

    def keys(self) -> list[RunKey]:
        """All runs known."""
        return list(self._runs)

    def key_of(self, run_uid: str) -> RunKey | None:
        """Which run has that UID; None for one not seen yet, or gone."""
        return self._keys.get(run_uid)

    def upsert_run(self, body: Object) -> RunKey:
        """Take a run's body, unless it is known already, or a newer one of the same run."""
        meta = body["metadata"]
        key = RunKey.of(body)
        before = self._runs.get(key)
        if before is not None:
            if before["metadata"]["uid"] != meta["uid"]:
                self.remove_run(key)
            elif before["metadata"].get("resourceVersion") == meta.get("resourceVersion") or _version(
                before
            ) > _version(body):
                return key
        self._runs[key] = body
        self._keys[meta["uid"]] = key
        for parent in parents_of(body):
            self._below.setdefault(parent, set()).add(key)
        shared = _concurrency_group(body)
        if shared is not None:
            if ConcurrentRun.read(body).over:
                self._unshare(shared, key)
            else:
                self._sharing.setdefault(shared, set()).add(key)
        resumed = awaited_predecessor(body)
        if resumed is not None:
            self._resumers.setdefault(resumed, set()).add(key)
        return key

    def peers_of(self, body: Object) -> list[Object]:
        """The runs of this one's namespace and concurrency key, itself included, that are not over yet."""
        shared = _concurrency_group(body)
        return [self._runs[key] for key in sorted(self._sharing.get(shared, ()), key=str)] if shared else []

    def resuming_runs(self, key: RunKey) -> list[RunKey]:
        """The runs that wait to resume this one, as far as they have been seen."""
        known = [run for run in sorted(self._resumers.get(key, ()), key=str) if run in self._runs]
        return [run for run in known if awaited_predecessor(self._runs[run]) == key]

    def children_of(self, key: RunKey) -> list[Object]:
        """The runs right below this one, as far as they have been seen, in the order of their names."""
        found = [self._runs[child] for child in sorted(self._below.get(key, ()), key=str) if child in self._runs]
        return [body for body in found if key in parents_of(body)]

    def cancel_requested(self, key: RunKey) -> bool:
        """Whether the newest body asks for a cancel; also True when the run is gone or being deleted."""
        body = self._runs.get(key)
        if body is None or "deletionTimestamp" in body["metadata"]:
            return True
        return cancel_requested(body)

    def cancel_pending(self, key: RunKey) -> bool:
        """Whether the newest body asks for a cancel that has not been applied yet."""
        body = self._runs.get(key)
        return body is not None and cancel_requested(body) and not self.ended(key)

    def ended(self, key: RunKey) -> bool:
        """Whether the run has ended, as far as has been seen: what is left are its drain and its clean-up."""
        status = self._runs.get(key, {}).get("status") or {}
        return status.get("phase") in ("Succeeded", "Failed", "Cancelled")

    def remove_run(self, key: RunKey) -> None:
        """Drop all that is kept of a run that is gone: its body, its children's facts, its record in `memories`."""
        body = self._runs.pop(key, None)
        self._parsed.pop(key, None)
        if body is not None:
            uid = body["metadata"]["uid"]
            for parent in parents_of(body):
                self._below.get(parent, set()).discard(key)
            shared = _concurrency_group(body)
            if shared is not None:
                self._unshare(shared, key)
            resumed = predecessor_named_by(body)
            if resumed is not None:
                self._resumers.get(resumed, set()).discard(key)
            self._keys.pop(uid, None)
            self._drop_children(uid)
            self.memories.forget(uid)
            self._closed.discard(uid)

    def archive(self, run_uid: str) -> None:
        """Keep no facts of this run's children any more: it has ended and is quiet."""
        self._drop_children(run_uid)
        self.memories.forget(run_uid)
        self._closed.add(run_uid)

    def unarchive(self, run_uid: str) -> None:
        """Keep facts of this run's children again: its spec has changed since it was closed."""
        self._closed.discard(run_uid)

    def prune_orphans(self) -> None:
        """Forget the Jobs of runs that are not known: gone, with no event left to tell that their Jobs are as well."""
        for run_uid in [uid for uid in self._children if uid not in self._keys]:
            self._drop_children(run_uid)

    def is_archived(self, run_uid: str) -> bool:
        """Whether nothing is left to be done for the run."""
        return run_uid in self._closed

    def upsert_job(self, job: ObservedJob) -> None:
        """Take a Job's facts, unless newer ones are known."""
        if job.run_uid in self._closed:
            return
        jobs = self._of(job.run_uid).jobs
        before = jobs.get(job.uid)
        if before is None or _number(job.resource_version) >= _number(before.resource_version):
            jobs[job.uid] = job
            self.usage.job_exists(job.run_uid, job.name)
            self._count(job.run_uid, job, new=before is None)

    def remove_job(self, *, run_uid: str, job_uid: str) -> None:
        """A Job is gone."""
        job = self._of(run_uid).jobs.pop(job_uid, None)
        if job is not None:
            self._count(run_uid, job, gone=True)

    def upsert_pod(self, pod: ObservedPod) -> None:
        """Take a pod's facts."""
        if pod.run_uid in self._closed:
            return
        children = self._of(pod.run_uid)
        children.pods[pod.uid] = pod
        job = children.jobs.get(pod.job_uid)
        if job is not None and pod.ended and pod.exit_code == 0 and job.uid not in children.done:
            children.done.add(job.uid)
            self._count(pod.run_uid, job)

    def remove_pod(self, *, run_uid: str, pod_uid: str) -> None:
        """A pod is gone. What it said is kept as long as its Job is: the Job's verdict may still be due."""
        children = self._of(run_uid)
        pod = children.pods.get(pod_uid)
        job = children.jobs.get(pod.job_uid) if pod is not None else None
        if pod is not None and (not pod.ended or job is None or ended_by_suspension(job, pod)):
            del children.pods[pod_uid]

    def replace_children(self, run_uid: str, jobs: Iterable[ObservedJob], pods: Iterable[ObservedPod]) -> None:
        """Take a live list in place of what the watches have shown."""
        children = self._of(run_uid)
        found = {job.uid: job for job in jobs}
        for job in [job for uid, job in children.jobs.items() if uid not in found]:
            self.remove_job(run_uid=run_uid, job_uid=job.uid)
        for job in found.values():
            known = job.uid in children.jobs
            children.jobs[job.uid] = job
            self._count(run_uid, job, new=not known)
        self.usage.jobs_listed(run_uid)
        listed = {pod.uid: pod for pod in pods}
        kept = {uid: pod for uid, pod in children.pods.items() if pod.ended and pod.job_uid in children.jobs}
        children.pods = kept | listed
        for pod in listed.values():
            self.upsert_pod(pod)
        children.primed = True

    def has_synced(self, run_uid: str) -> bool:
        """Whether the run's Jobs have been listed live by this process."""
        return run_uid in self._children and self._children[run_uid].primed

    def invalidate(self, run_uid: str) -> None:
        """Have the run's Jobs listed live once more at the next pass."""
        if run_uid in self._children:
            self._children[run_uid].primed = False

    def attempts(self, run_uid: str) -> list[Attempt]:
        """The run's Jobs with their pods."""
        children = self._of(run_uid)
        by_job: dict[str, list[ObservedPod]] = {}
        for pod in children.pods.values():
            by_job.setdefault(pod.job_uid, []).append(pod)
        return [attempt_of(job, by_job.get(job.uid, ())) for job in children.jobs.values()]

    def _unshare(self, shared: tuple[str, str], key: RunKey) -> None:
        keys = self._sharing.get(shared, set())
        keys.discard(key)
        if not keys:
            self._sharing.pop(shared, None)

    def _of(self, run_uid: str) -> _Children:
        return self._children.setdefault(run_uid, _Children())

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


def parents_of(body: Object) -> list[RunKey]:
    """The runs that this one says are above it: by `spec.parentRef`, and by owner reference. Itself is none."""
    meta = body["metadata"]
    named = [(body.get("spec") or {}).get("parentRef") or {}]
    named += [ref for ref in meta.get("ownerReferences") or () if ref.get("kind") == names.KIND]
    own = RunKey.of(body)
    keys = [own.sibling(ref["name"]) for ref in named if ref.get("name")]
    return [key for key in dict.fromkeys(keys) if key != own]


def cancelled_with_cascade(body: Object) -> bool:
    """Whether the run is Cancelled, and those right below it are to follow."""
    status = body.get("status") or {}
    return status.get("phase") == "Cancelled" and bool((status.get("cancellation") or {}).get("cascade"))


def _resource_version(body: Object) -> str:
    return str(body["metadata"].get("resourceVersion", ""))


def _concurrency_group(body: Object) -> tuple[str, str] | None:
    key = concurrency_key_of(body)
    return None if key is None else (body["metadata"]["namespace"], key)


def predecessor_named_by(body: Object) -> RunKey | None:
    """The run that `spec.resumeFrom` names."""
    name = ((body.get("spec") or {}).get("resumeFrom") or {}).get("name")
    return RunKey.of(body).sibling(name) if name else None


def awaited_predecessor(body: Object) -> RunKey | None:
    """The run that this one has still to take over from; None where there is none."""
    status = body.get("status") or {}
    if "resumedFrom" in status or status.get("phase") in ("Succeeded", "Failed", "Cancelled"):
        return None
    return predecessor_named_by(body)


def _version(body: Object) -> int:
    return _number(_resource_version(body))


def _number(resource_version: str) -> int:
    """The resourceVersions of one resource compare as numbers (KEP-5504); one that is no number counts as newest."""
    return int(resource_version) if resource_version.isdigit() else 2**63
