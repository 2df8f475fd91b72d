"""The spec: what is taken, what is refused, and what holds where nothing is said."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from ingestrun.model.run import IngestRun
from ingestrun.model.size_budget import MAX_FAILED_BATCHES
from ingestrun.model.spec import ConcurrencyPolicy, IngestRunSpec, OnBatchFailure, Partitions

OWN: dict[str, Any] = {
    "fetch": {"image": "registry.example/fetch:1"},
    "publish": {"image": "registry.example/publish:1"},
    "batches": {"cursor": {}},
}
BUILT_IN: dict[str, Any] = {
    "source": {"http": {"url": "https://example.org/items", "pagination": {"page": {}}}},
    "sink": {"parquet": {"path": "items"}},
    "workspace": {"persistentVolumeClaim": {"claimName": "ingest"}},
    "batches": {"cursor": {}},
}


def spec(base: dict[str, Any] = OWN, **changes: Any) -> IngestRunSpec:
    merged = {name: value for name, value in (base | changes).items() if value is not None}
    return IngestRunSpec.model_validate(merged)


def test_defaults() -> None:
    told = spec()

    assert (told.cancel, told.suspend) == (False, False)
    assert (told.parallelism, told.retries) == (4, 3)
    assert (told.backoff.initial_seconds, told.backoff.max_seconds) == (10, 600)
    assert told.backpressure.retry_seconds == 60
    assert (told.pod_start.image_pull_seconds, told.pod_start.configuration_seconds) == (120, 120)
    assert (told.pod_start.refused_seconds, told.pod_start.infrastructure_seconds) == (120, None)
    assert told.on_batch_failure is OnBatchFailure.FAIL_RUN
    assert told.batches.size == 10_000
    assert told.batches.cursor is not None
    assert told.batches.cursor.start == ""
    assert told.active_deadline_seconds is None
    assert told.stale_after_seconds is None
    assert told.ttl_seconds_after_finished is None
    assert told.concurrency is None
    keyed = spec(concurrency={"key": "geo"}).concurrency
    assert keyed is not None
    assert keyed.policy is ConcurrencyPolicy.ALLOW
    assert told.max_failed_batches is None


def test_built_in_defaults() -> None:
    told = spec(BUILT_IN)

    assert told.source is not None
    assert told.source.http is not None
    assert told.source.http.pagination.page is not None
    assert told.source.http.pagination.page.size_param == "per_page"
    assert told.source.http.page_size == 1000


@pytest.mark.parametrize(
    ("base", "changes", "sentence"),
    [
        (OWN, {"source": BUILT_IN["source"]}, "exactly one of source, fetch"),
        (OWN, {"fetch": None}, "exactly one of source, fetch"),
        (OWN, {"sink": BUILT_IN["sink"]}, "exactly one of sink, publish"),
        (OWN, {"publish": None}, "exactly one of sink, publish"),
        (OWN, {"batches": {}}, "exactly one of cursor, partitions"),
        (OWN, {"batches": {"cursor": {}, "partitions": {"count": 1}}}, "exactly one of cursor, partitions"),
        (OWN, {"batches": {"partitions": {}}}, "exactly one of count, values"),
        (OWN, {"batches": {"partitions": {"count": 1, "values": ["a"]}}}, "exactly one of count, values"),
        (OWN, {"batches": {"partitions": {"values": ["a"], "file": "a.txt"}}}, "file goes together with count"),
        (OWN, {"hooks": [{"name": "check"}]}, "exactly one of validate_, container"),
        (
            OWN,
            {"hooks": [{"name": "check", "validate": {"columns": [{"name": "a"}]}, "container": {"image": "a"}}]},
            "exactly one of validate_, container",
        ),
        (
            OWN,
            {"fetch": {"image": "a", "env": [{"name": "A", "valueFrom": {}}]}},
            "exactly one of secret_key_ref, config_map_key_ref",
        ),
        (OWN, {"fetch": {"image": "a", "envFrom": [{}]}}, "exactly one of secret_ref, config_map_ref"),
        (BUILT_IN, {"source": {}}, "exactly one of files, http"),
        (
            BUILT_IN,
            {"source": {"http": {"url": "https://example.org", "pagination": {}}}},
            "exactly one of page, offset, cursor, link",
        ),
        (
            BUILT_IN,
            {"source": {"http": {"url": "https://example.org", "pagination": {"page": {}, "link": {}}}}},
            "exactly one of page, offset, cursor, link",
        ),
    ],
)
def test_unions(base: dict[str, Any], changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        spec(base, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"batches": None},
        {"parallelism": 0},
        {"parallelism": 1001},
        {"parallelism": None, "retries": 101},
        {"retries": -1},
        {"maxFailedBatches": MAX_FAILED_BATCHES + 1},
        {"maxFailedBatches": 0},
        {"onBatchFailure": "Ignore"},
        {"activeDeadlineSeconds": 0},
        {"staleAfterSeconds": 0},
        {"ttlSecondsAfterFinished": -1},
        {"concurrency": {"policy": "Forbid"}},
        {"concurrency": {"key": "geo", "policy": "Queue"}},
        {"concurrency": {"key": "a,b"}},
        {"backpressure": {"retrySeconds": 0}},
        {"podStart": {"imagePullSeconds": 0}},
        {"podStart": {"infrastructureSeconds": 31_536_001}},
        {"backoff": {"maxSeconds": 86_401}},
        {"cancellation": {"reason": ""}},
        {"cancellation": {"reason": "x" * 513}},
        {"hooks": [{"name": "Upper", "container": {"image": "a"}}]},
        {"hooks": [{"name": f"h{n}", "container": {"image": "a"}} for n in range(17)]},
        {"batches": {"cursor": {}, "size": 0}},
        {"batches": {"partitions": {"count": 1_000_001}}},
        {"batches": {"partitions": {"values": []}}},
        {"batches": {"partitions": {"values": [""]}}},
        {"batches": {"partitions": {"values": ["x"] * 1001}}},
        {"fetch": {"image": ""}},
        {"fetch": {"image": "a", "imagePullPolicy": "Sometimes"}},
        {"fetch": {"image": "a", "env": [{"name": "1A", "value": ""}]}},
    ],
)
def test_bounds(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        spec(**changes)


def test_partitions_know_how_many_they_are() -> None:
    assert Partitions(count=7).total == 7
    assert Partitions(values=["a", "b"]).total == 2


def test_a_newer_crds_fields_are_ignored() -> None:
    assert spec(mood="good") == spec()


def test_a_hook_of_the_built_in_worker() -> None:
    told = spec(hooks=[{"name": "check", "validate": {"columns": [{"name": "id", "required": True}]}}])

    (hook,) = told.hooks
    assert hook.validate_ is not None
    assert hook.validate_.columns[0].required


def body(**metadata: Any) -> dict[str, Any]:
    return {
        "metadata": {
            "name": "geo",
            "namespace": "default",
            "uid": "6f0c1b9e-4f4a-4f0e-8a53-0d4be2a5b7c1",
            "resourceVersion": "1",
            "creationTimestamp": "2026-11-23T03:04:05Z",
        }
        | metadata,
        "spec": OWN,
    }


def test_who_asked_for_the_cancel() -> None:
    fields = [
        {"manager": "kubectl-create", "fieldsV1": {"f:spec": {"f:batches": {}}}},
        {"manager": "kubectl-patch", "fieldsV1": {"f:spec": {"f:cancel": {}}}},
        {"manager": "operator", "subresource": "status", "fieldsV1": {"f:status": {}}},
    ]

    assert IngestRun.read(body()).metadata.cancel_requested_by is None
    assert IngestRun.read(body(managedFields=fields)).metadata.cancel_requested_by == "field manager kubectl-patch"
    stamped = body(managedFields=fields, annotations={"ingestrun.dev/cancel-requested-by": "ada@example.org"})
    assert IngestRun.read(stamped).metadata.cancel_requested_by == "ada@example.org"


def test_a_run_without_status_has_the_first_one() -> None:
    run = IngestRun.read(body())

    assert run.status.observed_generation == -1
    assert run.status.phase is None
