"""The client against a real API server, in a namespace of its own."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from ingestrun.kube import errors
from ingestrun.kube.client import KubernetesCluster
from ingestrun.kube.connection import Connection
from ingestrun.kube.leader_election import run_as_leader
from ingestrun.kube.protocol import RunKey

pytestmark = pytest.mark.api

LABEL = "ingestrun.dev/run-uid"


@pytest.fixture
async def kube(kubeconfig: Path) -> AsyncIterator[KubernetesCluster]:
    connected = KubernetesCluster(await Connection.open(kubeconfig=str(kubeconfig)))
    yield connected
    await connected.close()


@pytest.fixture
async def namespace(kube: KubernetesCluster) -> AsyncIterator[str]:
    name = f"client-{uuid.uuid4().hex[:8]}"
    await kube.connection.request("POST", "/api/v1/namespaces", body={"metadata": {"name": name}})
    yield name
    await kube.connection.request("DELETE", f"/api/v1/namespaces/{name}")


def job(namespace: str, name: str, **spec: Any) -> dict[str, Any]:
    """Suspended: it never gets a pod."""
    labels = {LABEL: "u1"}
    template = {
        "metadata": {"labels": labels},
        "spec": {"restartPolicy": "Never", "containers": [{"name": "c", "image": "none.invalid/none"}]},
    }
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name, "namespace": namespace, "labels": labels},
        "spec": {"suspend": True, "template": template, **spec},
    }


async def test_jobs(kube: KubernetesCluster, namespace: str) -> None:
    made = await kube.create_job(job(namespace, "a"))
    with pytest.raises(errors.AlreadyExists, match='"a" already exists'):
        await kube.create_job(job(namespace, "a"))
    with pytest.raises(errors.Invalid, match=r"spec\.wrong"):
        await kube.create_job(job(namespace, "b", wrong=1))
    with pytest.raises(errors.NotFound, match="namespaces"):
        await kube.create_job(job("client-absent", "a"))
    [listed] = await kube.list_jobs(namespace=namespace, run_uid="u1")
    assert (listed["kind"], listed["apiVersion"]) == ("Job", "batch/v1")
    assert listed["metadata"]["uid"] == made["metadata"]["uid"]
    assert await kube.list_jobs(namespace=namespace, run_uid="u2") == []
    assert await kube.list_pods(namespace=namespace, run_uid="u1") == []
    await kube.delete_job(namespace=namespace, name="a", uid="another")
    await kube.get_job(namespace=namespace, name="a")
    for _ in range(2):
        await kube.delete_job(namespace=namespace, name="a", uid=made["metadata"]["uid"])
    with pytest.raises(errors.NotFound):
        await kube.get_job(namespace=namespace, name="a")


async def test_the_deadline_of_a_pod_gets_shorter_and_never_longer(kube: KubernetesCluster, namespace: str) -> None:
    """No node takes the pod, so nothing keeps its deadline."""
    containers = [{"name": "c", "image": "none.invalid/none"}]
    spec = {"nodeName": "absent", "restartPolicy": "Never", "activeDeadlineSeconds": 60, "containers": containers}
    body = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p", "namespace": namespace}, "spec": spec}
    pod = await kube.connection.request("POST", f"/api/v1/namespaces/{namespace}/pods", body=body)
    uid = pod["metadata"]["uid"]
    told = await kube.set_pod_deadline(namespace=namespace, name="p", uid=uid, seconds=1)
    assert (told["metadata"]["uid"], told["spec"]["activeDeadlineSeconds"]) == (uid, 1)
    with pytest.raises(errors.Invalid, match="activeDeadlineSeconds"):
        await kube.set_pod_deadline(namespace=namespace, name="p", uid=uid, seconds=60)
    with pytest.raises(errors.Invalid, match="uid"):
        await kube.set_pod_deadline(namespace=namespace, name="p", uid="another", seconds=1)
    with pytest.raises(errors.NotFound):
        await kube.set_pod_deadline(namespace=namespace, name="absent", uid=uid, seconds=1)


async def test_all_pages_and_deletion_by_selector(
    kube: KubernetesCluster, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ingestrun.kube.client.PAGE", 2)
    await asyncio.gather(*(kube.create_job(job(namespace, f"j{i}")) for i in range(5)))
    listed = await kube.list_jobs(namespace=namespace, run_uid="u1")
    assert sorted(one["metadata"]["name"] for one in listed) == [f"j{i}" for i in range(5)]
    await kube.delete_jobs(namespace=namespace, selector=f"{LABEL} in (u1,u7)")
    assert await kube.list_jobs(namespace=namespace, run_uid="u1") == []


async def test_quota_and_a_namespace_that_ends(kube: KubernetesCluster, namespace: str) -> None:
    quotas = f"/api/v1/namespaces/{namespace}/resourcequotas"
    quota = {"metadata": {"name": "jobs"}, "spec": {"hard": {"count/jobs.batch": "0"}}}
    await kube.connection.request("POST", quotas, body=quota)
    for _ in range(600):
        if "hard" in (await kube.connection.request("GET", f"{quotas}/jobs")).get("status", {}):
            break
        await asyncio.sleep(0.1)
    with pytest.raises(errors.QuotaExceeded, match="exceeded quota"):
        await kube.create_job(job(namespace, "a"))
    # A finalizer keeps the namespace in its last state long enough to be seen there.
    maps = f"/api/v1/namespaces/{namespace}/configmaps"
    held = {"metadata": {"name": "held", "finalizers": ["ingestrun.dev/test"]}}
    await kube.connection.request("POST", maps, body=held)
    await kube.connection.request("DELETE", f"/api/v1/namespaces/{namespace}")
    try:
        with pytest.raises(errors.NotFound, match="terminated"):
            await kube.create_job(job(namespace, "a"))
    finally:
        await kube.connection.request(
            "PATCH",
            f"{maps}/held",
            body={"metadata": {"finalizers": None}},
            content_type="application/merge-patch+json",
        )


async def test_an_event(kube: KubernetesCluster, namespace: str) -> None:
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    await kube.create_event(
        {
            "apiVersion": "events.k8s.io/v1",
            "kind": "Event",
            "metadata": {"generateName": "geo-", "namespace": namespace},
            "eventTime": now,
            "reportingController": "ingestrun.dev/operator",
            "reportingInstance": "test",
            "action": "Cancel",
            "reason": "Cancelled",
            "type": "Normal",
            "note": "by a test",
            "regarding": {"apiVersion": "batch/v1", "kind": "Job", "namespace": namespace, "name": "a"},
        }
    )
    events = await kube.connection.request("GET", f"/apis/events.k8s.io/v1/namespaces/{namespace}/events")
    assert [event["note"] for event in events["items"]] == ["by a test"]


async def test_runs(kube: KubernetesCluster, namespace: str, crd: dict[str, Any]) -> None:
    runs = f"/apis/ingestrun.dev/v1alpha1/namespaces/{namespace}/ingestruns"
    container = {"image": "none.invalid/none"}
    spec = {"fetch": container, "publish": container, "batches": {"cursor": {}}, "suspend": True}
    body = {"apiVersion": "ingestrun.dev/v1alpha1", "kind": "IngestRun", "metadata": {"name": "geo"}, "spec": spec}
    assert crd
    await kube.connection.request("POST", runs, body=body)
    key = RunKey(namespace=namespace, name="geo")
    run = await kube.get_run(key)
    assert namespace in {one["metadata"]["namespace"] for one in await kube.list_runs(dict)}
    keyed = {**spec, "concurrency": {"key": "geo/tiles"}}
    await kube.connection.request("POST", runs, body={**body, "metadata": {"name": "keyed"}, "spec": keyed})
    sharing = await kube.list_runs_of(namespace=namespace, concurrency_key="geo/tiles")
    assert [one["metadata"]["name"] for one in sharing] == ["keyed"]
    assert await kube.list_runs_of(namespace=namespace, concurrency_key="geo") == []
    # An operator may be at work on it as well: take the newest until it holds.
    for _ in range(20):
        old = run["metadata"]["resourceVersion"]
        marked = await kube.patch_run(key, patch={"metadata": {"labels": {"test": uuid.uuid4().hex[:8]}}})
        with pytest.raises(errors.Conflict, match="modified"):
            await kube.write_status(key, resource_version=old, status={"phase": "Failed"})
        try:
            stored = await kube.write_status(
                key, resource_version=marked["metadata"]["resourceVersion"], status={"phase": "Failed"}
            )
            break
        except errors.Conflict:
            run = await kube.get_run(key)
    assert stored["status"]["phase"] == "Failed"
    with pytest.raises(errors.Invalid, match="already Failed"):
        await kube.patch_run(key, patch={"spec": {"cancel": True}})
    uid = stored["metadata"]["uid"]
    with pytest.raises(errors.Conflict):
        await kube.delete_run(key, uid=uid, resource_version=old)
    newest = await kube.get_run(key)
    await kube.delete_run(key, uid=uid, resource_version=newest["metadata"]["resourceVersion"])
    with pytest.raises(errors.NotFound):
        await kube.get_run(key)


async def test_the_lease(kubeconfig: Path, namespace: str, kube: KubernetesCluster) -> None:
    path = f"/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases/operator"
    connection = await Connection.open(kubeconfig=str(kubeconfig), concurrency=2)
    seen: list[Any] = []

    async def main() -> None:
        first = lease = (await kube.connection.request("GET", path))["spec"]
        async with asyncio.timeout(60):
            while lease["renewTime"] == first["renewTime"]:
                await asyncio.sleep(0.1)
                lease = (await kube.connection.request("GET", path))["spec"]
        seen.extend((first, lease))

    for pod in ("pod-a", "pod-b"):
        await run_as_leader(
            main, connection=connection, guarded=kube.connection, namespace=namespace, name="operator", identity=pod
        )
    first, renewed, second, _ = seen
    assert first["holderIdentity"].startswith("pod-a_")
    assert renewed["renewTime"] > first["renewTime"]
    assert renewed["acquireTime"] == first["acquireTime"]
    assert second["holderIdentity"].startswith("pod-b_")
    assert second["leaseTransitions"] == 1
    assert not (await kube.connection.request("GET", path))["spec"].get("holderIdentity")
    kube.connection.may_write = lambda: True
    await connection.close()


async def test_the_server_keeps_our_time_out_too(kube: KubernetesCluster) -> None:
    refusal = None
    try:
        # Of two time-outs the server reads the first; the connection's own comes after it.
        await kube.connection.request("GET", "/api/v1/pods", query=[("timeout", "1ms")])
    except errors.Unavailable as error:
        refusal = error
    # Its time was over before it had a line to send, or all of them: then the server hangs up.
    hung_up = refusal and isinstance(refusal.__cause__, aiohttp.ServerDisconnectedError | aiohttp.ClientPayloadError)
    assert refusal is None or hung_up or "Timeout: request did not complete" in str(refusal)
