"""What the tests against a real API server share.

The observer here is the synchronous client, on its own connection: none of the operator's code is between a test
and the server. The cluster is the one of `make cluster-up`, or the one whose kubeconfig INGESTRUN_TEST_KUBECONFIG
names; never the user's own default. Without it the tests fail, they are not skipped: a green run has to mean that
they ran.
"""

from __future__ import annotations

import contextlib
import copy
import fcntl
import json
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

import pytest
import yaml
from kubernetes import client, config

from tests.api.operator_process import OperatorProcess

REPOSITORY: Final = Path(__file__).parents[2]
GROUP: Final = "ingestrun.dev"
VERSION: Final = "v1alpha1"
PLURAL: Final = "ingestruns"
PATIENCE: Final = 3
"""The timeouts that the tests name would do on a machine at rest; so many times that long is waited. CI has two cores
for the cluster and four sessions, and what comes in time costs nothing of it."""

Json = dict[str, Any]
T = TypeVar("T")


class WaitFor(Protocol):
    """See `wait_for`."""

    def __call__(self, predicate: Callable[[], T], timeout: float = 30.0, what: str = "it") -> T: ...


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder needs the cluster, and says so by its marker.

    Tests that wait for a minute go apart from each other in the first half: others compute meanwhile (pytest -n).
    """
    ours = [item for item in items if Path(__file__).parent in item.path.parents]
    for item in ours:
        item.add_marker(pytest.mark.api)
    waiting = [item for item in ours if item.get_closest_marker("waits")]
    others = [item for item in items if item not in waiting]
    for number, item in enumerate(waiting):
        others.insert(number * len(others) // max(1, 2 * len(waiting)), item)
    items[:] = others


def refusal(error: client.ApiException) -> str:
    """The server's own sentence."""
    try:
        return str(json.loads(error.body or "{}")["message"])
    except (TypeError, ValueError, KeyError):
        return f"HTTP {error.status}: {error.body}"


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The API server, seen from outside of the operator."""

    kubeconfig: Path
    context: str
    api: client.ApiClient

    @property
    def core(self) -> client.CoreV1Api:
        return client.CoreV1Api(self.api)

    @property
    def batch(self) -> client.BatchV1Api:
        return client.BatchV1Api(self.api)

    @property
    def custom(self) -> Any:
        # A CustomObjectsApi; its types know nothing of what is in a custom object.
        return client.CustomObjectsApi(self.api)

    @property
    def extensions(self) -> client.ApiextensionsV1Api:
        return client.ApiextensionsV1Api(self.api)

    def table(self, namespace: str) -> Json:
        """The namespace's runs as kubectl gets them, with the CRD's columns."""
        wanted = {"Accept": "application/json;as=Table;g=meta.k8s.io;v=v1"}
        table: Json = self.custom.list_namespaced_custom_object(GROUP, VERSION, namespace, PLURAL, _headers=wanted)
        return table

    def create_run(
        self,
        namespace: str,
        spec: Mapping[str, Any],
        *,
        name: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        dry_run: bool = False,
        strict: bool = True,
    ) -> Json:
        """Create a run; unknown fields are refused, as kubectl has it. Raises ApiException."""
        body = {
            "apiVersion": f"{GROUP}/{VERSION}",
            "kind": "IngestRun",
            "metadata": {"name": name or f"run-{uuid.uuid4().hex[:8]}", "namespace": namespace, **(metadata or {})},
            "spec": copy.deepcopy(dict(spec)),
        }
        made: Json = self.custom.create_namespaced_custom_object(
            GROUP,
            VERSION,
            namespace,
            PLURAL,
            body,
            field_validation="Strict" if strict else "Ignore",
            **({"dry_run": "All"} if dry_run else {}),
        )
        return made

    def run(self, namespace: str, name: str) -> Json:
        """The run as it is now."""
        found: Json = self.custom.get_namespaced_custom_object(GROUP, VERSION, namespace, PLURAL, name)
        return found

    def runs(self, namespace: str, **selectors: str) -> list[Json]:
        """The namespace's runs, by `label_selector` or `field_selector`."""
        found = self.custom.list_namespaced_custom_object(GROUP, VERSION, namespace, PLURAL, **selectors)
        items: list[Json] = found["items"]
        return items

    def told(self, namespace: str, reason: str, run: str | None = None, *, number: int = 1) -> list[str]:
        """What Events of that reason say, once there are so many: they come a moment after the status."""

        def look() -> list[str]:
            items = self.core.list_namespaced_event(namespace, field_selector=f"reason={reason}").items
            found = [str(item.message) for item in items if run in (None, item.involved_object.name)]
            assert len(found) >= number, found
            return found

        return _wait_for(look, 30, f"an Event {reason}")

    def patch_run(self, namespace: str, name: str, patch: Mapping[str, Any]) -> Json:
        """A merge patch, as in `kubectl patch --type merge`."""
        patched: Json = self.custom.patch_namespaced_custom_object(
            GROUP,
            VERSION,
            namespace,
            PLURAL,
            name,
            patch,
            _content_type="application/merge-patch+json",
            field_validation="Strict",
        )
        return patched

    def patch_spec(self, namespace: str, name: str, **fields: Any) -> Json:
        """A merge patch of the spec."""
        return self.patch_run(namespace, name, {"spec": fields})

    def cancel(self, namespace: str, name: str, reason: str | None = None) -> Json:
        """What the user does."""
        spec: Json = {"cancel": True}
        if reason is not None:
            spec["cancellation"] = {"reason": reason}
        return self.patch_run(namespace, name, {"spec": spec})

    def patch_status(self, namespace: str, name: str, status: Mapping[str, Any] | None) -> Json:
        """A merge patch of the status, as the operator's would be, but without its precondition."""
        patched: Json = self.custom.patch_namespaced_custom_object_status(
            GROUP,
            VERSION,
            namespace,
            PLURAL,
            name,
            {"status": status},
            _content_type="application/merge-patch+json",
            field_validation="Strict",
        )
        return patched

    def jobs(self, namespace: str, selector: str = "") -> list[Any]:
        """The namespace's Jobs."""
        return list(self.batch.list_namespaced_job(namespace, label_selector=selector).items)

    def pods(self, namespace: str, selector: str = "") -> list[Any]:
        """The namespace's pods."""
        return list(self.core.list_namespaced_pod(namespace, label_selector=selector).items)

    def milestone(self, namespace: str) -> str:
        """Make a call that is in the audit log and changes nothing; the name that its entry has.

        An entry is written as its call ends: once this one is there, so are those of the calls that ended before.
        """
        name = f"milestone-{uuid.uuid4().hex}"
        try:
            self.core.delete_namespaced_pod(name, namespace)
        except client.ApiException as error:
            if error.status != 404:
                raise
        return name


@pytest.fixture(scope="session")
def kubeconfig() -> Path:
    """Of the test cluster, never the user's own."""
    named = os.environ.get("INGESTRUN_TEST_KUBECONFIG")
    path = Path(named) if named else REPOSITORY / ".devcluster" / "kubeconfig"
    if not path.is_file():
        pytest.fail(f"there is no {path}: run `make cluster-up NODES=both` first", pytrace=False)
    return path


@pytest.fixture(scope="session")
def cluster(kubeconfig: Path) -> Iterator[Cluster]:
    """The test cluster, known to answer."""
    path = kubeconfig
    context = str(yaml.safe_load(path.read_text())["current-context"])
    api = config.new_client_from_config(  # type: ignore[no-untyped-call]
        config_file=str(path), context=context, persist_config=False
    )
    try:
        client.VersionApi(api).get_code(_request_timeout=10)
    except Exception as error:
        pytest.fail(f"the cluster of {path} does not answer: run `make cluster-up NODES=both` ({error})", pytrace=False)
    yield Cluster(kubeconfig=path, context=context, api=api)
    api.close()


@pytest.fixture(scope="session")
def alone(cluster: Cluster) -> Iterator[None]:
    """No deployed operator acts on the tests' runs: one that `make demo` has left is scaled down meanwhile.

    Sessions side by side (pytest -n) share a lock; the last one puts back what the first one found.
    """
    apps = client.AppsV1Api(cluster.api)
    name, namespace = "ingestrun-operator", "ingestrun-system"
    with (cluster.kubeconfig.parent / "scaled-down").open("a+") as found:
        fcntl.flock(found, fcntl.LOCK_SH)
        try:
            replicas = apps.read_namespaced_deployment_scale(name, namespace).to_dict()["spec"]["replicas"]
        except client.ApiException as error:
            if error.status != 404:
                raise
            yield
            return
        if replicas:
            found.truncate(0)
            found.write(str(replicas))
            found.flush()
        apps.patch_namespaced_deployment_scale(name, namespace, {"spec": {"replicas": 0}})
        try:
            _wait_for(lambda: not deployed(cluster, namespace, name), 60, "the deployed operator to stop")
            yield
        finally:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(found, fcntl.LOCK_EX | fcntl.LOCK_NB)
                found.seek(0)
                before = int(found.read() or 0)
                apps.patch_namespaced_deployment_scale(name, namespace, {"spec": {"replicas": before}})
                found.truncate(0)


def deployed(cluster: Cluster, namespace: str, name: str) -> list[Any]:
    """The pods of the deployed operator."""
    return cluster.pods(namespace, f"app.kubernetes.io/name={name}")


@pytest.fixture(scope="session")
def crd(cluster: Cluster, alone: None) -> Json:
    """The CRD as this checkout has it, applied and served."""
    with (cluster.kubeconfig.parent / "crd-applied").open("a") as turn:
        # One session after another: the second finds the new schema stored, and would not wait until it is served.
        fcntl.flock(turn, fcntl.LOCK_EX)
        return _applied_crd(cluster)


def _applied_crd(cluster: Cluster) -> Json:
    body = yaml.safe_load((REPOSITORY / "crds" / "ingestruns.yaml").read_text())
    name = body["metadata"]["name"]
    selector = f"metadata.name={name}"
    before = [
        item.metadata.generation if item.metadata else None
        for item in cluster.extensions.list_custom_resource_definition(field_selector=selector).items
    ]
    cluster.extensions.patch_custom_resource_definition(
        name,
        body,
        field_manager="ingestrun-tests",
        force=True,
        field_validation="Strict",
        _content_type="application/apply-patch+yaml",
    )

    def served() -> Json | None:
        found: Json = cluster.extensions.read_custom_resource_definition(name).to_dict()
        conditions = {item["type"]: item["status"] for item in found["status"].get("conditions") or ()}
        return found if conditions.get("Established") == "True" else None

    found = _wait_for(served, 30, f"the CRD {name} to be established")
    assert found is not None
    if before != [found["metadata"]["generation"]]:
        # The server goes on with the old schema for a moment, and nothing tells when it no longer does.
        time.sleep(3)
    return found


@pytest.fixture
def namespace(cluster: Cluster) -> Iterator[str]:
    """A namespace of the test's own. Deleted afterwards, which is not waited for."""
    name = f"ir-test-{uuid.uuid4().hex[:10]}"
    log = audit_log(cluster)
    _BEGUN[name] = log.stat().st_size if log.is_file() else 0
    labels = {"ingestrun.dev/test": "true"}
    cluster.core.create_namespace(client.V1Namespace(metadata=client.V1ObjectMeta(name=name, labels=labels)))
    yield name
    cluster.core.delete_namespace(name)


def _wait_for(predicate: Callable[[], T], timeout: float = 30.0, what: str = "it") -> T:
    timeout *= PATIENCE
    deadline = time.monotonic() + timeout
    last: Any = None
    while True:
        try:
            value = predicate()
            if value:
                return value
            last = value
        except (AssertionError, KeyError, client.ApiException) as error:
            last = refusal(error) if isinstance(error, client.ApiException) else error
        if time.monotonic() >= deadline:
            pytest.fail(f"waited {timeout:g} s for {what}; last seen: {str(last)[:2000]}")
        time.sleep(0.1)


@pytest.fixture
def wait_for() -> WaitFor:
    """Ask again until the predicate gives something true, and give that back.

    An AssertionError, a field that is missing, or an answer such as 404 counts as "not yet"; what was seen last is in
    the failure. The timeout is multiplied by PATIENCE.
    """
    return _wait_for


_BEGUN: Final[dict[str, int]] = {}
"""How long the audit log was when a namespace was created: of what is before, nothing is about it."""


def audit_log(cluster: Cluster) -> Path:
    """Where the API server of `make cluster-up` writes it."""
    named = os.environ.get("INGESTRUN_AUDIT_LOG")
    return Path(named) if named else cluster.kubeconfig.parent / "audit" / "audit.log"


@pytest.fixture(scope="session")
def audit(cluster: Cluster) -> Callable[[str], list[Json]]:
    """The API server's own record of what happened in a namespace until now, in its order: for promises about calls.

    A call may be seen to have done its work before it is in the log. So a milestone is set, and waited for.
    """
    path = audit_log(cluster)

    def entries(namespace: str) -> list[Json]:
        if not path.is_file():
            pytest.fail(f"there is no audit log at {path}: run `make cluster-up NODES=both` first", pytrace=False)
        milestone = cluster.milestone(namespace)

        def read() -> list[Json]:
            found = []
            with path.open("rb") as lines:
                begun = _BEGUN.get(namespace, 0)
                lines.seek(begun if begun <= path.stat().st_size else 0)  # it may have been rotated meanwhile
                for line in lines:
                    # The last line may be half written.
                    if namespace.encode() in line and line.endswith(b"\n"):
                        entry = json.loads(line)
                        if entry.get("objectRef", {}).get("namespace") == namespace:
                            found.append(entry)
            assert any(entry["objectRef"].get("name") == milestone for entry in found), "the milestone is not there yet"
            return found

        return _wait_for(read, 30, "the audit log to be written")

    return entries


@pytest.fixture
def operator(cluster: Cluster, crd: Json, namespace: str, tmp_path: Path) -> Iterator[OperatorProcess]:
    """The operator of this checkout, watching the test's namespace alone."""
    assert crd
    process = OperatorProcess(
        kubeconfig=cluster.kubeconfig, context=cluster.context, namespace=namespace, log=tmp_path / "operator.log"
    )
    process.start()
    yield process
    process.stop()
