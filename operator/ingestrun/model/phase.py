"""The phase of a run, apart from the status' models, because these take the kubectl plugin too long to import."""

from __future__ import annotations

from enum import StrEnum
from typing import Final


class Phase(StrEnum):
    """The phase of a run. The planner derives it anew in each pass; it is stored for people and tools that read it."""

    PENDING = "Pending"
    RUNNING = "Running"
    SUSPENDED = "Suspended"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"
    CANCELLED = "Cancelled"

    @property
    def ended(self) -> bool:
        """Tell whether the phase is final."""
        return self in _ENDED


_ENDED: Final = frozenset({Phase.SUCCEEDED, Phase.FAILED, Phase.CANCELLED})


def is_final(phase: object) -> bool:
    """Tell whether a stored phase is final. One that this version does not know is not, as far as it knows."""
    return isinstance(phase, str) and phase in _ENDED
