"""Conditions of a run, right for kstatus (so for Flux) and for `kubectl wait`.

Source: kstatus reads `Reconciling=True` as in progress and `Stalled=True` as failed; a run that has ended has
`Finished=True` whatever its end, so that one `kubectl wait` covers every outcome.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Literal

from ingestrun.model.status import Condition

SUCCEEDED: Final = "Succeeded"
FINISHED: Final = "Finished"
CANCELLED: Final = "Cancelled"
DRAINED: Final = "Drained"
BACKPRESSURED: Final = "Backpressured"
SUSPENDED: Final = "Suspended"
RECONCILING: Final = "Reconciling"
STALLED: Final = "Stalled"

MESSAGE_CHARS: Final = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class ConditionUpdate:
    """What a condition is to say now; the time of its last change is worked out from what it said before."""

    type: str
    status: Literal["True", "False", "Unknown"]
    reason: str
    message: str = ""


def merge_conditions(
    old: Iterable[Condition], claims: Iterable[ConditionUpdate], *, now: datetime, generation: int
) -> list[Condition]:
    """The old conditions, the claims in place of those of their type; a new time only where the status changed."""
    conditions = {condition.type: condition for condition in old}
    for claim in claims:
        before = conditions.get(claim.type)
        conditions[claim.type] = Condition(
            type=claim.type,
            status=claim.status,
            reason=claim.reason,
            message=claim.message[:MESSAGE_CHARS],
            observed_generation=generation,
            last_transition_time=before.last_transition_time if before and before.status == claim.status else now,
        )
    return list(conditions.values())
