"""The demo's flow with exact counts: real pods of the real images, on a real kubelet."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path

from dev.demo.__main__ import check_job
from dev.demo.audit import read_trail

from tests.e2e.cluster import SYSTEM, Kubectl, condition, image, phase, wait_for
from tests.e2e.runs import ROWS, ended, events, flights, published, run_of, said_by

CANCELLED_LINE = "ingest run cancelled, skipping"


def has_published(kubectl: Kubectl, namespace: str, name: str, rows: int) -> bool:
    return published(run_of(kubectl, namespace, name)) > rows


def kill_operator(kubectl: Kubectl) -> None:
    """SIGKILL: a pod deleted with no grace gets no SIGTERM; the Deployment brings another."""
    kubectl("-n", SYSTEM, "delete", "pods", "--all", "--grace-period=0", "--force")


def check_dataset(kubectl: Kubectl, namespace: str, dataset: str, *arguments: str) -> str:
    """dev/demo/check_dataset.py beside the dataset: DuckDB holds each row against the source's own file."""
    job = check_job(f"check-{dataset}", dataset, arguments, image=image("DEMO_IMAGE"))
    return said_by(kubectl, namespace, job)


def test_every_row_arrives_once_though_the_operator_is_killed_twice(kubectl: Kubectl, namespace: str) -> None:
    kubectl.apply([flights(namespace, "killed")])
    for share in (1, 3):
        wait_for(
            partial(has_published, kubectl, namespace, "killed", ROWS * share // 8),
            seconds=300,
            what=f"{share}/8 of the rows",
        )
        kill_operator(kubectl)
    run = ended(kubectl, namespace, "killed", seconds=400)
    assert phase(run) == "Succeeded", condition(run, "Succeeded")
    assert run["status"]["records"] == {"fetched": ROWS, "rejected": 0, "published": ROWS}
    said = check_dataset(kubectl, namespace, "killed")
    assert f"{ROWS:,} rows of {ROWS:,}" in said
    columns = kubectl("-n", namespace, "get", "ir", "killed").splitlines()
    assert columns[0].split() == ["NAME", "PHASE", "PROGRESS", "PUBLISHED", "REJECTED", "REASON", "DURATION", "AGE"]
    assert columns[1].split()[:2] == ["killed", "Succeeded"]
    assert columns[1].split()[3:6] == [str(ROWS), "0", "Completed"]


def test_cancel_half_way_starts_nothing_more(kubectl: Kubectl, namespace: str) -> None:
    kubectl.apply([flights(namespace, "cancelled")])
    wait_for(lambda: published(run_of(kubectl, namespace, "cancelled")) > ROWS / 3, seconds=300, what="a third")
    patch = json.dumps({"spec": {"cancel": True, "cancellation": {"reason": "enough"}}})
    kubectl("-n", namespace, "patch", "ingestrun", "cancelled", "--type", "merge", "-p", patch)
    run = ended(kubectl, namespace, "cancelled", seconds=120)
    assert phase(run) == "Cancelled"
    frozen = run["status"]["records"]
    kubectl("-n", namespace, "wait", "ingestrun/cancelled", "--for=condition=Drained", "--timeout=180s")
    run = run_of(kubectl, namespace, "cancelled")
    assert run["status"]["records"] == frozen
    assert run["status"]["cancellation"]["reason"] == "enough"
    uid = run["metadata"]["uid"]
    log = kubectl("-n", SYSTEM, "logs", "deployment/ingestrun-operator")
    assert [line for line in log.splitlines() if CANCELLED_LINE in line and uid in line]
    assert events(kubectl, namespace, "cancelled", "Cancelled")
    assert events(kubectl, namespace, "cancelled", "Drained")
    files = count(run["status"]["batches"]["published"]) + count(run["status"]["cancellation"]["published"])
    check_dataset(kubectl, namespace, "cancelled", "--part", str(files))
    audit = os.environ.get("INGESTRUN_AUDIT_LOG")
    if audit:  # a cluster of the user's own (CLUSTER=current) shows us none
        with Path(audit).open() as lines:
            trail = read_trail(lines, uid)
        assert trail.cancelled is not None
        assert trail.jobs
        assert trail.created_after == []


def count(ranges: str) -> int:
    pairs = [part.partition("-") for part in ranges.split(",") if part]
    return sum(int(last or first) - int(first) + 1 for first, _, last in pairs)
