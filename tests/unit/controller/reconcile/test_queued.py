"""Jobs that Kueue has suspended: queued, not stuck."""

from __future__ import annotations

from datetime import timedelta

import pytest
from tests.fakes.world import KEY, World, manifest
from tests.unit.controller.reconcile.test_capacity import pass_time

from ingestrun.kube.protocol import Object
from ingestrun.planner.run.fair_sharing import JobLimits

QUEUE = "kueue.x-k8s.io/queue-name"


def queued_world(**spec: object) -> World:
    world = World()
    body = manifest(**spec)
    body["metadata"]["labels"] = {QUEUE: "team-a", "kueue.x-k8s.io/priority-class": "high", "team": "a"}
    world.cluster.user_create_run(body)
    return world


def only_job(world: World) -> Object:
    (job,) = world.active_jobs()
    return job


async def test_the_runs_queue_is_its_jobs_and_they_wait_to_be_admitted() -> None:
    world = queued_world()
    await world.settle()
    job = only_job(world)
    labels = job["metadata"]["labels"]
    assert (labels[QUEUE], labels["kueue.x-k8s.io/priority-class"]) == ("team-a", "high")
    assert "team" not in labels
    assert QUEUE not in job["spec"]["template"]["metadata"]["labels"]
    assert job["spec"]["suspend"] is True
    await pass_time(world, 6)
    assert world.condition("Reconciling")["reason"] == "Queued"
    assert world.condition("Backpressured") == {}


async def test_without_a_queue_nothing_is_suspended() -> None:
    world = World()
    world.create()
    await world.settle()
    assert only_job(world)["spec"]["suspend"] is False


async def test_a_queued_job_runs_into_nothing_is_left_alone_and_goes_on_when_admitted() -> None:
    world = queued_world(backpressure={"timeoutSeconds": 60}, fetch={"image": "f:1", "activeDeadlineSeconds": 5})
    await world.settle()
    calls = len(world.cluster.history)
    await pass_time(world, 90_000)
    assert world.phase == "Running"
    assert len(world.cluster.history) - calls <= 3, "one write, with its Event: nothing is asked while it waits"
    assert only_job(world)["spec"]["suspend"] is True, "never ours to take back"
    while world.active_jobs():
        job = only_job(world) if len(world.active_jobs()) == 1 else world.active_jobs()[0]
        world.cluster.resume_job(job["metadata"]["name"])
        world.work(job)
        await world.settle()
    assert world.phase == "Succeeded"
    assert world.status["records"]["published"] == 450


async def test_a_quick_admission_costs_no_write() -> None:
    world = queued_world()
    await world.settle()
    writes = len(world.cluster.calls("patch", "ingestruns/status"))
    await pass_time(world, 2)
    world.cluster.resume_job(only_job(world)["metadata"]["name"])
    world.cluster.start_pod(only_job(world)["metadata"]["name"])
    await world.settle()
    assert len(world.cluster.calls("patch", "ingestruns/status")) == writes


async def test_a_preempted_job_is_queued_again_and_no_failure() -> None:
    world = queued_world(retries=0)
    await world.settle()
    name = only_job(world)["metadata"]["name"]
    world.cluster.resume_job(name)
    world.cluster.start_pod(name)
    await world.settle()
    await pass_time(world, 100)
    assert world.condition("Reconciling")["reason"] == "Running"
    world.cluster.suspend_job(name)
    await world.settle()
    await pass_time(world, 10)
    assert world.phase == "Running"
    assert world.status["failures"] == []
    assert world.condition("Reconciling")["reason"] == "Queued"
    world.now += timedelta(seconds=10)
    world.cluster.resume_job(name)
    world.work(only_job(world))
    await world.settle()
    assert world.status["batches"]["fetched"] == "0"


@pytest.mark.parametrize("preempted", [False, True])
@pytest.mark.parametrize("resumed", [False, True])
async def test_cancel_deletes_what_is_queued(preempted: bool, resumed: bool) -> None:
    """Also one that has run before, and one that has just been admitted again and has no pod yet."""
    world = queued_world()
    await world.settle()
    name = only_job(world)["metadata"]["name"]
    if preempted:
        world.cluster.resume_job(name)
        world.cluster.start_pod(name)
        await world.settle()
        world.cluster.suspend_job(name)
        await world.settle()
        world.now += timedelta(seconds=5)
    if resumed:
        world.cluster.resume_job(name)
    world.cancel()
    await world.play()
    assert world.phase == "Cancelled"
    assert world.cluster.jobs() == []
    assert world.condition("Drained")["status"] == "True"


async def test_a_pod_that_was_seen_to_end_after_its_jobs_new_admission_is_not_the_new_ones() -> None:
    """The watches race: the Job's resumption is shown first, then the end of the pod that the suspension has ended."""
    world = queued_world(retries=0)
    await world.settle()
    name = only_job(world)["metadata"]["name"]
    world.cluster.resume_job(name)
    world.cluster.start_pod(name)
    await world.settle()
    world.deaf.add("Pod")
    world.cluster.suspend_job(name)
    world.now += timedelta(seconds=5)
    world.cluster.resume_job(name)
    world.deaf.clear()
    for change in world.cluster.changes[-4:]:
        if change.kind == "Pod":
            world.watch.pod(change.type, change.obj)
    await world.settle()
    world.cancel()
    await world.play()
    assert world.cluster.jobs() == []


async def test_a_queued_job_counts_under_the_caps() -> None:
    world = queued_world(batches={"partitions": {"count": 5}}, parallelism=5)
    world.caps = JobLimits(in_all=2)
    world.restart()
    await world.settle()
    assert len(world.active_jobs()) == 2


async def test_the_clean_up_does_not_queue() -> None:
    world = queued_world(onCancel={"image": "clean:1"})
    await world.settle()
    world.cancel()
    await world.settle()
    (job,) = world.active_jobs()
    assert QUEUE not in job["metadata"]["labels"]
    assert job["spec"]["suspend"] is False
    assert world.cluster.run(KEY)["status"]["phase"] == "Cancelled"
