"""What a long run costs: the same per batch at its end as at its beginning, in an object that stays small."""

from __future__ import annotations

import sys
import tracemalloc
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from tests.fakes.crowd import Crowd
from tests.fakes.world import KEY, World, manifest

from ingestrun.model.ranges import IndexRanges
from ingestrun.model.run import IngestRun
from ingestrun.model.size_budget import MAX_FAILED_BATCHES
from ingestrun.planner.jobs.retention import DELETE_BATCHES
from ingestrun.planner.plan import plan
from ingestrun.planner.snapshot import Snapshot

NOW = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)
COUNT = 2_000


async def test_each_tenth_of_a_run_costs_the_same() -> None:
    crowd = Crowd()
    parts = await crowd.play(count=COUNT, parallelism=20)
    assert crowd.phase == "Succeeded"
    assert crowd.cluster.run["status"]["batches"]["published"] == f"0-{COUNT - 1}"
    assert crowd.cluster.run["status"]["records"]["published"] == 10 * COUNT
    assert crowd.cluster.counts["create jobs"] == 2 * COUNT
    second, *others, last = parts[1:]
    for part in others:
        assert part.batches == second.batches
        assert part.calls == second.calls
        assert part.passes == second.passes
    assert last.per_batch() <= second.per_batch() + 0.1
    assert second.per_batch("get") == second.per_batch("list") == 0
    assert second.per_batch("deletecollection") <= 1 / DELETE_BATCHES
    assert crowd.cluster.largest_run < 2_000
    assert crowd.most_facts <= 2 * (20 + 20 + 32), "in flight, ended in one go, and not worth a delete yet"
    assert crowd.cluster.jobs == {}


async def test_the_object_stays_small_when_every_second_batch_fails() -> None:
    """As many as may fail; one more ends the run."""
    crowd = Crowd()
    await crowd.play(
        count=COUNT,
        parallelism=10,
        retries=0,
        onBatchFailure="Continue",
        exit_code=lambda batch, _: 65 if batch % 2 and batch < 2 * MAX_FAILED_BATCHES else 0,
    )
    assert crowd.phase == "Succeeded"
    failed = IndexRanges.parse(crowd.cluster.run["status"]["batches"]["failed"])
    assert failed == IndexRanges(range(1, 2 * MAX_FAILED_BATCHES, 2))
    assert crowd.cluster.largest_run < 8 * 1024
    assert crowd.cluster.most_jobs <= 2 * (10 + 10 + 32 + 3)
    assert {job["metadata"]["labels"]["ingestrun.dev/batch"] for job in crowd.cluster.jobs.values()} == {
        str(2 * n - 1) for n in range(MAX_FAILED_BATCHES - 2, MAX_FAILED_BATCHES + 1)
    }
    more = Crowd()
    await more.play(
        count=COUNT,
        parallelism=10,
        retries=0,
        onBatchFailure="Continue",
        exit_code=lambda batch, _: 65 if batch % 2 else 0,
    )
    assert more.phase == "Failed"
    assert more.cluster.run["status"]["conditions"][0]["reason"] == "TooManyFailedBatches"
    assert more.cluster.largest_run < 8 * 1024


def calls_of(work: Callable[[], object]) -> int:
    """How many functions are called, of Python and of C: the same in every process, unlike a time."""
    count = 0

    def profile(_frame: Any, event: str, _arg: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


async def far(done: int) -> tuple[IngestRun, Any]:
    """A run of a million partitions with so many published, and four in flight."""
    world = World()
    world.create(batches={"partitions": {"count": 1_000_000}}, parallelism=4)
    await world.settle()
    run = IngestRun.read(world.cluster.run(KEY))
    batches = run.status.batches.model_copy(
        update={
            name: IndexRanges.span(0, done - 1) - IndexRanges(range(0, 100, 3)) for name in ("fetched", "published")
        }
        | {"failed": IndexRanges(range(0, 100, 3)), "claimed": IndexRanges.span(0, done + 3)}
    )
    status = run.status.model_copy(update={"batches": batches})
    jobs = world.store.attempts(run.metadata.uid)
    return run.model_copy(update={"status": status}), jobs


async def test_a_pass_takes_as_many_steps_and_as_much_memory_at_a_million_batches_as_at_a_thousand() -> None:
    taken = []
    for done in (1_000, 999_000):
        run, jobs = await far(done)

        def one(run: IngestRun = run, jobs: Any = jobs) -> None:
            planned = plan(Snapshot(run=run, attempts=jobs, now=NOW))
            body = planned.status.model_dump(mode="json", by_alias=True, exclude_none=True)
            IngestRun.read({**manifest(), "metadata": META, "status": body})

        one()
        tracemalloc.start()
        one()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        taken.append((calls_of(one), peak))
    (few, small), (many, large) = taken
    assert many == few
    assert large < 1.2 * small


META = {
    "name": "flights",
    "namespace": "default",
    "uid": "u",
    "resourceVersion": "1",
    "creationTimestamp": "2026-11-23T12:00:00Z",
}
