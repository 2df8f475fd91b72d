"""Pods that do not start, on a real API server, scheduler, volume and Job controller. KWOK holds the pods.

The tests write the Events that a kubelet or an attach controller would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from kubernetes import client

from tests.api.conftest import Cluster, Json, WaitFor
from tests.api.operator_process import OperatorProcess
from tests.api.test_runs import condition, in_phase, spec

SECRET = 'MountVolume.SetUp failed for volume "ca" : secret "company-ca" not found'
MULTI = 'Multi-Attach error for volume "pvc-7" Volume is already used by pod(s) other-1'
ONE: Json = {"partitions": {"count": 1}}
PENDING = "simulate.ingestrun.dev/pending"


def held_pod(cluster: Cluster, namespace: str) -> Any:
    """The run's pod, once its node has taken it and waits for its volumes."""
    pods = [pod for pod in cluster.pods(namespace, "ingestrun.dev/run-uid") if pod.status.start_time is not None]
    assert pods, "no pod has a node"
    return pods[0]


def tell(cluster: Cluster, pod: Any, *, reason: str, note: str, told_for: int) -> None:
    """An Event about the pod, as its kubelet writes it who has met the same for so many seconds."""
    now = datetime.now(UTC)
    about = {"kind": "Pod", "name": pod.metadata.name, "namespace": pod.metadata.namespace, "uid": pod.metadata.uid}
    core: Any = cluster.core
    core.create_namespaced_event(
        pod.metadata.namespace,
        {
            "metadata": {"generateName": "mount-"},
            "type": "Warning",
            "reason": reason,
            "message": note,
            "involvedObject": {"apiVersion": "v1", **about},
            "source": {"component": "kubelet"},
            "count": 7,
            "firstTimestamp": (now - timedelta(seconds=told_for)).isoformat(),
            "lastTimestamp": now.isoformat(),
        },
    )


def not_starting(cluster: Cluster, namespace: str, name: str, words: str) -> Callable[[], Json]:
    """The run, once it says by those words why its pod does not start."""

    def look() -> Json:
        run = cluster.run(namespace, name)
        told = condition(run, "Succeeded")
        assert told.get("reason") == "PodNotStarting", told
        assert words in told["message"]
        return run

    return look


def test_a_missing_secret_is_told_from_the_pods_event_and_fails_after_the_runs_own_grace(
    cluster: Cluster,
    namespace: str,
    operator: OperatorProcess,
    wait_for: WaitFor,
) -> None:
    graces = {"configurationSeconds": 40}
    made = spec({"pending": "true"}, batches=ONE, hooks=None, retries=0, podStart=graces)
    cluster.create_run(namespace, made, name="no-secret")
    pod = wait_for(lambda: held_pod(cluster, namespace), 60, "the pod on its node")
    tell(cluster, pod, reason="FailedMount", note=SECRET, told_for=60)
    run = wait_for(not_starting(cluster, namespace, "no-secret", SECRET), 60, "the name of the Secret")
    assert condition(run, "Backpressured") == {}
    run = wait_for(in_phase(cluster, namespace, "no-secret", "Failed"), 90, "the end of the grace")
    (failure,) = run["status"]["failures"]
    assert failure["reason"] == "ContainerConfig"
    assert failure["message"] == f"the pod has not started for 40 s: FailedMount: {SECRET}"
    assert cluster.told(namespace, "PodNotStarting", "no-secret")


def test_a_volume_that_another_node_holds_is_told_and_waited_for(
    cluster: Cluster,
    namespace: str,
    operator: OperatorProcess,
    wait_for: WaitFor,
) -> None:
    cluster.create_run(namespace, spec({"pending": "true"}, batches=ONE, hooks=None, retries=0), name="attached")
    pod = wait_for(lambda: held_pod(cluster, namespace), 60, "the pod on its node")
    tell(cluster, pod, reason="FailedAttachVolume", note=MULTI, told_for=0)
    wait_for(not_starting(cluster, namespace, "attached", MULTI), 60, "the volume's name")

    def ended() -> Json:
        for each in cluster.pods(namespace, "ingestrun.dev/run-uid"):
            if PENDING in (each.metadata.annotations or {}):
                core: Any = cluster.core
                core.patch_namespaced_pod(each.metadata.name, namespace, {"metadata": {"annotations": {PENDING: None}}})
        return in_phase(cluster, namespace, "attached", "Succeeded")()

    run = wait_for(ended, 60, "Succeeded")
    assert run["status"]["failures"] == []


def test_a_class_that_does_not_exist_is_told_from_the_claims_event(
    cluster: Cluster,
    namespace: str,
    operator: OperatorProcess,
    wait_for: WaitFor,
) -> None:
    core: Any = cluster.core
    wanted = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Mi"}}}
    claim = {"metadata": {"name": "rates"}, "spec": {**wanted, "storageClassName": f"gold-{namespace}"}}
    core.create_namespaced_persistent_volume_claim(namespace, claim)
    for name, of in (("no-class", "rates"), ("no-claim", "nowhere")):
        made = spec(batches=ONE, hooks=None, retries=0)
        made["podTemplate"]["volumes"] = [{"name": "rates", "persistentVolumeClaim": {"claimName": of}}]
        cluster.create_run(namespace, made, name=name)
    run = wait_for(not_starting(cluster, namespace, "no-claim", '"nowhere" not found'), 60, "the claim's name")
    assert condition(run, "Backpressured") == {}
    words = f"claim 'rates' is not bound: storageclass.storage.k8s.io \"gold-{namespace}\" not found"
    run = wait_for(not_starting(cluster, namespace, "no-class", words), 90, "the class' name")
    assert condition(run, "Backpressured") == {}


@pytest.fixture
def pod_webhook(cluster: Cluster, namespace: str) -> Iterator[Callable[[], None]]:
    """A webhook for the namespace's pods that cannot be called, until the function is called."""
    api = client.AdmissionregistrationV1Api(cluster.api)
    name = f"{namespace}-injector"
    hook = {
        "name": "inject.example.com",
        "admissionReviewVersions": ["v1"],
        "sideEffects": "None",
        "failurePolicy": "Fail",
        "timeoutSeconds": 2,
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": namespace}},
        "rules": [{"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["pods"]}],
        "clientConfig": {"service": {"namespace": namespace, "name": "injector"}},
    }
    admission: Any = api
    admission.create_mutating_webhook_configuration({"metadata": {"name": name}, "webhooks": [hook]})
    gone = False

    def remove() -> None:
        nonlocal gone
        if not gone:
            api.delete_mutating_webhook_configuration(name)
            gone = True

    yield remove
    remove()


@pytest.mark.waits
def test_a_webhook_for_pods_that_is_down_holds_the_run_until_it_is_back(
    cluster: Cluster,
    namespace: str,
    operator: OperatorProcess,
    wait_for: WaitFor,
    pod_webhook: Callable[[], None],
) -> None:
    """The grace of a pod that is refused is over long before: nobody is refused here."""
    made = spec(batches={"partitions": {"count": 4}}, parallelism=2, hooks=None, retries=0)
    cluster.create_run(namespace, {**made, "podStart": {"refusedSeconds": 1}}, name="injected")

    def held() -> Json:
        run = cluster.run(namespace, "injected")
        told = condition(run, "Backpressured")
        assert (told.get("status"), told.get("reason")) == ("True", "WebhookUnavailable"), run["status"]
        return run

    run = wait_for(held, 60, "Backpressured")
    assert 'failed calling webhook "inject.example.com"' in condition(run, "Succeeded")["message"]
    assert (run["status"]["phase"], run["status"]["failures"]) == ("Running", [])
    assert len(cluster.jobs(namespace)) == 2
    pod_webhook()
    run = wait_for(in_phase(cluster, namespace, "injected", "Succeeded"), 90, "Succeeded")
    assert run["status"]["failures"] == []
    assert condition(run, "Backpressured")["status"] == "False"
