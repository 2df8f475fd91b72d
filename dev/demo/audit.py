"""What the API server's audit log says about one run: when it was cancelled, and which Jobs were created when.

The log is the judge, not the operator: each line is written by the API server when it has answered a call. A client
that is killed meanwhile gets no answer: its call ends as a 504, and what it asked for may be stored all the same. So
such a call counts, unless what came after it shows that it was not stored.

The demo and the tests read the log by this module; tests/race, whose watches show more than the log does, by its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

RUN_UID_LABEL = "ingestrun.dev/run-uid"
CREATED = 201
UNANSWERED = 500
"""From this code on nobody was told whether the call has been done."""

Entry = Mapping[str, Any]
"""One line of the log."""


@dataclass(frozen=True)
class Call:
    """A call that the API server has answered."""

    answered: datetime
    user: str
    what: str
    code: int


@dataclass
class Trail:
    """The calls that concern one run, in the order in which they were answered."""

    requested: Call | None = None
    """The write that set `spec.cancel`."""
    cancelled: Call | None = None
    """The first write after which the stored run was Cancelled."""
    jobs: list[Call] = field(default_factory=list)
    """The creates of Jobs that carry the run's UID."""

    @property
    def created_after(self) -> list[Call]:
        """Jobs whose creation was answered after Cancelled was stored: there must be none."""
        if self.cancelled is None:
            return []
        return [job for job in self.created if job.answered > self.cancelled.answered]

    @property
    def created(self) -> list[Call]:
        """The creates by which a Job was stored."""
        return [self.jobs[number] for number in _stored([(job.what, job.code) for job in self.jobs])]


def read_trail(lines: Iterable[str], run_uid: str) -> Trail:
    """Pick a run's trail out of an audit log."""
    # A status write that was not answered names no UID: neither in its patch nor in an answer.
    concerned = (line for line in lines if run_uid in line or ("ingestruns" in line and "Cancelled" in line))
    found = [entry for entry in map(json.loads, concerned) if entry.get("stage") == "ResponseComplete"]
    found.sort(key=_answered)
    names = {
        (entry["objectRef"].get("namespace"), meta.get("name"))
        for entry in found
        if (meta := _stored_object(entry).get("metadata") or {}).get("uid") == run_uid
    }
    trail, writes = Trail(), []
    for entry in found:
        target = entry.get("objectRef") or {}
        if target.get("resource") == "jobs" and entry["verb"] == "create":
            meta = (entry.get("requestObject") or {}).get("metadata") or {}
            if (meta.get("labels") or {}).get(RUN_UID_LABEL) == run_uid:
                trail.jobs.append(_call(entry, f"create job {meta.get('name')}"))
        elif target.get("resource") == "ingestruns":
            stored = _stored_object(entry)
            uid = (stored.get("metadata") or {}).get("uid")
            unanswered = code_of(entry) >= UNANSWERED and (target.get("namespace"), target.get("name")) in names
            if uid == run_uid or unanswered:
                writes.append(entry)
            if uid == run_uid and trail.requested is None and (stored.get("spec") or {}).get("cancel"):
                trail.requested = _call(entry, f"{entry['verb']} ingestrun: spec.cancel")
    at = first_cancelled(writes)
    if at is not None:
        trail.cancelled = _call(writes[at], f"{writes[at]['verb']} ingestrun: status.phase=Cancelled")
    return trail


def first_cancelled(writes: Sequence[Entry]) -> int | None:
    """Which of a run's writes, in the order of their answers, has stored `phase=Cancelled`; None where none has.

    One that was not answered did it if the version that is seen next has its very completionTime, or if none is seen.
    """
    unanswered: list[int] = []
    for number, entry in enumerate(writes):
        if code_of(entry) >= UNANSWERED:
            asked = (entry.get("requestObject") or {}).get("status") or {}
            if asked.get("phase") == "Cancelled":
                unanswered.append(number)
            continue
        status = _stored_object(entry).get("status") or {}
        if status.get("phase") == "Cancelled":
            same = (
                other
                for other in unanswered
                if writes[other]["requestObject"]["status"].get("completionTime") == status.get("completionTime")
            )
            return next(same, number)
    return unanswered[0] if unanswered else None


def stored_creates(creates: Sequence[Entry]) -> list[Entry]:
    """Those of the creates, in the order of their answers, by which something was stored.

    One that was not answered did it if the same name was not created again afterwards: it would be there already.
    """
    named = [(name_of(entry), code_of(entry)) for entry in creates]
    return [creates[number] for number in _stored(named)]


def _stored(named: Sequence[tuple[str, int]]) -> list[int]:
    return [
        number
        for number, (name, code) in enumerate(named)
        if code == CREATED or (code >= UNANSWERED and (name, CREATED) not in named[number + 1 :])
    ]


def code_of(entry: Entry) -> int:
    """How the call was answered."""
    return int((entry.get("responseStatus") or {}).get("code", 0))


def name_of(entry: Entry) -> str:
    """The name of the object that the call is about."""
    named = (entry.get("objectRef") or {}).get("name")
    return str(named or ((entry.get("requestObject") or {}).get("metadata") or {}).get("name"))


def _stored_object(entry: Entry) -> Mapping[str, Any]:
    return (entry.get("responseObject") or {}) if code_of(entry) < 300 else {}


def _call(entry: Entry, what: str) -> Call:
    return Call(_answered(entry), _user(entry), what, code_of(entry))


def timeline(trail: Trail, jobs: int = 6) -> str:
    """The trail's end as a table: the last Jobs, the request, Cancelled; times relative to Cancelled."""
    if trail.cancelled is None:
        return "the audit log has no write of status.phase=Cancelled for this run\n"
    calls = sorted(
        [*trail.jobs[-jobs:], *filter(None, [trail.requested, trail.cancelled])], key=lambda call: call.answered
    )
    lines = []
    for call in calls:
        offset = (call.answered - trail.cancelled.answered).total_seconds()
        time = call.answered.strftime("%H:%M:%S.%f")
        lines.append(f"  {time}  {offset:>+9.3f} s  {call.code}  {call.what:<72} {call.user}")
    return "\n".join(lines) + "\n"


def _answered(entry: Entry) -> datetime:
    return datetime.fromisoformat(entry["stageTimestamp"])


def _user(entry: Entry) -> str:
    return str((entry.get("user") or {}).get("username", "?")).rpartition(":")[2]
