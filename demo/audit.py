"""What the API server's audit log says about one run: when it was cancelled, and which Jobs were created when.

The log is the judge, not the operator: each line is written by the API server when it has answered a call.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

RUN_UID_LABEL = "ingestrun.dev/run-uid"
CREATED = 201


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
        return [job for job in self.jobs if job.code == CREATED and job.answered > self.cancelled.answered]


def read_trail(lines: Iterable[str], run_uid: str) -> Trail:
    """Pick a run's trail out of an audit log."""
    found = [
        (_answered(entry), entry)
        for entry in (json.loads(line) for line in lines if run_uid in line)
        if entry.get("stage") == "ResponseComplete"
    ]
    trail = Trail()
    for answered, entry in sorted(found, key=lambda pair: pair[0]):
        target = entry.get("objectRef") or {}
        code = int((entry.get("responseStatus") or {}).get("code", 0))
        call = Call(answered, _user(entry), f"{entry['verb']} {target.get('resource')}", code)
        if target.get("resource") == "jobs" and entry["verb"] == "create":
            meta = (entry.get("requestObject") or {}).get("metadata") or {}
            if (meta.get("labels") or {}).get(RUN_UID_LABEL) == run_uid:
                trail.jobs.append(Call(answered, call.user, f"create job {meta.get('name')}", code))
        elif target.get("resource") == "ingestruns" and code < 300:
            stored = entry.get("responseObject") or {}
            if (stored.get("metadata") or {}).get("uid") != run_uid:
                continue
            if trail.requested is None and (stored.get("spec") or {}).get("cancel"):
                trail.requested = Call(answered, call.user, f"{entry['verb']} ingestrun: spec.cancel", code)
            if trail.cancelled is None and (stored.get("status") or {}).get("phase") == "Cancelled":
                trail.cancelled = Call(answered, call.user, f"{entry['verb']} ingestrun: status.phase=Cancelled", code)
    return trail


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


def _answered(entry: Mapping[str, Any]) -> datetime:
    return datetime.fromisoformat(entry["stageTimestamp"])


def _user(entry: Mapping[str, Any]) -> str:
    return str((entry.get("user") or {}).get("username", "?")).rpartition(":")[2]
