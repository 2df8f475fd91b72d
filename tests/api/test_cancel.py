"""How hard, how deep, and what comes after: Terminate, cascade, onCancel, on a real API server."""

from __future__ import annotations

from pathlib import Path

import pytest
from kubernetes import client

from tests.api.conftest import Cluster, Json, WaitFor, refusal
from tests.api.operator_process import OperatorProcess
from tests.api.test_runs import (
    Audit,
    after_cancelled,
    assert_nothing_started_after_cancelled,
    condition,
    created_jobs,
    drained,
    in_phase,
    spec,
)

THREE = {"partitions": {"count": 3}}


def three_running(cluster: Cluster, namespace: str) -> bool:
    pods = cluster.pods(namespace)
    return len(pods) == 3 and all(pod.status.phase == "Running" for pod in pods)


def test_terminate_ends_running_pods_and_their_jobs(
    cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor, audit: Audit
) -> None:
    cluster.create_run(namespace, spec({"hold": "true"}, batches=THREE), name="hard")
    wait_for(lambda: three_running(cluster, namespace), 60, "three running pods")
    cluster.patch_spec(namespace, "hard", cancel=True, cancellation={"policy": "Terminate", "gracePeriodSeconds": 1})
    run = wait_for(drained(cluster, namespace, "hard"), 60, "Drained")
    assert run["status"]["cancellation"]["policy"] == "Terminate"
    assert run["status"]["cancellation"]["notPublished"] == "0-2"
    wait_for(lambda: not cluster.jobs(namespace), 30, "the Jobs to go")
    assert cluster.told(namespace, "Terminating", "hard") == ["pods that run get SIGTERM"]
    assert_nothing_started_after_cancelled(audit, namespace, "hard")


def test_drain_is_escalated_by_a_second_patch_and_never_taken_back(
    cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor, audit: Audit
) -> None:
    cluster.create_run(namespace, spec({"hold": "true"}, batches=THREE), name="escalated")
    wait_for(lambda: three_running(cluster, namespace), 60, "three running pods")
    cluster.cancel(namespace, "escalated")
    wait_for(in_phase(cluster, namespace, "escalated", "Cancelled"), 30, "Cancelled")
    assert three_running(cluster, namespace)
    cluster.patch_spec(namespace, "escalated", cancellation={"policy": "Terminate"})
    with pytest.raises(client.ApiException) as refused:
        cluster.patch_spec(namespace, "escalated", cancellation={"policy": "Drain"})
    assert "a cancel with Terminate cannot go back to Drain" in refusal(refused.value)
    run = wait_for(drained(cluster, namespace, "escalated"), 60, "Drained")
    assert run["status"]["cancellation"]["policy"] == "Terminate"
    assert_nothing_started_after_cancelled(audit, namespace, "escalated")


def test_cascade_takes_the_tree_along_and_late_children_start_nothing(
    cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor, audit: Audit
) -> None:
    held = {"hold": "true"}
    root = cluster.create_run(namespace, spec(held), name="root")
    owner = {"apiVersion": root["apiVersion"], "kind": root["kind"], "name": "root", "uid": root["metadata"]["uid"]}
    cluster.create_run(namespace, spec(held, parentRef={"name": "root"}), name="branch")
    cluster.create_run(namespace, spec(held, parentRef={"name": "branch"}), name="leaf")
    cluster.create_run(namespace, spec(held), name="owned", metadata={"ownerReferences": [owner]})
    cluster.create_run(
        namespace, spec({"fail-attempts": "9", "exit-code": "65"}, parentRef={"name": "root"}), name="failed"
    )
    cluster.create_run(namespace, spec({"batches": "1"}, parentRef={"name": "nobody"}), name="orphan")
    wait_for(in_phase(cluster, namespace, "failed", "Failed"), 60, "the failed child")
    wait_for(in_phase(cluster, namespace, "orphan", "Succeeded"), 90, "a child without a parent")
    cluster.patch_spec(namespace, "root", cancel=True, cancellation={"cascade": True, "reason": "storm"})
    for name, parent in (("root", None), ("branch", "root"), ("leaf", "branch"), ("owned", "root")):
        run = wait_for(in_phase(cluster, namespace, name, "Cancelled"), 30, f"{name} Cancelled")
        assert run["status"]["cancellation"].get("parent") == parent
        assert "storm" in run["status"]["cancellation"]["reason"]

    def told() -> Json:
        children: Json = cluster.run(namespace, "root")["status"]["cancellation"]["children"]
        assert children == {"cancelled": 2, "endedBefore": 1, "endedBeforeNames": ["failed"], "waiting": 0}
        return children

    wait_for(told, 30, "the parent to tell of its children")
    before = len(created_jobs(audit(namespace)))
    cluster.create_run(namespace, spec(parentRef={"name": "root"}), name="late")
    late = wait_for(in_phase(cluster, namespace, "late", "Cancelled"), 30, "the late child")
    assert late["status"]["cancellation"]["parent"] == "root"
    assert len(created_jobs(audit(namespace))) == before


def test_clean_up_is_the_one_job_after_cancelled(
    cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor, audit: Audit
) -> None:
    cluster.create_run(namespace, spec({"batches": "40"}, onCancel={"image": "example/clean:1"}), name="cleaned")
    wait_for(lambda: len(cluster.jobs(namespace)) >= 4, 60, "a few Jobs")
    cluster.cancel(namespace, "cleaned", "enough")

    def cleaned() -> Json:
        run = cluster.run(namespace, "cleaned")
        assert run["status"]["cancellation"]["onCancel"]["state"] == "Succeeded", run["status"]["cancellation"]
        return run

    wait_for(cleaned, 60, "the clean-up")
    (name,) = created_jobs(after_cancelled(audit(namespace), "cleaned"))
    job = cluster.batch.read_namespaced_job(name, namespace)
    assert job.metadata is not None
    assert (job.metadata.labels or {})["ingestrun.dev/stage"] == "on-cancel"
    assert cluster.told(namespace, "OnCancelSucceeded", "cleaned")


def test_failed_clean_up_is_shown_and_changes_nothing_else(
    cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor
) -> None:
    annotations = {"fail-attempts": "1", "fail-stage": "on-cancel", "exit-code": "3"}
    cluster.create_run(namespace, spec(annotations, cancel=True, onCancel={"image": "example/clean:1"}), name="dirty")

    def failed() -> Json:
        run = cluster.run(namespace, "dirty")
        assert run["status"]["cancellation"]["onCancel"]["state"] == "Failed", run["status"]["cancellation"]
        return run

    run = wait_for(failed, 60, "the clean-up to fail")
    assert run["status"]["phase"] == "Cancelled"
    assert "exit code 3" in run["status"]["cancellation"]["onCancel"]["message"]
    assert condition(run, "Drained")["status"] == "True"
    assert len(cluster.jobs(namespace)) == 1


def test_cancelling_again_changes_nothing_and_clearing_is_answered(
    cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor
) -> None:
    cluster.create_run(namespace, spec(cancel=True, cancellation={"reason": "first"}), name="again")
    before = wait_for(drained(cluster, namespace, "again"), 60, "Drained")
    cluster.cancel(namespace, "again", "second")
    cluster.patch_spec(namespace, "again", cancel=None)
    assert cluster.told(namespace, "CancelCleared", "again")
    after = cluster.run(namespace, "again")
    assert after["status"]["phase"] == "Cancelled"
    assert after["status"]["cancellation"] == before["status"]["cancellation"]
    assert after["status"]["batches"] == before["status"]["batches"]


def test_sigterm_lets_the_operator_give_its_lease_back(
    cluster: Cluster, namespace: str, crd: Json, tmp_path: Path, wait_for: WaitFor
) -> None:
    """The next replica need not wait the lease out."""
    settings = {"INGESTRUN_LEASE_NAMESPACE": namespace, "INGESTRUN_LEASE_NAME": "test"}
    replica = OperatorProcess(
        kubeconfig=cluster.kubeconfig,
        context=cluster.context,
        namespace=namespace,
        log=tmp_path / "replica.log",
        settings=settings,
        elect=True,
    )
    replica.start()
    replica.stop()
    lease = client.CoordinationV1Api(cluster.api).read_namespaced_lease("test", namespace)
    assert not lease.to_dict()["spec"]["holder_identity"]
