"""Compact bodies say the same as those that arrived, of all that the operator reads."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from tests.fakes.world import manifest

from ingestrun.controller.state.compact import LAST_APPLIED, SHARED_PARTS, BodyCompactor
from ingestrun.model.names import ANNOTATION_REQUESTED_BY, LABEL_CANCELLED
from ingestrun.model.run import IngestRun, cancel_requested

LABEL: dict[str, Any] = {"f:metadata": {"f:labels": {".": {}, f"f:{LABEL_CANCELLED}": {}, "f:team": {}}}}
CANCEL: dict[str, Any] = {"f:spec": {"f:cancel": {}, "f:suspend": {}}}


def body(*entries: dict[str, Any], spec: dict[str, Any] | None = None, **meta: Any) -> dict[str, Any]:
    metadata = {
        "name": "n",
        "namespace": "d",
        "uid": "u-1",
        "resourceVersion": "5",
        "creationTimestamp": "2026-11-28T11:00:00Z",
        "managedFields": list(entries),
    }
    return {"metadata": {**metadata, **meta}, "spec": spec or manifest()["spec"], "status": {"observedGeneration": -1}}


@pytest.mark.parametrize(
    "run",
    [
        body(),
        body({"manager": "kubectl-patch", "fieldsV1": CANCEL}, spec={**manifest()["spec"], "cancel": True}),
        body({"manager": "argocd", "fieldsV1": {"f:spec": {"f:source": {}}}}, {"manager": "k", "fieldsV1": CANCEL}),
        body({"manager": "ingestrun-operator", "fieldsV1": LABEL}, labels={LABEL_CANCELLED: "true"}),
        body({"manager": "kubectl", "fieldsV1": LABEL}, labels={LABEL_CANCELLED: "true"}),
        body(labels={LABEL_CANCELLED: "true"}),
        body({"fieldsV1": CANCEL}),
        body({"manager": "x"}, annotations={ANNOTATION_REQUESTED_BY: "alice", LAST_APPLIED: "{}"}),
    ],
)
def test_a_compact_body_says_the_same(run: dict[str, Any]) -> None:
    before = copy.deepcopy(run)
    compact = BodyCompactor().compact(run)
    assert run == before, "what arrived is not changed"
    assert cancel_requested(compact) == cancel_requested(run)
    full, read = IngestRun.read(run), IngestRun.read(compact)
    assert read.cancel_requested == full.cancel_requested
    assert read.metadata.cancel_requested_by == full.metadata.cancel_requested_by
    assert (read.spec, read.status, read.metadata.labels) == (full.spec, full.status, full.metadata.labels)
    assert LAST_APPLIED not in read.metadata.annotations
    assert read.metadata.annotations.get(ANNOTATION_REQUESTED_BY) == full.metadata.annotations.get(
        ANNOTATION_REQUESTED_BY
    )


def test_managed_fields_that_say_nothing_of_a_cancel_are_dropped() -> None:
    compact = BodyCompactor().compact(body({"manager": "kubectl", "fieldsV1": {"f:spec": {"f:source": {}}}}))
    assert "managedFields" not in compact["metadata"]


def test_equal_parts_are_one_object() -> None:
    compactor = BodyCompactor()
    first, second = (compactor.compact(copy.deepcopy(body())) for _ in range(2))
    other = compactor.compact(body(spec={**manifest()["spec"], "fetch": {"image": "example/other:1"}}))
    for part in ("fetch", "hooks", "publish", "batches"):
        assert first["spec"][part] is second["spec"][part]
    assert other["spec"]["publish"] is first["spec"]["publish"], "also of a spec that differs elsewhere"
    assert other["spec"]["fetch"] == {"image": "example/other:1"}


def test_an_unchanged_spec_is_kept_as_it_is() -> None:
    compactor = BodyCompactor()
    before = compactor.compact(body())
    after = compactor.compact({**body(resourceVersion="6"), "status": {"phase": "Running"}}, before=before)
    assert after["spec"] is before["spec"]
    assert after["status"] == {"phase": "Running"}


def test_parts_that_are_not_used_any_more_are_let_go() -> None:
    compactor = BodyCompactor()
    first = compactor.compact(body())
    for number in range(SHARED_PARTS):
        compactor.compact(body(spec={"fetch": {"image": f"example/worker:{number + 2}"}}))
    assert compactor.compact(body())["spec"]["publish"] is not first["spec"]["publish"]
