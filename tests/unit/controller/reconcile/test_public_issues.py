"""Faults that users of other tools have reported, tried on this one: docs/proof.md has the list, with the sources."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from tests.fakes.cluster import FakeCluster
from tests.fakes.world import KEY, World, environment, manifest

from ingestrun.controller.http.health import Health
from ingestrun.controller.state.cache import RunCache
from ingestrun.controller.state.usage import Usage
from ingestrun.controller.watch.resync import resync_forever, resync_once
from ingestrun.controller.watch.workqueue import WorkQueue
from ingestrun.kube.errors import NotFound, Unavailable
from ingestrun.kube.protocol import Object, RunKey
from ingestrun.planner.run.fair_sharing import JobLimits

Json = dict[str, Any]


@pytest.fixture
def world() -> World:
    return World()


def set_in_spec(*path: str, to: object) -> Callable[[Json], None]:
    """A policy that sets one field of each Job."""

    def mutate(job: Json) -> None:
        found = job["spec"]
        for name in path[:-1]:
            found = found[name]
        found[path[-1]] = to

    return mutate


@pytest.mark.parametrize(
    "value", ["$$", "a$$b", "$(INGEST_RUN_NAME)", "$$(INGEST_RUN_NAME)", "$$$(INGEST_BATCH)", "$", "x$é", "a\0b"]
)
async def test_partition_arrives_as_it_is_written_whatever_kubernetes_expands(world: World, value: str) -> None:
    world.create(batches={"partitions": {"values": [value]}})
    await world.settle()
    (job,) = world.active_jobs()
    assert environment(job)["INGEST_CURSOR"] == value.replace("\0", "")


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("backoffLimit",), 3, "spec.backoffLimit from 0 to 3"),
        (("parallelism",), 0, "spec.parallelism from 1 to 0"),
        (("completions",), 2, "spec.completions from 1 to 2"),
        (("managedBy",), "example.com/other", "spec.managedBy to example.com/other"),
        (
            ("template", "spec", "restartPolicy"),
            "OnFailure",
            "spec.template.spec.restartPolicy from Never to OnFailure",
        ),
    ],
)
async def test_job_that_a_policy_would_run_another_number_of_times_is_not_left_to_run(
    world: World, path: tuple[str, ...], value: object, words: str
) -> None:
    world.cluster.mutate_job = set_in_spec(*path, to=value)
    world.create()
    await world.settle()
    assert (world.phase, world.condition("Succeeded")["reason"]) == ("Failed", "JobChanged")
    assert (
        f"batch 0, fetch: an admission policy or webhook has changed {words}" in world.condition("Succeeded")["message"]
    )
    assert not world.cluster.jobs()
    assert len(world.cluster.calls("create", "jobs")) == 1


async def test_job_to_which_a_policy_adds_what_changes_no_number_is_left_alone(world: World) -> None:
    world.cluster.mutate_job = set_in_spec("ttlSecondsAfterFinished", to=604_800)
    world.create()
    await world.play()
    assert world.phase == "Succeeded"


async def test_cancel_reaches_a_run_that_a_finalizer_keeps_from_going(world: World) -> None:
    world.create()
    await world.settle()
    (job,) = world.active_jobs()
    world.cluster.start_pod(job["metadata"]["name"])
    body = world.cluster.run(KEY)
    body["metadata"] |= {"deletionTimestamp": "2026-11-23T12:00:00Z", "finalizers": ["example.com/hold"]}
    world.cluster._store("IngestRun", body, "MODIFIED")
    await world.settle()
    assert world.phase == "Running"
    world.cancel(cancellation={"policy": "Terminate"})
    await world.settle()
    assert world.phase == "Cancelled"
    assert not world.cluster.pods()
    assert not world.creates_after_cancelled()


async def test_pod_that_a_dead_node_keeps_for_ever_is_told_while_the_run_is_active(world: World) -> None:
    world.cluster.pods_linger = True
    world.create()
    await world.settle()
    (job,) = world.active_jobs()
    pod = world.cluster.start_pod(job["metadata"]["name"])
    stored = next(found for found in world.cluster.pods() if found["metadata"]["name"] == pod)
    world.cluster._terminate(stored)
    await world.settle()
    assert world.condition("Reconciling")["reason"] == "Running"
    world.now += timedelta(seconds=91)
    await world.settle()
    told = world.condition("Reconciling")
    assert told["reason"] == "PodStuckTerminating"
    assert f"pod {pod} on node" in told["message"]
    assert "--grace-period=0 --force" in told["message"]
    assert [event["type"] for event in world.cluster.events() if event["reason"] == "PodStuckTerminating"] == [
        "Warning"
    ]
    world.cluster.lose_pod(job["metadata"]["name"])
    await world.play()
    assert world.phase == "Succeeded"


@pytest.mark.parametrize(
    ("error", "watches"),
    [(NotFound("the server could not find the requested resource"), False), (Unavailable("503"), True)],
)
async def test_watches_wait_for_the_crd_and_for_nothing_else(error: Exception, watches: bool) -> None:
    cluster = FakeCluster()
    cluster.user_create_run(manifest())

    async def look(_key: RunKey, _trigger: str) -> None:
        return None

    queue: WorkQueue[RunKey] = WorkQueue(look, concurrency=1)
    cache = RunCache(Usage(JobLimits(), wake=lambda _: None))
    answers: list[Exception | None] = [error, error, None]
    asked = asyncio.Event()

    async def on_call(call: Any) -> None:
        if (call.verb, call.resource, call.stage) == ("list", "ingestruns", "before"):
            asked.set()
            failure = answers.pop(0) if answers else None
            if failure is not None:
                raise failure

    cluster.on_call = on_call
    tried = asyncio.Event()
    resync = asyncio.create_task(
        resync_forever(cluster, cache, queue, seconds=0.01, health=Health(), tried=tried), name="resync"
    )
    await asyncio.wait_for(asked.wait(), 5)
    await asyncio.wait_for(tried.wait(), 5)
    resync.cancel()
    assert (len(answers) > 0) is watches
    await queue.close()


async def test_job_scaled_to_nothing_is_told_as_paused_and_goes_on_when_it_is_scaled_up(world: World) -> None:
    world.create(batches={"partitions": {"count": 1}})
    await world.settle()
    (job,) = world.active_jobs()
    name = job["metadata"]["name"]
    world.cluster.start_pod(name)
    await world.settle()
    world.cluster.suspend_job(name)
    paused = world.cluster.job(name)
    paused["spec"] |= {"suspend": False, "parallelism": 0}
    world.cluster._store("Job", paused, "MODIFIED")
    world.now += timedelta(seconds=30)
    await world.settle()
    assert world.condition("Reconciling")["reason"] == "Queued"
    going = world.cluster.job(name)
    going["spec"] |= {"parallelism": 1}
    world.cluster._store("Job", going, "MODIFIED")
    await world.play()
    assert world.phase == "Succeeded"
    assert not world.status.get("failures")


async def test_second_pod_of_a_job_publishes_nothing_twice(world: World) -> None:
    """The Job controller may start one Job's program twice: the first result counts, once."""

    def twice(job: Object) -> Json:
        world.cluster.start_pod(job["metadata"]["name"])
        world.cluster._new_pod(job["metadata"]["name"], "default")
        return {"result": json.dumps(world.source.run(job))}

    world.create()
    await world.play(each=twice)
    assert world.phase == "Succeeded"
    assert world.status["records"]["published"] == sum(world.source.published.values()) == 450
    assert len(world.cluster.calls("create", "jobs")) == 15


async def test_server_that_asks_to_try_again_later_costs_no_retry(world: World) -> None:
    for _ in range(3):
        world.cluster.fail_next("create", "jobs", Unavailable("Too many requests, please try again later"))
    world.cluster.fail_next("patch", "ingestruns/status", Unavailable("Too many requests, please try again later"))
    world.create(retries=0)
    await world.play()
    assert world.phase == "Succeeded"
    assert not world.status.get("failures")
    assert not world.status.get("retries")


async def test_cancel_is_seen_though_the_watch_of_runs_has_died_in_silence(world: World) -> None:
    world.create()
    await world.settle()
    world.deaf.add("IngestRun")
    world.cancel()
    await world.settle()
    assert world.phase == "Running"
    await resync_once(world.cluster, world.store, world)  # type: ignore[arg-type]
    await world.settle()
    assert world.phase == "Cancelled"
    assert not world.creates_after_cancelled()
