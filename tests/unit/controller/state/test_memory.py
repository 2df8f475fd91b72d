"""What the process remembers of a run goes with the run, whichever way the operator learns that the run is gone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from tests.fakes.cluster import Call
from tests.fakes.world import KEY, World

from ingestrun.controller.watch.resync import resync_once
from ingestrun.kube.errors import NotFound, Unknown

UID = "00000000-0000-4000-8000-000000000001"
"""What the fake server gives to its first object."""


def remembered(root: object, uid: str) -> list[str]:
    """Return the paths of all containers below `root` that have the UID as a key or an element."""
    found: list[str] = []
    seen: set[int] = set()

    def search(value: object, path: str) -> None:
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, dict | set | frozenset | list | tuple):
            if uid in value:
                found.append(path)
            for name, item in value.items() if isinstance(value, dict) else enumerate(value):
                search(item, f"{path}[{name}]")
        elif type(value).__module__.startswith("ingestrun."):
            for name, item in attributes(value):
                search(item, f"{path}.{name}")

    search(root, "")
    return found


def attributes(value: object) -> Iterator[tuple[str, Any]]:
    names = {*getattr(value, "__dict__", {}), *(name for kind in type(value).__mro__ for name in _slots(kind))}
    return ((name, getattr(value, name)) for name in sorted(names) if hasattr(value, name))


def _slots(kind: type) -> tuple[str, ...]:
    slots = kind.__dict__.get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)


async def cancelled_with_skips(world: World) -> None:
    """Leave as much as possible to remember of one run: an unanswered create, a skipped start, a drain."""
    world.create()
    world.cluster.fail_next("create", "jobs", Unknown("no answer"), when="after")
    await world.settle()
    world.cluster.start_pod(world.active_jobs()[0]["metadata"]["name"])
    await world.settle()
    world.cancel()
    await world.settle()


@pytest.mark.parametrize("how", ["deleted", "recreated", "resync", "read"])
async def test_nothing_is_remembered_of_a_run_that_is_gone(how: str) -> None:
    world = World()
    await cancelled_with_skips(world)
    assert remembered(world.reconciler, UID)
    if how != "deleted":
        world.deaf |= {"IngestRun"}  # its DELETED falls into a relist
    world.cluster.user_delete_run(KEY)
    if how == "recreated":
        world.watch.run(None, world.create())
    elif how == "resync":
        await resync_once(world.cluster, world.store, world)  # type: ignore[arg-type]
    elif how == "read":
        body = world.create()
        world.store.upsert_run(body)  # by a live read or list
    await world.settle()
    world.store.prune_orphans()  # as each resync does: late news of Jobs may have come after the run had gone
    assert remembered(world.reconciler, UID) == []


async def test_a_pass_that_is_under_way_when_its_run_goes_leaves_nothing() -> None:
    world = World()
    await cancelled_with_skips(world)
    calls = len(world.cluster.history)
    assert calls > 10
    for number in range(calls):
        world = World()

        async def delete(call: Call, world: World = world, number: int = number) -> None:
            if call.index == number:
                world.cluster.on_call = None
                with suppress(NotFound):
                    world.cluster.user_delete_run(KEY)

        world.cluster.on_call = delete
        with suppress(NotFound, IndexError):
            await cancelled_with_skips(world)
        await world.settle()
        world.store.prune_orphans()
        assert remembered(world.reconciler, UID) == [], f"deleted before call {number}"
