"""The API server's audit log about one run: when it was cancelled, and which Jobs were created when.

The log is the judge, not the operator, because the API server writes each line when it has answered a call. A call
whose client is killed meanwhile ends as a 504, and its object may be stored all the same. So such a call counts as
done, unless later calls show that nothing was stored.

The demo and the tests read the log by this module; tests/race, whose watches show more than the log does, by its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

RUN_UID_LABEL = "ingestrun.dev/run-uid"
CREATED = 201
UNANSWERED = 500
"""From this status code on the answer does not say whether the call was carried out."""

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
    """The calls about one run, in the order in which they were answered."""

    requested: Call | None = None
    """The write that set `spec.cancel`."""
    cancelled: Call | None = None
    """The first write after which the stored run was Cancelled."""
    jobs: list[Call] = field(default_factory=list)
    """The creates of Jobs that carry the run's UID."""
    grants: list[Call] = field(default_factory=list)
    """The writes that gave the workers of a pool batches, or permission to publish."""

    @property
    def granted_after(self) -> list[Call]:
        """The grants that were answered after Cancelled was stored; there must be none."""
        if self.cancelled is None:
            return []
        return [grant for grant in self.grants if grant.answered > self.cancelled.answered]

    @property
    def created_after(self) -> list[Call]:
        """The creates of Jobs that were answered after Cancelled was stored; there must be none."""
        if self.cancelled is None:
            return []
        return [job for job in self.created if job.answered > self.cancelled.answered]

    @property
    def created(self) -> list[Call]:
        """The creates that stored a Job."""
        return [self.jobs[number] for number in _stored([(job.what, job.code) for job in self.jobs])]


def read_trail(lines: Iterable[str], run_uid: str) -> Trail:
    """Pick a run's trail out of an audit log."""
    # An unanswered status write has no UID, because its patch lacks it and there is no answer.
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
    trail.grants = [_call(entry, what) for entry, what in grants(writes)]
    at = first_cancelled(writes)
    if at is not None:
        trail.cancelled = _call(writes[at], f"{writes[at]['verb']} ingestrun: status.phase=Cancelled")
    return trail


def first_cancelled(writes: Sequence[Entry]) -> int | None:
    """Return which of a run's writes, in the order of their answers, stored `phase=Cancelled`; None if none did.

    An unanswered write did if the next version seen has the same completionTime, or if no later version is seen.
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


def grants(writes: Iterable[Entry]) -> Iterator[tuple[Entry, str]]:
    """Yield those of a run's writes, in the order of their answers, that gave batches or permissions, and what."""
    before: Mapping[str, Any] = {}
    for entry in writes:
        stored = _stored_object(entry)
        if not stored:
            continue
        batches = (stored.get("status") or {}).get("batches") or {}
        for field_name, what in (("claimed", "claimed"), ("publishing", "may publish")):
            more = _indexes(batches.get(field_name, "")) - _indexes(before.get(field_name, ""))
            if more:
                yield entry, f"patch ingestrun: {what}: batch {', '.join(map(str, sorted(more)))}"
        before = batches


def _indexes(ranges: str) -> set[int]:
    pairs = [part.partition("-") for part in ranges.split(",") if part]
    return {index for first, _, last in pairs for index in range(int(first), int(last or first) + 1)}


def stored_creates(creates: Sequence[Entry]) -> list[Entry]:
    """Return those of the creates, in the order of their answers, that stored an object.

    An unanswered create did unless the same name was created again afterwards, which a stored object would prevent.
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
    """Return the status code of the call's answer."""
    return int((entry.get("responseStatus") or {}).get("code", 0))


def name_of(entry: Entry) -> str:
    """Return the name of the call's object."""
    named = (entry.get("objectRef") or {}).get("name")
    return str(named or ((entry.get("requestObject") or {}).get("metadata") or {}).get("name"))


def _stored_object(entry: Entry) -> Mapping[str, Any]:
    return (entry.get("responseObject") or {}) if code_of(entry) < 300 else {}


def _call(entry: Entry, what: str) -> Call:
    return Call(_answered(entry), _user(entry), what, code_of(entry))


def timeline(trail: Trail, starts: int = 6) -> str:
    """Format the trail's end: the last starts, the request and Cancelled, with times relative to Cancelled.

    The starts are Jobs or, in a pool, what was granted to its workers.
    """
    if trail.cancelled is None:
        return "the audit log has no write of status.phase=Cancelled for this run\n"
    pooled = any("may publish" in grant.what for grant in trail.grants)
    calls = sorted(
        [*(trail.grants if pooled else trail.jobs)[-starts:], *filter(None, [trail.requested, trail.cancelled])],
        key=lambda call: call.answered,
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
