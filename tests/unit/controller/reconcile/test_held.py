"""Runs that this version does not understand, by a newer version or by hand: each is held alone, with a sentence."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import structlog
from tests.fakes.cluster import Call
from tests.fakes.world import KEY, World, manifest

from ingestrun.controller.http.health import Health
from ingestrun.controller.watch.resync import resync_forever, resync_once
from ingestrun.kube.errors import Invalid
from ingestrun.kube.protocol import RunKey

NEWER: dict[str, dict[str, Any]] = {
    "phase": {"phase": "Paused"},
    "field": {"shards": [{"name": "w-0", "batch": 3}]},
    "field of a field": {"batches": {"auditing": "0"}},
    "field of a condition": {
        "conditions": [
            {
                "type": "Throttled",
                "status": "True",
                "reason": "Budget",
                "message": "",
                "lastTransitionTime": "2026-11-23T03:04:05Z",
                "severity": "Info",
            }
        ]
    },
    "value of a condition": {
        "conditions": [
            {
                "type": "Throttled",
                "status": "Maybe",
                "reason": "Budget",
                "message": "",
                "lastTransitionTime": "2026-11-23T03:04:05Z",
            }
        ]
    },
}
"""Statuses that a newer version may write, under a newer CRD."""

NONSENSE: dict[str, dict[str, Any]] = {
    "ranges that descend": {"batches": {"claimed": "7-3"}},
    "negative counters": {"records": {"published": -4}},
    "more in flight than there can be": {"batches": {"claimed": "0-999999999999"}},
    "more failed than there can be": {"batches": {"claimed": "0-999999999999", "failed": "0-999999999999"}},
    "a start at the end of time": {"startTime": "9999-12-31T23:59:59Z", "batches": {"claimed": "0"}},
    "no time at all": {"startTime": "yesterday"},
}
"""What a person can make of a status."""

BESIDE = RunKey(namespace="default", name="beside")


def beside(world: World) -> None:
    """Create another run, which nothing is wrong with."""
    body = manifest(batches={"partitions": {"count": 1}})
    world.cluster.user_create_run({**body, "metadata": {"name": BESIDE.name, "namespace": BESIDE.namespace}})


def told(world: World, reason: str) -> list[str]:
    return [event["note"] for event in world.cluster.events() if event["reason"] == reason]


def keeps(stored: Any, written: Any) -> bool:
    """Tell whether all that was written is still stored."""
    if isinstance(written, dict):
        return isinstance(stored, dict) and all(key in stored and keeps(stored[key], written[key]) for key in written)
    if isinstance(written, list):
        return all(any(keeps(item, wanted) for item in stored) for wanted in written)
    return bool(stored == written)


@pytest.mark.parametrize("status", [*NEWER.values(), *NONSENSE.values()], ids=[*NEWER, *NONSENSE])
async def test_a_status_that_is_not_understood_holds_that_run_alone(status: dict[str, Any]) -> None:
    world = World()
    world.create(activeDeadlineSeconds=60)
    world.cluster.user_patch_status(KEY, status)
    beside(world)
    with structlog.testing.capture_logs() as lines:
        await resync_once(world.cluster, world.store, world)  # type: ignore[arg-type]
        await world.play()
        world.restart()
        await world.settle()
    assert len(world.cluster.calls("create", "jobs")) == 3  # those of the other run
    assert world.cluster.run(BESIDE)["status"]["phase"] == "Succeeded"
    assert world.condition("Reconciling")["reason"] == "Held"
    (note,) = told(world, "Held")
    assert note == world.condition("Reconciling")["message"]
    assert [line["why"] for line in lines if line["event"] == "held"] == [note]
    assert keeps(world.status, status)


@pytest.mark.parametrize("status", [*NEWER.values(), *NONSENSE.values()], ids=[*NEWER, *NONSENSE])
@pytest.mark.parametrize("seen_before", [True, False])
async def test_a_cancel_is_carried_out_and_loses_nothing(status: dict[str, Any], seen_before: bool) -> None:
    world = World()
    world.create(parallelism=1)
    await world.settle()
    (job,) = world.active_jobs()
    world.cluster.start_pod(job["metadata"]["name"])
    world.cluster.user_patch_status(KEY, status)
    if seen_before:
        await world.settle()
    world.cancel(cancellation={"reason": "wrong file"})
    if not seen_before:
        world.restart()
    await world.settle()
    assert world.phase == "Cancelled"
    assert world.status["cancellation"]["reason"] == "wrong file"
    assert world.condition("Drained")["status"] == "False"
    await world.play()
    assert world.condition("Drained")["status"] == "True"
    assert len(world.cluster.calls("create", "jobs")) == 1
    assert world.creates_after_cancelled() == []
    written = {key: value for key, value in status.items() if key != "phase"}
    assert keeps(world.status, written)


async def test_no_clean_up_runs_and_no_job_and_no_run_is_deleted_that_is_not_understood() -> None:
    """A newer version may see them differently; this one leaves them to it."""
    world = World()
    world.create(parallelism=1, onCancel={"image": "example/clean:1"}, ttlSecondsAfterFinished=5)
    await world.settle()
    world.cluster.start_pod(world.active_jobs()[0]["metadata"]["name"])
    world.cluster.user_patch_status(KEY, {"lanes": ["a"]})
    world.cancel()
    await world.play()
    assert (world.phase, world.condition("Drained")["status"]) == ("Cancelled", "True")
    assert len(world.cluster.jobs()) == len(world.cluster.calls("create", "jobs")) == 1
    world.cluster.user_patch_status(KEY, {"lanes": None})
    world.restart()
    await world.play()
    assert len(world.cluster.calls("create", "jobs")) == 2
    assert len(world.cluster.calls("delete", "ingestruns")) == 1


async def test_once_it_is_understood_a_held_run_goes_on() -> None:
    world = World()
    world.create()
    world.cluster.user_patch_status(KEY, {"phase": "Paused", "workers": []})
    await world.settle()
    assert world.condition("Succeeded")["reason"] == "Held"
    world.cluster.user_patch_status(KEY, {"phase": "Pending", "workers": None})
    await world.play()
    assert world.phase == "Succeeded"
    assert "Stalled" not in {condition["type"] for condition in world.status["conditions"]}


@pytest.mark.parametrize(
    "spec",
    [
        {"onBatchFailure": "Skip"},
        {"execution": {"mode": "Serverless"}},
        {"concurrency": {"key": "a", "policy": "Queue"}},
        {"batches": {"windows": {"hours": 1}}},
    ],
)
async def test_a_spec_of_a_newer_version_holds_the_run_and_can_be_cancelled(spec: dict[str, Any]) -> None:
    world = World()
    body = manifest()
    world.cluster.user_create_run({**body, "spec": {**body["spec"], **spec}})
    await world.settle()
    (field,) = spec
    assert f"spec.{field}" in told(world, "Held")[0]
    assert world.cluster.jobs() == []
    world.cancel(cancellation={"policy": "Terminate"})
    await world.play()
    assert (world.phase, world.status["cancellation"]["policy"]) == ("Cancelled", "Terminate")
    assert world.condition("Drained")["status"] == "True"
    assert world.cluster.jobs() == []


async def test_a_value_of_the_spec_is_not_shown() -> None:
    world = World()
    container = {"image": "example/worker:1", "env": [{"name": "TOKEN", "value": ["hunter2"]}]}
    world.create(fetch=container)
    with structlog.testing.capture_logs() as lines:
        await world.settle()
    (note,) = told(world, "Held")
    assert "spec.fetch.env.0.value" in note
    assert "hunter2" not in f"{lines} {world.cluster.events()} {world.status}"


async def test_a_hold_whose_condition_cannot_be_written_is_told_all_the_same_and_once() -> None:
    world = World()
    world.create()
    world.cluster.user_patch_status(KEY, {"phase": "Paused"})

    def admit(verb: str, resource: str, _: object) -> None:
        if resource == "ingestruns/status":
            raise Invalid('IngestRun.ingestrun.dev "flights" is invalid: status.phase: Unsupported value: "Paused"')

    world.cluster.admit = admit
    for _ in range(5):
        await world.step()
        world.now = max(world.now, *world.due.values())
    assert len(told(world, "Held")) == 1
    (refused,) = told(world, "RequestRefused")
    assert 'status.phase: Unsupported value: "Paused"' in refused


async def test_a_child_of_a_cancelled_run_that_is_not_understood_is_cancelled_too() -> None:
    world = World()
    world.create(cancellation={"cascade": True}, parallelism=1)
    child = manifest(parentRef={"name": KEY.name}, parallelism=1)
    world.cluster.user_create_run({**child, "metadata": {"name": BESIDE.name, "namespace": BESIDE.namespace}})
    await world.settle()
    world.cluster.user_patch_status(KEY, {"cancellation": {"acceptedAt": "2026-11-23T12:00:00Z", "byPolicy": "x"}})
    world.cancel()
    await world.play()
    assert world.phase == "Cancelled"
    assert world.cluster.run(BESIDE)["status"]["phase"] == "Cancelled"
    assert keeps(world.status, {"cancellation": {"byPolicy": "x"}})


async def test_a_parent_with_a_child_that_is_not_understood_waits_for_it() -> None:
    world = World()
    world.create(cancellation={"cascade": True}, parallelism=1)
    await world.settle()
    child = manifest(parentRef={"name": KEY.name})
    world.cluster.user_create_run({**child, "metadata": {"name": BESIDE.name, "namespace": BESIDE.namespace}})
    world.cluster.user_patch_status(BESIDE, {"phase": "Paused"})
    world.cancel()
    await world.play()
    assert world.status["cancellation"]["children"]["cancelled"] == 1


async def test_a_run_does_not_resume_one_that_is_not_understood() -> None:
    world = World()
    world.create(parallelism=1)
    await world.settle()
    world.cancel()
    await world.play()
    world.cluster.user_patch_status(KEY, {"lanes": ["a", "b"]})
    following = manifest(resumeFrom={"name": KEY.name})
    world.cluster.user_create_run({**following, "metadata": {"name": BESIDE.name, "namespace": BESIDE.namespace}})
    await world.settle()
    status = world.cluster.run(BESIDE)["status"]
    conditions = {condition["type"]: condition for condition in status["conditions"]}
    assert conditions["Reconciling"]["reason"] == "PredecessorHeld"
    assert "status.lanes" in conditions["Reconciling"]["message"]
    assert "resumedBy" not in world.status
    world.cluster.user_patch_status(KEY, {"lanes": None})
    world.add(BESIDE, "test")
    await world.play()
    assert world.cluster.run(BESIDE)["status"]["phase"] == "Succeeded"


async def test_an_ended_run_of_a_newer_version_is_neither_told_nor_deleted() -> None:
    world = World()
    world.create(ttlSecondsAfterFinished=0)
    for _ in range(3):
        await world.settle()
        for job in world.active_jobs():
            world.work(job)
    world.cluster.user_patch_status(KEY, {"lanes": ["a"]})
    world.cancel()
    await world.play()
    before = len(world.cluster.events())
    world.restart()
    await world.play()
    assert world.phase == "Cancelled"
    assert len(world.cluster.events()) == before


async def test_what_cannot_be_read_at_all_does_not_end_the_resync() -> None:
    world = World()
    world.create()
    world.cluster.fail_next("list", "ingestruns", Invalid("the conversion webhook has lost its mind"))
    cancelled = asyncio.Event()

    async def odd(_: Call) -> None:
        if len(world.cluster.history) == 1:
            raise RuntimeError("not an error of the API server")
        if world.cluster.calls("list", "ingestruns"):
            cancelled.set()

    world.cluster.on_call = odd
    task = asyncio.create_task(
        resync_forever(
            world.cluster,
            world.store,
            world,  # type: ignore[arg-type]
            seconds=0.01,
            health=Health(),
            tried=asyncio.Event(),
        )
    )
    async with asyncio.timeout(5):
        await cancelled.wait()
    assert not task.done()
    task.cancel()
