"""The manifests: rights no wider and no narrower than the calls, pods that pass `restricted`, overlays that fit."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import yaml
from dev.demo.__main__ import check_job
from pydantic import ValidationError

from ingestrun import __version__
from ingestrun.controller.http import tls, tokens
from ingestrun.controller.settings import Settings
from ingestrun.controller.watch.handlers import registry
from ingestrun.kube.client import KubernetesCluster
from ingestrun.kube.connection import Connection
from ingestrun.kube.protocol import Cluster, RunKey
from ingestrun.planner.jobs.manifest import POD_USER

ROOT = Path(__file__).parents[2]
BASE = ROOT / "manifests" / "base"
DEMO = ROOT / "dev" / "demo" / "cluster"
NAME, NAMESPACE = "ingestrun-operator", "ingestrun-system"
GROUPS = {"ingestruns": "ingestrun.dev", "jobs": "batch", "pods": ""}
"""Of the resources that kopf watches."""
CHECK_KEY = "ingestrun-operator-check-key"
TLS = "ingestrun-operator-tls"
OWN_SECRET = {("", "secrets", "get"), ("", "secrets", "update")}
"""In the operator's own namespace, of these two names."""

Right = tuple[str, str, str]
"""An API group, a resource, a verb."""

JOB = {"metadata": {"namespace": "n", "name": "j"}}
KEY = RunKey(namespace="n", name="r")
CALLS: dict[str, Callable[[Cluster], Coroutine[Any, Any, object]]] = {
    "get_run": lambda c: c.get_run(KEY),
    "list_runs": lambda c: c.list_runs(dict),
    "list_run_page": lambda c: c.list_run_page(namespace="n", limit=1),
    "review_token": lambda c: c.review_token("t"),
    "review_access": lambda c: c.review_access(user={}, verb="get", namespace="n"),
    "list_runs_in": lambda c: c.list_runs_in(namespace="n"),
    "list_runs_of": lambda c: c.list_runs_of(namespace="n", concurrency_key="k"),
    "write_status": lambda c: c.write_status(KEY, resource_version="1", status={}),
    "list_jobs": lambda c: c.list_jobs(namespace="n", run_uid="u"),
    "list_all_jobs": lambda c: c.list_all_jobs(dict),
    "list_all_pods": lambda c: c.list_all_pods(dict),
    "list_start_events": lambda c: c.list_start_events(dict, namespace="n", about="Pod"),
    "list_pods": lambda c: c.list_pods(namespace="n", run_uid="u"),
    "create_job": lambda c: c.create_job(JOB),
    "get_job": lambda c: c.get_job(namespace="n", name="j"),
    "delete_job": lambda c: c.delete_job(namespace="n", name="j", uid="u"),
    "delete_jobs": lambda c: c.delete_jobs(namespace="n", selector="a=b"),
    "patch_run": lambda c: c.patch_run(KEY, patch={}),
    "delete_run": lambda c: c.delete_run(KEY, uid="u", resource_version="1"),
    "set_pod_deadline": lambda c: c.set_pod_deadline(namespace="n", name="p", uid="u", seconds=1),
    "delete_pod": lambda c: c.delete_pod(namespace="n", name="p", uid="u"),
    "get_secret": lambda c: c.get_secret(namespace="n", name=CHECK_KEY),
    "replace_secret": lambda c: c.replace_secret(
        {"metadata": {"namespace": "n", "name": CHECK_KEY, "resourceVersion": "1"}}
    ),
    "create_event": lambda c: c.create_event({"metadata": {"namespace": "n"}}),
}


def documents(folder: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(folder.glob("*.yaml")):
        if path.name != "kustomization.yaml":
            yield from (document for document in yaml.safe_load_all(path.read_text()) if document)


def one(folder: Path, kind: str, name: str = NAME) -> dict[str, Any]:
    (found,) = [d for d in documents(folder) if d["kind"] == kind and d["metadata"]["name"] == name]
    return found


def rights(role: dict[str, Any]) -> set[Right]:
    return {
        (group, resource, verb)
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


PATH = re.compile(
    r"/(?:api|apis/(?P<group>[^/]+))/v[^/]+(?:/namespaces/[^/]+)?/(?P<plural>[^/]+)(?:/(?P<name>[^/]+)(?P<part>/[^/]+)?)?"
)


def right(method: str, path: str) -> Right:
    """Return the right that a request needs, as the API server derives it."""
    parts = PATH.fullmatch(path)
    assert parts, path
    on_one = {"GET": "get", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}
    on_all = {"GET": "list", "POST": "create", "DELETE": "deletecollection"}
    verb = (on_one if parts["name"] else on_all)[method]
    return parts["group"] or "", parts["plural"] + (parts["part"] or ""), verb


class NoServer:
    """Answers every request with an empty object, and notes the right that it needs."""

    def __init__(self) -> None:
        self.used: set[Right] = set()

    async def request(self, method: str, path: str, **_: object) -> object:
        self.used.add(right(method, path))
        return {}


async def used_rights() -> set[Right]:
    """What the operator's own calls and kopf's watches need, as RBAC names it."""
    server = NoServer()
    used = server.used
    cluster = KubernetesCluster(cast(Connection, server))
    for call in CALLS.values():
        await call(cluster)
    for handler in registry(cast(Any, None))._watching.get_all_handlers():
        assert handler.selector is not None
        resource = handler.selector.plural or handler.selector.any_name
        assert isinstance(resource, str)
        used |= {(GROUPS[resource], resource, verb) for verb in ("list", "watch")}
    return used


def test_every_call_of_the_protocol_is_counted() -> None:
    calls = {name for name, _ in inspect.getmembers(Cluster, inspect.isfunction) if not name.startswith("_")}
    assert calls == set(CALLS)


async def test_the_cluster_role_is_what_the_calls_need_and_no_more() -> None:
    assert rights(one(BASE, "ClusterRole")) == await used_rights() - OWN_SECRET


def test_the_lease_and_two_secrets_are_the_only_rights_in_its_own_namespace() -> None:
    role = one(BASE, "Role")
    assert role["metadata"]["namespace"] == NAMESPACE
    leases = {("coordination.k8s.io", "leases", verb) for verb in ("create", "get", "update")}
    assert rights(role) == leases | OWN_SECRET
    for rule in role["rules"]:
        assert rule["verbs"] == ["create"] or rule["resourceNames"] in ([NAME], [CHECK_KEY, TLS])
        assert ("secrets" in rule["resources"]) == (rule.get("resourceNames") == [CHECK_KEY, TLS])


def test_no_role_has_a_wildcard_other_secrets_or_pods_to_create() -> None:
    for role in (d for d in documents(BASE) if d["kind"] in ("Role", "ClusterRole")):
        for group, resource, verb in rights(role) - OWN_SECRET:
            assert "*" not in (group, resource, verb)
            assert resource not in ("secrets", "roles", "clusterroles", "pods/exec", "serviceaccounts/token")
            assert (resource, verb) != ("pods", "create")
            assert verb not in ("escalate", "bind", "impersonate")


@pytest.mark.parametrize("kind", ["RoleBinding", "ClusterRoleBinding"])
def test_the_bindings_are_of_the_operators_account(kind: str) -> None:
    binding = one(BASE, kind)
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": NAME, "namespace": NAMESPACE}]
    assert binding["roleRef"]["kind"] == kind.removesuffix("Binding")
    assert binding["roleRef"]["name"] == NAME


def pod_specs() -> Iterator[tuple[str, dict[str, Any]]]:
    workloads = [one(BASE, "Deployment"), one(DEMO, "Deployment", "flights")]
    for workload in [*workloads, check_job("check", "flights", [], image="demo:1")]:
        yield workload["metadata"]["name"], workload["spec"]["template"]["spec"]


@pytest.mark.parametrize(("name", "pod"), list(pod_specs()))
def test_the_pods_pass_restricted_with_a_read_only_root(name: str, pod: dict[str, Any]) -> None:
    assert pod["securityContext"]["runAsNonRoot"] is True
    # The operator's is the image's own, or the platform's choice; the next test has the image's.
    assert "runAsUser" not in pod["securityContext"] if name == NAME else pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
    assert all({"hostPath"}.isdisjoint(volume) for volume in pod.get("volumes", []))
    assert name == NAME or pod["automountServiceAccountToken"] is False
    for container in pod["containers"]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container["resources"]["requests"].keys() == {"cpu", "memory"}
        assert "memory" in container["resources"]["limits"]


def test_the_images_have_a_user_that_is_a_number_and_not_root() -> None:
    """By a name the kubelet can't tell that it is not root, and refuses to start the pod."""
    stages = re.split(r"^FROM ", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    images = [stage for stage in stages if "ENTRYPOINT" in stage]
    assert [re.findall(r"^USER (.*)$", image, re.MULTILINE) for image in images] == [[f"{POD_USER}:{POD_USER}"]] * 3


def test_no_workload_of_the_operator_has_a_user_of_its_own() -> None:
    """OpenShift's restricted-v2 refuses pods that name another user or group than the namespace's."""
    (container,) = one(BASE, "Deployment")["spec"]["template"]["spec"]["containers"]
    pod = one(BASE, "Deployment")["spec"]["template"]["spec"]
    for context in (pod["securityContext"], container["securityContext"]):
        assert not {"runAsUser", "runAsGroup", "fsGroup", "supplementalGroups", "seLinuxOptions"} & context.keys()


def test_the_component_for_openshift_leaves_the_runs_user_to_the_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    component = yaml.safe_load((ROOT / "manifests/components/openshift/kustomization.yaml").read_text())
    (patch,) = component["patches"]
    assert patch["target"] == {"kind": "Deployment", "name": NAME}
    (change,) = yaml.safe_load(patch["patch"])
    assert (change["op"], change["path"]) == ("add", "/spec/template/spec/containers/0/env/-")
    assert Settings().pod_user == POD_USER
    monkeypatch.setenv(change["value"]["name"], change["value"]["value"])
    assert Settings().pod_user == ""


@pytest.mark.parametrize("user", ["0", "-1", "root", str(2**31)])
def test_the_runs_user_is_a_number_and_not_root(user: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INGESTRUN_POD_USER", user)
    with pytest.raises(ValidationError):
        Settings()


@pytest.mark.parametrize(("folder", "name"), [(BASE, NAMESPACE), (DEMO, "ingest-demo")], ids=["operator", "demo"])
def test_the_namespaces_enforce_restricted(folder: Path, name: str) -> None:
    labels = one(folder, "Namespace", name)["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"


def test_the_deployment_is_as_the_overlays_of_make_images_expect() -> None:
    (container,) = one(BASE, "Deployment")["spec"]["template"]["spec"]["containers"]
    assert container["image"] == f"ingestrun/operator:{__version__}"
    assert container["env"][0] == {"name": "INGESTRUN_WORKER_IMAGE", "value": f"ingestrun/worker:{__version__}"}
    assert "command" not in container


def test_the_cancellation_check_is_found_where_the_pods_are_told() -> None:
    pod = one(BASE, "Deployment")["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    service = one(BASE, "Service")
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    (port,) = service["spec"]["ports"]
    ports = {entry["name"]: entry["containerPort"] for entry in container["ports"]}
    assert ports[port["targetPort"]] == Settings.model_fields["api_port"].default
    env = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert env["INGESTRUN_API_URL"] == f"https://{NAME}.$(INGESTRUN_LEASE_NAMESPACE).svc:{port['port']}"
    names = [entry["name"] for entry in container["env"]]
    assert names.index("INGESTRUN_LEASE_NAMESPACE") < names.index("INGESTRUN_API_URL"), "expanded from those before"


@pytest.mark.parametrize("name", [tokens.SECRET_NAME, tls.SECRET_NAME])
def test_the_secrets_come_without_data(name: str) -> None:
    """With data every installation would have the same key; and applying the manifests again would put it back."""
    secret = one(BASE, "Secret", name)
    assert secret["metadata"]["namespace"] == NAMESPACE
    assert not {"data", "stringData", "immutable"} & secret.keys()
    assert name in (CHECK_KEY, TLS)


def test_every_manifest_is_part_of_its_kustomization() -> None:
    for folder in (BASE, DEMO, ROOT / "crds"):
        listed = yaml.safe_load((folder / "kustomization.yaml").read_text())["resources"]
        assert {name for name in listed if "/" not in name} == {
            path.name for path in folder.glob("*.yaml") if path.name != "kustomization.yaml"
        }
