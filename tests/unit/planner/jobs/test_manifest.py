"""The manifest of a Job: what of it a rule of Kubernetes' own depends on."""

from __future__ import annotations

from typing import Any

import pytest
from tests.fakes.world import manifest

from ingestrun.model.run import IngestRun
from ingestrun.model.spec import IngestRunSpec
from ingestrun.planner.actions import CreateJob
from ingestrun.planner.batch.pipeline import Step, on_cancel_step, steps_of
from ingestrun.planner.batch.state import NextAttempt
from ingestrun.planner.jobs.manifest import WorkerImage, job_manifest

IMAGE = {"image": "example/worker:1"}


def run_of(**spec: Any) -> IngestRun:
    body = manifest(**spec)
    body["metadata"] |= {"uid": "u-1", "generation": 1, "resourceVersion": "1"}
    body["metadata"]["creationTimestamp"] = "2026-11-23T12:00:00Z"
    return IngestRun.read({**body, "status": {"observedGeneration": -1}})


def fetch(spec: IngestRunSpec) -> Step:
    return steps_of(spec)[0]


def clean_up(spec: IngestRunSpec) -> Step:
    step = on_cancel_step(spec)
    assert step is not None
    return step


@pytest.mark.parametrize(
    ("step_of", "spec", "seconds"),
    [
        (fetch, {"fetch": {**IMAGE, "activeDeadlineSeconds": 90}}, 90),
        (fetch, {}, 3600),
        (clean_up, {"onCancel": {**IMAGE, "activeDeadlineSeconds": 90}}, 90),
        (clean_up, {"onCancel": IMAGE}, 300),
    ],
)
def test_the_deadline_is_the_pods_and_the_job_has_none_that_waiting_could_meet(
    step_of: Any, spec: dict[str, Any], seconds: int
) -> None:
    run = run_of(**spec)
    create = CreateJob(attempt=NextAttempt(batch=0, step=step_of(run.spec), number=0, input_attempt=None))
    job = job_manifest(run, create, worker=WorkerImage(name="example/worker:1"))
    assert "activeDeadlineSeconds" not in job["spec"]
    assert job["spec"]["template"]["spec"]["activeDeadlineSeconds"] == seconds


DEFAULT = {"runAsUser": 65532, "runAsGroup": 65532, "fsGroup": 65532, "fsGroupChangePolicy": "OnRootMismatch"}
ALWAYS = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}


def pod_of(run: IngestRun, step: Step, **defaults: Any) -> dict[str, Any]:
    create = CreateJob(attempt=NextAttempt(batch=0, step=step, number=0, input_attempt=None))
    job = job_manifest(run, create, worker=WorkerImage(name="example/worker:1"), **defaults)
    pod: dict[str, Any] = job["spec"]["template"]["spec"]
    return pod


@pytest.mark.parametrize(
    ("template", "user", "expected"),
    [
        ({}, 65532, DEFAULT),
        ({}, 1234, {**DEFAULT, "runAsUser": 1234, "runAsGroup": 1234, "fsGroup": 1234}),
        ({}, None, {"fsGroupChangePolicy": "OnRootMismatch"}),
        # The run's own replaces all of the default: a group that nobody has named is the platform's.
        ({"securityContext": {}}, 65532, {"fsGroupChangePolicy": "OnRootMismatch"}),
        (
            {"securityContext": {"runAsUser": 1000650000}},
            65532,
            {"runAsUser": 1000650000, "fsGroupChangePolicy": "OnRootMismatch"},
        ),
        (
            {
                "securityContext": {
                    "runAsUser": 7,
                    "runAsGroup": 0,
                    "fsGroup": 9,
                    "fsGroupChangePolicy": "Always",
                    "supplementalGroups": [10, 11],
                    "seLinuxOptions": {"level": "s0:c1,c2"},
                }
            },
            None,
            {
                "runAsUser": 7,
                "runAsGroup": 0,
                "fsGroup": 9,
                "fsGroupChangePolicy": "Always",
                "supplementalGroups": [10, 11],
                "seLinuxOptions": {"level": "s0:c1,c2"},
            },
        ),
    ],
)
@pytest.mark.parametrize("step_of", [fetch, clean_up])
def test_the_pods_user_is_the_runs_or_the_default_or_the_platforms(
    step_of: Any, template: dict[str, Any], user: int | None, expected: dict[str, Any]
) -> None:
    run = run_of(onCancel=IMAGE, podTemplate=template)
    assert pod_of(run, step_of(run.spec), user=user)["securityContext"] == {**ALWAYS, **expected}


WORKSPACE = {"persistentVolumeClaim": {"claimName": "data"}}
BUILT_IN = {
    "source": {"files": {"path": "in/*.csv"}},
    "fetch": None,
    "sink": {"parquet": {"path": "out"}},
    "publish": None,
    "hooks": [{"name": "check", "validate": {"columns": [{"name": "id"}]}}],
    "workspace": WORKSPACE,
}
SCRATCH_VOLUME: dict[str, Any] = {
    "volumes": [{"name": "scratch", "emptyDir": {}}, {"name": "ca", "configMap": {"name": "ca"}}],
    "volumeMounts": [{"name": "scratch", "mountPath": "/tmp"}, {"name": "ca", "mountPath": "/ca"}],
}


def test_no_pod_has_local_storage_that_would_stop_a_drain() -> None:
    """`kubectl drain` refuses pods with an emptyDir, of whatever medium, unless it is told to delete their data."""
    for run in (run_of(**BUILT_IN), run_of(onCancel=IMAGE), run_of(onCancel=IMAGE, workspace=WORKSPACE)):
        for step in (*steps_of(run.spec), *filter(None, [on_cancel_step(run.spec)])):
            volumes = pod_of(run, step).get("volumes", [])
            assert [volume.keys() - {"name"} for volume in volumes] == [{"persistentVolumeClaim"}] * len(volumes)


@pytest.mark.parametrize(
    ("spec", "read_only"),
    [
        (BUILT_IN, True),
        ({}, False),
        ({"workspace": WORKSPACE}, False),
        ({"podTemplate": SCRATCH_VOLUME}, True),
        ({**BUILT_IN, "podTemplate": SCRATCH_VOLUME}, True),
        ({"podTemplate": {**SCRATCH_VOLUME, "volumeMounts": [{"name": "scratch", "mountPath": "/tmp/cache"}]}}, False),
    ],
)
def test_the_root_is_read_only_where_the_stage_needs_no_scratch_in_it(spec: dict[str, Any], read_only: bool) -> None:
    run = run_of(**spec)
    for step in steps_of(run.spec):
        (container,) = pod_of(run, step)["containers"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": read_only,
            "capabilities": {"drop": ["ALL"]},
        }


EVICTABLE = "cluster-autoscaler.kubernetes.io/safe-to-evict-local-volumes"


@pytest.mark.parametrize(
    ("template", "annotations"),
    [
        ({}, None),
        ({"annotations": {"a": "b"}}, {"a": "b"}),
        (SCRATCH_VOLUME, {EVICTABLE: "scratch"}),
        (
            {**SCRATCH_VOLUME, "volumes": [*SCRATCH_VOLUME["volumes"], {"name": "more", "emptyDir": {}}]},
            {EVICTABLE: "scratch,more"},
        ),
        ({**SCRATCH_VOLUME, "annotations": {EVICTABLE: "", "a": "b"}}, {EVICTABLE: "", "a": "b"}),
    ],
)
def test_the_autoscaler_may_evict_what_an_attempt_keeps_locally(
    template: dict[str, Any], annotations: dict[str, str] | None
) -> None:
    run = run_of(podTemplate=template)
    create = CreateJob(attempt=NextAttempt(batch=0, step=fetch(run.spec), number=0, input_attempt=None))
    job = job_manifest(run, create, worker=WorkerImage(name="example/worker:1"))
    assert job["spec"]["template"]["metadata"].get("annotations") == annotations
