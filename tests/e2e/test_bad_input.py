"""What can be wrong with a run's surroundings: status and Event say which batch, which stage and why.

All runs start together; each is waited for on its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import pytest

from tests.e2e.cluster import Json, Kubectl, condition, phase, wait_for
from tests.e2e.runs import ended, events, flights, run_of


@dataclass(frozen=True, kw_only=True)
class Case:
    """A source that does not answer as it should, and what is said of the fetch."""

    path: str
    retries: int
    reason: str
    words: str


CASES: Final = {
    "no-such-page": Case(path="flights.{namespace}/nothing-here", retries=3, reason="PermanentError", words="404"),
    "not-json": Case(path="flights.{namespace}/", retries=0, reason="Error", words="JSON"),
    "no-list": Case(path="flights.{namespace}/healthz", retries=0, reason="Error", words="no list of records"),
    "no-such-host": Case(path="nowhere.{namespace}/flights", retries=0, reason="Error", words="nowhere"),
}


MISSING: Final[dict[str, Json]] = {
    "no-secret": {"secret": {"secretName": "no-such-secret"}},
    "no-config-map": {"configMap": {"name": "no-such-config-map"}},
    "no-key": {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "no-such-key", "path": "a"}]}},
}
"""A volume that the kubelet cannot mount, because what the run names does not exist."""


@pytest.fixture(scope="module")
def started(kubectl: Kubectl, namespace: str) -> None:
    """All runs at once."""
    bodies = []
    for name, case in CASES.items():
        body = flights(namespace, name, retries=case.retries)
        body["spec"]["source"]["http"]["url"] = "http://" + case.path.format(namespace=namespace)
        bodies.append(body)
    hook = {"name": "wrong", "validate": {"columns": [{"name": "carrier", "type": "integer"}]}}
    batches: dict[str, Any] = {"cursor": {}, "size": 10_000, "limit": 10_000}
    bodies.append(flights(namespace, "wrong-type", hooks=[hook], batches=batches))
    workspace = {"persistentVolumeClaim": {"claimName": "no-such-claim"}}
    # The grace is longer than the tests before take, because a run that has failed cannot be cancelled.
    bodies.append(flights(namespace, "no-volume", workspace=workspace, podStart={"configurationSeconds": 3600}))
    for name, volume in MISSING.items():
        bodies.append(flights(namespace, name, retries=0))
        bodies[-1]["spec"]["podTemplate"] = {
            **bodies[-1]["spec"].get("podTemplate", {}),
            "volumes": [{"name": "more", **volume}],
            "volumeMounts": [{"name": "more", "mountPath": "/more"}],
        }
    kubectl.apply(bodies)


@pytest.mark.parametrize("name", CASES)
def test_source_that_does_not_answer_as_it_should(kubectl: Kubectl, namespace: str, started: None, name: str) -> None:
    case = CASES[name]
    run = ended(kubectl, namespace, name, seconds=480)
    assert phase(run) == "Failed"
    assert run["status"]["records"]["fetched"] == 0
    (failure,) = run["status"]["failures"]
    assert (failure["batch"], failure["stage"], failure["reason"]) == (0, "fetch", case.reason)
    assert case.words in failure["message"]
    assert case.words in condition(run, "Stalled")["message"]
    assert [message for message in events(kubectl, namespace, name, "StageFailed") if "batch 0, fetch" in message]
    assert events(kubectl, namespace, name, "Failed")


def test_rows_of_the_wrong_type_are_kept_with_their_reason(kubectl: Kubectl, namespace: str, started: None) -> None:
    """`carrier` is no integer: every row goes into quarantine, none is lost, none is published."""
    run = ended(kubectl, namespace, "wrong-type", seconds=480)
    assert phase(run) == "Succeeded", condition(run, "Succeeded")
    assert run["status"]["records"] == {"fetched": 10_000, "rejected": 10_000, "published": 0}


def test_missing_volume_is_said_at_once_and_cancel_works_from_there(
    kubectl: Kubectl, namespace: str, started: None
) -> None:
    def stuck() -> bool:
        said = condition(run_of(kubectl, namespace, "no-volume"), "Reconciling")
        return said.get("reason") == "PodNotStarting" and "no-such-claim" in said["message"]

    wait_for(stuck, seconds=180, what="the run to say what its pod waits for")
    assert events(kubectl, namespace, "no-volume", "PodNotStarting")
    kubectl("-n", namespace, "patch", "ir", "no-volume", "--type", "merge", "-p", '{"spec":{"cancel":true}}')
    kubectl("-n", namespace, "wait", "ir/no-volume", "--for=condition=Drained", "--timeout=180s")
    assert phase(run_of(kubectl, namespace, "no-volume")) == "Cancelled"
    left = kubectl.get("-n", namespace, "jobs", "-l", "ingestrun.dev/run=no-volume")["items"]
    assert left == []


@pytest.mark.parametrize("name", MISSING)
def test_missing_secret_or_config_map_as_a_volume_is_said_by_name(
    kubectl: Kubectl, namespace: str, started: None, name: str
) -> None:
    """The pod's status says nothing of it; the kubelet's Events do."""
    words = "no-such-key" if name == "no-key" else f'"no-such-{name.removeprefix("no-")}" not found'
    run = ended(kubectl, namespace, name, seconds=480)
    (failure,) = run["status"]["failures"]
    assert (phase(run), failure["reason"]) == ("Failed", "ContainerConfig")
    assert words in failure["message"]
    told = events(kubectl, namespace, name, "PodNotStarting")
    assert any(words in said for said in told), told


@pytest.mark.parametrize(
    ("patch", "sentence"),
    [
        ({"parallelism": 0}, "parallelism"),
        ({"fetch": {"image": "example/fetch:1"}}, "source"),
        ({"colour": "blue"}, "colour"),
    ],
)
def test_contradictory_manifest_is_refused_with_a_sentence(
    kubectl: Kubectl, namespace: str, patch: Json, sentence: str
) -> None:
    with pytest.raises(AssertionError, match=sentence):
        kubectl.apply([flights(namespace, "refused", **patch)])
