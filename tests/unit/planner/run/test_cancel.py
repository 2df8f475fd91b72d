"""The record of a cancel, however long what it is made of."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from tests.fakes.world import manifest

from ingestrun.model.run import IngestRun
from ingestrun.model.size_budget import REASON_CHARS, REQUESTER_CHARS
from ingestrun.model.spec import CancellationPolicy
from ingestrun.planner.actions import CancelledParent
from ingestrun.planner.plan import plan
from ingestrun.planner.snapshot import Snapshot

NOW = datetime(2026, 11, 28, 12, 0, tzinfo=UTC)


def run(**metadata: object) -> IngestRun:
    meta = {
        "name": "n",
        "namespace": "d",
        "uid": "u-1",
        "resourceVersion": "5",
        "creationTimestamp": "2026-11-28T11:00:00Z",
    }
    return IngestRun.read({"metadata": {**meta, **metadata}, "spec": manifest()["spec"]})


@pytest.mark.parametrize(("reason", "requester"), [("why", "alice"), ("why " * 400, "alice" * 100)])
def test_reason_and_requester_of_a_cascade_are_bounded(reason: str, requester: str) -> None:
    """Each level puts its parent's name before the reason, so that a deep tree would outgrow the status."""
    parent = CancelledParent(name="p", reason=reason, requested_by=requester, policy=CancellationPolicy.DRAIN)
    record = plan(Snapshot(run=run(), attempts=(), now=NOW, parent=parent)).status.cancellation
    assert record is not None
    assert record.reason is not None
    assert record.requested_by is not None
    assert record.reason.startswith(f"p was cancelled: {reason[:40]}")
    assert len(record.reason) == min(REASON_CHARS, len(f"p was cancelled: {reason}"))
    assert record.requested_by.startswith(requester[:40])
    assert len(record.requested_by) == min(REQUESTER_CHARS, len(requester))
