"""Refusals that are told, runs that are not understood, and a wrong clock of the operator: on a real API server."""

from __future__ import annotations

import contextlib
import copy
import fcntl
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from tests.api.conftest import GROUP, PLURAL, REPOSITORY, Cluster, Json, WaitFor, _applied_crd
from tests.api.operator_process import OperatorProcess
from tests.api.test_runs import condition, drained, in_phase, spec

ADMISSION: Final = ("admissionregistration.k8s.io", "v1")
SENTENCE: Final = "statuses are frozen for the audit"


@pytest.fixture
def operator(cluster: Cluster, crd: Json, namespace: str, tmp_path: Path) -> Iterator[OperatorProcess]:
    """The operator of this checkout, watching the test's namespace alone; the test starts it."""
    assert crd
    process = OperatorProcess(
        kubeconfig=cluster.kubeconfig, context=cluster.context, namespace=namespace, log=tmp_path / "operator.log"
    )
    yield process
    process.stop()


@pytest.fixture
def frozen(cluster: Cluster, namespace: str, wait_for: WaitFor) -> Iterator[str]:
    """A policy that refuses writes of the status of the run `frozen`."""
    policy = {
        "apiVersion": "/".join(ADMISSION),
        "kind": "ValidatingAdmissionPolicy",
        "metadata": {"name": namespace},
        "spec": {
            "failurePolicy": "Fail",
            "matchConstraints": {
                "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": namespace}},
                "resourceRules": [
                    {
                        "apiGroups": [GROUP],
                        "apiVersions": ["*"],
                        "operations": ["UPDATE"],
                        "resources": [f"{PLURAL}/status"],
                    }
                ],
            },
            "validations": [{"expression": "object.metadata.name != 'frozen'", "message": SENTENCE}],
        },
    }
    binding = {
        "apiVersion": "/".join(ADMISSION),
        "kind": "ValidatingAdmissionPolicyBinding",
        "metadata": {"name": namespace},
        "spec": {"policyName": namespace, "validationActions": ["Deny"]},
    }
    cluster.custom.create_cluster_custom_object(*ADMISSION, "validatingadmissionpolicies", policy)
    cluster.custom.create_cluster_custom_object(*ADMISSION, "validatingadmissionpolicybindings", binding)
    cluster.create_run(namespace, spec({"batches": "1"}, suspend=True), name="frozen")

    def refused() -> bool:
        with contextlib.suppress(Exception):
            cluster.patch_status(namespace, "frozen", {"cursor": "0"})
            return False
        return True

    try:
        wait_for(refused, 60, "the policy to be enforced")
        yield "frozen"
    finally:
        cluster.custom.delete_cluster_custom_object(*ADMISSION, "validatingadmissionpolicybindings", namespace)
        cluster.custom.delete_cluster_custom_object(*ADMISSION, "validatingadmissionpolicies", namespace)


def test_a_refused_status_is_told_on_its_run_and_the_others_go_on(
    cluster: Cluster, namespace: str, frozen: str, operator: OperatorProcess, wait_for: WaitFor
) -> None:
    operator.start()
    uid = cluster.run(namespace, frozen)["metadata"]["uid"]
    cluster.create_run(namespace, spec({"batches": "1"}), name="beside")
    wait_for(in_phase(cluster, namespace, "beside", "Succeeded"), 120, "the other run to succeed")
    wait_for(lambda: len(operator.lines("pass failed")) >= 3, 30, "some retries")
    (note,) = cluster.told(namespace, "RequestRefused", frozen)
    assert SENTENCE in note
    lines = [*operator.lines("request refused"), *operator.lines("pass failed")]
    assert {(line["run"], line["namespace"], line["uid"], line["ingest_run_id"]) for line in lines} == {
        (frozen, namespace, uid, uid)
    }


def test_a_status_that_makes_no_sense_is_held_and_can_be_cancelled(
    cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor
) -> None:
    """All of it is what the CRD accepts."""
    made_up: dict[str, Json] = {
        "ranges": {"batches": {"claimed": "7-3"}},
        "endless": {"batches": {"claimed": "0-999999999999"}},
        "late": {"startTime": "9999-12-31T23:59:59Z", "batches": {"claimed": "0"}},
    }
    for name, status in made_up.items():
        cluster.create_run(namespace, spec({"batches": "1"}, activeDeadlineSeconds=600), name=name)
        cluster.patch_status(namespace, name, status)
    cluster.create_run(namespace, spec({"batches": "1"}), name="beside")
    operator.start()
    wait_for(in_phase(cluster, namespace, "beside", "Succeeded"), 120, "the other run to succeed")
    for name, status in made_up.items():
        (note,) = cluster.told(namespace, "Held", name)
        run = cluster.run(namespace, name)
        assert condition(run, "Succeeded")["reason"] == "Held"
        assert condition(run, "Succeeded")["message"] == note
        assert run["status"]["batches"] == status["batches"]
        assert cluster.jobs(namespace, f"ingestrun.dev/run={name}") == []
        cluster.cancel(namespace, name)
    for name in made_up:
        wait_for(drained(cluster, namespace, name), 60, "Drained")
        assert cluster.run(namespace, name)["status"]["phase"] == "Cancelled"
        assert cluster.jobs(namespace, f"ingestrun.dev/run={name}") == []


@pytest.fixture
def newer_crd(cluster: Cluster, crd: Json, wait_for: WaitFor) -> Iterator[None]:
    """The CRD as a later version may have it: with more phases, fields and policies. All that is valid stays so."""
    assert crd
    body: Json = yaml.safe_load((REPOSITORY / "crds" / "ingestruns.yaml").read_text())
    newer = copy.deepcopy(body)
    schema = newer["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]
    status: Json = schema["status"]["properties"]
    status["phase"]["enum"].append("Paused")
    status["lanes"] = {"type": "array", "items": {"type": "string"}}
    status["batches"]["properties"]["auditing"] = {"type": "string"}
    status["conditions"]["items"]["properties"]["severity"] = {"type": "string"}
    schema["spec"]["properties"]["onBatchFailure"]["enum"].append("Skip")
    # One change of the CRD at a time: another session applies it under the same lock.
    with (cluster.kubeconfig.parent / "crd-applied").open("a") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        cluster.extensions.patch_custom_resource_definition(
            body["metadata"]["name"],
            newer,
            field_manager="ingestrun-tests",
            force=True,
            _content_type="application/apply-patch+yaml",
        )
        try:
            yield
        finally:
            _applied_crd(cluster)


def test_what_a_newer_version_has_written_is_held_and_kept(
    cluster: Cluster, namespace: str, operator: OperatorProcess, newer_crd: None, wait_for: WaitFor
) -> None:
    throttled = {
        "type": "Throttled",
        "status": "True",
        "reason": "Budget",
        "message": "",
        "lastTransitionTime": "2026-11-23T03:04:05Z",
        "severity": "Info",
    }
    written: dict[str, Json] = {
        "paused": {"phase": "Paused"},
        "lanes": {"phase": "Running", "lanes": ["a", "b"]},
        "auditing": {"phase": "Running", "batches": {"claimed": "0-1", "auditing": "1"}},
        "condition": {"phase": "Pending", "conditions": [throttled]},
    }
    for name, status in written.items():
        cluster.create_run(namespace, spec({"batches": "1"}), name=name)

        def stored(name: str = name, status: Json = status) -> bool:
            cluster.patch_status(namespace, name, status)  # refused until the server has the newer schema
            return True

        wait_for(stored, 30, "the newer schema to be served")
    cluster.create_run(namespace, spec({"batches": "1"}, onBatchFailure="Skip"), name="skip")
    cluster.create_run(namespace, spec({"batches": "1"}), name="beside")
    operator.start()
    wait_for(in_phase(cluster, namespace, "beside", "Succeeded"), 120, "the other run to succeed")
    for name in (*written, "skip"):
        (note,) = cluster.told(namespace, "Held", name)
        assert condition(cluster.run(namespace, name), "Reconciling")["message"] == note
        cluster.cancel(namespace, name)
    for name in (*written, "skip"):
        wait_for(drained(cluster, namespace, name), 60, "Drained")
        assert cluster.run(namespace, name)["status"]["phase"] == "Cancelled"
        assert cluster.jobs(namespace, f"ingestrun.dev/run={name}") == []
    assert cluster.run(namespace, "lanes")["status"]["lanes"] == ["a", "b"]
    assert cluster.run(namespace, "auditing")["status"]["batches"]["auditing"] == "1"
    assert throttled in cluster.run(namespace, "condition")["status"]["conditions"]


def times_of(status: Json) -> Iterator[datetime]:
    """All times that the operator has written."""
    texts: list[Any] = [status.get(field) for field in ("startTime", "completionTime", "lastProgressTime")]
    texts += [each["lastTransitionTime"] for each in status["conditions"]]
    texts += [each["time"] for each in status.get("failures", ())]
    for text in texts:
        if text is not None:
            yield datetime.fromisoformat(text)


@pytest.mark.parametrize("ahead", [timedelta(hours=1), timedelta(hours=-1), timedelta(365), timedelta(-365)], ids=str)
def test_a_wrong_clock_of_the_operator_changes_nothing(
    cluster: Cluster, crd: Json, namespace: str, tmp_path: Path, wait_for: WaitFor, ahead: timedelta
) -> None:
    assert crd
    began = datetime.now(UTC).replace(microsecond=0)
    operator = OperatorProcess(
        kubeconfig=cluster.kubeconfig,
        context=cluster.context,
        namespace=namespace,
        log=tmp_path / "operator.log",
        ahead=ahead,
    )
    one: Json = {"partitions": {"count": 1}}
    retried = {"batches": "1", "fail-attempts": "1", "fail-stage": "hook", "exit-code": "1"}
    backoff = {"initialSeconds": 3, "maxSeconds": 3}
    cluster.create_run(namespace, spec(retried, batches=one, backoff=backoff), name="retried")
    patient = spec({"run-seconds": "6"}, batches=one, staleAfterSeconds=600, activeDeadlineSeconds=600)
    cluster.create_run(namespace, patient, name="patient")
    cluster.create_run(namespace, spec({"run-seconds": "600"}, batches=one, activeDeadlineSeconds=8), name="late")
    operator.start()
    try:
        run = wait_for(in_phase(cluster, namespace, "retried", "Succeeded"), 120, "the retry to succeed")
        (failure,) = run["status"]["failures"]
        (again,) = cluster.jobs(namespace, "ingestrun.dev/run=retried,ingestrun.dev/attempt=1")
        waited = again.metadata.creation_timestamp - datetime.fromisoformat(failure["time"])
        assert timedelta(seconds=1) <= waited <= timedelta(seconds=40)
        run = wait_for(in_phase(cluster, namespace, "late", "Failed"), 120, "the deadline")
        assert condition(run, "Succeeded")["reason"] == "DeadlineExceeded"
        status = run["status"]
        took = datetime.fromisoformat(status["completionTime"]) - datetime.fromisoformat(status["startTime"])
        assert timedelta(seconds=7) <= took <= timedelta(seconds=40)
        wait_for(in_phase(cluster, namespace, "patient", "Succeeded"), 120, "the patient run to succeed")
        now = datetime.now(UTC)
        for name in ("retried", "patient", "late"):
            times = list(times_of(cluster.run(namespace, name)["status"]))
            assert all(began - timedelta(seconds=2) <= time <= now for time in times), (began, times, now)
    finally:
        operator.stop()
