"""Cursor chains: no record is missed, none is read twice, and only the source's own word ends them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fakes.world import KEY, World, environment

from ingestrun.kube.protocol import Object
from ingestrun.model.ranges import IndexRanges


@pytest.fixture
def world() -> World:
    return World()


class Pages:
    """A source of `total` records whose fetches read what `sizes` says, never more than they may."""

    def __init__(self, total: int, sizes: list[int], fates: list[str]) -> None:
        self.total = total
        self.sizes = iter(sizes)
        self.fates = iter(fates)
        self.read: dict[int, tuple[int, int]] = {}
        """Batch -> the first record that was read and the one after the last, by the attempt that did it well."""

    def run(self, job: Object) -> dict[str, Any]:
        env = environment(job)
        if next(self.fates, "done") != "done":
            return {"exit_code": 1}
        batch = int(env["INGEST_BATCH"])
        if env["INGEST_STAGE"] != "fetch":
            first, end = self.read[batch]
            return {"result": {"v": "v1", "outcome": "done", "read": end - first, "written": end - first}}
        first = int(env["INGEST_CURSOR"] or 0)
        read = min(int(env["INGEST_LIMIT"]), next(self.sizes, 10**6), self.total - first)
        assert batch not in self.read, "a fetch that has ended well is not run again"
        self.read[batch] = (first, first + read)
        result = {"v": "v1", "outcome": "done", "read": read, "written": read, "nextCursor": str(first + read)}
        return {"result": {**result, "exhausted": first + read >= self.total}}


@settings(max_examples=25, deadline=None)
@given(
    total=st.integers(1, 900),
    limit=st.none() | st.integers(1, 900),
    sizes=st.lists(st.integers(1, 120), max_size=20),
    fates=st.lists(st.sampled_from(["done", "done", "fails"]), max_size=30),
    restarts=st.sets(st.integers(0, 40), max_size=4),
    parallelism=st.integers(1, 5),
)
def test_whatever_fails_and_however_short_the_pages_the_batches_lie_end_to_end(
    total: int, limit: int | None, sizes: list[int], fates: list[str], restarts: set[int], parallelism: int
) -> None:
    async def scenario() -> None:
        world, pages = World(), Pages(total, sizes, fates)
        cut: dict[str, Any] = {"cursor": {}, "size": 100}
        world.create(batches=cut | ({"limit": limit} if limit else {}), parallelism=parallelism, retries=40)
        for step in range(1000):
            if step in restarts:
                world.restart()
            await world.settle()
            if world.phase == "Succeeded":
                break
            jobs = world.active_jobs()
            if jobs:
                world.work(jobs[-1], **pages.run(jobs[-1]))
            else:
                world.now = max(world.now, min(world.due.values()))
        assert world.phase == "Succeeded"
        wanted = min(total, limit or total)
        at = 0
        for batch in sorted(pages.read):
            first, end = pages.read[batch]
            assert first == at
            at = end
        assert at == wanted, "the limit counts what was really read, and stops exactly"
        assert world.status["records"] == {"fetched": wanted, "rejected": 0, "published": wanted}
        assert IndexRanges.parse(world.status["batches"]["published"]) == IndexRanges(pages.read)

    asyncio.run(scenario())


async def test_cursor_ranges_and_records_move_in_one_write(world: World) -> None:
    """At every version that was ever stored, the cursor is the end of the fetched batches, and so are the records."""
    world.create()
    await world.play()
    seen = set()
    for change in world.cluster.changes:
        status = change.obj.get("status", {})
        if change.kind == "IngestRun" and "batches" in status:
            fetched = len(IndexRanges.parse(status["batches"].get("fetched", "")))
            assert status["records"]["fetched"] == min(100 * fetched, 450)
            assert status.get("cursor", "0") == str(min(100 * fetched, 450))
            assert status["batches"].get("exhausted", False) == (fetched == 5)
            seen.add(fetched)
    assert seen == {0, 1, 2, 3, 4, 5}


async def test_a_short_page_is_no_end(world: World) -> None:
    pages = Pages(250, [3, 1, 1], [])
    world.create(batches={"cursor": {}, "size": 100})
    await world.play(each=pages.run)
    assert world.phase == "Succeeded"
    assert [end - first for _, (first, end) in sorted(pages.read.items())] == [3, 1, 1, 100, 100, 45]


async def test_an_empty_page_that_goes_on_is_no_end_either(world: World) -> None:
    world.create(batches={"cursor": {}, "size": 100}, parallelism=1)
    await world.settle()
    (fetch,) = world.active_jobs()
    world.work(fetch, result={"v": "v1", "outcome": "done", "read": 0, "written": 0, "nextCursor": "20"})
    await world.settle()
    (hook,) = world.active_jobs()
    world.source.handed_on[environment(hook)["INGEST_IDEMPOTENCY_KEY"]] = 0
    await world.play()
    assert world.phase == "Succeeded"
    assert world.status["records"]["published"] == 430


async def test_no_more_batches_than_parallelism_are_in_flight(world: World) -> None:
    """Fetches run ahead of hooks and publish, and wait once so many batches are on their way."""
    world.create(parallelism=2)
    for _ in range(20):
        await world.settle()
        fetches = [job for job in world.active_jobs() if environment(job)["INGEST_STAGE"] == "fetch"]
        if not fetches:
            break
        world.work(fetches[0])
    assert world.status["batches"]["fetched"] == "0-1"
    assert world.status["batches"]["active"] == 2
    hooks = [environment(job) for job in world.active_jobs()]
    assert sorted((env["INGEST_BATCH"], env["INGEST_STAGE"]) for env in hooks) == [("0", "hook"), ("1", "hook")]
    await world.play()
    assert world.status["records"]["published"] == 450


async def test_a_fetch_that_is_tried_again_starts_where_it_did(world: World) -> None:
    world.create(parallelism=1, batches={"cursor": {"start": "100"}, "size": 100})
    await world.settle()
    world.work(world.active_jobs()[0], exit_code=1)
    await world.settle()
    world.now = world.due[KEY]
    await world.settle()
    (again,) = world.active_jobs()
    env = environment(again)
    assert (env["INGEST_ATTEMPT"], env["INGEST_CURSOR"], env["INGEST_LIMIT"]) == ("1", "100", "100")


@pytest.mark.parametrize(
    ("cursor", "words"),
    [("c" * 10_240, "the result has"), ("c" * 513, "nextCursor"), ("a\nb", "nextCursor"), ("a\x00b", "nextCursor")],
)
async def test_a_cursor_that_cannot_be_kept_fails_the_fetch(world: World, cursor: str, words: str) -> None:
    world.create(retries=0)
    await world.settle()
    result = {"v": "v1", "outcome": "done", "read": 5, "written": 5, "nextCursor": cursor}
    world.work(world.active_jobs()[0], result=result)
    await world.play()
    assert world.phase == "Failed"
    (failure,) = world.status["failures"]
    assert failure["reason"] == "ResultInvalid"
    assert words in failure["message"]
    assert "cursor" not in world.status
    assert world.status["records"]["fetched"] == 0
