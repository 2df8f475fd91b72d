"""When the fence is armed: before Cancelled is stored where a create may still arrive, and soon after it otherwise."""

from __future__ import annotations

import pytest
from tests.fakes.world import KEY, World

from ingestrun.kube.errors import Forbidden, KubeError, QuotaExceeded, Unavailable, Unknown
from ingestrun.model.names import LABEL_CANCELLED


def armed(world: World) -> bool:
    labels = world.cluster.run(KEY)["metadata"].get("labels", {})
    return bool(labels.get(LABEL_CANCELLED) == "true")


def armed_at_cancelled(world: World) -> bool:
    """Whether the run carried the label in the very version that said Cancelled first."""
    stored = next(
        change.obj
        for change in world.cluster.changes
        if change.kind == "IngestRun" and change.obj["status"].get("phase") == "Cancelled"
    )
    return LABEL_CANCELLED in stored["metadata"].get("labels", {})


@pytest.mark.parametrize(
    ("error", "when", "doubt"),
    [
        (Unknown("no answer"), "after", True),
        (Unknown("no answer"), "late", True),
        (Unavailable("time-out"), "late", True),
        (Forbidden("not now"), "before", False),
        (QuotaExceeded("exceeded quota"), "before", False),
        (None, None, False),
    ],
    ids=["answer lost", "on its way", "held up", "refused", "no room", "all answered"],
)
async def test_fence_stands_before_cancelled_only_where_a_create_may_still_arrive(
    error: KubeError | None, when: str | None, doubt: bool
) -> None:
    world = World()
    if when is not None:
        world.cluster.fail_next("create", "jobs", error, when=when)  # type: ignore[arg-type]
    world.create()
    await world.step()
    world.cancel()
    await world.step()
    assert world.phase == "Cancelled"
    assert armed_at_cancelled(world) is doubt
    await world.settle()
    assert armed(world), "in any case from the first look at the drain on"
    await world.play()
    assert not armed(world), "taken down after the last sweep"
    assert world.creates_after_cancelled() == []


async def test_creates_of_another_process_are_in_doubt() -> None:
    world = World()
    world.create()
    await world.settle()
    world.restart()
    world.cancel()
    await world.settle()
    assert armed_at_cancelled(world)


async def test_run_that_was_claimed_by_this_process_is_cancelled_by_one_write() -> None:
    world = World()
    world.create()
    await world.settle()
    before = len(world.cluster.history)
    world.cancel()
    await world.step()
    assert [str(call).split()[1:3] for call in world.cluster.history[before:]] == [
        ["patch", "ingestruns/status"],
        ["create", "events"],
    ]


async def test_label_that_the_request_brought_costs_no_call() -> None:
    world = World()
    world.create()
    await world.settle()
    world.cancel()
    world.cluster.user_patch_metadata(KEY, {"labels": {LABEL_CANCELLED: "true"}})
    await world.settle()
    assert world.phase == "Cancelled"
    assert world.cluster.calls("patch", "ingestruns") == []
