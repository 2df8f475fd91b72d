"""What can be wrong with a run's surroundings: status and Event say which batch, which stage and why."""

from __future__ import annotations

from typing import Any

import pytest

from tests.e2e.cluster import Json, Kubectl, condition, phase, wait_for
from tests.e2e.runs import ended, events, flights, run_of


def with_url(namespace: str, name: str, url: str, **changes: Any) -> Json:
    body = flights(namespace, name, **changes)
    body["spec"]["source"]["http"]["url"] = url.format(namespace=namespace)
    return body


@pytest.mark.parametrize(
    ("name", "url", "retries", "reason", "words"),
    [
        ("no-such-page", "http://flights.{namespace}/nothing-here", 3, "PermanentError", "404"),
        ("not-json", "http://flights.{namespace}/", 0, "Error", "JSON"),
        ("no-list", "http://flights.{namespace}/healthz", 0, "Error", "no list of records"),
        ("no-such-host", "http://nowhere.{namespace}/flights", 0, "Error", "nowhere"),
    ],
)
def test_source_that_does_not_answer_as_it_should(
    kubectl: Kubectl, namespace: str, name: str, url: str, retries: int, reason: str, words: str
) -> None:
    kubectl.apply([with_url(namespace, name, url, retries=retries)])
    run = ended(kubectl, namespace, name, seconds=480)
    assert phase(run) == "Failed"
    assert run["status"]["records"]["fetched"] == 0
    (failure,) = run["status"]["failures"]
    assert (failure["batch"], failure["stage"], failure["reason"]) == (0, "fetch", reason)
    assert words in failure["message"]
    assert words in condition(run, "Stalled")["message"]
    assert [message for message in events(kubectl, namespace, name, "StageFailed") if "batch 0, fetch" in message]
    assert events(kubectl, namespace, name, "Failed")


def test_rows_of_the_wrong_type_are_kept_with_their_reason(kubectl: Kubectl, namespace: str) -> None:
    """`carrier` is no integer: every row goes into quarantine, none is lost, none is published."""
    hook = {"name": "wrong", "validate": {"columns": [{"name": "carrier", "type": "integer"}]}}
    body = flights(namespace, "wrong-type", hooks=[hook])
    body["spec"]["batches"] = {"cursor": {}, "size": 10_000, "limit": 10_000}
    kubectl.apply([body])
    run = ended(kubectl, namespace, "wrong-type", seconds=480)
    assert phase(run) == "Succeeded", condition(run, "Succeeded")
    assert run["status"]["records"] == {"fetched": 10_000, "rejected": 10_000, "published": 0}


def test_missing_volume_is_said_at_once_and_cancel_works_from_there(kubectl: Kubectl, namespace: str) -> None:
    workspace = {"persistentVolumeClaim": {"claimName": "no-such-claim"}}
    kubectl.apply([flights(namespace, "no-volume", workspace=workspace)])

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


def test_missing_image_is_said_then_fails_the_run(kubectl: Kubectl, namespace: str) -> None:
    """The run of `without_image`, begun with the session."""
    run = ended(kubectl, namespace, "no-image", seconds=480)
    assert phase(run) == "Failed"
    (failure,) = run["status"]["failures"]
    assert (failure["batch"], failure["stage"], failure["reason"]) == (0, "fetch", "ImagePull")
    assert "localhost/no-such-image:1" in failure["message"]
    (said,) = events(kubectl, namespace, "no-image", "PodNotStarting")
    assert "localhost/no-such-image:1" in said


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
