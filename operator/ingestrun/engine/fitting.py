"""The last word on a status' size: what people can do without goes before the object is too large to be stored well.

Everything in a status is bounded by itself. Only ranges cut to pieces by failed batches and by ones in flight, by the
most of both that the spec allows, together with all else at its longest, are more than a run's object has room for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from ingestrun.engine import conditions as c
from ingestrun.engine.accounting import with_
from ingestrun.model.base import KubeModel
from ingestrun.model.spec import IngestRunSpec
from ingestrun.model.status import IngestRunStatus

STATUS_BYTES: Final = 13 * 1024
"""Of the object's 16 KiB; the rest is for the spec, the metadata and the managed fields."""
LONG_RANGES: Final = 2048
"""With ranges up to this length all else fits at its longest: a test computes it. So nothing is measured then."""
SHORT_MESSAGE: Final = 64
SAVED_BYTES: Final = 5632
"""Of those bytes a saved state may have: its ranges come again in the status. One run leaves less, whatever fails."""


def copied(spec: IngestRunSpec) -> int:
    """How many bytes of the object a saved state takes, as the spec has it."""
    state = spec.resume_from.saved_state if spec.resume_from is not None else None
    return _bytes_of(state) if state is not None else 0


def fitted(status: IngestRunStatus, *, beside: int = 0) -> IngestRunStatus:
    """The status within its bytes: logs go first, then older failures, then the ends of long messages.

    `beside` is what a saved state takes of them.
    """
    batches = status.batches
    ranges = (batches.claimed, batches.fetched, batches.published, batches.failed, batches.redo)
    if not beside and sum(len(str(each)) for each in ranges) <= LONG_RANGES:
        return status
    for shortened in _STEPS:
        if _bytes_of(status) + beside <= STATUS_BYTES:
            break
        status = shortened(status)
    return status


def _bytes_of(part: KubeModel) -> int:
    return len(part.model_dump_json(by_alias=True, exclude_none=True).encode())


def _without_logs(status: IngestRunStatus) -> IngestRunStatus:
    return with_(status, failures=[failure.model_copy(update={"log": None}) for failure in status.failures])


def _latest_failure(status: IngestRunStatus) -> IngestRunStatus:
    return with_(status, failures=status.failures[-1:])


def _short_conditions(status: IngestRunStatus) -> IngestRunStatus:
    """`Succeeded` keeps its sentence: it is the one that the columns of `kubectl get -o wide` show."""
    conditions = [
        condition
        if condition.type == c.SUCCEEDED
        else condition.model_copy(update={"message": condition.message[:SHORT_MESSAGE]})
        for condition in status.conditions
    ]
    return with_(status, conditions=conditions)


_STEPS: Final[tuple[Callable[[IngestRunStatus], IngestRunStatus], ...]] = (
    _without_logs,
    _latest_failure,
    _short_conditions,
)
