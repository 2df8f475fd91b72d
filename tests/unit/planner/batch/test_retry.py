"""The budgets: which failure is taken from which, and what a batch is told while they last."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingestrun.model.quantity import render_bytes
from ingestrun.model.size_budget import MESSAGE_CHARS
from ingestrun.model.spec import Backoff, OutOfMemory
from ingestrun.model.status import StageFailure
from ingestrun.planner.batch.failure_policy import FAILURE_POLICY, Failure, FailureAction
from ingestrun.planner.batch.retry import FREE_DISRUPTIONS, BudgetsUsed, RetryDecision, RetryPolicy, decide_retry
from ingestrun.planner.status.writer import describe_failure

MI = 2**20
NONE = Backoff(initial_seconds=0)


def course(
    reasons: Sequence[str],
    *,
    retries: int = 3,
    oom: OutOfMemory | None = None,
    memory_limit: int | None = 256 * MI,
    backoff: Backoff = NONE,
) -> list[RetryDecision]:
    """What comes of attempts that fail one after another for these reasons; it ends where nothing is retried."""
    allowance = RetryPolicy(retries=retries, out_of_memory=oom, backoff=backoff)
    spent, told = BudgetsUsed(), []
    for reason in reasons:
        then = decide_retry(
            Failure(reason=reason, message=""),
            policy=allowance,
            used=spent,
            memory_limit=memory_limit,
            identity="r/0/0",
        )
        told.append(then)
        if not then.retried:
            break
        spent, memory_limit = then.used, then.memory.limit if then.memory else memory_limit
    return told


@pytest.mark.parametrize(
    ("reasons", "retries", "said"),
    [
        (["Error", "ResultInvalid", "Error"], 2, ["retry 1 of 2 at once", "retry 2 of 2 at once", ""]),
        (["Error"], 0, [""]),
        (["PermanentError"], 3, [""]),
        (["ImagePull"], 3, [""]),
        (["Evicted", "Error", "Preempted", "Error"], 1, ["retry 1 of 10 for disruptions at once",
            "retry 1 of 1 at once", "retry 2 of 10 for disruptions at once", ""]),
        (["Evicted"], 0, ["retry 1 of 10 for disruptions at once"]),
        (["OOMKilled", "OOMKilled"], 1, ["retry 1 of 1 at once", ""]),
        (["ByAliens"], 1, ["retry 1 of 1 at once"]),
    ],
)  # fmt: skip
def test_each_budget_is_counted_apart(reasons: list[str], retries: int, said: list[str]) -> None:
    assert [then.explanation for then in course(reasons, retries=retries)] == said


def test_disruptions_are_free_only_so_often() -> None:
    told = course(["NodeLost"] * 20, retries=2)
    assert len(told) == FREE_DISRUPTIONS + 2 + 1
    assert [then.explanation for then in told[-3:]] == ["retry 1 of 2 at once", "retry 2 of 2 at once", ""]
    assert told[-1].action is FailureAction.FAIL_BATCH


@pytest.mark.parametrize(
    ("had", "cap", "retries", "limits", "end"),
    [
        (256, "4Gi", 3, [512, 1024, 2048], "it had 2Gi, after 3 of 3 retries with more memory"),
        (256, "600Mi", 3, [512, 600], "it had 600Mi, and outOfMemory.maxMemory of 600Mi allows no more"),
        (256, "256Mi", 3, [], "it had 256Mi, and outOfMemory.maxMemory of 256Mi allows no more"),
        (256, "100Mi", 3, [], "it had 256Mi, and outOfMemory.maxMemory of 100Mi allows no more"),
        (256, 1024 * MI, 1, [512], "it had 512Mi, after 1 of 1 retry with more memory"),
    ],
)
def test_memory_doubles_up_to_the_cap(had: int, cap: str | int, retries: int, limits: list[int], end: str) -> None:
    told = course(["OOMKilled"] * 9, retries=0, oom=OutOfMemory(max_memory=cap, retries=retries), memory_limit=had * MI)
    assert [then.memory.limit // MI for then in told if then.memory] == limits
    assert all(then.action is FailureAction.RETRY_WITH_MORE_MEMORY for then in told[:-1])
    assert (told[-1].action, told[-1].explanation) == (FailureAction.FAIL_BATCH, end)


def test_what_is_said_of_a_raise() -> None:
    (first, *_) = course(
        ["OOMKilled"], oom=OutOfMemory(max_memory="4Gi"), backoff=Backoff(initial_seconds=20, max_seconds=20)
    )
    assert 16 <= first.delay.total_seconds() <= 20
    seconds = round(first.delay.total_seconds())
    assert first.explanation == f"retry 1 of 3 with 512Mi instead of 256Mi in {seconds} s"


def test_zero_memory_retries_are_not_unset() -> None:
    (never,) = course(["OOMKilled"], oom=OutOfMemory(retries=0))
    assert (never.action, never.explanation) == (FailureAction.FAIL_BATCH, "outOfMemory.retries is 0")


def test_without_a_limit_there_is_nothing_to_raise() -> None:
    told = course(["OOMKilled"] * 9, oom=OutOfMemory(max_memory="4Gi"), memory_limit=None, retries=2)
    assert [then.explanation for then in told] == ["retry 1 of 2 at once", "retry 2 of 2 at once", ""]


@given(
    reasons=st.lists(st.sampled_from(sorted(FAILURE_POLICY)), max_size=60),
    retries=st.integers(0, 5),
    raises=st.integers(1, 5),
    cap=st.integers(1, 10**12),
    had=st.one_of(st.none(), st.integers(1, 10**12)),
)
def test_no_course_is_endless_and_no_cap_exceeded(
    reasons: list[str], retries: int, raises: int, cap: int, had: int | None
) -> None:
    told = course(reasons, retries=retries, oom=OutOfMemory(max_memory=cap, retries=raises), memory_limit=had)
    assert len([then for then in told if then.retried]) <= retries + raises + FREE_DISRUPTIONS
    for then in told:
        assert then.memory is None or (then.memory.before or 0) < then.memory.limit <= cap
        assert then.memory is None or render_bytes(then.memory.limit) in then.explanation


def test_a_long_sentence_keeps_what_comes_of_it() -> None:
    then = "retry 1 of 3 with 512Mi instead of 256Mi in 20 s"
    failure = StageFailure(
        batch=999_999,
        stage=f"hook {'h' * 63}",
        attempt=99,
        reason="R" * 32,
        message=f"{'m' * 200}; {then}",
        time=datetime(2026, 11, 23, tzinfo=UTC),
    )
    told = describe_failure(failure)
    assert len(told) == MESSAGE_CHARS
    assert told.startswith("batch 999999, hook ")
    assert told.endswith(then)
