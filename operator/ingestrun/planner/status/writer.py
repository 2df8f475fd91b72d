"""The writer of a decision into the status: phase, conditions and counters, cut to fit its bytes.

Each field of a status is bounded. Only maximally fragmented ranges together with every other field at its
maximum can exceed the object's budget; then the least needed parts are cut (`fit_status`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any, Final

from ingestrun.model.run import IngestRun
from ingestrun.model.size_budget import (
    MAX_CHECKPOINTS,
    MESSAGE_CHARS,
    SHORT_MESSAGE_CHARS,
    STATUS_BYTES,
    UNMEASURED_RANGES_BYTES,
)
from ingestrun.model.spec import IngestRunSpec
from ingestrun.model.status import BatchesStatus, Condition, IngestRunStatus, Phase, StageFailure
from ingestrun.model.text import truncate
from ingestrun.model.times import human_duration
from ingestrun.planner.status import conditions as c
from ingestrun.planner.status.conditions import ConditionUpdate

_END_CHARS: Final = 100


def finish_status(
    run: IngestRun,
    status: IngestRunStatus,
    *,
    phase: Phase | None,
    conditions: Iterable[ConditionUpdate],
    now: datetime,
) -> IngestRunStatus:
    """Return the status with phase, conditions and progress set, within its bytes; `phase` None leaves the phase.

    Of a run that is not understood the progress stays as it is stored.
    """
    generation = run.metadata.generation
    ended = (phase or status.phase or Phase.PENDING).ended
    if ended and status.condition(c.SUSPENDED) is not None:
        conditions = [*conditions, ConditionUpdate(type=c.SUSPENDED, status="False", reason="Finished")]
    if ended and status.start_time is not None and status.completion_time is not None:
        status = status.replace(duration=human_duration(status.completion_time - status.start_time))
    if run.unreadable:
        return status.replace(
            phase=phase or status.phase,
            # While it is held nothing has been done about this generation.
            observed_generation=generation if ended else status.observed_generation,
            conditions=c.merge_conditions(status.conditions, conditions, now=now, generation=generation),
        )
    finished = status.replace(
        phase=phase or status.phase,
        observed_generation=generation,
        batches=_finished_batches(run, status.batches, ended=ended),
        conditions=c.merge_conditions(status.conditions, conditions, now=now, generation=generation),
    )
    return fit_status(finished, beside=saved_state_bytes(run.spec))


def _finished_batches(run: IngestRun, batches: BatchesStatus, *, ended: bool) -> BatchesStatus:
    """Return the batches with what people read of them."""
    partitions, done = run.spec.batches.partitions, len(batches.published)
    return batches.replace(
        # As the API server insists: what had permission when the run ended, and a batch released since is no harm.
        publishing=run.status.batches.publishing if ended and not run.status.ended else batches.publishing,
        active=0 if ended else len(batches.in_flight),
        progress=f"{done}/{partitions.total}" if partitions is not None else str(done),
    )


def status_patch(run: IngestRun, status: IngestRunStatus) -> dict[str, Any]:
    """Return the merge patch of the stored status that makes it this one; empty if nothing changes.

    Of a run that is not understood only the fields that change are in it, and in conditions that change what is not
    known of them stays, so that nothing is lost of what another version has written.
    """
    before, after = run.status.to_json(), status.to_json()
    if before == after:
        return {}
    if not run.unreadable:
        return _with_removals(before, after)
    patch = {key: value for key, value in _with_removals(before, after).items() if before.get(key) != value}
    if "conditions" in patch:
        stored = {condition["type"]: condition for condition in run.stored_status.get("conditions") or ()}
        for condition in patch["conditions"]:
            stored[condition["type"]] = {**stored.get(condition["type"], {}), **condition}
        patch["conditions"] = list(stored.values())
    return patch


def _with_removals(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Return `after` as a merge patch of `before`: what is not there any more is null in it."""
    patch: dict[str, Any] = {key: None for key in before if key not in after}
    for key, value in after.items():
        stored = before.get(key)
        patch[key] = _with_removals(stored, value) if isinstance(stored, dict) and isinstance(value, dict) else value
    return patch


def backpressure_over(status: IngestRunStatus) -> list[ConditionUpdate]:
    """Return the end of the condition Backpressured for a run that ends, if it has the condition."""
    if status.condition(c.BACKPRESSURED) is None:
        return []
    return [ConditionUpdate(type=c.BACKPRESSURED, status="False", reason="Finished")]


def active_conditions(phase: Phase, reconciling: ConditionUpdate) -> list[ConditionUpdate]:
    """Return the conditions of every run that has not ended; `reconciling` is its Reconciling."""
    return [
        ConditionUpdate(type=c.SUCCEEDED, status="Unknown", reason=reconciling.reason, message=reconciling.message),
        ConditionUpdate(type=c.FINISHED, status="False", reason=phase.value),
        reconciling,
    ]


def describe_failure(failure: StageFailure) -> str:
    """Describe one failed attempt. If it is too long, cut it in the middle, because its end has the decision."""
    text = f"batch {failure.batch}, {failure.stage}, attempt {failure.attempt + 1}: {failure.reason}: {failure.message}"
    if len(text) <= MESSAGE_CHARS:
        return text
    return text[: MESSAGE_CHARS - _END_CHARS - 1] + "…" + text[-_END_CHARS:]


def saved_state_bytes(spec: IngestRunSpec) -> int:
    """Return the number of bytes that the spec's saved state takes in the object."""
    state = spec.resume_from.saved_state if spec.resume_from is not None else None
    return state.json_bytes() if state is not None else 0


def fit_status(status: IngestRunStatus, *, beside: int = 0) -> IngestRunStatus:
    """Return the status within its bytes: logs are dropped first, then older failures, then the ends of long messages.

    Last go the names of children, the clean-up's message, the duration, the state of a chain's fetches and the one
    failure left.
    `beside` is the number of bytes that a saved state takes.
    """
    batches, cancellation = status.batches, status.cancellation
    ranges = (batches.claimed, batches.fetched, batches.published, batches.failed, batches.replay)
    names_children = cancellation is not None and cancellation.children is not None
    many = names_children or len(batches.checkpoints) > MAX_CHECKPOINTS or bool(status.workers)
    if not beside and not many and sum(len(str(each)) for each in ranges) <= UNMEASURED_RANGES_BYTES:
        return status
    for shortened in _STEPS:
        if status.json_bytes() + beside <= STATUS_BYTES:
            break
        status = shortened(status)
    return status


def _without_logs(status: IngestRunStatus) -> IngestRunStatus:
    return status.replace(failures=[failure.replace(log=None) for failure in status.failures])


def _latest_failure(status: IngestRunStatus) -> IngestRunStatus:
    return status.replace(failures=status.failures[-1:])


def _short_conditions(status: IngestRunStatus) -> IngestRunStatus:
    """Shorten all messages but that of `Succeeded`, because the columns of `kubectl get -o wide` show it."""

    def short(condition: Condition) -> Condition:
        return condition.replace(message=truncate(condition.message, SHORT_MESSAGE_CHARS))

    conditions = [each if each.type == c.SUCCEEDED else short(each) for each in status.conditions]
    return status.replace(conditions=conditions)


def _short_record(status: IngestRunStatus) -> IngestRunStatus:
    """Keep of the children only their number, and of the clean-up only its state."""
    record = status.cancellation
    if record is None:
        return status
    children = record.children.replace(ended_before_names=[]) if record.children is not None else None
    on_cancel = record.on_cancel.replace(message="") if record.on_cancel is not None else None
    return status.replace(cancellation=record.replace(children=children, on_cancel=on_cancel))


def _without_duration(status: IngestRunStatus) -> IngestRunStatus:
    """Drop the duration, which follows from the times."""
    return status.replace(duration=None)


def _without_failures(status: IngestRunStatus) -> IngestRunStatus:
    return status.replace(failures=[])


def _without_cursor_state(status: IngestRunStatus) -> IngestRunStatus:
    """Drop the state of a chain's fetches: without it a source that repeats itself is only recognized later."""
    return status.replace(cursor_state=None)


_STEPS: Final[tuple[Callable[[IngestRunStatus], IngestRunStatus], ...]] = (
    _without_logs,
    _latest_failure,
    _short_conditions,
    _short_record,
    _without_duration,
    _without_cursor_state,
    _without_failures,
)
