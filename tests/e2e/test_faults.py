"""Each fault of the worker in the demo's ingest, on a real kubelet: exact counts after retries, or the right reason.

The stages are the worker's image as containers of one's own. What the operator gives the built-in worker
(INGEST_CONFIG), and the fault, come from ConfigMaps by `envFrom`; the program that does the fault (fault_injection.py)
is mounted from another. So nothing in the product knows of faults.
All runs start together; each is waited for on its own.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest

from tests.e2e import fault_injection
from tests.e2e.cluster import Json, Kubectl, condition, image, phase
from tests.e2e.runs import ended, events, flights
from tests.e2e.test_flights import check_dataset

SIZE: Final = 10_000
ROWS: Final = 2 * SIZE
FETCH, HOOK, PUBLISH = "fetch", "hook validate", "publish"
PROGRAM: Final = Path(fault_injection.__file__)
MOUNT: Final = "/fault-injection"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A fault, and what comes of it in two batches of `SIZE` rows each."""

    fault: str
    retries: list[tuple[str, str, int]] = field(default_factory=list)
    """`status.retries`: stage, reason, count."""
    published: int = ROWS
    reason: str = "Completed"
    changes: Json = field(default_factory=dict)
    publish: Json = field(default_factory=dict)
    hook: Json = field(default_factory=dict)


CASES: Final = {
    "oom": Case(
        fault="oom,attempts:1,stage:hook,batch:1",
        retries=[(HOOK, "OOMKilled", 1)],
        hook={"resources": {"requests": {"memory": "128Mi"}, "limits": {"memory": "256Mi"}}},
        changes={"outOfMemory": {"maxMemory": "400Mi"}, "retries": 0},
    ),
    "exit-twice": Case(fault="exit:1,attempts:2,stage:fetch,batch:1", retries=[(FETCH, "Error", 2)]),
    "exit-after": Case(fault="exit-after:1,attempts:1,stage:publish", retries=[(PUBLISH, "Error", 2)]),
    "permanent": Case(
        fault="permanent,stage:hook,batch:1",
        published=SIZE,
        reason="CompletedWithFailedBatches",
        changes={"onBatchFailure": "Continue"},
    ),
    "hang": Case(
        fault="hang,attempts:1,stage:publish,batch:0",
        retries=[(PUBLISH, "DeadlineExceeded", 1)],
        publish={"activeDeadlineSeconds": 20},
    ),
    "garbage": Case(fault="garbage,attempts:1,stage:fetch", retries=[(FETCH, "ResultInvalid", 2)]),
    "missing": Case(fault="missing,attempts:1,stage:publish", retries=[(PUBLISH, "ResultInvalid", 2)]),
    "for-good": Case(
        fault="exit:3,stage:fetch", published=0, reason="FetchFailed", changes={"retries": 1}
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def started(kubectl: Kubectl, namespace: str) -> None:
    """All runs at once: they wait for one another's pods, not for one another's tests."""
    program = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "fault-injection", "namespace": namespace},
        "data": {PROGRAM.name: PROGRAM.read_text()},
    }
    kubectl.apply([program])
    for name, case in CASES.items():
        body, config = faulty(namespace, f"fault-{name}", case)
        kubectl.apply([*config, body])


def faulty(namespace: str, name: str, case: Case) -> tuple[Json, list[Json]]:
    """The demo's run with its stages as containers, and the ConfigMaps that tell them what to do."""
    body = flights(namespace, name, batches={"cursor": {}, "size": SIZE, "limit": ROWS})
    spec = body["spec"]
    validate = spec["hooks"][0]["validate"]
    stages = {"fetch": spec.pop("source"), "validate": {"validate": validate}, "publish": spec.pop("sink")}
    config = [
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": f"{name}-{stage}", "namespace": namespace},
            "data": {"INGEST_CONFIG": json.dumps(settings), fault_injection.ENV_FAULT: case.fault},
        }
        for stage, settings in stages.items()
    ]

    def container(stage: str, more: Json) -> Json:
        variables = [{"configMapRef": {"name": f"{name}-{stage}"}}]
        command = ["python", f"{MOUNT}/{PROGRAM.name}"]
        return {"image": image("WORKER_IMAGE"), "command": command, "envFrom": variables, **more}

    spec.update(
        fetch=container("fetch", {}),
        hooks=[{"name": "validate", "container": container("validate", case.hook)}],
        publish=container("publish", case.publish),
        podTemplate={
            "volumes": [{"name": "fault-injection", "configMap": {"name": "fault-injection"}}],
            "volumeMounts": [{"name": "fault-injection", "mountPath": MOUNT, "readOnly": True}],
        },
        backoff={"initialSeconds": 1, "maxSeconds": 2},
        **case.changes,
    )
    return body, config


def test_memory_is_raised_in_the_pod(kubectl: Kubectl, namespace: str, started: None) -> None:
    """The first of these tests: a minute after the run's end its Jobs go, and the pods with them."""
    ended(kubectl, namespace, "fault-oom", seconds=480)
    selector = "ingestrun.dev/run=fault-oom,ingestrun.dev/stage=hook,ingestrun.dev/batch=1"
    pods = kubectl.get("-n", namespace, "pods", "-l", selector)["items"]
    pods.sort(key=lambda pod: str(pod["metadata"]["labels"]["ingestrun.dev/attempt"]))
    found = [pod["spec"]["containers"][0]["resources"] for pod in pods]
    assert [(each["requests"]["memory"], each["limits"]["memory"]) for each in found] == [
        ("128Mi", "256Mi"),
        ("200Mi", "400Mi"),
    ]
    first = pods[0]["status"]["containerStatuses"][0]["state"]["terminated"]
    assert first["reason"] == "OOMKilled"
    assert events(kubectl, namespace, "fault-oom", "MemoryRaised") == [
        "batch 1, hook validate, attempt 2: memory limit 400Mi instead of 256Mi"
    ]


@pytest.mark.parametrize("name", CASES)
def test_a_fault_ends_in_exact_counts(kubectl: Kubectl, namespace: str, started: None, name: str) -> None:
    case, run_name = CASES[name], f"fault-{name}"
    run = ended(kubectl, namespace, run_name, seconds=480)
    status: dict[str, Any] = run["status"]
    assert condition(run, "Succeeded")["reason"] == case.reason, status
    assert phase(run) == ("Failed" if case.reason == "FetchFailed" else "Succeeded")
    assert status["records"]["published"] == case.published
    assert [(e["stage"], e["reason"], e["count"]) for e in status["retries"]] == (
        case.retries or ([(FETCH, "Error", 1)] if name == "for-good" else [])
    )
    if case.fault.partition(",")[0].partition(":")[0] in ("hang", "exit-after", "missing"):
        check_dataset(kubectl, namespace, run_name, "--part", "2")


def test_the_kubelet_ends_a_stage_at_its_deadline(kubectl: Kubectl, namespace: str, started: None) -> None:
    (failure,) = ended(kubectl, namespace, "fault-hang", seconds=480)["status"]["failures"]
    assert (failure["stage"], failure["attempt"], failure["reason"]) == (PUBLISH, 0, "DeadlineExceeded")
    assert failure["message"].startswith("the stage ran longer than its activeDeadlineSeconds; retry 1 of 3 in 1 s")


def test_the_last_lines_of_the_log_are_in_the_status(kubectl: Kubectl, namespace: str, started: None) -> None:
    run = ended(kubectl, namespace, "fault-exit-twice", seconds=480)
    failures = run["status"]["failures"]
    assert [failure["reason"] for failure in failures] == ["Error", "Error"]
    assert all('"event": "fault on purpose"' in failure["log"] for failure in failures)
    assert "retry 1 of 3 in 1 s" in failures[0]["message"]
    permanent = ended(kubectl, namespace, "fault-permanent", seconds=480)["status"]["failures"]
    assert [failure["message"] for failure in permanent] == [
        "exit code 65: a permanent failure, asked for by INGEST_FAULT"
    ]
    assert "log" not in permanent[0], "the container left a result, which says it"
