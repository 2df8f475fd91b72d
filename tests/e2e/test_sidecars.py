"""Pods into which a policy puts containers, on a real kubelet: what never ends holds nothing up, and is ended."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Final

import pytest

from tests.e2e.cluster import Json, Kubectl, condition, image, phase, wait_for
from tests.e2e.runs import ended, events, run_of

NAMESPACE: Final = "ingest-e2e-sidecars"
INJECT: Final = "ingest-e2e-inject"
"""The label of pods that says which container a policy puts into them."""
DONE: Final = """open('/dev/termination-log', 'w').write('{"v":"v1","outcome":"done","read":1,"written":1}')"""


def container(code: str, **more: Any) -> Json:
    """A container of the worker's image that runs this Python."""
    return {"image": image("WORKER_IMAGE"), "command": ["python", "-c", code], **more}


def run(name: str, inject: str, fetch: str = DONE, **more: Any) -> Json:
    """A run of one batch in two stages, into whose pods that container is put."""
    return {
        "apiVersion": "ingestrun.dev/v1alpha1",
        "kind": "IngestRun",
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": {
            "fetch": container(fetch),
            "publish": container(DONE),
            "batches": {"partitions": {"count": 1}},
            "podTemplate": {"labels": {INJECT: inject}},
            "retries": 1,
            "backoff": {"initialSeconds": 1, "maxSeconds": 1},
            **more,
        },
    }


def policy(inject: str, patches: Sequence[str]) -> list[Json]:
    """A policy for the pods of this label in the namespace of these tests, and its binding."""
    meta = {"name": f"{NAMESPACE}-{inject}"}
    kind = {"apiVersion": "admissionregistration.k8s.io/v1"}
    pods = {"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["pods"]}
    spec = {
        "failurePolicy": "Fail",
        "reinvocationPolicy": "Never",
        "matchConstraints": {
            "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": NAMESPACE}},
            "objectSelector": {"matchLabels": {INJECT: inject}},
            "resourceRules": [pods],
        },
        "mutations": [{"patchType": "JSONPatch", "jsonPatch": {"expression": f"[{', '.join(patches)}]"}}],
    }
    return [
        {**kind, "kind": "MutatingAdmissionPolicy", "metadata": meta, "spec": spec},
        {**kind, "kind": "MutatingAdmissionPolicyBinding", "metadata": meta, "spec": {"policyName": meta["name"]}},
    ]


def add(path: str, value: str) -> str:
    return f"JSONPatch{{op: 'add', path: '{path}', value: {value}}}"


def injected(field: str, name: str, code: str) -> str:
    command = f"['python', '-c', '{code}']"
    words = "terminationMessagePolicy: 'FallbackToLogsOnError'"
    return f"Object.spec.{field}{{name: '{name}', image: '{image('WORKER_IMAGE')}', command: {command}, {words}}}"


@pytest.fixture(scope="module")
def sidecars(kubectl: Kubectl, operator: None) -> Iterator[None]:
    """The namespace, and the policies once they are in force."""
    never_ends = add("/spec/containers/0", injected("containers", "agent", "import time; time.sleep(99999)"))
    fails = injected("initContainers", "vault", 'import sys; print("permission denied"); sys.exit(3)')
    objects = [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}},
        *policy("sidecar", [never_ends]),
        *policy("init", [add("/spec/initContainers", "[]"), add("/spec/initContainers/-", fails)]),
    ]
    kubectl.apply(objects)
    for inject in ("sidecar", "init"):
        wait_for(partial(_in_force, kubectl, inject), seconds=60, what=f"the policy {inject}")
    yield
    for found in objects[1:]:
        kubectl("delete", found["kind"], found["metadata"]["name"], "--ignore-not-found")
    kubectl("delete", "namespace", NAMESPACE, "--wait=false")


def _in_force(kubectl: Kubectl, inject: str) -> bool:
    """Tell whether a pod would get the container; the dry run creates none."""
    meta = {"name": "probe", "namespace": NAMESPACE, "labels": {INJECT: inject}}
    probe = {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": {"containers": [{"name": "c", "image": "i"}]}}
    answer = json.loads(kubectl("create", "-f", "-", "--dry-run=server", "-o", "json", stdin=json.dumps(probe)))
    return len(answer["spec"]["containers"]) > 1 or "initContainers" in answer["spec"]


def pods_of(kubectl: Kubectl, name: str) -> list[Json]:
    pods: list[Json] = kubectl.get("-n", NAMESPACE, "pods", "-l", f"ingestrun.dev/run={name}")["items"]
    return pods


def running(pods: Sequence[Json]) -> list[str]:
    """The containers that run in these pods."""
    states = (told for pod in pods for told in pod["status"].get("containerStatuses") or ())
    return [told["name"] for told in states if "running" in told["state"]]


def test_no_stage_waits_for_a_sidecar_that_never_ends(kubectl: Kubectl, sidecars: None) -> None:
    kubectl.apply([run("sided", "sidecar")])
    status = ended(kubectl, NAMESPACE, "sided", seconds=120)["status"]
    assert (status["phase"], status["records"]["published"], status["failures"]) == ("Succeeded", 1, [])
    assert running(pods_of(kubectl, "sided")) == ["agent"] * 2, "it does not listen to SIGTERM, so it has its grace"
    assert "container agent did not end with the stage" in events(kubectl, NAMESPACE, "sided", "SidecarEnded")[0]
    wait_for(lambda: not running(pods_of(kubectl, "sided")), seconds=50, what="the sidecars to be ended")


def test_a_stage_that_fails_beside_a_sidecar_fails_by_its_own_words(kubectl: Kubectl, sidecars: None) -> None:
    kubectl.apply([run("sided-fails", "sidecar", "import sys; print('no route'); sys.exit(7)")])
    status = ended(kubectl, NAMESPACE, "sided-fails", seconds=120)["status"]
    assert [(failure["reason"], failure["log"]) for failure in status["failures"]] == [("Error", "no route")] * 2
    assert status["retries"] == [{"stage": "fetch", "reason": "Error", "count": 1}]
    wait_for(lambda: not running(pods_of(kubectl, "sided-fails")), seconds=50, what="the sidecars to be ended")
    after = run_of(kubectl, NAMESPACE, "sided-fails")["status"]
    assert after["failures"] == status["failures"], "what the kubelet says of the pods then changes nothing"


def test_a_drain_does_not_wait_for_a_sidecar(kubectl: Kubectl, sidecars: None) -> None:
    kubectl.apply([run("sided-drain", "sidecar", f"import time; time.sleep(15); {DONE}")])
    wait_for(lambda: "fetch" in running(pods_of(kubectl, "sided-drain")), seconds=90, what="the fetch to run")
    cancel = '{"spec":{"cancel":true}}'
    kubectl("-n", NAMESPACE, "patch", "ingestrun", "sided-drain", "--type", "merge", "-p", cancel)
    kubectl("-n", NAMESPACE, "wait", "ingestrun/sided-drain", "--for=condition=Drained", "--timeout=60s")
    assert running(pods_of(kubectl, "sided-drain")) == ["agent"]
    drained = run_of(kubectl, NAMESPACE, "sided-drain")
    assert phase(drained) == "Cancelled"
    assert "container agent, which others have put into pod" in condition(drained, "Drained")["message"]
    wait_for(lambda: not running(pods_of(kubectl, "sided-drain")), seconds=50, what="the sidecar to be ended")


def test_an_init_container_that_fails_is_a_failure_of_the_stage(kubectl: Kubectl, sidecars: None) -> None:
    kubectl.apply([run("init-fails", "init")])
    status = ended(kubectl, NAMESPACE, "init-fails", seconds=120)["status"]
    assert [failure["reason"] for failure in status["failures"]] == ["InitContainerFailed"] * 2, "retries: 1"
    assert status["failures"][1]["message"] == "init container vault: exit code 3: permission denied"
