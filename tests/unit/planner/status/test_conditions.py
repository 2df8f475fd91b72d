"""The order of a run's conditions, which `kubectl describe` shows as they are stored."""

from __future__ import annotations

from datetime import UTC, datetime

from ingestrun.model.status import Condition
from ingestrun.planner.status import conditions as c

NOW = datetime(2026, 11, 28, 12, tzinfo=UTC)


def test_conditions_are_in_the_order_in_which_people_read_them() -> None:
    """Whatever came first: how it ends, what it does now, what tools read, and last what another version has set."""
    old = [
        Condition(type=kind, status="True", reason="Old", last_transition_time=NOW)
        for kind in ("Quiet", c.STALLED, c.RECONCILING, "Audited", c.SUSPENDED)
    ]
    updates = [
        c.ConditionUpdate(type=kind, status="True", reason="New")
        for kind in (c.BACKPRESSURED, c.DRAINED, c.CANCELLED, c.FINISHED, c.SUCCEEDED)
    ]
    merged = c.merge_conditions(old, updates, now=NOW, generation=1)
    assert [condition.type for condition in merged] == [
        *("Succeeded", "Cancelled", "Finished", "Drained", "Suspended", "Backpressured", "Reconciling", "Stalled"),
        *("Quiet", "Audited"),
    ]
