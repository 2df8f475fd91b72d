"""How long child Jobs stay: until they are accounted for, and then no longer than is asked for."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from tests.fakes.selectors import parse
from tests.fakes.world import KEY, World, environment

from ingestrun.kube.errors import Unknown
from ingestrun.kube.protocol import Object
from ingestrun.model.ranges import IndexRanges
from ingestrun.model.status import IngestRunStatus
from ingestrun.planner.actions import DeleteJobs
from ingestrun.planner.jobs.manifest import delete_selector
from ingestrun.planner.jobs.retention import DELETE_BATCHES


@pytest.fixture
def world() -> World:
    return World()


def batches_left(world: World) -> list[int]:
    """The batches that still have Jobs."""
    return sorted({int(job["metadata"]["labels"]["ingestrun.dev/batch"]) for job in world.cluster.jobs()})


def failing(*batches: int) -> Any:
    """The hook of these batches fails for good."""

    def how(job: Object) -> dict[str, Any]:
        env = environment(job)
        return {"exit_code": 65} if env["INGEST_STAGE"] == "hook" and int(env["INGEST_BATCH"]) in batches else {}

    return how


async def until_ended(world: World, *, each: Any = None) -> None:
    """Play, and stop right at the run's end: the clean-up a minute later has not come yet."""
    for _ in range(1000):
        await world.settle()
        if world.phase in ("Succeeded", "Failed", "Cancelled"):
            return
        for job in world.active_jobs():
            world.work(job, **(each(job) if each else {}))
        if not world.active_jobs() and world.due:
            world.now = max(world.now, min(world.due.values()))
    raise AssertionError("no end")


async def test_published_batches_lose_their_jobs_many_by_one_call(world: World) -> None:
    world.create(batches={"partitions": {"count": 2 * DELETE_BATCHES + 5}}, parallelism=8)
    await until_ended(world)
    assert len(world.cluster.calls("deletecollection", "jobs")) <= 3
    assert len(batches_left(world)) <= DELETE_BATCHES, "the last ones are accounted for by the very end"
    await world.play()
    assert world.cluster.jobs() == []
    assert len(world.cluster.calls("deletecollection", "jobs")) <= 4
    assert world.cluster.calls("delete", "jobs") == []


async def test_one_batch_that_takes_long_keeps_no_other_ones_jobs(world: World) -> None:
    world.create(batches={"partitions": {"count": 2 * DELETE_BATCHES}}, parallelism=5)
    for _ in range(1000):
        await world.settle()
        jobs = [job for job in world.active_jobs() if environment(job)["INGEST_BATCH"] != "0"]
        if not jobs:
            break
        for job in jobs:
            world.work(job)
    assert world.status["batches"]["published"] == f"1-{2 * DELETE_BATCHES - 1}"
    assert len(batches_left(world)) < DELETE_BATCHES + 1


@pytest.mark.parametrize(("retention", "kept"), [(None, [40, 60, 70]), ({"failedBatches": 1}, [70])])
async def test_the_newest_failed_batches_keep_their_jobs(world: World, retention: Any, kept: list[int]) -> None:
    world.create(
        batches={"partitions": {"count": 80}},
        parallelism=8,
        retries=0,
        onBatchFailure="Continue",
        jobRetention=retention,
    )
    await until_ended(world, each=failing(1, 5, 40, 60, 70))
    assert world.phase == "Succeeded"
    assert world.status["batches"]["failed"] == "1,5,40,60,70"
    await world.play()
    assert batches_left(world) == kept
    assert {len(world.cluster.pods(job["metadata"]["name"])) for job in world.cluster.jobs()} == {1}


async def test_without_failed_batches_nothing_is_kept(world: World) -> None:
    world.create(
        batches={"partitions": {"count": 3}}, retries=0, onBatchFailure="Continue", jobRetention={"failedBatches": 0}
    )
    await until_ended(world, each=failing(1))
    assert batches_left(world) == [0, 1, 2]
    await world.play()
    assert batches_left(world) == []


@pytest.mark.parametrize("seconds", [0, 30, 3600])
async def test_what_was_kept_goes_when_its_time_has_come(world: World, seconds: int) -> None:
    world.create(batches={"partitions": {"count": 2}}, retries=0, jobRetention={"secondsAfterFinished": seconds})
    await until_ended(world, each=failing(0))
    end = world.now
    gone_at = end + timedelta(seconds=max(seconds, 60))
    seen = []
    while world.due:
        world.now = max(world.now, min(world.due.values()))
        await world.settle()
        seen.append((world.now, len(batches_left(world))))
    assert world.phase == "Failed"
    assert batches_left(world) == []
    assert all(left for when, left in seen if when < gone_at)
    assert seen[-1][0] >= gone_at
    assert world.store.is_archived(world.cluster.run(KEY)["metadata"]["uid"])


async def test_failed_run_keeps_the_jobs_of_batches_that_were_in_flight(world: World) -> None:
    """Its status does not say what became of them: the Jobs are all there is."""
    world.create(batches={"partitions": {"count": 3}}, parallelism=3, retries=0)
    await world.settle()
    first, second, third = world.active_jobs()
    world.cluster.start_pod(second["metadata"]["name"])
    world.cluster.start_pod(third["metadata"]["name"])
    world.work(first, exit_code=65)
    await world.play()
    assert world.phase == "Failed"
    assert batches_left(world) == [0, 1, 2]


async def test_cancelled_run_keeps_none_once_it_is_told_what_became_of_them(world: World) -> None:
    world.create(batches={"partitions": {"count": 3}}, parallelism=3)
    await world.settle()
    for job in world.active_jobs():
        world.cluster.start_pod(job["metadata"]["name"])
    await world.settle()
    world.cancel()
    await world.settle()
    assert batches_left(world) == [0, 1, 2]
    await world.play()
    assert world.status["cancellation"]["notPublished"] == "0-2"
    assert batches_left(world) == []


async def test_the_clean_up_keeps_its_job_until_all_go(world: World) -> None:
    world.create(onCancel={"image": "example/clean:1"})
    await world.settle()
    world.work(world.active_jobs()[0])
    await world.settle()
    world.cancel()
    await world.play()
    assert [environment(job)["INGEST_STAGE"] for job in world.cluster.jobs()] == ["on-cancel"]
    world.cluster.user_patch_spec(KEY, {"jobRetention": {"secondsAfterFinished": 5}})
    await world.play()
    assert world.cluster.jobs() == []


async def test_asked_for_long_after_the_end_they_go_then(world: World) -> None:
    world.create(batches={"partitions": {"count": 1}}, retries=0)
    await until_ended(world, each=failing(0))
    await world.play()
    assert batches_left(world) == [0]
    asked = world.now
    world.cluster.user_patch_spec(KEY, {"jobRetention": {"secondsAfterFinished": 7200}})
    await world.play()
    assert batches_left(world) == []
    assert world.now > asked + timedelta(seconds=7000)


async def test_no_job_goes_before_the_stored_status_accounts_for_it(world: World) -> None:
    """The write that accounts for batches is lost on its way, again and again: until it is there, all Jobs are."""
    world.create(
        batches={"partitions": {"count": 70}}, parallelism=40, retries=0, onBatchFailure="Continue",
        jobRetention={"failedBatches": 0},
    )  # fmt: skip

    async def judge(call: Any) -> None:
        if (call.verb, call.resource) == ("patch", "ingestruns/status") and call.stage == "before" and lose:
            lose.pop()
            raise Unknown("no answer")
        if call.verb == "deletecollection" and call.stage == "before":
            status = IngestRunStatus.model_validate(world.status)
            accounted = status.batches.published | status.batches.failed
            matches = parse(call.body["labelSelector"])
            going = {
                int(job["metadata"]["labels"]["ingestrun.dev/batch"])
                for job in world.cluster.jobs()
                if matches(job["metadata"]["labels"])
            }
            assert going
            assert not IndexRanges(going) - accounted
            judged.append(len(going))

    judged: list[int] = []
    lose = [1] * 12
    world.cluster.on_call = judge
    await world.play(rounds=300, each=failing(3, 33, 34, 65))
    assert world.phase == "Succeeded"
    assert judged
    assert world.cluster.jobs() == []


async def test_a_restart_amid_it_leaves_nothing_behind(world: World) -> None:
    world.create(batches={"partitions": {"count": 70}}, parallelism=40)
    lost = [1, 1, 1]

    async def die(call: Any) -> None:
        if call.verb == "deletecollection" and call.stage == "before" and lost:
            lost.pop()
            world.restart()
            raise Unknown("the operator died")

    world.cluster.on_call = die
    await world.play(rounds=300)
    assert not lost
    assert world.phase == "Succeeded"
    assert world.status["records"]["published"] == 700
    assert world.cluster.jobs() == []


def test_selectors() -> None:
    some = DeleteJobs(batches=IndexRanges([1, 2, 9]))
    assert delete_selector("u", some) == (
        "ingestrun.dev/run-uid=u,ingestrun.dev/stage!=on-cancel,ingestrun.dev/batch in (1,2,9)"
    )
    rest = DeleteJobs(batches=None, kept=IndexRanges([4]))
    assert delete_selector("u", rest).endswith("ingestrun.dev/stage!=on-cancel,ingestrun.dev/batch notin (4)")
    assert delete_selector("u", DeleteJobs(batches=None, clean_up=True)) == "ingestrun.dev/run-uid=u"
