"""What a run's status says, as the demo shows it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ROWS = 336_776
ENDED = frozenset({"Succeeded", "Failed", "Cancelled"})


class Status:
    """`.status` of an IngestRun, which may be empty still."""

    def __init__(self, status: Mapping[str, Any]) -> None:
        self._status = status
        self._batches: Mapping[str, Any] = status.get("batches") or {}

    @property
    def phase(self) -> str:
        """Where the run stands; Pending until it says so."""
        return str(self._status.get("phase") or "Pending")

    @property
    def published(self) -> int:
        """How many batches are published."""
        return count(self._batches.get("published", ""))

    @property
    def rows(self) -> int:
        """How many rows are published."""
        return int((self._status.get("records") or {}).get("published", 0))

    @property
    def files(self) -> int:
        """How many batches have got into the dataset: published, or in flight at the cancel and landed after all."""
        late = (self._status.get("cancellation") or {}).get("published", "")
        return self.published + count(late)

    @property
    def message(self) -> str:
        """Why the run is where it is."""
        conditions = self._status.get("conditions") or ()
        said = [f"{c['type']}: {c.get('reason')}: {c.get('message')}" for c in conditions if c.get("message")]
        return "; ".join(said) or "it has no conditions yet"

    def line(self) -> str:
        """The run's progress in one line."""
        bar = "#" * round(24 * self.rows / ROWS)
        begun = count(self._batches.get("claimed", ""))
        return (
            f"{self.phase:<9} [{bar:<24}] {self.rows:>7,} of {ROWS:,} rows published,"
            f" batches: {begun} begun, {self.published} published"
        )


def count(ranges: str) -> int:
    """How many indexes "0-3,5" stands for."""
    pairs = [part.partition("-") for part in ranges.split(",") if part]
    return sum(int(last or first) - int(first) + 1 for first, _, last in pairs)
