"""What others do to a run's Jobs on a real API server: quotas, copies, TTL policies, orphan deletion."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
from kubernetes import client

from tests.api.conftest import Cluster, Json, WaitFor
from tests.api.operator_process import OperatorProcess
from tests.api.test_capacity import partitions, quota
from tests.api.test_runs import Audit, condition, created_jobs, drained, in_phase, spec

PODS = "count_pods"
IGNORED = "ignoring a Job that is not of the run that its labels name"


@pytest.mark.waits
@pytest.mark.parametrize("parallelism", [1, 4])
def test_one_pod_of_a_quota_that_counts_ended_ones_is_enough(
    parallelism: int, cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor, audit: Audit
) -> None:
    quota(cluster, namespace, wait_for, **{PODS: "1"})
    cluster.create_run(namespace, partitions(3, parallelism), name="run")
    run = wait_for(in_phase(cluster, namespace, "run", "Succeeded"), 400, "Succeeded")
    assert run["status"]["records"] == {"fetched": 30, "rejected": 0, "published": 30}
    assert (run["status"]["failures"], run["status"]["retries"]) == ([], [])
    assert len(created_jobs(audit(namespace))) == 3 * 3, "no stage is done twice"


@pytest.mark.waits
def test_what_a_failed_run_keeps_gives_way_to_another_run(
    cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor
) -> None:
    quota(cluster, namespace, wait_for, **{PODS: "2"})
    failing = partitions(1, 1, {"fail-attempts": "9", "fail-stage": "hook", "fail-batch": "0"}, retries=0)
    cluster.create_run(namespace, failing, name="broken")
    wait_for(in_phase(cluster, namespace, "broken", "Failed"), 60, "Failed")
    wait_for(drained(cluster, namespace, "broken"), 60, "Drained")
    assert cluster.pods(namespace)
    cluster.create_run(namespace, partitions(1, 1), name="next")
    wait_for(in_phase(cluster, namespace, "next", "Succeeded"), 300, "Succeeded")


def copied(job: Any, api: Any, name: str) -> Any:
    """The Job under another name, as people make one to look into a stage."""
    body: Json = copy.deepcopy(api.sanitize_for_serialization(job))

    def clean(labels: Json) -> Json:
        return {key: value for key, value in labels.items() if "controller-uid" not in key and "job-name" not in key}

    template = body["spec"]["template"]["metadata"]
    body["metadata"] = {"name": name, "labels": clean(body["metadata"]["labels"])}
    template["labels"] = clean(template["labels"])
    template.setdefault("annotations", {})["simulate.ingestrun.dev/hold"] = "true"
    del body["spec"]["selector"], body["status"]
    return body


def test_a_copy_of_a_stage_is_ignored_left_alone_and_told_once(
    cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor
) -> None:
    cluster.create_run(namespace, partitions(1, 1, {"run-seconds": "3"}), name="run")
    (fetch,) = wait_for(lambda: cluster.jobs(namespace), 60, "a Job")
    cluster.batch.create_namespaced_job(namespace, copied(fetch, cluster.api, "debug-fetch"))
    wait_for(in_phase(cluster, namespace, "run", "Succeeded"), 90, "Succeeded")
    (line,) = operator.lines(IGNORED)
    assert (line["job"], line["run"], line["namespace"]) == ("debug-fetch", "run", namespace)
    cluster.create_run(namespace, partitions(1, 1, {"hold": "true"}), name="second")
    (held,) = wait_for(lambda: [job for job in cluster.jobs(namespace) if "second" in job.metadata.name], 60, "a Job")
    cluster.batch.create_namespaced_job(namespace, copied(held, cluster.api, "debug-second"))
    wait_for(lambda: len(operator.lines(IGNORED)) == 2, 30, "the second line")
    cluster.patch_spec(namespace, "second", cancel=True, cancellation={"policy": "Terminate"})
    wait_for(drained(cluster, namespace, "second"), 90, "Drained, though the copy's pod runs")
    left = {job.metadata.name for job in cluster.jobs(namespace)}
    assert {"debug-fetch", "debug-second"} <= left


def test_a_foreign_job_under_a_stages_name_fails_the_run_with_its_name(
    cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor
) -> None:
    cluster.create_run(namespace, partitions(1, 1, {"hold": "true"}), name="run")
    (fetch,) = wait_for(lambda: cluster.jobs(namespace), 60, "a Job")
    name = fetch.metadata.name
    operator.kill()
    cluster.batch.delete_namespaced_job(name, namespace, propagation_policy="Background")
    wait_for(lambda: not cluster.jobs(namespace), 30, "the Job to go")
    cluster.batch.create_namespaced_job(namespace, copied(fetch, cluster.api, name))
    operator.start()
    run = wait_for(in_phase(cluster, namespace, "run", "Failed"), 60, "Failed")
    assert condition(run, "Succeeded")["reason"] == "NameTaken"
    assert f"a Job {name} exists that is not of this run (nothing owns it)" in condition(run, "Succeeded")["message"]
    assert [job.metadata.name for job in cluster.jobs(namespace)] == [name], "it is left alone"


@pytest.fixture
def ttl_policy(cluster: Cluster, namespace: str, wait_for: WaitFor) -> Iterator[None]:
    """A policy of the cluster that gives all Jobs of the namespace a TTL of 0."""
    api: Any = client.AdmissionregistrationV1Api(cluster.api)
    name = f"ttl-{namespace}"
    expression = "[JSONPatch{op: 'add', path: '/spec/ttlSecondsAfterFinished', value: 0}]"
    api.create_mutating_admission_policy(
        {
            "metadata": {"name": name},
            "spec": {
                "failurePolicy": "Fail",
                "reinvocationPolicy": "Never",
                "matchConstraints": {
                    "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": namespace}},
                    "resourceRules": [
                        {"apiGroups": ["batch"], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["jobs"]}
                    ],
                },
                "mutations": [{"patchType": "JSONPatch", "jsonPatch": {"expression": expression}}],
            },
        }
    )
    api.create_mutating_admission_policy_binding({"metadata": {"name": name}, "spec": {"policyName": name}})
    probe = client.V1Job(
        metadata=client.V1ObjectMeta(generate_name="probe-"),
        spec=client.V1JobSpec(
            template=client.V1PodTemplateSpec(
                spec=client.V1PodSpec(
                    restart_policy="Never", containers=[client.V1Container(name="c", image="example/worker:1")]
                )
            )
        ),
    )

    def in_force() -> bool:
        job: Any = cluster.batch.create_namespaced_job(namespace, probe, dry_run="All")
        return bool(job.spec.ttl_seconds_after_finished == 0)

    wait_for(in_force, 60, "the policy to be in force")
    yield
    api.delete_mutating_admission_policy_binding(name)
    api.delete_mutating_admission_policy(name)


def test_a_chain_under_a_ttl_of_zero_is_suspended_and_goes_on_exactly_there(
    cluster: Cluster,
    namespace: str,
    ttl_policy: None,
    operator: OperatorProcess,
    wait_for: WaitFor,
    audit: Audit,
) -> None:
    body = spec({"run-seconds": "2", "batches": "3"}, parallelism=2)
    cluster.create_run(namespace, body, name="chain")
    wait_for(lambda: cluster.jobs(namespace), 60, "a Job")
    cluster.patch_spec(namespace, "chain", suspend=True)
    wait_for(lambda: not cluster.jobs(namespace), 60, "the policy to take the ended fetch")

    def kept() -> bool:
        status = cluster.run(namespace, "chain")["status"]
        assert (status["phase"], status["batches"]["fetched"]) == ("Suspended", "0"), status
        return bool(status["batches"]["checkpoints"])

    wait_for(kept, 30, "what the next stage needs to be in the status")
    operator.kill()
    operator.start()
    cluster.patch_spec(namespace, "chain", suspend=None)
    run = wait_for(in_phase(cluster, namespace, "chain", "Succeeded"), 120, "Succeeded")
    assert run["status"]["records"] == {"fetched": 30, "rejected": 0, "published": 30}
    assert (run["status"]["failures"], run["status"]["retries"]) == ([], [])
    made = [name for name in created_jobs(audit(namespace)) if name.startswith("chain-")]  # and no probe of the policy
    assert len(set(made)) == len(made) == 3 * 3


@pytest.mark.parametrize("down", [False, True])
def test_orphaned_jobs_go_with_the_operator_down_at_first_too(
    down: bool, cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor
) -> None:
    cluster.create_run(namespace, partitions(6, 2, {"hold": "true"}), name="orphan")
    wait_for(lambda: len(cluster.pods(namespace)) == 2, 60, "two pods")
    stranger = copied(cluster.jobs(namespace)[0], cluster.api, "debug")
    if down:
        operator.kill()
    cluster.custom.delete_namespaced_custom_object(
        "ingestrun.dev", "v1alpha1", namespace, "ingestruns", "orphan", propagation_policy="Orphan"
    )
    cluster.batch.create_namespaced_job(namespace, stranger)
    if down:
        wait_for(lambda: not cluster.runs(namespace), 60, "the run to go")
        assert len(cluster.jobs(namespace)) == 3
        operator.start()
    wait_for(lambda: len(cluster.jobs(namespace)) == 1, 60, "the orphans to go")
    assert [job.metadata.name for job in cluster.jobs(namespace)] == ["debug"], "a user's copy is no orphan"
    wait_for(lambda: len(operator.lines("orphaned job deleted")) == 2, 30, "both to be told")
    told = operator.lines("orphaned job deleted")
    assert [(line["run"], line["namespace"]) for line in told] == [("orphan", namespace)] * 2
