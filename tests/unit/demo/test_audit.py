"""What the demo reads out of the audit log: it must see a Job that came late, and take no other run's for one."""

from __future__ import annotations

import json
from typing import Any

from demo.audit import read_trail, timeline

UID = "11111111-2222-3333-4444-555555555555"


def entry(second: float, verb: str, resource: str, **more: Any) -> str:
    full = {
        "stage": "ResponseComplete",
        "stageTimestamp": f"2026-11-23T03:00:{second:09.6f}Z",
        "verb": verb,
        "objectRef": {"resource": resource},
        "user": {"username": "system:serviceaccount:ingestrun-system:ingestrun-operator"},
        "responseStatus": {"code": 200},
        **more,
    }
    return json.dumps(full)


def job(second: float, name: str, uid: str = UID, code: int = 201) -> str:
    meta = {"name": name, "labels": {"ingestrun.dev/run-uid": uid}, "ownerReferences": [{"uid": uid}]}
    return entry(second, "create", "jobs", requestObject={"metadata": meta}, responseStatus={"code": code})


def run(second: float, phase: str, *, cancel: bool = False, uid: str = UID, code: int = 200) -> str:
    stored = {"metadata": {"uid": uid}, "spec": {"cancel": True} if cancel else {}, "status": {"phase": phase}}
    return entry(second, "patch", "ingestruns", responseObject=stored, responseStatus={"code": code})


def test_jobs_before_cancelled_are_fine() -> None:
    trail = read_trail(
        [job(1, "a"), run(2, "Running", cancel=True), job(2.5, "b"), run(3, "Cancelled", cancel=True)], UID
    )
    assert trail.cancelled is not None
    assert [call.what for call in trail.jobs] == ["create job a", "create job b"]
    assert trail.created_after == []
    assert trail.requested is not None
    assert trail.requested.answered < trail.cancelled.answered


def test_a_job_after_cancelled_is_found() -> None:
    trail = read_trail([run(3, "Cancelled", cancel=True), job(3.000001, "late")], UID)
    assert [call.what for call in trail.created_after] == ["create job late"]


def test_the_first_write_of_cancelled_counts_not_a_later_one() -> None:
    lines = [run(3, "Cancelled", cancel=True), job(4, "late"), run(5, "Cancelled", cancel=True)]
    assert len(read_trail(lines, UID).created_after) == 1


def test_a_job_that_was_refused_was_not_created() -> None:
    assert read_trail([run(3, "Cancelled", cancel=True), job(4, "refused", code=403)], UID).created_after == []


def test_another_runs_jobs_and_a_write_that_failed_count_for_nothing() -> None:
    other = "99999999-2222-3333-4444-555555555555"
    lines = [run(1, "Cancelled", code=409), run(2, "Cancelled", uid=other), job(4, "theirs", uid=other)]
    trail = read_trail(lines, UID)
    assert trail.cancelled is None
    assert trail.jobs == []
    assert "no write of status.phase=Cancelled" in timeline(trail)


def test_the_timeline_is_relative_to_cancelled() -> None:
    trail = read_trail([job(1, "a"), run(2, "Running", cancel=True), run(3, "Cancelled", cancel=True)], UID)
    lines = timeline(trail).splitlines()
    assert ["-2.000 s" in lines[0], "-1.000 s" in lines[1], "+0.000 s" in lines[2]] == [True] * 3
