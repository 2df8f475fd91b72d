"""A cluster that was restored from a backup: resourceVersions go back, and what was known is not so any more."""

from __future__ import annotations

import asyncio

from tests.fakes.cluster import Call
from tests.fakes.world import KEY, World

from ingestrun.controller.watch.resync import resync_once
from ingestrun.kube.errors import Unknown


async def resync(world: World) -> None:
    await resync_once(world.cluster, world.store, world)  # type: ignore[arg-type]


async def test_a_run_that_had_ended_goes_on_where_the_backup_has_it() -> None:
    world = World()
    world.create(parallelism=1)
    await world.settle()
    backup = world.cluster.backup()
    await world.play()
    assert world.phase == "Succeeded"
    world.cluster.restore(backup)
    assert world.phase == "Running"
    await resync(world)
    assert world.store.went_back.is_set()
    await world.play()
    assert world.phase == "Succeeded"


async def test_a_cancel_in_the_backup_is_applied_and_nothing_is_started() -> None:
    world = World()
    world.create(parallelism=1)
    await world.settle()
    world.deaf.add("IngestRun")
    world.cancel()
    backup = world.cluster.backup()
    world.cluster.user_patch_spec(KEY, {"cancel": None})
    world.deaf.clear()
    world.watch.run("MODIFIED", world.cluster.run(KEY))
    await world.settle()
    for job in world.active_jobs():
        world.work(job)
    await world.settle()
    created = len(world.cluster.calls("create", "jobs"))
    world.cluster.restore(backup)
    await resync(world)
    await world.settle()
    assert world.phase == "Cancelled"
    await world.play()
    assert world.condition("Drained")["status"] == "True"
    assert len(world.cluster.calls("create", "jobs")) == created


async def test_a_write_that_conflicts_finds_the_restored_run_without_a_resync() -> None:
    world = World()
    world.create(parallelism=1)
    await world.settle()
    backup = world.cluster.backup()
    for job in world.active_jobs():
        world.work(job)
    await world.settle()
    assert world.status["batches"]["fetched"] == "0"
    world.cluster.restore(backup)
    world.store.invalidate(world.cluster.run(KEY)["metadata"]["uid"])
    world.add(KEY, "test")
    await world.settle()
    # For half a second the end of the pod is awaited whose Job the backup lacks; then the pass writes.
    async with asyncio.timeout(20):
        while not world.store.went_back.is_set():
            world.now = world.due[KEY]
            await world.settle()
    assert world.store.parsed(KEY).metadata.resource_version == world.cluster.run(KEY)["metadata"]["resourceVersion"]


async def test_a_relist_that_shows_an_older_run_asks_the_server() -> None:
    world = World()
    world.create(parallelism=1)
    await world.settle()
    backup = world.cluster.backup()
    await world.play()
    world.cluster.restore(backup)
    world.watch.run(None, world.cluster.run(KEY))
    await world.play()
    assert world.phase == "Succeeded"
    assert world.store.went_back.is_set()


async def test_a_run_that_is_not_in_the_backup_is_forgotten() -> None:
    world = World()
    backup = world.cluster.backup()
    world.create(parallelism=1)
    await world.settle()
    world.cluster.restore(backup)
    await resync(world)
    assert world.store.keys() == []


async def test_an_answer_that_was_overtaken_by_the_watch_is_not_taken_for_a_restore() -> None:
    """The read was sent, the run changed, the watch showed it, and then the answer of the read came."""
    world = World()
    world.create(parallelism=1)
    await world.settle()
    old = world.cluster.run(KEY)
    asked = world.store.run(KEY)
    world.cluster.user_patch_spec(KEY, {"suspend": True})
    newest = world.cluster.run(KEY)
    world.store.upsert_run(old, asked=asked)
    assert not world.store.went_back.is_set()
    assert world.store.parsed(KEY).metadata.resource_version == newest["metadata"]["resourceVersion"]


async def test_a_late_answer_about_a_run_that_was_deleted_does_not_displace_its_namesake() -> None:
    world = World()
    world.create(parallelism=1)
    await world.settle()
    late = world.cluster.run(KEY)
    world.cluster.user_delete_run(KEY)
    following = world.create(parallelism=1)
    world.store.upsert_run(late, asked=late)
    assert world.store.parsed(KEY).metadata.uid == following["metadata"]["uid"]


async def test_no_ordinary_course_is_taken_for_a_restore() -> None:
    world = World()
    world.create()
    world.cluster.fail_next("patch", "ingestruns/status", Unknown("no answer"), when="after")

    async def touch(call: Call) -> None:
        if call.index % 7 == 3 and call.stage == "before" and call.index < 100:
            world.cluster.user_patch_metadata(KEY, {"labels": {"n": str(call.index)}})
        if call.index % 11 == 5 and call.stage == "after" and call.index < 100:
            world.watch.run(None, world.cluster.run(KEY))

    world.cluster.on_call = touch
    for _ in range(20):
        await world.settle()
        await resync(world)
        for job in world.active_jobs():
            world.work(job)
    await world.play()
    assert world.phase == "Succeeded"
    assert not world.store.went_back.is_set()
