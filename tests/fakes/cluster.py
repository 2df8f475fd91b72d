"""A strict API server in memory, for tests that choose what happens between any two calls.

It keeps the rules that the operator's promises rest on: one counter of resourceVersions, the precondition of
a status write, spec and status apart, AlreadyExists, preconditions on the UID, garbage collection by owner.
Calls go through hooks and faults; what a user, the job controller or the kubelet does is plain methods, so
that a hook can do it between two calls. What a real server would refuse raises the same error; what no caller
should ever send (a Job without a name, a write without a resourceVersion) raises AssertionError.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import re
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Literal, TypeVar, get_args

from ingestrun.kube.errors import (
    AlreadyExists,
    Conflict,
    Denied,
    Invalid,
    KubeError,
    NamespaceTerminating,
    NotFound,
    QuotaExceeded,
    Unknown,
)
from ingestrun.kube.protocol import Cluster, Object, RunKey
from tests.fakes import selectors, shapes
from tests.fakes.shapes import Json

T = TypeVar("T")
Kind = Literal["IngestRun", "Job", "Pod", "Event", "Secret"]
EventType = Literal["ADDED", "MODIFIED", "DELETED"]
Watcher = Callable[[Kind, EventType, Object], None]

RUN_UID_LABEL = "ingestrun.dev/run-uid"
CANCELLED_LABEL = "ingestrun.dev/cancelled"
STAGE_LABEL = "ingestrun.dev/stage"
REQUESTED_BY = "ingestrun.dev/cancel-requested-by"
_DNS_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")


Backup = tuple[int, dict[Kind, dict[tuple[str, str], Json]]]


@dataclass(slots=True, eq=False)
class Call:
    """One call of the operator, as the audit log has it."""

    index: int
    verb: str
    resource: str
    namespace: str
    name: str
    body: Json | None = None
    stage: Literal["before", "after"] = "before"
    stored: bool = False
    """Whether it changed, or read, what is stored; a lost answer has `stored` and an error as outcome."""
    revision: int | None = None
    """The cluster's resourceVersion right after it was stored: its place among all changes."""
    outcome: str = "pending"
    """What the caller saw: `ok`, an error's name, or `cancelled`."""

    def __str__(self) -> str:
        return f"#{self.index} {self.verb} {self.resource} {self.namespace}/{self.name}: {self.outcome}"


@dataclass(slots=True, kw_only=True, eq=False)
class Fault:
    """What goes wrong with the next matching calls.

    `before`: the error, nothing stored. `after`: stored, then the error (Unknown: the answer was lost).
    `late`: the error now; the call is stored at `deliver_late()`, as a request delayed on its way would be.
    `gate`: waits for it first (before or after storing), with or without an error.
    """

    verb: str
    resource: str
    when: Literal["before", "after", "late"] = "before"
    error: KubeError | None = None
    gate: asyncio.Event | None = None
    match: Callable[[Call], bool] = field(default=lambda _: True)
    times: int = 1


@dataclass(frozen=True, slots=True)
class Change:
    """One stored change, in order."""

    revision: int
    kind: Kind
    type: EventType
    obj: Object


class FakeCluster(Cluster):
    """See the module. All state is public to tests through copies; nothing that is handed out is shared."""

    def __init__(
        self,
        *,
        namespaces: Iterable[str] = ("default",),
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.now = now
        self.namespaces = set(namespaces)
        self.terminating: set[str] = set()
        """Namespaces that are being deleted: creates there raise NamespaceTerminating."""
        self.job_quota: dict[str, int] = {}
        """Namespace -> how many Jobs its ResourceQuota admits (count/jobs.batch)."""
        self.pod_quota: dict[str, int] = {}
        """Namespace -> how many pods its ResourceQuota admits, ended ones included (count/pods)."""
        self.fence = False
        """Act as the ValidatingAdmissionPolicy does: no Job for a run that is Cancelled and carries the label."""
        self.image_ids: dict[str, str] = {}
        """Image -> the `imageID` that the kubelet tells of a container that starts with it."""
        self.users: dict[str, Json] = {}
        """Token -> the user of a TokenReview: `username`, `groups`."""
        self.rights: dict[str, set[tuple[str, str, str]]] = {}
        """User name -> what it may do with runs: verb, namespace, and the name of one run or nothing."""
        self.pods_linger = False
        """A running pod whose Job is deleted stays, terminating, until `end_pod`. Off: it goes at once."""
        self.mutate_pod: Callable[[Json], None] | None = None
        """Changes the spec of each new pod in place, as an admission policy or a webhook that injects containers."""
        self.on_call: Callable[[Call], Awaitable[None]] | None = None
        """Awaited with each call before it is stored and again after (`call.stage`); may raise for the server."""
        self.admit: Callable[[str, str, Object], None] | None = None
        """Asked for (verb, resource, object) before a write is stored; raises what an admission policy would."""
        self.mutate_job: Callable[[Json], None] | None = None
        """Changes a Job before it is stored, as a mutating policy does."""
        self.faults: list[Fault] = []
        self.history: list[Call] = []
        self.changes: list[Change] = []
        self.largest_run = 0
        """Bytes of JSON of the largest run ever stored."""
        self.revision = 0
        self._objects: dict[Kind, dict[tuple[str, str], Json]] = {kind: {} for kind in get_args(Kind)}
        self._watchers: list[Watcher] = []
        self._late: list[Callable[[], object]] = []
        self._ids = itertools.count(1)

    # ---- the Protocol --------------------------------------------------------------------------------------

    async def get_run(self, key: RunKey) -> Object:
        return await self._call("get", "ingestruns", key.namespace, key.name, None, lambda: self.run(key))

    async def list_runs(self, read: Callable[[Object], T]) -> Sequence[T]:
        found = await self._call("list", "ingestruns", "", "", None, lambda: self._select("IngestRun"))
        return [read(body) for body in found]

    async def list_runs_in(self, *, namespace: str) -> Sequence[Object]:
        return await self._call("list", "ingestruns", namespace, "", None, lambda: self._select("IngestRun", namespace))

    async def list_run_page(
        self, *, namespace: str, limit: int, selector: str = "", fields: str = "", token: str = ""
    ) -> Object:
        """The token is the name of the last run that was shown."""

        def commit() -> Object:
            runs = sorted(self._select("IngestRun", namespace, selector), key=lambda run: str(run["metadata"]["name"]))
            runs = [run for run in runs if run["metadata"]["name"] > token and selectors.phase_fits(run, fields)]
            more = {"continue": runs[limit - 1]["metadata"]["name"]} if len(runs) > limit else {}
            return {"items": runs[:limit], "metadata": more}

        return await self._call("list", "ingestruns", namespace, "", None, commit)

    async def list_runs_of(self, *, namespace: str, concurrency_key: str) -> Sequence[Object]:
        def commit() -> Sequence[Object]:
            return [
                run
                for run in self._select("IngestRun", namespace)
                if run["spec"].get("concurrency", {}).get("key") == concurrency_key
                and run["status"].get("phase") != "Succeeded"
            ]

        return await self._call("list", "ingestruns", namespace, "", None, commit)

    async def write_status(self, key: RunKey, *, resource_version: str, status: Object) -> Object:
        assert resource_version, "a status write without a resourceVersion has no precondition"
        body: Json = {"metadata": {"resourceVersion": resource_version}, "status": shapes.copied(dict(status))}

        def commit() -> Object:
            run = self._find("IngestRun", key.namespace, key.name)
            if run["metadata"]["resourceVersion"] != resource_version:
                raise Conflict(
                    f'Operation cannot be fulfilled on ingestruns.ingestrun.dev "{key.name}": the object has been '
                    "modified; please apply your changes to the latest version and try again"
                )
            changed = {**run, "status": shapes.merge_patch(run.get("status", {}), body["status"])}
            if changed != run:
                _check_ended(run.get("status") or {}, changed["status"])
                self._admit("patch", "ingestruns/status", changed)
                self._store("IngestRun", changed, "MODIFIED")
            return self.run(key)

        return await self._call("patch", "ingestruns/status", key.namespace, key.name, body, commit)

    async def list_jobs(self, *, namespace: str, run_uid: str) -> Sequence[Object]:
        selector = f"{RUN_UID_LABEL}={run_uid}"
        return await self._call("list", "jobs", namespace, "", None, lambda: self._select("Job", namespace, selector))

    async def list_all_jobs(self, read: Callable[[Object], T]) -> Sequence[T]:
        label = RUN_UID_LABEL
        found = await self._call("list", "jobs", "", "", None, lambda: self._select("Job", None, label))
        return [read(body) for body in found]

    async def list_all_pods(self, read: Callable[[Object], T]) -> Sequence[T]:
        label = RUN_UID_LABEL
        found = await self._call("list", "pods", "", "", None, lambda: self._select("Pod", None, label))
        return [read(body) for body in found]

    async def list_start_events(self, read: Callable[[Object], T], *, namespace: str, about: str) -> Sequence[T]:
        def commit() -> Sequence[Object]:
            events = [e for e in self._select("Event", namespace) if e["regarding"]["kind"] == about]
            if about == "Job":
                return [e for e in events if e["reason"] == "FailedCreate"]
            return [e for e in events if about != "Pod" or e["type"] == "Warning"]

        return [read(event) for event in await self._call("list", "events", namespace, "", None, commit)]

    async def list_pods(self, *, namespace: str, run_uid: str) -> Sequence[Object]:
        selector = f"{RUN_UID_LABEL}={run_uid}"
        return await self._call("list", "pods", namespace, "", None, lambda: self._select("Pod", namespace, selector))

    async def create_job(self, job: Object) -> Object:
        body: Json = shapes.copied(dict(job))
        json.dumps(body)
        _check_job(body)
        namespace, name = body["metadata"]["namespace"], body["metadata"]["name"]

        def commit() -> Object:
            self._check_namespace(namespace, f'jobs.batch "{name}"')
            if (namespace, name) in self._objects["Job"]:
                raise AlreadyExists(f'jobs.batch "{name}" already exists')
            self._check_quota(namespace, name)
            self._check_fence(body)
            if self.mutate_job is not None:
                self.mutate_job(body)
            self._admit("create", "jobs", body)
            uid = self._uid()
            stored = shapes.defaulted_job(body, uid=uid)
            stored["metadata"] = {
                **stored["metadata"],
                "uid": uid,
                "creationTimestamp": self._time(),
                "generation": 1,
                "managedFields": [{"manager": "ingestrun-operator", "operation": "Update", "apiVersion": "batch/v1"}],
            }
            self._store("Job", stored, "ADDED")
            answer = self.job(name, namespace)
            self.collect_garbage()
            return answer

        return await self._call("create", "jobs", namespace, name, body, commit)

    async def get_job(self, *, namespace: str, name: str) -> Object:
        return await self._call("get", "jobs", namespace, name, None, lambda: self.job(name, namespace))

    async def delete_job(self, *, namespace: str, name: str, uid: str) -> None:
        assert uid, "delete_job needs the UID"
        body: Json = {"preconditions": {"uid": uid}}

        def commit() -> None:
            job = self._objects["Job"].get((namespace, name))
            if job is not None and job["metadata"]["uid"] == uid:
                self._remove_job(job)

        await self._call("delete", "jobs", namespace, name, body, commit)

    async def delete_jobs(self, *, namespace: str, selector: str) -> None:
        assert selector, "delete_jobs without a selector would delete every Job"

        def commit() -> None:
            for job in self._select("Job", namespace, selector):
                self._remove_job(job)

        await self._call("deletecollection", "jobs", namespace, "", {"labelSelector": selector}, commit)

    async def create_event(self, event: Object) -> None:
        body: Json = shapes.copied(dict(event))
        meta = body["metadata"]
        assert body["apiVersion"] == "events.k8s.io/v1", body
        assert body["kind"] == "Event", body
        missing = {"eventTime", "reportingController", "reportingInstance", "action", "reason", "type"} - body.keys()
        name = meta.get("name") or f"{meta['generateName']}{next(self._ids):05x}"

        def commit() -> None:
            self._check_namespace(meta["namespace"], f'events.events.k8s.io "{name}"')
            if missing or body["type"] not in ("Normal", "Warning") or len(body.get("note", "")) > 1024:
                raise Invalid(f'Event "{name}" is invalid: {sorted(missing)}: Required value')
            if (meta["namespace"], name) in self._objects["Event"]:
                raise AlreadyExists(f'events.events.k8s.io "{name}" already exists')
            stored = {**body, "metadata": {**meta, "name": name, "uid": self._uid(), "creationTimestamp": self._time()}}
            self._store("Event", stored, "ADDED")

        await self._call("create", "events", meta["namespace"], name, body, commit)

    async def get_secret(self, *, namespace: str, name: str) -> Object:
        def commit() -> Object:
            return shapes.copied(self._find("Secret", namespace, name))

        return await self._call("get", "secrets", namespace, name, None, commit)

    async def replace_secret(self, secret: Object) -> Object:
        body: Json = shapes.copied(dict(secret))
        json.dumps(body)
        meta = body["metadata"]
        namespace, name = meta["namespace"], meta["name"]
        assert meta["resourceVersion"], "a PUT without a resourceVersion replaces whatever is there"

        def commit() -> Object:
            found = self._find("Secret", namespace, name)
            if found["metadata"]["resourceVersion"] != meta["resourceVersion"]:
                raise Conflict(f'Operation cannot be fulfilled on secrets "{name}": the object has been modified')
            self._store("Secret", body, "MODIFIED")
            return shapes.copied(self._find("Secret", namespace, name))

        return await self._call("update", "secrets", namespace, name, body, commit)

    async def patch_run(self, key: RunKey, *, patch: Object, resource_version: str | None = None) -> Object:
        body: Json = shapes.copied(dict(patch))
        assert body.keys() <= {"metadata", "spec"}, "status has its own call"
        assert body.get("metadata", {}).keys() <= {"labels", "annotations"}, body

        def commit() -> Object:
            found = self._find("IngestRun", key.namespace, key.name)["metadata"]["resourceVersion"]
            if resource_version not in (None, found):
                raise Conflict(f'Operation cannot be fulfilled on ingestruns.ingestrun.dev "{key.name}": modified')
            return self._change_run(key, body)

        return await self._call("patch", "ingestruns", key.namespace, key.name, body, commit)

    async def review_token(self, token: str) -> Object:
        def commit() -> Object:
            user = self.users.get(token)
            return {"authenticated": True, "user": user} if user else {"error": "invalid bearer token"}

        return await self._call("create", "tokenreviews", "", "", None, commit)

    async def review_access(self, *, user: Object, verb: str, namespace: str, name: str = "") -> bool:
        def commit() -> bool:
            given = self.rights.get(user["username"], set())
            return bool({(verb, namespace, ""), (verb, namespace, name)} & given)

        return await self._call("create", "subjectaccessreviews", namespace, name, {"verb": verb}, commit)

    async def delete_run(self, key: RunKey, *, uid: str, resource_version: str) -> None:
        assert uid, "delete_run needs the UID"
        assert resource_version, "delete_run needs the resourceVersion"
        body: Json = {"preconditions": {"uid": uid, "resourceVersion": resource_version}}

        def commit() -> None:
            run = self._objects["IngestRun"].get((key.namespace, key.name))
            if run is not None:
                _check_preconditions(run, uid, resource_version)
                self.user_delete_run(key)

        await self._call("delete", "ingestruns", key.namespace, key.name, body, commit)

    async def delete_pod(
        self,
        *,
        namespace: str,
        name: str,
        uid: str,
        resource_version: str | None = None,
        grace_seconds: int | None = None,
    ) -> None:
        assert uid, "delete_pod needs the UID"
        body: Json = {
            "preconditions": {"uid": uid, "resourceVersion": resource_version},
            "gracePeriodSeconds": grace_seconds,
        }

        def commit() -> None:
            pod = self._objects["Pod"].get((namespace, name))
            if pod is not None:
                _check_preconditions(pod, uid, resource_version)
                self._terminate(shapes.copied(pod), grace_seconds)

        await self._call("delete", "pods", namespace, name, body, commit)

    async def set_pod_deadline(self, *, namespace: str, name: str, uid: str, seconds: int) -> Object:
        assert uid, "set_pod_deadline needs the UID"
        body: Json = {"metadata": {"uid": uid}, "spec": {"activeDeadlineSeconds": seconds}}

        def commit() -> Object:
            pod = self._find("Pod", namespace, name)
            if pod["metadata"]["uid"] != uid:
                raise Invalid(f'Pod "{name}" is invalid: metadata.uid: Invalid value: "{uid}": field is immutable')
            if not 0 < seconds <= pod["spec"].get("activeDeadlineSeconds", seconds):
                raise Invalid(f'Pod "{name}" is invalid: spec.activeDeadlineSeconds: Invalid value: {seconds}')
            changed = shapes.merge_patch(pod, body)
            self._admit("patch", "pods", changed)
            self._store("Pod", changed, "MODIFIED")
            return shapes.copied(self._find("Pod", namespace, name))

        return await self._call("patch", "pods", namespace, name, body, commit)

    # ---- what tests look at --------------------------------------------------------------------------------

    def run(self, key: RunKey) -> Json:
        """The run as stored. Raises NotFound."""
        return shapes.copied(self._find("IngestRun", key.namespace, key.name))

    def job(self, name: str, namespace: str = "default") -> Json:
        """The Job as stored. Raises NotFound."""
        return shapes.copied(self._find("Job", namespace, name))

    def jobs(self, namespace: str | None = None, selector: str = "") -> list[Json]:
        return self._select("Job", namespace, selector)

    def pods(self, job: str | None = None, namespace: str | None = None) -> list[Json]:
        """All pods, or those of the Job of that name."""
        return self._select("Pod", namespace, f"batch.kubernetes.io/job-name={job}" if job else "")

    def events(self, namespace: str | None = None) -> list[Json]:
        return self._select("Event", namespace)

    def calls(self, verb: str | None = None, resource: str | None = None) -> list[Call]:
        """The audit log, or the part of it with this verb and resource."""
        return [c for c in self.history if verb in (None, c.verb) and resource in (None, c.resource)]

    def watch(self, callback: Watcher) -> None:
        """Tell of each change, in order, at once."""
        self._watchers.append(callback)

    def fail_next(
        self,
        verb: str,
        resource: str,
        error: KubeError | None = None,
        *,
        when: Literal["before", "after", "late"] = "before",
        times: int = 1,
        match: Callable[[Call], bool] = lambda _: True,
        gate: asyncio.Event | None = None,
    ) -> None:
        """Queue a Fault; without an error and a gate, the answer is lost (Unknown)."""
        if error is None and gate is None:
            error = Unknown(f"no answer to {verb} {resource}")
        self.faults.append(
            Fault(verb=verb, resource=resource, when=when, error=error, gate=gate, match=match, times=times)
        )

    def deliver_late(self) -> list[KubeError | None]:
        """The delayed requests arrive now; returns for each what the server would have answered."""
        late, self._late = self._late, []
        answers: list[KubeError | None] = []
        for commit in late:
            try:
                commit()
            except KubeError as error:
                answers.append(error)
            else:
                answers.append(None)
        return answers

    # ---- what users do -------------------------------------------------------------------------------------

    def user_create_run(self, run: Object) -> Json:
        """`kubectl create`: uid, generation and the default status come from the server."""
        body: Json = shapes.copied(dict(run))
        body.pop("status", None)
        meta = body["metadata"]
        meta.setdefault("namespace", "default")
        key = (meta["namespace"], meta["name"])
        self._check_namespace(meta["namespace"], f'ingestruns.ingestrun.dev "{meta["name"]}"')
        if key in self._objects["IngestRun"]:
            raise AlreadyExists(f'ingestruns.ingestrun.dev "{meta["name"]}" already exists')
        meta.update(uid=self._uid(), generation=1, creationTimestamp=self._time())
        stored = {
            "apiVersion": "ingestrun.dev/v1alpha1",
            "kind": "IngestRun",
            **body,
            "status": {"observedGeneration": -1},
        }
        stored.setdefault("spec", {})
        self._admit("create", "ingestruns", stored)
        self._store("IngestRun", stored, "ADDED")
        return self.run(RunKey(namespace=meta["namespace"], name=meta["name"]))

    def user_apply_secret(self, name: str, namespace: str = "default", **data: str) -> Json:
        """`kubectl apply`, or an edit: a Secret with just these data, in base64; without any as the manifest has it."""
        found = self._objects["Secret"].get((namespace, name))
        meta = found["metadata"] if found else {"name": name, "namespace": namespace, "uid": self._uid()}
        body: Json = {"apiVersion": "v1", "kind": "Secret", "metadata": dict(meta), "type": "Opaque"}
        self._store("Secret", body | ({"data": data} if data else {}), "MODIFIED" if found else "ADDED")
        return shapes.copied(self._find("Secret", namespace, name))

    def user_patch_spec(self, key: RunKey, patch: Object, *, user: str | None = None) -> Json:
        """`kubectl patch --type merge`, the CRD's own rule included: Succeeded and Failed refuse a cancel.

        `user`: the admission policy stamps who asked for the cancel. Raises NotFound, Invalid.
        """
        return self._change_run(key, {"spec": dict(patch)}, user=user)

    def user_patch_metadata(self, key: RunKey, patch: Object) -> Json:
        """A merge patch of labels and annotations; of the managedFields, as the server would have kept them."""
        assert patch.keys() <= {"labels", "annotations", "managedFields"}, patch
        return self._change_run(key, {"metadata": dict(patch)})

    def user_patch_status(self, key: RunKey, patch: Object) -> Json:
        """A merge patch of the status by a person, or by another version of the operator under a newer CRD."""
        run = self._find("IngestRun", key.namespace, key.name)
        self._store("IngestRun", shapes.merge_patch(run, {"status": dict(patch)}), "MODIFIED")
        return self.run(key)

    def backup(self) -> Backup:
        """Return all objects that are stored now, as a snapshot of etcd has them."""
        return self.revision, shapes.copied(self._objects)

    def restore(self, backup: Backup) -> None:
        """Put a snapshot back: resourceVersions go on from its own, and no watcher is told of it."""
        self.revision, objects = backup
        self._objects = shapes.copied(objects)

    def user_delete_run(self, key: RunKey) -> None:
        """`kubectl delete`: its Jobs and their pods go with it, by owner reference."""
        run = self._find("IngestRun", key.namespace, key.name)
        self._remove("IngestRun", run)
        self.collect_garbage()

    def _change_run(self, key: RunKey, patch: Object, *, user: str | None = None) -> Json:
        run = self._find("IngestRun", key.namespace, key.name)
        changed: Json = shapes.merge_patch(run, patch)
        phase = run.get("status", {}).get("phase")
        if changed["spec"].get("cancel") is True and run["spec"].get("cancel") is not True:
            if phase in ("Succeeded", "Failed"):
                raise Invalid(
                    f'IngestRun.ingestrun.dev "{key.name}" is invalid: spec.cancel: Invalid value: '
                    f"the run is already {phase} and cannot be cancelled"
                )
            if user is not None:
                stamp = {"metadata": {"annotations": {REQUESTED_BY: user}}}
                changed = shapes.merge_patch(changed, stamp)
        if changed != run:
            if changed["spec"] != run["spec"]:
                changed["metadata"]["generation"] += 1
            self._admit("patch", "ingestruns", changed)
            self._store("IngestRun", changed, "MODIFIED")
        return self.run(key)

    # ---- what the job controller, the kubelet and the garbage collector do -----------------------------------

    def create_pod(self, job: str, namespace: str = "default", *, unschedulable: str | None = None) -> str:
        """The Job gets its pod: Pending (its image is being pulled, or no node has room). Returns its name."""
        owner = self._find("Job", namespace, job)
        assert not shapes.is_finished(owner), f"Job {job} has ended"
        pod = shapes.pod_of(owner, suffix=f"{next(self._ids):05x}")
        pod["metadata"].update(uid=self._uid(), creationTimestamp=self._time())
        if self.mutate_pod is not None:
            self.mutate_pod(pod["spec"])
        now = self._time()
        pod["status"] = (
            shapes.unschedulable_status(now, unschedulable) if unschedulable else shapes.waiting_status(pod, now)
        )
        self._store("Pod", pod, "ADDED")
        self._set_job_status(owner, {**owner["status"], **shapes.active_status(self._since(owner))})
        return str(pod["metadata"]["name"])

    def try_pod(self, job: str, namespace: str = "default") -> bool:
        """The Job controller tries to create the Job's pod, if it has none; False when the quota on pods refuses it."""
        if self._pod_of(job, namespace) is not None:
            return True
        limit, used = self.pod_quota.get(namespace), len(self._select("Pod", namespace))
        if limit is not None and used >= limit:
            self.refuse_pod(
                job,
                namespace,
                message=f'pods "{job}-x" is forbidden: exceeded quota: small, requested: count/pods=1, '
                f"used: count/pods={used}, limited: count/pods={limit}",
            )
            return False
        self.create_pod(job, namespace)
        return True

    def refuse_pod(self, job: str, namespace: str = "default", *, message: str) -> None:
        """The Job controller tried to create the Job's pod, was refused, and says so in an Event of its own."""
        owner = self._find("Job", namespace, job)
        status = {**owner["status"], "startTime": self._since(owner), "active": 0, "ready": 0}
        self._set_job_status(owner, status)
        self.tell("Job", job, namespace, reason="FailedCreate", note=f"Error creating: {message}")

    def tell(
        self,
        kind: str,
        name: str,
        namespace: str = "default",
        *,
        reason: str,
        note: str,
        kind_of_event: str = "Warning",
    ) -> None:
        """Somebody tells an Event about an object; one of the same words once more, which has its first time still."""
        regarding = {"kind": kind, "name": name, "namespace": namespace}
        if kind in ("Job", "Pod"):
            uid = self._find("Job" if kind == "Job" else "Pod", namespace, name)["metadata"]["uid"]
            regarding["uid"] = uid
        same = [
            event
            for event in self._select("Event", namespace)
            if (event["reason"], event.get("note")) == (reason, note) and event["regarding"] == regarding
        ]
        if same:
            self._store("Event", {**same[0], "deprecatedLastTimestamp": self._time()}, "MODIFIED")
            return
        named = f"{name}.{next(self._ids):x}"
        event: Json = {
            "apiVersion": "events.k8s.io/v1",
            "kind": "Event",
            "metadata": {"name": named, "namespace": namespace, "uid": self._uid(), "creationTimestamp": self._time()},
            "type": kind_of_event,
            "reason": reason,
            "note": note,
            "regarding": regarding,
            "deprecatedFirstTimestamp": self._time(),
            "deprecatedLastTimestamp": self._time(),
        }
        self._store("Event", event, "ADDED")

    def suspend_job(self, job: str, namespace: str = "default") -> None:
        """Kueue takes the admission back: the Job is suspended, and the Job controller deletes its pod."""
        owner = self._find("Job", namespace, job)
        pod = self._pod_of(job, namespace)
        status = {name: value for name, value in owner["status"].items() if name not in ("startTime", "active")}
        self._store("Job", {**owner, "spec": {**owner["spec"], "suspend": True}, "status": status}, "MODIFIED")
        if pod is not None and pod["status"]["phase"] == "Running":
            ended = shapes.ended_status(
                pod, self._time(), exit_code=143, reason="Error", pod_reason=None, result="SIGTERM"
            )
            self._set_pod_status(pod, ended)
            pod = self._pod_of(job, namespace)
        if pod is not None:
            self._remove("Pod", pod)

    def resume_job(self, job: str, namespace: str = "default") -> None:
        """Kueue admits the Job: it is no longer suspended, and its time begins anew."""
        owner = self._find("Job", namespace, job)
        status = {**owner["status"], "startTime": self._time()}
        self._store("Job", {**owner, "spec": {**owner["spec"], "suspend": False}, "status": status}, "MODIFIED")

    def pod_waits(self, job: str, namespace: str = "default", *, reason: str, message: str = "") -> None:
        """Its pod can't start: `ImagePullBackOff`, `CreateContainerConfigError` and the like."""
        pod = self._pod_of(job, namespace) or self._new_pod(job, namespace)
        self._set_pod_status(pod, shapes.waiting_status(pod, self._time(), reason=reason, message=message))

    def start_pod(self, job: str, namespace: str = "default") -> str:
        """The Job's pod runs; it is created if need be. Returns its name."""
        pod = self._pod_of(job, namespace) or self._new_pod(job, namespace)
        self._set_pod_status(pod, shapes.running_status(pod, self._time()))
        owner = self._objects["Job"].get((namespace, job))
        if owner is not None:
            self._set_job_status(owner, {**owner["status"], **shapes.active_status(self._since(owner), ready=1)})
        return str(pod["metadata"]["name"])

    def finish_job(
        self,
        job: str,
        namespace: str = "default",
        *,
        result: Object | str | None = None,
        exit_code: int = 0,
        reason: str | None = None,
        pod_reason: str | None = None,
        job_reason: str = "BackoffLimitExceeded",
    ) -> str:
        """The pod ends, with `result` as its termination message, and the Job is Complete or Failed.

        `reason` is the container's (`OOMKilled`), `pod_reason` the pod's (`Evicted`), `job_reason` the failed
        Job's. Starts the pod if need be. Returns the pod's name.
        """
        name = self.end_pod(job, namespace, result=result, exit_code=exit_code, reason=reason, pod_reason=pod_reason)
        owner = self._find("Job", namespace, job)
        now = self._time()
        done = exit_code == 0 and pod_reason is None
        self._set_job_status(
            owner,
            shapes.complete_status(owner["status"], now)
            if done
            else shapes.failed_status(owner["status"], now, reason=job_reason, failed=1),
        )
        return name

    def _started_pod(self, job: str, namespace: str) -> Json:
        """Return the Job's pod, started if it was not."""
        pod = self._pod_of(job, namespace)
        if pod is None or pod["status"]["phase"] == "Pending":
            self.start_pod(job, namespace)
            pod = self._pod_of(job, namespace)
        assert pod is not None
        return pod

    def end_pod(
        self,
        job: str,
        namespace: str = "default",
        *,
        result: Object | str | None = None,
        exit_code: int = 0,
        reason: str | None = None,
        pod_reason: str | None = None,
    ) -> str:
        """Only the pod ends: the job controller has not seen it yet, or the Job is gone. Returns its name."""
        pod = self._started_pod(job, namespace)
        status = shapes.ended_status(
            pod, self._time(), exit_code=exit_code, reason=reason, pod_reason=pod_reason, result=result
        )
        self._set_pod_status(pod, status)
        if "deletionTimestamp" in pod["metadata"]:
            self._remove("Pod", self._find("Pod", namespace, pod["metadata"]["name"]))
        return str(pod["metadata"]["name"])

    def end_container(
        self,
        job: str,
        namespace: str = "default",
        *,
        result: Object | str | None = None,
        exit_code: int = 0,
        reason: str | None = None,
    ) -> str:
        """Only the stage's own container ends: others of its pod go on, and so does the Job. Returns the pod's name."""
        pod = self._started_pod(job, namespace)
        whole = shapes.ended_status(
            pod, self._time(), exit_code=exit_code, reason=reason, pod_reason=None, result=result
        )
        self._set_pod_status(pod, shapes.own_ended_status(pod, whole))
        return str(pod["metadata"]["name"])

    def fail_init(self, job: str, name: str, namespace: str = "default", *, exit_code: int, message: str) -> None:
        """An init container of that name fails, so the pod and its Job do."""
        pod = self._pod_of(job, namespace) or self._new_pod(job, namespace)
        end = {"exitCode": exit_code, "reason": "Error", "message": message, "finishedAt": self._time()}
        told = {"state": {"terminated": end}}
        self._set_pod_status(pod, shapes.init_waiting_status(pod, self._time(), name, told, phase="Failed"))
        owner = self._find("Job", namespace, job)
        status = shapes.failed_status(owner["status"], self._time(), reason="BackoffLimitExceeded", failed=1)
        self._set_job_status(owner, status)

    def crash_init(self, job: str, name: str, namespace: str = "default", *, restarts: int, message: str = "") -> None:
        """A native sidecar of that name ends again and again, so its pod does not start."""
        pod = self._pod_of(job, namespace) or self._new_pod(job, namespace)
        end = {"exitCode": 1, "reason": "Error", "message": message, "finishedAt": self._time()}
        state = {"waiting": {"reason": "CrashLoopBackOff"}}
        told = {"state": state, "lastState": {"terminated": end}, "restartCount": restarts}
        self._set_pod_status(pod, shapes.init_waiting_status(pod, self._time(), name, told))

    def exceed_deadline(
        self, job: str, namespace: str = "default", *, exit_code: int = 137, result: Object | str | None = None
    ) -> str:
        """The kubelet ends the Job's pod for its activeDeadlineSeconds, and the Job has failed. Returns the pod's name.

        The pod stays, Failed whatever its container made of SIGTERM (137: it did not listen).
        """
        return self.finish_job(job, namespace, exit_code=exit_code, result=result, pod_reason="DeadlineExceeded")

    def keep_deadlines(self) -> None:
        """Whoever has a deadline to keep does so, as the time is now: the kubelet of pods, the Job controller of Jobs.

        A pod's counts from when a kubelet has taken it, a Job's from when the Job controller has taken it up.
        """
        for job in self._select("Job"):
            meta, spec = job["metadata"], job["spec"]
            if shapes.is_finished(job) or spec["suspend"]:
                continue
            pod = self._pod_of(meta["name"], meta["namespace"])
            if self._is_over(spec, job["status"]):
                self.fail_job(meta["name"], meta["namespace"], reason="DeadlineExceeded")
            elif pod is not None and not _has_ended(pod) and self._is_over(pod["spec"], pod["status"]):
                self.exceed_deadline(meta["name"], meta["namespace"])

    def _is_over(self, spec: Object, status: Object) -> bool:
        seconds, since = spec.get("activeDeadlineSeconds"), status.get("startTime")
        if seconds is None or since is None:
            return False
        return self.now() >= datetime.fromisoformat(since) + timedelta(seconds=seconds)

    def fail_job(self, job: str, namespace: str = "default", *, reason: str) -> None:
        """The job controller fails the Job by itself, and deletes its running pods.

        With DeadlineExceeded: a Job whose deadline is its own, as those of operators before decision 0007 are.
        """
        owner = self._find("Job", namespace, job)
        pods = [pod for pod in self.pods(job, namespace) if pod["status"]["phase"] in ("Pending", "Running")]
        for pod in pods:
            self._terminate(pod)
        status = shapes.failed_status(owner["status"], self._time(), reason=reason, failed=len(pods))
        self._set_job_status(owner, status)

    def lose_pod(self, job: str, namespace: str = "default") -> None:
        """The pod's object vanishes (its node was removed, or somebody deleted it by force)."""
        pod = self._pod_of(job, namespace)
        assert pod is not None, f"Job {job} has no pod"
        self._remove("Pod", pod)

    def expire_job(self, job: str, namespace: str = "default") -> None:
        """Somebody else deletes the Job: its TTL, a user, a clean-up script."""
        self._remove_job(self._find("Job", namespace, job))

    def collect_garbage(self) -> None:
        """Delete what an owner that is gone has left. Done by itself after each deletion and creation."""
        uids = {obj["metadata"]["uid"] for objects in self._objects.values() for obj in objects.values()}
        for job in self._select("Job"):
            owners = job["metadata"].get("ownerReferences", ())
            if owners and not any(owner["uid"] in uids for owner in owners):
                self._remove_job(job)

    # ---- inside ----------------------------------------------------------------------------------------------

    async def _call(
        self, verb: str, resource: str, namespace: str, name: str, body: Json | None, commit: Callable[[], T]
    ) -> T:
        call = Call(len(self.history), verb, resource, namespace, name, body)
        self.history.append(call)

        def store() -> T:
            result = commit()
            call.stored, call.revision = True, self.revision
            return result

        try:
            await asyncio.sleep(0)
            if self.on_call is not None:
                await self.on_call(call)
            await self._meet_faults(call, ("before", "late"), store)
            result = store()
            call.stage = "after"
            if self.on_call is not None:
                await self.on_call(call)
            await self._meet_faults(call, ("after",), store)
            await asyncio.sleep(0)
        except KubeError as error:
            call.outcome = type(error).__name__
            raise
        except asyncio.CancelledError:
            call.outcome = "cancelled"
            raise
        call.outcome = "ok"
        return result

    async def _meet_faults(self, call: Call, when: tuple[str, ...], store: Callable[[], object]) -> None:
        for fault in list(self.faults):
            hit = fault.verb == call.verb and fault.resource == call.resource and fault.when in when
            if not hit or not fault.match(call):
                continue
            fault.times -= 1
            if fault.times <= 0:
                self.faults.remove(fault)
            if fault.gate is not None:
                await fault.gate.wait()
            if fault.when == "late":
                self._late.append(store)
            if fault.error is not None:
                raise fault.error
            return

    def _find(self, kind: Kind, namespace: str, name: str) -> Json:
        found = self._objects[kind].get((namespace, name))
        if found is None:
            raise NotFound(f'{kind.lower()}s "{name}" not found')
        return found

    def _select(self, kind: Kind, namespace: str | None = None, selector: str = "") -> list[Json]:
        matches = selectors.parse(selector)
        return [
            shapes.copied(obj)
            for (where, _), obj in sorted(self._objects[kind].items())
            if namespace in (None, where) and matches(obj["metadata"].get("labels") or {})
        ]

    def _store(self, kind: Kind, obj: Json, event: EventType) -> None:
        """Keep a copy with the next resourceVersion and tell the watchers. Callers have built `obj` anew."""
        self.revision += 1
        stored = shapes.copied(obj)
        stored["metadata"]["resourceVersion"] = str(self.revision)
        meta = stored["metadata"]
        self._objects[kind][meta["namespace"], meta["name"]] = stored
        if kind == "IngestRun":
            self.largest_run = max(
                self.largest_run, len(json.dumps(stored, separators=(",", ":"), ensure_ascii=False).encode())
            )
        self._tell(kind, event, stored)

    def _remove(self, kind: Kind, obj: Json) -> None:
        meta = obj["metadata"]
        stored = self._objects[kind].pop((meta["namespace"], meta["name"]))
        self.revision += 1
        last = shapes.copied(stored)
        last["metadata"]["resourceVersion"] = str(self.revision)
        self._tell(kind, "DELETED", last)

    def _tell(self, kind: Kind, event: EventType, obj: Json) -> None:
        self.changes.append(Change(self.revision, kind, event, shapes.copied(obj)))
        for watcher in self._watchers:
            watcher(kind, event, shapes.copied(obj))

    def _remove_job(self, job: Json) -> None:
        """Background deletion: the Job goes at once, then its pods are deleted as a user would."""
        self._remove("Job", job)
        for pod in self.pods(job["metadata"]["name"], job["metadata"]["namespace"]):
            if pod["metadata"]["ownerReferences"][0]["uid"] == job["metadata"]["uid"]:
                self._terminate(pod)

    def _terminate(self, pod: Json, grace_seconds: int | None = None) -> None:
        if self.pods_linger and pod["status"]["phase"] == "Running":
            if "deletionTimestamp" not in pod["metadata"]:
                grace = pod["spec"].get("terminationGracePeriodSeconds", 30)
                grace = grace if grace_seconds is None else grace_seconds
                pod["metadata"].update(deletionTimestamp=self._time(), deletionGracePeriodSeconds=grace)
                self._store("Pod", pod, "MODIFIED")
            return
        self._remove("Pod", pod)

    def _pod_of(self, job: str, namespace: str) -> Json | None:
        """The newest pod of the Job of that name."""
        pods = self.pods(job, namespace)
        return max(pods, key=lambda pod: str(pod["metadata"]["uid"])) if pods else None

    def _new_pod(self, job: str, namespace: str) -> Json:
        name = self.create_pod(job, namespace)
        return shapes.copied(self._find("Pod", namespace, name))

    def _set_pod_status(self, pod: Json, status: Json) -> None:
        before = {told["name"]: told["imageID"] for told in pod["status"].get("containerStatuses", ())}
        for told in status.get("containerStatuses", ()):
            if "waiting" not in told["state"]:
                told["imageID"] = before.get(told["name"]) or self.image_ids.get(told["image"], "")
        self._store("Pod", {**pod, "status": status}, "MODIFIED")

    def _set_job_status(self, job: Json, status: Json) -> None:
        self._store("Job", {**job, "status": status}, "MODIFIED")

    def _since(self, job: Json) -> str:
        return str(job["status"].get("startTime") or self._time())

    def _check_namespace(self, namespace: str, what: str) -> None:
        if namespace not in self.namespaces:
            raise NotFound(f'namespaces "{namespace}" not found')
        if namespace in self.terminating:
            raise NamespaceTerminating(
                f"{what} is forbidden: unable to create new content in namespace {namespace} because it is being "
                "terminated"
            )

    def _check_quota(self, namespace: str, name: str) -> None:
        limit = self.job_quota.get(namespace)
        used = sum(1 for where, _ in self._objects["Job"] if where == namespace)
        if limit is not None and used >= limit:
            raise QuotaExceeded(
                f'jobs.batch "{name}" is forbidden: exceeded quota: jobs, requested: count/jobs.batch=1, '
                f"used: count/jobs.batch={used}, limited: count/jobs.batch={limit}"
            )

    def _check_fence(self, job: Json) -> None:
        labels = job["metadata"].get("labels") or {}
        uid = labels.get(RUN_UID_LABEL)
        if not self.fence or uid is None or labels.get(STAGE_LABEL) == "on-cancel":
            return
        for run in self._objects["IngestRun"].values():
            marked = (run["metadata"].get("labels") or {}).get(CANCELLED_LABEL) == "true"
            if marked and run["metadata"]["uid"] == uid and run["status"].get("phase") == "Cancelled":
                raise Denied(
                    f'jobs.batch "{job["metadata"]["name"]}" is forbidden: ValidatingAdmissionPolicy '
                    f"'ingestrun-cancelled-fence' with binding 'ingestrun-cancelled-fence' denied request: "
                    f"run {run['metadata']['name']} is Cancelled: no Job may be created for it"
                )

    def _admit(self, verb: str, resource: str, obj: Json) -> None:
        if self.admit is not None:
            self.admit(verb, resource, shapes.copied(obj))

    def _uid(self) -> str:
        return f"00000000-0000-4000-8000-{next(self._ids):012x}"

    def _time(self) -> str:
        return self.now().astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _check_preconditions(obj: Json, uid: str, resource_version: str | None) -> None:
    meta = obj["metadata"]
    for what, wanted, found in (
        ("UID", uid, meta["uid"]),
        ("ResourceVersion", resource_version, meta["resourceVersion"]),
    ):
        if wanted is not None and wanted != found:
            raise Conflict(
                f'Operation cannot be fulfilled on {obj["kind"]} "{meta["name"]}": the {what} in the precondition '
                f"({wanted}) does not match the {what} in record ({found})"
            )


def _has_ended(pod: Object) -> bool:
    return pod["status"]["phase"] in ("Succeeded", "Failed")


def _check_job(job: Json) -> None:
    """What no manifest of ours may get wrong; the API server would answer Invalid."""
    assert (job.get("apiVersion"), job.get("kind")) == ("batch/v1", "Job"), job
    meta, spec = job["metadata"], job["spec"]
    assert job.keys() <= {"apiVersion", "kind", "metadata", "spec"}, "status is the server's"
    assert not meta.keys() & {"uid", "resourceVersion", "creationTimestamp"}, "these are the server's"
    assert meta.get("namespace"), "a Job needs a namespace"
    assert _DNS_LABEL.fullmatch(meta["name"]), f"a Job's name is a DNS label of 63 characters: {meta['name']!r}"
    template = spec["template"]
    assert template["spec"]["restartPolicy"] in ("Never", "OnFailure"), "a Job needs a restartPolicy"
    assert template["spec"]["containers"], "a Job needs a container"
    for container in template["spec"]["containers"]:
        assert container.get("name"), container
        assert container.get("image"), container
        for variable in container.get("env", ()):
            assert isinstance(variable.get("value", ""), str), f"the value of {variable['name']} is no string"
    for where in (meta, template.get("metadata", {})):
        for key, value in (where.get("labels") or {}).items():
            assert isinstance(value, str), f"label {key} is no string"
            assert _LABEL_VALUE.fullmatch(value), f"label {key} has the value {value!r}"
        for key, value in (where.get("annotations") or {}).items():
            assert isinstance(value, str), f"annotation {key} is no string"
    for owner in meta.get("ownerReferences", ()):
        assert {"apiVersion", "kind", "name", "uid"} <= owner.keys(), owner


def _check_ended(before: Object, after: Object) -> None:
    """Refuse what the CRD's rules refuse: an ended run with new claims, or with a new permission to publish."""
    if after.get("phase") not in ("Succeeded", "Failed", "Cancelled"):
        return
    old, new = before.get("batches") or {}, after.get("batches") or {}
    taken_over = "resumedFrom" in after and "resumedFrom" not in before
    if new.get("claimed", "") not in ("", old.get("claimed")) and not taken_over:
        raise Invalid("an ended run claims no batch")
    if new.get("publishing", "") not in ("", old.get("publishing")):
        raise Invalid("an ended run gives no permission to publish")
