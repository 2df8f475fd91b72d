"""The merge patch that makes the stored status the new one."""

from __future__ import annotations

from datetime import UTC, datetime

from tests.fakes.world import manifest

from ingestrun.model.run import IngestRun
from ingestrun.model.status import CancellationStatus, IngestRunStatus, Phase
from ingestrun.planner.status.writer import status_patch

NOW = datetime(2026, 11, 28, 12, tzinfo=UTC)


def run_with(status: IngestRunStatus) -> IngestRun:
    body = manifest()
    body["metadata"] |= {
        "uid": "u",
        "resourceVersion": "1",
        "generation": 1,
        "creationTimestamp": "2026-11-28T11:00:00Z",
    }
    return IngestRun.read({**body, "status": status.to_json()})


def test_what_is_dropped_from_a_status_is_removed_from_the_stored_one() -> None:
    """A merge patch leaves alone what it does not name, and then the object would not get smaller."""
    record = CancellationStatus(accepted_at=NOW, parent="above", reason="why")
    stored = IngestRunStatus(phase=Phase.CANCELLED, cursor="7", cursor_state="s", cancellation=record)
    patch = status_patch(
        run_with(stored), stored.replace(cursor_state=None, cancellation=record.replace(parent=None, reason="so"))
    )
    assert patch["cursorState"] is None
    assert (patch["cancellation"]["parent"], patch["cancellation"]["reason"]) == (None, "so")
    assert (patch["cursor"], patch["phase"]) == ("7", "Cancelled")


def test_nothing_is_written_where_nothing_has_changed() -> None:
    stored = IngestRunStatus(phase=Phase.RUNNING, cursor="7")
    assert status_patch(run_with(stored), stored) == {}
