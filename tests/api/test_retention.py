"""What stays of a run's Jobs, and which image they run, on a real API server."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.api.conftest import Cluster, Json, WaitFor
from tests.api.operator_process import OperatorProcess
from tests.api.test_runs import condition, in_phase, spec

Audit = Callable[[str], list[Json]]
DIGEST = "sha256:" + "a" * 64


def batches_left(cluster: Cluster, namespace: str) -> set[int]:
    return {int(job.metadata.labels["ingestrun.dev/batch"]) for job in cluster.jobs(namespace)}


def deletes(entries: list[Json]) -> list[str]:
    """The operator's deletes of Jobs, one and many."""
    return [
        entry["verb"]
        for entry in entries
        if entry["objectRef"]["resource"] == "jobs"
        and entry["verb"] in ("delete", "deletecollection")
        and "ingestrun" in entry.get("userAgent", "")
    ]


@pytest.mark.waits
def test_jobs_go_in_numbers_and_the_newest_failed_ones_stay_with_their_pods(
    cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor, audit: Audit
) -> None:
    annotations = {"fail-attempts": "9", "fail-stage": "publish", "fail-batch": "7"}
    cluster.create_run(
        namespace,
        spec(
            annotations,
            hooks=None,
            retries=0,
            batches={"partitions": {"count": 70}},
            parallelism=20,
            onBatchFailure="Continue",
        ),
        name="many",
    )
    run = wait_for(in_phase(cluster, namespace, "many", "Succeeded"), 200, "Succeeded")
    assert run["status"]["batches"]["failed"] == "7"
    # Too few for a call of their own, what was in flight at the end, and the failed one.
    assert len(batches_left(cluster, namespace)) <= 31 + 20 + 1
    wait_for(lambda: batches_left(cluster, namespace) == {7}, 100, "the last sweep")
    pods = cluster.pods(namespace, "ingestrun.dev/batch=7,ingestrun.dev/stage=publish")
    assert [pod.status.phase for pod in pods] == ["Failed"]
    assert len(deletes(audit(namespace))) <= 3
    cluster.patch_spec(namespace, "many", jobRetention={"secondsAfterFinished": 0})
    wait_for(lambda: not cluster.jobs(namespace), 30, "all Jobs to go")
    assert cluster.run(namespace, "many")["status"]["phase"] == "Succeeded"


def test_later_jobs_run_what_the_first_pod_ran(
    cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor
) -> None:
    """The simulated kubelet names no digest, so the test does, while the first fetch is held."""
    container = {"image": "example/worker:1"}
    cluster.create_run(namespace, spec({"hold": "true", "batches": "2"}, fetch=container), name="pinned")

    def running() -> Any:
        pods = cluster.pods(namespace)
        assert len(pods) == 1
        (pod,) = pods
        assert pod.status.phase == "Running"
        return pod

    pod = wait_for(running, 60, "the first fetch to run")
    api: Any = cluster.api
    (status,) = api.sanitize_for_serialization(pod.status.container_statuses)
    ran = {**status, "imageID": f"docker.io/example/worker@{DIGEST}"}
    cluster.core.patch_namespaced_pod_status(pod.metadata.name, namespace, {"status": {"containerStatuses": [ran]}})
    release = {"metadata": {"annotations": {"simulate.ingestrun.dev/hold": None}}}
    cluster.core.patch_namespaced_pod(pod.metadata.name, namespace, release)

    def later() -> list[Any]:
        jobs = [job for job in cluster.jobs(namespace) if job.metadata.name != pod.metadata.labels["job-name"]]
        assert len(jobs) == 2
        return jobs

    jobs = wait_for(later, 60, "the hook and the next fetch")
    images = {job.spec.template.spec.containers[0].image for job in jobs}
    assert images == {f"example/worker@{DIGEST}"}
    run = cluster.run(namespace, "pinned")
    assert run["status"]["images"] == [{"steps": "0-2", "digest": DIGEST}]
    assert condition(run, "Finished")["status"] == "False"
