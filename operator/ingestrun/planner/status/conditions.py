"""Conditions of a run, right for kstatus (so for Flux) and for `kubectl wait`.

Source: kstatus reads `Reconciling=True` as in progress and `Stalled=True` as failed; a run that has ended has
`Finished=True` in every final phase, so that one `kubectl wait` covers every outcome.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Literal

from ingestrun.model.size_budget import MESSAGE_CHARS
from ingestrun.model.status import Condition
from ingestrun.model.text import truncate

SUCCEEDED: Final = "Succeeded"
FINISHED: Final = "Finished"
CANCELLED: Final = "Cancelled"
DRAINED: Final = "Drained"
BACKPRESSURED: Final = "Backpressured"
SUSPENDED: Final = "Suspended"
RECONCILING: Final = "Reconciling"
STALLED: Final = "Stalled"

_ORDER: Final = (SUCCEEDED, CANCELLED, FINISHED, DRAINED, SUSPENDED, BACKPRESSURED, RECONCILING, STALLED)
"""The order in which people read them: how it ends, what it does now, and last what tools read."""

CAPACITY_AVAILABLE: Final = "CapacityAvailable"
"""Reason of `Backpressured` once there is room again."""
POD_STUCK_TERMINATING: Final = "PodStuckTerminating"
"""The reason of `Reconciling`, or of `Drained` after the end, while a pod that should have ended has not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConditionUpdate:
    """New content of a condition; the time of its last transition follows from its old content."""

    type: str
    status: Literal["True", "False", "Unknown"]
    reason: str
    message: str = ""


def merge_conditions(
    old: Iterable[Condition], updates: Iterable[ConditionUpdate], *, now: datetime, generation: int
) -> list[Condition]:
    """Return the old conditions, each replaced by the update of its type; a new time only if its status changed.

    They are in the order in which people read them.
    """
    conditions = {condition.type: condition for condition in old}
    for update in updates:
        before = conditions.get(update.type)
        unchanged = before is not None and before.status == update.status
        conditions[update.type] = Condition(
            type=update.type,
            status=update.status,
            reason=update.reason,
            message=truncate(update.message, MESSAGE_CHARS),
            observed_generation=generation,
            last_transition_time=before.last_transition_time if before is not None and unchanged else now,
        )
    return sorted(conditions.values(), key=_place)


def _place(condition: Condition) -> int:
    """Return the condition's place in the list; those of another version come last, as they were."""
    return _ORDER.index(condition.type) if condition.type in _ORDER else len(_ORDER)
