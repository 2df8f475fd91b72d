"""What people may do with runs: Kubernetes' view, edit and admin, and the canceller, each by impersonation."""

from __future__ import annotations

import copy
import uuid
from collections.abc import Callable, Iterator
from typing import Any, Final

import pytest
import yaml
from kubernetes import client

from ingestrun.model import names
from tests.api.conftest import Cluster, Json, WaitFor, _wait_for, refusal
from tests.api.test_fence import BASE, LABEL, as_user, installed, labelled_namespace
from tests.api.test_requested_by import RUNS, apply_run, replace_run
from tests.api.test_runs import spec

USERS: Final = list(yaml.safe_load_all((BASE / "users.yaml").read_text()))
ROLES: Final = {body["metadata"]["name"]: body for body in USERS if body["kind"] == "ClusterRole"}
POLICIES: Final = [body for body in USERS if "ValidatingAdmissionPolicy" in body["kind"]]
READING: Final = {"get", "list", "watch"}
WRITING: Final = {"create", "update", "patch", "delete", "deletecollection"}
REFUSED: Final = "so you may only change spec.cancel, spec.cancellation and spec.suspend"
RBAC: Final = "rbac.authorization.k8s.io"


@pytest.fixture(scope="module")
def labels(cluster: Cluster, crd: Json) -> Iterator[dict[str, str]]:
    """The canceller's policy, installed."""
    assert crd
    with installed(cluster, POLICIES) as found:
        yield found


@pytest.fixture(scope="module")
def roles(cluster: Cluster) -> Iterator[dict[str, str]]:
    """The roles of manifests/base, under names of this session's own; by the names that they have there."""
    rbac: Any = client.RbacAuthorizationV1Api(cluster.api)
    suffix = uuid.uuid4().hex[:8]
    made = {name: f"{name}-{suffix}" for name in ROLES}
    for name, role in ROLES.items():
        body = copy.deepcopy(role)
        body["metadata"]["name"] = made[name]
        rbac.create_cluster_role(body)
    yield made
    for name in made.values():
        rbac.delete_cluster_role(name)


@pytest.fixture
def namespace(cluster: Cluster, labels: dict[str, str]) -> Iterator[str]:
    """A namespace in which the policy holds."""
    name = labelled_namespace(cluster, labels)
    yield name
    cluster.core.delete_namespace(name)


def bound(cluster: Cluster, namespace: str, role: str, user: str) -> Cluster:
    """The API server as seen by a user who has the cluster role in the namespace."""
    rbac: Any = client.RbacAuthorizationV1Api(cluster.api)
    reference = {"kind": "ClusterRole", "name": role, "apiGroup": RBAC}
    subjects = [{"kind": "User", "name": user, "apiGroup": RBAC}]
    rbac.create_namespaced_role_binding(
        namespace, {"metadata": {"name": user}, "roleRef": reference, "subjects": subjects}
    )
    return as_user(cluster, user)


def may(user: Cluster, namespace: str, resource: str = names.PLURAL) -> set[str]:
    """The verbs that `kubectl auth can-i` says yes to."""
    plural, _, part = resource.partition("/")
    asked: Any = client.AuthorizationV1Api(user.api)

    def allowed(verb: str) -> bool:
        about = {"namespace": namespace, "group": names.GROUP, "resource": plural, "subresource": part, "verb": verb}
        review = asked.create_self_subject_access_review({"spec": {"resourceAttributes": about}})
        return bool(review.status.allowed)

    return {verb for verb in READING | WRITING if allowed(verb)}


@pytest.fixture
def canceller(cluster: Cluster, namespace: str, roles: dict[str, str]) -> Cluster:
    carol = bound(cluster, namespace, roles["ingestrun-canceller"], "carol")
    _wait_for(lambda: may(carol, namespace), 10, "the rights of carol")
    return carol


@pytest.mark.parametrize(
    ("role", "verbs"), [("view", READING), ("edit", READING | WRITING), ("admin", READING | WRITING)]
)
@pytest.mark.usefixtures("roles")
def test_the_roles_of_kubernetes_have_the_runs(
    role: str, verbs: set[str], cluster: Cluster, namespace: str, wait_for: WaitFor
) -> None:
    """Aggregated by a controller, so asked until it has."""
    dana = bound(cluster, namespace, role, "dana")
    assert wait_for(lambda: may(dana, namespace) == verbs, 30, f"the rights of {role}")
    assert may(dana, namespace, f"{names.PLURAL}/status") == READING, "the status is the operator's"


def test_the_role_of_kubernetes_lets_its_user_work(
    cluster: Cluster, namespace: str, roles: dict[str, str], wait_for: WaitFor
) -> None:
    """Whoever may update may change what the canceller may not: the policy is in nobody else's way."""
    assert roles
    dana = bound(cluster, namespace, "admin", "dana")
    wait_for(lambda: "create" in may(dana, namespace), 30, "the rights of admin")
    dana.create_run(namespace, spec(suspend=True), name="run")
    run = dana.patch_run(
        namespace, "run", {"metadata": {"labels": {"team": "geo"}}, "spec": {"parallelism": 2, "staleAfterSeconds": 60}}
    )
    assert (run["metadata"]["labels"], run["spec"]["parallelism"]) == ({"team": "geo"}, 2)
    dana.custom.delete_namespaced_custom_object(*RUNS, namespace, names.PLURAL, "run")


def test_a_canceller_reads_and_patches_and_no_more(namespace: str, canceller: Cluster) -> None:
    assert may(canceller, namespace) == READING | {"patch"}
    assert may(canceller, namespace, f"{names.PLURAL}/status") == set()


@pytest.mark.parametrize(
    "change",
    [
        {"cancel": True},
        {"cancel": True, "cancellation": {"reason": "wrong month", "policy": "Terminate", "cascade": True}},
        {"suspend": False},
        {"suspend": None},
    ],
    ids=str,
)
def test_a_canceller_cancels_and_suspends(
    change: dict[str, Any], cluster: Cluster, namespace: str, canceller: Cluster
) -> None:
    cluster.create_run(namespace, spec(suspend=True), name="run", metadata={"labels": {"team": "geo"}})
    run = canceller.patch_spec(namespace, "run", **change)
    assert {key: run["spec"].get(key) for key in change} == change


def patched(body: Json) -> Callable[[Cluster, str], object]:
    return lambda who, namespace: who.patch_run(namespace, "run", body)


def applied_anew(who: Cluster, namespace: str) -> object:
    return apply_run(who, namespace, "another", {"spec": spec(cancel=True)})


def replaced(who: Cluster, namespace: str) -> object:
    return replace_run(who, namespace, "run", lambda body: body["spec"].update(cancel=True))


def deleted(who: Cluster, namespace: str) -> object:
    return who.custom.delete_namespaced_custom_object(*RUNS, namespace, names.PLURAL, "run")


OWNED: Final = {"apiVersion": "v1", "kind": "ConfigMap", "name": "gone", "uid": "6f0c1e1a-0000-4000-8000-000000000000"}
BEYOND: Final[dict[str, tuple[Callable[[Cluster, str], object], str]]] = {
    "create": (lambda who, namespace: who.create_run(namespace, spec(cancel=True)), "cannot create"),
    "create by apply": (applied_anew, "cannot create"),
    "replace": (replaced, "cannot update"),
    "delete": (deleted, "cannot delete"),
    "delete by its lifetime": (patched({"spec": {"ttlSecondsAfterFinished": 0}}), REFUSED),
    "delete by an owner that is gone": (patched({"metadata": {"ownerReferences": [OWNED]}}), REFUSED),
    "keep by a finalizer": (patched({"metadata": {"finalizers": ["example.org/keep"]}}), REFUSED),
    "fail by a deadline": (patched({"spec": {"cancel": True, "activeDeadlineSeconds": 1}}), REFUSED),
    "cancel by standing still": (patched({"spec": {"staleAfterSeconds": 1}}), REFUSED),
    "speed up": (patched({"spec": {"parallelism": 100}}), REFUSED),
    "drop the Jobs": (patched({"spec": {"jobRetention": {"failedBatches": 0}}}), REFUSED),
    "take a setting out": (patched({"spec": {"activeDeadlineSeconds": None}}), REFUSED),
    "a label": (patched({"metadata": {"labels": {"kueue.x-k8s.io/queue-name": "a"}}}), REFUSED),
    "take a label off": (patched({"metadata": {"labels": {"team": None}}}), REFUSED),
    "an annotation": (patched({"metadata": {"annotations": {"a": "b"}}}), REFUSED),
}


@pytest.mark.parametrize("way", BEYOND)
def test_a_canceller_does_nothing_else(way: str, cluster: Cluster, namespace: str, canceller: Cluster) -> None:
    made = spec(suspend=True, activeDeadlineSeconds=3600)
    cluster.create_run(namespace, made, name="run", metadata={"labels": {"team": "geo"}})
    act, sentence = BEYOND[way]
    with pytest.raises(client.ApiException) as refused:
        act(canceller, namespace)
    assert refused.value.status == 403
    assert sentence in refusal(refused.value)
    (run,) = cluster.runs(namespace)
    assert (run["metadata"]["generation"], run["metadata"]["labels"]) == (1, {"team": "geo"})


def test_the_operator_may_take_its_label_off(cluster: Cluster, namespace: str, canceller: Cluster) -> None:
    """It may patch runs and not update them, as a canceller; with the label there is nothing to be had."""
    cluster.create_run(namespace, spec(suspend=True), name="run", metadata={"labels": {LABEL: "true", "team": "geo"}})
    run = canceller.patch_run(namespace, "run", {"metadata": {"labels": {LABEL: None}}})
    assert run["metadata"]["labels"] == {"team": "geo"}
