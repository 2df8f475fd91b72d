"""How a decision is put into the status: phase, conditions and the sentences in them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from typing import Final

from ingestrun.model.base import KubeModel
from ingestrun.model.run import IngestRun
from ingestrun.model.spec import IngestRunSpec
from ingestrun.model.status import IngestRunStatus, Phase, StageFailure
from ingestrun.planner.batch.attempt import QUEUED_AFTER
from ingestrun.planner.batch.ledger import in_flight
from ingestrun.planner.batch.state import BatchState
from ingestrun.planner.run.backpressure import NOT_COUNTED_YET, Backpressure
from ingestrun.planner.status import conditions as c
from ingestrun.planner.status.conditions import ConditionUpdate

_END_CHARS: Final = 100


def finish_status(
    run: IngestRun, status: IngestRunStatus, *, phase: Phase | None, claims: Iterable[ConditionUpdate], now: datetime
) -> IngestRunStatus:
    generation = run.metadata.generation
    partitions = run.spec.batches.partitions
    done = len(status.batches.published)
    ended = (phase or status.phase or Phase.PENDING).ended
    if ended and status.condition(c.SUSPENDED) is not None:
        claims = [*claims, ConditionUpdate(type=c.SUSPENDED, status="False", reason="Finished")]
    told = status.replace(
        phase=phase or status.phase,
        observed_generation=generation,
        batches=status.batches.replace(
            active=0 if ended else len(in_flight(status.batches)),
            progress=f"{done}/{partitions.total}" if partitions is not None else str(done),
        ),
        conditions=c.merge_conditions(status.conditions, claims, now=now, generation=generation),
    )
    return fit_status(told, beside=saved_state_bytes(run.spec))


def activity_condition(
    phase: Phase, seen: Sequence[BatchState], stuck: BatchState | None, held: Backpressure | None, *, now: datetime
) -> ConditionUpdate:
    """What a running run is doing, or what keeps it: the Reconciling condition."""
    reason, message = phase.value, ""
    retried = next(
        (batch for batch in seen if batch.next_attempt and batch.next_attempt.attempt and batch.failures), None
    )
    if stuck is not None and stuck.running is not None and stuck.obstacle is not None:
        reason = "PodNotStarting"
        message = f"batch {stuck.index}, Job {stuck.running.job.name}: {stuck.obstacle.message}"
    elif held is not None:
        reason, message = "Backpressured", held.message
    elif phase is Phase.RUNNING and _waits_for_admission(seen, now):
        reason, message = "Queued", "its Jobs are suspended until Kueue, or whoever suspended them, admits them"
    elif phase is Phase.RUNNING and retried is not None:
        reason, message = "Retrying", describe_failure(retried.failures[-1])
    return ConditionUpdate(type=c.RECONCILING, status="True", reason=reason, message=message)


def _waits_for_admission(seen: Sequence[BatchState], now: datetime) -> bool:
    """Whether all that the run has under way waits to be admitted, and for longer than an admission takes."""
    running = [batch.running for batch in seen if batch.running is not None]
    return bool(running) and all(
        job.queued and (job.job.created is None or now >= job.job.created + QUEUED_AFTER) for job in running
    )


def active_conditions(phase: Phase, doing: ConditionUpdate) -> list[ConditionUpdate]:
    """The conditions of every run that has not ended; `doing` is its Reconciling."""
    return [
        ConditionUpdate(type=c.SUCCEEDED, status="Unknown", reason=doing.reason, message=doing.message),
        ConditionUpdate(type=c.FINISHED, status="False", reason=phase.value),
        doing,
    ]


def backpressure_conditions(run: IngestRun, held: Backpressure | None) -> list[ConditionUpdate]:
    """That room is waited for, or no longer; nothing while it is not known yet, or there never was such a wait."""
    if held is not None:
        if held.reason == NOT_COUNTED_YET:
            return []
        return [ConditionUpdate(type=c.BACKPRESSURED, status="True", reason=held.reason, message=held.message)]
    if run.status.condition(c.BACKPRESSURED) is None:
        return []
    # Suspended, it asks for nothing: once it does again, the wait begins anew.
    return [
        ConditionUpdate(
            type=c.BACKPRESSURED, status="False", reason="Suspended" if run.spec.suspend else "CapacityAvailable"
        )
    ]


def suspension_conditions(run: IngestRun) -> list[ConditionUpdate]:
    """That the run is suspended, or no longer."""
    if run.spec.suspend:
        return [ConditionUpdate(type=c.SUSPENDED, status="True", reason="Suspended")]
    if run.status.condition(c.SUSPENDED) is None:
        return []
    return [ConditionUpdate(type=c.SUSPENDED, status="False", reason="Resumed")]


def backpressure_over(status: IngestRunStatus) -> list[ConditionUpdate]:
    if status.condition(c.BACKPRESSURED) is None:
        return []
    return [ConditionUpdate(type=c.BACKPRESSURED, status="False", reason="Finished")]


def describe_failure(failure: StageFailure) -> str:
    """One failed attempt; too long for a condition it is cut in the middle, since what comes of it is said last."""
    text = f"batch {failure.batch}, {failure.stage}, attempt {failure.attempt + 1}: {failure.reason}: {failure.message}"
    if len(text) <= c.MESSAGE_CHARS:
        return text
    return text[: c.MESSAGE_CHARS - _END_CHARS - 1] + "…" + text[-_END_CHARS:]


def pluralize(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


# The last word on a status' size: what people can do without goes before the object is too large to be stored well.
#
# Everything in a status is bounded by itself. Only ranges cut to pieces by failed batches and by ones in flight, by the
# most of both that the spec allows, together with all else at its longest, are more than a run's object has room for.
#

STATUS_BYTES: Final = 13 * 1024
"""Of the object's 16 KiB; the rest is for the spec, the metadata and the managed fields."""
LONG_RANGES: Final = 2048
"""With ranges up to this length all else fits at its longest: a test computes it. So nothing is measured then."""
SHORT_MESSAGE: Final = 64
SAVED_BYTES: Final = 5632
"""Of those bytes a saved state may have: its ranges come again in the status. One run leaves less, whatever fails."""


def saved_state_bytes(spec: IngestRunSpec) -> int:
    """How many bytes of the object a saved state takes, as the spec has it."""
    state = spec.resume_from.saved_state if spec.resume_from is not None else None
    return _bytes_of(state) if state is not None else 0


def fit_status(status: IngestRunStatus, *, beside: int = 0) -> IngestRunStatus:
    """The status within its bytes: logs go first, then older failures, then the ends of long messages.

    `beside` is what a saved state takes of them.
    """
    batches = status.batches
    ranges = (batches.claimed, batches.fetched, batches.published, batches.failed, batches.replay)
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
    return status.replace(failures=[failure.model_copy(update={"log": None}) for failure in status.failures])


def _latest_failure(status: IngestRunStatus) -> IngestRunStatus:
    return status.replace(failures=status.failures[-1:])


def _short_conditions(status: IngestRunStatus) -> IngestRunStatus:
    """`Succeeded` keeps its sentence: it is the one that the columns of `kubectl get -o wide` show."""
    conditions = [
        condition
        if condition.type == c.SUCCEEDED
        else condition.model_copy(update={"message": condition.message[:SHORT_MESSAGE]})
        for condition in status.conditions
    ]
    return status.replace(conditions=conditions)


_STEPS: Final[tuple[Callable[[IngestRunStatus], IngestRunStatus], ...]] = (
    _without_logs,
    _latest_failure,
    _short_conditions,
)
