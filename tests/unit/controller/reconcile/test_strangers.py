"""A Job or pod that carries a run's labels and is not the run's own: ignored, whatever it says, and left alone."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import structlog
from tests.fakes import shapes
from tests.fakes.world import KEY, World, environment

from ingestrun.controller.watch.resync import resync_once
from ingestrun.kube.protocol import Object

PARTITION = {"batches": {"partitions": {"count": 1}}}
LINE = "ignoring a Job that is not of the run that its labels name"


def copy_job(world: World, job: Object, name: str, *, owned: bool = False) -> dict[str, Any]:
    """Copy a Job as people do to look into a stage: under another name, with its labels, by `kubectl create`."""
    copied = shapes.copied(dict(job))
    copied["metadata"] = {
        "name": name,
        "namespace": job["metadata"]["namespace"],
        "labels": job["metadata"]["labels"],
        "uid": f"uid-of-{name}",
        "creationTimestamp": job["metadata"]["creationTimestamp"],
        **({"ownerReferences": job["metadata"]["ownerReferences"]} if owned else {}),
    }
    stored = shapes.defaulted_job(copied, uid=copied["metadata"]["uid"])
    world.cluster._store("Job", stored, "ADDED")
    return stored


def names(world: World) -> set[str]:
    return {job["metadata"]["name"] for job in world.cluster.jobs()}


@pytest.mark.parametrize("owned", [False, True], ids=["without owner", "with the run as owner"])
async def test_a_copy_of_a_running_stage_neither_holds_nor_fails_the_run(owned: bool) -> None:
    world = World()
    world.create(**PARTITION)
    await world.settle()
    (fetch,) = world.active_jobs()
    with structlog.testing.capture_logs() as lines:
        copy_job(world, fetch, "debug-fetch", owned=owned)
        world.cluster.start_pod("debug-fetch")
        world.work(fetch)
        await world.settle()
        assert [environment(job)["INGEST_STAGE"] for job in world.active_jobs() if job != fetch][-1] == "hook"
        world.cluster.finish_job("debug-fetch", exit_code=1)
        await world.play(each=lambda job: {})
        assert names(world) == {"debug-fetch"}, "the run's own Jobs are gone, and no stranger with them"
        world.cluster.expire_job("debug-fetch")
    assert world.phase == "Succeeded"
    assert world.status["failures"] == []
    assert world.status["records"]["published"] == 10
    told = [line for line in lines if line["event"] == LINE]
    assert [(line["job"], line["run"], line["namespace"]) for line in told] == [("debug-fetch", "flights", "default")]


async def test_a_copy_uses_up_none_of_the_operators_limits_and_no_resync_takes_it_in() -> None:
    world = World()
    world.create(**PARTITION)
    await world.settle()
    copy_job(world, world.active_jobs()[0], "debug-fetch")
    world.restart()
    await resync_once(world.cluster, world.store, world)  # type: ignore[arg-type]
    uid = world.cluster.run(KEY)["metadata"]["uid"]
    assert len(world.store.attempts(uid)) == 1
    assert world.store.usage.snapshot("other", "default", now=world.now).in_namespace == {"default": 1}


async def test_the_drain_waits_for_no_copy_and_deletes_none() -> None:
    world = World()
    world.create(**PARTITION, cancellation={"policy": "Terminate"})
    await world.settle()
    (fetch,) = world.active_jobs()
    world.cluster.start_pod(fetch["metadata"]["name"])
    copy_job(world, fetch, "debug-fetch")
    world.cluster.start_pod("debug-fetch")
    await world.settle()
    world.cancel()
    await world.settle()
    assert world.condition("Drained")["status"] == "True"
    assert names(world) == {"debug-fetch"}
    (pod,) = world.cluster.pods()
    assert pod["status"]["phase"] == "Running"


async def test_a_pod_of_a_job_that_took_a_deleted_ones_name_is_not_waited_for() -> None:
    """Its Job has the one name that the stage's Job can have, and not the run as its owner."""
    world = World()
    world.create(**PARTITION)
    await world.settle()
    (fetch,) = world.active_jobs()
    world.cluster.expire_job(fetch["metadata"]["name"])
    copy_job(world, fetch, fetch["metadata"]["name"])
    world.cluster.start_pod(fetch["metadata"]["name"])
    world.cancel()
    await world.settle()
    uid = world.cluster.run(KEY)["metadata"]["uid"]
    memory = world.store.memories.recall(uid)
    memory.awaiting_pods = dict.fromkeys(memory.awaiting_pods, 0.0)  # the grace for a pod's last event is over
    world.now += timedelta(seconds=1)
    await world.settle()
    assert world.condition("Drained")["status"] == "True"
    assert names(world) == {fetch["metadata"]["name"]}


async def test_a_stranger_under_the_name_of_a_stage_is_told_with_what_to_do() -> None:
    world = World()
    world.create(**PARTITION)
    await world.settle()
    (fetch,) = world.active_jobs()
    world.work(fetch)
    world.asked.clear()
    other = World()  # a twin, whose next Job has the name that is about to be taken
    other.create(**PARTITION)
    await other.settle()
    other.work(other.active_jobs()[0])
    await other.settle()
    (taken,) = other.active_jobs()
    copy_job(world, taken, taken["metadata"]["name"])
    world.add(KEY, "test")
    await world.settle()
    assert world.phase == "Failed"
    message = world.condition("Succeeded")["message"]
    name = taken["metadata"]["name"]
    assert message == f"a Job {name} exists that is not of this run (nothing owns it): delete it, and create a new run"


async def test_a_job_whose_owner_was_taken_away_is_ignored_from_then_on() -> None:
    world = World()
    world.create(**PARTITION)
    await world.settle()
    (fetch,) = world.active_jobs()
    uid = world.cluster.run(KEY)["metadata"]["uid"]
    stripped = {**fetch, "metadata": {**fetch["metadata"], "ownerReferences": []}}
    world.cluster._store("Job", stripped, "MODIFIED")
    assert world.store.attempts(uid) == []


async def test_a_hook_with_the_longest_name_and_a_run_with_dots_own_their_jobs() -> None:
    world = World()
    container = {"image": "example/worker:1"}
    world.create(**PARTITION, hooks=[{"name": "h" * 40, "container": container}])
    await world.play()
    assert world.phase == "Succeeded"
