"""What Tekton and Argo Workflows test of their cancel, stop and terminate, as black boxes, under names of our own.

docs/proof.md maps each of their scenarios to a test of ours, those of other files included.
"""

from __future__ import annotations

import json
import subprocess
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

from kubernetes import client

from tests.api.conftest import Cluster, Json, WaitFor, refusal
from tests.api.operator_process import OperatorProcess
from tests.api.test_runs import (
    Audit,
    assert_nothing_started_after_cancelled,
    condition,
    created_jobs,
    drained,
    in_phase,
    spec,
)

ADMISSION: Final = ("admissionregistration.k8s.io", "v1")
POLICIES: Final = "validatingadmissionpolicies"
BINDINGS: Final = "validatingadmissionpolicybindings"
CLEAN_UP: Final = {"image": "example/clean:1"}


def pods_of(cluster: Cluster, namespace: str, run: str, phase: str = "Running") -> list[Any]:
    pods = cluster.pods(namespace, f"ingestrun.dev/run={run}")
    return [pod for pod in pods if pod.status.phase == phase]


def release(cluster: Cluster, namespace: str) -> None:
    for pod in cluster.pods(namespace):
        free = {"metadata": {"annotations": {"simulate.ingestrun.dev/hold": None}}}
        cluster.core.patch_namespaced_pod(pod.metadata.name, namespace, free)


def told(cluster: Cluster, namespace: str, run: str) -> Counter[str]:
    """How many Events of each reason there are about the run."""
    items = cluster.core.list_namespaced_event(namespace).items
    return Counter(str(item.reason) for item in items if item.involved_object.name == run)


def kubectl(cluster: Cluster, namespace: str, command: str) -> subprocess.CompletedProcess[str]:
    """A line of shell, in which `kubectl` is that of this cluster and namespace."""
    full = f"kubectl --kubeconfig {cluster.kubeconfig} --context {cluster.context} -n {namespace}"
    line = command.replace("kubectl", full)
    return subprocess.run(["bash", "-o", "pipefail", "-c", line], capture_output=True, text=True, check=False)


# -------------------------------------------------------------------------------------------- stages and pods


def test_pod_that_fails_after_the_cancel_is_not_retried(
    cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor, audit: Audit
) -> None:
    """With and without retries left, drained and terminated: one pod each, and it stays the only one."""
    kinds = {
        f"{policy.lower()}-{retries}": (policy, retries) for policy in ("Drain", "Terminate") for retries in (0, 2)
    }
    for name, (_, retries) in kinds.items():
        fails = {"hold": "true", "fail-attempts": "9"}
        cluster.create_run(namespace, spec(fails, retries=retries, batches={"partitions": {"count": 1}}), name=name)
    for name in kinds:
        wait_for(lambda name=name: pods_of(cluster, namespace, name), 60, f"the pod of {name}")  # type: ignore[misc]
    for name, (policy, _) in kinds.items():
        cluster.patch_spec(namespace, name, cancel=True, cancellation={"policy": policy, "gracePeriodSeconds": 1})
    for name in kinds:
        wait_for(in_phase(cluster, namespace, name, "Cancelled"), 30, "Cancelled")
    release(cluster, namespace)
    for name in kinds:
        run = wait_for(drained(cluster, namespace, name), 60, "Drained")
        assert run["status"]["cancellation"]["notPublished"] == "0"
        assert run["status"].get("failures", []) == [], "what comes late is no failure of the run"
        assert_nothing_started_after_cancelled(audit, namespace, name)
        assert cluster.told(namespace, "Cancelled", name)
        events = told(cluster, namespace, name)
        assert (events["Cancelled"], events["StageFailed"], events["Failed"]) == (1, 0, 0)
    assert len(created_jobs(audit(namespace))) == len(kinds)


def test_cancel_while_a_retry_waits_starts_no_retry(
    cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor, audit: Audit
) -> None:
    slow = {"initialSeconds": 60, "maxSeconds": 60}  # time enough to cancel meanwhile; nobody waits for its end
    cluster.create_run(namespace, spec({"fail-attempts": "9"}, backoff=slow), name="waits")

    def retrying() -> bool:
        return condition(cluster.run(namespace, "waits"), "Reconciling").get("reason") == "Retrying"

    wait_for(retrying, 60, "the first attempt to fail")
    cluster.cancel(namespace, "waits")
    run = wait_for(drained(cluster, namespace, "waits"), 60, "Drained")
    wait_for(lambda: told(cluster, namespace, "waits")["StageSkipped"], 30, "the retry to be told as skipped")
    lines = operator.lines("ingest run cancelled, skipping")
    assert {(line["batch"], line["stage"], line["attempt"]) for line in lines} == {(0, "fetch", 1)}
    assert [failure["attempt"] for failure in run["status"]["failures"]] == [0], "the failure before stays told"
    assert_nothing_started_after_cancelled(audit, namespace, "waits")


def test_ended_and_deleted_jobs_are_no_obstacle_to_a_cancel(
    cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor, audit: Audit
) -> None:
    """Batches that are done keep their counts, also where somebody has deleted their Jobs."""
    cluster.create_run(namespace, spec({"batches": "60", "rows": "5"}), name="worn")

    def published() -> bool:
        return bool(cluster.run(namespace, "worn")["status"]["records"]["published"] >= 10)

    wait_for(published, 90, "two batches")
    ended = [job for job in cluster.jobs(namespace) if job.status.completion_time is not None]
    for job in ended[:3]:
        cluster.batch.delete_namespaced_job(job.metadata.name, namespace, propagation_policy="Background")
    cluster.cancel(namespace, "worn")
    at_end = wait_for(in_phase(cluster, namespace, "worn", "Cancelled"), 30, "Cancelled")["status"]
    after = wait_for(drained(cluster, namespace, "worn"), 60, "Drained")["status"]
    assert after["records"]["published"] >= 10
    assert (after["records"], after["batches"]["published"]) == (at_end["records"], at_end["batches"]["published"])
    assert_nothing_started_after_cancelled(audit, namespace, "worn")


def test_pods_that_no_node_has_room_for_never_start(
    cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor, audit: Audit
) -> None:
    made = spec(batches={"partitions": {"count": 4}}, parallelism=2)
    made["podTemplate"]["nodeSelector"] = {"ingestrun.dev/no-such-node": "true"}
    cluster.create_run(namespace, made, name="roomless")

    def unschedulable() -> bool:
        pods = cluster.pods(namespace)
        reasons = [c.reason for pod in pods for c in pod.status.conditions or () if c.type == "PodScheduled"]
        return len(pods) == 2 and reasons == ["Unschedulable"] * 2

    wait_for(unschedulable, 60, "two pods without a node")
    cluster.cancel(namespace, "roomless")
    run = wait_for(drained(cluster, namespace, "roomless"), 60, "Drained")
    assert run["status"]["cancellation"]["notPublished"] == "0-1"
    wait_for(lambda: not cluster.pods(namespace) and not cluster.jobs(namespace), 30, "the pods and Jobs to go")
    assert_nothing_started_after_cancelled(audit, namespace, "roomless")


def test_number_of_events_does_not_grow_with_the_batches(
    cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor
) -> None:
    """Nor with repeated cancels; and each tells something."""
    partitions = {"partitions": {"count": 1000}}
    cluster.create_run(namespace, spec({"hold": "true"}, batches=partitions, parallelism=8), name="many")
    wait_for(lambda: len(pods_of(cluster, namespace, "many")) == 8, 60, "eight running pods")
    for number in range(3):
        cluster.cancel(namespace, "many", f"cancel {number}")
    wait_for(in_phase(cluster, namespace, "many", "Cancelled"), 30, "Cancelled")
    release(cluster, namespace)
    wait_for(drained(cluster, namespace, "many"), 60, "Drained")
    expected = {"Started": 1, "Cancelled": 1, "Drained": 1, "StageSkipped": 1}

    def all_told() -> bool:
        return dict(told(cluster, namespace, "many")) == expected

    wait_for(all_told, 30, f"{expected}")
    cluster.cancel(namespace, "many", "once more")

    def observed() -> bool:
        run = cluster.run(namespace, "many")
        return bool(run["status"]["observedGeneration"] == run["metadata"]["generation"])

    wait_for(observed, 30, "the repeated cancel to be seen")
    assert dict(told(cluster, namespace, "many")) == expected


# ------------------------------------------------------------------------------------------------- children


@contextmanager
def no_status_for(cluster: Cluster, namespace: str, run: str) -> Iterator[None]:
    """Have the API server refuse every write of that run's status."""
    name = f"ir-test-{uuid.uuid4().hex[:10]}"
    rule = {"apiGroups": ["ingestrun.dev"], "apiVersions": ["*"], "operations": ["UPDATE"]}
    policy = {
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "ValidatingAdmissionPolicy",
        "metadata": {"name": name},
        "spec": {
            "failurePolicy": "Fail",
            "matchConstraints": {"resourceRules": [{**rule, "resources": ["ingestruns/status"]}]},
            "validations": [{"expression": f"object.metadata.name != '{run}'", "message": "this one is stubborn"}],
        },
    }
    binding = {
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "ValidatingAdmissionPolicyBinding",
        "metadata": {"name": name},
        "spec": {
            "policyName": name,
            "validationActions": ["Deny"],
            "matchResources": {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": namespace}}},
        },
    }
    cluster.custom.create_cluster_custom_object(*ADMISSION, POLICIES, policy)
    cluster.custom.create_cluster_custom_object(*ADMISSION, BINDINGS, binding)
    try:
        yield
    finally:
        cluster.custom.delete_cluster_custom_object(*ADMISSION, BINDINGS, name)
        cluster.custom.delete_cluster_custom_object(*ADMISSION, POLICIES, name)


def refused(cluster: Cluster, namespace: str, run: str) -> bool:
    """Whether a write of the run's status is refused."""
    try:
        cluster.patch_status(namespace, run, {"observedGeneration": 0})
    except client.ApiException as error:
        return "stubborn" in refusal(error)
    return False


def test_child_that_cannot_be_cancelled_keeps_nobody_else_from_it(
    cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor, audit: Audit
) -> None:
    """It is told as waiting, starts nothing meanwhile, and follows as soon as its write is taken."""
    held = {"hold": "true"}
    cluster.create_run(namespace, spec(held), name="root")
    for name in ("meek", "stubborn"):
        cluster.create_run(namespace, spec(held, parentRef={"name": "root"}), name=name)
    for name in ("root", "meek", "stubborn"):
        wait_for(lambda name=name: pods_of(cluster, namespace, name), 60, f"the pod of {name}")  # type: ignore[misc]

    def children(**wanted: int) -> bool:
        found = cluster.run(namespace, "root")["status"]["cancellation"]["children"]
        return bool(wanted.items() <= found.items())

    with no_status_for(cluster, namespace, "stubborn"):
        wait_for(partial(refused, cluster, namespace, "stubborn"), 30, "the policy to hold")
        cluster.patch_spec(namespace, "root", cancel=True, cancellation={"cascade": True})
        for name in ("root", "meek"):
            wait_for(in_phase(cluster, namespace, name, "Cancelled"), 30, f"{name} Cancelled")
        wait_for(partial(children, cancelled=1, waiting=1), 30, "the parent to tell of the one that is left")
        wait_for(lambda: "this one is stubborn" in operator.log.read_text(), 30, "the refusal to be logged")
        release(cluster, namespace)
        wait_for(lambda: pods_of(cluster, namespace, "stubborn", "Succeeded"), 60, "the pod of the stubborn one to end")
        before = len(created_jobs(audit(namespace)))
        assert before == 3
    run = wait_for(in_phase(cluster, namespace, "stubborn", "Cancelled"), 90, "the last one to follow")
    assert run["status"]["cancellation"]["parent"] == "root"
    wait_for(partial(children, cancelled=2, waiting=0), 60, "the parent to tell that all have followed")
    assert len(created_jobs(audit(namespace))) == before, "its next stage was not started"


# ---------------------------------------------------------------------------- one, many, and only for a look


def test_dry_run_changes_nothing(
    cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor
) -> None:
    cluster.create_run(namespace, spec({"hold": "true"}), name="looked-at")
    wait_for(lambda: pods_of(cluster, namespace, "looked-at"), 60, "its pod")
    before = cluster.run(namespace, "looked-at")
    for policy in ("Drain", "Terminate"):
        patch = json.dumps({"spec": {"cancel": True, "cancellation": {"policy": policy}}})
        done = kubectl(cluster, namespace, f"kubectl patch ir looked-at --type merge --dry-run=server -p '{patch}'")
        assert done.returncode == 0, done.stderr
        assert "patched" in done.stdout
    assert cluster.run(namespace, "looked-at") == before
    assert pods_of(cluster, namespace, "looked-at")
    # And that it would be refused is said just as well.
    cluster.patch_status(namespace, "looked-at", {"phase": "Succeeded"})
    done = kubectl(cluster, namespace, f"kubectl patch ir looked-at --type merge --dry-run=server -p '{patch}'")
    assert "already Succeeded and cannot be cancelled" in done.stderr


def test_terminate_by_selector_goes_on_past_the_runs_that_refuse(
    cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor, audit: Audit
) -> None:
    """By label and by field; the one that has ended says so, and the ones after it are cancelled all the same."""
    team = {"labels": {"team": "geo"}}
    cluster.create_run(namespace, spec({"batches": "1"}), name="b-done", metadata=team)
    wait_for(in_phase(cluster, namespace, "b-done", "Succeeded"), 60, "the one that has ended")
    for name in ("a-first", "c-last"):
        cluster.create_run(namespace, spec({"hold": "true"}), name=name, metadata=team)
    cluster.create_run(namespace, spec({"hold": "true"}), name="other")
    for name in ("a-first", "c-last", "other"):
        wait_for(lambda name=name: pods_of(cluster, namespace, name), 60, f"the pod of {name}")  # type: ignore[misc]
    patch = json.dumps({"spec": {"cancel": True, "cancellation": {"policy": "Terminate", "gracePeriodSeconds": 1}}})
    each = f"xargs -I{{}} kubectl patch {{}} --type merge -p '{patch}'"

    done = kubectl(cluster, namespace, f"kubectl get ir -l team=geo -o name | {each}")
    assert done.returncode != 0
    assert done.stderr.count("already Succeeded and cannot be cancelled") == 1
    assert sorted(done.stdout.split()) == sorted(
        ["ingestrun.ingestrun.dev/a-first", "patched", "ingestrun.ingestrun.dev/c-last", "patched"]
    )
    for name in ("a-first", "c-last"):
        run = wait_for(drained(cluster, namespace, name), 60, "Drained")
        assert run["status"]["cancellation"]["policy"] == "Terminate"
        assert_nothing_started_after_cancelled(audit, namespace, name)
    assert cluster.run(namespace, "other")["status"]["phase"] == "Running"

    done = kubectl(cluster, namespace, f"kubectl get ir --field-selector status.phase=Running -o name | {each}")
    assert (done.returncode, done.stdout.split()) == (0, ["ingestrun.ingestrun.dev/other", "patched"])
    wait_for(drained(cluster, namespace, "other"), 60, "Drained")


# --------------------------------------------------------------------------------- while the clean-up runs


def test_clean_up_that_runs_is_left_alone_by_whatever_comes(
    cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor, audit: Audit
) -> None:
    """Cancelled again, escalated to Terminate, taken back, the operator killed: it runs to its end, and once."""
    cluster.create_run(namespace, spec({"hold": "true"}, cancel=True, onCancel=CLEAN_UP), name="cleaning")
    (pod,) = wait_for(lambda: pods_of(cluster, namespace, "cleaning"), 60, "the clean-up's pod")
    cluster.cancel(namespace, "cleaning", "again")
    cluster.patch_spec(namespace, "cleaning", cancellation={"policy": "Terminate", "gracePeriodSeconds": 0})
    operator.kill()
    cluster.patch_spec(namespace, "cleaning", cancel=None)
    operator.start()

    def escalated() -> Json:
        run = cluster.run(namespace, "cleaning")
        assert run["status"]["observedGeneration"] == run["metadata"]["generation"]
        assert run["status"]["cancellation"]["policy"] == "Terminate"
        return run

    run = wait_for(escalated, 60, "all of it to be seen")
    assert run["status"]["cancellation"]["onCancel"] == {"state": "Running", "message": ""}
    (still,) = pods_of(cluster, namespace, "cleaning")
    assert (still.metadata.uid, still.metadata.deletion_timestamp) == (pod.metadata.uid, None)
    release(cluster, namespace)

    def cleaned() -> bool:
        found = cluster.run(namespace, "cleaning")["status"]["cancellation"]["onCancel"]["state"]
        return bool(found == "Succeeded")

    wait_for(cleaned, 60, "the clean-up to end")
    (name,) = created_jobs(audit(namespace))
    assert "on-cancel" in name


def test_clean_up_follows_a_terminate_too(
    cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor, audit: Audit
) -> None:
    """Not before the last pod has got its SIGTERM and ended; the stages' Jobs go, the clean-up's stays."""
    made = spec({"hold": "true"}, batches={"partitions": {"count": 2}}, onCancel=CLEAN_UP)
    cluster.create_run(namespace, made, name="hard")
    wait_for(lambda: len(pods_of(cluster, namespace, "hard")) == 2, 60, "two running pods")
    cluster.patch_spec(namespace, "hard", cancel=True, cancellation={"policy": "Terminate", "gracePeriodSeconds": 1})

    def clean_up() -> list[Any]:
        return [pod for pod in pods_of(cluster, namespace, "hard") if "on-cancel" in pod.metadata.name]

    (pod,) = wait_for(clean_up, 60, "the clean-up")
    run = cluster.run(namespace, "hard")
    assert condition(run, "Drained")["status"] == "True"
    assert [p.metadata.name for p in pods_of(cluster, namespace, "hard")] == [pod.metadata.name]
    release(cluster, namespace)

    def cleaned() -> bool:
        return bool(cluster.run(namespace, "hard")["status"]["cancellation"]["onCancel"]["state"] == "Succeeded")

    wait_for(cleaned, 60, "the clean-up to end")
    assert len(created_jobs(audit(namespace))) == 3
