"""What platforms ask of pods: pod security `restricted`, and users of their choosing."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Iterator
from typing import Any, Final

import pytest
from kubernetes import client

from ingestrun.model.run import IngestRun
from ingestrun.planner.actions import CreateJob
from ingestrun.planner.batch.pipeline import on_cancel_step, steps_of
from ingestrun.planner.batch.state import NextAttempt
from ingestrun.planner.jobs.manifest import WorkerImage, job_manifest
from tests.api.conftest import Cluster, Json, WaitFor

OWN: Final = {"image": "example/own:1"}
WORKSPACE: Final = {"persistentVolumeClaim": {"claimName": "data"}}
STAGES: Final[dict[str, Json]] = {
    "own containers": {"fetch": OWN, "hooks": [{"name": "h", "container": OWN}], "publish": OWN, "onCancel": OWN},
    "own containers with a workspace": {"fetch": OWN, "publish": OWN, "workspace": WORKSPACE},
    "the built-in worker": {
        "source": {"files": {"path": "in/{partition}.csv"}},
        "hooks": [{"name": "check", "validate": {"columns": [{"name": "id"}]}}],
        "sink": {"parquet": {"path": "out"}},
        "workspace": WORKSPACE,
    },
}
TEMPLATES: Final[dict[str, Json]] = {
    "nothing": {},
    "left to the platform": {"securityContext": {}},
    "another user": {"securityContext": {"runAsUser": 1000650000, "runAsGroup": 0, "fsGroup": 1000650000}},
    "all of the security context": {
        "securityContext": {
            "runAsUser": 2147483647,
            "runAsGroup": 2147483647,
            "fsGroup": 0,
            "fsGroupChangePolicy": "Always",
            "supplementalGroups": [0, 5],
            "seLinuxOptions": {"level": "s0:c123,c456", "type": "container_init_t"},
        }
    },
    "every kind of volume": {
        "volumes": [
            {"name": "claim", "persistentVolumeClaim": {"claimName": "a", "readOnly": True}},
            {"name": "map", "configMap": {"name": "a"}},
            {"name": "secret", "secret": {"secretName": "a"}},
            {"name": "tmp", "emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}},
        ],
        "volumeMounts": [
            {"name": name, "mountPath": path}
            for name, path in (("claim", "/a"), ("map", "/b"), ("secret", "/c"), ("tmp", "/tmp"))
        ],
    },
    "the rest": {
        "serviceAccountName": "default",
        "nodeSelector": {"a": "b"},
        "tolerations": [{"operator": "Exists"}],
        "imagePullSecrets": [{"name": "a"}],
        "annotations": {"sidecar.example.org/inject": "false"},
    },
}


@pytest.fixture(scope="module")
def restricted(cluster: Cluster, crd: Json) -> Iterator[str]:
    """A namespace in which pod security `restricted` is enforced."""
    assert crd
    core: Any = cluster.core
    name = f"ir-test-{uuid.uuid4().hex[:10]}"
    labels = {"ingestrun.dev/test": "true", "pod-security.kubernetes.io/enforce": "restricted"}
    core.create_namespace({"metadata": {"name": name, "labels": labels}})
    # Pods are refused until a controller has made their account.
    yield name
    core.delete_namespace(name)


def post_pods(cluster: Cluster, namespace: str, made: Json, user: int | None) -> int:
    """Post the pod of each of a run's Jobs, by dry run; their number."""
    made["metadata"]["resourceVersion"] = "1"  # that of a dry run has none
    run, posted = IngestRun.read(made), 0
    clean_up = on_cancel_step(run.spec)
    for step in [*steps_of(run.spec), *([clean_up] if clean_up is not None else [])]:
        create = CreateJob(attempt=NextAttempt(batch=0, step=step, number=0, input_attempt=None))
        job = job_manifest(run, create, worker=WorkerImage(name="example/worker:1"), user=user)
        core: Any = cluster.core
        pod = {"metadata": {"generateName": "p-", **job["spec"]["template"]["metadata"]}}
        core.create_namespaced_pod(namespace, {**pod, "spec": job["spec"]["template"]["spec"]}, dry_run="All")
        posted += 1
    return posted


@pytest.mark.parametrize(("stages", "template"), list(itertools.product(STAGES, TEMPLATES)))
def test_every_pod_that_a_run_can_ask_for_is_restricted(
    stages: str, template: str, cluster: Cluster, restricted: str, wait_for: WaitFor
) -> None:
    batches = {"partitions": {"values": ["a"]}}
    made = cluster.create_run(
        restricted, {**STAGES[stages], "batches": batches, "podTemplate": TEMPLATES[template]}, dry_run=True
    )
    wait_for(lambda: cluster.core.read_namespaced_service_account("default", restricted), 10, "the account")
    for user in (65532, None):
        assert post_pods(cluster, restricted, made, user) >= 2


def test_restricted_is_what_refuses_the_others(cluster: Cluster, restricted: str, wait_for: WaitFor) -> None:
    """The counter-check: a pod with one setting more than the CRD has is refused there."""
    wait_for(lambda: cluster.core.read_namespaced_service_account("default", restricted), 10, "the account")
    made = cluster.create_run(restricted, {**STAGES["own containers"], "batches": {"cursor": {}}}, dry_run=True)
    annotated = {"container.apparmor.security.beta.kubernetes.io/fetch": "unconfined"}
    made["spec"]["podTemplate"] = {"annotations": annotated}
    with pytest.raises(client.ApiException) as refused:
        post_pods(cluster, restricted, made, None)
    assert "violates PodSecurity" in str(refused.value.body)
