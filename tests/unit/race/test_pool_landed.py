"""Found by the races, minimised: a worker commits and dies before its word, and the run ends before the retry."""

from __future__ import annotations

import pytest
from tests.fakes.pool import PoolWorld, pool_spec


@pytest.mark.parametrize("committed", [True, False])
@pytest.mark.parametrize("policy", ["Drain", "Terminate"])
async def test_a_batch_whose_worker_died_with_permission_is_not_told_as_not_published(
    policy: str, committed: bool
) -> None:
    """Whether it has landed nobody knows, and unknown is neither published nor not published."""
    world = PoolWorld()
    world.create(**pool_spec(batches={"partitions": {"count": 1}}, backoff={"initialSeconds": 300}))

    def die(_: int) -> None:
        if committed and not world.commits:
            return
        if world.grants:
            (worker,) = world.workers.values()
            world.on_request = None
            world.end(worker, exit_code=137)

    world.on_request = die
    for _ in range(40):
        await world.settle()
        world.run_pods()
        for worker in list(world.workers.values()):
            world.turn(worker)
        if world.grants and not world.workers:
            break
    await world.settle()
    assert bool(world.commits) is committed
    assert "workers" not in world.status, world.status
    assert world.phase == "Running"
    world.cancel(cancellation={"policy": policy})
    await world.play_pool()
    assert world.phase == "Cancelled"
    record = world.status["cancellation"]
    assert (record["published"], record["notPublished"], record["unknown"]) == ("", "", "0")
