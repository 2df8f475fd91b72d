"""What a pod's status and the Events about it say of why it does not start, in the words of Kubernetes 1.36."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from ingestrun.planner.batch.obstacle import (
    PodWait,
    StartEvent,
    claim_obstacle,
    creation_obstacle,
    pod_event_obstacle,
    read_start_event,
    read_wait,
    status_obstacle,
)

START = datetime(2026, 11, 28, 7, 0, tzinfo=UTC)


def at(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


def text(seconds: float) -> str:
    return at(seconds).strftime("%Y-%m-%dT%H:%M:%SZ")


def event(
    note: str, *, reason: str = "FailedMount", first: float = 1, last: float | None = None, **more: Any
) -> StartEvent:
    return StartEvent(
        **{
            "uid": "u",
            "name": "n",
            "reason": reason,
            "note": note,
            "first": at(first),
            "last": at(first if last is None else last),
            **more,
        }
    )


META: dict[str, Any] = {"name": "p", "creationTimestamp": text(0), "labels": {"ingestrun.dev/stage": "fetch"}}
SPEC: dict[str, Any] = {"containers": [{"name": "fetch", "image": "example/fetch:1"}]}


def unscheduled(message: str, *, reason: str = "Unschedulable") -> dict[str, Any]:
    condition = {
        "type": "PodScheduled",
        "status": "False",
        "reason": reason,
        "message": message,
        "lastTransitionTime": text(3),
    }
    return {"phase": "Pending", "conditions": [condition]}


def placed(*conditions: tuple[str, float], init: list[dict[str, Any]] | None = None, **state: Any) -> dict[str, Any]:
    """The status of a pod that a kubelet took after 5 s; each condition given is True since then."""
    true = [{"type": kind, "status": "True", "lastTransitionTime": text(since)} for kind, since in conditions]
    return {
        "phase": "Pending",
        "startTime": text(5),
        "conditions": [{"type": "PodScheduled", "status": "True", "lastTransitionTime": text(4)}, *true],
        "initContainerStatuses": init or [],
        "containerStatuses": [{"name": "fetch", "state": state or {"waiting": {"reason": "ContainerCreating"}}}],
    }


NODES = "0/5 nodes are available: "
PREEMPTION = (
    " no new claims to deallocate, preemption: 0/5 nodes are available: 5 Preemption is not helpful for scheduling."
)


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("1 Insufficient cpu, 4 node(s) didn't match Pod's node affinity/selector.", "Unschedulable"),
        ("5 Too many pods.", "Unschedulable"),
        ("2 node(s) were unschedulable, 3 node(s) had untolerated taint(s).", "Unschedulable"),
        ("5 node(s) didn't match Pod's node affinity/selector.", "NodeMismatch"),
        ("1 node(s) had untolerated taint(s), 4 node(s) didn't match Pod's node affinity/selector.", "NodeMismatch"),
        ("1 node(s) had untolerated taint {a/b: }, 4 node(s) had untolerated taint {gpu: 1, x}.", "NodeMismatch"),
        ("1 node(s) were unschedulable, 4 node(s) didn't match Pod's node affinity/selector.", "NodeMismatch"),
        ("5 node(s) were unschedulable.", "Unschedulable"),
        ("5 node(s) had volume node affinity conflict.", "NodeMismatch"),
        ('persistentvolumeclaim "rates" not found.', "VolumeMissing"),
        ('persistentvolumeclaim "rates" is being deleted.', "VolumeMissing"),
        ('persistentvolumeclaim "rates" bound to non-existent persistentvolume "pv-1".', "VolumeMissing"),
        ("pod has unbound immediate PersistentVolumeClaims.", "VolumeUnavailable"),
        ("5 node(s) didn't find available persistent volumes to bind.", "VolumeUnavailable"),
        ("4 node(s) didn't find available persistent volumes to bind, 1 Insufficient memory.", "Unschedulable"),
        ("what no scheduler has said so far.", "Unschedulable"),
    ],
)
def test_why_the_scheduler_gives_no_node(said: str, kind: str) -> None:
    found = status_obstacle(META, SPEC, unscheduled(NODES + said + PREEMPTION))
    assert found is not None
    assert (found.kind, found.since) == (kind, at(3))
    assert found.message == f"{NODES}{said.removesuffix('.')}"


def test_a_node_selector_is_named() -> None:
    spec = {**SPEC, "nodeSelector": {"zone": "b", "disk": "floppy"}}
    none = "5 node(s) didn't match Pod's node affinity/selector"
    found = status_obstacle(META, spec, unscheduled(f"{NODES}{none}."))
    assert found is not None
    assert found.message == f"no node for the nodeSelector disk=floppy, zone=b: {NODES}{none}."


@pytest.mark.parametrize(
    ("reason", "kind"), [("SchedulerError", "Unschedulable"), ("SchedulingGated", "SchedulingGated")]
)
def test_a_scheduler_that_fails_or_is_told_to_wait(reason: str, kind: str) -> None:
    found = status_obstacle(META, SPEC, unscheduled("binding volumes: context deadline exceeded", reason=reason))
    assert found is not None
    assert found.kind == kind


@pytest.mark.parametrize(
    ("waiting", "kind", "words"),
    [
        (
            {"reason": "ImagePullBackOff", "message": "back-off"},
            "ImagePull",
            "image 'example/fetch:1' cannot be pulled",
        ),
        ({"reason": "CreateContainerConfigError", "message": 'secret "pw" not found'}, "ContainerConfig", '"pw" not'),
        ({"reason": "SomethingNew", "message": "oh"}, "StartTimeout", "SomethingNew: oh"),
    ],
)
def test_a_container_that_waits_for_more_than_its_turn(waiting: dict[str, str], kind: str, words: str) -> None:
    found = status_obstacle(META, SPEC, placed(waiting=waiting))
    assert found is not None
    assert (found.kind, found.since) == (kind, at(5))
    assert words in found.message


def test_an_init_container_is_an_obstacle_too_and_is_named() -> None:
    spec = {**SPEC, "initContainers": [{"name": "vault", "image": "example/vault:9"}]}
    init = [{"name": "vault", "state": {"waiting": {"reason": "ErrImagePull", "message": "no"}}}]
    found = status_obstacle(META, spec, placed(init=init, waiting={"reason": "PodInitializing"}))
    assert found is not None
    assert (found.kind, found.message) == ("ImagePull", "image 'example/vault:9' cannot be pulled (container 'vault')")


def test_a_container_beside_the_stages_own_keeps_it_from_nothing() -> None:
    status = placed()
    agent = {"name": "agent", "state": {"waiting": {"reason": "ErrImagePull", "message": "no"}}}
    status["containerStatuses"].insert(0, agent)
    spec = {"containers": [{"name": "agent", "image": "example/agent:1"}, *SPEC["containers"]]}
    assert status_obstacle(META, spec, status) is None
    status["containerStatuses"][1]["state"] = {"waiting": {"reason": "ErrImagePull"}}
    found = status_obstacle(META, spec, status)
    assert found is not None
    assert found.message == "image 'example/fetch:1' cannot be pulled (container 'fetch')"


def test_the_time_of_earlier_steps_is_not_held_against_a_container() -> None:
    """Its volumes took two minutes, an init container ten: the image has only just been asked for."""
    conditions = [("PodReadyToStartContainers", 125.0), ("Initialized", 730.0)]
    init = [{"name": "slow", "state": {"terminated": {"exitCode": 0, "finishedAt": text(729)}}}]
    found = status_obstacle(META, SPEC, placed(*conditions, init=init, waiting={"reason": "ErrImagePull"}))
    assert found is not None
    assert found.since == at(730)


def test_what_a_pod_waits_for() -> None:
    spec = {
        **SPEC,
        "volumes": [
            {"name": "a", "persistentVolumeClaim": {"claimName": "rates"}},
            {"name": "b", "ephemeral": {}},
            {"name": "c", "emptyDir": {}},
        ],
    }
    queued = read_wait(META, spec, unscheduled(NODES))
    assert queued == PodWait(since=at(0), placed=False, sandbox_up=False, claims=("rates", "p-b"))
    assert read_wait(META, spec, placed()) == PodWait(since=at(5), placed=True, sandbox_up=False)
    up = read_wait(META, spec, placed(("PodReadyToStartContainers", 9)))
    assert up == PodWait(since=at(9), placed=True, sandbox_up=True)


def test_a_pod_whose_init_container_works_waits_for_nothing_and_one_with_a_sidecar_does() -> None:
    spec = {**SPEC, "initContainers": [{"name": "load"}, {"name": "mesh", "restartPolicy": "Always"}]}
    assert read_wait(META, spec, placed(init=[{"name": "load", "state": {"running": {}}}])) is None
    waits = read_wait(META, spec, placed(init=[{"name": "mesh", "state": {"running": {}}}]))
    assert waits is not None
    assert waits.sandbox_up


SECRET = 'MountVolume.SetUp failed for volume "ca" : secret "company-ca" not found'
TIMED_OUT = "Unable to attach or mount volumes: unmounted volumes=[ca], timed out waiting for the condition"
MULTI = 'Multi-Attach error for volume "pvc-1" Volume is already used by pod(s) other-1'


@pytest.mark.parametrize(
    ("reason", "note", "kind"),
    [
        ("FailedMount", SECRET, "ContainerConfig"),
        ("FailedMount", 'MountVolume.SetUp failed for volume "x" : configmap "dims" not found', "ContainerConfig"),
        ("FailedMount", 'failed for volume "x" : references non-existent secret key: pw', "ContainerConfig"),
        ("FailedMount", 'failed: hostPath type check failed: /x is not a directory', "ContainerConfig"),
        ("FailedMount", 'driver name no.such not found in the list of registered CSI drivers', "VolumeUnavailable"),
        ("FailedMount", 'failed for volume "x" : object "ns"/"x" not registered', "VolumeUnavailable"),
        ("FailedMount", TIMED_OUT, "VolumeUnavailable"),
        ("FailedMapVolume", "MapVolume.MapPodDevice failed", "VolumeUnavailable"),
        ("FailedAttachVolume", MULTI, "VolumeUnavailable"),
        ("FailedCreatePodSandBox", 'Failed to create pod sandbox: plugin type="calico" failed', "PodSandbox"),
        ("NetworkNotReady", "network is not ready: cni plugin not initialized", "PodSandbox"),
        ("FailedPrepareDynamicResources", "Failed to prepare dynamic resources: no plugin", "PodSandbox"),
    ],
)  # fmt: skip
def test_events_about_a_pod(reason: str, note: str, kind: str) -> None:
    found = pod_event_obstacle([event(note, reason=reason, first=9)], since=at(5), now=at(25))
    assert found is not None
    assert (found.kind, found.since) == (kind, at(9))
    assert found.message == f"{reason}: {note}"


def test_events_that_are_no_obstacle() -> None:
    told = [event("Search Line limits were exceeded", reason="DNSConfigForming"), event("x", reason="NodeNotReady")]
    assert pod_event_obstacle(told, since=at(5), now=at(25)) is None


def test_the_event_that_tells_most_counts() -> None:
    told = [event(MULTI, reason="FailedAttachVolume", first=6), event(TIMED_OUT, first=130, last=900)]
    found = pod_event_obstacle(told, since=at(5), now=at(901))
    assert found is not None
    assert "Multi-Attach" in found.message
    later = event("MountVolume.MountDevice failed: fsck found errors", first=400)
    found = pod_event_obstacle([*told, later], since=at(5), now=at(901))
    assert found is not None
    assert "fsck" in found.message
    sandbox = event("Failed to create pod sandbox: no runtime", reason="FailedCreatePodSandBox", first=950)
    found = pod_event_obstacle([*told, later, sandbox], since=at(5), now=at(951))
    assert found is not None
    assert found.kind == "PodSandbox"


@pytest.mark.parametrize(
    ("last", "now", "holds"), [(63, 120, True), (15, 80, False), (700, 1000, True), (700, 1100, False)]
)
def test_a_secret_that_has_come_meanwhile_is_no_obstacle(last: float, now: float, holds: bool) -> None:
    """The kubelet tries again after twice the time; what it has not told again is over, and something else is slow."""
    told = [event(SECRET, first=0.5, last=last)]
    assert (pod_event_obstacle(told, since=at(0), now=at(now)) is not None) is holds


def test_what_differs_each_time_and_what_is_secret_is_left_out() -> None:
    body = {
        "metadata": {"creationTimestamp": text(1)},
        "reason": "FailedCreatePodSandBox",
        "note": f"(combined from similar events): sandbox {'0af' * 21}1: mount -o user=me,password=hunter2 failed",
        "regarding": {"uid": "u", "name": "n"},
        "deprecatedFirstTimestamp": text(2),
        "deprecatedLastTimestamp": text(7),
    }
    read = read_start_event(body)
    assert read.note == "sandbox …: mount -o user=me,password=*** failed"
    assert (read.first, read.last) == (at(2), at(7))


def test_a_series_of_the_new_kind() -> None:
    body = {
        "metadata": {"creationTimestamp": text(1)},
        "eventTime": "2026-11-28T07:00:03.250000Z",
        "series": {"count": 3, "lastObservedTime": "2026-11-28T07:01:00.000000Z"},
        "deprecatedFirstTimestamp": None,
        "deprecatedLastTimestamp": None,
        "regarding": {},
    }
    read = read_start_event(body)
    assert (read.first, read.last) == (at(3.25), at(60))


CALL = 'Internal error occurred: failed calling webhook "inject.example.com": failed to call webhook: Post "https://i"'
POST = 'Post "https://10.9.8.7:6443/api/v1/namespaces/n/pods"'
DENIED = 'admission webhook "inject.example.com" denied the request: failed calling webhook of the vault'


@pytest.mark.parametrize(
    ("said", "kind", "words"),
    [
        (
            'pods "x-1" is forbidden: exceeded quota: q, requested: pods=1',
            "QuotaExceeded",
            "refused: exceeded quota: q",
        ),
        ('pods "x-1" is forbidden: failed quota: q: must specify cpu', "PodRefused", "refused: failed quota: q"),
        ('pods "x-1" is forbidden: no PriorityClass with name gold was found', "PodRefused", "PriorityClass with name"),
        ("Internal error occurred: boom", "ServerFailed", "cannot be created: Internal error occurred: boom"),
        ("etcdserver: request timed out", "ServerFailed", "cannot be created: etcdserver"),
        (
            f"{POST}: stream error: stream ID 2053; INTERNAL_ERROR; received from peer",
            "ServerFailed",
            "error: INTERNAL",
        ),
        (f"{POST}: dial tcp 10.9.8.7:6443: connect: connection refused", "ServerFailed", "connection refused"),
        ("Timeout: request did not complete within requested timeout", "ServerFailed", "Timeout: request"),
        ("the server has received too many requests and has asked us to try again", "ServerFailed", "too many"),
        ('an error on the server ("") has prevented the request from succeeding', "ServerFailed", "prevented"),
        ('pods "x-1" is forbidden: Internal error occurred', "PodRefused", "refused: Internal error"),
        (f"{CALL}: dial tcp 10.9.8.7:443: connect: connection refused", "WebhookUnavailable", "cannot be created: Int"),
        (f"{CALL}: x509: certificate signed by unknown authority", "WebhookUnavailable", "x509"),
        (f"{CALL}: context deadline exceeded", "WebhookUnavailable", "deadline"),
        (f'{CALL}: no endpoints available for service "i"', "WebhookUnavailable", "no endpoints"),
        (f'{CALL}: service "i" not found', "WebhookUnavailable", "not found"),
        (DENIED, "PodRefused", "refused: admission webhook"),
    ],
)
def test_what_the_job_controller_says(said: str, kind: str, words: str) -> None:
    found = creation_obstacle([event(f"Error creating: {said}", reason="FailedCreate")], since=at(0))
    assert found is not None
    assert (found.kind, found.since) == (kind, at(1))
    assert words in found.message
    assert "x-1" not in found.message, "another pod, another name: the sentence must not change with it"


def test_a_refusal_counts_from_its_own_beginning() -> None:
    """The webhook was down for ten minutes; it has denied since it is back, each time in another Event."""
    down = event(f"Error creating: {CALL}: refused", reason="FailedCreate", first=1, last=540)
    denials = [
        event(f'Error creating: admission webhook "w" denied the request: {number}', reason="FailedCreate", first=when)
        for number, when in enumerate((600, 661, 722))
    ]
    found = creation_obstacle([denials[1], down, denials[0], denials[2]], since=at(0))
    assert found is not None
    assert (found.kind, found.since) == ("PodRefused", at(600))
    assert found.message.endswith("request: 2")


@pytest.mark.parametrize(
    ("note", "kind"),
    [
        ('storageclass.storage.k8s.io "gold" not found', "VolumeMissing"),
        ("no persistent volumes available for this claim and no storage class is set", "VolumeMissing"),
        ("waiting for a volume to be created by the external provisioner", "VolumeUnavailable"),
    ],
)
def test_why_a_claim_is_not_bound(note: str, kind: str) -> None:
    unbound = status_obstacle(META, SPEC, unscheduled(NODES + "pod has unbound immediate PersistentVolumeClaims."))
    wait = PodWait(since=at(0), placed=False, sandbox_up=False, claims=("rates",))
    assert unbound is not None
    strange = event('storageclass.storage.k8s.io "other" not found', name="strange", first=9)
    found = claim_obstacle([event(note, name="rates", first=8), strange], wait, unbound)
    assert found is not None
    assert (found.kind, found.since) == (kind, at(3))
    assert "'rates'" in found.message
    assert note in found.message
    assert claim_obstacle([strange], wait, unbound) is None
