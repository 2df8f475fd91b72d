"""The Events of a run that follow from a change of its status."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final, Literal

from ingestrun.model.contract import Stage
from ingestrun.model.ranges import IndexRanges
from ingestrun.model.spec import CancellationPolicy
from ingestrun.model.status import AttemptId, IngestRunStatus, Phase
from ingestrun.model.text import truncate_bytes
from ingestrun.planner.batch.state import NextAttempt
from ingestrun.planner.status import conditions as c

WAITING_FOR_DRAIN: Final = "WaitingForDrain"
WAITING_FOR_REPLACED: Final = "WaitingForReplaced"
WAITING_FOR_END: Final = "WaitingForEnd"
WAITING_FOR_DELETION: Final = "WaitingForDeletion"
PREDECESSOR_HELD: Final = "PredecessorHeld"
QUEUED: Final = "Queued"
WAIT_REASONS: Final = (
    WAITING_FOR_DRAIN,
    WAITING_FOR_REPLACED,
    WAITING_FOR_END,
    WAITING_FOR_DELETION,
    PREDECESSOR_HELD,
    QUEUED,
)
"""Reasons for which a run waits for another one, or for the admission of its Jobs; each has an Event."""
SUSPENDED_NOTE: Final = "nothing new is started until spec.suspend is cleared"
HELD: Final = "Held"
"""Reason for which a run is held: this version does not understand all of it."""
NOTE_BYTES: Final = 1024
"""Most bytes of a note in UTF-8, because events.k8s.io/v1 refuses a longer one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """An Event to post: `action` names the operator's action, `note` its cause."""

    type: Literal["Normal", "Warning"]
    reason: str
    action: str
    note: str


def normal(reason: str, note: str, *, action: str) -> Event:
    """Return an Event of type Normal, about a regular step."""
    return Event(type="Normal", reason=reason, action=action, note=truncate_bytes(note, NOTE_BYTES))


def warning(reason: str, note: str, *, action: str) -> Event:
    """Return an Event of type Warning, about a problem that a user may have to look at."""
    return Event(type="Warning", reason=reason, action=action, note=truncate_bytes(note, NOTE_BYTES))


def events_between(old: IngestRunStatus, new: IngestRunStatus) -> list[Event]:
    """Return the Events for the step from `old` to `new`."""
    return [
        *_failure_events(old, new),
        *_progress_events(old, new),
        *_end_events(old, new),
        *_cancellation_events(old, new),
    ]


def memory_raised_events(old: IngestRunStatus, new: IngestRunStatus, starts: Iterable[NextAttempt]) -> list[Event]:
    """Return an Event for each next attempt that gets more memory, once its failure is new in the status."""
    fresh = {failure.id for failure in new.failures} - {failure.id for failure in old.failures}
    return [
        normal(
            "MemoryRaised",
            f"batch {start.batch}, {start.step.label}, attempt {start.number + 1}: memory limit {start.memory}",
            action="RaiseMemory",
        )
        for start in starts
        if start.memory is not None
        and start.memory.before is not None
        and (start.batch, start.step.label, start.number - 1) in fresh
    ]


def skipped_events(starts: Iterable[AttemptId]) -> list[Event]:
    """Return at most two Events about all attempts that a cancel kept from starting, for any number of attempts."""
    whole: set[int] = set()
    by_stage: dict[str, set[int]] = {}
    for batch, stage, attempt in starts:
        # A batch that was tried before has begun, so it is its next attempt that is skipped.
        unbegun = stage == Stage.FETCH.value and attempt == 0
        (whole if unbegun else by_stage.setdefault(stage, set())).add(batch)
    events = []
    if whole:
        events.append(normal("BatchSkipped", f"not begun after the cancel: batch {IndexRanges(whole)}", action="Skip"))
    if by_stage:
        parts = (f"{stage} of batch {IndexRanges(found)}" for stage, found in sorted(by_stage.items()))
        events.append(normal("StageSkipped", f"not started after the cancel: {'; '.join(parts)}", action="Skip"))
    return events


def _failure_events(old: IngestRunStatus, new: IngestRunStatus) -> Iterator[Event]:
    known = {failure.id for failure in old.failures}
    for failure in new.failures:
        if failure.id not in known:
            place = f"batch {failure.batch}, {failure.stage}, attempt {failure.attempt + 1}"
            yield warning("StageFailed", f"{place}: {failure.reason}: {failure.message}", action="Judge")
    gone = new.batches.failed - old.batches.failed
    if gone:
        yield warning("BatchFailed", f"given up: batch {gone}", action="GiveUp")


def _progress_events(old: IngestRunStatus, new: IngestRunStatus) -> Iterator[Event]:
    if old.start_time is None and new.start_time is not None:
        yield normal("Started", "the first batch is claimed", action="Start")
    yield from _backpressure_events(old, new)
    for reason in WAIT_REASONS:
        if _became(old, new, c.RECONCILING, reason=reason):
            waiting = new.condition(c.RECONCILING)
            yield normal(reason, waiting.message if waiting else "", action="Wait")
    if _became(old, new, c.RECONCILING, reason=HELD):
        held = new.condition(c.RECONCILING)
        yield warning(HELD, held.message if held else "", action="Hold")
    for reason in ("PodNotStarting", c.POD_STUCK_TERMINATING):
        if _became(old, new, c.RECONCILING, reason=reason):
            stuck = new.condition(c.RECONCILING)
            yield warning(reason, stuck.message if stuck else "", action="Wait")
    if old.phase is not Phase.SUSPENDED and new.phase is Phase.SUSPENDED:
        yield normal("Suspended", SUSPENDED_NOTE, action="Suspend")
    if old.phase is Phase.SUSPENDED and new.phase in (Phase.RUNNING, Phase.PENDING):
        yield normal("Resumed", "spec.suspend is cleared", action="Resume")


def _backpressure_events(old: IngestRunStatus, new: IngestRunStatus) -> Iterator[Event]:
    """Yield an Event when a run begins to be held back, when the reason changes, and when there is room again."""
    before, now = old.condition(c.BACKPRESSURED), new.condition(c.BACKPRESSURED)
    if now is None:
        return
    if _became(old, new, c.BACKPRESSURED, reason=now.reason):
        yield warning("Backpressured", f"{now.reason}: {now.message}", action="Wait")
    if before is not None and before.status == "True" and now.reason == c.CAPACITY_AVAILABLE:
        yield normal(c.CAPACITY_AVAILABLE, "there is room again", action="GoOn")


def _end_events(old: IngestRunStatus, new: IngestRunStatus) -> Iterator[Event]:
    if new.phase is old.phase or new.phase is None or not new.phase.ended:
        return
    end = new.condition(c.SUCCEEDED)
    make = warning if new.phase is Phase.FAILED else normal
    action = "Cancel" if new.phase is Phase.CANCELLED else "Finish"
    yield make(new.phase.value, end.message if end and end.message else new.phase.value, action=action)


def _cancellation_events(old: IngestRunStatus, new: IngestRunStatus) -> Iterator[Event]:
    before, now = old.cancellation, new.cancellation
    if now is None:
        return
    if now.policy is CancellationPolicy.TERMINATE and (before is None or before.policy is not now.policy):
        yield normal("Terminating", "pods that run get SIGTERM", action="Terminate")
    if _became(old, new, c.DRAINED, status="False", reason=c.POD_STUCK_TERMINATING):
        stuck = new.condition(c.DRAINED)
        yield warning(c.POD_STUCK_TERMINATING, stuck.message if stuck else "", action="Drain")
    if _became(old, new, c.DRAINED):
        drained = new.condition(c.DRAINED)
        landed = f"; published all the same: batch {now.published}" if now.published else ""
        yield normal("Drained", (drained.message if drained else "") + landed, action="Drain")
    yield from _clean_up_events(old, new)


def _clean_up_events(old: IngestRunStatus, new: IngestRunStatus) -> Iterator[Event]:
    before = old.cancellation.on_cancel if old.cancellation is not None else None
    now = new.cancellation.on_cancel if new.cancellation is not None else None
    if now is None or now == before:
        return
    if now.state not in ("Succeeded", "Failed"):
        if now.message and (before is None or not before.message):
            yield warning("OnCancelWaiting", now.message, action="Wait")
        return
    make = normal if now.state == "Succeeded" else warning
    yield make(f"OnCancel{now.state}", now.message or "the clean-up has ended well", action="CleanUp")


def _became(
    old: IngestRunStatus, new: IngestRunStatus, kind: str, *, status: str = "True", reason: str | None = None
) -> bool:
    """Tell whether the condition has got this status (and reason), and had not before."""
    now, before = new.condition(kind), old.condition(kind)
    if now is None or now.status != status or (reason is not None and now.reason != reason):
        return False
    return before is None or before.status != status or (reason is not None and before.reason != reason)
