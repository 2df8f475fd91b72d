"""What a running run starts now: the stages and retries that are due, then new batches, as far as there is room."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from ingestrun.engine.accounting import (
    again_limit,
    claimable,
    cursor_of,
    fetch_limit,
    next_claims,
    parked_of,
    pending_gaps,
    with_,
)
from ingestrun.engine.batches import Batch, Start
from ingestrun.engine.capacity import Held, held_back, made_room, used_up
from ingestrun.engine.decisions import Create, Refusal, Spent
from ingestrun.engine.facts import JobView
from ingestrun.engine.fairness import Capacity
from ingestrun.engine.parking import holds_room, with_parked
from ingestrun.engine.steps import steps_of
from ingestrun.model.contract import Stage
from ingestrun.model.run import IngestRun
from ingestrun.model.status import IngestRunStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class Starts:
    """What to start, and what keeps the rest."""

    status: IngestRunStatus
    """With the new batches claimed, and those parked that wait for room."""
    creates: tuple[Create, ...] = ()
    held: Held | None = None
    room: Spent | None = None
    """Jobs to delete at once, since they use up a quota."""
    looks: tuple[datetime, ...] = ()
    """When more is due."""


def starts(
    run: IngestRun,
    status: IngestRunStatus,
    flight: Sequence[Batch],
    jobs: Sequence[JobView],
    *,
    refusal: Refusal | None,
    capacity: Capacity | None,
    now: datetime,
) -> Starts:
    """Decide what of `flight`, the batches under way, and of those not begun may be started."""
    spec = run.spec
    waiting = [batch for batch in flight if batch.start is not None]
    looks = [at for batch in waiting if (at := _not_before(batch)) is not None and at > now]
    ready = [batch for batch in waiting if (at := _not_before(batch)) is None or at <= now]
    claims = max(0, min(spec.parallelism - len(flight), claimable(spec, status.batches, status.records)))
    held = held_back(run, flight, refusal, capacity, wants=len(ready) + claims, now=now)
    room = made_room(run, jobs, capacity)
    if held is not None:
        # What is in flight goes before new batches, and first what has given up the places of its Jobs.
        parked = parked_of(status.batches)
        ready.sort(key=lambda batch: (batch.index not in parked, batch.index))
        if room is None and used_up(capacity) and len(ready) > held.admits:
            before = status
            status = with_parked(status, ready, jobs, places=len(ready) - held.admits)
            looks += [now] if status is not before else []
        if room is None and used_up(capacity) and not holds_room(flight, jobs):
            room = made_room(run, jobs, capacity, last=True)
        ready = ready[: held.admits]
        claims = min(claims, held.admits - len(ready))
        if held.retry_at is not None and held.retry_at > now:
            looks.append(held.retry_at)
    creates = [_create(run, status, batch.start) for batch in ready if batch.start is not None]
    if claims:
        fetch = steps_of(spec)[0]
        new = next_claims(status.batches, claims)
        creates += [
            _create(run, status, Start(batch=index, step=fetch, attempt=0, input_attempt=None)) for index in new
        ]
        claimed = with_(status.batches, claimed=status.batches.claimed | new, redo=status.batches.redo - new)
        status = with_(status, batches=claimed, start_time=status.start_time or now)
    return Starts(status=status, creates=tuple(creates), held=held, room=room, looks=tuple(looks))


def _not_before(batch: Batch) -> datetime | None:
    return batch.start.not_before if batch.start is not None else None


def _create(run: IngestRun, status: IngestRunStatus, start: Start) -> Create:
    if start.step.stage is not Stage.FETCH:
        return Create(start=start)
    partitions = run.spec.batches.partitions
    gap = pending_gaps(status.batches).get(start.batch)
    if gap is not None:
        return Create(start=start, cursor=gap.cursor, limit=again_limit(gap))
    if partitions is None:
        return Create(start=start, cursor=cursor_of(run, status), limit=fetch_limit(run.spec, status.records))
    value = partitions.values[start.batch] if partitions.values is not None else str(start.batch)
    return Create(start=start, cursor=value)
