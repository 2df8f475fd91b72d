"""A quota that counts ended pods (`count/pods`): what is over is given back, and one pod is enough to get on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tests.fakes.world import KEY, World, environment, manifest

from ingestrun.kube.protocol import Object, RunKey
from ingestrun.planner.batch.attempt import read_job

CHAIN: dict[str, Any] = {"batches": {"cursor": {}, "size": 100}}
PARTITIONS: dict[str, Any] = {"batches": {"partitions": {"count": 5}}}


def add(world: World, name: str, **spec: Any) -> RunKey:
    body = manifest(**spec)
    body["metadata"]["name"] = name
    world.cluster.user_create_run(body)
    return RunKey(namespace="default", name=name)


def phase(world: World, key: RunKey) -> str | None:
    found: str | None = world.cluster.run(key)["status"].get("phase")
    return found


async def moves_on(
    world: World,
    ends: Callable[[], bool],
    *,
    each: Callable[[Object], dict[str, Any]] = lambda _: {},
    rounds: int = 900,
) -> None:
    """Let the operator, the Job controller and the kubelet work in turn until `ends`, one pod at a time."""
    for _ in range(rounds):
        await world.settle()
        if ends():
            return
        jobs = world.active_jobs()
        able = [job for job in jobs if world.cluster.try_pod(job["metadata"]["name"])]
        if able:
            world.work(able[0], **each(able[0]))
            continue
        await world.settle()  # the refusals are seen
        if ends():
            return
        assert world.due, f"it hangs: {world.cluster.run(KEY)['status']}"
        world.now = max(world.now, min(world.due.values()))
    raise AssertionError(f"no end: {world.cluster.run(KEY)['status']}")


@pytest.mark.parametrize("quota", [1, 2, 3, 7])
@pytest.mark.parametrize("parallelism", [1, 4])
@pytest.mark.parametrize("mode", [CHAIN, PARTITIONS], ids=["chain", "partitions"])
async def test_one_pod_is_enough(quota: int, parallelism: int, mode: dict[str, Any]) -> None:
    world = World()
    world.cluster.pod_quota["default"] = quota
    world.create(**mode, parallelism=parallelism)
    await moves_on(world, lambda: world.phase == "Succeeded")
    total = 450 if mode is CHAIN else 50
    assert world.status["records"] == {"fetched": total, "rejected": 0, "published": total}
    assert world.status["failures"] == []
    assert len(world.cluster.calls("create", "jobs")) == 3 * 5, "no stage is done twice"


async def test_more_batches_at_once_than_a_status_keeps_without_measuring_it() -> None:
    world = World()
    world.cluster.pod_quota["default"] = 1
    world.create(batches={"partitions": {"count": 30}}, parallelism=30)
    await moves_on(world, lambda: world.phase == "Succeeded")
    assert world.status["records"]["published"] == 300
    assert world.cluster.largest_run < 16 * 1024


async def test_it_costs_no_call_where_there_is_room() -> None:
    calls = []
    for quota in (None, 1000):
        world = World()
        if quota is not None:
            world.cluster.pod_quota["default"] = quota
        world.create(**PARTITIONS)
        await moves_on(world, lambda world=world: world.phase == "Succeeded")  # type: ignore[misc]
        calls.append([str(call) for call in world.cluster.history])
    assert calls[0] == calls[1]
    assert [call for call in calls[0] if " delete " in call] == []


async def test_a_quota_that_counts_only_what_runs_makes_nothing_go() -> None:
    """`pods` is free again once a pod has ended: the logs of ended stages stay."""
    world = World()
    world.create(**PARTITIONS, parallelism=2)
    await world.settle()
    first, second = world.active_jobs()
    world.work(first)
    refusal = 'pods "x" is forbidden: exceeded quota: running, requested: pods=1, used: pods=1, limited: pods=1'
    world.cluster.refuse_pod(second["metadata"]["name"], message=refusal)
    for _ in range(8):
        await world.settle()
        world.now = max(world.now, min(world.due.values()))
    assert world.condition("Backpressured")["reason"] == "QuotaExceeded"
    assert world.cluster.calls("delete", "jobs") == world.cluster.calls("deletecollection", "jobs") == []
    assert world.status["batches"]["checkpoints"] == []


async def test_retries_and_rejected_rows_are_counted_as_without_a_quota() -> None:
    world = World()
    world.cluster.pod_quota["default"] = 1
    world.create(batches={"partitions": {"count": 2}}, parallelism=2, retries=2)
    failed: set[str] = set()

    def once(job: Object) -> dict[str, Any]:
        env = environment(job)
        if env["INGEST_STAGE"] == "hook" and env["INGEST_BATCH"] not in failed:
            failed.add(env["INGEST_BATCH"])
            return {"exit_code": 1}
        return {}

    await moves_on(world, lambda: world.phase == "Succeeded", each=once)
    assert world.status["retries"] == [{"stage": "hook check", "reason": "Error", "count": 2}]


async def with_a_failed_run() -> World:
    """Return a world in which a failed run keeps its Jobs under a quota of two pods."""
    world = World()
    world.cluster.pod_quota["default"] = 2
    broken = add(world, "broken", **PARTITIONS, parallelism=1, retries=0)
    await moves_on(
        world,
        lambda: phase(world, broken) == "Failed" and not world.due,
        each=lambda job: {"exit_code": 1} if environment(job)["INGEST_STAGE"] == "hook" else {},
    )
    return world


async def test_the_kept_jobs_of_a_failed_run_give_way_to_another_run() -> None:
    world = await with_a_failed_run()
    assert len(world.cluster.pods()) == 2, "kept for their logs, as long as nobody needs the room"
    world.create(**PARTITIONS)
    await moves_on(world, lambda: phase(world, KEY) == "Succeeded")


async def test_after_a_restart_too() -> None:
    world = await with_a_failed_run()
    world.restart()
    await world.settle()
    world.create(**PARTITIONS)
    await moves_on(world, lambda: phase(world, KEY) == "Succeeded")


@pytest.mark.parametrize("quota", ["pods", "jobs"])
async def test_a_suspended_run_gives_back_what_it_holds_and_goes_on_there_later(quota: str) -> None:
    world = World()
    paused = add(world, "paused", **CHAIN)
    await world.settle()
    world.work(world.active_jobs()[0])
    world.cluster.user_patch_spec(paused, {"suspend": True})
    await world.settle()
    (world.cluster.pod_quota if quota == "pods" else world.cluster.job_quota)["default"] = 1
    world.create(**PARTITIONS)
    await moves_on(world, lambda: phase(world, KEY) == "Succeeded")
    world.cluster.user_patch_spec(paused, {"suspend": None})
    await moves_on(world, lambda: phase(world, paused) == "Succeeded")
    assert world.cluster.run(paused)["status"]["records"]["published"] == 450
    made = [call for call in world.cluster.calls("create", "jobs") if call.name.startswith("paused-") and call.stored]
    assert len(made) == 3 * 5, "no stage of it was done twice"


async def test_two_runs_and_a_restart_at_any_time() -> None:
    world = World()
    world.cluster.pod_quota["default"] = 1
    other = add(world, "other", **CHAIN)
    world.create(**PARTITIONS)
    passes = 0

    def ends() -> bool:
        nonlocal passes
        passes += 1
        if passes % 5 == 0:
            world.restart()
        return phase(world, other) == phase(world, KEY) == "Succeeded"

    await moves_on(world, ends)


def test_a_job_carries_the_state_of_its_batch() -> None:
    job: dict[str, Any] = {
        "metadata": {
            "name": "n",
            "namespace": "default",
            "uid": "j",
            "creationTimestamp": "2026-11-23T12:00:00Z",
            "labels": {f"ingestrun.dev/{name}": "0" for name in ("batch", "step", "attempt", "run-uid", "stage")},
            "annotations": {"ingestrun.dev/checkpoint": '{"batch":0,"stage":1}'},
        }
    }
    assert read_job(job).checkpoint == '{"batch":0,"stage":1}'
