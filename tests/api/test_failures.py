"""What comes of failures, on a real API server: memory, disruptions, denials, rights. KWOK plays the kubelet."""

from __future__ import annotations

import subprocess
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from dev.cluster.simulated import node
from kubernetes import client

from tests.api.conftest import REPOSITORY, Cluster, Json, WaitFor, refusal
from tests.api.operator_process import OperatorProcess
from tests.api.test_runs import condition, in_phase, spec

ADMISSION: Final = ("admissionregistration.k8s.io", "v1")
RBAC: Final = "rbac.authorization.k8s.io"


def limited(**changes: Any) -> Json:
    """A container with a memory limit."""
    return {
        "image": "example/worker:1",
        "resources": {"requests": {"memory": "64Mi"}, "limits": {"memory": "128Mi"}},
        **changes,
    }


def notes(cluster: Cluster, namespace: str, reason: str, *, number: int = 1) -> list[str]:
    return sorted(cluster.told(namespace, reason, number=number))


def memory(cluster: Cluster, namespace: str, stage: str) -> list[tuple[str, str]]:
    """Request and limit of each attempt of that stage, in order."""
    jobs = cluster.jobs(namespace, f"ingestrun.dev/stage={stage}")
    jobs.sort(key=lambda job: int(job.metadata.labels["ingestrun.dev/attempt"]))
    resources = [job.spec.template.spec.containers[0].resources for job in jobs]
    return [(found.requests["memory"], found.limits["memory"]) for found in resources]


def test_killed_for_memory_it_gets_more_and_then_succeeds(
    cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor
) -> None:
    annotations = {"batches": "2", "fail-attempts": "2", "fail-stage": "hook", "fail-batch": "1", "exit-code": "137"}
    hooks = [{"name": "check", "container": limited()}]
    made = spec({**annotations, "reason": "OOMKilled"}, hooks=hooks, retries=0, outOfMemory={"maxMemory": "300Mi"})
    cluster.create_run(namespace, made, name="hungry")
    run = wait_for(in_phase(cluster, namespace, "hungry", "Succeeded"), 120, "Succeeded")
    assert run["status"]["records"] == {"fetched": 20, "rejected": 0, "published": 20}
    assert run["status"]["retries"] == [{"stage": "hook check", "reason": "OOMKilled", "count": 2}]
    assert len(cluster.jobs(namespace, "ingestrun.dev/stage=hook,ingestrun.dev/batch=1")) == 3
    assert sorted(set(memory(cluster, namespace, "hook"))) == [
        ("128Mi", "256Mi"), ("150Mi", "300Mi"), ("64Mi", "128Mi"),
    ]  # fmt: skip
    raised = notes(cluster, namespace, "MemoryRaised", number=2)
    assert raised == [
        "batch 1, hook check, attempt 2: memory limit 256Mi instead of 128Mi",
        "batch 1, hook check, attempt 3: memory limit 300Mi instead of 256Mi",
    ]
    assert [line["why"] for line in operator.lines("memory raised")] == raised
    assert [line["memory"] for line in operator.lines("job created") if "memory" in line] == [
        "256Mi instead of 128Mi",
        "300Mi instead of 256Mi",
    ]


def test_the_limit_of_a_limit_range_is_raised(
    cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor
) -> None:
    bounds = {"limits": [{"type": "Container", "default": {"memory": "100Mi"}, "defaultRequest": {"memory": "50Mi"}}]}
    core: Any = cluster.core
    core.create_namespaced_limit_range(namespace, {"metadata": {"name": "defaults"}, "spec": bounds})
    annotations = {"fail-attempts": "1", "exit-code": "137", "reason": "OOMKilled", "fail-stage": "publish"}
    made = spec(annotations, batches={"partitions": {"count": 1}}, retries=0, outOfMemory={"maxMemory": "1Gi"})
    cluster.create_run(namespace, made, name="given")
    wait_for(in_phase(cluster, namespace, "given", "Succeeded"), 120, "Succeeded")
    assert notes(cluster, namespace, "MemoryRaised") == [
        "batch 0, publish, attempt 2: memory limit 200Mi instead of 100Mi"
    ]


def test_an_eviction_is_not_taken_from_the_retries(
    cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor
) -> None:
    made = spec({"hold": "true"}, batches={"partitions": {"count": 1}}, retries=0)
    cluster.create_run(namespace, made, name="drained")

    def running(attempt: int) -> Any:
        pods = cluster.pods(namespace, f"ingestrun.dev/attempt={attempt}")
        return pods[0] if pods and pods[0].status.phase == "Running" else None

    first = wait_for(lambda: running(0), 60, "a running pod")
    core: Any = cluster.core
    eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": first.metadata.name}}
    core.create_namespaced_pod_eviction(first.metadata.name, namespace, eviction)
    wait_for(lambda: running(1), 90, "the second attempt")
    (failure,) = cluster.run(namespace, "drained")["status"]["failures"]
    assert failure["reason"] == "Evicted"
    assert "EvictionByEvictionAPI; retry 1 of 10 for disruptions in " in failure["message"]
    second = running(1)
    core.delete_namespaced_pod(second.metadata.name, namespace)
    wait_for(lambda: running(2), 90, "the third attempt")
    failure = cluster.run(namespace, "drained")["status"]["failures"][-1]
    assert failure["reason"] in ("PodDeleted", "PodLost")
    assert "retry 2 of 10 for disruptions in " in failure["message"]


@contextmanager
def simulated_node(cluster: Cluster, wait_for: WaitFor) -> Iterator[str]:
    """A node of this test's own, which no other test's pod tolerates."""
    core: Any = cluster.core
    body: Any = node(0)
    name = f"drained-{uuid.uuid4().hex[:8]}"
    body["metadata"] |= {"name": name, "labels": {"kubernetes.io/hostname": name}}
    body["spec"] = {"taints": [{"key": "drained", "value": name, "effect": "NoSchedule"}]}
    core.create_node(body)

    def ready() -> bool:
        conditions = core.read_node(name).status.conditions or ()
        return any(condition.type == "Ready" and condition.status == "True" for condition in conditions)

    try:
        wait_for(ready, 30, f"the node {name}")
        yield name
    finally:
        core.delete_node(name)


def on_node(name: str) -> Mapping[str, Any]:
    return {
        "nodeSelector": {"kubernetes.io/hostname": name},
        "tolerations": [{"key": "drained", "operator": "Equal", "value": name, "effect": "NoSchedule"}],
        "annotations": {"simulate.ingestrun.dev/hold": "true"},
    }


def test_drain_without_flags_evicts_and_the_attempts_are_free(
    cluster: Cluster,
    namespace: str,
    operator: OperatorProcess,
    wait_for: WaitFor,
) -> None:
    with simulated_node(cluster, wait_for) as name:
        cluster.create_run(
            namespace,
            spec(hooks=[], batches={"partitions": {"count": 3}}, retries=0, podTemplate=on_node(name)),
            name="run",
        )

        def running() -> bool:
            return [pod.status.phase for pod in cluster.pods(namespace)] == ["Running"] * 3

        wait_for(running, 60, "three running pods")
        drain = subprocess.run(
            [
                *("kubectl", "--kubeconfig", str(cluster.kubeconfig), "--context", cluster.context),
                *("drain", name, "--pod-selector=ingestrun.dev/run", "--ignore-daemonsets", "--timeout=60s"),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        assert drain.returncode == 0, drain.stderr
        assert drain.stdout.count("evicted") == 3

        def told() -> list[Json]:
            failures: list[Json] = cluster.run(namespace, "run")["status"].get("failures", [])
            assert len(failures) == 3
            return failures

        failures = wait_for(told, 60, "three failed attempts")
        assert {failure["reason"] for failure in failures} == {"Evicted"}
        assert all("for disruptions" in failure["message"] for failure in failures)
        assert cluster.run(namespace, "run")["status"]["phase"] == "Running", "retries: 0, and none was taken"


def test_a_stage_that_runs_past_its_deadline_is_tried_again(
    cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor
) -> None:
    """The first fetch is held, and so runs into it; what follows is let go."""
    slow = {"image": "example/worker:1", "activeDeadlineSeconds": 4}
    cluster.create_run(
        namespace, spec({"hold": "true"}, fetch=slow, hooks=None, batches={"partitions": {"count": 1}}), name="slow"
    )
    first = "ingestrun.dev/stage=fetch,ingestrun.dev/attempt=0"

    def failed() -> Any:
        pods = cluster.pods(namespace, first)
        return pods[0] if pods and pods[0].status.phase == "Failed" else None

    pod = wait_for(failed, 60, "the end at the deadline")
    lived = pod.status.container_statuses[0].state.terminated.finished_at - pod.status.start_time
    assert 3 <= lived.total_seconds() <= 60
    assert pod.status.reason == "DeadlineExceeded"
    released: set[str] = set()

    def succeeded() -> Json:
        for each in cluster.pods(namespace):
            if each.metadata.name not in released | {pod.metadata.name} and each.status.phase == "Running":
                release = {"metadata": {"annotations": {"simulate.ingestrun.dev/hold": None}}}
                cluster.core.patch_namespaced_pod(each.metadata.name, namespace, release)
                released.add(each.metadata.name)
        return in_phase(cluster, namespace, "slow", "Succeeded")()

    run = wait_for(succeeded, 60, "Succeeded")
    assert run["status"]["retries"] == [{"stage": "fetch", "reason": "DeadlineExceeded", "count": 1}]
    (failure,) = run["status"]["failures"]
    assert failure["message"].startswith("the stage ran longer than its activeDeadlineSeconds; retry 1 of 3 in ")

    def verdict() -> list[str]:
        (job,) = cluster.jobs(namespace, first)
        return [c.reason for c in job.status.conditions or () if c.type == "Failed"]

    # The operator goes by the pod, and does not wait for the Job controller.
    assert wait_for(verdict, 30, "the Job to have failed") == ["BackoffLimitExceeded"]


def test_the_end_of_the_log_is_shown(
    cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor
) -> None:
    annotations = {"fail-attempts": "9", "message": "Traceback:\n  File x\nValueError: 7\n"}
    cluster.create_run(namespace, spec(annotations, retries=1), name="loud")
    run = wait_for(in_phase(cluster, namespace, "loud", "Failed"), 60, "Failed")
    assert [failure["log"] for failure in run["status"]["failures"]] == ["Traceback:\n  File x\nValueError: 7"] * 2
    first, second = (failure["message"] for failure in run["status"]["failures"])
    assert first.startswith("exit code 1: ValueError: 7; retry 1 of 1 ")
    assert second == "exit code 1: ValueError: 7"
    assert run["status"]["retries"] == [{"stage": "fetch", "reason": "Error", "count": 1}]
    wait_for(lambda: len(operator.lines("stage failed")) == 2, 10, "both log lines")
    assert [line["reason"] for line in operator.lines("stage failed")] == ["Error", "Error"]


# --------------------------------------------------------------------------------------- what the server refuses


@pytest.fixture
def denying(cluster: Cluster, namespace: str, wait_for: WaitFor) -> Iterator[str]:
    """An admission policy that lets no Job of a publish into the namespace; its sentence."""
    here = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": namespace}}}
    sentence = "publishing is closed until Monday"
    jobs = {"apiGroups": ["batch"], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["jobs"]}
    policy = {
        "apiVersion": "/".join(ADMISSION),
        "kind": "ValidatingAdmissionPolicy",
        "metadata": {"name": namespace},
        "spec": {
            "matchConstraints": {"resourceRules": [jobs]},
            "validations": [
                {
                    "expression": "object.metadata.?labels['ingestrun.dev/stage'].orValue('') != 'publish'",
                    "message": sentence,
                }
            ],
        },
    }
    binding = {
        "apiVersion": "/".join(ADMISSION),
        "kind": "ValidatingAdmissionPolicyBinding",
        "metadata": {"name": namespace},
        "spec": {"policyName": namespace, "validationActions": ["Deny"], "matchResources": here},
    }
    probe = {
        "metadata": {"name": "probe", "labels": {"ingestrun.dev/stage": "publish"}},
        "spec": {"template": {"spec": {"restartPolicy": "Never", "containers": [{"name": "c", "image": "i"}]}}},
    }
    batch: Any = cluster.batch

    def denied() -> bool:
        try:
            batch.create_namespaced_job(namespace, probe, dry_run="All")
        except client.ApiException as error:
            return sentence in refusal(error)
        return False

    cluster.custom.create_cluster_custom_object(*ADMISSION, "validatingadmissionpolicies", policy)
    cluster.custom.create_cluster_custom_object(*ADMISSION, "validatingadmissionpolicybindings", binding)
    try:
        wait_for(denied, 60, "the policy to hold")
        yield sentence
    finally:
        cluster.custom.delete_cluster_custom_object(*ADMISSION, "validatingadmissionpolicybindings", namespace)
        cluster.custom.delete_cluster_custom_object(*ADMISSION, "validatingadmissionpolicies", namespace)


def test_a_denied_job_fails_the_run_with_the_policys_sentence(
    cluster: Cluster, namespace: str, denying: str, operator: OperatorProcess, wait_for: WaitFor
) -> None:
    cluster.create_run(namespace, spec({"batches": "1"}), name="closed")
    run = wait_for(in_phase(cluster, namespace, "closed", "Failed"), 60, "Failed")
    assert condition(run, "Succeeded")["reason"] == "AdmissionDenied"
    assert condition(run, "Succeeded")["message"].startswith("batch 0, publish: ")
    assert condition(run, "Succeeded")["message"].endswith(f"denied request: {denying}")
    assert run["status"]["records"]["published"] == 0
    assert [line["reason"] for line in operator.lines("job refused")] == ["AdmissionDenied"]


def test_a_webhook_that_cannot_be_called_holds_the_run(
    cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor
) -> None:
    webhook = {
        "apiVersion": "/".join(ADMISSION),
        "kind": "ValidatingWebhookConfiguration",
        "metadata": {"name": namespace},
        "webhooks": [
            {
                "name": "names.example.com",
                "admissionReviewVersions": ["v1"],
                "sideEffects": "None",
                "failurePolicy": "Fail",
                "timeoutSeconds": 2,
                "clientConfig": {"service": {"name": "nobody", "namespace": namespace}},
                "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": namespace}},
                "rules": [
                    {"apiGroups": ["batch"], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["jobs"]}
                ],
            }
        ],
    }
    probe = {
        "metadata": {"name": "probe"},
        "spec": {"template": {"spec": {"restartPolicy": "Never", "containers": [{"name": "c", "image": "i"}]}}},
    }
    batch: Any = cluster.batch

    def down() -> bool:
        try:
            batch.create_namespaced_job(namespace, probe, dry_run="All")
        except client.ApiException as error:
            return "failed calling webhook" in refusal(error)
        return False

    cluster.custom.create_cluster_custom_object(*ADMISSION, "validatingwebhookconfigurations", webhook)
    try:
        wait_for(down, 60, "the webhook to be asked")
        cluster.create_run(namespace, spec({"batches": "1"}, backpressure={"retrySeconds": 1}), name="asked")
        wait_for(
            lambda: condition(cluster.run(namespace, "asked"), "Backpressured")["reason"] == "WebhookUnavailable",
            60,
            "the run to say so",
        )
        said = condition(cluster.run(namespace, "asked"), "Backpressured")["message"]
        assert 'failed calling webhook "names.example.com"' in said
    finally:
        cluster.custom.delete_cluster_custom_object(*ADMISSION, "validatingwebhookconfigurations", namespace)
    run = wait_for(in_phase(cluster, namespace, "asked", "Succeeded"), 90, "Succeeded")
    assert condition(run, "Backpressured")["status"] == "False"


@pytest.fixture
def without_create(cluster: Cluster, namespace: str, tmp_path: Path) -> Path:
    """A kubeconfig of an account of the test's own, with the operator's rights but that to create Jobs."""
    (role,) = [
        body
        for body in yaml.safe_load_all((REPOSITORY / "manifests/base/rbac.yaml").read_text())
        if body["kind"] == "ClusterRole"
    ]
    for rule in role["rules"]:
        if rule["resources"] == ["jobs"]:
            rule["verbs"].remove("create")
    core: Any = cluster.core
    core.create_namespaced_service_account(namespace, {"metadata": {"name": "limited"}})
    grant(cluster, namespace, "most", role["rules"])
    token = core.create_namespaced_service_account_token("limited", namespace, {"spec": {"expirationSeconds": 3600}})
    kubeconfig = yaml.safe_load(cluster.kubeconfig.read_text())
    for context in kubeconfig["contexts"]:
        context["context"]["user"] = "limited"
    kubeconfig["users"] = [{"name": "limited", "user": {"token": token.status.token}}]
    path = tmp_path / "limited.kubeconfig"
    path.touch(mode=0o600)
    path.write_text(yaml.safe_dump(kubeconfig))
    return path


def grant(cluster: Cluster, namespace: str, name: str, rules: list[Json]) -> None:
    """Give the account these rights in its namespace."""
    rbac: Any = client.RbacAuthorizationV1Api(cluster.api)
    rbac.create_namespaced_role(namespace, {"metadata": {"name": name}, "rules": rules})
    binding = {
        "metadata": {"name": name},
        "roleRef": {"kind": "Role", "name": name, "apiGroup": RBAC},
        "subjects": [{"kind": "ServiceAccount", "name": "limited", "namespace": namespace}],
    }
    rbac.create_namespaced_role_binding(namespace, binding)


def test_a_missing_right_is_named_and_the_run_goes_on_once_it_is_granted(
    cluster: Cluster, crd: Json, namespace: str, without_create: Path, wait_for: WaitFor, tmp_path: Path
) -> None:
    assert crd
    operator = OperatorProcess(
        kubeconfig=without_create, context=cluster.context, namespace=namespace, log=tmp_path / "operator.log"
    )
    operator.start()
    try:
        cluster.create_run(namespace, spec({"batches": "1"}, backpressure={"retrySeconds": 1}), name="bound")
        wait_for(
            lambda: condition(cluster.run(namespace, "bound"), "Backpressured")["reason"] == "Forbidden",
            60,
            "the run to say so",
        )
        said = condition(cluster.run(namespace, "bound"), "Backpressured")["message"]
        assert said.startswith("the operator lacks a right that an administrator has to grant: jobs.batch is forbidden")
        assert f'cannot create resource "jobs" in API group "batch" in the namespace "{namespace}"' in said
        grant(cluster, namespace, "rest", [{"apiGroups": ["batch"], "resources": ["jobs"], "verbs": ["create"]}])
        run = wait_for(in_phase(cluster, namespace, "bound", "Succeeded"), 90, "Succeeded")
    finally:
        operator.stop()
    assert condition(run, "Backpressured")["status"] == "False"
    assert run["status"]["records"]["published"] == 10
