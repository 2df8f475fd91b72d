"""The fake API server keeps the rules that tests of promises lean on."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tests.fakes import selectors
from tests.fakes.cluster import Call, FakeCluster

from ingestrun.kube import errors
from ingestrun.kube.protocol import Object, RunKey

KEY = RunKey(namespace="default", name="geo")


def run_of(cluster: FakeCluster) -> Object:
    return cluster.user_create_run({"metadata": {"name": "geo"}, "spec": {"parallelism": 2}})


def job_of(run: Object, name: str = "j", **labels: str) -> dict[str, Any]:
    uid = run["metadata"]["uid"]
    ours = {"ingestrun.dev/run-uid": uid, **labels}
    owner = {"apiVersion": "ingestrun.dev/v1alpha1", "kind": "IngestRun", "name": "geo", "uid": uid}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name, "namespace": "default", "labels": ours, "ownerReferences": [owner]},
        "spec": {
            "template": {
                "metadata": {"labels": ours},
                "spec": {"restartPolicy": "Never", "containers": [{"name": "c", "image": "i"}]},
            }
        },
    }


async def test_a_status_write_needs_the_newest_version_and_leaves_the_spec_alone() -> None:
    cluster = FakeCluster()
    run = run_of(cluster)
    assert run["status"] == {"observedGeneration": -1}
    old = run["metadata"]["resourceVersion"]
    stored = await cluster.write_status(KEY, resource_version=old, status={"phase": "Running", "cursor": "a"})
    assert stored["metadata"]["generation"] == 1
    with pytest.raises(errors.Conflict):
        await cluster.write_status(KEY, resource_version=old, status={"phase": "Failed"})
    again = await cluster.write_status(
        KEY, resource_version=stored["metadata"]["resourceVersion"], status={"cursor": None}
    )
    assert again["status"] == {"observedGeneration": -1, "phase": "Running"}
    same = await cluster.write_status(KEY, resource_version=again["metadata"]["resourceVersion"], status={})
    assert same["metadata"]["resourceVersion"] == again["metadata"]["resourceVersion"], "nothing has changed"


async def test_a_user_change_moves_the_generation_and_makes_the_next_status_write_conflict() -> None:
    cluster = FakeCluster()
    run = run_of(cluster)
    patched = cluster.user_patch_spec(KEY, {"cancel": True}, user="alice")
    assert patched["metadata"]["generation"] == 2
    assert patched["metadata"]["annotations"] == {"ingestrun.dev/cancel-requested-by": "alice"}
    with pytest.raises(errors.Conflict):
        await cluster.write_status(
            KEY, resource_version=run["metadata"]["resourceVersion"], status={"phase": "Running"}
        )


@pytest.mark.parametrize("phase", ["Succeeded", "Failed"])
async def test_a_run_that_has_ended_refuses_a_cancel_but_not_its_clearing(phase: str) -> None:
    cluster = FakeCluster()
    run = run_of(cluster)
    await cluster.write_status(KEY, resource_version=run["metadata"]["resourceVersion"], status={"phase": phase})
    with pytest.raises(errors.Invalid, match=f"already {phase}"):
        cluster.user_patch_spec(KEY, {"cancel": True})
    with pytest.raises(errors.Invalid):
        await cluster.patch_run(KEY, patch={"spec": {"cancel": True}})
    cluster.user_patch_spec(KEY, {"cancel": None})


async def test_what_is_handed_out_or_in_is_not_shared() -> None:
    cluster = FakeCluster()
    run = run_of(cluster)
    job = job_of(run)
    await cluster.create_job(job)
    job["spec"]["template"]["spec"]["containers"].clear()
    read = await cluster.get_job(namespace="default", name="j")
    read["metadata"]["labels"].clear()
    assert len(await cluster.list_jobs(namespace="default", run_uid=run["metadata"]["uid"])) == 1
    assert cluster.job("j")["spec"]["template"]["spec"]["containers"]


async def test_jobs_exist_once_and_are_deleted_by_uid() -> None:
    cluster = FakeCluster()
    run = run_of(cluster)
    job = await cluster.create_job(job_of(run))
    with pytest.raises(errors.AlreadyExists):
        await cluster.create_job(job_of(run))
    await cluster.delete_job(namespace="default", name="j", uid="another")
    assert cluster.jobs()
    await cluster.delete_job(namespace="default", name="j", uid=job["metadata"]["uid"])
    await cluster.delete_job(namespace="default", name="j", uid=job["metadata"]["uid"])
    assert not cluster.jobs()


async def test_refusals_of_a_create() -> None:
    cluster = FakeCluster(namespaces=["default", "full", "ending"])
    run = run_of(cluster)
    cluster.terminating.add("ending")
    cluster.job_quota["full"] = 0
    for namespace, error in (
        ("absent", errors.NotFound),
        ("ending", errors.NotFound),
        ("full", errors.QuotaExceeded),
    ):
        job = job_of(run)
        job["metadata"]["namespace"] = namespace
        with pytest.raises(error):
            await cluster.create_job(job)
    wrong = job_of(run, name="Not_A_Name")
    with pytest.raises(AssertionError):
        await cluster.create_job(wrong)


async def test_the_fence_refuses_jobs_of_a_cancelled_run_but_its_clean_up() -> None:
    cluster = FakeCluster()
    cluster.fence = True
    run = run_of(cluster)
    await cluster.patch_run(KEY, patch={"metadata": {"labels": {"ingestrun.dev/cancelled": "true"}}})
    await cluster.create_job(job_of(run, "before"))
    version = cluster.run(KEY)["metadata"]["resourceVersion"]
    await cluster.write_status(KEY, resource_version=version, status={"phase": "Cancelled"})
    with pytest.raises(errors.Forbidden, match="is Cancelled"):
        await cluster.create_job(job_of(run, "after"))
    await cluster.create_job(job_of(run, "clean-up", **{"ingestrun.dev/stage": "on-cancel"}))


async def test_a_job_its_pod_and_its_result() -> None:
    cluster = FakeCluster()
    run = run_of(cluster)
    job = await cluster.create_job(job_of(run))
    cluster.create_pod("j")
    [pod] = await cluster.list_pods(namespace="default", run_uid=run["metadata"]["uid"])
    assert pod["status"]["phase"] == "Pending"
    assert pod["metadata"]["labels"]["batch.kubernetes.io/job-name"] == "j"
    assert pod["metadata"]["ownerReferences"][0]["uid"] == job["metadata"]["uid"]
    cluster.start_pod("j")
    assert cluster.job("j")["status"]["active"] == 1
    cluster.finish_job("j", result={"v": 1, "outcome": "done"})
    [pod] = cluster.pods("j")
    assert pod["status"]["containerStatuses"][0]["state"]["terminated"]["message"] == '{"v":1,"outcome":"done"}'
    assert [c["type"] for c in cluster.job("j")["status"]["conditions"]] == ["SuccessCriteriaMet", "Complete"]
    await cluster.create_job(job_of(run, "k"))
    cluster.finish_job("k", exit_code=137, reason="OOMKilled")
    assert cluster.job("k")["status"]["failed"] == 1
    assert "completionTime" not in cluster.job("k")["status"]


async def test_deleting_a_run_takes_its_jobs_and_pods_and_those_that_come_late() -> None:
    cluster = FakeCluster()
    run = run_of(cluster)
    await cluster.create_job(job_of(run))
    cluster.start_pod("j")
    cluster.user_delete_run(KEY)
    assert not cluster.jobs()
    assert not cluster.pods()
    await cluster.create_job(job_of(run, "late"))
    assert not cluster.jobs()
    assert [(c.kind, c.type) for c in cluster.changes[-2:]] == [("Job", "ADDED"), ("Job", "DELETED")]


async def test_a_running_pod_may_outlive_its_job() -> None:
    cluster = FakeCluster()
    cluster.pods_linger = True
    run = run_of(cluster)
    job = await cluster.create_job(job_of(run))
    cluster.start_pod("j")
    await cluster.delete_job(namespace="default", name="j", uid=job["metadata"]["uid"])
    [pod] = cluster.pods()
    assert pod["metadata"]["deletionTimestamp"]
    cluster.end_pod("j", exit_code=143)
    assert not cluster.pods()


async def test_a_pod_that_has_started_meanwhile_is_not_deleted() -> None:
    cluster = FakeCluster()
    await cluster.create_job(job_of(run_of(cluster)))
    cluster.create_pod("j")
    [pod] = cluster.pods()
    cluster.start_pod("j")
    meta = pod["metadata"]
    with pytest.raises(errors.Conflict):
        await cluster.delete_pod(
            namespace="default", name=meta["name"], uid=meta["uid"], resource_version=meta["resourceVersion"]
        )
    await cluster.delete_pod(namespace="default", name=meta["name"], uid=meta["uid"])
    assert not cluster.pods()


async def test_the_deadline_of_a_pod_only_gets_shorter() -> None:
    cluster = FakeCluster()
    await cluster.create_job(job_of(run_of(cluster)))
    cluster.mutate_pod = lambda spec: spec.update(activeDeadlineSeconds=60)
    cluster.start_pod("j")
    [pod] = cluster.pods()
    name, uid = pod["metadata"]["name"], pod["metadata"]["uid"]
    stored = await cluster.set_pod_deadline(namespace="default", name=name, uid=uid, seconds=1)
    assert stored["spec"]["activeDeadlineSeconds"] == 1
    with pytest.raises(errors.Invalid):
        await cluster.set_pod_deadline(namespace="default", name=name, uid=uid, seconds=60)
    with pytest.raises(errors.Invalid, match="uid"):
        await cluster.set_pod_deadline(namespace="default", name=name, uid="another", seconds=1)


async def test_faults_before_after_and_late() -> None:
    cluster = FakeCluster()
    run = run_of(cluster)
    cluster.fail_next("create", "jobs", errors.Unavailable("busy"))
    with pytest.raises(errors.Unavailable):
        await cluster.create_job(job_of(run, "a"))
    cluster.fail_next("create", "jobs", when="after")
    with pytest.raises(errors.Unknown):
        await cluster.create_job(job_of(run, "b"))
    cluster.fail_next("create", "jobs", when="late")
    with pytest.raises(errors.Unknown):
        await cluster.create_job(job_of(run, "c"))
    assert [job["metadata"]["name"] for job in cluster.jobs()] == ["b"]
    assert cluster.deliver_late() == [None]
    assert [job["metadata"]["name"] for job in cluster.jobs()] == ["b", "c"]
    assert [(c.stored, c.outcome) for c in cluster.calls("create", "jobs")] == [
        (False, "Unavailable"),
        (True, "Unknown"),
        (True, "Unknown"),
    ]


async def test_hooks_see_each_call_before_and_after_and_may_act_as_users() -> None:
    cluster = FakeCluster()
    run = run_of(cluster)
    seen: list[tuple[str, str, bool]] = []

    async def between(call: Call) -> None:
        seen.append((call.verb, call.stage, call.stored))
        if call.verb == "patch" and call.stage == "before":
            cluster.user_patch_spec(KEY, {"cancel": True})

    cluster.on_call = between
    read = await cluster.get_run(KEY)
    assert read["metadata"]["resourceVersion"] == run["metadata"]["resourceVersion"]
    with pytest.raises(errors.Conflict):
        await cluster.write_status(
            KEY, resource_version=read["metadata"]["resourceVersion"], status={"phase": "Running"}
        )
    assert seen == [("get", "before", False), ("get", "after", True), ("patch", "before", False)]


async def test_a_gate_holds_a_call_and_a_cancelled_caller_leaves_it_stored() -> None:
    cluster = FakeCluster()
    run = run_of(cluster)
    gate = asyncio.Event()
    cluster.fail_next("create", "jobs", when="after", gate=gate)
    task = asyncio.ensure_future(cluster.create_job(job_of(run)))
    await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert cluster.jobs()
    assert cluster.history[-1].outcome == "cancelled"


async def test_watchers_are_told_of_each_change_in_order() -> None:
    cluster = FakeCluster()
    seen: list[tuple[str, str, int]] = []
    cluster.watch(lambda kind, event, obj: seen.append((kind, event, int(obj["metadata"]["resourceVersion"]))))
    await cluster.create_job(job_of(run_of(cluster)))
    cluster.finish_job("j")
    cluster.user_delete_run(KEY)
    assert [at for _, _, at in seen] == list(range(1, len(seen) + 1))
    assert seen[0][:2] == ("IngestRun", "ADDED")
    assert {("IngestRun", "DELETED"), ("Job", "DELETED"), ("Pod", "DELETED")} <= {s[:2] for s in seen}


@pytest.mark.parametrize(
    ("selector", "labels", "chosen"),
    [
        ("", {}, True),
        ("a=b", {"a": "b"}, True),
        ("a==b,c!=d", {"a": "b"}, True),
        ("a=b,c!=d", {"a": "b", "c": "d"}, False),
        ("ingestrun.dev/stage in (fetch, hook)", {"ingestrun.dev/stage": "hook"}, True),
        ("stage notin (fetch,hook)", {"stage": "hook"}, False),
        ("stage notin (fetch,hook)", {}, True),
        ("a", {"a": ""}, True),
        ("!a", {"a": ""}, False),
        ("!a,b", {"b": "1"}, True),
    ],
)
def test_label_selectors(selector: str, labels: dict[str, str], chosen: bool) -> None:
    assert selectors.parse(selector)(labels) is chosen


def test_a_wrong_selector_is_refused() -> None:
    with pytest.raises(ValueError, match="unable to parse"):
        selectors.parse("a in b")


async def test_a_secret_is_replaced_only_by_whoever_has_read_it_last() -> None:
    cluster = FakeCluster()
    with pytest.raises(errors.NotFound):
        await cluster.get_secret(namespace="default", name="key")
    cluster.user_apply_secret("key")
    first = await cluster.get_secret(namespace="default", name="key")
    assert "data" not in first
    stored = await cluster.replace_secret({**first, "data": {"key": "YQ=="}})
    assert stored["data"] == {"key": "YQ=="}
    with pytest.raises(errors.Conflict):
        await cluster.replace_secret({**first, "data": {"key": "Yg=="}})
    with pytest.raises(AssertionError):
        await cluster.replace_secret({"metadata": {"name": "key", "namespace": "default", "resourceVersion": ""}})
    cluster.user_apply_secret("key", key="Yw==")
    assert (await cluster.get_secret(namespace="default", name="key"))["data"] == {"key": "Yw=="}
