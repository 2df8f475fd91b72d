"""A worker's report is acknowledged once it is stored, also if there is no other batch for the worker yet."""

from __future__ import annotations

from tests.fakes.pool import PoolWorld, pool_spec

from ingestrun.model.pool import ClaimAnswer


async def test_a_report_is_acknowledged_without_a_further_batch() -> None:
    world = PoolWorld()
    world.act = lambda _: "fail"
    world.create(**pool_spec(batches={"partitions": {"count": 1}}, backoff={"initialSeconds": 300}))
    await world.settle()
    world.run_pods()
    (worker,) = world.workers.values()
    world.turn(worker)
    await world.settle()
    world.turn(worker)
    assert len(worker.reports) == 1
    world.turn(worker)
    await world.settle()
    assert worker.under_way is not None
    _, answer = worker.under_way
    assert answer.done()
    assert answer.result() == ClaimAnswer(wait=True)
    assert world.status["workers"] == [{"worker": 0}]
    assert world.status["batches"]["checkpoints"][0]["attempt"] == 1
    # Without a report it waits for the next attempt.
    world.turn(worker)
    assert not worker.reports
    world.turn(worker)
    await world.settle()
    assert not worker.under_way[1].done()
