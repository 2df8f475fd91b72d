"""A pass that creates many Jobs stops between two of them at what the watches show meanwhile."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from tests.fakes.cluster import Call
from tests.fakes.world import KEY, World, manifest

from ingestrun.kube.protocol import RunKey

PARENT = RunKey(namespace=KEY.namespace, name="parent")


def create(world: World, name: str, **spec: Any) -> None:
    body = manifest(hooks=None, batches={"partitions": {"count": 3}}, **spec)
    body["metadata"]["name"] = name
    world.cluster.user_create_run(body)


async def cancel(world: World) -> None:
    world.cancel()


async def cancel_parent(world: World) -> None:
    world.cluster.user_patch_spec(PARENT, {"cancel": True, "cancellation": {"cascade": True}})
    await world.reconciler.reconcile(PARENT, "test")
    assert world.cluster.run(PARENT)["status"]["phase"] == "Cancelled"


async def replace_run(world: World) -> None:
    world.now += timedelta(seconds=1)
    create(world, "newer", concurrency={"key": "geo", "policy": "Replace"})
    await world.reconciler.reconcile(RunKey(namespace=KEY.namespace, name="newer"), "test")


async def nothing(world: World) -> None:
    pass


@pytest.mark.parametrize(
    ("happens", "created", "phase"),
    [
        (cancel, 2, "Cancelled"),
        (cancel_parent, 2, "Cancelled"),
        (replace_run, 2, "Cancelled"),
        (nothing, 3, "Running"),
    ],
)
async def test_no_job_is_created_after_it_was_watched(happens: Any, created: int, phase: str) -> None:
    world = World()
    create(world, PARENT.name, suspend=True)
    concurrency = {"key": "geo", "policy": "Replace"}
    create(world, KEY.name, parallelism=1, parentRef={"name": PARENT.name}, concurrency=concurrency)
    await world.settle()
    world.cluster.user_patch_spec(KEY, {"parallelism": 3})

    async def on_call(call: Call) -> None:
        if (call.verb, call.resource, call.stage) == ("create", "jobs", "after"):
            world.cluster.on_call = None
            await happens(world)

    world.cluster.on_call = on_call
    await world.reconciler.reconcile(KEY, "test")
    uid = world.cluster.run(KEY)["metadata"]["uid"]
    jobs = [
        call
        for call in world.cluster.calls("create", "jobs")
        if call.stored and (call.body or {})["metadata"]["ownerReferences"][0]["uid"] == uid
    ]
    assert len(jobs) == created
    assert world.phase == phase
