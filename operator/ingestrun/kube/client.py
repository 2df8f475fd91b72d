"""The operator's calls of the API server: `protocol.Cluster`, implemented on a `Connection`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final
from urllib.parse import quote

from ingestrun.kube.connection import Connection
from ingestrun.kube.errors import Conflict, Expired, Forbidden, KubeError, NotFound, Unavailable
from ingestrun.kube.protocol import Cluster, Object, RunKey, T
from ingestrun.model.names import GROUP, LABEL_RUN_UID, PLURAL, VERSION

RUNS_API: Final = f"/apis/{GROUP}/{VERSION}"
JOBS_API: Final = "/apis/batch/v1"
EVENTS_API: Final = "/apis/events.k8s.io/v1"
CORE_API: Final = "/api/v1"
TOKEN_REVIEWS: Final = "/apis/authentication.k8s.io/v1/tokenreviews"  # noqa: S105  (a path)
ACCESS_REVIEWS: Final = "/apis/authorization.k8s.io/v1/subjectaccessreviews"

MERGE_PATCH: Final = "application/merge-patch+json"
START_EVENTS: Final = {
    "Job": "reason=FailedCreate,regarding.kind=Job",
    "Pod": "type=Warning,regarding.kind=Pod",
    "PersistentVolumeClaim": "regarding.kind=PersistentVolumeClaim",
}
"""Field selectors of the Events about starts, by the kind of object that they are about."""
PAGE: Final = 200
"""Objects in one page of a list."""
LIST_ATTEMPTS: Final = 3
"""Attempts at a list, in all, when its continue token expires before the last page."""


class KubernetesCluster(Cluster):
    """The API server. No method repeats a write: the caller decides again from a fresh read.

    A request lasts `request_timeout` seconds at most. Together with the lease's renew deadline that must not
    exceed the lease's duration: `leader_election.LeaseSettings` checks it.
    """

    def __init__(self, connection: Connection, *, namespaces: Sequence[str] | None = None) -> None:
        """Call the API server by `connection`.

        `namespaces` None watches the whole cluster, otherwise these alone (then Roles are enough).
        """
        self.connection = connection
        self.namespaces = None if namespaces is None else tuple(dict.fromkeys(namespaces))
        """The namespaces to watch and to list; None: all."""

    async def close(self) -> None:
        """Close the connections."""
        await self.connection.close()

    async def leave_out_refused_namespaces(self) -> Mapping[str, str]:
        """Take the namespaces in which runs, Jobs or pods may not be listed out of `namespaces`; return why, by name.

        A namespace that is deleted takes the operator's rights in it along, and must not stop the work in all others.
        None is taken out if none would be left.
        """
        refused: dict[str, str] = {}
        for namespace in self.namespaces or ():
            for api, plural in ((RUNS_API, PLURAL), (JOBS_API, "jobs"), (CORE_API, "pods")):
                try:
                    await self.connection.request("GET", _path(api, namespace, plural), query=[("limit", "1")])
                except Forbidden as error:
                    refused[namespace] = str(error)
                    break
                except KubeError:
                    break  # no answer about rights: the watches and the resync try again, and say what is wrong
        left = tuple(namespace for namespace in self.namespaces or () if namespace not in refused)
        if not left:
            return {}
        self.namespaces = left
        return refused

    async def get_run(self, key: RunKey) -> Object:
        return await self.connection.request("GET", _run_path(key))

    async def list_runs(self, read: Callable[[Object], T]) -> Sequence[T]:
        return await self._list_watched(RUNS_API, PLURAL, read)

    async def list_run_page(
        self, *, namespace: str, limit: int, selector: str = "", fields: str = "", token: str = ""
    ) -> Object:
        given = {"limit": str(limit), "labelSelector": selector, "fieldSelector": fields, "continue": token}
        query = [(name, value) for name, value in given.items() if value]
        return await self.connection.request("GET", _path(RUNS_API, namespace, PLURAL), query=query)

    async def list_runs_in(self, *, namespace: str) -> Sequence[Object]:
        return await self._list(_path(RUNS_API, namespace, PLURAL))

    async def list_runs_of(self, *, namespace: str, concurrency_key: str) -> Sequence[Object]:
        # The CRD's pattern allows no character in a key that has a meaning in a field selector.
        fields = f"spec.concurrency.key={concurrency_key},status.phase!=Succeeded"
        return await self._list(_path(RUNS_API, namespace, PLURAL), fields=fields)

    async def write_status(self, key: RunKey, *, resource_version: str, status: Object) -> Object:
        if not resource_version:
            # The server takes an empty one for "no precondition": exactly what must not happen.
            raise ValueError("write_status needs the resourceVersion of the run that was read")
        body = {"metadata": {"resourceVersion": resource_version}, "status": status}
        path = f"{_run_path(key)}/status"
        return await self.connection.request("PATCH", path, body=body, content_type=MERGE_PATCH)

    async def list_jobs(self, *, namespace: str, run_uid: str) -> Sequence[Object]:
        return await self._list(_path(JOBS_API, namespace, "jobs"), selector=f"{LABEL_RUN_UID}={run_uid}")

    async def list_all_jobs(self, read: Callable[[Object], T]) -> Sequence[T]:
        return await self._list_watched(JOBS_API, "jobs", read, selector=LABEL_RUN_UID)

    async def list_all_pods(self, read: Callable[[Object], T]) -> Sequence[T]:
        return await self._list_watched(CORE_API, "pods", read, selector=LABEL_RUN_UID)

    async def list_start_events(self, read: Callable[[Object], T], *, namespace: str, about: str) -> Sequence[T]:
        return await self._list_as(read, _path(EVENTS_API, namespace, "events"), fields=START_EVENTS[about])

    async def list_pods(self, *, namespace: str, run_uid: str) -> Sequence[Object]:
        return await self._list(_path(CORE_API, namespace, "pods"), selector=f"{LABEL_RUN_UID}={run_uid}")

    async def create_job(self, job: Object) -> Object:
        # Strict: the server refuses a field that it does not know (Invalid) instead of dropping it silently.
        path = _path(JOBS_API, job["metadata"]["namespace"], "jobs")
        return await self.connection.request("POST", path, query=[("fieldValidation", "Strict")], body=job)

    async def get_job(self, *, namespace: str, name: str) -> Object:
        return await self.connection.request("GET", _path(JOBS_API, namespace, "jobs", name))

    async def delete_job(self, *, namespace: str, name: str, uid: str) -> None:
        # NotFound: it is gone. Conflict: another Job has its name, so this one is gone as well.
        with suppress(NotFound, Conflict):
            path = _path(JOBS_API, namespace, "jobs", name)
            await self.connection.request("DELETE", path, body=_delete_options(uid=uid))

    async def delete_jobs(self, *, namespace: str, selector: str) -> None:
        if not selector:
            raise ValueError("delete_jobs needs a selector: without one it would delete every Job")
        path = _path(JOBS_API, namespace, "jobs")
        await self.connection.request("DELETE", path, query=[("labelSelector", selector)], body=_delete_options())

    async def create_event(self, event: Object) -> None:
        path = _path(EVENTS_API, event["metadata"]["namespace"], "events")
        await self.connection.request("POST", path, body=event)

    async def get_secret(self, *, namespace: str, name: str) -> Object:
        return await self.connection.request("GET", _path(CORE_API, namespace, "secrets", name))

    async def replace_secret(self, secret: Object) -> Object:
        meta = secret["metadata"]
        if not meta.get("resourceVersion"):
            # Without one the server replaces the Secret as it is now, even if it has changed since it was read.
            raise ValueError("replace_secret needs the resourceVersion of the Secret that was read")
        path = _path(CORE_API, meta["namespace"], "secrets", meta["name"])
        return await self.connection.request("PUT", path, body=secret)

    async def patch_run(self, key: RunKey, *, patch: Object, resource_version: str | None = None) -> Object:
        if resource_version is not None:
            patch = {**patch, "metadata": {**patch.get("metadata", {}), "resourceVersion": resource_version}}
        return await self.connection.request("PATCH", _run_path(key), body=patch, content_type=MERGE_PATCH)

    async def review_token(self, token: str) -> Object:
        body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": {"token": token}}
        return _status(await self.connection.request("POST", TOKEN_REVIEWS, body=body))

    async def review_access(self, *, user: Object, verb: str, namespace: str, name: str = "") -> bool:
        attributes = {"verb": verb, "group": GROUP, "resource": PLURAL, "namespace": namespace, "name": name}
        spec = {
            "user": user.get("username"),
            "uid": user.get("uid"),
            "groups": user.get("groups"),
            "extra": user.get("extra"),
            "resourceAttributes": attributes,
        }
        body = {"apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview", "spec": spec}
        status = _status(await self.connection.request("POST", ACCESS_REVIEWS, body=body))
        return status.get("allowed") is True and not status.get("denied")

    async def delete_run(self, key: RunKey, *, uid: str, resource_version: str) -> None:
        options = _delete_options(uid=uid, resource_version=resource_version)
        with suppress(NotFound):
            await self.connection.request("DELETE", _run_path(key), body=options)

    async def delete_pod(
        self,
        *,
        namespace: str,
        name: str,
        uid: str,
        resource_version: str | None = None,
        grace_seconds: int | None = None,
    ) -> None:
        options = _delete_options(uid=uid, resource_version=resource_version, grace_seconds=grace_seconds)
        with suppress(NotFound):
            await self.connection.request("DELETE", _path(CORE_API, namespace, "pods", name), body=options)

    async def set_pod_deadline(self, *, namespace: str, name: str, uid: str, seconds: int) -> Object:
        patch = {"metadata": {"uid": uid}, "spec": {"activeDeadlineSeconds": seconds}}
        path = _path(CORE_API, namespace, "pods", name)
        return await self.connection.request("PATCH", path, body=patch, content_type=MERGE_PATCH)

    async def _list_watched(
        self, api: str, plural: str, read: Callable[[Object], T], *, selector: str | None = None
    ) -> list[T]:
        """List a resource in all namespaces that the operator watches."""
        if self.namespaces is None:
            return await self._list_as(read, f"{api}/{plural}", selector=selector)
        found: list[T] = []
        for namespace in self.namespaces:
            found += await self._list_as(read, _path(api, namespace, plural), selector=selector)
        return found

    async def _list(self, path: str, *, selector: str | None = None, fields: str | None = None) -> list[Object]:
        return await self._list_as(lambda item: item, path, selector=selector, fields=fields)

    async def _list_as(
        self, read: Callable[[Object], T], path: str, *, selector: str | None = None, fields: str | None = None
    ) -> list[T]:
        """Read all pages of one consistent list: the continue token pins the first page's resourceVersion."""
        query = [("limit", str(PAGE))]
        if selector is not None:
            query.append(("labelSelector", selector))
        if fields is not None:
            query.append(("fieldSelector", fields))
        for _ in range(LIST_ATTEMPTS):
            try:
                return await self._pages(read, path, query)
            except Expired:
                continue
        raise Unavailable(f"the list of {path} expired {LIST_ATTEMPTS} times before its last page")

    async def _pages(self, read: Callable[[Object], T], path: str, query: Sequence[tuple[str, str]]) -> list[T]:
        found: list[T] = []
        token = ""
        while True:
            more = [("continue", token)] if token else []
            page = await self.connection.request("GET", path, query=[*query, *more])
            # The server leaves kind and version off the items of its own types; other reads have them.
            common = {"apiVersion": page.get("apiVersion"), "kind": str(page.get("kind")).removesuffix("List")}
            found += [read({**common, **item}) for item in page.get("items") or ()]
            token = (page.get("metadata") or {}).get("continue") or ""
            if not token:
                return found


def _delete_options(
    *, uid: str | None = None, resource_version: str | None = None, grace_seconds: int | None = None
) -> Object:
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


def _status(review: Object) -> Object:
    """Return the answer to a review."""
    status = review.get("status")
    return status if isinstance(status, dict) else {}


def _run_path(key: RunKey) -> str:
    return _path(RUNS_API, key.namespace, PLURAL, key.name)


def _path(api: str, namespace: str, plural: str, name: str | None = None) -> str:
    collection = f"{api}/namespaces/{quote(namespace, safe='')}/{plural}"
    return collection if name is None else f"{collection}/{quote(name, safe='')}"
