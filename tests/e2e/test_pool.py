"""A pool on a real kubelet: the real worker's image, real rows, and SIGKILLs of workers and operator meanwhile."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path

from dev.demo.audit import read_trail

from tests.e2e.cluster import SYSTEM, Json, Kubectl, condition, phase, wait_for
from tests.e2e.runs import ROWS, ended, flights, published, run_of
from tests.e2e.test_flights import check_dataset, count, has_published, kill_operator

POOL = {"execution": {"mode": "Pool"}, "parallelism": 3, "backoff": {"initialSeconds": 1, "maxSeconds": 5}}


def pods(kubectl: Kubectl, namespace: str, run: str) -> list[Json]:
    """The run's pods whose container has not ended; the phase of a pod follows a moment later."""
    found = kubectl.get("-n", namespace, "pods", "-l", f"ingestrun.dev/run={run}")["items"]
    return [pod for pod in found if not _ended(pod)]


def _ended(pod: Json) -> bool:
    states = [container["state"] for container in pod["status"].get("containerStatuses") or ()]
    return bool(states) and all("terminated" in state for state in states)


def kill_workers(kubectl: Kubectl, namespace: str, run: str) -> None:
    """SIGKILL, as the kernel or a lost node does it: no grace, no word."""
    for pod in pods(kubectl, namespace, run):
        name = pod["metadata"]["name"]
        kubectl("-n", namespace, "delete", "pod", name, "--grace-period=0", "--force", "--ignore-not-found")


def test_every_row_arrives_once_though_workers_and_operator_are_killed(kubectl: Kubectl, namespace: str) -> None:
    kubectl.apply([flights(namespace, "pool-killed", **POOL)])
    for share in (1, 3, 5):
        wait_for(
            partial(has_published, kubectl, namespace, "pool-killed", ROWS * share // 8),
            seconds=300,
            what=f"{share}/8 of the rows",
        )
        kill_workers(kubectl, namespace, "pool-killed")
        if share == 3:
            kill_operator(kubectl)
    run = ended(kubectl, namespace, "pool-killed", seconds=400)
    assert phase(run) == "Succeeded", condition(run, "Succeeded")
    assert run["status"]["records"] == {"fetched": ROWS, "rejected": 0, "published": ROWS}
    assert f"{ROWS:,} rows of {ROWS:,}" in check_dataset(kubectl, namespace, "pool-killed")
    assert run["status"]["retries"], "no worker was killed while it had a batch"


def test_cancel_half_way_grants_nothing_more(kubectl: Kubectl, namespace: str) -> None:
    kubectl.apply([flights(namespace, "pool-cancelled", **POOL)])
    wait_for(lambda: published(run_of(kubectl, namespace, "pool-cancelled")) > ROWS / 4, seconds=300, what="a quarter")
    patch = json.dumps({"spec": {"cancel": True, "cancellation": {"reason": "enough"}}})
    kubectl("-n", namespace, "patch", "ingestrun", "pool-cancelled", "--type", "merge", "-p", patch)
    run = ended(kubectl, namespace, "pool-cancelled", seconds=120)
    assert phase(run) == "Cancelled"
    frozen = run["status"]["records"]
    kubectl("-n", namespace, "wait", "ingestrun/pool-cancelled", "--for=condition=Drained", "--timeout=120s")
    run = run_of(kubectl, namespace, "pool-cancelled")
    assert run["status"]["records"] == frozen
    assert pods(kubectl, namespace, "pool-cancelled") == []
    files = count(run["status"]["batches"]["published"]) + count(run["status"]["cancellation"]["published"])
    check_dataset(kubectl, namespace, "pool-cancelled", "--part", str(files))
    log = kubectl("-n", namespace, "logs", "-l", "ingestrun.dev/run=pool-cancelled", "--tail=-1")
    log += kubectl("-n", SYSTEM, "logs", "deployment/ingestrun-operator")
    uid = run["metadata"]["uid"]
    assert [line for line in log.splitlines() if "ingest run cancelled, skipping" in line and uid in line]
    audit = os.environ.get("INGESTRUN_AUDIT_LOG")
    if audit:  # a cluster of the user's own (CLUSTER=current) shows us none
        with Path(audit).open() as lines:
            trail = read_trail(lines, uid)
        assert trail.cancelled is not None
        assert trail.grants
        assert trail.granted_after == []
        assert trail.created_after == []
