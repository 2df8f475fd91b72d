"""Runs on a real API server, job controller and scheduler; KWOK plays the kubelet. The audit log is the judge."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from dev.demo.audit import first_cancelled, name_of, stored_creates
from kubernetes import client

from tests.api.conftest import Cluster, Json, WaitFor, _wait_for
from tests.api.operator_process import OperatorProcess

Audit = Callable[[str], list[Json]]
CANCELLED_LINE = "ingest run cancelled, skipping"


def spec(annotations: dict[str, str] | None = None, **changes: Any) -> Json:
    """A run whose pods are played by KWOK, as the annotations say."""
    container = {"image": "example/worker:1"}
    made: Json = {
        "fetch": container,
        "hooks": [{"name": "check", "container": container}],
        "publish": container,
        "batches": {"cursor": {}, "size": 10},
        "backoff": {"initialSeconds": 1, "maxSeconds": 2},
        "podTemplate": {
            "annotations": {f"simulate.ingestrun.dev/{key}": value for key, value in (annotations or {}).items()},
            "nodeSelector": {"ingestrun.dev/simulated": "true"},
            "tolerations": [{"key": "ingestrun.dev/simulated", "operator": "Exists"}],
        },
    }
    made.update(changes)
    return made


def condition(run: Json, kind: str) -> Json:
    return next((c for c in run["status"].get("conditions", ()) if c["type"] == kind), {})


def in_phase(cluster: Cluster, namespace: str, name: str, phase: str) -> Callable[[], Json]:
    def look() -> Json:
        run = cluster.run(namespace, name)
        assert run["status"].get("phase") == phase, run["status"]
        return run

    return look


def drained(cluster: Cluster, namespace: str, name: str) -> Callable[[], Json]:
    def look() -> Json:
        run = cluster.run(namespace, name)
        assert condition(run, "Drained").get("status") == "True", run["status"]
        return run

    return look


def jobs_reach(cluster: Cluster, namespace: str, number: int) -> bool:
    return len(cluster.jobs(namespace)) >= number


def created_jobs(entries: list[Json]) -> list[str]:
    """The Jobs that were stored, in their order."""
    creates = [
        entry
        for entry in entries
        if entry["verb"] == "create"
        and entry["objectRef"]["resource"] == "jobs"
        and "subresource" not in entry["objectRef"]
    ]
    return [name_of(entry) for entry in stored_creates(creates)]


def after_cancelled(entries: list[Json], run: str) -> list[Json]:
    """What came after `phase=Cancelled` was stored."""
    places = [
        number
        for number, entry in enumerate(entries)
        if (entry["objectRef"]["resource"], name_of(entry)) == ("ingestruns", run)
    ]
    found = first_cancelled([entries[number] for number in places])
    assert found is not None, f"the audit log has no write of phase=Cancelled for {run}"
    return entries[places[found] + 1 :]


def assert_nothing_started_after_cancelled(audit: Audit, namespace: str, run: str) -> None:
    # The run may be seen Cancelled a moment before the write of it is in the log.
    (after,) = _wait_for(lambda: [after_cancelled(audit(namespace), run)], 10, "phase=Cancelled in the audit log")
    assert created_jobs(after) == []


def test_cursor_chain(cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor) -> None:
    cluster.create_run(namespace, spec({"batches": "4"}), name="chain")
    run = wait_for(in_phase(cluster, namespace, "chain", "Succeeded"), 120, "Succeeded")
    assert run["status"]["batches"]["published"] == "0-3"
    assert run["status"]["records"] == {"fetched": 40, "rejected": 0, "published": 40}
    names = [job.metadata.name for job in cluster.jobs(namespace)]
    assert len(names) == 12
    finalizers = {name for pod in cluster.pods(namespace) for name in pod.metadata.finalizers or ()}
    assert finalizers <= {"batch.kubernetes.io/job-tracking"}, "the Job controller's own, for a second or two"
    assert not any(job.metadata.finalizers for job in cluster.jobs(namespace))
    assert "finalizers" not in run["metadata"]
    assert list(run["metadata"].get("annotations", {})) == []
    table = cluster.table(namespace)
    row = dict(zip([c["name"] for c in table["columnDefinitions"]], table["rows"][0]["cells"], strict=True))
    assert (row["Phase"], row["Reason"], row["Published"]) == ("Succeeded", "Completed", 40)


def test_partitions_with_retries(
    cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor
) -> None:
    annotations = {"rows": "5", "fail-attempts": "1", "fail-stage": "hook", "fail-batch": "2"}
    cluster.create_run(
        namespace, spec(annotations, batches={"partitions": {"values": list("abcdef")}}, parallelism=3), name="parts"
    )
    run = wait_for(in_phase(cluster, namespace, "parts", "Succeeded"), 120, "Succeeded")
    assert run["status"]["batches"]["progress"] == "6/6"
    assert run["status"]["records"]["published"] == 30
    (failure,) = run["status"]["failures"]
    assert (failure["batch"], failure["stage"], failure["attempt"]) == (2, "hook check", 0)
    assert cluster.told(namespace, "StageFailed") == [
        "batch 2, hook check, attempt 1: Error: exit code 1: simulated failure; retry 1 of 3 in 1 s"
    ]


def test_permanent_failure_fails_the_run_with_its_reason(
    cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor
) -> None:
    cluster.create_run(namespace, spec({"fail-attempts": "9", "exit-code": "65"}), name="broken")
    run = wait_for(in_phase(cluster, namespace, "broken", "Failed"), 60, "Failed")
    assert condition(run, "Stalled")["message"].startswith("batch 0, fetch, attempt 1: PermanentError: exit code 65")
    assert len(cluster.jobs(namespace)) == 1


@pytest.mark.parametrize("message", ["<html>busy</html>", '{"v":"v7","outcome":"done"}'])
def test_result_that_cannot_be_taken(
    message: str, cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor
) -> None:
    cluster.create_run(namespace, spec({"message": message}, retries=0), name="garbage")
    run = wait_for(in_phase(cluster, namespace, "garbage", "Failed"), 60, "Failed")
    assert run["status"]["failures"][0]["reason"] == "ResultInvalid"
    assert run["status"]["records"]["fetched"] == 0


def test_quota_is_backpressure_until_there_is_room(
    cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor
) -> None:
    quota = client.V1ResourceQuota(
        metadata=client.V1ObjectMeta(name="jobs"), spec=client.V1ResourceQuotaSpec(hard={"count/jobs.batch": "1"})
    )
    cluster.core.create_namespaced_resource_quota(namespace, quota)
    wait_for(
        lambda: cluster.core.read_namespaced_resource_quota("jobs", namespace).to_dict()["status"]["used"],
        30,
        "the quota to be counted",
    )
    cluster.create_run(
        namespace,
        spec(batches={"partitions": {"count": 3}}, parallelism=3, backpressure={"retrySeconds": 1}),
        name="full",
    )

    def held() -> Json:
        found = condition(cluster.run(namespace, "full"), "Backpressured")
        return found if found.get("status") == "True" else {}

    # The one that was seen: with the first Job's end there may be room for the next.
    assert wait_for(held, 60, "Backpressured")["reason"] == "QuotaExceeded"
    cluster.core.delete_namespaced_resource_quota("jobs", namespace)
    run = wait_for(in_phase(cluster, namespace, "full", "Succeeded"), 120, "Succeeded")
    assert condition(run, "Backpressured")["status"] == "False"


def test_cancel_with_pods_running_pending_and_unborn(
    cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor, audit: Audit
) -> None:
    """Started pods finish, their results are told apart; nothing is started; Drained says when all is quiet."""
    cluster.create_run(
        namespace, spec({"hold": "true"}, batches={"partitions": {"count": 9}}, parallelism=3), name="held"
    )

    def all_running() -> bool:
        pods = cluster.pods(namespace)
        return len(pods) == 3 and all(pod.status.phase == "Running" for pod in pods)

    wait_for(all_running, 60, "three running pods")
    cluster.cancel(namespace, "held", "wrong source")
    run = wait_for(in_phase(cluster, namespace, "held", "Cancelled"), 30, "Cancelled")
    assert run["status"]["completionTime"]
    assert run["status"]["cancellation"]["reason"] == "wrong source"
    assert run["status"]["cancellation"]["activeBatches"] == 3
    assert condition(run, "Drained")["status"] == "False"
    for pod in cluster.pods(namespace):
        release = {"metadata": {"annotations": {"simulate.ingestrun.dev/hold": None}}}
        cluster.core.patch_namespaced_pod(pod.metadata.name, namespace, release)
    run = wait_for(drained(cluster, namespace, "held"), 60, "Drained")
    assert run["status"]["cancellation"]["notPublished"] == "0-2"
    assert run["status"]["records"]["fetched"] == 0
    skipped = {(line["batch"], line["stage"]) for line in operator.lines(CANCELLED_LINE)}
    assert {(0, "hook check"), (1, "hook check"), (2, "hook check")} <= skipped
    assert_nothing_started_after_cancelled(audit, namespace, "held")
    assert cluster.told(namespace, "Cancelled")
    assert cluster.told(namespace, "Drained")


def test_cancel_deletes_pods_that_have_not_started(
    cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor, audit: Audit
) -> None:
    cluster.create_run(namespace, spec({"pending": "true"}), name="waiting")
    wait_for(lambda: cluster.pods(namespace), 60, "a pending pod")
    cluster.cancel(namespace, "waiting")
    wait_for(drained(cluster, namespace, "waiting"), 60, "Drained")
    assert cluster.jobs(namespace) == []
    assert_nothing_started_after_cancelled(audit, namespace, "waiting")


def test_cancelled_at_creation(
    cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor, audit: Audit
) -> None:
    cluster.create_run(namespace, spec(cancel=True), name="stillborn")
    wait_for(drained(cluster, namespace, "stillborn"), 60, "Drained")
    assert cluster.run(namespace, "stillborn")["status"]["phase"] == "Cancelled"
    assert created_jobs(audit(namespace)) == []


def test_cancelled_while_the_operator_is_down_starts_nothing_on_its_return(
    cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor, audit: Audit
) -> None:
    cluster.create_run(namespace, spec({"batches": "50", "run-seconds": "1"}), name="down")
    wait_for(lambda: len(cluster.jobs(namespace)) >= 4, 60, "a few Jobs")
    operator.kill()
    cluster.cancel(namespace, "down", "while down")
    before = len(created_jobs(audit(namespace)))
    operator.start()
    wait_for(drained(cluster, namespace, "down"), 60, "Drained")
    assert cluster.run(namespace, "down")["status"]["phase"] == "Cancelled"
    assert len(created_jobs(audit(namespace))) == before


def test_killed_operator_goes_on_exactly_there(
    cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor, audit: Audit
) -> None:
    cluster.create_run(namespace, spec({"batches": "12"}, parallelism=4), name="killed")
    for number in (5, 15):
        wait_for(partial(jobs_reach, cluster, namespace, number), 90, f"{number} Jobs")
        operator.kill()
        operator.start()
    run = wait_for(in_phase(cluster, namespace, "killed", "Succeeded"), 120, "Succeeded")
    assert run["status"]["batches"]["published"] == "0-11"
    assert run["status"]["records"] == {"fetched": 120, "rejected": 0, "published": 120}
    names = created_jobs(audit(namespace))
    assert len(names) == len(set(names)) == 36


def test_suspend_and_resume(
    cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor, audit: Audit
) -> None:
    cluster.create_run(namespace, spec({"batches": "6"}), name="paused")
    wait_for(lambda: len(cluster.jobs(namespace)) >= 3, 60, "a few Jobs")
    cluster.patch_spec(namespace, "paused", suspend=True)
    wait_for(in_phase(cluster, namespace, "paused", "Suspended"), 30, "Suspended")
    wait_for(lambda: all(job.status.completion_time for job in cluster.jobs(namespace)), 60, "all Jobs to end")
    before = len(created_jobs(audit(namespace)))
    cluster.patch_spec(namespace, "paused", suspend=None)
    run = wait_for(in_phase(cluster, namespace, "paused", "Succeeded"), 120, "Succeeded")
    assert run["status"]["records"]["published"] == 60
    assert len(created_jobs(audit(namespace))) == 18 > before


def test_deleted_run_takes_its_jobs_along_and_starts_no_more(
    cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor
) -> None:
    cluster.create_run(namespace, spec({"hold": "true"}), name="gone")
    wait_for(lambda: cluster.jobs(namespace), 60, "a Job")
    cluster.custom.delete_namespaced_custom_object("ingestrun.dev", "v1alpha1", namespace, "ingestruns", "gone")
    wait_for(lambda: not cluster.jobs(namespace), 60, "the Jobs to go")


def test_two_replicas_only_one_acts(
    cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor, audit: Audit, tmp_path: Path
) -> None:
    """Not even two that both act (no lease) double anything: deterministic names and compare-and-set hold."""
    second = OperatorProcess(
        kubeconfig=cluster.kubeconfig, context=cluster.context, namespace=namespace, log=tmp_path / "second.log"
    )
    second.start()
    try:
        cluster.create_run(namespace, spec({"batches": "5"}), name="twice")
        run = wait_for(in_phase(cluster, namespace, "twice", "Succeeded"), 120, "Succeeded")
    finally:
        second.stop()
    assert run["status"]["records"]["published"] == 50
    names = created_jobs(audit(namespace))
    assert len(names) == len(set(names)) == 15
