"""Pods under a user that the platform chooses, as OpenShift does: unknown to the image, in group 0, no /tmp."""

from __future__ import annotations

from tests.e2e.cluster import Kubectl, phase
from tests.e2e.runs import ended, flights, published

USER = 1000650000


def test_the_built_in_worker_runs_as_any_user(kubectl: Kubectl, namespace: str) -> None:
    """On a volume of its own, because what is in the others' belongs to their user."""
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": "any-user", "namespace": namespace},
        "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}},
    }
    run = flights(
        namespace,
        "any-user",
        workspace={"persistentVolumeClaim": {"claimName": "any-user"}},
        podTemplate={"securityContext": {"runAsUser": USER, "runAsGroup": 0, "fsGroup": USER}},
        batches={"cursor": {}, "size": 20_000, "limit": 20_000},
    )
    kubectl.apply([claim, run])
    run = ended(kubectl, namespace, "any-user", seconds=180)
    assert (phase(run), published(run)) == ("Succeeded", 20_000)
    pods = kubectl.get("-n", namespace, "pods", "-l", "ingestrun.dev/run=any-user")["items"]
    assert {pod["spec"]["securityContext"]["runAsUser"] for pod in pods} == {USER}
    assert all("emptyDir" not in volume for pod in pods for volume in pod["spec"]["volumes"])
