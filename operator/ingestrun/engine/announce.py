"""What a change of status is worth telling people: from the old and the new status to Events."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from ingestrun.engine import conditions as c
from ingestrun.model.status import IngestRunStatus, Phase

NOTE_CHARS: Final = 1000
"""events.k8s.io/v1 takes notes of at most 1 KiB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Announcement:
    """An Event to post: `action` is what the operator did, `note` why."""

    type: Literal["Normal", "Warning"]
    reason: str
    action: str
    note: str


def announcements(old: IngestRunStatus, new: IngestRunStatus) -> list[Announcement]:
    """The Events that the step from `old` to `new` deserves, in the order of their weight last."""
    told: list[Announcement] = []

    def tell(reason: str, note: str, *, action: str, warning: bool = False) -> None:
        told.append(
            Announcement(type="Warning" if warning else "Normal", reason=reason, action=action, note=note[:NOTE_CHARS])
        )

    known = {failure.key for failure in old.failures}
    for failure in new.failures:
        if failure.key not in known:
            place = f"batch {failure.batch}, {failure.stage}, attempt {failure.attempt + 1}"
            tell("StageFailed", f"{place}: {failure.reason}: {failure.message}", action="Judge", warning=True)
    gone = new.batches.failed - old.batches.failed
    if gone:
        tell("BatchFailed", f"given up: batch {gone}", action="GiveUp", warning=True)
    if old.start_time is None and new.start_time is not None:
        tell("Started", "the first batch is claimed", action="Start")
    for kind, action in ((c.BACKPRESSURED, "Wait"), (c.RECONCILING, "Start")):
        before, now = old.condition(kind), new.condition(kind)
        wanted = ("PodNotStarting",) if kind == c.RECONCILING else None
        if now is None or now.status != "True" or (wanted and now.reason not in wanted):
            continue
        if before is None or before.status != "True" or before.reason != now.reason:
            reason = now.reason if wanted else kind
            tell(
                reason,
                f"{now.reason}: {now.message}" if not wanted else now.message,
                action=action,
                warning=True,
            )
    if old.phase is not Phase.SUSPENDED and new.phase is Phase.SUSPENDED:
        tell("Suspended", "nothing new is started until spec.suspend is cleared", action="Suspend")
    if old.phase is Phase.SUSPENDED and new.phase is Phase.RUNNING:
        tell("Resumed", "spec.suspend is cleared", action="Resume")
    if new.phase is not old.phase and new.phase is not None and new.phase.ended:
        end = new.condition(c.SUCCEEDED)
        tell(
            new.phase.value,
            end.message if end and end.message else new.phase.value,
            action="Cancel" if new.phase is Phase.CANCELLED else "Finish",
            warning=new.phase is Phase.FAILED,
        )
    before, drained = old.condition(c.DRAINED), new.condition(c.DRAINED)
    newly_drained = drained and drained.status == "True" and not (before and before.status == "True")
    if drained and newly_drained and new.cancellation is not None:
        landed = new.cancellation.published
        extra = f"; published all the same: batch {landed}" if landed else ""
        tell("Drained", drained.message + extra, action="Drain")
    return told
