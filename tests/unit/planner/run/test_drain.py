"""What became of the batches in flight at the end of a run: the same in whatever order Jobs are listed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from itertools import permutations

import pytest
from tests.fakes.world import manifest

from ingestrun.model.ranges import IndexRanges
from ingestrun.model.run import IngestRun
from ingestrun.planner.actions import LivePods
from ingestrun.planner.batch.attempt import Attempt, JobState, ObservedJob, ObservedPod, attempt_of
from ingestrun.planner.plan import plan
from ingestrun.planner.snapshot import Snapshot

NOW = datetime(2026, 11, 28, 12, 0, tzinfo=UTC)
DONE = json.dumps({"v": "v1", "outcome": "done", "read": 7, "written": 7})
PUBLISH = 2


def publish_attempt(number: int, *, result: str | None, batch: int = 0) -> Attempt:
    """A publish whose pod has ended with 0 and this result; None: the pod is gone, and its result with it."""
    job = ObservedJob(
        namespace="default",
        name=f"publish-{batch}-{number}",
        uid=f"j-{batch}-{number}",
        resource_version="1",
        run_uid="u-1",
        batch=batch,
        step=PUBLISH,
        attempt=number,
        deleting=False,
        finished=JobState.SUCCEEDED,
        finished_at=NOW,
        reason=None,
        message=None,
    )
    if result is None:
        return attempt_of(job, [])
    pod = ObservedPod(
        name="p",
        uid=f"p-{batch}-{number}",
        job_uid=job.uid,
        run_uid="u-1",
        started=True,
        ended=True,
        exit_code=0,
        reason="Completed",
        message=result,
        obstacle=None,
    )
    return attempt_of(job, [pod])


def cancelled_run(in_flight: str = "0") -> IngestRun:
    """A run that was cancelled with these batches in flight, and is not drained."""
    condition = {
        "type": "Drained",
        "status": "False",
        "reason": "Draining",
        "lastTransitionTime": "2026-11-28T11:59:00Z",
    }
    meta = {
        "name": "n",
        "namespace": "d",
        "uid": "u-1",
        "resourceVersion": "5",
        "creationTimestamp": "2026-11-28T11:00:00Z",
    }
    return IngestRun.read(
        {
            "metadata": meta,
            "spec": manifest(cancel=True)["spec"],
            "status": {
                "observedGeneration": 1,
                "phase": "Cancelled",
                "conditions": [condition],
                "batches": {"claimed": in_flight, "fetched": in_flight},
                "completionTime": "2026-11-28T11:59:00Z",
                "cancellation": {"acceptedAt": "2026-11-28T11:59:00Z", "activeBatches": 1},
            },
        }
    )


def record_of(attempts: Sequence[Attempt], in_flight: str = "0") -> tuple[str, str, str, str]:
    """The record after the drain: published, notPublished and unknown of the cancel, and published after the end."""
    planned = plan(Snapshot(run=cancelled_run(in_flight), attempts=attempts, now=NOW, live=LivePods(pods=())))
    record, after_end = planned.status.cancellation, planned.status.after_end
    assert record is not None
    published = after_end.published if after_end is not None else IndexRanges()
    return str(record.published), str(record.not_published), str(record.unknown), str(published)


def orders(attempts: Iterable[Attempt]) -> list[list[Attempt]]:
    """All orders in which a list can show them."""
    return [list(order) for order in permutations(attempts)]


@pytest.mark.parametrize("garbage", ["<html>", json.dumps({"v": "v1", "outcome": "failed"})])
def test_a_batch_is_published_if_any_attempt_published_it(garbage: str) -> None:
    first, second = publish_attempt(0, result=garbage), publish_attempt(1, result=DONE)
    for attempts in orders([first, second]):
        assert record_of(attempts) == ("0", "", "", "0")


def test_an_attempt_that_failed_after_the_one_that_published_takes_nothing_back() -> None:
    for attempts in orders([publish_attempt(0, result=DONE), publish_attempt(1, result="<html>")]):
        assert record_of(attempts) == ("0", "", "", "0")


def test_a_lost_result_is_unknown_unless_another_attempt_published() -> None:
    lost = publish_attempt(0, result=None)
    assert record_of([lost]) == ("", "", "0", "")
    for attempts in orders([lost, publish_attempt(1, result="<html>")]):
        assert record_of(attempts) == ("", "", "0", "")
    for attempts in orders([lost, publish_attempt(1, result=DONE)]):
        assert record_of(attempts) == ("0", "", "", "0")


def test_each_batch_in_flight_is_in_one_set() -> None:
    attempts = [
        publish_attempt(0, result=DONE, batch=0),
        publish_attempt(0, result="<html>", batch=1),
        publish_attempt(0, result=None, batch=2),
    ]
    for order in orders(attempts):
        assert record_of(order, "0-3") == ("0", "1,3", "2", "0")
