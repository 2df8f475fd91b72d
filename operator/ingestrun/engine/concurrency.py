"""Runs of one `concurrency.key`: which may start, which waits, and which is cancelled for another.

A run is *before* another that has not started if it has started itself, or was created earlier (by the UID
within one second). That order is total, so of any number of runs that have not started one is the first, and one
that has started is never judged by a run that has not. Everything is derived from the runs as they are stored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from ingestrun.engine import conditions as c
from ingestrun.engine.announce import WAITS
from ingestrun.engine.decisions import Cause
from ingestrun.model.names import OPERATOR_NAME
from ingestrun.model.run import IngestRun
from ingestrun.model.spec import ConcurrencyPolicy
from ingestrun.model.status import Phase

FORBIDDEN: Final = "ConcurrencyForbidden"
WAITS_FOR_DRAIN, WAITS_FOR_REPLACED = WAITS


@dataclass(frozen=True, slots=True, kw_only=True)
class Rival:
    """Another run of the same namespace and key, as far as it matters here."""

    name: str
    uid: str
    created: datetime
    started: bool
    """It has claimed a batch."""
    leaving: bool
    """It has ended, or is about to: cancelled, or being deleted."""
    over: bool
    """It has ended, its last pod too, and its clean-up: nothing of it can write any more."""
    replaces: bool
    """It has said in its status that it waits for those before it to be cancelled and drained."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """Why a run may not start its first batch now; `final`: nor ever."""

    reason: str
    message: str
    final: bool = False


def key_of(body: Mapping[str, Any]) -> str | None:
    """The concurrency key in a run's JSON."""
    key = ((body.get("spec") or {}).get("concurrency") or {}).get("key")
    return str(key) if key else None


def read_rival(body: Mapping[str, Any]) -> Rival:
    """Read a run's JSON; also one whose spec this version could not read as a whole."""
    meta, spec, status = body["metadata"], body.get("spec") or {}, body.get("status") or {}
    phase, said = status.get("phase"), {item["type"]: item for item in status.get("conditions") or ()}
    ended = phase is not None and Phase(phase).ended
    clean_up = ((status.get("cancellation") or {}).get("onCancel") or {}).get("state")
    cleaned = phase != Phase.CANCELLED or "onCancel" not in spec or clean_up in ("Succeeded", "Failed")
    leaving = bool(ended or spec.get("cancel") or "deletionTimestamp" in meta)
    return Rival(
        name=meta["name"],
        uid=meta["uid"],
        created=datetime.fromisoformat(meta["creationTimestamp"].replace("Z", "+00:00")),
        started="startTime" in status,
        leaving=leaving,
        over=ended and cleaned and said.get(c.DRAINED, {}).get("status") == "True",
        replaces=said.get(c.RECONCILING, {}).get("reason") == WAITS_FOR_REPLACED
        and not leaving
        and not spec.get("suspend"),
    )


def wakes(changed: Rival, other: Rival, *, gone: bool = False) -> bool:
    """Whether a change of one run, or that it is gone, may concern the other."""
    if gone or changed.leaving:
        return not other.started and not other.leaving
    return changed.replaces and not other.leaving


def bar_of(run: IngestRun, rivals: Sequence[Rival]) -> Bar | None:
    """What keeps a run from its first batch; None where nothing does, or where it has begun or is not to begin."""
    concurrency = run.spec.concurrency
    if concurrency is None or concurrency.policy is ConcurrencyPolicy.ALLOW:
        return None
    if run.status.start_time is not None or run.spec.suspend:
        return None
    before = sorted((rival for rival in rivals if _is_before(rival, run)), key=lambda it: (not it.started, it.created))
    if not before:
        return None
    staying = [rival for rival in before if not rival.leaving]
    if concurrency.policy is ConcurrencyPolicy.REPLACE:
        first = (staying or before)[0]
        message = f"run {first.name} of the same concurrency key is replaced: this one starts once it is drained"
        return Bar(reason=WAITS_FOR_REPLACED, message=message)
    if staying:
        message = (
            f"run {staying[0].name} of the concurrency key {concurrency.key} is active, and concurrency.policy is "
            "Forbid: nothing was started"
        )
        return Bar(reason=FORBIDDEN, message=message, final=True)
    message = f"run {before[0].name} of the same concurrency key has ended: this one starts once it is drained"
    return Bar(reason=WAITS_FOR_DRAIN, message=message)


def replacer_of(run: IngestRun, rivals: Sequence[Rival]) -> Rival | None:
    """The run that this one, which has not ended, has to make room for: of several the newest."""
    meta, started = run.metadata, run.status.start_time is not None
    waiting = [
        rival
        for rival in rivals
        if rival.replaces
        and not rival.started
        and rival.uid != meta.uid
        and (started or (meta.creation_timestamp, meta.uid) < (rival.created, rival.uid))
    ]
    return max(waiting, key=lambda rival: (rival.created, rival.uid), default=None)


def replaced(run: IngestRun, rivals: Sequence[Rival]) -> Cause | None:
    """Why a run is cancelled for another; None where it is not."""
    newer = replacer_of(run, rivals)
    if newer is None:
        return None
    return Cause(
        kind="Replaced",
        reason=f"replaced by {newer.name}",
        requested_by=f"{OPERATOR_NAME} on behalf of run {newer.name}",
    )


def _is_before(rival: Rival, run: IngestRun) -> bool:
    meta = run.metadata
    if rival.over or rival.uid == meta.uid:
        return False
    return rival.started or (rival.created, rival.uid) < (meta.creation_timestamp, meta.uid)
