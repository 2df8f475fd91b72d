"""The operator's calls on `kubernetes.aio`: `protocol.Cluster`, implemented."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final
from urllib.parse import quote

from ingestrun.kube.connection import REQUEST_TIMEOUT, Connection
from ingestrun.kube.errors import Conflict, Expired, KubeError, NotFound, Unavailable
from ingestrun.kube.protocol import Cluster, Object, RunKey

GROUP: Final = "ingestrun.dev"
VERSION: Final = "v1alpha1"
PLURAL: Final = "ingestruns"
RUN_UID_LABEL: Final = "ingestrun.dev/run-uid"
"""On every Job and pod of a run. The engine sets it; `kube` imports none of ours, a test holds them equal."""

MERGE_PATCH: Final = "application/merge-patch+json"
PAGE: Final = 500
LIST_ATTEMPTS: Final = 3
"""A list whose continue token expired midway starts again, this often in all."""

OnCall = Callable[[str, str, float, str], None]
"""Told of each request: verb and resource as RBAC names them, seconds, and `ok` or the error's name."""


class KubernetesCluster(Cluster):
    """The API server. No method repeats a write; whoever calls decides again from a fresh read.

    A request lasts `request_timeout` seconds at most. Together with the lease's renew deadline that must not
    exceed the lease's duration: `leader_election.LeaseSettings` checks it.
    """

    def __init__(
        self,
        connection: Connection,
        *,
        namespaces: Sequence[str] | None = None,
        run_uid_label: str = RUN_UID_LABEL,
        on_call: OnCall | None = None,
    ) -> None:
        """`namespaces` None watches the whole cluster, else these alone (then Roles are enough)."""
        self.connection = connection
        self._namespaces = None if namespaces is None else tuple(dict.fromkeys(namespaces))
        self._run_uid_label = run_uid_label
        self._on_call = on_call

    async def close(self) -> None:
        """Close the connections."""
        await self.connection.close()

    async def get_run(self, key: RunKey) -> Object:
        return await self._call("get", PLURAL, "GET", _run_path(key))

    async def list_runs(self) -> Sequence[Object]:
        if self._namespaces is None:
            return await self._list(PLURAL, f"/apis/{GROUP}/{VERSION}/{PLURAL}")
        found: list[Object] = []
        for namespace in self._namespaces:
            found += await self.list_runs_in(namespace=namespace)
        return found

    async def list_runs_in(self, *, namespace: str) -> Sequence[Object]:
        return await self._list(PLURAL, f"/apis/{GROUP}/{VERSION}/namespaces/{_part(namespace)}/{PLURAL}")

    async def list_runs_of(self, *, namespace: str, concurrency_key: str) -> Sequence[Object]:
        path = f"/apis/{GROUP}/{VERSION}/namespaces/{_part(namespace)}/{PLURAL}"
        # The CRD's pattern leaves nothing in a key that a field selector would read as its own.
        fields = f"spec.concurrency.key={concurrency_key},status.phase!=Succeeded"
        return await self._list(PLURAL, path, fields=fields)

    async def write_status(self, key: RunKey, *, resource_version: str, status: Object) -> Object:
        if not resource_version:
            # The server takes an empty one for "no precondition": exactly what must not happen.
            raise ValueError("write_status needs the resourceVersion of the run that was read")
        return await self._call(
            "patch",
            f"{PLURAL}/status",
            "PATCH",
            f"{_run_path(key)}/status",
            body={"metadata": {"resourceVersion": resource_version}, "status": status},
            content_type=MERGE_PATCH,
        )

    async def list_jobs(self, *, namespace: str, run_uid: str) -> Sequence[Object]:
        return await self._list("jobs", _jobs_path(namespace), selector=f"{self._run_uid_label}={run_uid}")

    async def list_all_jobs(self) -> Sequence[Object]:
        selector = self._run_uid_label
        if self._namespaces is None:
            return await self._list("jobs", "/apis/batch/v1/jobs", selector=selector)
        found: list[Object] = []
        for namespace in self._namespaces:
            found += await self._list("jobs", _jobs_path(namespace), selector=selector)
        return found

    async def list_failed_creates(self, *, namespace: str) -> Sequence[Object]:
        path = f"/apis/events.k8s.io/v1/namespaces/{_part(namespace)}/events"
        return await self._list("events", path, fields="reason=FailedCreate,regarding.kind=Job")

    async def list_pods(self, *, namespace: str, run_uid: str) -> Sequence[Object]:
        path = f"/api/v1/namespaces/{_part(namespace)}/pods"
        return await self._list("pods", path, selector=f"{self._run_uid_label}={run_uid}")

    async def create_job(self, job: Object) -> Object:
        # Strict: a field that the server does not know is refused (Invalid), not dropped in silence.
        path = _jobs_path(job["metadata"]["namespace"])
        return await self._call("create", "jobs", "POST", path, query=[("fieldValidation", "Strict")], body=job)

    async def get_job(self, *, namespace: str, name: str) -> Object:
        return await self._call("get", "jobs", "GET", _jobs_path(namespace, name))

    async def delete_job(self, *, namespace: str, name: str, uid: str, grace_seconds: int | None = None) -> None:
        options = _delete_options(uid=uid, grace_seconds=grace_seconds)
        # Gone, or another Job has taken the name: this very one is gone either way.
        with suppress(NotFound, Conflict):
            await self._call("delete", "jobs", "DELETE", _jobs_path(namespace, name), body=options)

    async def delete_jobs(self, *, namespace: str, selector: str) -> None:
        if not selector:
            raise ValueError("delete_jobs needs a selector: without one it would delete every Job")
        await self._call(
            "deletecollection",
            "jobs",
            "DELETE",
            _jobs_path(namespace),
            query=[("labelSelector", selector)],
            body=_delete_options(),
        )

    async def create_event(self, event: Object) -> None:
        namespace = _part(event["metadata"]["namespace"])
        path = f"/apis/events.k8s.io/v1/namespaces/{namespace}/events"
        await self._call("create", "events", "POST", path, body=event)

    async def get_secret(self, *, namespace: str, name: str) -> Object:
        return await self._call("get", "secrets", "GET", _secret_path(namespace, name))

    async def replace_secret(self, secret: Object) -> Object:
        meta = secret["metadata"]
        if not meta.get("resourceVersion"):
            # Without one the server replaces whatever is there.
            raise ValueError("replace_secret needs the resourceVersion of the Secret that was read")
        path = _secret_path(meta["namespace"], meta["name"])
        return await self._call("update", "secrets", "PUT", path, body=secret)

    async def patch_run(self, key: RunKey, *, patch: Object) -> Object:
        """Merge `patch` ({"metadata": {"labels": ...}} or {"spec": {"cancel": true}}) into the run.

        Without a precondition, so for what is right whatever else has changed. Not for status. Raises
        NotFound, Invalid (the CRD's rules: the run has ended), Unknown.
        """
        return await self._call("patch", PLURAL, "PATCH", _run_path(key), body=patch, content_type=MERGE_PATCH)

    async def delete_run(self, key: RunKey, *, uid: str, resource_version: str) -> None:
        """Delete this very run if nobody has changed it since (its TTL). Gone already is done; raises Conflict."""
        options = _delete_options(uid=uid, resource_version=resource_version)
        with suppress(NotFound):
            await self._call("delete", PLURAL, "DELETE", _run_path(key), body=options)

    async def delete_pod(
        self,
        *,
        namespace: str,
        name: str,
        uid: str,
        resource_version: str | None = None,
        grace_seconds: int | None = None,
    ) -> None:
        """Delete this very pod, if `resource_version` is given only if it has not changed since (not started).

        The grace period of a Job's deletion does not reach its pods; this one does. Gone already is done.
        Raises Conflict when the pod has changed, or another has its name.
        """
        path = f"/api/v1/namespaces/{_part(namespace)}/pods/{_part(name)}"
        options = _delete_options(uid=uid, resource_version=resource_version, grace_seconds=grace_seconds)
        with suppress(NotFound):
            await self._call("delete", "pods", "DELETE", path, body=options)

    async def _list(
        self, resource: str, path: str, *, selector: str | None = None, fields: str | None = None
    ) -> list[Object]:
        """All pages of one consistent list: the continue token pins the first page's resourceVersion."""
        for _ in range(LIST_ATTEMPTS):
            try:
                return await self._pages(resource, path, selector, fields)
            except Expired:
                continue
        raise Unavailable(f"the list of {resource} expired {LIST_ATTEMPTS} times before its last page")

    async def _pages(self, resource: str, path: str, selector: str | None, fields: str | None) -> list[Object]:
        query = [("limit", str(PAGE))]
        if selector is not None:
            query.append(("labelSelector", selector))
        if fields is not None:
            query.append(("fieldSelector", fields))
        found: list[Object] = []
        token = ""
        while True:
            more = [("continue", token)] if token else []
            page = await self._call("list", resource, "GET", path, query=[*query, *more])
            # The server leaves kind and version off the items of its own types; other reads have them.
            common = {"apiVersion": page.get("apiVersion"), "kind": str(page.get("kind")).removesuffix("List")}
            found += [{**common, **item} for item in page.get("items") or ()]
            token = (page.get("metadata") or {}).get("continue") or ""
            if not token:
                return found

    async def _call(
        self,
        verb: str,
        resource: str,
        method: str,
        path: str,
        *,
        query: Sequence[tuple[str, str]] = (),
        body: Any = None,
        content_type: str = "application/json",
    ) -> Mapping[str, Any]:
        started = time.monotonic()
        outcome = "cancelled"
        try:
            answer = await self.connection.request(method, path, query=query, body=body, content_type=content_type)
            if not isinstance(answer, dict):
                raise KubeError(f"{method} {path} was answered by JSON that is no object")
            outcome = "ok"
            return answer
        except KubeError as error:
            outcome = type(error).__name__
            raise
        finally:
            if self._on_call is not None:
                self._on_call(verb, resource, time.monotonic() - started, outcome)


async def connect(
    *,
    kubeconfig: str | None = None,
    context: str | None = None,
    in_cluster: bool = False,
    namespaces: Sequence[str] | None = None,
    request_timeout: float = REQUEST_TIMEOUT,
    concurrency: int = 32,
    run_uid_label: str = RUN_UID_LABEL,
    on_call: OnCall | None = None,
) -> KubernetesCluster:
    """A cluster by the service account (`in_cluster`) or a kubeconfig. Raises KubeError without credentials."""
    connection = await Connection.open(
        kubeconfig=kubeconfig,
        context=context,
        in_cluster=in_cluster,
        request_timeout=request_timeout,
        concurrency=concurrency,
    )
    return KubernetesCluster(connection, namespaces=namespaces, run_uid_label=run_uid_label, on_call=on_call)


def _delete_options(
    *, uid: str | None = None, resource_version: str | None = None, grace_seconds: int | None = None
) -> Mapping[str, Any]:
    options: dict[str, Any] = {
        "apiVersion": "v1",
        "kind": "DeleteOptions",
        "propagationPolicy": "Background",
    }
    wanted = {"uid": uid, "resourceVersion": resource_version}
    preconditions = {field: value for field, value in wanted.items() if value is not None}
    if preconditions:
        options["preconditions"] = preconditions
    if grace_seconds is not None:
        options["gracePeriodSeconds"] = grace_seconds
    return options


def _part(text: str) -> str:
    return quote(text, safe="")


def _run_path(key: RunKey) -> str:
    return f"/apis/{GROUP}/{VERSION}/namespaces/{_part(key.namespace)}/{PLURAL}/{_part(key.name)}"


def _secret_path(namespace: str, name: str) -> str:
    return f"/api/v1/namespaces/{_part(namespace)}/secrets/{_part(name)}"


def _jobs_path(namespace: str, name: str | None = None) -> str:
    collection = f"/apis/batch/v1/namespaces/{_part(namespace)}/jobs"
    return collection if name is None else f"{collection}/{_part(name)}"
