"""Found by `make test-cancel-races SEED=2 RUNS=120` on a real API server, minimised.

The cancel is planned from what the watches have shown. A publish whose pod has started, even ended, since then counts
as not started: its Job is deleted, and with it the only trace of what it has published. The record says notPublished.
"""

from __future__ import annotations

from typing import Any

import pytest
from tests.fakes.world import World

from ingestrun.kube.protocol import Object


@pytest.mark.parametrize("how", ["ended", "started"])
async def test_a_publish_that_the_watch_has_not_shown_yet_is_accounted_for(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World()
    world.create(hooks=[], batches={"partitions": {"count": 1}})
    await world.settle()
    world.work(world.active_jobs()[0])
    await world.settle()
    (publish,) = world.active_jobs()

    held: list[tuple[str, str, Object]] = []
    shown = world._changed

    def late(kind: Any, event_type: Any, body: Object) -> None:
        """The watches of Jobs and pods lag behind by a moment; that of runs does not."""
        if kind == "IngestRun":
            shown(kind, event_type, body)
        else:
            held.append((kind, event_type, body))

    world.cluster._watchers[:] = [late]
    if how == "ended":
        world.work(publish)
    else:
        world.cluster.start_pod(publish["metadata"]["name"])
    world.cancel()
    await world.step()
    if how == "started" and world.active_jobs():
        world.work(publish)

    world.cluster._watchers[:] = [shown]
    for kind, event_type, body in held:
        shown(kind, event_type, body)
    await world.play()
    assert world.phase == "Cancelled"
    record = world.status["cancellation"]
    landed = bool(world.source.published)
    assert (record.get("published"), record.get("notPublished")) == (("0", "") if landed else ("", "0"))
    if how == "started":
        # Drain: a pod that has started may finish.
        assert landed
