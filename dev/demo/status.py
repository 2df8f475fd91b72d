"""The parts of a run's status that the demo shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ROWS = 336_776
ENDED = frozenset({"Succeeded", "Failed", "Cancelled"})


class Status:
    """The `.status` of an IngestRun; it is empty until the operator has seen the run."""

    def __init__(self, status: Mapping[str, Any]) -> None:
        self._status = status
        self._batches: Mapping[str, Any] = status.get("batches") or {}

    @property
    def phase(self) -> str:
        """The phase; Pending until the status has one."""
        return str(self._status.get("phase") or "Pending")

    @property
    def published(self) -> int:
        """The number of published batches."""
        return count(self._batches.get("published", ""))

    @property
    def rows(self) -> int:
        """The number of published rows."""
        return int((self._status.get("records") or {}).get("published", 0))

    @property
    def files(self) -> int:
        """The number of batches in the dataset: published, or in flight at the cancel and completed afterwards."""
        late = (self._status.get("cancellation") or {}).get("published", "")
        return self.published + count(late)

    @property
    def message(self) -> str:
        """The conditions' reasons and messages in one line."""
        conditions = self._status.get("conditions") or ()
        messages = [f"{c['type']}: {c.get('reason')}: {c.get('message')}" for c in conditions if c.get("message")]
        return "; ".join(messages) or "it has no conditions yet"

    def line(self) -> str:
        """Format the run's progress as one line."""
        bar = "#" * round(24 * self.rows / ROWS)
        begun = count(self._batches.get("claimed", ""))
        return (
            f"{self.phase:<9} [{bar:<24}] {self.rows:>7,} of {ROWS:,} rows published,"
            f" batches: {begun} begun, {self.published} published"
        )


def count(ranges: str) -> int:
    """Count the indexes in ranges such as "0-3,5"."""
    pairs = [part.partition("-") for part in ranges.split(",") if part]
    return sum(int(last or first) - int(first) + 1 for first, _, last in pairs)
