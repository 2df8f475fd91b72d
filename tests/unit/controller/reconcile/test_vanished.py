"""Jobs that somebody else deletes: a TTL policy, `kubectl delete job`, a clean-up script. No result may be lost."""

from __future__ import annotations

from typing import Any

import pytest
from tests.fakes.world import KEY, World, environment

from ingestrun.kube.protocol import Object

CHAIN: dict[str, Any] = {"batches": {"cursor": {}, "size": 100}}
PARTITIONS: dict[str, Any] = {"batches": {"partitions": {"count": 3}}}


def stage(job: Object) -> tuple[str, str, str]:
    env = environment(job)
    return env["INGEST_BATCH"], env["INGEST_STAGE"], env["INGEST_ATTEMPT"]


def created(world: World) -> list[tuple[str, str, str]]:
    return [stage(call.body) for call in world.cluster.calls("create", "jobs") if call.stored and call.body]


def reap(world: World) -> None:
    """Delete each Job that has ended, with its pods, as a TTL of 0 does."""
    for job in world.cluster.jobs():
        if job not in world.active_jobs():
            world.cluster.expire_job(job["metadata"]["name"])


async def under_reaper(world: World, *, rounds: int = 300, each: Any = None, before_pass: bool = False) -> None:
    """Work until the run has ended; ended Jobs are deleted, at once (`before_pass`) or when a pass has seen them."""
    for _ in range(rounds):
        await world.settle()
        if not before_pass:
            reap(world)
            await world.settle()
        if world.phase in ("Succeeded", "Failed"):
            return
        jobs = world.active_jobs()
        for job in jobs:
            world.work(job, **(each(job) if each else {}))
        if before_pass:
            reap(world)
        if not jobs and world.due:
            world.now = max(world.now, min(world.due.values()))
    raise AssertionError(f"no end: {world.status}")


@pytest.mark.parametrize("before_pass", [False, True])
@pytest.mark.parametrize("mode", [CHAIN, PARTITIONS], ids=["chain", "partitions"])
async def test_ended_jobs_may_go_at_once(mode: dict[str, Any], before_pass: bool) -> None:
    world = World()
    world.create(**mode)
    await under_reaper(world, before_pass=before_pass)
    assert world.phase == "Succeeded"
    total = 450 if mode is CHAIN else 30
    assert world.status["records"] == {"fetched": total, "rejected": 0, "published": total}
    assert len(set(created(world))) == len(created(world)) == 3 * (5 if mode is CHAIN else 3)
    assert world.status["failures"] == world.status["retries"] == []


async def test_a_suspended_chain_goes_on_exactly_there_after_a_restart_too() -> None:
    world = World()
    world.create(**CHAIN)
    await world.settle()
    world.cluster.user_patch_spec(KEY, {"suspend": True})
    world.work(world.active_jobs()[0])
    await world.settle()
    assert world.status["batches"]["checkpoints"] == [{"batch": 0, "stage": 1, "written": 100}]
    assert [stage(job) for job in world.cluster.jobs()] == [("0", "fetch", "0")], "nobody needs the room"
    reap(world)
    world.restart()
    await world.settle()
    assert world.phase == "Suspended"
    world.cluster.user_patch_spec(KEY, {"suspend": None})
    await world.play()
    assert world.phase == "Succeeded"
    assert world.status["records"]["published"] == 450
    assert created(world).count(("0", "fetch", "0")) == 1
    assert len(created(world)) == 3 * 5


async def test_a_retry_that_waits_survives_the_loss_of_all_its_jobs_and_a_restart() -> None:
    """Its input, its row count and its budget are in the status once the Jobs go."""
    world = World()
    world.create(**CHAIN, retries=2)
    await world.settle()
    world.work(world.active_jobs()[0])
    await world.settle()
    hook = next(job for job in world.active_jobs() if stage(job)[1] == "hook")
    world.work(hook, exit_code=1)
    await world.settle()
    reap(world)
    await world.settle()
    (entry,) = world.status["batches"]["checkpoints"]
    assert entry == {"batch": 0, "stage": 1, "attempt": 1, "written": 100, "retries": 1}
    world.restart()
    await world.play()
    assert world.phase == "Succeeded"
    assert created(world).count(("0", "hook", "1")) == 1
    assert world.status["retries"] == [{"stage": "hook check", "reason": "Error", "count": 1}]


async def test_a_stage_that_runs_knows_its_input_though_all_before_it_is_gone() -> None:
    world = World()
    world.create(**CHAIN, retries=1, workspace={"persistentVolumeClaim": {"claimName": "data"}})
    await world.settle()
    world.work(world.active_jobs()[0], exit_code=1)
    await world.settle()
    world.now = min(world.due.values())
    await world.settle()
    world.work(world.active_jobs()[0])
    await world.settle()
    world.cluster.user_patch_spec(KEY, {"parallelism": 1})
    (hook,) = [job for job in world.active_jobs() if stage(job)[1] == "hook"]
    source = environment(hook)["INGEST_INPUT"]
    assert source.endswith("/0/0-1"), "what the second attempt of the fetch has written"
    reap(world)
    world.restart()
    await world.settle()
    world.work(hook, exit_code=1)
    await world.settle()
    world.now = min(world.due.values())
    await world.settle()
    (again,) = [job for job in world.active_jobs() if stage(job) == ("0", "hook", "1")]
    assert environment(again)["INGEST_INPUT"] == source
    short = {"v": "v1", "outcome": "done", "read": 99, "written": 99, "rejected": 0}
    world.work(again, result=short)
    await world.settle()
    assert world.status["failures"][-1]["reason"] == "RowsMismatch"


async def test_a_running_job_that_is_deleted_is_a_disruption_with_a_later_attempt() -> None:
    world = World()
    world.create(**PARTITIONS, retries=0, parallelism=1)
    await world.settle()
    (fetch,) = world.active_jobs()
    world.cluster.start_pod(fetch["metadata"]["name"])
    await world.settle()
    world.cluster.expire_job(fetch["metadata"]["name"])
    memory = world.store.memories.recall(world.cluster.run(KEY)["metadata"]["uid"])
    await world.settle()
    memory.awaiting_pods = dict.fromkeys(memory.awaiting_pods, 0.0)
    await world.play()
    assert world.phase == "Succeeded"
    assert created(world)[:2] == [("0", "fetch", "0"), ("0", "fetch", "1")]
    assert world.status["retries"] == [{"stage": "fetch", "reason": "JobDeleted", "count": 1}]


async def test_a_job_that_is_deleted_again_and_again_fails_its_batch_in_the_end() -> None:
    world = World()
    world.create(**PARTITIONS, retries=0, parallelism=1)
    memory = None
    for _ in range(200):
        await world.settle()
        if world.phase == "Failed":
            break
        uid = world.cluster.run(KEY)["metadata"]["uid"]
        memory = world.store.memories.recall(uid)
        for job in world.active_jobs():
            world.cluster.expire_job(job["metadata"]["name"])
        await world.settle()
        memory.awaiting_pods = dict.fromkeys(memory.awaiting_pods, 0.0)
        if world.due:
            world.now = max(world.now, min(world.due.values()))
    assert world.phase == "Failed"
    assert len(created(world)) == 11
    assert "JobDeleted: somebody deleted the Job" in world.condition("Succeeded")["message"]


async def test_a_deleted_job_whose_pod_still_ends_well_has_succeeded() -> None:
    """A worker may finish the commit that it is in the middle of: nothing is started beside it, or done again."""
    world = World()
    world.cluster.pods_linger = True
    world.create(**PARTITIONS, parallelism=1)
    await world.settle()
    (fetch,) = world.active_jobs()
    name = fetch["metadata"]["name"]
    world.cluster.start_pod(name)
    await world.settle()
    world.cluster.expire_job(name)
    await world.settle()
    assert world.active_jobs() == []
    pod = world.cluster.pods(name)[0]
    ended = world.source.run(fetch)
    world.cluster.end_pod(name, result=ended)
    await world.settle()
    assert pod["metadata"]["name"]
    assert [stage(job) for job in world.active_jobs()] == [("0", "hook", "0")]


@pytest.mark.parametrize("twice", [False, True])
async def test_a_result_that_nobody_saw_is_fetched_again_from_its_cursor(twice: bool) -> None:
    """The operator was down: unknown is no success. The batch is read again, and has to end where it did before."""
    world = World()
    world.create(**CHAIN, parallelism=2)
    await world.settle()
    world.work(world.active_jobs()[0])
    await world.settle()
    for _ in range(2 if twice else 1):
        for job in world.active_jobs():
            if stage(job) == ("0", "fetch", "1"):
                world.work(job)
                await world.settle()
        world.deaf |= {"Job", "Pod"}
        for job in world.cluster.jobs():
            if stage(job)[0] == "0":
                world.cluster.expire_job(job["metadata"]["name"])
        world.deaf.clear()
        world.restart()
        await world.settle()
    await world.play()
    assert world.phase == "Succeeded"
    assert world.status["records"] == {"fetched": 450, "rejected": 0, "published": 450}
    assert created(world).count(("0", "fetch", "1")) == 1
    assert created(world).count(("0", "fetch", "2")) == (1 if twice else 0)
    again = [
        call.body
        for call in world.cluster.calls("create", "jobs")
        if call.body and stage(call.body) == ("0", "fetch", "1")
    ]
    env = environment(again[0])
    assert (env.get("INGEST_CURSOR", ""), env["INGEST_LIMIT"]) == ("", "100")


async def test_a_source_that_has_changed_meanwhile_fails_that_batch() -> None:
    world = World()
    world.create(**CHAIN, parallelism=2, onBatchFailure="Continue")
    await world.settle()
    world.work(world.active_jobs()[0])
    await world.settle()
    for job in world.cluster.jobs():
        if stage(job)[0] == "0":
            world.deaf |= {"Job", "Pod"}
            world.cluster.expire_job(job["metadata"]["name"])
    world.deaf.clear()
    world.restart()
    await world.settle()
    again = next(job for job in world.active_jobs() if stage(job)[0] == "0")
    fewer = {"v": "v1", "outcome": "done", "read": 99, "written": 99, "rejected": 0, "nextCursor": "99"}
    world.work(again, result=fewer)
    await world.play()
    assert "SourceChanged" in {failure["reason"] for failure in world.status["failures"]}
    assert world.status["batches"]["failed"] == "0"


async def test_a_publish_deleted_unseen_after_a_cancel_is_unknown() -> None:
    world = World()
    world.create(batches={"partitions": {"count": 1}})
    for _ in range(2):
        await world.settle()
        world.work(world.active_jobs()[0])
    await world.settle()
    (publish,) = world.active_jobs()
    world.cluster.start_pod(publish["metadata"]["name"])
    await world.settle()
    world.cancel()
    await world.settle()
    world.cluster.expire_job(publish["metadata"]["name"])
    memory = world.store.memories.recall(world.cluster.run(KEY)["metadata"]["uid"])
    for _ in range(3):
        await world.settle()
        memory.awaiting_pods = dict.fromkeys(memory.awaiting_pods, 0.0)
        if world.due:
            world.now = max(world.now, min(world.due.values()))
    assert world.condition("Drained")["status"] == "True"
    assert (world.status["cancellation"]["unknown"], world.status["cancellation"]["notPublished"]) == ("0", "")
