"""The judge of pools is judged: each rule gets a history that breaks it, and must say so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from tests.race import pool_rules
from tests.race.checker import check, state_at_cancel
from tests.race.generator import Mode, Moment, waves
from tests.race.history import Counters, Holder, JobCreate, Pod, RunHistory, Version, version_of
from tests.race.pool_workers import Commit, Told
from tests.unit.race.test_checker import (
    CANCELLED,
    DRAINED,
    OPERATOR,
    RECORD,
    RUNNING,
    drop_versions,
    edit,
    pod,
    record,
    rules_of,
    version,
)

Break = Callable[[RunHistory], None]
COUNTED = Counters(claimed="0-3", fetched="0", published="0", records=(10, 0, 10))


def held(worker: int, batch: int | None = None, attempt: int = 0) -> Holder:
    return Holder(worker=worker, batch=batch, attempt=attempt)


def told(what: str, worker: int, batch: int, attempt: int = 0, *, after: int) -> Told:
    """Told right after the write that was stored at that resourceVersion was answered."""
    return Told(what=what, uid="u", batch=batch, attempt=attempt, worker=worker, at=(after * 100 + 1) / 1_000_000)


def commit(worker: int, batch: int, attempt: int = 0) -> Commit:
    return Commit(run="run", uid="u", batch=batch, attempt=attempt, worker=worker, asked=0.0, granted=0.0)


def worker_job(number: int, worker: int) -> JobCreate:
    return JobCreate(
        name=f"w{worker}",
        batch=worker,
        step=1001,
        stage="worker",
        attempt=0,
        received=number * 100 - 10,
        answered=number * 100,
        code=201,
        actor=OPERATOR,
    )


def history() -> RunHistory:
    """Four partitions and three workers, cancelled at 50.

    Worker 0 publishes batch 0, then 1, of which it tells after the end. Worker 1 commits batch 2 and dies before its
    word; worker 2 takes it over, and commits again after the cancel without a word. Batch 3 was given up.
    """
    end: dict[str, Any] = {"phase": "Cancelled", "cancel": True, "reason": "why", "counters": COUNTED, "completed": "t"}
    last = (held(0, 1), held(2, 2, 1))
    flight = {**RECORD, "activeBatches": 3}
    run = RunHistory(uid="u", namespace="ns", name="run", pooled=True)
    going: dict[str, Any] = {"phase": "Running", "conditions": RUNNING}
    first = Counters(claimed="0,2")
    run.versions = [
        version(10, by_user=True),
        version(11, **going, workers=(held(0), held(1), held(2))),
        version(20, **going, counters=first, workers=(held(0, 0), held(1, 2), held(2))),
        version(22, **going, counters=first, publishing="0,2", workers=(held(0, 0), held(1, 2), held(2))),
        version(30, **going, counters=COUNTED, workers=(held(0, 1), held(2, 2, 1))),
        version(35, **going, counters=COUNTED, publishing="1-2", workers=last),
        version(45, **going, by_user=True, counters=COUNTED, publishing="1-2", workers=last, cancel=True, reason="why"),
        version(50, **end, conditions=CANCELLED, cancellation=flight, publishing="1-2", workers=last),
        version(
            55,
            **end,
            conditions=CANCELLED,
            cancellation=flight,
            publishing="1-2",
            workers=(held(0), held(2, 2, 1)),
            after_end="1",
        ),
        version(
            70,
            **end,
            conditions=DRAINED,
            cancellation={**flight, "drainedAt": "t", "published": "1", "notPublished": "3", "unknown": "2"},
            after_end="1",
            unknown="2",
        ),
    ]
    run.creates = [worker_job(12 + worker, worker) for worker in range(3)]
    run.job_versions = {f"w{worker}": 12 + worker for worker in range(3)}
    run.pods = {
        f"p{worker}": Pod(
            name=f"p{worker}", job=f"w{worker}", batch=worker, stage="worker", attempt=0, created=15, started=16
        )
        for worker in range(3)
    }
    for number, ended in enumerate((60, 25, 61)):
        run.pods[f"p{number}"].ended = ended
    run.told = [
        told("claim", 0, 0, after=20),
        told("claim", 1, 2, after=20),
        told("permission", 0, 0, after=22),
        told("permission", 1, 2, after=22),
        told("claim", 0, 1, after=30),
        told("claim", 2, 2, 1, after=30),
        told("permission", 0, 1, after=35),
        told("permission", 2, 2, 1, after=60),
    ]
    run.commits = [commit(0, 0), commit(1, 2), commit(0, 1), commit(2, 2, 1)]
    return run


def tell(made: Told) -> Break:
    return lambda run: run.told.append(made)


def add_commit(made: Commit) -> Break:
    return lambda run: run.commits.append(made)


def forget_commits(run: RunHistory) -> None:
    run.commits = [each for each in run.commits if each.batch != 1]


def committed_unasked(run: RunHistory) -> None:
    run.told = [each for each in run.told if (each.what, each.batch, each.attempt) != ("permission", 2, 1)]


def stranger_job(run: RunHistory) -> None:
    run.creates.append(worker_job(40, 7))
    run.job_versions["w7"] = 40


def claimed_by_the_end(run: RunHistory) -> None:
    for number in (50, 55, 70):
        edit(number, counters=replace(COUNTED, claimed="0-4"))(run)


FORGED: dict[str, tuple[str, Break]] = {
    "a claim by the write that ends it": ("granted-after-end", claimed_by_the_end),
    "a claim after the end": ("granted-after-end", edit(55, counters=replace(COUNTED, claimed="0-4"))),
    "a permission by the write that ends it": ("granted-after-end", edit(50, publishing="1-3")),
    "a permission after the end": ("granted-after-end", edit(55, publishing="1-3")),
    "a batch handed out after the end": ("granted-after-end", edit(55, workers=(held(0, 3), held(2, 2, 1)))),
    "a claim that was not stored": ("told-unstored", tell(told("claim", 0, 3, after=35))),
    "a claim of another attempt": ("told-unstored", tell(told("claim", 2, 2, 2, after=35))),
    "a permission that was not stored": ("told-unstored", edit(35, publishing="2")),
    "a permission told before it was stored": ("told-unstored", tell(told("permission", 0, 1, after=33))),
    "a permission of a status after the end": (
        "told-unstored",
        lambda run: [drop_versions(35, 45)(run), edit(50, publishing="1-2")(run)][0],
    ),
    "a batch with two workers": ("held-twice", edit(35, workers=(held(0, 1), held(2, 1, 1)))),
    "an attempt with two workers": ("held-twice", edit(35, workers=(held(0, 1), held(2, 0)))),
    "a second commit while the first worker lives": ("published-twice", pod("p1", ended=31)),
    "a second commit, and the first worker runs still": ("published-twice", pod("p1", ended=None)),
    "two attempts of one worker commit": ("published-twice", add_commit(commit(0, 1, 1))),
    "a commit without a permission": ("published-unasked", committed_unasked),
    "a commit denied": ("landed-denied", record(70, notPublished="2-3", unknown="")),
    "a commit of a batch that waits, denied": ("landed-denied", add_commit(commit(1, 3))),
    "a commit told nowhere": ("landed-denied", edit(70, unknown="", after_end="")),
    "a commit after the end made up": ("published-invented", forget_commits),
    "a batch counted that nobody committed": (
        "published-invented",
        lambda run: run.commits.remove(commit(0, 0)),
    ),
    "a batch in flight told twice": ("flight-unaccounted", record(70, unknown="2-3")),
    "a batch in flight not told": ("flight-unaccounted", record(70, unknown="")),
    "a worker's Job without an entry": ("unclaimed-job", stranger_job),
    "drained while a worker runs": ("drained-early", pod("p2", ended=71)),
    "a late report in the counters": (
        "counters-moved",
        edit(70, counters=replace(COUNTED, published="0-1", records=(20, 0, 20))),
    ),
}


def test_a_right_history_has_no_findings() -> None:
    run = history()
    assert check(run) == []
    assert state_at_cancel(run) == "pool: a worker may publish"
    assert [(first.worker, second.worker) for first, second in pool_rules.repeated_commits(run)] == [(1, 2)]


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
        found |= {look.__name__ for look in pool_rules.RULES if list(look(run))}
    assert found == {look.__name__ for look in pool_rules.RULES}


def test_a_batch_that_failed_after_it_had_landed_is_no_lie() -> None:
    """Its worker died before its word, and it had no retry left."""
    run = history()
    for number in (30, 35, 45, 50, 55, 70):
        edit(number, counters=replace(COUNTED, failed="3"))(run)
    for number in (50, 55, 70):
        record(number, activeBatches=2)(run)
    record(70, notPublished="")(run)
    edit(20, counters=Counters(claimed="0,2-3"), workers=(held(0, 0), held(1, 2), held(2, 3)))(run)
    edit(22, counters=Counters(claimed="0,2-3"), publishing="0,2-3", workers=(held(0, 0), held(1, 2), held(2, 3)))(run)
    run.told.append(told("permission", 2, 3, after=22))
    run.commits.append(commit(2, 3))
    assert check(run) == []


def test_a_batch_that_is_to_be_fetched_again_has_its_records_counted() -> None:
    """It failed after the chain had gone on from it."""
    run = history()
    for number in (30, 35, 45, 50, 55, 70):
        edit(number, counters=replace(COUNTED, records=(20, 0, 10)), unpublished=frozenset({3}))(run)
    assert check(run) == []
    edit(50, unpublished=frozenset())(run)
    assert rules_of(run) == {"records-wrong"}


def test_a_pools_status_is_read() -> None:
    status = {
        "phase": "Cancelled",
        "batches": {"claimed": "0-3", "publishing": "1-2", "unpublished": [{"batch": 3, "cursor": "3"}]},
        "workers": [{"worker": 4, "batch": 2, "batchAttempt": 1}, {"worker": 5, "leaving": True}],
        "afterEnd": {"published": "1"},
        "cancellation": {"unknown": "2"},
    }
    read: Version = version_of({"metadata": {"resourceVersion": "7"}, "spec": {}, "status": status})
    assert (read.publishing, read.after_end, read.unknown) == ("1-2", "1", "2")
    assert read.unpublished == {3}
    assert read.workers == (held(4, 2, 1), held(5))


def test_the_mode_decides_which_runs_there_are() -> None:
    def kinds(mode: Mode) -> list[bool]:
        return [run.pooled for wave in waves(5, 200, size=50, mode=mode) for run in wave.runs]

    assert set(kinds(Mode.POOL)) == {True}
    assert set(kinds(Mode.JOBS)) == {False}
    assert 80 < sum(kinds(Mode.BOTH)) < 120
    pools = [run for wave in waves(5, 400, size=50, mode=Mode.POOL) for run in wave.runs]
    assert {run.spec["execution"]["mode"] for run in pools} == {"Pool"}
    assert {Moment.HANDED, Moment.ASKED, Moment.GRANTED, Moment.COMMITTED, Moment.STARTING, Moment.BACKOFF} <= {
        run.cancel.moment for run in pools
    }
