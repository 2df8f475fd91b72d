"""Caps, quotas and queues on a real API server with its Job controller, quota admission and Events."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kubernetes import client

from tests.api.conftest import Cluster, Json, WaitFor
from tests.api.operator_process import OperatorProcess
from tests.api.test_runs import Audit, condition, created_jobs, drained, in_phase, spec

QUEUE = "kueue.x-k8s.io/queue-name"
CAP = 4


@pytest.fixture
def operator(
    cluster: Cluster, crd: Json, namespace: str, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[OperatorProcess]:
    """The operator of this checkout, watching the test's namespace alone; a parameter is its settings."""
    assert crd
    process = OperatorProcess(
        kubeconfig=cluster.kubeconfig,
        context=cluster.context,
        namespace=namespace,
        log=tmp_path / "operator.log",
        settings=getattr(request, "param", None),
    )
    process.start()
    yield process
    process.stop()


def partitions(count: int, parallelism: int, annotations: dict[str, str] | None = None, **changes: Any) -> Json:
    return spec(
        annotations,
        batches={"partitions": {"count": count}},
        parallelism=parallelism,
        backpressure={"retrySeconds": 2, **changes.pop("backpressure", {})},
        **changes,
    )


def quota(cluster: Cluster, namespace: str, wait_for: WaitFor, **hard: str) -> None:
    """A ResourceQuota that is in force: the quota controller has counted."""
    names = {name.replace("_", "/"): value for name, value in hard.items()}
    body = client.V1ResourceQuota(
        metadata=client.V1ObjectMeta(name="quota"), spec=client.V1ResourceQuotaSpec(hard=names)
    )
    cluster.core.create_namespaced_resource_quota(namespace, body)
    wait_for(
        lambda: cluster.core.read_namespaced_resource_quota("quota", namespace).to_dict()["status"]["hard"] == names,
        30,
        "the quota to be counted",
    )


JOBS = "count_jobs.batch"


def unfinished(cluster: Cluster, namespace: str) -> int:
    """The Jobs that have not ended, as the caps count them: neither the Job nor its pod says so."""
    jobs = cluster.jobs(namespace)
    ended = {
        pod.metadata.owner_references[0].uid
        for pod in cluster.pods(namespace)
        if pod.status.phase in ("Succeeded", "Failed")
    }
    done = {
        job.metadata.uid for job in jobs if any(c.type in ("Complete", "Failed") for c in job.status.conditions or ())
    }
    return sum(1 for job in jobs if job.metadata.uid not in done | ended)


def backpressured(cluster: Cluster, namespace: str, name: str, reason: str) -> Json:
    found = condition(cluster.run(namespace, name), "Backpressured")
    assert (found["status"], found["reason"]) == ("True", reason), found
    return found


def published(run: Json) -> int:
    return int(run["status"]["batches"]["progress"].partition("/")[0])


@pytest.mark.parametrize("operator", [{"INGESTRUN_MAX_JOBS": str(CAP)}], indirect=True)
def test_a_big_and_a_small_run_share_a_cap(
    cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor
) -> None:
    cluster.create_run(namespace, partitions(200, 50, {"run-seconds": "1"}), name="big")
    held = wait_for(lambda: backpressured(cluster, namespace, "big", "JobLimitReached"), 60, "the cap")
    assert "limit of 4 unfinished Jobs in all (INGESTRUN_MAX_JOBS)" in held["message"]
    most = 0
    cluster.create_run(namespace, partitions(3, 3, {"run-seconds": "1"}), name="small")
    deadline = time.monotonic() + 240
    while cluster.run(namespace, "small")["status"].get("phase") != "Succeeded":
        most = max(most, unfinished(cluster, namespace))
        assert time.monotonic() < deadline, "the small run starves"
    assert most == CAP
    assert published(cluster.run(namespace, "big")) < 60
    operator.kill()
    operator.start()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        assert unfinished(cluster, namespace) <= CAP, "the killed process's Jobs were not counted"
    cluster.cancel(namespace, "big")
    wait_for(drained(cluster, namespace, "big"), 60, "Drained")


def test_a_big_and_a_small_run_share_a_quota_on_jobs(
    cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor
) -> None:
    """The quota counts finished Jobs as well: those of published batches go, and nobody waits for ever."""
    quota(cluster, namespace, wait_for, **{JOBS: "9"})
    cluster.create_run(namespace, partitions(24, 3), name="big")
    wait_for(lambda: backpressured(cluster, namespace, "big", "QuotaExceeded"), 60, "Backpressured")
    cluster.create_run(namespace, partitions(3, 3), name="small")
    wait_for(in_phase(cluster, namespace, "small", "Succeeded"), 90, "Succeeded")
    assert published(cluster.run(namespace, "big")) < 24
    run = wait_for(in_phase(cluster, namespace, "big", "Succeeded"), 90, "Succeeded")
    assert run["status"]["records"] == {"fetched": 240, "rejected": 0, "published": 240}
    assert condition(run, "Backpressured")["status"] == "False"


@pytest.mark.parametrize("mode", ["chain", "partitions"])
def test_a_quota_of_one_job_is_enough(
    mode: str, cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor, audit: Audit
) -> None:
    """What ended Jobs have come to is kept in the status, and they go: nothing hangs, no Job is created twice."""
    quota(cluster, namespace, wait_for, **{JOBS: "1"})
    changes: Json = {"parallelism": 3, "backpressure": {"retrySeconds": 2}}
    if mode == "chain":
        body = spec({"batches": "3"}, batches={"cursor": {}, "size": 10}, **changes)
    else:
        body = spec(batches={"partitions": {"count": 3}}, **changes)
    cluster.create_run(namespace, body, name="run")
    run = wait_for(in_phase(cluster, namespace, "run", "Succeeded"), 120, "Succeeded")
    assert run["status"]["records"] == {"fetched": 30, "rejected": 0, "published": 30}
    assert run["status"]["batches"]["published"] == "0-2"
    made = created_jobs(audit(namespace))
    assert len(made) == 3 * (2 + len(body.get("hooks", ())))


def test_a_quota_on_pods_is_backpressure_by_the_job_controllers_event(
    cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor
) -> None:
    quota(cluster, namespace, wait_for, pods="0")
    cluster.create_run(namespace, partitions(3, 2), name="full")
    held = wait_for(lambda: backpressured(cluster, namespace, "full", "QuotaExceeded"), 60, "Backpressured")
    assert "exceeded quota: quota, requested: pods=1, used: pods=0, limited: pods=0" in held["message"]
    cluster.core.patch_namespaced_resource_quota("quota", namespace, {"spec": {"hard": {"pods": "5"}}})
    run = wait_for(in_phase(cluster, namespace, "full", "Succeeded"), 120, "Succeeded")
    assert run["status"]["failures"] == []


@pytest.fixture
def room(cluster: Cluster, namespace: str) -> Iterator[Callable[[], None]]:
    """Gives a simulated node the label that only this test's pods ask for: before, no node has room for them."""
    core: Any = cluster.core
    node = core.list_node(label_selector="ingestrun.dev/simulated=true").items[0].metadata.name

    def label(value: str | None) -> None:
        core.patch_node(node, {"metadata": {"labels": {f"test.ingestrun.dev/{namespace}": value}}})

    yield lambda: label("room")
    label(None)


def test_a_pod_that_waits_for_a_node_for_longer_than_its_deadline_costs_no_attempt(
    cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor, room: Callable[[], None]
) -> None:
    stage = {"image": "example/worker:1", "activeDeadlineSeconds": 2}
    made = partitions(1, 1, fetch=stage, hooks=None, publish=stage, retries=0)
    made["podTemplate"]["nodeSelector"][f"test.ingestrun.dev/{namespace}"] = "room"
    cluster.create_run(namespace, made, name="waits")
    wait_for(lambda: backpressured(cluster, namespace, "waits", "NodeMismatch"), 60, "Backpressured")
    since = time.monotonic()
    wait_for(lambda: time.monotonic() - since > 8, 30, "four times the deadline")
    backpressured(cluster, namespace, "waits", "NodeMismatch")
    (job,) = cluster.jobs(namespace)
    assert (job.metadata.labels["ingestrun.dev/attempt"], job.status.active) == ("0", 1)
    room()
    run = wait_for(in_phase(cluster, namespace, "waits", "Succeeded"), 60, "Succeeded")
    assert (run["status"]["retries"], run["status"]["failures"]) == ([], [])
    assert {job.metadata.labels["ingestrun.dev/attempt"] for job in cluster.jobs(namespace)} == {"0"}


def test_a_limit_range_that_refuses_the_pod_is_told_and_cancel_works(
    cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor
) -> None:
    limits = client.V1LimitRangeSpec(limits=[client.V1LimitRangeItem(type="Container", max={"memory": "1Gi"})])
    cluster.core.create_namespaced_limit_range(
        namespace, client.V1LimitRange(metadata=client.V1ObjectMeta(name="limits"), spec=limits)
    )
    fat = {"image": "example/worker:1", "resources": {"limits": {"memory": "2Gi"}}}
    cluster.create_run(namespace, partitions(1, 1, fetch=fat), name="fat")

    def told() -> bool:
        message = condition(cluster.run(namespace, "fat"), "Reconciling")["message"]
        return "maximum memory usage per Container is 1Gi, but limit is 2Gi" in message

    wait_for(told, 60, "the sentence")
    assert condition(cluster.run(namespace, "fat"), "Reconciling")["reason"] == "PodNotStarting"
    assert condition(cluster.run(namespace, "fat"), "Backpressured") == {}
    cluster.cancel(namespace, "fat")
    wait_for(drained(cluster, namespace, "fat"), 60, "Drained")
    assert cluster.jobs(namespace) == []


def test_under_a_quota_of_zero_cancel_suspend_and_the_time_out_work(
    cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor
) -> None:
    quota(cluster, namespace, wait_for, **{JOBS: "0"})
    for name, wait in (("cancelled", {}), ("impatient", {"timeoutSeconds": 15}), ("paused", {"timeoutSeconds": 24})):
        cluster.create_run(namespace, partitions(3, 3, backpressure=wait), name=name)
    for name in ("impatient", "paused", "cancelled"):  # those first that do not stay so
        wait_for(lambda name=name: backpressured(cluster, namespace, name, "QuotaExceeded"), 60, "Backpressured")  # type: ignore[misc]
    cluster.patch_spec(namespace, "paused", suspend=True)
    cluster.cancel(namespace, "cancelled", "no room here")
    wait_for(drained(cluster, namespace, "cancelled"), 60, "Drained")
    run = wait_for(in_phase(cluster, namespace, "impatient", "Failed"), 60, "Failed")
    assert condition(run, "Succeeded")["reason"] == "BackpressureTimeout"
    assert "limited: count/jobs.batch=0" in condition(run, "Succeeded")["message"]
    wait_for(in_phase(cluster, namespace, "paused", "Suspended"), 30, "Suspended")
    assert condition(cluster.run(namespace, "paused"), "Backpressured")["status"] == "False"
    cluster.core.delete_namespaced_resource_quota("quota", namespace)
    cluster.patch_spec(namespace, "paused", suspend=None)
    wait_for(in_phase(cluster, namespace, "paused", "Succeeded"), 90, "Succeeded")
    assert cluster.run(namespace, "cancelled")["status"]["batches"]["fetched"] == ""


class HandmadeKueue:
    """What Kueue does to Jobs that name a queue, as far as anybody sees: it sets `spec.suspend`.

    Kueue itself is not on these machines. Its webhook would suspend what is not; admission unsuspends, preemption
    suspends again (its status' start time is reset by a patch of the status first).
    """

    def __init__(self, cluster: Cluster, namespace: str) -> None:
        self._cluster, self._namespace = cluster, namespace
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._admit_all, daemon=True)

    def suspend(self, name: str, suspended: bool) -> None:
        self._cluster.batch.patch_namespaced_job(name, self._namespace, {"spec": {"suspend": suspended}})

    def start(self) -> None:
        """Admit whatever waits, from now on."""
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _admit_all(self) -> None:
        while not self._stop.wait(0.2):
            for job in self._cluster.jobs(self._namespace):
                if job.spec.suspend and (job.metadata.labels or {}).get(QUEUE) == "team-a":
                    self.suspend(job.metadata.name, suspended=False)


def running_pods(cluster: Cluster, namespace: str) -> list[Any]:
    return [
        pod
        for pod in cluster.pods(namespace)
        if pod.status.phase == "Running" and pod.metadata.deletion_timestamp is None
    ]


def test_queued_admitted_preempted_and_admitted_again(
    cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor, audit: Audit
) -> None:
    labels = {QUEUE: "team-a", "kueue.x-k8s.io/priority-class": "high"}
    cluster.create_run(
        namespace, spec({"hold": "true", "batches": "1"}, retries=0), name="queued", metadata={"labels": labels}
    )
    (job,) = wait_for(lambda: cluster.jobs(namespace), 60, "a Job")
    assert job.spec.suspend is True
    assert labels.items() <= job.metadata.labels.items()

    def reason(expected: str) -> bool:
        found = condition(cluster.run(namespace, "queued"), "Reconciling")
        assert found["reason"] == expected, found
        return True

    wait_for(lambda: reason("Queued"), 30, "Queued")
    kueue = HandmadeKueue(cluster, namespace)
    kueue.suspend(job.metadata.name, suspended=False)
    (pod,) = wait_for(lambda: running_pods(cluster, namespace), 30, "a running pod")
    wait_for(lambda: reason("Running"), 30, "Running")
    kueue.suspend(job.metadata.name, suspended=True)
    wait_for(lambda: not cluster.pods(namespace), 60, "the pod to go")
    wait_for(lambda: reason("Queued"), 30, "Queued again")
    kueue.suspend(job.metadata.name, suspended=False)
    (again,) = wait_for(lambda: running_pods(cluster, namespace), 30, "a new pod")
    assert again.metadata.uid != pod.metadata.uid
    kueue.start()
    try:
        released: set[str] = set()

        def finished() -> bool:
            for running in running_pods(cluster, namespace):
                if running.metadata.name not in released:
                    release = {"metadata": {"annotations": {"simulate.ingestrun.dev/hold": None}}}
                    cluster.core.patch_namespaced_pod(running.metadata.name, namespace, release)
                    released.add(running.metadata.name)
            return bool(cluster.run(namespace, "queued")["status"]["phase"] == "Succeeded")

        wait_for(finished, 90, "Succeeded")
    finally:
        kueue.stop()
    status = cluster.run(namespace, "queued")["status"]
    assert status["failures"] == []
    assert status["records"]["published"] == 10
    assert len(created_jobs(audit(namespace))) == 3, "no attempt was wasted"


def test_cancel_deletes_queued_jobs_also_a_preempted_one(
    cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor, audit: Audit
) -> None:
    queue = {"labels": {QUEUE: "team-a"}}
    cluster.create_run(namespace, partitions(2, 2, {"hold": "true"}), name="waits", metadata=queue)
    wait_for(lambda: len(cluster.jobs(namespace)) == 2, 60, "two Jobs")
    kueue, name = HandmadeKueue(cluster, namespace), cluster.jobs(namespace)[0].metadata.name
    kueue.suspend(name, suspended=False)
    wait_for(lambda: running_pods(cluster, namespace), 30, "a running pod")
    kueue.suspend(name, suspended=True)
    wait_for(lambda: not cluster.pods(namespace), 60, "the pod to go")
    cluster.cancel(namespace, "waits")
    wait_for(drained(cluster, namespace, "waits"), 60, "Drained")
    assert cluster.jobs(namespace) == []
    entries = [entry for entry in audit(namespace) if entry["objectRef"]["resource"] == "jobs"]
    ours = {entry["verb"] for entry in entries if entry["userAgent"].startswith("ingestrun-operator")}
    assert "create" in ours
    assert not ours & {"patch", "update"}, "it never unsuspends"
