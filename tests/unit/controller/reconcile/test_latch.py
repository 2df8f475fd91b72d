"""A cancel that is taken back before the operator has seen it, and the mark by which it holds all the same."""

from __future__ import annotations

from typing import Any

import pytest
from tests.fakes.world import KEY, World, manifest

from ingestrun.controller.http.cancellation_check import answer
from ingestrun.kube.errors import Unknown
from ingestrun.kube.protocol import RunKey
from ingestrun.model.names import ANNOTATION_REQUESTED_BY, LABEL_CANCELLED, OPERATOR_NAME
from ingestrun.model.run import IngestRun, cancel_requested

STAMP = {"labels": {LABEL_CANCELLED: "true"}, "annotations": {ANNOTATION_REQUESTED_BY: "ada"}}
"""What the API server leaves on a run whose cancel was asked for, where the admission policies are installed."""

CHILD = RunKey(namespace="default", name="below")


def owned(*managers: str) -> list[dict[str, Any]]:
    """The managedFields of a run whose label these managers have sent."""
    fields: dict[str, Any] = {"f:metadata": {"f:labels": {".": {}, f"f:{LABEL_CANCELLED}": {}}}}
    return [{"manager": manager, "operation": "Update", "fieldsV1": fields} for manager in managers]


def asked_and_reverted(world: World) -> None:
    """What is left on the server of a patch and its revert."""
    world.cluster.user_patch_spec(KEY, {"cancel": True, "cancellation": {"reason": "storm", "policy": "Terminate"}})
    world.cluster.user_patch_metadata(KEY, STAMP)
    world.cluster.user_patch_spec(KEY, {"cancel": None, "cancellation": None})


async def test_cancel_taken_back_while_the_operator_was_down_is_applied_on_its_return() -> None:
    world = World()
    world.create()
    await world.settle()
    world.work(world.active_jobs()[0])
    created = len(world.cluster.calls("create", "jobs"))
    world.deaf |= {"IngestRun", "Job", "Pod"}
    asked_and_reverted(world)
    world.deaf.clear()
    world.restart()
    await world.play()
    assert world.phase == "Cancelled"
    assert len(world.cluster.calls("create", "jobs")) == created, "nothing was started on its return"
    record = world.status["cancellation"]
    assert record["requestedBy"] == "ada"
    assert "reason" not in record, "it was taken back with the cancel"
    assert record["policy"] == "Drain", "as was the policy"
    told = [event["reason"] for event in world.cluster.events()]
    assert (told.count("Cancelled"), told.count("CancelCleared")) == (1, 1)
    assert world.condition("Drained")["status"] == "True"


async def test_who_asked_is_known_though_it_is_taken_back_between_the_fence_and_cancelled() -> None:
    """Without the admission policies: the field manager goes with the field, and the operator's label alone is left."""
    world = World()
    world.create()
    await world.settle()
    world.restart()  # what was created before is not known to have been answered: the label goes first
    fields: dict[str, Any] = {"f:spec": {"f:cancel": {}}}

    async def revert(call: Any) -> None:
        if (call.verb, call.resource, call.stage) == ("patch", "ingestruns", "after"):
            world.cluster.on_call = None
            world.cluster.user_patch_spec(KEY, {"cancel": None})
            world.cluster.user_patch_metadata(KEY, {"managedFields": owned(OPERATOR_NAME)})

    world.cluster.on_call = revert
    world.cluster.user_patch_metadata(KEY, {"managedFields": [{"manager": "kubectl-patch", "fieldsV1": fields}]})
    world.cancel()
    await world.play()
    assert world.phase == "Cancelled"
    assert world.status["cancellation"]["requestedBy"] == "field manager kubectl-patch"
    assert [event["reason"] for event in world.cluster.events()].count("CancelCleared") == 1


async def test_revert_between_two_creates_starts_nothing_more() -> None:
    world = World()

    async def revert(call: Any) -> None:
        if (call.verb, call.resource, call.stage) == ("create", "jobs", "after"):
            world.cluster.on_call = None
            asked_and_reverted(world)

    world.cluster.on_call = revert
    world.create(batches={"partitions": {"count": 3}})
    await world.settle()
    assert world.phase == "Cancelled"
    assert len(world.cluster.calls("create", "jobs")) == 1


async def test_label_that_came_with_a_copied_manifest_cancels_nothing() -> None:
    world = World()
    body = manifest(batches={"partitions": {"count": 1}})
    body["metadata"] |= {**STAMP, "managedFields": owned("kubectl-client-side-apply")}
    world.cluster.user_create_run(body)
    assert not world.store.cancel_pending(KEY)
    await world.play()
    assert world.phase == "Succeeded"


@pytest.mark.parametrize(
    ("labels", "managers", "asks"),
    [
        ({}, [], False),
        ({LABEL_CANCELLED: "true"}, [], True),
        ({LABEL_CANCELLED: "false"}, [], False),
        ({LABEL_CANCELLED: "true"}, [OPERATOR_NAME], True),
        ({LABEL_CANCELLED: "true"}, ["kubectl-label"], False),
        ({LABEL_CANCELLED: "true"}, [OPERATOR_NAME, "kustomize-controller"], False),
    ],
    ids=["none", "by admission", "another value", "by the operator", "by hand", "by a tool as well"],
)
def test_whose_label_asks(labels: dict[str, str], managers: list[str], asks: bool) -> None:
    world = World()
    body = dict(world.create())
    body["metadata"] = {**body["metadata"], "labels": labels, "managedFields": owned(*managers)}
    assert IngestRun.read(body).cancel_requested is asks
    assert cancel_requested(body) is asks
    assert answer(body)["cancelled"] is asks


async def test_label_that_the_operator_put_on_for_a_parent_leaves_the_parent_named() -> None:
    """The label is stored, the write of Cancelled fails: the next pass finds both."""
    world = World()
    world.create()
    await world.settle()
    body = manifest(parentRef={"name": KEY.name})
    body["metadata"]["name"] = CHILD.name
    world.cluster.user_create_run(body)
    await world.settle()
    world.restart()  # what was created before is not known to have been answered: the label goes first
    world.cluster.fail_next(
        "patch", "ingestruns/status", Unknown("no answer"), match=lambda call: call.name == CHILD.name
    )
    world.cancel(cancellation={"cascade": True})
    await world.settle()
    while world.due:
        world.now = min(world.due.values())
        await world.settle()
        if world.cluster.run(CHILD)["status"]["phase"] == "Cancelled":
            break
    labelled = [call for call in world.cluster.calls("patch", "ingestruns") if call.name == CHILD.name]
    assert labelled[0].body == {"metadata": {"labels": {LABEL_CANCELLED: "true"}}}
    status = world.cluster.run(CHILD)["status"]
    assert status["cancellation"]["parent"] == KEY.name
    assert [e["reason"] for e in world.cluster.events()].count("CancelCleared") == 0
