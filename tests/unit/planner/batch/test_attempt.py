"""A Job and its pods as one value, where they do not say the same."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from ingestrun.planner.batch.attempt import (
    POD_EXPECTED_WITHIN,
    JobState,
    ObservedJob,
    ObservedPod,
    attempt_of,
)

START = datetime(2026, 11, 23, tzinfo=UTC)


def job(**facts: Any) -> ObservedJob:
    base: dict[str, Any] = {
        "namespace": "default",
        "name": "j",
        "uid": "j",
        "resource_version": "1",
        "run_uid": "r",
        "batch": 0,
        "step": 0,
        "attempt": 0,
        "deleting": False,
        "finished": None,
        "finished_at": None,
        "reason": None,
        "message": None,
        "created": START,
        "started_at": START,
    }
    return ObservedJob(**{**base, **facts})


def pod(name: str, *, started: bool = True, code: int | None = None, age: int = 0) -> ObservedPod:
    """A pod that was created so many seconds after the Job was; with an exit code it has ended."""
    return ObservedPod(
        name=name,
        uid=name,
        job_uid="j",
        run_uid="r",
        started=started,
        ended=code is not None,
        exit_code=code,
        reason=None,
        message=None,
        obstacle=None,
        created=START + timedelta(seconds=age),
    )


RESUMED = {"started_at": START + timedelta(seconds=60)}


@pytest.mark.parametrize(
    ("facts", "pods", "state", "shown", "queued"),
    [
        ({}, [pod("a", code=143)], JobState.RUNNING, "a", False),
        ({"suspended": True}, [], JobState.WAITING, None, True),
        ({"suspended": True}, [pod("a")], JobState.RUNNING, "a", False),
        ({"suspended": True}, [pod("a", code=143)], JobState.WAITING, None, True),
        ({"suspended": True}, [pod("a", code=0)], JobState.SUCCEEDED, "a", False),
        ({"suspended": True, "finished": JobState.FAILED}, [pod("a", code=1)], JobState.FAILED, "a", False),
        (RESUMED, [pod("a", code=143)], JobState.WAITING, None, False),
        (RESUMED, [pod("a", code=143), pod("b", started=False, age=61)], JobState.WAITING, "b", False),
        (RESUMED, [pod("b", code=1, age=61)], JobState.RUNNING, "b", False),
        (RESUMED, [pod("a", code=0)], JobState.SUCCEEDED, "a", False),
    ],
)
def test_a_suspension_ends_pods_and_says_nothing_of_the_job(
    facts: dict[str, Any], pods: list[ObservedPod], state: JobState, shown: str | None, queued: bool
) -> None:
    seen = attempt_of(job(**facts), pods)
    assert (seen.state, seen.pod.name if seen.pod else None, seen.queued) == (state, shown, queued)


@pytest.mark.parametrize(
    ("facts", "pods", "lacks"),
    [
        ({}, [], True),
        ({}, [pod("a", started=False)], False),
        ({"started_at": None}, [], False),
        ({"suspended": True}, [], False),
        ({"deleting": True}, [], False),
        ({"finished": JobState.FAILED}, [], False),
        ({"finished": JobState.SUCCEEDED}, [], False),
    ],
)
def test_which_job_lacks_its_pod(facts: dict[str, Any], pods: list[ObservedPod], lacks: bool) -> None:
    seen = attempt_of(job(**facts), pods)
    assert seen.lacks_pod_at == (START + POD_EXPECTED_WITHIN if lacks else None)
