"""What the demo reads out of the audit log: it must see a Job that came late, and take no other run's for one."""

from __future__ import annotations

import json
from typing import Any

from dev.demo.audit import read_trail, timeline

UID = "11111111-2222-3333-4444-555555555555"


def entry(second: float, verb: str, resource: str, name: str = "", **more: Any) -> str:
    full = {
        "stage": "ResponseComplete",
        "stageTimestamp": f"2026-11-23T03:00:{second:09.6f}Z",
        "verb": verb,
        "objectRef": {"resource": resource, "namespace": "default", "name": name},
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


def dead(second: float, phase: str, completed: str | None = None) -> str:
    """A status write whose writer was killed before the answer."""
    asked = {"metadata": {"resourceVersion": "7"}, "status": {"phase": phase, "completionTime": completed}}
    more = {"requestObject": asked, "responseStatus": {"code": 504}}
    return entry(second, "patch", "ingestruns", name="geo", **more)


def at(second: float, phase: str, completed: str) -> str:
    stored = {"metadata": {"uid": UID, "name": "geo"}, "status": {"phase": phase, "completionTime": completed}}
    return entry(second, "patch", "ingestruns", name="geo", responseObject=stored)


def test_a_killed_writers_cancelled_counts_when_the_next_version_is_its_own() -> None:
    lines = [at(1, "Running", ""), dead(2, "Cancelled", "T2"), job(3, "late"), at(4, "Cancelled", "T2")]
    trail = read_trail(lines, UID)
    assert trail.cancelled is not None
    assert (trail.cancelled.code, trail.cancelled.answered.second) == (504, 2)
    assert [call.what for call in trail.created_after] == ["create job late"]


def test_a_killed_writers_cancelled_that_was_not_stored_does_not() -> None:
    lines = [at(1, "Running", ""), dead(2, "Cancelled", "T2"), job(3, "in time"), at(4, "Cancelled", "T4")]
    trail = read_trail(lines, UID)
    assert trail.cancelled is not None
    assert trail.cancelled.answered.second == 4
    assert trail.created_after == []


def test_a_killed_writers_other_writes_are_no_cancel() -> None:
    trail = read_trail([at(1, "Running", ""), dead(2, "Running"), at(4, "Cancelled", "T4")], UID)
    assert trail.cancelled is not None
    assert trail.cancelled.answered.second == 4


def test_a_killed_writers_last_word_counts() -> None:
    trail = read_trail([at(1, "Running", ""), dead(2, "Cancelled", "T2"), job(3, "late")], UID)
    assert len(trail.created_after) == 1


def test_a_killed_writers_job_counts_unless_it_was_created_again() -> None:
    cancelled = at(3, "Cancelled", "T3")
    trail = read_trail([job(1, "a", code=504), job(2, "a", code=409), cancelled, job(4, "b", code=504)], UID)
    assert [call.what for call in trail.created] == ["create job a", "create job b"]
    assert [call.what for call in trail.created_after] == ["create job b"]
    again = read_trail([job(1, "a", code=504), job(2, "a"), cancelled], UID)
    assert [call.answered.second for call in again.created] == [2]


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
