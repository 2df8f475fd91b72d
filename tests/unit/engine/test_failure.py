"""From facts to verdict: one row a case."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingestrun.engine.facts import JobFacts, JobState, JobView, PodFacts
from ingestrun.engine.failure import Failure, judge, retry_delay
from ingestrun.model.contract import StageResult
from ingestrun.model.spec import Backoff

NOW = datetime(2026, 11, 23, tzinfo=UTC)
DONE = '{"v":"v1","outcome":"done","read":3,"written":2,"rejected":1}'


def job(state: JobState, *, reason: str | None = None, message: str | None = None, pod: PodFacts | None) -> JobView:
    facts = JobFacts(
        namespace="default",
        name="flights-0-fetch-0",
        uid="j",
        resource_version="1",
        run_uid="r",
        batch=0,
        step=0,
        attempt=0,
        deleting=False,
        finished=state,
        finished_at=NOW,
        reason=reason,
        message=message,
    )
    return JobView(job=facts, state=state, pod=pod)


def pod(**facts: Any) -> PodFacts:
    base: dict[str, Any] = {
        "name": "p",
        "uid": "p",
        "job_uid": "j",
        "run_uid": "r",
        "started": True,
        "ended": True,
        "exit_code": 0,
        "reason": "Completed",
        "message": None,
        "obstacle": None,
    }
    return PodFacts(**{**base, **facts})


def test_only_exit_0_with_a_valid_done_is_a_success() -> None:
    verdict = judge(job(JobState.SUCCEEDED, pod=pod(message=DONE)))
    assert isinstance(verdict, StageResult)
    assert (verdict.read, verdict.written, verdict.rejected) == (3, 2, 1)


@pytest.mark.parametrize(
    ("ended", "reason", "permanent", "words"),
    [
        (job(JobState.SUCCEEDED, pod=None), "ResultMissing", False, "its pod and with it the result is gone"),
        (job(JobState.SUCCEEDED, pod=pod(ended=False)), "ResultMissing", False, "gone"),
        (job(JobState.SUCCEEDED, pod=pod(message=None)), "ResultInvalid", False, "left no result"),
        (job(JobState.SUCCEEDED, pod=pod(message="x" * 1025)), "ResultInvalid", False, "1025 bytes"),
        (job(JobState.SUCCEEDED, pod=pod(message="{")), "ResultInvalid", False, "not valid under contract v1"),
        (job(JobState.SUCCEEDED, pod=pod(message='{"v":"v9","outcome":"done"}')), "ResultInvalid", False, "v:"),
        (job(JobState.SUCCEEDED, pod=pod(message='{"v":"v1","outcome":"failed"}')), "ResultInvalid", False, "'failed'"),
        (
            job(JobState.SUCCEEDED, pod=pod(message='{"v":"v1","outcome":"cancelled","message":"after 3 rows"}')),
            "WorkerCancelled",
            False,
            "a cancel that this run does not have: after 3 rows",
        ),
        (job(JobState.FAILED, pod=pod(exit_code=1, reason="Error")), "Error", False, "exit code 1"),
        (
            job(JobState.FAILED, pod=pod(exit_code=1, message='{"v":"v1","outcome":"failed","message":"404"}')),
            "Error",
            False,
            "exit code 1: 404",
        ),
        (job(JobState.FAILED, pod=pod(exit_code=65, reason="Error")), "PermanentError", True, "exit code 65"),
        (job(JobState.FAILED, pod=pod(exit_code=137, reason="OOMKilled")), "OOMKilled", False, "memory"),
        (job(JobState.FAILED, reason="DeadlineExceeded", pod=None), "DeadlineExceeded", False, "activeDeadline"),
        (job(JobState.FAILED, pod=pod(exit_code=None, reason="Evicted", message="low")), "Evicted", False, "low"),
        (job(JobState.FAILED, reason="BackoffLimitExceeded", pod=None), "BackoffLimitExceeded", False, "exit code"),
    ],
)
def test_verdicts(ended: JobView, reason: str, permanent: bool, words: str) -> None:
    verdict = judge(ended)
    assert isinstance(verdict, Failure)
    assert (verdict.reason, verdict.permanent) == (reason, permanent)
    assert words in verdict.message


def test_long_last_words_keep_their_end() -> None:
    verdict = judge(job(JobState.FAILED, pod=pod(exit_code=1, message="a" * 900 + " the cause")))
    assert isinstance(verdict, Failure)
    assert verdict.message.endswith("the cause")
    assert len(verdict.message) < 300


@given(attempt=st.integers(0, 200), first=st.integers(0, 1000), most=st.integers(0, 1000), identity=st.text())
def test_backoff_doubles_to_its_cap_with_jitter(attempt: int, first: int, most: int, identity: str) -> None:
    backoff = Backoff(initial_seconds=first, max_seconds=most)
    seconds = retry_delay(backoff, identity=identity, attempt=attempt).total_seconds()
    full = min(most, first * 2 ** min(attempt, 30))
    assert 0.8 * full <= seconds + 1e-6
    assert seconds <= full
    assert seconds == retry_delay(backoff, identity=identity, attempt=attempt).total_seconds()
