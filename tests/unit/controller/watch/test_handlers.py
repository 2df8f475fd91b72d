"""Which watch events ask for a look at a run, and which of them at once."""

from __future__ import annotations

from tests.fakes.world import KEY, World

from ingestrun.kube.errors import Unavailable
from ingestrun.kube.protocol import Object


def asked(world: World) -> tuple[bool, bool]:
    """Tell whether a look is asked for at once, and whether one is in a moment; then drop the requests."""
    found = (KEY in world.asked, KEY in world.settling)
    world.asked.clear()
    world.settling.clear()
    return found


def newer(body: Object) -> dict[str, object]:
    """The same object under a later resourceVersion."""
    version = str(int(body["metadata"]["resourceVersion"]) + 1000)
    return {**body, "metadata": {**body["metadata"], "resourceVersion": version}}


async def test_the_echo_of_a_write_of_its_own_is_not_looked_at() -> None:
    world = World()
    world.create()
    await world.settle()
    world.watch.run("MODIFIED", world.cluster.run(KEY))
    assert asked(world) == (False, False)


async def test_what_another_has_changed_is_looked_at() -> None:
    world = World()
    world.create()
    await world.settle()
    world.cluster.user_patch_spec(KEY, {"suspend": True})
    assert asked(world) == (True, False)


async def test_a_change_that_a_pass_of_another_run_has_read_first_is_looked_at() -> None:
    """The cache has the version, but no pass of this run has taken it up: a cancel must not wait for a resync."""
    world = World()
    world.create()
    await world.settle()
    world.deaf.add("IngestRun")
    world.cancel()
    world.deaf.clear()
    world.store.upsert_run(world.cluster.run(KEY))
    world.watch.run("MODIFIED", world.cluster.run(KEY))
    assert asked(world) == (True, False)


async def test_a_version_whose_pass_has_failed_comes_back_by_the_queue() -> None:
    world = World()
    world.create()
    world.cluster.fail_next("create", "jobs", Unavailable("try again"))
    await world.settle()
    assert len(world.active_jobs()) == 1


async def test_a_pod_on_its_way_is_no_reason_for_a_look_at_once() -> None:
    world = World()
    world.create()
    await world.settle()
    (job,) = world.active_jobs()
    world.watch.job("MODIFIED", newer(job))
    assert asked(world) == (False, False), "the same facts"
    world.cluster.start_pod(job["metadata"]["name"])
    assert asked(world) == (False, True)
    world.work(world.cluster.job(job["metadata"]["name"]))
    assert asked(world)[0]


async def test_a_job_that_a_pass_has_created_is_looked_at_once_more() -> None:
    """No other event may come of a Job that waits to be admitted, and when it counts as queued is planned then."""
    world = World()
    world.create()
    await world.settle()
    (job,) = world.active_jobs()
    world.watch.job("ADDED", job)
    assert asked(world) == (False, True)


async def test_an_attempt_that_fails_or_goes_is_looked_at_at_once() -> None:
    for act in ("fail", "delete"):
        world = World()
        world.create()
        await world.settle()
        (job,) = world.active_jobs()
        if act == "fail":
            world.work(job, exit_code=1)
        else:
            world.cluster.expire_job(job["metadata"]["name"])
        assert asked(world)[0], act


async def test_an_obstacle_of_a_pod_is_looked_at_at_once() -> None:
    world = World()
    world.create()
    await world.settle()
    (job,) = world.active_jobs()
    world.cluster.pod_waits(job["metadata"]["name"], reason="ImagePullBackOff")
    assert asked(world)[0]
