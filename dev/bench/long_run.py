"""`make bench-long-run BATCHES=100000`: the whole operator but its client, before a cluster in memory.

Two Jobs a batch. It prints CPU time and calls per batch by tenths of the run, the largest version of the object, and
the most Jobs that the cluster held and the operator knew of. The unit tests (test_scale.py) hold the same as counts.
"""

from __future__ import annotations

import logging
import os
import resource
import time
from collections.abc import Callable

import pytest
import structlog
from tests.fakes.crowd import Crowd, Part

BATCHES = int(os.environ.get("BATCHES") or 100_000)
PARALLELISM = int(os.environ.get("PARALLELISM") or 20)


async def test_long_run(say: Callable[[str], None]) -> None:
    """Play the run and print its cost by tenths."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    crowd = Crowd(clock=time.process_time)
    say(f"\n{BATCHES} partitions, {PARALLELISM} in flight, {2 * BATCHES} Jobs")

    def line(part: Part) -> None:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        say(
            f"  {part.batches:>7} batches  {1000 * part.seconds / part.batches:.2f} ms CPU per batch, "
            f"{1000 * part.seconds / part.passes:.1f} ms per pass; per batch {part.per_batch():.2f} calls; "
            f"peak memory {memory} MiB"
        )

    await crowd.play(count=BATCHES, parallelism=PARALLELISM, progress=line)
    say(f"largest version of the object {crowd.cluster.largest_run} bytes")
    say(f"Jobs in the cluster at most {crowd.cluster.most_jobs}, known to the operator at most {crowd.most_facts}")
    status = crowd.cluster.run["status"]
    if (status["phase"], status["batches"]["published"]) != ("Succeeded", f"0-{BATCHES - 1}"):
        pytest.fail(f"it did not end well: {status}")
