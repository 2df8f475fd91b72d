"""Whether there is room in the cluster for one more Job of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from ingestrun.engine.batches import Batch
from ingestrun.engine.decisions import Refusal


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    reason: str
    message: str
    retry_at: datetime | None
    probe: bool
    """The wait is over: one Job may ask whether there is room."""


def held_back(flight: Sequence[Batch], refusal: Refusal | None, *, now: datetime) -> Held | None:
    """Why nothing new may be started for want of room; None where there is room."""
    if refusal is not None:
        probe = now >= refusal.retry_at
        return Held(reason=refusal.reason, message=refusal.message, retry_at=refusal.retry_at, probe=probe)
    for batch in flight:
        if batch.obstacle is not None and batch.obstacle.kind == "Unschedulable":
            message = f"batch {batch.index}: {batch.obstacle.message}"
            return Held(reason="Unschedulable", message=message, retry_at=None, probe=False)
    return None
