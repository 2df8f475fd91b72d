"""The store believes the newest, whatever the order in which the news arrive."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from tests.fakes.world import manifest

from ingestrun.controller.state.cache import MAX_PARSED, RunCache
from ingestrun.controller.state.usage import Usage
from ingestrun.kube.protocol import RunKey
from ingestrun.model.lineage import parents_of
from ingestrun.planner.batch.attempt import JobState, ObservedJob
from ingestrun.planner.run.fair_sharing import JobLimits

KEY = RunKey(namespace="default", name="flights")


def run(version: int, *, uid: str = "u", cancel: bool = False, **more: Any) -> dict[str, Any]:
    meta = {"namespace": "default", "name": "flights", "uid": uid, "resourceVersion": str(version), **more}
    return {"metadata": meta, "spec": {"cancel": cancel}}


def test_an_older_body_does_not_take_a_cancel_back() -> None:
    store = RunCache(Usage(JobLimits(), wake=lambda _: None))
    store.upsert_run(run(9, cancel=True))
    store.upsert_run(run(8))
    assert store.cancel_requested(KEY)


def test_versions_compare_as_numbers() -> None:
    store = RunCache(Usage(JobLimits(), wake=lambda _: None))
    store.upsert_run(run(99))
    store.upsert_run(run(100, cancel=True))
    assert store.cancel_requested(KEY)


def test_a_run_created_anew_under_the_name_shares_nothing_with_the_one_before() -> None:
    store = RunCache(Usage(JobLimits(), wake=lambda _: None))
    store.upsert_run(run(9, uid="old"))
    store.archive("old")
    store.upsert_run(run(10, uid="new"))
    assert store.key_of("old") is None
    assert store.key_of("new") == KEY
    assert not store.is_archived("new")


def test_what_is_unknown_or_being_deleted_counts_as_cancelled() -> None:
    store = RunCache(Usage(JobLimits(), wake=lambda _: None))
    assert store.cancel_requested(KEY)
    store.upsert_run(run(1, deletionTimestamp="2026-11-23T00:00:00Z"))
    assert store.cancel_requested(KEY)


def test_nobody_is_above_itself() -> None:
    body = run(1, ownerReferences=[{"kind": "IngestRun", "name": "flights"}, {"kind": "Deployment", "name": "x"}])
    body["spec"]["parentRef"] = {"name": "above"}
    assert parents_of(body) == [RunKey(namespace="default", name="above")]


def test_a_run_is_read_once_for_each_version() -> None:
    store = RunCache(Usage(JobLimits(), wake=lambda _: None))

    def whole(version: int) -> dict[str, Any]:
        return manifest() | {
            "metadata": {**run(version)["metadata"], "creationTimestamp": "2026-11-23T12:00:00Z"},
            "status": {"observedGeneration": -1},
        }

    store.upsert_run(whole(1))
    first = store.parsed(KEY)
    store.upsert_run(whole(1))
    assert store.parsed(KEY) is first, "the watch repeats what a write has answered"
    store.upsert_run(whole(2))
    assert store.parsed(KEY).metadata.resource_version == "2"


def observed_job(uid: str = "j-1", run_uid: str = "u", version: str = "7") -> ObservedJob:
    return ObservedJob(
        namespace="default",
        name=f"job-{uid}",
        uid=uid,
        resource_version=version,
        run_uid=run_uid,
        batch=0,
        step=0,
        attempt=0,
        deleting=False,
        finished=None,
        finished_at=None,
        reason=None,
        message=None,
    )


def two_runs() -> RunCache:
    store = RunCache(Usage(JobLimits(), wake=lambda _: None))
    for uid in ("u", "v"):
        store.upsert_run({**run(1, uid=uid), "metadata": {**run(1, uid=uid)["metadata"], "name": uid}})
    return store


def test_a_list_of_everything_syncs_the_runs_that_have_not_changed_meanwhile() -> None:
    store = two_runs()
    store.begin_sync()
    store.upsert_job(observed_job(run_uid="u"))  # created after the list was taken
    store.finish_sync({}, {})
    assert [len(store.attempts(uid)) for uid in ("u", "v")] == [1, 0]
    assert [store.has_synced(uid) for uid in ("u", "v")] == [False, True]


def test_a_list_of_everything_replaces_what_was_known_before() -> None:
    store = two_runs()
    store.upsert_job(observed_job("gone", run_uid="u"))
    store.begin_sync()
    store.finish_sync({"u": [observed_job("there")], "w": [observed_job("orphan", run_uid="w")]}, {})
    gone, there = store.attempts("u")
    assert (gone.job.uid, gone.state, gone.job.reason) == ("gone", JobState.FAILED, "JobDeleted")
    assert (there.job.uid, there.state) == ("there", JobState.WAITING)
    assert store.usage.snapshot("u", "default", now=datetime.now(UTC)).run.active == 1
    store.forget_vanished("u", lambda _: True)
    assert store.attempts("u") == [there]
    assert store.has_synced("u")
    assert store.attempts("w") == []


def test_the_runs_parsed_longest_ago_are_dropped() -> None:
    store = RunCache(Usage(JobLimits(), wake=lambda _: None))
    spec = manifest()["spec"]
    keys = []
    for number in range(MAX_PARSED + 1):
        body = {**run(1, uid=str(number), creationTimestamp="2026-11-28T11:00:00Z"), "spec": spec}
        body["metadata"]["name"] = f"n{number}"
        keys.append(store.upsert_run(body))
    first = store.parsed(keys[0])
    for key in keys[1:-1]:
        store.parsed(key)
    assert store.parsed(keys[0]) is first
    second = store.parsed(keys[1])
    assert store.parsed(keys[1]) is second
    store.parsed(keys[-1])
    assert store.parsed(keys[0]) is first, "asked for a moment ago"
