"""The rules among runs of one `concurrency.key`: a run may start, has to wait, or is cancelled for another run.

A run is *before* another that has not started if it has started itself, or was created earlier (by the UID
within one second). That order is total, so of any number of runs that have not started one is the first, and one
that has started is never judged by a run that has not. Everything is derived from the runs as they are stored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from ingestrun.model.names import OPERATOR_NAME
from ingestrun.model.run import IngestRun, has_ended
from ingestrun.model.spec import ConcurrencyPolicy
from ingestrun.model.status import Phase
from ingestrun.model.times import parse_time
from ingestrun.planner.actions import CancelCause
from ingestrun.planner.status import conditions as c
from ingestrun.planner.status.events import WAITING_FOR_DRAIN, WAITING_FOR_REPLACED

FORBIDDEN: Final = "ConcurrencyForbidden"


@dataclass(frozen=True, slots=True, kw_only=True)
class ConcurrentRun:
    """The relevant fields of another run of the same namespace and concurrency key."""

    name: str
    uid: str
    created: datetime
    started: bool
    """True if the run has claimed a batch."""
    leaving: bool
    """True if the run has ended or is about to, because it is cancelled or being deleted."""
    over: bool
    """True if the run, its last pod and its clean-up have ended, so that nothing of the run can write any more."""
    replaces: bool
    """True if by its status the run waits until the runs before it are cancelled and drained."""

    @classmethod
    def read(cls, body: Mapping[str, Any]) -> ConcurrentRun:
        """Read a run's JSON, even if this version cannot read its spec as a whole."""
        meta, spec, status = body["metadata"], body.get("spec") or {}, body.get("status") or {}
        ended = has_ended(body)
        leaving = bool(ended or spec.get("cancel") or "deletionTimestamp" in meta)
        conditions = {item["type"]: item for item in status.get("conditions") or ()}
        waits_to_replace = conditions.get(c.RECONCILING, {}).get("reason") == WAITING_FOR_REPLACED
        drained = conditions.get(c.DRAINED, {}).get("status") == "True"
        return cls(
            name=meta["name"],
            uid=meta["uid"],
            created=parse_time(meta["creationTimestamp"]),
            started="startTime" in status,
            leaving=leaving,
            over=ended and drained and _cleaned_up(spec, status),
            replaces=waits_to_replace and not leaving and not spec.get("suspend"),
        )


def _cleaned_up(spec: Mapping[str, Any], status: Mapping[str, Any]) -> bool:
    """Tell whether the clean-up of a cancelled run has ended, if it has one."""
    if status.get("phase") != Phase.CANCELLED or "onCancel" not in spec:
        return True
    clean_up = (status.get("cancellation") or {}).get("onCancel") or {}
    return clean_up.get("state") in ("Succeeded", "Failed")


@dataclass(frozen=True, slots=True, kw_only=True)
class StartBlock:
    """Obstacle to a run's first batch; with `final` the run may never start."""

    reason: str
    message: str
    final: bool = False


def concurrency_key_of(body: Mapping[str, Any]) -> str | None:
    """Return the concurrency key in a run's JSON."""
    key = ((body.get("spec") or {}).get("concurrency") or {}).get("key")
    return str(key) if key else None


def affects(changed: ConcurrentRun, other: ConcurrentRun, *, gone: bool = False) -> bool:
    """Tell whether a change of one run, or that it is gone, may affect the other."""
    if gone or changed.leaving:
        return not other.started and not other.leaving
    return changed.replaces and not other.leaving


def start_block(run: IngestRun, peers: Sequence[ConcurrentRun]) -> StartBlock | None:
    """Return why the run may not claim its first batch yet; None if it may, has started, or is suspended."""
    concurrency = run.spec.concurrency
    if concurrency is None or concurrency.policy is ConcurrencyPolicy.ALLOW:
        return None
    if run.status.start_time is not None or run.spec.suspend:
        return None
    before = sorted(
        (peer for peer in peers if _is_before(peer, run)), key=lambda peer: (not peer.started, peer.created)
    )
    if not before:
        return None
    staying = [peer for peer in before if not peer.leaving]
    if concurrency.policy is ConcurrencyPolicy.REPLACE:
        first = (staying or before)[0]
        message = f"run {first.name} of the same concurrency key is replaced: this one starts once it is drained"
        return StartBlock(reason=WAITING_FOR_REPLACED, message=message)
    if staying:
        message = (
            f"run {staying[0].name} of the concurrency key {concurrency.key} is active, and concurrency.policy is "
            "Forbid: nothing was started"
        )
        return StartBlock(reason=FORBIDDEN, message=message, final=True)
    message = f"run {before[0].name} of the same concurrency key has ended: this one starts once it is drained"
    return StartBlock(reason=WAITING_FOR_DRAIN, message=message)


def replacing_run(run: IngestRun, peers: Sequence[ConcurrentRun]) -> ConcurrentRun | None:
    """Return the run for which this one, which has not ended, has to make room; the newest if there are several."""
    meta, started = run.metadata, run.status.start_time is not None
    waiting = [
        peer
        for peer in peers
        if peer.replaces
        and not peer.started
        and peer.uid != meta.uid
        and (started or (meta.creation_timestamp, meta.uid) < (peer.created, peer.uid))
    ]
    return max(waiting, key=lambda peer: (peer.created, peer.uid), default=None)


def replacement_cause(run: IngestRun, peers: Sequence[ConcurrentRun]) -> CancelCause | None:
    """Return why a run is cancelled for another; None if it is not."""
    newer = replacing_run(run, peers)
    if newer is None:
        return None
    return CancelCause(
        kind="Replaced",
        reason=f"replaced by {newer.name}",
        requested_by=f"{OPERATOR_NAME} on behalf of run {newer.name}",
    )


def _is_before(peer: ConcurrentRun, run: IngestRun) -> bool:
    meta = run.metadata
    if peer.over or peer.uid == meta.uid:
        return False
    return peer.started or (peer.created, peer.uid) < (meta.creation_timestamp, meta.uid)
