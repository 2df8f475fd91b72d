"""The judge is judged: each rule gets a history that breaks it, and must say so; a right history has no findings."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.race import pool_rules
from tests.race.checker import RULES, check, jobs_between, latency_ms, started_after, state_at_cancel
from tests.race.generator import QUIET_SECONDS, Moment, Signal, waves
from tests.race.history import AuditTail, Counters, Histories, JobCreate, Pod, RunHistory, Version

OPERATOR = "system:serviceaccount:ingestrun-system:ingestrun-operator"
Break = Callable[[RunHistory], None]


def version(number: int, *, by_user: bool = False, **fields: Any) -> Version:
    """Stored at resourceVersion `number`, asked for 10 us before its answer; all in the order of their numbers."""
    return Version(
        resource_version=number,
        received=number * 100 - 10,
        answered=number * 100,
        actor="alice" if by_user else OPERATOR,
        status_write=not by_user,
        **fields,
    )


def job(number: int, name: str, *, batch: int, stage: str, **fields: Any) -> JobCreate:
    return JobCreate(
        name=name,
        batch=batch,
        step=("fetch", "hook", "publish").index(stage),
        stage=stage,
        attempt=0,
        received=number * 100 - 10,
        answered=number * 100,
        code=201,
        actor=OPERATOR,
        **fields,
    )


RUNNING = {"Succeeded": ("Unknown", "Running"), "Finished": ("False", "Running"), "Reconciling": ("True", "Running")}
CANCELLED = {
    "Succeeded": ("False", "Cancelled"),
    "Finished": ("True", "Cancelled"),
    "Cancelled": ("True", "Requested"),
    "Reconciling": ("False", "Finished"),
    "Stalled": ("True", "Cancelled"),
    "Drained": ("False", "Draining"),
}
DRAINED = {**CANCELLED, "Drained": ("True", "Drained")}
RECORD = {"reason": "why", "requestedBy": "alice", "acceptedAt": "2026-11-23T04:00:00Z", "activeBatches": 2}
COUNTED = Counters(claimed="0-2", fetched="0-1", published="0", records=(20, 0, 10), cursor="2")


def history() -> RunHistory:
    """Three batches: 0 was published; cancelled at 50, with 1 (publish) and 2 (fetch) in flight; 1 landed after all."""
    end: dict[str, Any] = {"phase": "Cancelled", "cancel": True, "reason": "why", "counters": COUNTED, "completed": "t"}
    run = RunHistory(uid="u", namespace="ns", name="run")
    run.versions = [
        version(10, by_user=True),
        version(11, phase="Running", counters=Counters(claimed="0"), conditions=RUNNING),
        version(30, phase="Running", counters=COUNTED, conditions=RUNNING),
        version(45, by_user=True, phase="Running", counters=COUNTED, conditions=RUNNING, cancel=True, reason="why"),
        version(50, **end, conditions=CANCELLED, cancellation=RECORD),
        version(
            70,
            **end,
            conditions=DRAINED,
            cancellation={**RECORD, "drainedAt": "t", "published": "1", "notPublished": "2"},
        ),
    ]
    run.creates = [
        job(12, "j0f", batch=0, stage="fetch"),
        job(16, "j0p", batch=0, stage="publish"),
        job(32, "j1p", batch=1, stage="publish"),
        job(33, "j2f", batch=2, stage="fetch"),
    ]
    run.job_versions = {"j0f": 12, "j0p": 16, "j1p": 32, "j2f": 33}
    run.pods = {
        "a": Pod(name="a", job="j0f", batch=0, stage="fetch", attempt=0, created=13, started=14, ended=15),
        "b": Pod(name="b", job="j0p", batch=0, stage="publish", attempt=0, created=17, started=18, ended=19),
        "c": Pod(name="c", job="j1p", batch=1, stage="publish", attempt=0, created=34, started=35, ended=60),
        "d": Pod(name="d", job="j2f", batch=2, stage="fetch", attempt=0, created=36, started=37, ended=61),
    }
    for pod in run.pods.values():
        pod.succeeded = True
    return run


def rules_of(run: RunHistory) -> set[str]:
    return {violation.rule for violation in check(run)}


def edit(number: int, **changes: Any) -> Break:
    def change(run: RunHistory) -> None:
        (at,) = [place for place, version in enumerate(run.versions) if version.resource_version == number]
        run.versions[at] = replace(run.versions[at], **changes)

    return change


def record(number: int, **changes: Any) -> Break:
    def change(run: RunHistory) -> None:
        (found,) = [version for version in run.versions if version.resource_version == number]
        edit(number, cancellation={**(found.cancellation or {}), **changes})(run)

    return change


def condition(number: int, kind: str, status: str) -> Break:
    def change(run: RunHistory) -> None:
        (found,) = [version for version in run.versions if version.resource_version == number]
        edit(number, conditions={**found.conditions, kind: (status, "Forged")})(run)

    return change


def add_version(made: Version) -> Break:
    return lambda run: run.versions.append(made)


def add_job(made: JobCreate) -> Break:
    return lambda run: run.creates.append(made)


def pod(key: str, **changes: Any) -> Break:
    def change(run: RunHistory) -> None:
        run.pods[key] = replace(run.pods[key], **changes)

    return change


def drop_versions(*numbers: int) -> Break:
    def change(run: RunHistory) -> None:
        run.versions = [version for version in run.versions if version.resource_version not in numbers]

    return change


def late_job_by_version(run: RunHistory) -> None:
    """Answered before Cancelled was, and yet stored after it: only the storage's own numbers tell."""
    run.creates.append(replace(job(49, "late", batch=2, stage="hook"), resource_version=51))


def overlapping_job(run: RunHistory) -> None:
    run.creates.append(replace(job(50, "beside", batch=2, stage="hook"), received=4900, answered=5100))


def unlogged_job(run: RunHistory) -> None:
    run.job_versions["ghost"] = 55


def published_by_two_pods(run: RunHistory) -> None:
    run.pods["e"] = replace(run.pods["b"], name="e")


def publish_of_a_deleted_job(run: RunHistory) -> None:
    """The publish ran to its end between the look at its pod and the deletion of its Job."""
    run.pods["e"] = Pod(
        name="e", job="j2p", batch=2, stage="publish", attempt=0, created=48, started=51, ended=52, succeeded=True
    )


FORGED: dict[str, tuple[str, Break]] = {
    "a Job after Cancelled, by the log's times": ("job-after-end", add_job(job(55, "late", batch=2, stage="hook"))),
    "a Job after Cancelled, by storage": ("job-after-end", late_job_by_version),
    "a Job whose order nothing tells": ("job-after-end", overlapping_job),
    "a Job that no create accounts for": ("job-after-end", unlogged_job),
    "a run that never ends": ("not-ended", drop_versions(50, 70)),
    "Cancelled left again": ("end-left", add_version(version(80, phase="Running", cancel=True, counters=COUNTED))),
    "a second end": ("end-left", edit(70, phase="Succeeded")),
    "a write over the cancel": (
        "cancel-ignored",
        add_version(version(47, phase="Running", cancel=True, counters=COUNTED, conditions=RUNNING)),
    ),
    "completion over the cancel": ("cancel-ignored", edit(50, phase="Succeeded")),
    "cancelled, and nobody asked": ("cancelled-unasked", edit(45, cancel=False)),
    "counters moved by the cancel": ("counters-moved", edit(45, counters=replace(COUNTED, fetched="0"))),
    "a late result in the counters": (
        "counters-moved",
        edit(70, counters=replace(COUNTED, published="0-1", records=(20, 0, 20))),
    ),
    "completionTime moved": ("completion-moved", edit(70, completed="later")),
    "a repeated cancel changes the reason": ("record-moved", record(70, reason="another")),
    "a batch in flight that is not told apart": ("flight-unaccounted", record(70, notPublished="")),
    "a batch told apart twice": ("flight-unaccounted", record(70, notPublished="1-2")),
    "a late publish denied": ("late-publish-wrong", record(70, published="", notPublished="1-2")),
    "a late publish made up": ("late-publish-wrong", record(70, published="1-2", notPublished="")),
    "a publish whose Job was deleted": ("late-publish-wrong", publish_of_a_deleted_job),
    "records that do not add up": ("records-wrong", edit(50, counters=replace(COUNTED, records=(20, 0, 11)))),
    "fetched records that do not add up": ("records-wrong", edit(50, counters=replace(COUNTED, records=(21, 0, 10)))),
    "a batch counted that no pod published": ("published-invented", pod("b", succeeded=False)),
    "a batch published twice": ("published-twice", published_by_two_pods),
    "a Job created twice": ("job-twice", add_job(job(40, "j2f", batch=2, stage="fetch"))),
    "a Job before its claim": ("unclaimed-job", add_job(job(20, "j2x", batch=2, stage="fetch"))),
    "a wrong condition": ("condition-wrong", condition(50, "Finished", "False")),
    "backpressured for ever": ("condition-wrong", condition(50, "Backpressured", "True")),
    "Reconciling for ever": ("condition-wrong", condition(70, "Reconciling", "True")),
    "no completionTime": ("record-wrong", edit(50, completed=None)),
    "another reason than was given": ("record-wrong", edit(45, reason="because")),
    "a wrong activeBatches": ("record-wrong", record(50, activeBatches=1)),
    "nobody asked, by the record": ("record-wrong", record(50, requestedBy=None)),
    "Drained without its time": ("record-wrong", record(70, drainedAt=None)),
    "never drained": ("not-drained", drop_versions(70)),
    "a running pod killed by a Drain": ("drain-killed", pod("d", deleting=55, succeeded=False)),
    "drained while a pod runs": ("drained-early", pod("d", ended=75)),
    "drained, and a pod runs still": ("drained-early", pod("d", ended=None)),
}


def test_a_right_history_has_no_findings() -> None:
    assert check(history()) == []


@pytest.mark.parametrize("forged", FORGED)
def test_forged_history_is_caught(forged: str) -> None:
    rule, change = FORGED[forged]
    run = history()
    change(run)
    assert rule in rules_of(run)


def test_every_rule_has_a_forged_history() -> None:
    found: set[str] = set()
    for _, change in FORGED.values():
        run = history()
        change(run)
        found |= {look.__name__ for look in RULES if list(look(run))}
    assert found >= {look.__name__ for look in RULES if look not in pool_rules.RULES}  # of these: test_pool_rules.py


def test_completion_that_came_first_is_right() -> None:
    """The other outcome of the race: the run succeeded, and the cancel was refused."""
    run = history()
    done = Counters(claimed="0", fetched="0", published="0", exhausted=True, records=(10, 0, 10))
    ended = {
        "Succeeded": ("True", "Completed"),
        "Finished": ("True", "Succeeded"),
        "Drained": ("True", "NothingInFlight"),
        "Reconciling": ("False", "Finished"),
    }
    run.versions = [*run.versions[:2], version(30, phase="Succeeded", counters=done, conditions=ended, completed="t")]
    run.creates, run.pods = run.creates[:2], {key: run.pods[key] for key in "ab"}
    run.job_versions = {"j0f": 12, "j0p": 16}
    run.refused = [422]
    assert check(run) == []
    assert state_at_cancel(run) == "ended first: Succeeded"
    assert latency_ms(run) is None


def test_a_cancel_taken_back_before_it_was_seen_may_be_missed() -> None:
    run = history()
    run.versions.append(version(46, by_user=True, phase="Running", counters=COUNTED, conditions=RUNNING))
    run.versions.append(version(47, phase="Running", counters=COUNTED, conditions=RUNNING))
    run.versions.append(version(48, by_user=True, phase="Running", counters=COUNTED, cancel=True, reason="why"))
    assert check(run) == []


def test_terminate_may_end_what_runs() -> None:
    run = history()
    pod("d", deleting=55, succeeded=False)(run)
    for number in (45, 50, 70):
        edit(number, terminate=True)(run)
    assert check(run) == []


def test_a_watch_settles_what_the_times_leave_open() -> None:
    run = history()
    overlapping_job(run)
    run.job_versions["beside"] = 49
    assert check(run) == []


def killed_in_the_middle(run: RunHistory) -> None:
    """The write of Cancelled ended in a 504, since its writer was killed, and was stored all the same."""
    (lost,) = [version for version in run.versions if version.resource_version == 50]
    drop_versions(50)(run)
    run.seen = [replace(lost, received=0, answered=0, actor="", status_write=False)]
    run.unanswered = [(lost.received, lost.answered)]


def test_a_write_whose_writer_was_killed_is_known_from_the_watch() -> None:
    run = history()
    killed_in_the_middle(run)
    assert check(run) == []
    assert run.terminal is not None
    assert (run.terminal.resource_version, run.terminal.answered) == (50, 5000)
    run.creates.append(replace(job(55, "late", batch=2, stage="hook"), code=504))
    assert check(run) == []
    run.job_versions["late"] = 54
    assert rules_of(run) == {"job-after-end"}


def test_a_label_whose_writer_was_killed_is_no_status_write() -> None:
    """The fence's label, stored and never answered, between the cancel and the write that obeys it."""
    run = history()
    (asked,) = [version for version in run.versions if version.resource_version == 45]
    run.seen = [replace(asked, resource_version=47, received=0, answered=0, actor="", status_write=False)]
    run.unanswered = [(4650, 4700)]
    assert check(run) == []
    run.seen = [replace(run.seen[0], conditions={**RUNNING, "Reconciling": ("True", "Retrying")})]
    assert rules_of(run) == {"cancel-ignored"}


def test_what_the_summary_counts() -> None:
    run = history()
    assert state_at_cancel(run) == "publish running"
    assert latency_ms(run) == 0.5
    assert jobs_between(run) == 0
    assert started_after(run) == 0
    run.creates.append(job(48, "between", batch=2, stage="hook"))
    publish_of_a_deleted_job(run)
    assert (jobs_between(run), started_after(run)) == (1, 1)


def audit_line(namespace: str, *, number: int, stage: str = "ResponseComplete", **status: Any) -> str:
    entry = {
        "stage": stage,
        "verb": "patch",
        "user": {"username": OPERATOR},
        "sourceIPs": ["10.0.0.1"],
        "objectRef": {"resource": "ingestruns", "subresource": "status", "namespace": namespace, "name": "run"},
        "responseStatus": {"code": 200},
        "responseObject": {
            "kind": "IngestRun",
            "metadata": {"uid": "u", "namespace": namespace, "name": "run", "resourceVersion": str(number)},
            "spec": {"cancel": True},
            "status": status,
        },
        "requestReceivedTimestamp": "2026-11-23T04:00:00.000001Z",
        "stageTimestamp": "2026-11-23T04:00:00.250000Z",
    }
    return json.dumps(entry) + "\n"


def test_audit_log_is_read_as_it_grows_across_a_rotation(tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    path.write_text(audit_line("mine-0", number=1))
    tail, histories = AuditTail(path, "mine-"), Histories()

    def poll() -> list[int]:
        for entry in tail.poll():
            histories.add(entry)
        return [v.resource_version for run in histories.runs.values() for v in run.ordered()]

    assert poll() == []
    whole, half = audit_line("mine-0", number=2), audit_line("mine-0", number=3, phase="Cancelled")
    with path.open("a") as log:
        log.write(whole + audit_line("other", number=9) + half[:40])
    assert poll() == [2]
    with path.open("a") as log:
        log.write(half[40:])
    path.rename(tmp_path / "audit-1.log")
    path.write_text(audit_line("mine-0", number=4, phase="Cancelled"))
    assert poll() == [2, 3, 4]
    (run,) = histories.runs.values()
    assert run.terminal is not None
    assert (run.terminal.resource_version, run.terminal.answered - run.terminal.received) == (3, 249_999)
    assert histories.calls == {"mine-0": {"patch ingestruns/status": 3}}
    histories.forget(["mine-0"])
    with path.open("a") as log:  # the last sweep's call, answered when all was judged
        log.write(audit_line("mine-0", number=5, phase="Cancelled"))
    assert poll() == []
    assert (histories.runs, histories.calls) == ({}, {})
    tail.close()


def test_same_seed_same_plan() -> None:
    assert waves(7, 100, size=50) == waves(7, 100, size=50) != waves(8, 100, size=50)


def test_a_large_plan_holds_all_that_was_asked_for() -> None:
    plan = waves(1, 2000, size=50)
    runs = [run for wave in plan for run in wave.runs]
    assert len(runs) == 2000
    assert {run.cancel.moment for run in runs} == set(Moment)
    assert {run.mode for run in runs} == {"chain", "partitions"}
    assert sum(run.cancel.kill is not None for run in runs) == 200
    assert any(wave.lease for wave in plan)
    assert any(run.cancel.repeats for run in runs)
    assert any(run.cancel.clear_after is not None for run in runs)
    delays = [run.spec["backoff"]["maxSeconds"] for run in runs] + [
        run.spec["backpressure"]["retrySeconds"] * 1.1 for run in runs
    ]
    assert max(delays) < QUIET_SECONDS


def test_signals_match_by_what_they_name() -> None:
    assert Signal(kind="running").matches(Signal(kind="running", stage="fetch", batch=2))
    assert not Signal(kind="running", batch=1).matches(Signal(kind="running", stage="fetch", batch=2))
    assert not Signal(kind="job").matches(Signal(kind="running"))
