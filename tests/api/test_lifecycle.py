"""Deadlines, staleness, suspension, runs that exclude each other, deletion in time: on a real API server."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes import client

from tests.api.conftest import REPOSITORY, Cluster, Json, WaitFor, refusal
from tests.api.operator_process import OperatorProcess
from tests.api.test_cancel import THREE, three_running
from tests.api.test_runs import (
    Audit,
    assert_nothing_started_after_cancelled,
    condition,
    created_jobs,
    drained,
    in_phase,
    spec,
)

HELD = {"hold": "true"}
HOLD = "simulate.ingestrun.dev/hold"
ONE = {"partitions": {"count": 1}}


def release(cluster: Cluster, namespace: str, run: str) -> None:
    """Let the held pods of a run end."""
    uid = cluster.run(namespace, run)["metadata"]["uid"]
    for pod in cluster.pods(namespace, f"ingestrun.dev/run-uid={uid}"):
        if HOLD in (pod.metadata.annotations or {}):
            go = {"metadata": {"annotations": {HOLD: None}}}
            cluster.core.patch_namespaced_pod(pod.metadata.name, namespace, go)


def running_pods(cluster: Cluster, namespace: str, run: str) -> list[Any]:
    uid = cluster.run(namespace, run)["metadata"]["uid"]
    pods = cluster.pods(namespace, f"ingestrun.dev/run-uid={uid}")
    return [pod for pod in pods if pod.status.phase == "Running"]


def moment(text: str) -> datetime:
    return datetime.fromisoformat(text.replace("Z", "+00:00"))


def received(entry: Json) -> datetime:
    """When the server got the request of an audit log's entry."""
    return moment(entry["requestReceivedTimestamp"])


def over(seconds: float) -> Callable[[], bool]:
    """Whether so much time has passed from now on: for what must not happen meanwhile."""
    end = time.monotonic() + seconds
    return lambda: time.monotonic() >= end


def jobs_in_order(entries: list[Json]) -> list[tuple[str, str]]:
    """The UIDs of the runs whose Jobs were stored, with the Job's name, in the server's order."""
    return [
        (entry["requestObject"]["metadata"]["labels"]["ingestrun.dev/run-uid"], name)
        for entry in entries
        for name in created_jobs([entry])
    ]


# ---- staleness and deadlines --------------------------------------------------------------------------------------


def test_run_without_progress_cancels_itself_and_cleans_up(
    cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor, audit: Audit
) -> None:
    cluster.create_run(
        namespace,
        spec(HELD, batches=THREE, parallelism=3, staleAfterSeconds=3600, onCancel={"image": "example/clean:1"}),
        name="stuck",
    )
    wait_for(lambda: three_running(cluster, namespace), 60, "three running pods")
    cluster.patch_spec(namespace, "stuck", staleAfterSeconds=5)  # now: to start all three may take longer than that
    run = wait_for(in_phase(cluster, namespace, "stuck", "Cancelled"), 60, "Cancelled")
    record = run["status"]["cancellation"]
    assert record["reason"] == "no progress for 5 s (staleAfterSeconds)"
    assert record["requestedBy"] == "ingestrun-operator"
    assert record["activeBatches"] == 3
    assert condition(run, "Cancelled")["reason"] == "Stale"
    assert condition(run, "Drained")["status"] == "False"
    assert_nothing_started_after_cancelled(audit, namespace, "stuck")
    release(cluster, namespace, "stuck")
    wait_for(drained(cluster, namespace, "stuck"), 60, "Drained")
    wait_for(lambda: len(cluster.jobs(namespace, "ingestrun.dev/stage=on-cancel")) == 1, 30, "the clean-up")
    (note,) = cluster.told(namespace, "Cancelled", "stuck")
    assert note == "cancelled by ingestrun-operator: no progress for 5 s (staleAfterSeconds)"


def test_batch_that_takes_longer_but_goes_on_is_not_stale(
    cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor
) -> None:
    """What the seed's reaper got wrong: three stages of 8 s each, none of which is as long as the limit."""
    cluster.create_run(namespace, spec({"run-seconds": "8"}, batches=ONE, staleAfterSeconds=20), name="slow")
    run = wait_for(in_phase(cluster, namespace, "slow", "Succeeded"), 120, "Succeeded")
    took = moment(run["status"]["completionTime"]) - moment(run["status"]["startTime"])
    assert took > timedelta(seconds=20)


def test_deadline_is_changed_while_it_runs_and_stops_while_suspended(
    cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor
) -> None:
    held = spec(HELD, batches=ONE, activeDeadlineSeconds=3600)
    cluster.create_run(namespace, held, name="shortened")
    cluster.create_run(namespace, held, name="paused")
    for name in ("shortened", "paused"):
        wait_for(partial(running_pods, cluster, namespace, name), 60, "a running pod")
    cluster.patch_spec(namespace, "paused", suspend=True)
    wait_for(in_phase(cluster, namespace, "paused", "Suspended"), 30, "Suspended")
    for name in ("shortened", "paused"):
        cluster.patch_spec(namespace, name, activeDeadlineSeconds=2)
    run = wait_for(in_phase(cluster, namespace, "shortened", "Failed"), 30, "Failed")
    assert condition(run, "Succeeded")["reason"] == "DeadlineExceeded"
    assert "activeDeadlineSeconds of 2" in condition(run, "Succeeded")["message"]
    wait_for(over(3), 10, "more than the deadline")
    assert cluster.run(namespace, "paused")["status"]["phase"] == "Suspended"
    cluster.patch_spec(namespace, "paused", suspend=None)
    run = wait_for(in_phase(cluster, namespace, "paused", "Failed"), 30, "Failed")
    resumed = moment(condition(run, "Suspended")["lastTransitionTime"])
    assert moment(run["status"]["completionTime"]) - resumed >= timedelta(seconds=1), "it began anew"


# ---- suspend and resume ---------------------------------------------------------------------------------------------


def test_suspended_run_counts_what_runs_and_goes_on_exactly_there(
    cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor, audit: Audit
) -> None:
    cluster.create_run(namespace, spec(HELD, batches={"partitions": {"count": 4}}, parallelism=3), name="paused")
    wait_for(lambda: three_running(cluster, namespace), 60, "three running pods")
    cluster.patch_spec(namespace, "paused", suspend=True)
    wait_for(in_phase(cluster, namespace, "paused", "Suspended"), 30, "Suspended")
    release(cluster, namespace, "paused")

    def counted() -> Json:
        run = cluster.run(namespace, "paused")
        assert run["status"]["phase"] == "Suspended", run["status"]
        assert run["status"]["batches"]["fetched"] == "0-2", run["status"]
        return run

    run = wait_for(counted, 60, "the running fetches to be counted")
    assert run["status"]["records"]["fetched"] == 30
    assert condition(run, "Suspended")["status"] == "True"
    wait_for(over(2), 10, "time to start something wrongly")
    assert len(created_jobs(audit(namespace))) == 3
    cluster.patch_spec(namespace, "paused", suspend=None)

    def succeeded() -> Json:
        release(cluster, namespace, "paused")
        return in_phase(cluster, namespace, "paused", "Succeeded")()

    run = wait_for(succeeded, 120, "Succeeded")
    assert run["status"]["records"] == {"fetched": 40, "rejected": 0, "published": 40}
    assert condition(run, "Suspended")["status"] == "False"
    names = created_jobs(audit(namespace))
    assert len(names) == len(set(names)) == 12


def test_suspended_between_two_attempts(
    cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor, audit: Audit
) -> None:
    cluster.create_run(
        namespace,
        spec(
            {"fail-attempts": "1", "fail-stage": "fetch"}, batches=ONE, backoff={"initialSeconds": 8, "maxSeconds": 8}
        ),
        name="backoff",
    )
    wait_for(lambda: cluster.run(namespace, "backoff")["status"].get("failures"), 60, "the failed attempt")
    cluster.patch_spec(namespace, "backoff", suspend=True)
    wait_for(in_phase(cluster, namespace, "backoff", "Suspended"), 30, "Suspended")
    wait_for(over(9), 10, "more than the backoff")
    assert len(created_jobs(audit(namespace))) == 1
    cluster.patch_spec(namespace, "backoff", suspend=None)
    run = wait_for(in_phase(cluster, namespace, "backoff", "Succeeded"), 120, "Succeeded")
    assert run["status"]["records"]["published"] == 10
    assert len(created_jobs(audit(namespace))) == 4


def test_suspended_while_there_is_no_room(
    cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor, audit: Audit
) -> None:
    quota = client.V1ResourceQuota(
        metadata=client.V1ObjectMeta(name="jobs"), spec=client.V1ResourceQuotaSpec(hard={"count/jobs.batch": "0"})
    )
    cluster.core.create_namespaced_resource_quota(namespace, quota)
    wait_for(
        lambda: cluster.core.read_namespaced_resource_quota("jobs", namespace).to_dict()["status"]["used"],
        30,
        "the quota to be counted",
    )
    cluster.create_run(namespace, spec(batches=ONE, backpressure={"retrySeconds": 1}), name="full")

    def held() -> bool:
        return condition(cluster.run(namespace, "full"), "Backpressured").get("status") == "True"

    wait_for(held, 60, "Backpressured")
    cluster.patch_spec(namespace, "full", suspend=True)
    wait_for(in_phase(cluster, namespace, "full", "Suspended"), 30, "Suspended")
    cluster.core.delete_namespaced_resource_quota("jobs", namespace)
    wait_for(over(3), 10, "more than retrySeconds")
    assert created_jobs(audit(namespace)) == []
    cluster.patch_spec(namespace, "full", suspend=None)
    run = wait_for(in_phase(cluster, namespace, "full", "Succeeded"), 120, "Succeeded")
    assert run["status"]["records"]["published"] == 10
    assert condition(run, "Backpressured")["status"] == "False"


# ---- one at a time --------------------------------------------------------------------------------------------------


def at_once(cluster: Cluster, namespace: str, names: list[str], **more: Any) -> None:
    """Create runs from as many threads, so in the same second."""
    with ThreadPoolExecutor(len(names)) as threads:
        made = [threads.submit(cluster.create_run, namespace, spec(**more), name=name) for name in names]
        for each in made:
            each.result()


@pytest.mark.parametrize("down", [False, True], ids=["up", "down"])
def test_of_several_created_at_once_one_runs(
    down: bool, cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor, audit: Audit
) -> None:
    names = [f"run-{number}" for number in range(6)]
    if down:
        operator.kill()
    at_once(cluster, namespace, names, annotations=HELD, batches=ONE, concurrency={"key": "geo", "policy": "Forbid"})
    if down:
        operator.start()

    def judged() -> dict[str, str]:
        phases = {run["metadata"]["name"]: run["status"].get("phase") for run in cluster.runs(namespace)}
        assert sorted(phases.values(), key=str) == ["Failed"] * 5 + ["Running"], phases
        return phases

    phases = wait_for(judged, 60, "one to run and five to be refused")
    (winner,) = [name for name, phase in phases.items() if phase == "Running"]
    for name in names:
        if name != winner:
            run = cluster.run(namespace, name)
            assert condition(run, "Succeeded")["reason"] == "ConcurrencyForbidden"
            assert "of the concurrency key geo is active" in condition(run, "Succeeded")["message"]
            assert "startTime" not in run["status"]
    wait_for(partial(running_pods, cluster, namespace, winner), 60, "its pod: it is Running before it has a Job")
    uid = cluster.run(namespace, winner)["metadata"]["uid"]
    assert {run for run, _ in jobs_in_order(audit(namespace))} == {uid}


def test_replaced_run_is_cancelled_and_the_newer_starts_once_it_is_drained(
    cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor, audit: Audit
) -> None:
    """The operator is killed twice on the way: nothing of it is in its memory."""
    concurrency = {"key": "geo/tiles", "policy": "Replace"}
    old = cluster.create_run(namespace, spec(HELD, batches=THREE, parallelism=3, concurrency=concurrency), name="old")
    wait_for(lambda: three_running(cluster, namespace), 60, "three running pods")
    operator.kill()
    new = cluster.create_run(namespace, spec(batches=ONE, concurrency=concurrency), name="new")
    operator.start()
    run = wait_for(in_phase(cluster, namespace, "old", "Cancelled"), 60, "the older one to be Cancelled")
    operator.kill()
    operator.start()
    assert run["status"]["cancellation"]["reason"] == "replaced by new"
    assert run["status"]["cancellation"]["requestedBy"] == "ingestrun-operator on behalf of run new"
    waiting = wait_for(in_phase(cluster, namespace, "new", "Pending"), 30, "the newer one to wait")
    assert condition(waiting, "Reconciling")["reason"] == "WaitingForReplaced"
    assert "run old" in condition(waiting, "Reconciling")["message"]
    release(cluster, namespace, "old")
    wait_for(in_phase(cluster, namespace, "new", "Succeeded"), 60, "the newer one to succeed")
    entries = audit(namespace)
    done = [
        number
        for number, entry in enumerate(entries)
        if entry["objectRef"].get("name") == "old"
        and entry["objectRef"].get("subresource") == "status"
        and entry["responseStatus"]["code"] == 200
        and condition(entry["responseObject"], "Drained").get("status") == "True"
    ]
    uids = [old["metadata"]["uid"], new["metadata"]["uid"]]
    assert {run for run, _ in jobs_in_order(entries[: done[0]])} == {uids[0]}
    assert {run for run, _ in jobs_in_order(entries[done[0] :])} == {uids[1]}
    assert_nothing_started_after_cancelled(lambda _: entries[: done[0]], namespace, "old")


def test_of_several_replacements_the_last_one_runs(
    cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor, audit: Audit
) -> None:
    more: Json = {"batches": ONE, "concurrency": {"key": "geo", "policy": "Replace"}}
    cluster.create_run(namespace, spec(HELD, **more), name="old")
    wait_for(partial(running_pods, cluster, namespace, "old"), 60, "a running pod")
    names = [f"run-{number}" for number in range(5)]
    at_once(cluster, namespace, names, **more)
    wait_for(in_phase(cluster, namespace, "old", "Cancelled"), 60, "Cancelled")
    release(cluster, namespace, "old")

    def ended() -> list[str]:
        phases = sorted(cluster.run(namespace, name)["status"].get("phase", "") for name in names)
        assert set(phases) <= {"Cancelled", "Succeeded"}, phases
        assert "Succeeded" in phases
        return phases

    wait_for(ended, 90, "all to end")
    order = [run for run, _ in jobs_in_order(audit(namespace))]
    changes = sum(1 for before, after in itertools.pairwise(order) if before != after)
    assert changes == len(set(order)) - 1, "two ran side by side"


def test_a_key_is_fixed_and_has_a_form(cluster: Cluster, namespace: str, crd: Json) -> None:
    assert crd
    cluster.create_run(namespace, spec(suspend=True, concurrency={"key": "geo"}), name="fixed")
    assert cluster.run(namespace, "fixed")["spec"]["concurrency"] == {"key": "geo", "policy": "Allow"}
    for patch in ({"concurrency": {"policy": "Replace"}}, {"concurrency": None}):
        with pytest.raises(client.ApiException) as refused:
            cluster.patch_spec(namespace, "fixed", **patch)
        assert "spec.concurrency: Forbidden: the field is fixed at creation" in refusal(refused.value)
    assert [run["metadata"]["name"] for run in cluster.runs(namespace, field_selector="spec.concurrency.key=geo")] == [
        "fixed"
    ]
    for bad in ({"policy": "Forbid"}, {"key": ""}, {"key": "a,b"}, {"key": "geo", "policy": "Queue"}):
        with pytest.raises(client.ApiException) as refused:
            cluster.create_run(namespace, spec(concurrency=bad), dry_run=True)
        assert "spec.concurrency" in refusal(refused.value)


def test_the_example_of_the_page_is_taken(cluster: Cluster, namespace: str, crd: Json) -> None:
    assert crd
    blocks = (REPOSITORY / "docs" / "lifecycle.md").read_text().split("```yaml\n")[1:]
    (example,) = [yaml.safe_load(block.partition("```")[0]) for block in blocks]
    cluster.create_run(namespace, example["spec"], dry_run=True)


@pytest.mark.parametrize(("field", "taken"), [("staleAfterSeconds", False), ("ttlSecondsAfterFinished", True)])
def test_zero_is_not_unset(field: str, taken: bool, cluster: Cluster, namespace: str, crd: Json) -> None:
    assert crd
    if taken:
        cluster.create_run(namespace, {**spec(), field: 0}, dry_run=True)
        return
    with pytest.raises(client.ApiException) as refused:
        cluster.create_run(namespace, {**spec(), field: 0}, dry_run=True)
    assert f"spec.{field}: Invalid value: 0" in refusal(refused.value)


# ---- the time to live -----------------------------------------------------------------------------------------------


@pytest.mark.waits
def test_ended_runs_are_deleted_in_their_time(
    cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor, audit: Audit
) -> None:
    cluster.create_run(namespace, spec(batches=ONE, ttlSecondsAfterFinished=0), name="done")
    cluster.create_run(namespace, spec(cancel=True, ttlSecondsAfterFinished=0), name="cancelled")
    cluster.create_run(namespace, spec(cancel=True), name="kept")
    cluster.create_run(namespace, spec(cancel=True), name="later")
    cluster.create_run(namespace, spec(HELD, batches=ONE, ttlSecondsAfterFinished=0), name="draining")
    wait_for(partial(running_pods, cluster, namespace, "draining"), 60, "a running pod")
    cluster.cancel(namespace, "draining")
    ended = {}
    for name, phase in (("cancelled", "Cancelled"), ("later", "Cancelled"), ("done", "Succeeded")):
        run = wait_for(in_phase(cluster, namespace, name, phase), 60, phase)
        ended[name] = moment(run["status"]["completionTime"])
    cluster.patch_spec(namespace, "later", ttlSecondsAfterFinished=62)

    def left() -> bool:
        assert {run["metadata"]["name"] for run in cluster.runs(namespace)} == {"kept", "draining"}
        return True

    wait_for(left, 120, "three to be deleted")
    deletes = {
        entry["objectRef"]["name"]: received(entry)
        for entry in audit(namespace)
        if entry["verb"] == "delete" and entry["objectRef"]["resource"] == "ingestruns"
    }
    assert deletes.keys() == ended.keys()
    for name, at in deletes.items():
        assert at - ended[name] >= timedelta(seconds=62 if name == "later" else 60), name
    assert cluster.told(namespace, "Expired", "done")

    def logged() -> bool:
        return {line["run"] for line in operator.lines("ingest run deleted, its time is over")} == set(ended)

    wait_for(logged, 10, "a line about each")
    release(cluster, namespace, "draining")
    wait_for(lambda: [run["metadata"]["name"] for run in cluster.runs(namespace)] == ["kept"], 60, "the drained one")
    wait_for(lambda: not cluster.jobs(namespace), 60, "their Jobs to go")


# ---- what vanishes under a run --------------------------------------------------------------------------------------


@pytest.fixture
def doomed(cluster: Cluster, namespace: str) -> Iterator[str]:
    """A second namespace, which stays Terminating as long as the test goes on."""
    name = f"{namespace}-doomed"
    cluster.core.create_namespace(
        client.V1Namespace(metadata=client.V1ObjectMeta(name=name, labels={"ingestrun.dev/test": "true"}))
    )
    keep = client.V1ObjectMeta(name="keep", finalizers=["ingestrun.dev/test"])
    cluster.core.create_namespaced_config_map(name, client.V1ConfigMap(metadata=keep))
    yield name
    cluster.core.patch_namespaced_config_map("keep", name, {"metadata": {"finalizers": None}})
    with contextlib.suppress(client.ApiException):
        cluster.core.delete_namespace(name)


def test_namespace_that_is_deleted_under_its_run(
    cluster: Cluster, crd: Json, namespace: str, doomed: str, tmp_path: Path, wait_for: WaitFor, audit: Audit
) -> None:
    """One run is kept there by a finalizer, the other goes at once: nothing is stored, nothing is tried for ever."""
    assert crd
    watched = f"{namespace},{doomed}"
    process = OperatorProcess(
        kubeconfig=cluster.kubeconfig, context=cluster.context, namespace=watched, log=tmp_path / "operator.log"
    )
    process.start()
    try:
        more: Json = {"batches": {"partitions": {"count": 50}}, "parallelism": 2}
        cluster.create_run(doomed, spec({"run-seconds": "1"}, **more), name="gone")
        cluster.create_run(
            doomed, spec({"run-seconds": "1"}, **more), name="stays", metadata={"finalizers": ["ingestrun.dev/test"]}
        )
        wait_for(lambda: len(cluster.jobs(doomed)) >= 6, 60, "a few Jobs")
        cluster.core.delete_namespace(doomed)
        metadata = cluster.core.read_namespace(doomed).to_dict()["metadata"]
        refuses = metadata["deletion_timestamp"] + timedelta(seconds=3)
        wait_for(lambda: not cluster.jobs(doomed), 90, "the Jobs to go")
        wait_for(lambda: [run["metadata"]["name"] for run in cluster.runs(doomed)] == ["stays"], 60, "one run to go")
        tried = len([entry for entry in audit(doomed) if entry["objectRef"]["resource"] == "jobs"])
        wait_for(over(3), 10, "time to try again")
        entries = audit(doomed)
        stored = [entry for entry in entries if created_jobs([entry]) and received(entry) > refuses]
        assert stored == []
        refused = [
            entry
            for entry in entries
            if entry["verb"] == "create"
            and entry["objectRef"]["resource"] == "jobs"
            and entry["responseStatus"]["code"] == 403
        ]
        assert len(refused) < 12, "a hot loop"
        assert len([entry for entry in entries if entry["objectRef"]["resource"] == "jobs"]) - tried < 10
        cluster.create_run(namespace, spec(batches=ONE), name="elsewhere")
        wait_for(in_phase(cluster, namespace, "elsewhere", "Succeeded"), 60, "runs elsewhere to go on")
    finally:
        process.stop()
        cluster.patch_run(doomed, "stays", {"metadata": {"finalizers": None}})


def test_owner_that_vanishes(
    cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor, audit: Audit
) -> None:
    """A run that only names its parent goes on without it; one that is owned goes with its owner, and its Jobs too."""
    root = cluster.create_run(namespace, spec(HELD, batches=ONE), name="root")
    owner = {"apiVersion": root["apiVersion"], "kind": root["kind"], "name": "root", "uid": root["metadata"]["uid"]}
    slow = spec({"run-seconds": "1"}, batches={"partitions": {"count": 6}}, parallelism=2)
    cluster.create_run(namespace, {**slow, "parentRef": {"name": "root"}}, name="named")
    owned = cluster.create_run(
        namespace,
        spec({"run-seconds": "1"}, batches={"partitions": {"count": 500}}, parallelism=2),
        name="owned",
        metadata={"ownerReferences": [owner]},
    )
    for name in ("root", "named", "owned"):
        wait_for(partial(running_pods, cluster, namespace, name), 60, "a running pod")
    cluster.custom.delete_namespaced_custom_object("ingestrun.dev", "v1alpha1", namespace, "ingestruns", "root")
    wait_for(
        lambda: [run["metadata"]["name"] for run in cluster.runs(namespace)] == ["named"], 60, "the owned run to go"
    )
    of_owned = f"ingestrun.dev/run-uid={owned['metadata']['uid']}"
    wait_for(lambda: not cluster.jobs(namespace, of_owned), 60, "its Jobs to go")
    before = [job for job in jobs_in_order(audit(namespace)) if job[0] == owned["metadata"]["uid"]]
    run = wait_for(in_phase(cluster, namespace, "named", "Succeeded"), 120, "Succeeded")
    assert run["status"]["records"]["published"] == 60
    assert [job for job in jobs_in_order(audit(namespace)) if job[0] == owned["metadata"]["uid"]] == before
    late = cluster.create_run(namespace, spec(HELD, batches=ONE, parentRef={"name": "root"}), name="late")
    wait_for(partial(running_pods, cluster, namespace, "late"), 60, "a run whose parent is gone to run")
    assert late["metadata"]["name"] == "late"
