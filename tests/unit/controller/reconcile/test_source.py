"""Fetches of one run read one source: another is told, never counted. A chain that goes in a circle has an end."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fakes.world import KEY, World, environment, manifest

from ingestrun.kube.protocol import Object, RunKey
from ingestrun.model.ranges import IndexRanges

DONE = {"v": "v1", "outcome": "done", "read": 10, "written": 10}
PARTITIONS: dict[str, Any] = {"partitions": {"count": 4}}
NEXT = RunKey(namespace=KEY.namespace, name="flights-2")


@pytest.fixture
def world() -> World:
    return World()


def env_of(job: Object) -> dict[str, str]:
    return environment(job)


def fetches(world: World) -> list[Object]:
    jobs = [job for job in world.active_jobs() if env_of(job)["INGEST_STAGE"] == "fetch"]
    return sorted(jobs, key=lambda job: int(env_of(job)["INGEST_BATCH"]))


class Listed:
    """Fetches that read a list; `digests` has those of the batches, None for none at all."""

    def __init__(self, world: World, digests: dict[int, str | None], default: str | None = "list-a") -> None:
        self.world, self.digests, self.default = world, digests, default
        self.told: dict[int, str | None] = {}
        self.published: list[int] = []

    def run(self, job: Object) -> dict[str, Any]:
        env = env_of(job)
        batch = int(env["INGEST_BATCH"])
        if env["INGEST_STAGE"] == "publish":
            self.published.append(batch)
        if env["INGEST_STAGE"] != "fetch":
            return {"result": DONE}
        self.told[batch] = env.get("INGEST_SOURCE_DIGEST")
        digest = self.digests.get(batch, self.default)
        return {"result": DONE | {"exhausted": True} | ({"sourceDigest": digest} if digest is not None else {})}


async def test_each_fetch_is_told_what_the_first_has_read(world: World) -> None:
    world.create(batches=PARTITIONS, parallelism=1)
    source = Listed(world, {})
    await world.play(each=source.run)
    assert world.phase == "Succeeded"
    assert source.told == {0: None, 1: "list-a", 2: "list-a", 3: "list-a"}
    assert world.status["sourceDigest"] == "list-a"
    publishes = [call for call in world.cluster.jobs() if env_of(call)["INGEST_STAGE"] != "fetch"]
    assert all("INGEST_SOURCE_DIGEST" not in env_of(job) for job in publishes)


@pytest.mark.parametrize("other", ["list-b", None])
@pytest.mark.parametrize("parallelism", [1, 4])
async def test_a_fetch_that_read_something_else_fails_the_run(
    world: World, other: str | None, parallelism: int
) -> None:
    """A fetch of other files is refused, whether it began after the others or with them."""
    world.create(batches=PARTITIONS, parallelism=parallelism)
    source = Listed(world, {2: other})
    await world.play(each=source.run)
    assert world.phase == "Failed"
    assert 2 not in source.published
    failure = world.status["failures"][-1]
    assert (failure["batch"], failure["stage"], failure["reason"], failure["attempt"]) == (
        2,
        "fetch",
        "SourceChanged",
        0,
    )
    assert "records would be missed or doubled" in failure["message"]
    assert world.condition("Succeeded")["reason"] == "BatchFailed"
    assert world.status["sourceDigest"] == "list-a"


async def test_it_fails_alone_where_the_run_goes_on(world: World) -> None:
    world.create(batches=PARTITIONS, parallelism=4, onBatchFailure="Continue")
    source = Listed(world, {2: "list-b"})
    await world.play(each=source.run)
    assert sorted(source.published) == [0, 1, 3]
    assert world.status["batches"]["failed"] == "2"
    assert world.condition("Succeeded")["reason"] == "CompletedWithFailedBatches"


@settings(max_examples=25, deadline=None)
@given(
    digests=st.lists(st.sampled_from(["a", "b", None]), min_size=4, max_size=4),
    parallelism=st.integers(1, 4),
    order=st.permutations(range(4)),
    together=st.booleans(),
    restarts=st.booleans(),
)
async def test_whatever_is_published_was_read_from_one_source(
    digests: list[str | None], parallelism: int, order: list[int], together: bool, restarts: bool
) -> None:
    world = World()
    world.create(batches=PARTITIONS, parallelism=parallelism, onBatchFailure="Continue")
    source = Listed(world, dict(enumerate(digests)))
    for _ in range(60):
        await world.settle()
        jobs = sorted(world.active_jobs(), key=lambda job: order[int(env_of(job)["INGEST_BATCH"])])
        if not jobs:
            break
        for job in jobs if together else jobs[:1]:
            world.work(job, **source.run(job))
        if restarts:
            world.restart()
    assert world.phase in ("Succeeded", "Failed")
    published = {digests[batch] for batch in source.published} - {None}
    assert len(published) <= 1
    told = {digest for batch, digest in enumerate(digests) if batch in source.published}
    assert world.status.get("sourceDigest") in (published or {None}) | (told & {None})


async def test_a_container_that_says_nothing_is_as_before(world: World) -> None:
    world.create(batches=PARTITIONS, parallelism=2)
    source = Listed(world, {}, default=None)
    await world.play(each=source.run)
    assert world.phase == "Succeeded"
    assert set(source.told.values()) == {None}
    assert "sourceDigest" not in world.status


async def test_a_chain_is_told_too(world: World) -> None:
    world.create(batches={"cursor": {}, "size": 10}, parallelism=1)
    await world.settle()
    told = []
    for number, digest in enumerate(["a", "a", "b"]):
        (fetch,) = fetches(world)
        told.append(env_of(fetch).get("INGEST_SOURCE_DIGEST"))
        world.work(fetch, result=DONE | {"nextCursor": str(number + 1), "sourceDigest": digest})
        await world.settle()
        for job in world.active_jobs():
            if env_of(job)["INGEST_STAGE"] != "fetch":
                world.work(job, result=DONE)
                await world.settle()
        for job in world.active_jobs():
            if env_of(job)["INGEST_STAGE"] == "publish":
                world.work(job, result=DONE)
                await world.settle()
    assert told == [None, "a", "a"]
    assert world.phase == "Failed"
    assert world.condition("Succeeded")["reason"] == "FetchFailed"
    assert "SourceChanged" in world.condition("Succeeded")["message"]


def resume(world: World, source_from: dict[str, Any]) -> None:
    body = manifest(batches=PARTITIONS, parallelism=1, resumeFrom=source_from)
    world.cluster.user_create_run({**body, "metadata": {"name": NEXT.name, "namespace": NEXT.namespace}})


@pytest.mark.parametrize("saved", [True, False])
async def test_a_run_that_resumes_reads_the_rest_of_the_same(world: World, saved: bool) -> None:
    world.create(batches=PARTITIONS, parallelism=1)
    source = Listed(world, {})
    await world.settle()
    for _ in range(4):
        for job in world.active_jobs():
            world.work(job, **source.run(job))
        await world.settle()
    world.cancel()
    await world.play(each=source.run)
    assert world.phase == "Cancelled"
    if saved:
        status, uid = world.status, world.cluster.run(KEY)["metadata"]["uid"]
        world.cluster.user_delete_run(KEY)
        ranges = {name: status["batches"][name] for name in ("fetched", "published")}
        resume(world, {"savedState": {"uid": uid, "sourceDigest": status["sourceDigest"], "batches": ranges}})
    else:
        resume(world, {"name": KEY.name})
    again = Listed(world, {3: "list-b"})
    await world.play(each=again.run)
    status = world.cluster.run(NEXT)["status"]
    assert set(again.told.values()) == {"list-a"}
    assert (status["phase"], status["failures"][-1]["reason"]) == ("Failed", "SourceChanged")
    assert 3 not in again.published


async def test_a_state_goes_from_fetch_to_fetch(world: World) -> None:
    world.create(batches={"cursor": {}, "size": 10}, parallelism=9)
    told: list[tuple[str, str | None]] = []
    states: list[str | None] = ["s1", None, "s3", "s4"]
    await world.settle()
    for number, state in enumerate(states):
        (fetch,) = fetches(world)
        told.append((env_of(fetch)["INGEST_CURSOR"], env_of(fetch).get("INGEST_STATE")))
        more = {"state": state} if state is not None else {}
        world.work(fetch, result=DONE | {"nextCursor": str(number + 1)} | more)
        await world.settle()
    (fetch,) = fetches(world)
    world.work(fetch, exit_code=1)
    await world.settle()
    world.now = min(world.due.values())
    await world.settle()
    (fetch,) = fetches(world)
    told.append((env_of(fetch)["INGEST_CURSOR"], env_of(fetch).get("INGEST_STATE")))
    assert told == [("", None), ("1", "s1"), ("2", None), ("3", "s3"), ("4", "s4")]
    assert world.status["cursorState"] == "s4"


@settings(max_examples=10, deadline=None)
@given(before=st.integers(0, 6), length=st.integers(2, 8), restarts=st.sets(st.integers(0, 30), max_size=3))
async def test_cursors_in_a_circle_of_any_length_are_no_progress(before: int, length: int, restarts: set[int]) -> None:
    """Of a container of one's own; the status has one digest for it."""
    world = World()
    world.create(batches={"cursor": {}, "size": 10}, parallelism=1, hooks=[])

    def after(cursor: str) -> str:
        number = int(cursor or 0) + 1
        return str(number if number < before + length else before)

    cursors: list[str] = []
    for step in range(1000):
        if step in restarts:
            world.restart()
        await world.settle()
        jobs = world.active_jobs()
        if not jobs:
            break
        env = env_of(jobs[0])
        more = {}
        if env["INGEST_STAGE"] == "fetch":
            cursors.append(env["INGEST_CURSOR"])
            more = {"nextCursor": after(env["INGEST_CURSOR"])}
        world.work(jobs[0], result=DONE | more)
    assert world.phase == "Failed"
    failure = world.status["failures"][-1]
    assert failure["reason"] == "NoProgress"
    assert failure["message"].startswith("the fetch returned the cursor with which batch ")
    first = int(failure["message"].split("batch ")[1].split(" ")[0])
    assert cursors[first] == after(cursors[-1]), "what is said is so"
    assert len(cursors) <= 4 * max(before, length) + 4
    assert len(world.status["cursorMark"]) == 16


async def test_a_run_that_resumes_is_not_suspected_for_what_it_repeats(world: World) -> None:
    world.create(batches={"cursor": {}, "size": 100}, parallelism=4)
    await world.settle()
    for _ in range(4):
        world.work(fetches(world)[0])
        await world.settle()
    world.cancel()
    await world.play(each=lambda _job: {"exit_code": 1})
    body = manifest(parallelism=2, resumeFrom={"name": KEY.name})
    world.cluster.user_create_run({**body, "metadata": {"name": NEXT.name, "namespace": NEXT.namespace}})
    await world.play()
    status = world.cluster.run(NEXT)["status"]
    assert status["phase"] == "Succeeded"
    assert status["records"]["published"] == 450


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        ({"reason": "NoProgress", "message": "page 4 is page 3"}, "NoProgress"),
        ({"reason": "SourceChanged", "message": "c3.csv has changed"}, "SourceChanged"),
        ({"reason": "OOMKilled", "message": "no"}, "PermanentError"),
        ({"message": "404"}, "PermanentError"),
    ],
)
async def test_a_container_gives_the_reason_of_a_failure_for_good(
    world: World, result: dict[str, Any], reason: str
) -> None:
    world.create(parallelism=1)
    await world.settle()
    world.work(world.active_jobs()[0], exit_code=65, result=json.dumps({"v": "v1", "outcome": "failed"} | result))
    await world.play()
    (failure,) = world.status["failures"]
    assert (failure["reason"], failure["message"]) == (reason, f"exit code 65: {result['message']}")
    assert world.phase == "Failed"


def test_ranges_are_walked_in_order() -> None:
    """The digest of the first batch is what the others are compared with, in every pass."""
    assert list(IndexRanges([7, 3, 5])) == [3, 5, 7]
