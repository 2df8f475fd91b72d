"""The planner as a function: fixed points, and rules that hold whatever has happened."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fakes.world import KEY, World, environment

from ingestrun.kube.protocol import Object
from ingestrun.model.ranges import IndexRanges
from ingestrun.model.run import IngestRun
from ingestrun.model.size_budget import KEPT_FAILURES
from ingestrun.model.status import AttemptId, IngestRunStatus, StageFailure
from ingestrun.planner.actions import LivePods
from ingestrun.planner.batch.ledger import merge_failures
from ingestrun.planner.plan import plan
from ingestrun.planner.snapshot import Snapshot

FATES = ["done", "done", "done", "fail", "oom", "garbage", "missing", "deadline", "deleted", "permanent", "evicted"]


def meet(world: World, job: Object, fate: str) -> None:
    """Let the Job meet its fate."""
    name = job["metadata"]["name"]
    if fate == "deadline":
        world.cluster.exceed_deadline(name)
    elif fate == "deleted":
        world.cluster.expire_job(name)
    elif fate == "done":
        world.work(job)
    else:
        how: dict[str, dict[str, Any]] = {
            "fail": {"exit_code": 1},
            "oom": {"exit_code": 137, "reason": "OOMKilled"},
            "garbage": {"result": "<html>"},
            "missing": {"result": ""},
            "permanent": {"exit_code": 65},
            "evicted": {"exit_code": 137, "pod_reason": "Evicted"},
        }
        world.work(job, **how[fate])


@settings(max_examples=60, deadline=None)
@given(
    fates=st.lists(st.sampled_from(FATES), min_size=1, max_size=40),
    partitions=st.booleans(),
    policy=st.sampled_from(["FailRun", "Continue"]),
    cancel_at=st.one_of(st.none(), st.integers(0, 40)),
    restart_at=st.sets(st.integers(0, 40), max_size=3),
)
def test_whatever_happens_nothing_is_lost_doubled_or_started_late(
    fates: list[str], partitions: bool, policy: str, cancel_at: int | None, restart_at: set[int]
) -> None:
    async def scenario() -> None:
        world = World()
        batches = {"partitions": {"count": 4}} if partitions else {"cursor": {}, "size": 150}
        world.create(batches=batches, onBatchFailure=policy, retries=2)
        left = iter(fates)
        for step in range(400):
            if step == cancel_at and world.phase not in ("Succeeded", "Failed"):
                world.cancel()
            if step in restart_at:
                world.restart()
            await world.settle()
            assert_consistent(world)
            jobs = world.active_jobs()
            if jobs:
                meet(world, jobs[0], next(left, "done"))
            elif world.due:
                world.now = max(world.now, min(world.due.values()))
            else:
                break
        else:
            raise AssertionError(f"no end: {world.status}")
        assert world.phase in ("Succeeded", "Failed", "Cancelled")
        assert world.condition("Drained")["status"] == "True"
        assert world.creates_after_cancelled() == []
        if world.phase == "Succeeded":
            counted = IndexRanges.parse(world.status["batches"]["published"])
            uid = world.cluster.run(KEY)["metadata"]["uid"]
            done = {key for key in world.source.published if int(key.rpartition("/")[2]) in counted}
            assert done == {f"{uid}/{index}" for index in counted}
            assert world.status["records"]["published"] == sum(world.source.published[key] for key in done)

    asyncio.run(scenario())


def assert_consistent(world: World) -> None:
    """What a status says of itself must always fit together."""
    status = IngestRunStatus.model_validate(world.status)
    batches = status.batches
    assert not set(batches.published) & set(batches.failed)
    assert set(batches.published) <= set(batches.fetched) <= set(batches.claimed)
    assert batches.claimed == IndexRanges.span(0, len(batches.claimed) - 1)
    assert len(status.failures) <= KEPT_FAILURES
    assert len(json.dumps(world.cluster.run(KEY))) < 16 * 1024
    names = {(environment(job)["INGEST_BATCH"], environment(job)["INGEST_STAGE"]) for job in world.active_jobs()}
    assert len(names) == len(world.active_jobs()), "two attempts of one stage at once"


@pytest.mark.parametrize("fate", ["done", "fail", "garbage"])
async def test_a_plan_that_is_carried_out_asks_for_nothing_more(fate: str) -> None:
    world = World()
    world.create()
    await world.settle()
    meet(world, world.active_jobs()[0], fate)
    await world.settle()
    run = IngestRun.read(world.cluster.run(KEY))
    again = plan(Snapshot(run=run, attempts=world.store.attempts(run.metadata.uid), now=world.now))
    assert again.creates == ()
    assert again.status.model_dump(mode="json") == run.status.model_dump(mode="json")


async def test_a_plan_has_all_events_of_its_pass() -> None:
    """Events of the change of status and, once, at the end of the drain, of what the cancel has kept from starting."""
    world = World()
    world.create(cancel=True)
    await world.step()
    run = IngestRun.read(world.cluster.run(KEY))
    skipped = {AttemptId(0, "hook check", 1), AttemptId(3, "fetch", 0)}
    ended = Snapshot(run=run, attempts=(), now=world.now, skipped=skipped)
    drained = plan(replace(ended, live=LivePods(pods=())))
    assert plan(ended).events == ()
    assert [(event.reason, event.note.partition(": ")[2]) for event in drained.events[1:]] == [
        ("BatchSkipped", "batch 0,3"),
        ("StageSkipped", "hook check of batch 0"),
    ]
    assert drained.events[0].reason == "Drained"
    again = run.model_copy(update={"status": drained.status})
    assert plan(replace(ended, run=again)).events == ()


failures = st.lists(
    st.builds(
        StageFailure,
        batch=st.integers(0, 5),
        stage=st.sampled_from(["fetch", "publish"]),
        attempt=st.integers(0, 3),
        reason=st.just("Error"),
        message=st.just(""),
        time=st.datetimes(),
    ),
    max_size=8,
)


@given(seen=failures)
def test_kept_failures_are_the_same_whatever_the_order_and_how_often_seen(seen: list[StageFailure]) -> None:
    unique = list({failure.id: failure for failure in seen}.values())
    at_once = merge_failures([], unique)
    one_by_one: list[StageFailure] = []
    for failure in reversed(unique):
        one_by_one = merge_failures(one_by_one, [failure])
    assert at_once == one_by_one == merge_failures(at_once, unique)
