"""Pods that do not start: what keeps them is told by name, waited for as long as it deserves, and asked for seldom."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from tests.fakes.cluster import FakeCluster
from tests.fakes.world import KEY, World

from ingestrun.kube.errors import Unavailable

PANIC = 'Post "https://10.9.8.7:6443/api/v1/pods": stream error: stream ID 7; INTERNAL_ERROR; received from peer'
CALL = 'Internal error occurred: failed calling webhook "inject.example.com": connection refused'
SECRET = 'MountVolume.SetUp failed for volume "ca" : secret "company-ca" not found'
MULTI = 'Multi-Attach error for volume "pvc-7" Volume is already exclusively attached to one node'


async def pass_time(world: World, seconds: float) -> None:
    """Let so much time pass, with every pass that is due meanwhile."""
    end = world.now + timedelta(seconds=seconds)
    while True:
        await world.settle()
        due = [when for when in world.due.values() if when <= end]
        if not due:
            world.now = end
            return
        world.now = max(world.now, min(due))


async def begun(**spec: Any) -> tuple[World, str]:
    """A run whose first pod has a node and waits for its volumes; the pod's name."""
    world = World()
    world.create(retries=0, **spec)
    await world.settle()
    pod = world.cluster.create_pod(world.active_jobs()[0]["metadata"]["name"])
    await world.settle()
    return world, pod


def lists(cluster: FakeCluster) -> int:
    return len(cluster.calls("list", "events"))


async def tell_for(world: World, seconds: int, **event: Any) -> None:
    """Repeat an Event as the kubelet does while time passes: after twice the time, two minutes at most."""
    passed, gap = 0, 1
    while passed < seconds:
        world.cluster.tell(**event)
        step = min(gap, seconds - passed)
        await pass_time(world, step)
        passed, gap = passed + step, min(2 * gap, 122)


async def test_a_secret_that_does_not_exist_is_told_by_name_and_fails_the_batch() -> None:
    world, pod = await begun()
    await tell_for(world, 30, kind="Pod", name=pod, reason="FailedMount", note=SECRET)
    told = world.condition("Reconciling")
    assert told["reason"] == "PodNotStarting"
    assert 'secret "company-ca" not found' in told["message"]
    assert world.condition("Backpressured") == {}
    await tell_for(world, 120, kind="Pod", name=pod, reason="FailedMount", note=SECRET)
    await world.play()
    (failure,) = world.status["failures"]
    assert (world.phase, failure["reason"]) == ("Failed", "ContainerConfig")
    assert failure["message"].startswith("the pod has not started for 120 s: ")
    assert "company-ca" in failure["message"]
    assert world.active_jobs() == []


async def test_a_secret_that_comes_late_fails_nothing() -> None:
    """It is there after twenty seconds; another volume of the pod is slow, which says nothing for two minutes."""
    world, pod = await begun()
    await tell_for(world, 16, kind="Pod", name=pod, reason="FailedMount", note=SECRET)
    await pass_time(world, 500)
    assert world.phase == "Running"
    await world.play()
    assert world.phase == "Succeeded"


async def test_the_graces_are_the_runs_own() -> None:
    world, pod = await begun(podStart={"configurationSeconds": 600})
    await tell_for(world, 590, kind="Pod", name=pod, reason="FailedMount", note=SECRET)
    assert world.phase == "Running"
    await pass_time(world, 11)
    assert world.phase == "Failed"
    assert "has not started for 600 s" in world.status["failures"][0]["message"]


async def test_a_volume_that_another_node_holds_is_waited_for_and_told() -> None:
    """The controller tells it once, and the Event is gone after an hour."""
    world, pod = await begun()
    world.cluster.tell("Pod", pod, reason="FailedAttachVolume", note=MULTI)
    await pass_time(world, 1800)
    assert world.phase == "Running"
    assert "Multi-Attach" in world.condition("Succeeded")["message"]
    world.cluster.start_pod(world.active_jobs()[0]["metadata"]["name"])
    await world.play()
    assert world.phase == "Succeeded"


async def test_the_stages_deadline_names_what_the_pod_waited_for() -> None:
    world, pod = await begun(fetch={"image": "example/worker:1", "activeDeadlineSeconds": 300})
    world.cluster.tell("Pod", pod, reason="FailedAttachVolume", note=MULTI)
    await pass_time(world, 305)
    assert world.phase == "Running"
    job = world.active_jobs()[0]["metadata"]["name"]
    world.cluster.exceed_deadline(job)
    body = next(body for body in world.cluster.pods(job))
    for told in body["status"]["containerStatuses"]:
        told["state"] = {"waiting": {"reason": "ContainerCreating"}}
    world.cluster._store("Pod", body, "MODIFIED")
    await world.settle()
    (failure,) = world.status["failures"]
    assert failure["reason"] == "DeadlineExceeded"
    assert "Multi-Attach" in failure["message"]


async def test_a_pod_that_no_kubelet_takes_is_given_up_after_the_stages_deadline() -> None:
    world, _ = await begun(fetch={"image": "example/worker:1", "activeDeadlineSeconds": 300})
    await pass_time(world, 100)
    assert world.condition("Reconciling")["reason"] == "Running"
    await pass_time(world, 30)
    assert world.condition("Reconciling")["reason"] == "PodNotStarting"
    assert "nothing tells why" in world.condition("Reconciling")["message"]
    await pass_time(world, 240)
    assert world.status["failures"][0]["reason"] == "StartTimeout"


async def test_a_class_that_does_not_exist_is_told_from_the_claims_event() -> None:
    world = World()
    volume = {"name": "rates", "persistentVolumeClaim": {"claimName": "rates"}}
    world.create(retries=0, podTemplate={"volumes": [volume]})
    await world.settle()
    unbound = "0/3 nodes are available: pod has unbound immediate PersistentVolumeClaims. preemption: none"
    world.cluster.create_pod(world.active_jobs()[0]["metadata"]["name"], unschedulable=unbound)
    note = 'storageclass.storage.k8s.io "gold" not found'
    world.cluster.tell("PersistentVolumeClaim", "rates", reason="ProvisioningFailed", note=note)
    await pass_time(world, 30)
    assert 'storageclass.storage.k8s.io "gold" not found' in world.condition("Reconciling")["message"]
    assert world.condition("Backpressured") == {}, "no room would help"
    await pass_time(world, 100)
    assert world.status["failures"][0]["reason"] == "VolumeMissing"


async def test_a_selector_that_no_node_matches_holds_under_its_own_name() -> None:
    world = World()
    world.create(podTemplate={"nodeSelector": {"disk": "floppy"}})
    await world.settle()
    none = "0/3 nodes are available: 3 node(s) didn't match Pod's node affinity/selector."
    job = world.active_jobs()[0]["metadata"]["name"]
    world.cluster.create_pod(job, unschedulable=none)
    await pass_time(world, 3600)
    assert world.phase == "Running", "an autoscaler may bring such a node"
    held = world.condition("Backpressured")
    assert (held["status"], held["reason"]) == ("True", "NodeMismatch")
    assert "disk=floppy" in held["message"]
    assert lists(world.cluster) == 0, "the status tells it"
    world.restart()
    await world.settle()
    assert world.condition("Backpressured")["reason"] == "NodeMismatch"
    world.cluster.start_pod(job)
    await world.play()
    assert world.phase == "Succeeded"


async def test_the_patience_with_a_selector_is_that_of_backpressure() -> None:
    world = World()
    world.create(backpressure={"timeoutSeconds": 300}, podTemplate={"nodeSelector": {"disk": "floppy"}})
    await world.settle()
    none = "0/3 nodes are available: 3 node(s) didn't match Pod's node affinity/selector."
    world.cluster.create_pod(world.active_jobs()[0]["metadata"]["name"], unschedulable=none)
    await pass_time(world, 310)
    end = world.condition("Succeeded")
    assert end["reason"] == "BackpressureTimeout"
    assert end["message"].startswith(
        "held back for 300 s (backpressure.timeoutSeconds): NodeMismatch: batch 0: no node "
    )


async def test_a_webhook_that_is_down_holds_the_run_and_one_that_denies_fails_it() -> None:
    world = World()
    world.create(retries=0, batches={"partitions": {"count": 4}}, parallelism=2)
    await world.settle()
    first, second = (job["metadata"]["name"] for job in world.active_jobs())
    for number in range(20):
        for job in (first, second):
            world.cluster.refuse_pod(job, message=f"{CALL} {number}")
        await pass_time(world, 60)
    assert world.phase == "Running"
    assert world.status.get("failures", []) == []
    held = world.condition("Backpressured")
    assert (held["status"], held["reason"]) == ("True", "WebhookUnavailable")
    assert "inject.example.com" in world.condition("Succeeded")["message"]
    assert len(world.cluster.calls("create", "jobs")) == 2
    world.restart()
    await world.settle()
    assert world.condition("Backpressured")["status"] == "True"
    # The webhook is back: for the first it denies, for the second all is well.
    world.cluster.start_pod(second)
    world.cluster.refuse_pod(first, message='admission webhook "inject.example.com" denied the request: no team label')
    await pass_time(world, 100)
    assert world.phase == "Running", "the refusal has a grace of its own"
    assert world.condition("Backpressured")["status"] == "False"
    await pass_time(world, 30)
    assert world.status["failures"][0]["reason"] == "PodRefused"
    assert "no team label" in world.status["failures"][0]["message"]


@pytest.mark.parametrize(("said", "reason"), [(CALL, "WebhookUnavailable"), (PANIC, "ServerFailed")])
async def test_a_server_or_webhook_that_is_back_costs_the_run_nothing(said: str, reason: str) -> None:
    world = World()
    world.create(retries=0)
    await world.settle()
    world.cluster.refuse_pod(world.active_jobs()[0]["metadata"]["name"], message=said)
    await pass_time(world, 900)
    assert world.condition("Backpressured")["reason"] == reason
    await world.play()
    assert world.phase == "Succeeded"
    assert world.condition("Backpressured")["status"] == "False"


@pytest.mark.parametrize("runs", [1, 5])
async def test_pods_that_do_not_start_cost_four_lists_a_minute_in_a_namespace(runs: int) -> None:
    world = World()
    for number in range(runs):
        body = world.create(batches={"partitions": {"count": 8}}, parallelism=8) if not number else None
        if body is None:
            other = world.cluster.run(KEY)
            meta = {"name": f"more-{number}", "namespace": "default"}
            world.cluster.user_create_run({**other, "metadata": meta})
    await world.settle()
    jobs = world.active_jobs()
    assert len(jobs) == 8 * runs
    for job in jobs:
        world.cluster.create_pod(job["metadata"]["name"])
    await pass_time(world, 19)
    assert lists(world.cluster) == 0
    await pass_time(world, 600)
    assert 0 < lists(world.cluster) <= 42


async def test_pods_that_start_within_seconds_cost_no_list() -> None:
    world = World()
    world.create(batches={"partitions": {"count": 3}})
    await world.settle()
    for _ in range(20):
        for job in world.active_jobs():
            world.cluster.create_pod(job["metadata"]["name"])
        await pass_time(world, 15)
        for job in world.active_jobs():
            world.cluster.start_pod(job["metadata"]["name"])
        await pass_time(world, 300)
        for job in world.active_jobs():
            world.work(job)
        await world.settle()
    assert world.phase == "Succeeded"
    assert lists(world.cluster) == 0


async def test_events_that_cannot_be_listed_change_nothing() -> None:
    world, pod = await begun()
    await tell_for(world, 30, kind="Pod", name=pod, reason="FailedMount", note=SECRET)
    world.cluster.fail_next("list", "events", Unavailable("busy"), times=3)
    await tell_for(world, 40, kind="Pod", name=pod, reason="FailedMount", note=SECRET)
    assert 'secret "company-ca" not found' in world.condition("Reconciling")["message"]
