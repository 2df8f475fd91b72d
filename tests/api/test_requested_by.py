"""Who cancelled: the name of the user whose request turned `spec.cancel` true, and nobody else's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest
from kubernetes import client

from ingestrun.model import names
from ingestrun.model.run import IngestRun
from tests.api.conftest import Cluster, Json, WaitFor, refusal
from tests.api.test_fence import (
    ANNOTATION,
    COMPONENT,
    LABEL,
    OPERATOR_USER,
    VALIDATING,
    as_user,
    component,
    installed,
    labelled_namespace,
    let,
    operating,
)
from tests.api.test_runs import drained, in_phase, spec

RUNS: Final = (names.GROUP, names.VERSION)
FORGED: Final = {"metadata": {"annotations": {ANNOTATION: "alice"}}}
MARKED: Final = {"metadata": {"labels": {LABEL: "true"}}}
UNMARKED: Final = {"metadata": {"labels": {LABEL: None}}}


@pytest.fixture(scope="module")
def labels(cluster: Cluster, crd: Json) -> Iterator[dict[str, str]]:
    """The whole component, installed."""
    assert crd
    with installed(cluster, component(COMPONENT)) as found:
        yield found


@pytest.fixture
def namespace(cluster: Cluster, labels: dict[str, str]) -> Iterator[str]:
    """A namespace in which the policies hold, and in which alice and bob may do all but write a status."""
    name = labelled_namespace(cluster, labels)
    let(cluster, name, "alice", "bob", OPERATOR_USER)
    yield name
    cluster.core.delete_namespace(name)


@pytest.fixture(scope="module")
def alice(cluster: Cluster) -> Cluster:
    return as_user(cluster, "alice")


@pytest.fixture(scope="module")
def bob(cluster: Cluster) -> Cluster:
    return as_user(cluster, "bob")


def stamped(run: Json) -> str | None:
    found: str | None = run["metadata"].get("annotations", {}).get(ANNOTATION)
    return found


def marked(run: Json) -> str | None:
    found: str | None = run["metadata"].get("labels", {}).get(LABEL)
    return found


def replace_run(cluster: Cluster, namespace: str, name: str, change: Callable[[Json], None]) -> Json:
    """`kubectl edit` and `kubectl replace`: read, change, PUT."""
    for attempt in range(5):
        body = cluster.run(namespace, name)
        change(body)
        try:
            replaced: Json = cluster.custom.replace_namespaced_custom_object(*RUNS, namespace, names.PLURAL, name, body)
        except client.ApiException as error:
            # Somebody else's operator that watches all namespaces has written in between.
            if error.status != 409 or attempt == 4:
                raise
        else:
            return replaced
    raise AssertionError


def apply_run(cluster: Cluster, namespace: str, name: str, body: Json, manager: str = "kubectl") -> Json:
    """`kubectl apply --server-side --force-conflicts`."""
    full = {"apiVersion": f"{names.GROUP}/{names.VERSION}", "kind": names.KIND, **body}
    full["metadata"] = {**full.get("metadata", {}), "name": name, "namespace": namespace}
    applied: Json = cluster.custom.patch_namespaced_custom_object(
        *RUNS,
        namespace,
        names.PLURAL,
        name,
        full,
        field_manager=manager,
        force=True,
        _content_type="application/apply-patch+yaml",
    )
    return applied


def cancel_by_put(cluster: Cluster, namespace: str, name: str) -> Json:
    return replace_run(cluster, namespace, name, lambda body: body["spec"].update(cancel=True))


def cancel_by_json_patch(cluster: Cluster, namespace: str, name: str) -> Json:
    patched: Json = cluster.custom.patch_namespaced_custom_object(
        *RUNS,
        namespace,
        names.PLURAL,
        name,
        [{"op": "add", "path": "/spec/cancel", "value": True}],
        _content_type="application/json-patch+json",
    )
    return patched


def cancel_by_apply(cluster: Cluster, namespace: str, name: str) -> Json:
    return apply_run(cluster, namespace, name, {"spec": spec(cancel=True)})


WAYS: Final[dict[str, Callable[[Cluster, str, str], Json]]] = {
    "merge patch": lambda cluster, namespace, name: cluster.cancel(namespace, name),
    "JSON patch": cancel_by_json_patch,
    "replace": cancel_by_put,
    "server-side apply": cancel_by_apply,
}


# --------------------------------------------------------------------------------------------- the real name


@pytest.mark.parametrize("way", WAYS)
def test_whoever_cancels_is_named(way: str, namespace: str, alice: Cluster, bob: Cluster) -> None:
    bob.create_run(namespace, spec(), name="run")
    run = WAYS[way](alice, namespace, "run")
    assert (stamped(run), marked(run)) == ("alice", "true")


def test_cancelled_at_creation_names_the_creator(namespace: str, alice: Cluster) -> None:
    run = alice.create_run(namespace, spec(cancel=True))
    assert (stamped(run), marked(run)) == ("alice", "true")


def test_name_reaches_the_status_the_event_and_the_log(
    cluster: Cluster, namespace: str, alice: Cluster, bob: Cluster, wait_for: WaitFor, tmp_path: Path
) -> None:
    with operating(cluster, namespace, tmp_path) as operator:
        bob.create_run(namespace, spec({"hold": "true"}), name="run")
        wait_for(lambda: cluster.jobs(namespace), 60, "a Job")
        alice.cancel(namespace, "run", "wrong source")
        run = wait_for(in_phase(cluster, namespace, "run", "Cancelled"), 30, "Cancelled")
        assert run["status"]["cancellation"]["requestedBy"] == "alice"
        # What comes after changes no record: neither another's cancel, nor a change of its details.
        bob.patch_spec(namespace, "run", cancel=None)
        bob.patch_run(namespace, "run", {"spec": {"cancel": True}, **FORGED})
        bob.patch_spec(namespace, "run", cancellation={"reason": "mine", "policy": "Terminate"})
        wait_for(drained(cluster, namespace, "run"), 60, "Drained")
        assert cluster.run(namespace, "run")["status"]["cancellation"]["requestedBy"] == "alice"

        def told() -> list[str]:
            events = cluster.core.list_namespaced_event(namespace, field_selector="reason=Cancelled").items
            return [str(event.message) for event in events]

        assert wait_for(told, 10, "the Event") == ["cancelled by alice: wrong source"]
        (line,) = operator.lines("ingest run cancelled")
        assert line["why"] == "cancelled by alice: wrong source"


@pytest.mark.parametrize("way", ["at creation", *WAYS])
def test_no_field_manager_owns_the_marks(way: str, namespace: str, alice: Cluster) -> None:
    """Else a tool that undoes a manager's changes, as Flux does with kubectl's, would take them off. By this the
    operator tells a mark from a copied label, too: it counts as the request, though `cancel` be taken back."""
    if way == "at creation":
        alice.create_run(namespace, spec(cancel=True), name="run")
    else:
        alice.create_run(namespace, spec(), name="run")
        WAYS[way](alice, namespace, "run")
    run = alice.patch_spec(namespace, "run", cancel=None)
    assert marked(run) == "true"
    for entry in run["metadata"]["managedFields"]:
        assert LABEL not in str(entry["fieldsV1"])
        assert ANNOTATION not in str(entry["fieldsV1"])
    assert IngestRun.read(run).cancel_requested


def test_label_set_by_hand_asks_for_nothing(namespace: str, older: str, alice: Cluster, bob: Cluster) -> None:
    """Neither where it is dropped, nor where it can be set together with a cancel that is then taken back."""
    bob.create_run(namespace, spec(), name="run", metadata=MARKED["metadata"])
    assert not IngestRun.read(bob.patch_run(namespace, "run", MARKED)).cancel_requested
    bob.create_run(older, spec(cancel=True), name="run", metadata=MARKED["metadata"])
    run = bob.patch_spec(older, "run", cancel=None)
    assert marked(run) == "true"
    assert not IngestRun.read(run).cancel_requested


# ----------------------------------------------------------------------------------------------- no forging


def test_another_name_with_the_cancel_is_overwritten(namespace: str, bob: Cluster) -> None:
    made = bob.create_run(namespace, spec(cancel=True), metadata=FORGED["metadata"])
    assert stamped(made) == "bob"

    def forge(body: Json) -> None:
        body["spec"]["cancel"] = True
        body["metadata"].update(FORGED["metadata"])

    ways: list[Callable[[str], Json]] = [
        lambda name: bob.patch_run(namespace, name, {"spec": {"cancel": True}, **FORGED}),
        lambda name: apply_run(bob, namespace, name, {"spec": spec(cancel=True), **FORGED}),
        lambda name: replace_run(bob, namespace, name, forge),
    ]
    for number, way in enumerate(ways):
        bob.create_run(namespace, spec(), name=f"run-{number}")
        assert stamped(way(f"run-{number}")) == "bob"


def test_marks_without_a_cancel_are_dropped(cluster: Cluster, namespace: str, bob: Cluster) -> None:
    """Dropped and not refused: a manifest copied from a cluster may carry them."""
    carried = {"annotations": {ANNOTATION: "alice", "team": "geo"}, "labels": {LABEL: "true", "team": "geo"}}
    made = bob.create_run(namespace, spec(), name="run", metadata=carried)
    for run in (
        made,
        bob.patch_run(namespace, "run", {"metadata": carried}),
        apply_run(bob, namespace, "run", {"metadata": carried, "spec": spec()}),
        cluster.patch_run(namespace, "run", {"metadata": carried}),
    ):
        assert run["metadata"]["annotations"] == {"team": "geo"}
        assert run["metadata"]["labels"] == {"team": "geo"}


def test_marks_of_a_cancel_stay_as_they_are(cluster: Cluster, namespace: str, alice: Cluster, bob: Cluster) -> None:
    alice.create_run(namespace, spec(), name="run")
    alice.cancel(namespace, "run")

    def bare(body: Json) -> None:
        del body["metadata"]["annotations"], body["metadata"]["labels"]

    def renamed(body: Json) -> None:
        body["metadata"]["annotations"][ANNOTATION] = "bob"

    with_cancel, forged = {"spec": spec(cancel=True)}, {"metadata": {"annotations": {ANNOTATION: "bob"}}}
    ways: list[Callable[[Cluster], Json]] = [
        lambda who: who.patch_run(namespace, "run", forged),
        lambda who: who.patch_run(namespace, "run", {"metadata": {"annotations": {ANNOTATION: None}}}),
        lambda who: who.patch_run(namespace, "run", {"metadata": {"annotations": None, "labels": None}}),
        lambda who: who.patch_run(namespace, "run", UNMARKED),
        lambda who: replace_run(who, namespace, "run", bare),
        lambda who: replace_run(who, namespace, "run", renamed),
        lambda who: apply_run(who, namespace, "run", with_cancel),
        lambda who: apply_run(who, namespace, "run", {**with_cancel, **forged}),
        lambda who: apply_run(who, namespace, "run", with_cancel),
    ]
    for who in (bob, cluster):
        for way in ways:
            way(who)
            run = cluster.run(namespace, "run")
            assert (stamped(run), marked(run)) == ("alice", "true")


def test_status_is_no_way_around(cluster: Cluster, namespace: str, alice: Cluster) -> None:
    alice.create_run(namespace, spec(), name="run")
    alice.cancel(namespace, "run")
    body = {**FORGED, "status": {"phase": "Cancelled"}}
    body["metadata"] = {"annotations": {ANNOTATION: "mallory"}, "labels": {LABEL: None}}
    run = cluster.custom.patch_namespaced_custom_object_status(
        *RUNS, namespace, names.PLURAL, "run", body, _content_type="application/merge-patch+json"
    )
    assert (stamped(run), marked(run)) == ("alice", "true")


def test_escalation_stamps_nobody_again(namespace: str, alice: Cluster, bob: Cluster) -> None:
    alice.create_run(namespace, spec(), name="run")
    alice.cancel(namespace, "run")
    run = bob.patch_spec(namespace, "run", cancel=True, cancellation={"policy": "Terminate", "reason": "hurry"})
    assert stamped(run) == "alice"


def test_cancel_again_after_a_revert_stamps_only_while_it_asks_for_something(
    cluster: Cluster, namespace: str, alice: Cluster, bob: Cluster
) -> None:
    """Taken back before the operator has acted, the next one to ask is named; on a Cancelled run nobody is."""
    alice.create_run(namespace, spec(), name="run")
    alice.cancel(namespace, "run")
    run = alice.patch_spec(namespace, "run", cancel=None)
    assert (stamped(run), marked(run)) == ("alice", "true")
    assert stamped(bob.cancel(namespace, "run")) == "bob"
    cluster.patch_status(namespace, "run", {"phase": "Cancelled"})
    as_user(cluster, OPERATOR_USER).patch_run(namespace, "run", UNMARKED)
    alice.patch_spec(namespace, "run", cancel=None)
    run = alice.cancel(namespace, "run")
    assert (stamped(run), marked(run)) == ("bob", None), "and the fence is not armed again, for ever"


def test_operator_sets_and_removes_the_label_and_names_others_with_a_cancel_alone(
    cluster: Cluster, namespace: str, alice: Cluster
) -> None:
    """With a cancel: its HTTP API has authenticated whom it names."""
    operator = as_user(cluster, OPERATOR_USER)
    alice.create_run(namespace, spec(), name="run")
    assert marked(operator.patch_run(namespace, "run", MARKED)) == "true"
    assert marked(operator.patch_run(namespace, "run", UNMARKED)) is None
    assert stamped(operator.patch_run(namespace, "run", FORGED)) is None
    assert stamped(operator.patch_run(namespace, "run", {"spec": {"cancel": True}, **FORGED})) == "alice"
    other = {"metadata": {"annotations": {ANNOTATION: "bob"}}}
    assert stamped(operator.patch_run(namespace, "run", {"spec": {"cancel": True}, **other})) == "alice"
    alice.create_run(namespace, spec(), name="other")
    assert stamped(operator.patch_run(namespace, "other", {"spec": {"cancel": True}})) == OPERATOR_USER


def test_refused_cancel_leaves_no_mark(cluster: Cluster, namespace: str, alice: Cluster) -> None:
    alice.create_run(namespace, spec(), name="run")
    cluster.patch_status(namespace, "run", {"phase": "Succeeded"})
    with pytest.raises(client.ApiException) as caught:
        alice.cancel(namespace, "run")
    assert "already Succeeded and cannot be cancelled" in refusal(caught.value)
    run = cluster.run(namespace, "run")
    assert (stamped(run), marked(run)) == (None, None)


# ------------------------------------------------------------------------------- before 1.36: the lock alone


@pytest.fixture(scope="module")
def older_labels(cluster: Cluster, crd: Json) -> Iterator[dict[str, str]]:
    """What an older cluster has: nothing that stamps."""
    assert crd
    with installed(cluster, component(VALIDATING)) as found:
        yield found


@pytest.fixture
def older(cluster: Cluster, older_labels: dict[str, str]) -> Iterator[str]:
    name = labelled_namespace(cluster, older_labels)
    let(cluster, name, "alice", "bob", OPERATOR_USER)
    yield name
    cluster.core.delete_namespace(name)


def refused(act: Callable[[], object], fragment: str) -> None:
    with pytest.raises(client.ApiException) as caught:
        act()
    assert caught.value.status == 403
    assert fragment in refusal(caught.value)


def test_without_the_stamp_another_name_is_refused(older: str, bob: Cluster) -> None:
    own = {"metadata": {"annotations": {ANNOTATION: "bob"}}}
    sentence = "can only be set to your own name"
    refused(lambda: bob.create_run(older, spec(), metadata=FORGED["metadata"]), sentence)
    refused(lambda: bob.create_run(older, spec(cancel=True), metadata=FORGED["metadata"]), sentence)
    bob.create_run(older, spec(), name="run")
    refused(lambda: bob.patch_run(older, "run", FORGED), sentence)
    refused(lambda: bob.patch_run(older, "run", {"spec": {"cancel": True}, **FORGED}), sentence)
    refused(lambda: apply_run(bob, older, "run", {"spec": spec(cancel=True), **FORGED}), sentence)
    refused(lambda: bob.patch_run(older, "run", own), sentence)
    assert stamped(bob.patch_run(older, "run", {"spec": {"cancel": True}, **own})) == "bob"


def test_without_the_stamp_the_operator_names_others_with_a_cancel_alone(
    cluster: Cluster, older: str, alice: Cluster
) -> None:
    operator = as_user(cluster, OPERATOR_USER)
    alice.create_run(older, spec(), name="run")
    refused(lambda: operator.patch_run(older, "run", FORGED), "by the request that sets spec.cancel")
    assert stamped(operator.patch_run(older, "run", {"spec": {"cancel": True}, **FORGED})) == "alice"


def test_without_the_stamp_the_field_manager_is_named_and_said_to_be_one(
    cluster: Cluster, older: str, alice: Cluster, wait_for: WaitFor, tmp_path: Path
) -> None:
    with operating(cluster, older, tmp_path):
        alice.create_run(older, spec({"pending": "true"}), name="run")
        alice.custom.patch_namespaced_custom_object(
            *RUNS,
            older,
            names.PLURAL,
            "run",
            {"spec": {"cancel": True}},
            field_manager="kubectl-patch",
            _content_type="application/merge-patch+json",
        )
        run = wait_for(in_phase(cluster, older, "run", "Cancelled"), 30, "Cancelled")
        assert run["status"]["cancellation"]["requestedBy"] == "field manager kubectl-patch"
        # The operator arms the fence itself where the API server could not.
        wait_for(lambda: marked(cluster.run(older, "run")), 10, "the label")


def test_without_the_stamp_what_a_tool_repeats_or_omits_passes(
    cluster: Cluster, older: str, alice: Cluster, bob: Cluster
) -> None:
    alice.create_run(older, spec(), name="run")
    own = {"annotations": {ANNOTATION: "alice"}, "labels": {LABEL: "true"}}
    alice.patch_run(older, "run", {"spec": {"cancel": True}, "metadata": own})
    apply_run(bob, older, "run", {"metadata": own, "spec": spec()}, manager="kustomize-controller")
    run = apply_run(bob, older, "run", {"spec": spec(cancel=True)}, manager="argocd-controller")
    assert (stamped(run), marked(run)) == ("alice", "true")
    refused(lambda: bob.patch_run(older, "run", {"metadata": {"annotations": {ANNOTATION: "bob"}}}), "your own name")


def test_without_the_stamp_the_label_is_guarded(cluster: Cluster, older: str, bob: Cluster) -> None:
    operator = as_user(cluster, OPERATOR_USER)
    bob.create_run(older, spec(), name="run")
    refused(lambda: bob.patch_run(older, "run", MARKED), "leave it out, and set spec.cancel")
    refused(lambda: bob.create_run(older, spec(), metadata=MARKED["metadata"]), "leave it out, and set spec.cancel")
    assert marked(operator.patch_run(older, "run", MARKED)) == "true"
    bob.cancel(older, "run")
    cluster.patch_status(older, "run", {"phase": "Cancelled"})
    refused(lambda: bob.patch_run(older, "run", UNMARKED), "the operator takes it off when all is quiet")
    assert marked(operator.patch_run(older, "run", UNMARKED)) is None
