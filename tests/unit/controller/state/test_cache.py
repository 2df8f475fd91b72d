"""The store believes the newest, whatever the order in which the news arrive."""

from __future__ import annotations

from typing import Any

from tests.fakes.world import manifest

from ingestrun.controller.state.cache import RunCache, parents_of
from ingestrun.kube.protocol import RunKey

KEY = RunKey(namespace="default", name="flights")


def run(version: int, *, uid: str = "u", cancel: bool = False, **more: Any) -> dict[str, Any]:
    meta = {"namespace": "default", "name": "flights", "uid": uid, "resourceVersion": str(version), **more}
    return {"metadata": meta, "spec": {"cancel": cancel}}


def test_an_older_body_does_not_take_a_cancel_back() -> None:
    store = RunCache()
    store.upsert_run(run(9, cancel=True))
    store.upsert_run(run(8))
    assert store.cancel_requested(KEY)


def test_versions_compare_as_numbers() -> None:
    store = RunCache()
    store.upsert_run(run(99))
    store.upsert_run(run(100, cancel=True))
    assert store.cancel_requested(KEY)


def test_a_run_created_anew_under_the_name_shares_nothing_with_the_one_before() -> None:
    store = RunCache()
    store.upsert_run(run(9, uid="old"))
    store.archive("old")
    store.upsert_run(run(10, uid="new"))
    assert store.key_of("old") is None
    assert store.key_of("new") == KEY
    assert not store.is_archived("new")


def test_what_is_unknown_or_being_deleted_counts_as_cancelled() -> None:
    store = RunCache()
    assert store.cancel_requested(KEY)
    store.upsert_run(run(1, deletionTimestamp="2026-11-23T00:00:00Z"))
    assert store.cancel_requested(KEY)


def test_nobody_is_above_itself() -> None:
    body = run(1, ownerReferences=[{"kind": "IngestRun", "name": "flights"}, {"kind": "Deployment", "name": "x"}])
    body["spec"]["parentRef"] = {"name": "above"}
    assert parents_of(body) == [RunKey(namespace="default", name="above")]


def test_a_run_is_read_once_for_each_version() -> None:
    store = RunCache()

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
