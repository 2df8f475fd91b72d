"""Faults that users of other tools have reported, tried on a real API server: docs/proof.md has the list."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from kubernetes import client

from tests.api.conftest import Cluster, Json, WaitFor
from tests.api.operator_process import OperatorProcess
from tests.api.test_runs import condition, in_phase, spec

MEDDLER = "test-public-issues-job-defaults"


@pytest.fixture
def meddling_policy(cluster: Cluster, namespace: str, wait_for: WaitFor) -> Iterator[None]:
    """A policy that gives each Job of the test's namespace more tries than its creator wants."""
    admission = client.CustomObjectsApi(cluster.api)
    group: Json = {"group": "admissionregistration.k8s.io", "version": "v1"}
    policy = {
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "MutatingAdmissionPolicy",
        "metadata": {"name": MEDDLER},
        "spec": {
            "failurePolicy": "Fail",
            "reinvocationPolicy": "Never",
            "matchConstraints": {
                "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": namespace}},
                "resourceRules": [
                    {"apiGroups": ["batch"], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["jobs"]}
                ],
            },
            "mutations": [
                {
                    "patchType": "JSONPatch",
                    "jsonPatch": {"expression": "[JSONPatch{op: 'replace', path: '/spec/backoffLimit', value: 3}]"},
                }
            ],
        },
    }
    binding = {**policy, "kind": "MutatingAdmissionPolicyBinding", "spec": {"policyName": MEDDLER}}
    kinds: Any = (("mutatingadmissionpolicies", policy), ("mutatingadmissionpolicybindings", binding))
    for plural, body in kinds:
        admission.create_cluster_custom_object(**group, plural=plural, body=body)

    def in_force() -> bool:
        job: Any = {"metadata": {"name": "probe"}, "spec": {"template": _pod_template(), "backoffLimit": 0}}
        stored = cluster.batch.create_namespaced_job(namespace, job, dry_run="All")
        assert stored.spec is not None
        return bool(stored.spec.backoff_limit == 3)

    try:
        wait_for(in_force, what="the policy in force")
        yield
    finally:
        for plural, _ in kinds:
            admission.delete_cluster_custom_object(**group, plural=plural, name=MEDDLER)


def _pod_template() -> Json:
    return {"spec": {"restartPolicy": "Never", "containers": [{"name": "c", "image": "example/worker:1"}]}}


def test_job_to_which_a_policy_gives_more_tries_is_taken_back_and_named(
    cluster: Cluster, operator: OperatorProcess, meddling_policy: None, namespace: str, wait_for: WaitFor
) -> None:
    cluster.create_run(namespace, spec(), name="meddled")

    end = condition(wait_for(in_phase(cluster, namespace, "meddled", "Failed")), "Succeeded")
    assert end["reason"] == "JobChanged"
    assert "spec.backoffLimit from 0 to 3" in end["message"]

    def no_job_left() -> bool:
        return not cluster.jobs(namespace)

    wait_for(no_job_left)


def test_cancel_reaches_a_run_that_is_being_deleted_and_that_a_finalizer_holds(
    cluster: Cluster, operator: OperatorProcess, namespace: str, wait_for: WaitFor
) -> None:
    cluster.create_run(namespace, spec({"hold": "true"}), name="held", metadata={"finalizers": ["example.com/hold"]})

    wait_for(in_phase(cluster, namespace, "held", "Running"))
    where: Json = {"group": "ingestrun.dev", "version": "v1alpha1", "plural": "ingestruns", "namespace": namespace}
    cluster.custom.delete_namespaced_custom_object(**where, name="held")
    cluster.patch_spec(namespace, "held", cancel=True, cancellation={"policy": "Terminate"})

    def drained() -> Json:
        run = cluster.run(namespace, "held")
        assert "deletionTimestamp" in run["metadata"]
        assert run["status"]["phase"] == "Cancelled"
        assert condition(run, "Drained").get("status") == "True", run["status"]
        return run

    wait_for(drained, timeout=60)
    cluster.patch_run(namespace, "held", {"metadata": {"finalizers": None}})
