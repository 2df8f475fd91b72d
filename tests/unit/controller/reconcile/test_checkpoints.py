"""A quota on Jobs, which counts ended ones too, however small: runs get on, and nothing is done twice."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fakes.cluster import Call
from tests.fakes.world import KEY, World, environment, manifest

from ingestrun.kube.protocol import Object, RunKey
from ingestrun.model.size_budget import MAX_CHECKPOINTS

CHAIN = {"batches": {"cursor": {}, "size": 100}}
PARTITIONS = {"batches": {"partitions": {"count": 5}}}
MEMORY = {"image": "example/worker:1", "resources": {"limits": {"memory": "64Mi"}}}
OOM = {"exit_code": 137, "reason": "OOMKilled"}


class Killed(BaseException):
    """The operator is gone, in the middle of a pass."""


def add(world: World, name: str, **spec: Any) -> RunKey:
    body = manifest(**spec)
    body["metadata"]["name"] = name
    world.cluster.user_create_run(body)
    return RunKey(namespace="default", name=name)


def memory(job: Object) -> str | None:
    limits = job["spec"]["template"]["spec"]["containers"][0].get("resources", {}).get("limits", {})
    found: str | None = limits.get("memory")
    return found


def made(world: World) -> list[Object]:
    """All Jobs that were ever stored, each time one was."""
    first: dict[str, Object] = {}
    for change in world.cluster.changes:
        if change.kind == "Job":
            first.setdefault(change.obj["metadata"]["uid"], change.obj)
    return list(first.values())


def stage(job: Object) -> tuple[str, str, str]:
    env = environment(job)
    return env["INGEST_BATCH"], env["INGEST_STAGE"], env["INGEST_ATTEMPT"]


def retried(world: World) -> dict[tuple[str, str], int]:
    return {(entry["stage"], entry["reason"]): entry["count"] for entry in world.status.get("retries", ())}


def assert_nothing_twice(world: World) -> None:
    names = Counter(job["metadata"]["name"] for job in made(world))
    assert [name for name, times in names.items() if times > 1] == []


async def moves_on(world: World, ends: Any, *, rounds: int = 2000, choose: Any = lambda jobs: jobs[0]) -> None:
    """Let the operator and the kubelet work in turn until `ends`, one Job at a time."""
    for _ in range(rounds):
        await world.settle()
        if ends():
            return
        jobs = world.active_jobs()
        if jobs:
            world.work(choose(jobs))
        else:
            assert world.due, f"it hangs: {world.cluster.run(KEY)['status']}"
            world.now = max(world.now, min(world.due.values()))
    raise AssertionError("no end")


@pytest.mark.parametrize("quota", range(1, 8))
@pytest.mark.parametrize("mode", [CHAIN, PARTITIONS], ids=["chain", "partitions"])
async def test_one_place_is_enough(quota: int, mode: dict[str, Any]) -> None:
    world = World()
    world.cluster.job_quota["default"] = quota
    world.create(**mode, parallelism=4)
    await moves_on(world, lambda: world.phase == "Succeeded")
    total = 450 if mode is CHAIN else 50
    assert world.status["records"] == {"fetched": total, "rejected": 0, "published": total}
    assert world.status["batches"]["published"] == "0-4"
    assert world.status["batches"]["checkpoints"] == []
    assert len(made(world)) == 3 * 5
    assert_nothing_twice(world)


@pytest.mark.parametrize("quota", [1, 2, 5])
async def test_runs_that_share_so_small_a_quota_all_get_on(quota: int) -> None:
    world = World()
    world.cluster.job_quota["default"] = quota
    keys = [add(world, KEY.name, **CHAIN), add(world, "b", **PARTITIONS), add(world, "c", **PARTITIONS)]
    ended = lambda: all(world.cluster.run(key)["status"].get("phase") == "Succeeded" for key in keys)  # noqa: E731
    await moves_on(world, ended)
    assert [world.cluster.run(key)["status"]["records"]["published"] for key in keys] == [450, 50, 50]
    assert_nothing_twice(world)


async def test_it_costs_nothing_where_there_is_room() -> None:
    world = World()
    world.cluster.job_quota["default"] = 1000
    world.create(**CHAIN)
    await world.play()
    assert all(not change.obj["status"].get("batches", {}).get("checkpoints") for change in world.cluster.changes
               if change.kind == "IngestRun")  # fmt: skip
    assert world.cluster.calls("delete", "jobs") == []


async def test_a_batch_in_flight_goes_before_new_ones() -> None:
    """Two places for ten partitions, all claimed before the first refusal: each goes on to its publish."""
    world = World()
    world.cluster.job_quota["default"] = 2
    world.create(batches={"partitions": {"count": 10}}, parallelism=10)
    await moves_on(world, lambda: world.status["batches"]["published"] == "0-1")
    order = [stage(job)[:2] for job in made(world)]
    assert order[:4] == [("0", "fetch"), ("1", "fetch"), ("0", "hook"), ("0", "publish")]
    assert order[4:7] == [("2", "fetch"), ("1", "hook"), ("1", "publish")]


async def test_jobs_go_only_once_the_status_says_what_they_came_to() -> None:
    world = World()
    world.cluster.job_quota["default"] = 1
    world.create(**CHAIN)
    kept: list[tuple[Object, Object]] = []

    async def look(call: Call) -> None:
        if call.verb == "delete" and call.resource == "jobs" and call.stage == "before":
            (job,) = world.cluster.jobs()
            kept.append((job, world.cluster.run(KEY)))

    world.cluster.on_call = look
    await moves_on(world, lambda: world.phase == "Succeeded")
    assert len(kept) >= 2 * 5
    for job, run in kept:
        batch, step = (int(job["metadata"]["labels"][f"ingestrun.dev/{label}"]) for label in ("batch", "step"))
        (entry,) = (entry for entry in run["status"]["batches"]["checkpoints"] if entry["batch"] == batch)
        assert entry["stage"] == step + 1
        assert entry["written"] == (50 if batch == 4 else 100)


@pytest.mark.parametrize("room", [0, 10 * 1024])
async def test_no_more_are_parked_than_the_status_has_room_for(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ingestrun.planner.run.checkpoints.CHECKPOINTS_STATUS_BYTES", room)
    world = World()
    world.cluster.job_quota["default"] = 20
    world.create(batches={"partitions": {"count": 40}}, parallelism=20)
    most = 0
    for _ in range(40):
        await world.settle()
        most = max(most, len(world.status["batches"].get("checkpoints", ())))
        for job in world.active_jobs():
            world.work(job)
        if world.due and not world.active_jobs():
            world.now = max(world.now, min(world.due.values()))
    assert most == MAX_CHECKPOINTS if not room else most > MAX_CHECKPOINTS
    assert world.cluster.largest_run < 16 * 1024
    await moves_on(world, lambda: world.phase == "Succeeded")
    assert_nothing_twice(world)


@pytest.mark.parametrize("quota", [1, 2, 3])
async def test_the_kept_jobs_of_failed_batches_go_only_where_nothing_else_is_left(quota: int) -> None:
    world = World()
    world.cluster.job_quota["default"] = quota
    world.create(batches={"partitions": {"count": 6}}, parallelism=1, retries=0, onBatchFailure="Continue")
    for _ in range(60):
        await world.settle()
        if world.phase == "Succeeded":
            break
        if jobs := world.active_jobs():
            bad = stage(jobs[0])[0] in ("0", "2", "4")
            world.work(jobs[0], **({"exit_code": 1} if bad else {}))
        else:
            world.now = max(world.now, min(world.due.values()))
    assert world.phase == "Succeeded"
    assert (world.status["batches"]["published"], world.status["batches"]["failed"]) == ("1,3,5", "0,2,4")
    left = [stage(job)[0] for job in world.cluster.jobs()]
    assert [batch for batch in left if batch in ("0", "2", "4")] == ["0", "2", "4"][-(quota - 1) :][: quota - 1]


FATES = [OOM, {"exit_code": 1}, {"exit_code": 1}, {"result": "<html>"}]


@settings(max_examples=60, deadline=None)
@given(
    fates=st.dictionaries(
        st.tuples(
            st.integers(0, 4).map(str), st.sampled_from(["fetch", "hook", "publish"]), st.integers(0, 3).map(str)
        ),
        st.sampled_from(FATES),
        max_size=12,
    ),
    rejects=st.dictionaries(st.integers(0, 4).map(str), st.integers(1, 9), max_size=5),
    quota=st.integers(1, 6),
    parallelism=st.integers(1, 4),
    mode=st.sampled_from([CHAIN, PARTITIONS]),
    restarts=st.sets(st.integers(0, 60), max_size=6),
    retries=st.integers(0, 3),
    kept=st.integers(0, 3),
)
def test_all_comes_out_as_without_a_quota(
    fates: dict[tuple[str, str, str], dict[str, Any]],
    rejects: dict[str, int],
    quota: int,
    parallelism: int,
    mode: dict[str, Any],
    restarts: set[int],
    retries: int,
    kept: int,
) -> None:
    """Budgets, raised memory, rows handed on and rejected: what was in the Jobs that are gone is not lost."""

    def result(world: World, job: Object) -> dict[str, Any]:
        batch, name, _ = stage(job)
        told = world.source.run(job)
        if name == "hook" and batch in rejects:
            lost = min(rejects[batch], told["read"])
            told |= {"written": told["read"] - lost, "rejected": lost}
            world.source.handed_on[environment(job)["INGEST_IDEMPOTENCY_KEY"]] -= lost
        return {"result": json.dumps(told)}

    async def course(limit: int | None, again: set[int]) -> World:
        world = World()
        if limit is not None:
            world.cluster.job_quota["default"] = limit
        world.create(
            **mode,
            fetch=MEMORY,
            hooks=[{"name": "check", "container": MEMORY}],
            publish=MEMORY,
            parallelism=parallelism,
            retries=retries,
            outOfMemory={"retries": 2, "maxMemory": "200Mi"},
            onBatchFailure="Continue",
            jobRetention={"failedBatches": kept},
        )
        for step in range(1500):
            if step in again:
                world.restart()
            await world.settle()
            if world.phase in ("Succeeded", "Failed"):
                return world
            if jobs := world.active_jobs():
                job = jobs[0]
                world.work(job, **(fates.get(stage(job)) or result(world, job)))
            else:
                assert world.due, f"it hangs: {world.status}"
                world.now = max(world.now, min(world.due.values()))
        raise AssertionError(f"no end: {world.status}")

    async def both() -> tuple[World, World]:
        return await course(None, set()), await course(quota, restarts)

    plain, tight = asyncio.run(both())
    if mode is CHAIN and plain.status["batches"]["failed"]:
        return  # what a chain has begun when a fetch fails depends on who was faster
    for key in ("phase", "records"):
        assert tight.status[key] == plain.status[key]
    for key in ("claimed", "fetched", "published", "failed"):
        assert tight.status["batches"][key] == plain.status["batches"][key]
    assert retried(tight) == retried(plain)
    assert {stage(job): memory(job) for job in made(tight)} == {stage(job): memory(job) for job in made(plain)}
    assert_nothing_twice(tight)


@pytest.mark.parametrize(
    ("fate", "spec"),
    [
        ({"exit_code": 1}, {"retries": 1}),
        (OOM, {"retries": 0, "outOfMemory": {"retries": 1, "maxMemory": "4Gi"}}),
    ],
)
async def test_a_budget_is_spent_by_attempts_that_are_gone_too(fate: dict[str, Any], spec: dict[str, Any]) -> None:
    world = World()
    world.cluster.job_quota["default"] = 1
    world.create(batches={"partitions": {"count": 1}}, fetch=MEMORY, **spec)
    for _ in range(20):
        await world.settle()
        if world.phase == "Failed":
            break
        if jobs := world.active_jobs():
            world.work(jobs[0], **fate)
        else:
            world.now = max(world.now, min(world.due.values()))
    assert world.phase == "Failed"
    assert [stage(job) for job in made(world)] == [("0", "fetch", "0"), ("0", "fetch", "1")]


async def test_the_next_stage_reads_what_the_attempt_that_is_gone_has_written() -> None:
    world = World()
    world.cluster.job_quota["default"] = 1
    world.create(
        batches={"partitions": {"count": 1}}, workspace={"persistentVolumeClaim": {"claimName": "ingest-data"}}
    )
    await world.settle()
    world.work(world.active_jobs()[0], exit_code=1)
    await moves_on(world, lambda: world.phase == "Succeeded")
    first, again, hook, publish = (environment(job) for job in made(world))
    assert again["INGEST_OUTPUT"] != first["INGEST_OUTPUT"]
    assert hook["INGEST_INPUT"] == again["INGEST_OUTPUT"]
    assert publish["INGEST_INPUT"] == hook["INGEST_OUTPUT"]


async def test_what_comes_free_goes_to_a_parked_batch_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else an older batch takes the place that a parked one has given up, as often as it likes, and all hangs."""
    monkeypatch.setattr("ingestrun.planner.run.checkpoints.MAX_CHECKPOINTS", 1)
    monkeypatch.setattr("ingestrun.planner.run.checkpoints.CHECKPOINTS_STATUS_BYTES", 0)
    world = World()
    world.cluster.job_quota["default"] = 2
    world.create(batches={"partitions": {"count": 2}}, parallelism=2)
    await world.settle()
    older, newer = world.active_jobs()

    async def end_the_older_one(call: Call) -> None:
        if call.verb == "delete" and call.resource == "jobs" and call.stage == "after":
            world.cluster.on_call = None
            world.work(older)

    world.cluster.on_call = end_the_older_one
    world.work(newer)
    await world.settle()
    assert [stage(job) for job in world.active_jobs()] == [("1", "hook", "0")]
    await moves_on(world, lambda: world.phase == "Succeeded")
    assert_nothing_twice(world)


@pytest.mark.parametrize("quota", [1, 3])
@pytest.mark.parametrize("when", ["before", "after"])
async def test_killed_around_any_call_it_gets_on_and_does_nothing_twice(quota: int, when: str) -> None:
    async def course(kill_at: int) -> tuple[World, int]:
        world, calls = World(), 0
        world.cluster.job_quota["default"] = quota
        world.create(batches={"partitions": {"count": 2}}, parallelism=2)

        async def maybe(call: Call) -> None:
            nonlocal calls
            if call.stage == when:
                calls += 1
                if calls == kill_at:
                    raise Killed

        world.cluster.on_call = maybe
        for _ in range(500):
            try:
                await world.settle()
            except Killed:
                world.restart()
                continue
            if world.phase == "Succeeded":
                break
            if jobs := world.active_jobs():
                world.work(jobs[0])
            else:
                world.now = max(world.now, min(world.due.values()))
        assert world.phase == "Succeeded", kill_at
        assert world.status["records"]["published"] == 20, kill_at
        assert_nothing_twice(world)
        return world, calls

    _, total = await course(0)
    for kill_at in range(1, total + 1):
        await course(kill_at)


async def test_what_a_parked_batch_had_rejected_is_told_when_it_lands_after_the_end() -> None:
    world = World()
    world.cluster.job_quota["default"] = 1
    world.create(batches={"partitions": {"count": 1}}, parallelism=1)
    await world.settle()
    world.work(world.active_jobs()[0])
    await moves_on(world, lambda: [stage(job)[1] for job in world.active_jobs()] == ["hook"])
    (hook,) = world.active_jobs()
    key = environment(hook)["INGEST_IDEMPOTENCY_KEY"]
    world.work(hook, result={"v": "v1", "outcome": "done", "read": 10, "written": 7, "rejected": 3})
    world.source.handed_on[key] = 7
    await moves_on(world, lambda: [stage(job)[1] for job in world.active_jobs()] == ["publish"])
    (publish,) = world.active_jobs()
    world.cluster.start_pod(publish["metadata"]["name"])
    world.cancel()
    await world.settle()
    assert world.phase == "Cancelled"
    world.work(publish)
    await world.play()
    assert world.status["afterEnd"] == {"published": "0", "records": {"published": 7, "rejected": 3}}
    assert world.status["cancellation"]["published"] == "0"
    assert world.status["batches"]["checkpoints"] == [], "of no use after the drain"
