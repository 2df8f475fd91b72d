"""The Jobs that `kubectl delete ir --cascade=orphan` leaves: which of them go, and which never do."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import structlog
from tests.fakes import shapes
from tests.fakes.world import KEY, World

from ingestrun.controller.watch.orphans import OrphanCollector
from ingestrun.controller.watch.resync import resync_once
from ingestrun.kube.errors import Unavailable

SPEC: dict[str, Any] = {"batches": {"partitions": {"count": 6}}, "parallelism": 2}


def strip_owner(world: World, name: str, **changes: Any) -> None:
    job = world.cluster.job(name)
    meta = {field: value for field, value in job["metadata"].items() if field != "ownerReferences"}
    world.cluster._store("Job", {**job, "metadata": meta | changes}, "MODIFIED")


def delete_run_with_cascade_orphan(world: World) -> list[str]:
    """The garbage collector takes the owner off the Jobs, then the run is removed. Returns the Jobs' names."""
    names = [job["metadata"]["name"] for job in world.cluster.jobs()]
    for name in names:
        strip_owner(world, name)
    world.cluster.user_delete_run(KEY)
    return names


def collector(world: World) -> OrphanCollector:
    return OrphanCollector(world.cluster, world.store, settle_seconds=0, pause_seconds=0)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110  (the fake has no event for it)
            await asyncio.sleep(0)


async def two_fetches(world: World) -> None:
    world.create(**SPEC)
    await world.settle()
    for job in world.active_jobs():
        world.cluster.start_pod(job["metadata"]["name"])


@pytest.mark.parametrize("restarted", [False, True])
async def test_orphans_go_with_their_pods_and_are_told(restarted: bool) -> None:
    world = World()
    await two_fetches(world)
    uid = world.cluster.run(KEY)["metadata"]["uid"]
    names = delete_run_with_cascade_orphan(world)
    assert len(names) == 2
    if restarted:
        world.start()
        await resync_once(world.cluster, world.store, world)  # type: ignore[arg-type]
    with structlog.testing.capture_logs(processors=[structlog.contextvars.merge_contextvars]) as lines:
        await collector(world).collect()
    assert world.cluster.jobs() == world.cluster.pods() == []
    told = [line for line in lines if line["event"] == "orphaned job deleted"]
    assert [(line["job"], line["run"], line["namespace"], line["uid"]) for line in told] == [
        (name, KEY.name, KEY.namespace, uid) for name in names
    ]


async def test_it_looks_by_itself_when_the_owner_goes_and_again_when_the_run_does() -> None:
    world = World()
    await two_fetches(world)
    looking = collector(world)
    collecting = asyncio.create_task(looking.run())
    for job in world.cluster.jobs():
        strip_owner(world, job["metadata"]["name"])
    await looking.collect()
    assert len(world.cluster.jobs()) == 2, "their run is there"
    world.cluster.user_delete_run(KEY)
    await until(lambda: not world.cluster.jobs())
    collecting.cancel()


async def test_while_the_run_exists_none_goes_also_where_its_watch_is_behind() -> None:
    world = World()
    await two_fetches(world)
    name = world.cluster.jobs()[0]["metadata"]["name"]
    strip_owner(world, name)
    world.store.remove_run(KEY)  # as if the watch had not shown the run yet
    await collector(world).collect()
    assert len(world.cluster.jobs()) == 2
    assert world.cluster.calls("get", "ingestruns")


async def test_a_run_created_anew_under_the_name_is_another_run() -> None:
    world = World()
    await two_fetches(world)
    names = delete_run_with_cascade_orphan(world)
    world.create(**SPEC)
    await world.settle()
    await collector(world).collect()
    assert not {job["metadata"]["name"] for job in world.cluster.jobs()} & set(names)
    assert len(world.cluster.jobs()) == 2, "those of the new run"


@pytest.mark.parametrize("kind", ["another name", "made by a user", "another namespace", "another owner", "not ours"])
async def test_what_is_not_proven_to_be_an_orphan_stays(kind: str) -> None:
    world = World()
    world.cluster.namespaces.add("other")
    await two_fetches(world)
    original = world.cluster.jobs()[0]
    delete_run_with_cascade_orphan(world)
    for job in world.cluster.jobs():
        world.cluster.expire_job(job["metadata"]["name"])
    meta = {field: value for field, value in original["metadata"].items() if field != "ownerReferences"}
    changes: dict[str, dict[str, Any]] = {
        "another name": {"name": "debug"},
        "made by a user": {"managedFields": [{"manager": "kubectl-create", "operation": "Update"}]},
        "another namespace": {"namespace": "other"},
        "another owner": {
            "ownerReferences": [
                {"apiVersion": "v1", "kind": "ConfigMap", "name": "c", "uid": "no-such", "controller": True}
            ]
        },
        "not ours": {"labels": meta["labels"] | {"app.kubernetes.io/managed-by": "somebody"}},
    }
    copy = shapes.copied({**original, "metadata": meta | {"uid": "copy"} | changes[kind]})
    world.cluster._store("Job", copy, "ADDED")
    await collector(world).collect()
    assert [job["metadata"]["uid"] for job in world.cluster.jobs()] == ["copy"]
    assert world.cluster.calls("get", "ingestruns") == []


async def test_an_api_server_that_does_not_answer_makes_no_orphan() -> None:
    world = World()
    await two_fetches(world)
    delete_run_with_cascade_orphan(world)
    world.cluster.fail_next("get", "ingestruns", Unavailable("later"))
    with pytest.raises(Unavailable):
        await collector(world).collect()
    assert len(world.cluster.jobs()) == 2
    await collector(world).collect()
    assert world.cluster.jobs() == []
