"""How a decision is put into the status: phase, conditions and the sentences in them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Final

from ingestrun.engine import conditions as c
from ingestrun.engine.accounting import in_flight, with_
from ingestrun.engine.batches import Batch
from ingestrun.engine.capacity import NOT_COUNTED_YET, Held
from ingestrun.engine.conditions import Claim
from ingestrun.engine.facts import QUEUED_AFTER
from ingestrun.engine.fitting import copied, fitted
from ingestrun.model.run import IngestRun
from ingestrun.model.status import IngestRunStatus, Phase, StageFailure

_END_CHARS: Final = 100


def said(
    run: IngestRun, status: IngestRunStatus, *, phase: Phase | None, claims: Iterable[Claim], now: datetime
) -> IngestRunStatus:
    generation = run.metadata.generation
    partitions = run.spec.batches.partitions
    done = len(status.batches.published)
    ended = (phase or status.phase or Phase.PENDING).ended
    if ended and status.condition(c.SUSPENDED) is not None:
        claims = [*claims, Claim(type=c.SUSPENDED, status="False", reason="Finished")]
    told = with_(
        status,
        phase=phase or status.phase,
        observed_generation=generation,
        batches=with_(
            status.batches,
            active=0 if ended else len(in_flight(status.batches)),
            progress=f"{done}/{partitions.total}" if partitions is not None else str(done),
        ),
        conditions=c.updated(status.conditions, claims, now=now, generation=generation),
    )
    return fitted(told, beside=copied(run.spec))


def activity(phase: Phase, seen: Sequence[Batch], stuck: Batch | None, held: Held | None, *, now: datetime) -> Claim:
    """What a running run is doing, or what keeps it: the Reconciling condition."""
    reason, message = phase.value, ""
    retried = next((batch for batch in seen if batch.start and batch.start.attempt and batch.failures), None)
    if stuck is not None and stuck.running is not None and stuck.obstacle is not None:
        reason = "PodNotStarting"
        message = f"batch {stuck.index}, Job {stuck.running.job.name}: {stuck.obstacle.message}"
    elif held is not None:
        reason, message = "Backpressured", held.message
    elif phase is Phase.RUNNING and _queued(seen, now):
        reason, message = "Queued", "its Jobs are suspended until Kueue, or whoever suspended them, admits them"
    elif phase is Phase.RUNNING and retried is not None:
        reason, message = "Retrying", sentence(retried.failures[-1])
    return Claim(type=c.RECONCILING, status="True", reason=reason, message=message)


def _queued(seen: Sequence[Batch], now: datetime) -> bool:
    """Whether all that the run has under way waits to be admitted, and for longer than an admission takes."""
    running = [batch.running for batch in seen if batch.running is not None]
    return bool(running) and all(
        job.queued and (job.job.created is None or now >= job.job.created + QUEUED_AFTER) for job in running
    )


def under_way(phase: Phase, doing: Claim) -> list[Claim]:
    """The conditions of every run that has not ended; `doing` is its Reconciling."""
    return [
        Claim(type=c.SUCCEEDED, status="Unknown", reason=doing.reason, message=doing.message),
        Claim(type=c.FINISHED, status="False", reason=phase.value),
        doing,
    ]


def backpressure(run: IngestRun, held: Held | None) -> list[Claim]:
    """That room is waited for, or no longer; nothing while it is not known yet, or there never was such a wait."""
    if held is not None:
        if held.reason == NOT_COUNTED_YET:
            return []
        return [Claim(type=c.BACKPRESSURED, status="True", reason=held.reason, message=held.message)]
    if run.status.condition(c.BACKPRESSURED) is None:
        return []
    # Suspended, it asks for nothing: once it does again, the wait begins anew.
    return [Claim(type=c.BACKPRESSURED, status="False", reason="Suspended" if run.spec.suspend else "RoomAgain")]


def suspension(run: IngestRun) -> list[Claim]:
    """That the run is suspended, or no longer."""
    if run.spec.suspend:
        return [Claim(type=c.SUSPENDED, status="True", reason="Suspended")]
    if run.status.condition(c.SUSPENDED) is None:
        return []
    return [Claim(type=c.SUSPENDED, status="False", reason="Resumed")]


def no_backpressure(status: IngestRunStatus) -> list[Claim]:
    if status.condition(c.BACKPRESSURED) is None:
        return []
    return [Claim(type=c.BACKPRESSURED, status="False", reason="Finished")]


def sentence(failure: StageFailure) -> str:
    """One failed attempt; too long for a condition it is cut in the middle, since what comes of it is said last."""
    text = f"batch {failure.batch}, {failure.stage}, attempt {failure.attempt + 1}: {failure.reason}: {failure.message}"
    if len(text) <= c.MESSAGE_CHARS:
        return text
    return text[: c.MESSAGE_CHARS - _END_CHARS - 1] + "…" + text[-_END_CHARS:]


def counted(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"
