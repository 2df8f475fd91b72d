"""A pool of workers: simulated workers speak the protocol; the strict API server's history is the judge."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tests.fakes.cluster import Call
from tests.fakes.pool import Act, PoolWorld, pool_spec
from tests.fakes.world import KEY, Killed

from ingestrun.kube.errors import Invalid, KubeError
from ingestrun.model.pool import Claim
from ingestrun.model.ranges import IndexRanges

MODES: dict[str, dict[str, Any]] = {
    "chain": {"batches": {"cursor": {}, "size": 150}},
    "partitions": {"batches": {"partitions": {"count": 4}}, "parallelism": 2},
}


def failing_once(claim: Claim) -> Act | None:
    """One batch fails once, so that a retry is among what a cancel meets."""
    return "fail" if (claim.batch, claim.attempt) == (1, 0) else None


def world_of(mode: str, act: Callable[[Claim], Act | None] = failing_once, **spec: Any) -> PoolWorld:
    world = PoolWorld()
    world.act = act
    world.create(**pool_spec(**(MODES[mode] | spec)))
    return world


async def length_of(mode: str) -> tuple[int, int]:
    """How many calls of the operator, and steps of workers, a run without any disturbance takes."""
    world = world_of(mode)
    await world.play_pool()
    assert_succeeded(world)
    return len(world.cluster.history), world.requests


def at_call(world: PoolWorld, number: int, stage: str, act: Callable[[], None]) -> None:
    async def on_call(call: Call) -> None:
        if call.index == number and call.stage == stage:
            world.cluster.on_call = None
            act()

    world.cluster.on_call = on_call


def at_request(world: PoolWorld, number: int, act: Callable[[], None]) -> None:
    def on_request(count: int) -> None:
        if count == number:
            world.on_request = None
            act()

    world.on_request = on_request


def patch(world: PoolWorld, **spec: Any) -> None:
    world.cluster.user_patch_spec(KEY, spec)


def assert_succeeded(world: PoolWorld) -> None:
    status = world.status
    assert world.phase == "Succeeded", status
    assert status["records"]["published"] == sum(world.source.published.values())
    assert status["records"]["fetched"] == status["records"]["published"]
    if "cursor" in world.cluster.run(KEY)["spec"]["batches"]:
        assert status["records"]["published"] == world.source.total
    assert world.condition("Drained")["status"] == "True"
    assert "workers" not in status
    assert "publishing" not in status["batches"]
    assert not status["batches"]["checkpoints"]
    assert_each_batch_once(world)


def assert_each_batch_once(world: PoolWorld) -> None:
    """No batch is published by two attempts, and nobody publishes without permission."""
    assert len({grant.batch for grant in world.commits}) == len(world.commits)
    assert world.grants_after_end() == []
    for change in world.cluster.changes:
        if change.kind == "IngestRun" and "workers" in (status := change.obj.get("status") or {}):
            held = [entry["batch"] for entry in status["workers"] if "batch" in entry]
            assert len(held) == len(set(held)), "a batch is held by two workers"


def assert_cancelled(world: PoolWorld) -> None:
    """Nothing began after the end, and each batch in flight is told apart."""
    status = world.status
    assert world.phase == "Cancelled", status
    assert world.creates_after_cancelled() == []
    assert_each_batch_once(world)
    assert world.condition("Drained")["status"] == "True", status
    record = status["cancellation"]
    landed = IndexRanges.parse(record["published"])
    unknown = IndexRanges.parse(record["unknown"])
    counted = IndexRanges.parse(status["batches"]["published"])
    published = IndexRanges(int(key.rpartition("/")[2]) for key in world.source.published)
    assert not (landed | counted) - published
    assert not published - landed - counted - unknown, "a batch landed, and was told as not published"
    told = (status.get("afterEnd") or {}).get("records", {}).get("published", 0)
    assert told == sum(world.source.published[f"{world.uid()}/{index}"] for index in landed)
    ended = next(
        change.revision
        for change in world.cluster.changes
        if change.kind == "IngestRun" and (change.obj.get("status") or {}).get("phase") == "Cancelled"
    )
    assert not [call for call in world.cluster.calls("create", "jobs") if call.stored and (call.revision or 0) > ended]


@pytest.mark.parametrize("mode", MODES)
async def test_a_pool_runs_to_its_end(mode: str) -> None:
    world = world_of(mode)

    await world.play_pool()

    assert_succeeded(world)
    assert [(entry["reason"], entry["count"]) for entry in world.status["retries"]] == [("Error", 1)]


def cancel(world: PoolWorld, refused: list[KubeError]) -> None:
    try:
        world.cancel(cancellation={"reason": "enough"})
    except KubeError as error:
        refused.append(error)


@pytest.mark.parametrize("stage", ["before", "after"])
@pytest.mark.parametrize("mode", MODES)
async def test_cancel_around_every_call_of_the_operator(mode: str, stage: str) -> None:
    outcomes = set()
    for number in range((await length_of(mode))[0]):
        world, refused = world_of(mode), list[KubeError]()
        at_call(world, number, stage, lambda world=world, refused=refused: cancel(world, refused))  # type: ignore[misc]

        await world.play_pool()

        outcomes.add(world.phase)
        if refused:
            assert_succeeded(world)
        else:
            assert_cancelled(world)
    assert outcomes == {"Succeeded", "Cancelled"}


@pytest.mark.parametrize("mode", MODES)
async def test_cancel_around_every_step_of_a_worker(mode: str) -> None:
    for number in range(1, (await length_of(mode))[1] + 1):
        world, refused = world_of(mode), list[KubeError]()
        at_request(world, number, lambda world=world, refused=refused: cancel(world, refused))  # type: ignore[misc]

        await world.play_pool()

        if refused:
            assert_succeeded(world)
        else:
            assert_cancelled(world)


@pytest.mark.parametrize("stage", ["before", "after"])
@pytest.mark.parametrize("mode", MODES)
async def test_operator_killed_around_every_call(mode: str, stage: str) -> None:
    for number in range((await length_of(mode))[0]):
        world = world_of(mode)

        def die(world: PoolWorld = world) -> None:
            world.restart()
            raise Killed

        at_call(world, number, stage, die)
        await world.play_pool()
        assert_succeeded(world)


@pytest.mark.parametrize("stage", ["before", "after"])
@pytest.mark.parametrize("mode", MODES)
async def test_operator_killed_around_every_call_and_cancelled_while_down(mode: str, stage: str) -> None:
    for number in range((await length_of(mode))[0]):
        world, refused = world_of(mode), list[KubeError]()

        def die(world: PoolWorld = world, refused: list[KubeError] = refused) -> None:
            cancel(world, refused)
            world.restart()
            raise Killed

        at_call(world, number, stage, die)
        await world.play_pool()
        if refused:
            assert_succeeded(world)
        else:
            assert_cancelled(world)


@pytest.mark.parametrize("cancelled", [False, True])
@pytest.mark.parametrize("mode", MODES)
async def test_every_worker_killed_at_every_step(mode: str, cancelled: bool) -> None:
    """SIGKILL of all workers at any step of any of them, also between permission and commit, and after it."""
    for number in range(1, (await length_of(mode))[1] + 1):
        world, refused = world_of(mode), list[KubeError]()

        def kill(world: PoolWorld = world, refused: list[KubeError] = refused) -> None:
            for worker in list(world.workers.values()):
                world.end(worker, exit_code=137)
            if cancelled:
                cancel(world, refused)

        at_request(world, number, kill)
        await world.play_pool()
        if not cancelled or refused:
            assert world.phase == "Succeeded", (number, world.status)
            assert world.status["records"]["published"] == sum(world.source.published.values())
        else:
            assert_cancelled(world)


@pytest.mark.parametrize("mode", MODES)
async def test_a_run_fails_by_its_policy_alone(mode: str) -> None:
    world = world_of(mode, lambda claim: "permanent" if claim.batch == 1 else None)

    await world.play_pool()

    assert world.phase == "Failed"
    assert world.condition("Succeeded")["reason"] in ("BatchFailed", "FetchFailed")
    assert "PermanentError: no luck" in world.condition("Succeeded")["message"]
    assert world.condition("Drained")["status"] == "True"
    assert_each_batch_once(world)


async def test_a_batch_that_kills_its_workers_fails_alone() -> None:
    world = world_of(
        "partitions", lambda claim: "die" if claim.batch == 1 else None, onBatchFailure="Continue", retries=2
    )

    await world.play_pool()

    assert world.phase == "Succeeded"
    assert world.status["batches"]["failed"] == "1"
    assert world.status["batches"]["published"] == "0,2-3"
    assert [claim.attempt for claim in world.claims if claim.batch == 1] == [0, 1, 2]
    assert world.status["retries"] == [{"stage": "worker", "reason": "Error", "count": 2}]


async def test_out_of_memory_gets_a_worker_with_more() -> None:
    limits = {"mode": "Pool", "resources": {"limits": {"memory": "256Mi"}}}
    world = world_of(
        "partitions",
        lambda claim: "oom" if (claim.batch, claim.attempt) == (2, 0) else None,
        execution=limits,
        outOfMemory={"maxMemory": "1Gi"},
    )

    await world.play_pool()

    assert_succeeded(world)
    jobs = [call.body for call in world.cluster.calls("create", "jobs") if call.body is not None]
    memory = [job["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]["memory"] for job in jobs]
    assert memory[-1] == "512Mi"
    assert world.status["execution"]["memoryLimit"] == 512 * 2**20


async def test_disruptions_take_no_retries() -> None:
    world = world_of("chain", lambda claim: "evict" if claim.batch == 1 and claim.attempt < 2 else None, retries=0)

    await world.play_pool()

    assert_succeeded(world)
    assert world.status["retries"] == [{"stage": "worker", "reason": "Evicted", "count": 2}]


async def test_suspended_workers_leave_and_come_back() -> None:
    world = world_of("partitions", lambda _: None)
    at_request(world, 4, lambda: patch(world, suspend=True))

    await world.play_pool()
    assert world.phase == "Suspended"
    assert "workers" not in world.status
    assert world.active_jobs() == []
    claimed = len(world.claims)
    world.cluster.user_patch_spec(KEY, {"suspend": False})
    await world.play_pool()

    assert_succeeded(world)
    assert len(world.claims) > claimed


async def test_fewer_workers_when_parallelism_is_lowered() -> None:
    world = world_of("partitions", lambda _: None, parallelism=4, batches={"partitions": {"count": 12}})
    at_request(world, 12, lambda: patch(world, parallelism=1))

    await world.play_pool()

    assert_succeeded(world)
    most = [
        len(change.obj["status"].get("workers") or ())
        for change in world.cluster.changes
        if change.kind == "IngestRun" and "status" in change.obj
    ]
    assert max(most) == 4
    assert most[-4] <= 2


async def test_without_room_nothing_is_lost() -> None:
    world = world_of("partitions")
    world.cluster.job_quota["default"] = 0

    await world.settle()
    assert world.condition("Backpressured")["status"] == "True"
    assert world.condition("Backpressured")["reason"] == "QuotaExceeded"
    assert world.phase == "Pending"
    world.cluster.job_quota["default"] = 1
    await world.play_pool()

    assert_succeeded(world)
    assert world.condition("Backpressured")["status"] == "False"


async def test_a_worker_without_a_node_does_not_keep_the_others() -> None:
    world = world_of("partitions", lambda _: None)
    await world.settle()
    first, second = (job["metadata"]["name"] for job in world.active_jobs())
    world.cluster.create_pod(second, unschedulable="0/1 nodes are available: 1 Insufficient cpu.")
    await world.settle()
    world.workers[second] = stuck = next(iter([_stuck(second)]))
    assert world.condition("Backpressured") == {}

    await world.play_pool()

    assert stuck.job == second
    assert first != second
    assert world.phase == "Succeeded"
    assert len(world.source.published) == 4


def _stuck(job: str) -> Any:
    from tests.fakes.pool import SimulatedWorker

    return SimulatedWorker(number=1, job=job, stuck=True)


async def test_workers_that_cannot_start_end_the_run() -> None:
    world = world_of("chain", retries=1)
    for _ in range(3):
        await world.settle()
        for job in world.active_jobs():
            world.cluster.finish_job(job["metadata"]["name"], exit_code=1, result="no such module")
        if world.due:
            world.now = max(world.due.values())
    await world.settle()

    assert world.phase == "Failed"
    assert world.condition("Succeeded")["reason"] == "Error"
    assert "the pool has no worker" in world.condition("Succeeded")["message"]
    assert len(world.cluster.calls("create", "jobs")) == 2


async def test_a_hundred_workers_fit_into_the_status() -> None:
    world = world_of("partitions", parallelism=100, batches={"partitions": {"count": 1000}})
    await world.play_pool(rounds=2000)

    assert_succeeded(world)
    assert world.cluster.largest_run < 16 * 1024
    most = max(
        len(change.obj["status"].get("workers") or ())
        for change in world.cluster.changes
        if change.kind == "IngestRun" and "status" in change.obj
    )
    assert most == 100


async def test_the_api_server_itself_refuses_a_claim_after_the_end() -> None:
    """The strict server of these tests has the CRD's rule; tests/api has it from the real one."""
    world = world_of("partitions", lambda _: None)
    world.cancel()
    await world.play_pool()
    run = world.cluster.run(KEY)

    with pytest.raises(Invalid):
        await world.cluster.write_status(
            KEY, resource_version=run["metadata"]["resourceVersion"], status={"batches": {"claimed": "0"}}
        )
