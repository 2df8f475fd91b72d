"""What the operator asks of the API server: all of it, in one Protocol.

Objects are the plain mappings of their JSON. Nothing else in the operator talks to the server, so this file
is the list of its calls (and of the RBAC it needs), and a fake of it can be strict.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

T = TypeVar("T")

Object = Mapping[str, Any]
"""A Kubernetes object as JSON; never mutated by whoever receives it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunKey:
    """Which run: the key of the queue, of the stores and of the logs."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


class Cluster(Protocol):
    """The API server, as far as the operator needs it.

    Every method raises an `ingestrun.kube.errors.KubeError`; which one is said where it matters. Every call
    has a time-out that is shorter than the lease's slack, so that a replica which has lost its lease has no
    request of its own still under way.
    """

    async def get_run(self, key: RunKey) -> Object:
        """Read a run, not from a cache. Raises NotFound."""

    async def list_runs(self, read: Callable[[Object], T]) -> Sequence[T]:
        """List all runs that the operator watches, each as `read` returns it, so that no more is kept of a page.

        `read` may be called twice with one object, if the list has to begin anew.
        """

    async def list_runs_of(self, *, namespace: str, concurrency_key: str) -> Sequence[Object]:
        """The namespace's runs of that `spec.concurrency.key`, not from a cache, without the Succeeded ones."""

    async def list_runs_in(self, *, namespace: str) -> Sequence[Object]:
        """The namespace's runs, all of them, in pages, not from a cache."""

    async def write_status(self, key: RunKey, *, resource_version: str, status: Object) -> Object:
        """Merge `status` into the run's status if nobody has changed the run since `resource_version`.

        A key whose value is None is removed. Returns the run as stored: a read as live as a GET.
        Raises Conflict when the run has changed, NotFound when it is gone, Unknown when the answer was lost
        (the write may or may not have happened).
        """

    async def list_jobs(self, *, namespace: str, run_uid: str) -> Sequence[Object]:
        """The run's Jobs by its UID label, not from a cache."""

    async def list_all_jobs(self, read: Callable[[Object], T]) -> Sequence[T]:
        """List all Jobs of all runs that the operator watches, by the presence of the run's label; as `list_runs`."""

    async def list_all_pods(self, read: Callable[[Object], T]) -> Sequence[T]:
        """List all pods of all runs that the operator watches, by the presence of the run's label; as `list_runs`."""

    async def list_failed_creates(self, *, namespace: str) -> Sequence[Object]:
        """The namespace's Events by which the Job controller tells that it could not create a Job's pod."""

    async def list_pods(self, *, namespace: str, run_uid: str) -> Sequence[Object]:
        """The run's pods by its UID label, not from a cache."""

    async def create_job(self, job: Object) -> Object:
        """Create a Job.

        Raises AlreadyExists, QuotaExceeded, Forbidden, Invalid, NotFound (no such namespace, or it is
        being deleted), Unknown when the answer was lost (the Job may appear later).
        """

    async def get_job(self, *, namespace: str, name: str) -> Object:
        """Read a Job, not from a cache. Raises NotFound."""

    async def delete_job(self, *, namespace: str, name: str, uid: str, grace_seconds: int | None = None) -> None:
        """Delete this very Job (precondition on the UID) and its pods in the background. Gone already is done."""

    async def delete_jobs(self, *, namespace: str, selector: str) -> None:
        """Delete all Jobs that match the label selector, and their pods, by one call."""

    async def patch_run(self, key: RunKey, *, patch: Object) -> Object:
        """Merge `patch` into the run's metadata. Without a precondition, so for what is right whatever else changed.

        Raises NotFound, Invalid, Unknown.
        """

    async def delete_run(self, key: RunKey, *, uid: str, resource_version: str) -> None:
        """Delete this very run, and what it owns in the background, if nobody has changed it since.

        Gone already is done. Raises Conflict when it has changed, or another has its name.
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
        """Delete this very pod, with that grace; with `resource_version` only if it has not changed since.

        Gone already is done. Raises Conflict when it has changed, or another has its name.
        """

    async def create_event(self, event: Object) -> None:
        """Post an events.k8s.io/v1 Event."""

    async def get_secret(self, *, namespace: str, name: str) -> Object:
        """Read a Secret. RBAC grants the one of the check's key alone. Raises NotFound, Forbidden."""

    async def replace_secret(self, secret: Object) -> Object:
        """Store a Secret over the one that was read, if nobody has changed it since; returns it as stored.

        Raises Conflict when it has changed, NotFound when it is gone, Unknown when the answer was lost.
        """
