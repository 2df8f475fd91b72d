"""From facts to verdict: one row a case."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingestrun.model.contract import StageResult
from ingestrun.model.spec import Backoff
from ingestrun.planner.batch.attempt import Attempt, JobState, ObservedJob, ObservedPod
from ingestrun.planner.batch.failure_policy import (
    FAILURE_POLICY,
    Failure,
    FailureAction,
    FailurePolicyRule,
    RetryBudget,
    outcome_of,
    rule_of,
)
from ingestrun.planner.batch.retry import retry_delay

DOCS = Path(__file__).parents[4] / "docs" / "failures.md"
NOW = datetime(2026, 11, 23, tzinfo=UTC)
DONE = '{"v":"v1","outcome":"done","read":3,"written":2,"rejected":1}'


def job(state: JobState, *, reason: str | None = None, message: str | None = None, pod: ObservedPod | None) -> Attempt:
    facts = ObservedJob(
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
    return Attempt(job=facts, state=state, pod=pod)


def pod(**facts: Any) -> ObservedPod:
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
    return ObservedPod(**{**base, **facts})


def test_only_exit_0_with_a_valid_done_is_a_success() -> None:
    verdict = outcome_of(job(JobState.SUCCEEDED, pod=pod(message=DONE)))
    assert isinstance(verdict, StageResult)
    assert (verdict.read, verdict.written, verdict.rejected) == (3, 2, 1)


def test_a_result_that_says_done_counts_though_its_pod_was_ended_for_the_deadline() -> None:
    """The container was done, or was let finish what it had begun to commit."""
    assert isinstance(outcome_of(overdue(0, message=DONE)), StageResult)
    assert isinstance(outcome_of(job(JobState.SUCCEEDED, pod=pod(message=DONE, deleting_until=NOW))), StageResult)
    failed = outcome_of(overdue(143, message=DONE))
    assert isinstance(failed, Failure)
    assert failed.reason == "DeadlineExceeded"


RETRY = FailurePolicyRule(FailureAction.RETRY, RetryBudget.RETRIES)
FREE = FailurePolicyRule(FailureAction.RETRY, RetryBudget.DISRUPTIONS)
MEMORY = FailurePolicyRule(FailureAction.RETRY_WITH_MORE_MEMORY, RetryBudget.MEMORY)
FAIL_BATCH = FailurePolicyRule(FailureAction.FAIL_BATCH)


def ended(**facts: Any) -> Attempt:
    """A failed Job whose pod is like this."""
    return job(JobState.FAILED, reason="BackoffLimitExceeded", pod=pod(**{"exit_code": 1, "reason": "Error", **facts}))


def overdue(exit_code: int | None = 143, **facts: Any) -> Attempt:
    """A Job whose pod the kubelet has ended for its deadline; its state is as `facts.view` has it."""
    facts = {"pod_reason": "DeadlineExceeded", "reason": "Error", **facts}
    state = JobState.SUCCEEDED if exit_code == 0 else JobState.FAILED
    return job(state, reason="BackoffLimitExceeded", pod=pod(exit_code=exit_code, **facts))


def done(message: str | None) -> Attempt:
    """A complete Job whose container left this."""
    return job(JobState.SUCCEEDED, pod=pod(message=message))


def gone_well(**facts: Any) -> Attempt:
    """A Job whose container ended with 0 and left no result: it handles SIGTERM."""
    return job(JobState.SUCCEEDED, pod=pod(**facts))


STOPPED = '{"v":"v1","outcome":"cancelled","message":"after 3 rows"}'
LOW = "The node was low on resource: memory."
PRESSED = "Pod was rejected: The node had condition: [DiskPressure]. "
TMP = 'Usage of EmptyDir volume "tmp" exceeds the limit "1Gi".'


@pytest.mark.parametrize(
    ("facts", "reason", "rule", "words"),
    [
        # what the container left
        (job(JobState.SUCCEEDED, pod=None), "ResultMissing", RETRY, "its pod and with it the result is gone"),
        (job(JobState.SUCCEEDED, pod=pod(ended=False)), "ResultMissing", RETRY, "gone"),
        (done(None), "ResultInvalid", RETRY, "left no result"),
        (done(" \n"), "ResultInvalid", RETRY, "left no result"),
        (done("x" * 1025), "ResultInvalid", RETRY, "1025 bytes"),
        (done("x" * 4096), "ResultInvalid", RETRY, "4096 bytes, at most 1024"),
        (done("{"), "ResultInvalid", RETRY, "not valid under contract v1"),
        (done("[1, 2]"), "ResultInvalid", RETRY, "not valid under contract v1"),
        (done("<html>502 Bad Gateway</html>"), "ResultInvalid", RETRY, "not valid under contract v1"),
        (done('{"v":"v9","outcome":"done"}'), "ResultInvalid", RETRY, "v:"),
        (done('{"outcome":"done"}'), "ResultInvalid", RETRY, "v:"),
        (done('{"v":"v1","outcome":"perhaps"}'), "ResultInvalid", RETRY, "outcome:"),
        (done('{"v":"v1","outcome":"done","read":-1}'), "ResultInvalid", RETRY, "read:"),
        (done('{"v":"v1","outcome":"done","read":"9"}'), "ResultInvalid", RETRY, "read:"),
        (done('{"v":"v1","outcome":"done","nextCursor":"a\\u0000b"}'), "ResultInvalid", RETRY, "nextCursor:"),
        (done('{"v":"v1","outcome":"failed"}'), "ResultInvalid", RETRY, "'failed'"),
        (done(STOPPED), "WorkerCancelled", RETRY, "a cancel that this run does not have: after 3 rows"),
        # what the container did
        (ended(), "Error", RETRY, "exit code 1"),
        (ended(exit_code=255, reason=None), "Error", RETRY, "exit code 255"),
        (ended(message='{"v":"v1","outcome":"failed","message":"404"}'), "Error", RETRY, "exit code 1: 404"),
        (ended(message="Traceback\n  x.py\nValueError: 7\n\n"), "Error", RETRY, "exit code 1: ValueError: 7"),
        (ended(exit_code=65), "PermanentError", FAIL_BATCH, "exit code 65"),
        (ended(exit_code=65, disruption="PreemptionByScheduler"), "PermanentError", FAIL_BATCH, "exit code 65"),
        (ended(exit_code=137, reason="OOMKilled"), "OOMKilled", MEMORY, "memory"),
        (ended(exit_code=128, reason="StartError", message="no such file"), "StartError", RETRY, "no such file"),
        (
            ended(exit_code=128, reason="StartError", message=f"{'OCI: ' * 90}exec: argument list too long: unknown"),
            "StartError",
            RETRY,
            "exit code 128: a variable or an argument is too large for a process (argument list too long): "
            "each may have 131071 bytes, also one that comes of a Secret or a ConfigMap",
        ),
        (ended(exit_code=137), "Error", RETRY, "exit code 137"),
        (overdue(), "DeadlineExceeded", RETRY, "the stage ran longer than its activeDeadlineSeconds"),
        (overdue(137), "DeadlineExceeded", RETRY, "ran longer"),
        (overdue(137, deleting_until=NOW), "DeadlineExceeded", RETRY, "ran longer"),
        (overdue(1, message="Traceback\nKeyboardInterrupt"), "DeadlineExceeded", RETRY, "ran longer"),
        (overdue(65), "DeadlineExceeded", RETRY, "ran longer"),
        (overdue(0, message=None), "DeadlineExceeded", RETRY, "ran longer"),
        (overdue(0, message='{"v":"v1","outcome":"failed"}'), "DeadlineExceeded", RETRY, "ran longer"),
        (overdue(0, message=STOPPED), "WorkerCancelled", RETRY, "a cancel that this run does not have"),
        (overdue(137, reason="ContainerStatusUnknown"), "DeadlineExceeded", RETRY, "had not started at the end of"),
        (overdue(None, reason="DeadlineExceeded"), "DeadlineExceeded", RETRY, "had not started at the end of"),
        (overdue(137, reason="OOMKilled"), "OOMKilled", MEMORY, "memory"),
        (overdue(disruption="EvictionByEvictionAPI"), "Evicted", FREE, "EvictionByEvictionAPI"),
        (overdue(137, disruption="DeletionByTaintManager"), "NodeLost", FREE, "DeletionByTaintManager"),
        # of an operator that wrote the deadline on the Job
        (job(JobState.FAILED, reason="DeadlineExceeded", pod=None), "DeadlineExceeded", RETRY, "ran longer"),
        (
            job(JobState.FAILED, reason="DeadlineExceeded", pod=pod(exit_code=143, deleting_until=NOW)),
            "DeadlineExceeded",
            RETRY,
            "ran longer than its activeDeadlineSeconds",
        ),
        (
            job(JobState.FAILED, reason="DeadlineExceeded", pod=pod(started=False, ended=False, exit_code=None)),
            "DeadlineExceeded",
            RETRY,
            "had not started at the end of its activeDeadlineSeconds",
        ),
        # what was done to the pod
        (ended(exit_code=137, pod_reason="Evicted", pod_message=TMP), "StorageExceeded", RETRY, TMP),
        (
            ended(exit_code=137, pod_reason="Evicted", pod_message=LOW, disruption="TerminationByKubelet"),
            "Evicted",
            FREE,
            LOW,
        ),
        (ended(exit_code=143, disruption="EvictionByEvictionAPI"), "Evicted", FREE, "EvictionByEvictionAPI"),
        (ended(exit_code=143, disruption="PreemptionByScheduler"), "Preempted", FREE, "PreemptionByScheduler"),
        (ended(exit_code=None, disruption="DeletionByTaintManager"), "NodeLost", FREE, "DeletionByTaintManager"),
        (ended(exit_code=None, disruption="DeletionByPodGC"), "NodeLost", FREE, "DeletionByPodGC"),
        (ended(exit_code=None, reason="NodeLost", pod_reason="NodeLost"), "NodeLost", FREE, "lost the pod"),
        (ended(exit_code=137, reason="ContainerStatusUnknown"), "NodeLost", FREE, "lost the pod"),
        (ended(exit_code=143, disruption="ByAliens"), "Disrupted", FREE, "ByAliens"),
        (ended(exit_code=None, reason="OutOfcpu", pod_reason="OutOfcpu"), "NodeRefused", FREE, "OutOfcpu"),
        (ended(exit_code=None, reason="NodeAffinity", pod_reason="NodeAffinity"), "NodeRefused", FREE, "NodeAffinity"),
        (
            ended(exit_code=None, reason="Evicted", pod_reason="Evicted", pod_message=PRESSED),
            "NodeRefused",
            FREE,
            "the node would not take the pod: Evicted: Pod was rejected: The node had condition: [DiskPressure].",
        ),
        (ended(exit_code=143, deleting_until=NOW), "PodDeleted", FREE, "somebody deleted the pod"),
        (ended(exit_code=1, deleting_until=NOW), "Error", RETRY, "exit code 1"),
        (gone_well(deleting_until=NOW), "PodDeleted", FREE, "somebody deleted the pod"),
        (gone_well(disruption="EvictionByEvictionAPI"), "Evicted", FREE, "EvictionByEvictionAPI"),
        (gone_well(disruption="PreemptionByScheduler", message="{"), "Preempted", FREE, "PreemptionByScheduler"),
        (gone_well(), "ResultInvalid", RETRY, "left no result"),
        (ended(exit_code=255, reason="Unknown"), "NodeLost", FREE, "lost the pod"),
        (ended(exit_code=None, reason=None), "PodLost", FREE, "without an exit code"),
        (job(JobState.FAILED, reason="BackoffLimitExceeded", pod=None), "PodLost", FREE, "gone"),
        # what nobody has heard of yet
        (ended(exit_code=7, reason="ContainerOnFire"), "ContainerOnFire", RETRY, "exit code 7"),
    ],
)
def test_verdicts(facts: Attempt, reason: str, rule: FailurePolicyRule, words: str) -> None:
    verdict = outcome_of(facts)
    assert isinstance(verdict, Failure)
    assert (verdict.reason, rule_of(verdict.reason)) == (reason, rule)
    assert words in verdict.message


def test_what_the_api_server_refuses() -> None:
    held = {reason for reason, rule in FAILURE_POLICY.items() if rule.action is FailureAction.HOLD}
    failed = {reason for reason, rule in FAILURE_POLICY.items() if rule.action is FailureAction.FAIL_RUN}
    probed = {reason for reason, rule in FAILURE_POLICY.items() if rule.probed}
    unplaced = {"ServerFailed", "Unschedulable", "NodeMismatch", "SchedulingGated", "JobNotStarted"}
    assert probed == {"Forbidden", "NamespaceTerminating", "WebhookUnavailable", "QuotaExceeded"}
    assert held == probed | unplaced
    assert failed == {"JobRefused", "AdmissionDenied", "JobChanged", "NameTaken"}


def test_the_table_for_users_is_this_one() -> None:
    """docs/failures.md: each reason in a row of its own, with the verdict and the budget."""
    rows = {}
    for line in DOCS.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `") and len(cells) == 4:
            rows[cells[0].strip("`")] = (cells[2], cells[3])
    shown = {
        reason: (rule.action.value, f"`{rule.budget.value}`" if rule.budget and rule.budget.value != "disruptions"
                 else rule.budget.value if rule.budget else "")
        for reason, rule in FAILURE_POLICY.items()
    }  # fmt: skip
    assert rows == shown


def test_a_log_is_told_apart_from_a_result() -> None:
    crashed = outcome_of(ended(message="\x1b[31mone\ttwo\x1b[0m\r\nthree\x00\n"))
    assert isinstance(crashed, Failure)
    assert crashed.log == "one two\nthree"
    spoken = outcome_of(ended(message='{"v":"v1","outcome":"failed","message":"a\\u001b[31mb\\nc"}'))
    assert isinstance(spoken, Failure)
    assert (spoken.log, spoken.message) == (None, "exit code 1: ab c")
    late = outcome_of(overdue(137, message="row 5\nrow 6"))
    assert isinstance(late, Failure)
    assert late.log == "row 5\nrow 6"
    killed = outcome_of(ended(exit_code=137, reason="OOMKilled", message="row 7\nrow 8"))
    assert isinstance(killed, Failure)
    assert killed.log == "row 7\nrow 8"
    garbage = outcome_of(done("row 9"))
    assert isinstance(garbage, Failure)
    assert garbage.log is None, "exit code 0: the kubelet leaves no log then"


def test_long_last_words_keep_their_end() -> None:
    verdict = outcome_of(job(JobState.FAILED, pod=pod(exit_code=1, message="a" * 900 + " the cause")))
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
