"""For how long a pod may wait for its start, and when it is looked at again."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any, Final

import pytest
from tests.unit.planner.batch.test_attempt import START, job, pod

from ingestrun.model.contract import Stage
from ingestrun.model.spec import PodStart
from ingestrun.planner.batch import obstacle as obstacles
from ingestrun.planner.batch.attempt import Attempt, JobState, attempt_of
from ingestrun.planner.batch.failure_policy import FAILURE_POLICY, Failure, FailureAction, outcome_of
from ingestrun.planner.batch.obstacle import Obstacle, PodWait, StartEvent
from ingestrun.planner.batch.pipeline import Step
from ingestrun.planner.batch.pod_start import (
    START_RECHECK,
    EventSubject,
    explained_at,
    explanation_of,
    gives_up_at,
    holds,
    next_look_at_start,
    start_timed_out,
    subject_of,
)

STEP: Final = Step(index=0, stage=Stage.FETCH, name="fetch", deadline_seconds=900, retries=0, resources=None)
PLACED: Final = PodWait(since=START, placed=True, sandbox_up=False)
UP: Final = replace(PLACED, sandbox_up=True)
QUEUED: Final = PodWait(since=START, placed=False, sandbox_up=False, claims=("rates",))
UNBOUND: Final = Obstacle(
    kind="VolumeUnavailable",
    message="0/1 nodes are available: pod has unbound immediate PersistentVolumeClaims",
    since=START,
)


def at(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


def waiting(wait: PodWait | None, **more: Any) -> Attempt:
    """An attempt whose pod has not started; `more`: facts of the pod."""
    return attempt_of(job(), [replace(pod("a", started=False), wait=wait, node="n1", **more)])


def hindered(kind: str) -> Attempt:
    return waiting(PLACED, obstacle=Obstacle(kind=kind, message="it is so", since=START))


def told(uid: str, note: str, **more: Any) -> StartEvent:
    facts: dict[str, Any] = {"reason": "FailedMount", "first": at(2), "last": at(2), "name": "n", **more}
    return StartEvent(uid=uid, note=note, **facts)


@pytest.mark.parametrize(
    ("kind", "graces", "seconds"),
    [
        ("ImagePull", {}, 120),
        ("ImagePull", {"image_pull_seconds": 600}, 600),
        ("ContainerConfig", {"configuration_seconds": 30}, 30),
        ("VolumeMissing", {"configuration_seconds": 30}, 30),
        ("PodRefused", {"refused_seconds": 7}, 7),
        ("VolumeUnavailable", {"infrastructure_seconds": 300}, 300),
        ("PodSandbox", {"infrastructure_seconds": 300}, 300),
        ("StartTimeout", {"infrastructure_seconds": 300}, 300),
        # The kubelet's own deadline comes first wherever a kubelet has the pod.
        ("VolumeUnavailable", {}, 960),
        ("StartTimeout", {}, 960),
    ],
)
def test_a_grace_is_over(kind: str, graces: dict[str, int], seconds: int) -> None:
    given = PodStart(**graces)
    attempt = hindered(kind)
    assert gives_up_at(attempt, step=STEP, graces=given) == at(seconds)
    assert start_timed_out(attempt, step=STEP, graces=given, now=at(seconds - 1)) is None
    failure = start_timed_out(attempt, step=STEP, graces=given, now=at(seconds))
    assert failure == Failure(reason=kind, message=f"the pod has not started for {seconds} s: it is so")


@pytest.mark.parametrize(
    "kind",
    ["Unschedulable", "NodeMismatch", "SchedulingGated", "QuotaExceeded", "WebhookUnavailable", "ServerFailed"],
)
def test_what_is_nobodys_fault_is_waited_for(kind: str) -> None:
    attempt = hindered(kind)
    assert attempt.obstacle is not None
    assert holds(attempt.obstacle)
    assert gives_up_at(attempt, step=STEP, graces=PodStart()) is None
    assert start_timed_out(attempt, step=STEP, graces=PodStart(), now=at(10**6)) is None


def test_each_kind_of_obstacle_has_a_row_and_each_that_does_not_hold_a_grace() -> None:
    kinds = {
        *obstacles._WAITING.values(),
        *obstacles._POD_EVENTS.values(),
        *(kind for _, kind in obstacles._SCHEDULER),
        *("NodeMismatch", "Unschedulable", "SchedulingGated", "QuotaExceeded", "WebhookUnavailable", "PodRefused"),
        "JobNotStarted",
        obstacles.SERVER_FAILED,
        obstacles.START_TIMEOUT,
    }
    actions = {FAILURE_POLICY[kind].action for kind in kinds}
    assert actions == {FailureAction.HOLD, FailureAction.FAIL_BATCH}
    for kind in kinds:
        until = gives_up_at(hindered(kind), step=STEP, graces=PodStart())
        assert (until is None) is (FAILURE_POLICY[kind].action is FailureAction.HOLD), kind


@pytest.mark.parametrize(
    ("attempt", "subject", "since"),
    [
        (attempt_of(job(), []), EventSubject.JOB, 5),
        (waiting(PLACED), EventSubject.POD, 20),
        (waiting(QUEUED, obstacle=UNBOUND), EventSubject.CLAIM, 20),
        (waiting(UP), None, None),
        (waiting(QUEUED), None, None),
        (waiting(None), None, None),
        (hindered("ImagePull"), None, None),
        (waiting(PLACED, deleting_until=START), None, None),
        (attempt_of(job(suspended=True), []), None, None),
        (attempt_of(job(), [pod("a")]), None, None),
        (attempt_of(job(), [pod("a", code=0)]), None, None),
    ],
)  # fmt: skip
def test_events_are_read_only_where_no_status_tells(
    attempt: Attempt, subject: EventSubject | None, since: int | None
) -> None:
    assert subject_of(attempt) == subject
    assert explained_at(attempt) == (at(since) if since is not None else None)


def test_a_start_is_looked_at_again_as_long_as_events_may_tell_more() -> None:
    assert next_look_at_start(waiting(PLACED), now=at(3)) == at(20)
    assert next_look_at_start(waiting(PLACED), now=at(50)) == at(50) + START_RECHECK
    assert next_look_at_start(waiting(UP), now=at(50)) == at(120), "then it is told that nothing tells why"
    assert next_look_at_start(waiting(UP), now=at(130)) is None
    assert next_look_at_start(hindered("ImagePull"), now=at(50)) is None
    assert next_look_at_start(attempt_of(job(), [pod("a")]), now=at(50)) is None


def test_events_about_other_pods_explain_nothing() -> None:
    missing = 'secret "ca" not found'
    assert explanation_of(waiting(PLACED), [told("b", missing)], now=at(21)) is None
    found = explanation_of(waiting(PLACED), [told("b", "x"), told("a", missing)], now=at(21))
    assert found is not None
    assert (found.kind, found.since) == ("ContainerConfig", at(2))


def test_events_from_before_the_sandbox_was_up_explain_nothing() -> None:
    assert explanation_of(waiting(UP), [told("a", 'secret "ca" not found')], now=at(21)) is None


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (waiting(PLACED), "node n1 has not set up the pod's volumes and sandbox for more than 120 s"),
        (waiting(UP), "node n1 has not started the pod's container"),
        (waiting(QUEUED), "the scheduler has not looked at the pod for more than 120 s"),
        (attempt_of(job(), []), "the Job controller has made no pod for more than 120 s"),
    ],
)
def test_a_start_that_nothing_explains_is_told_nevertheless(attempt: Attempt, words: str) -> None:
    assert explanation_of(attempt, [], now=at(119)) is None
    found = explanation_of(attempt, [], now=at(120))
    assert found is not None
    assert (found.kind, found.since) == ("StartTimeout", START)
    assert words in found.message
    assert "nothing tells why" in found.message
    assert not holds(found)


def test_an_event_that_is_told_once_is_remembered_until_the_sandbox_is_up() -> None:
    known = Obstacle(kind="VolumeUnavailable", message="FailedAttachVolume: Multi-Attach error", since=START)
    assert explanation_of(waiting(PLACED), [], now=at(7200), before=known) == known
    assert explanation_of(waiting(UP), [], now=at(100), before=known) is None
    earlier = replace(known, since=at(-1))
    assert explanation_of(waiting(PLACED), [], now=at(100), before=earlier) is None, "of a pod before"
    secret = replace(known, kind="ContainerConfig")
    assert explanation_of(waiting(PLACED), [], now=at(100), before=secret) is None, "the kubelet repeats that"


def test_an_unknown_event_is_quoted() -> None:
    found = explanation_of(waiting(PLACED), [told("a", "gone fishing", reason="KubeletOnHoliday")], now=at(121))
    assert found is not None
    assert found.message.endswith("its latest Event is KubeletOnHoliday: gone fishing")


def test_a_deadline_that_is_over_names_the_last_obstacle() -> None:
    ended = replace(
        pod("a", started=True), ended=True, exit_code=None, reason="DeadlineExceeded", pod_reason="DeadlineExceeded"
    )
    last = Obstacle(kind="VolumeUnavailable", message="FailedAttachVolume: Multi-Attach error", since=START)
    attempt = replace(attempt_of(job(finished=JobState.FAILED), [ended]), last_obstacle=last)
    failure = outcome_of(attempt)
    assert isinstance(failure, Failure)
    assert failure.reason == "DeadlineExceeded"
    assert failure.message.endswith("activeDeadlineSeconds: VolumeUnavailable: FailedAttachVolume: Multi-Attach error")


def test_a_job_that_its_controller_does_not_begin_with_is_told_and_holds_the_run() -> None:
    silent = attempt_of(replace(job(), created=START, started_at=None), [])
    assert next_look_at_start(silent, now=at(1)) == at(120)
    assert explanation_of(silent, [], now=at(119)) is None
    obstacle = explanation_of(silent, [], now=at(120))
    assert obstacle is not None
    assert (obstacle.kind, obstacle.since) == ("JobNotStarted", START)
    assert "the Job controller has not begun with the Job for more than 120 s" in obstacle.message
    assert holds(obstacle)
    queued = replace(silent, job=replace(silent.job, suspended=True))
    assert explanation_of(queued, [], now=at(500)) is None, "it is to be admitted first"
