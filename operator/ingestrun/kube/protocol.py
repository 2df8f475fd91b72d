"""Every call that the operator makes of the API server, in one Protocol.

Objects are the plain mappings of their JSON. Nothing else in the operator talks to the server, so this file
is the list of its calls (and of the RBAC it needs), and a fake of it can be strict.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from ingestrun.model.names import RunKey

__all__ = ["Cluster", "Object", "RunKey", "T"]

T = TypeVar("T")

Object = Mapping[str, Any]
"""A Kubernetes object as JSON; its receiver never mutates it."""


class Cluster(Protocol):
    """The API server, as far as the operator needs it.

    Every method raises an `ingestrun.kube.errors.KubeError`; the docstrings name those that a caller tells apart.
    Every call has a time-out that is shorter than the lease's slack, so that a replica which has lost its lease
    has no request of its own still under way. Reads are live: none is answered from a cache.
    """

    async def get_run(self, key: RunKey) -> Object:
        """Read a run. Raises NotFound."""

    async def list_runs(self, read: Callable[[Object], T]) -> Sequence[T]:
        """List all runs that the operator watches, each as `read` returns it, so that no more is kept of a page.

        `read` may be called twice with one object, if the list has to begin anew.
        """

    async def list_runs_of(self, *, namespace: str, concurrency_key: str) -> Sequence[Object]:
        """List the namespace's runs of that `spec.concurrency.key`, without the Succeeded ones."""

    async def list_run_page(
        self, *, namespace: str, limit: int, selector: str = "", fields: str = "", token: str = ""
    ) -> Object:
        """Return a page of the namespace's runs as the server's list: `items`, and `metadata.continue` if more follow.

        Raises Expired when the token is too old, Invalid when a selector or the token is malformed.
        """

    async def list_runs_in(self, *, namespace: str) -> Sequence[Object]:
        """List all runs of the namespace, in pages."""

    async def write_status(self, key: RunKey, *, resource_version: str, status: Object) -> Object:
        """Merge `status` into the run's status if the run has not changed since `resource_version`.

        A key whose value is None is removed. Returns the run as stored: a read as live as a GET.
        Raises Conflict when the run has changed, NotFound when it is gone, Unknown when the answer was lost
        (the write may or may not have happened).
        """

    async def list_jobs(self, *, namespace: str, run_uid: str) -> Sequence[Object]:
        """List the run's Jobs by its UID label."""

    async def list_all_jobs(self, read: Callable[[Object], T]) -> Sequence[T]:
        """List all Jobs of all runs that the operator watches, by the presence of the run's label; as `list_runs`."""

    async def list_all_pods(self, read: Callable[[Object], T]) -> Sequence[T]:
        """List all pods of all runs that the operator watches, by the presence of the run's label; as `list_runs`."""

    async def list_start_events(self, read: Callable[[Object], T], *, namespace: str, about: str) -> Sequence[T]:
        """List the namespace's Events about starts, as `list_runs`. `about` is a kind of object.

        Job: the Job controller could not create its pod. Pod: warnings. PersistentVolumeClaim: all.
        """

    async def list_pods(self, *, namespace: str, run_uid: str) -> Sequence[Object]:
        """List the run's pods by its UID label."""

    async def create_job(self, job: Object) -> Object:
        """Create a Job; return it as stored.

        Raises AlreadyExists, QuotaExceeded, Forbidden, Invalid, NotFound (no such namespace, or it is
        being deleted), Unknown when the answer was lost (the Job may appear later).
        """

    async def get_job(self, *, namespace: str, name: str) -> Object:
        """Read a Job. Raises NotFound."""

    async def delete_job(self, *, namespace: str, name: str, uid: str) -> None:
        """Delete the Job of that UID, and its pods in the background; succeed if it is gone already."""

    async def delete_jobs(self, *, namespace: str, selector: str) -> None:
        """Delete all Jobs that match the label selector, and their pods, by one call."""

    async def patch_run(self, key: RunKey, *, patch: Object, resource_version: str | None = None) -> Object:
        """Merge `patch` into the run's metadata or spec; return the run as stored.

        With `resource_version` if it has not changed since. Without, there is no precondition, so only for changes that
        are right whatever else has changed. Raises NotFound, Conflict when it has changed, Invalid (the CRD's rules
        refuse it, as after the run's end), Denied (an admission policy does), Unknown.
        """

    async def delete_run(self, key: RunKey, *, uid: str, resource_version: str) -> None:
        """Delete the run of that UID if it has not changed since, and in the background what it owns.

        Succeed if it is gone already. Raises Conflict when it has changed, or another run has its name.
        """

    async def delete_pod(
        self,
        *,
        namespace: str,
        name: str,
        uid: str,
        resource_version: str | None = None,
        grace_seconds: int | None = None,
    ) -> None:
        """Delete the pod of that UID with that grace; with `resource_version` only if it has not changed since.

        The grace period of a Job's deletion would not reach its pods. Succeed if the pod is gone already.
        Raises Conflict when it has changed, or another pod has its name.
        """

    async def set_pod_deadline(self, *, namespace: str, name: str, uid: str, seconds: int) -> Object:
        """Give the pod of that UID a shorter `activeDeadlineSeconds`; the kubelet ends the pod then, and leaves it.

        Returns the pod as stored. Raises NotFound when it is gone, Invalid when another pod has its name, Forbidden or
        Invalid when the server does not allow it.
        """

    async def create_event(self, event: Object) -> None:
        """Post an events.k8s.io/v1 Event."""

    async def get_secret(self, *, namespace: str, name: str) -> Object:
        """Read a Secret. RBAC grants the operator's own alone: the check's key, the certificate.

        Raises NotFound, Forbidden.
        """

    async def replace_secret(self, secret: Object) -> Object:
        """Store a Secret over the one that was read, if that has not changed since; return it as stored.

        Raises Conflict when it has changed, NotFound when it is gone, Unknown when the answer was lost.
        """

    async def review_token(self, token: str) -> Object:
        """Ask whose token it is, by a TokenReview; return its status: `authenticated`, and then the `user`."""

    async def review_access(self, *, user: Object, verb: str, namespace: str, name: str = "") -> bool:
        """Ask whether a user of a TokenReview may do that with runs of the namespace, by a SubjectAccessReview.

        Without `name`: with all of them.
        """
