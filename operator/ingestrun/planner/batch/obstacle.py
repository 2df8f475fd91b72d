"""The obstacles that keep a pod from starting, as its status names them, or the Events about it.

The tables here tell the kinds of obstacle apart. What follows from a kind is in `failure_policy`, and for how long a
pod may wait is in `pod_start`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from ingestrun.model.refusals import quota_exceeded, server_failed, webhook_not_called, without_stream
from ingestrun.model.size_budget import MESSAGE_CHARS
from ingestrun.model.text import truncate
from ingestrun.model.times import parse_time
from ingestrun.planner.batch.containers import named, native_sidecars, own_container_name

START_TIMEOUT: Final = "StartTimeout"
"""The kind of an obstacle whose cause nothing names."""
SERVER_FAILED: Final = "ServerFailed"
"""The kind of an obstacle that is no refusal: the API server has failed on the creation of a pod."""
UNBOUND_CLAIM: Final = "unbound immediate PersistentVolumeClaims"
"""The scheduler's words for claims without a volume. It names none of them; why is in the Events about the claim."""

_NOT_CREATED: Final = "Error creating: "
"""The beginning of what the Job controller says of a pod that it could not create."""
_NO_OBSTACLE: Final = frozenset({"", "ContainerCreating", "PodInitializing"})
"""Reasons of a container that waits for its turn."""
_WAITING: Final[Mapping[str, str]] = {
    "ErrImagePull": "ImagePull",
    "ImagePullBackOff": "ImagePull",
    "ErrImageNeverPull": "ImagePull",
    "InvalidImageName": "ImagePull",
    "ImageInspectError": "ImagePull",
    "RegistryUnavailable": "ImagePull",
    "SignatureValidationFailed": "ImagePull",
    "CreateContainerConfigError": "ContainerConfig",
    "CreateContainerError": "ContainerConfig",
    "RunContainerError": "ContainerConfig",
}
"""Kinds by the reason of a container that waits."""
_POD_EVENTS: Final[Mapping[str, str]] = {
    "FailedMount": "VolumeUnavailable",
    "FailedMapVolume": "VolumeUnavailable",
    "FailedAttachVolume": "VolumeUnavailable",
    "FailedMountOnFilesystemMismatch": "VolumeUnavailable",
    "FailedCreatePodSandBox": "PodSandbox",
    "FailedPodSandBoxStatus": "PodSandbox",
    "NetworkNotReady": "PodSandbox",
    "FailedPrepareDynamicResources": "PodSandbox",
}
"""Kinds by the reason of an Event about a pod whose sandbox is not up."""
_WRONG_VOLUME: Final = re.compile(
    r"(?:secret|configmap) \"[^\"]+\" not found|references non-existent (?:secret|config) key"
    r"|hostPath type check failed|subPath",
    re.IGNORECASE,
)
"""A volume that cannot be mounted because of what the run names, and not because of the node or the storage."""
_TIMED_OUT: Final = re.compile(r"timed out waiting for the condition|context deadline exceeded")
"""Words of an Event that tells no more than that it took long, so another one about the pod tells more."""

_CLASS_MISSING: Final = re.compile(r"storageclass\S* \"[^\"]+\" not found|no storage class is set", re.IGNORECASE)
_SCHEDULER: Final[Sequence[tuple[re.Pattern[str], str]]] = (
    (
        re.compile(
            r"persistentvolumeclaim \"[^\"]+\" (?:not found|is being deleted|bound to non-existent)"
            r"|persistentvolume \"[^\"]+\" not found|bound to non-existent pv"
        ),
        "VolumeMissing",
    ),
    (_CLASS_MISSING, "VolumeMissing"),
    (re.compile(f"{UNBOUND_CLAIM}|waiting for ephemeral volume controller"), "VolumeUnavailable"),
)
"""Kinds by the words of the scheduler about the pod's claims, whatever it says of the nodes beside."""
_NO_VOLUME: Final = re.compile("didn't find available persistent volumes to bind")
_NO_MATCH: Final = re.compile(
    r"didn't match Pod's node affinity|scheduler-enforced node affinity|requested node name|untolerated taint"
    r"|taints that the pod didn't tolerate|PersistentVolume's node affinity|volume node affinity conflict"
    r"|no available volume zone"
)
"""Reasons for which a node is out of the question for the pod, however empty the node is."""
_SELECTOR: Final = re.compile("didn't match Pod's node affinity")
_CORDONED: Final = re.compile("were unschedulable")
_PART: Final = re.compile(r"(?<=[:,]) (?=\d+ )")
"""The places between the parts of "0/3 nodes are available: 1 Insufficient cpu, 2 node(s) were unschedulable"."""

_HEX_ID: Final = re.compile(r"\b[0-9a-f]{32,64}\b")
_PASSWORD: Final = re.compile(r"(?i)\b(\w*(?:password|passwd|secret|token|credential)\w*=)[^\s,;\"']+")
_AGGREGATED: Final = "(combined from similar events): "

_FRESH_FOR: Final = timedelta(seconds=20)
_FRESH_AT_MOST: Final = timedelta(seconds=330)


@dataclass(frozen=True, slots=True, kw_only=True)
class Obstacle:
    """Obstacle that keeps a pod from starting or from being created; `kind` is a row of `FAILURE_POLICY`."""

    kind: str
    message: str
    since: datetime
    ended_counted: bool = False
    """True if it is a quota that counts pods which have ended, so that deleting them makes room."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PodWait:
    """The wait of a pod none of whose containers runs, not even an init container: its start has come to a halt."""

    since: datetime
    """Time at which the step began that it waits for: a node, its volumes and sandbox, or its next container."""
    placed: bool
    """True if it has a node."""
    sandbox_up: bool
    """True if its volumes are mounted and its sandbox is up, so that no earlier Event about them matters any more."""
    claims: tuple[str, ...] = ()
    """The names of its claims, as long as it has no node."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StartEvent:
    """An Event about a Job without a pod, a pod that does not start, or a claim."""

    uid: str
    """UID of the object that it is about."""
    name: str
    reason: str
    note: str
    first: datetime
    last: datetime
    """Times at which it was told first and last, by the clock of whoever tells it."""


def read_start_event(event: Mapping[str, Any]) -> StartEvent:
    """Read the JSON of an events.k8s.io/v1 Event, of the old kind (count, timestamps) or the new one (series)."""
    regarding, meta = event.get("regarding") or {}, event["metadata"]
    began = event.get("eventTime") or meta["creationTimestamp"]
    repeated = (event.get("series") or {}).get("lastObservedTime") or event.get("deprecatedLastTimestamp")
    return StartEvent(
        uid=regarding.get("uid", ""),
        name=regarding.get("name", ""),
        reason=event.get("reason", ""),
        note=_tidy(event.get("note") or ""),
        first=parse_time(event.get("deprecatedFirstTimestamp") or began),
        last=parse_time(repeated or began),
    )


def status_obstacle(meta: Mapping[str, Any], spec: Mapping[str, Any], status: Mapping[str, Any]) -> Obstacle | None:
    """Return the obstacle that the status of a pod names, which has not started; None if it names none."""
    scheduled = _condition(status, "PodScheduled")
    if scheduled.get("status") == "False" and scheduled.get("reason"):
        return _scheduling_obstacle(scheduled, meta, spec)
    specs = {it["name"]: it for it in (*(spec.get("initContainers") or ()), *(spec.get("containers") or ()))}
    own = named(status.get("containerStatuses"), own_container_name(meta.get("labels") or {}))
    # Others beside the stage's own container start after and without it, so they keep it from nothing.
    for container in (*(status.get("initContainerStatuses") or ()), *([own] if own else ())):
        waiting = (container.get("state") or {}).get("waiting") or {}
        reason = waiting.get("reason", "")
        if reason not in _NO_OBSTACLE:
            kind = _WAITING.get(reason, START_TIMEOUT)
            message = _waiting_message(container["name"], specs, kind, waiting)
            return Obstacle(kind=kind, message=message, since=_step_began(meta, status))
    return None


def _scheduling_obstacle(scheduled: Mapping[str, Any], meta: Mapping[str, Any], spec: Mapping[str, Any]) -> Obstacle:
    since = parse_time(scheduled.get("lastTransitionTime") or meta["creationTimestamp"])
    # What follows the first sentence is about preemption, and counts the nodes once more.
    message, _, _ = (scheduled.get("message") or "").partition(". ")
    kind = _scheduling_kind(scheduled["reason"], message)
    if kind == "NodeMismatch" and spec.get("nodeSelector"):
        wanted = ", ".join(f"{label}={value}" for label, value in sorted(spec["nodeSelector"].items()))
        message = f"no node for the nodeSelector {wanted}: {message}"
    return Obstacle(kind=kind, message=_sentence(message), since=since)


def read_wait(meta: Mapping[str, Any], spec: Mapping[str, Any], status: Mapping[str, Any]) -> PodWait | None:
    """Return the wait of a pod that has not started; None while one of its init containers is at work."""
    sidecars = native_sidecars(spec)
    init = status.get("initContainerStatuses") or ()
    if any("running" in (it.get("state") or {}) and it["name"] not in sidecars for it in init):
        return None
    placed = "startTime" in status or _condition(status, "PodScheduled").get("status") == "True"
    began = any(not (it.get("state") or {}).keys() <= {"waiting"} for it in init)
    up = _condition(status, "PodReadyToStartContainers").get("status") == "True" or "podIP" in status or began
    claims = () if placed else tuple(_claims(meta, spec))
    return PodWait(since=_step_began(meta, status), placed=placed, sandbox_up=up, claims=claims)


def creation_obstacle(events: Iterable[StartEvent], *, since: datetime) -> Obstacle | None:
    """Read the Job controller's Events about a pod that it cannot create, from `since` on; None without one.

    Each of its attempts may be an Event of its own, because the sentence has the name of the pod that was not made.
    The latest one counts, and the obstacle is there since the first of those right before it that are of its kind.
    """
    latest, began = None, since
    for event in sorted(events, key=lambda event: event.last, reverse=True):
        kind = _creation_kind(event.note)
        if latest is None:
            latest = kind, event
        elif kind != latest[0]:
            break
        began = event.first
    if latest is None:
        return None
    kind, event = latest
    _, _, forbidden = event.note.partition("is forbidden: ")
    message = without_stream(forbidden or event.note.removeprefix(_NOT_CREATED))
    said = "its pod cannot be created" if kind in ("WebhookUnavailable", SERVER_FAILED) else "its pod is refused"
    return Obstacle(
        kind=kind,
        message=_sentence(f"{said}: {message}"),
        since=max(since, began),
        ended_counted=kind == "QuotaExceeded" and _counts_ended(event.note),
    )


def _counts_ended(refusal: str) -> bool:
    """Tell whether a quota that is exceeded counts objects that have ended, as `count/pods` does and `pods` does not.

    The server names just the resources that are exceeded; where it names none, the answer is yes, because a run must
    not hang for what it keeps.
    """
    _, _, requested = refusal.partition("requested: ")
    requested, _, _ = requested.partition(", used: ")
    return not requested or "count/" in requested


def pod_event_obstacle(events: Iterable[StartEvent], *, since: datetime, now: datetime) -> Obstacle | None:
    """Read the Events about a pod whose sandbox is not up: what is wrong with the run first, then the latest trouble.

    None without an Event about such trouble.
    """
    by_kind: dict[str, list[StartEvent]] = {}
    for event in events:
        kind = _pod_event_kind(event)
        if kind is not None:
            by_kind.setdefault(kind, []).append(event)
    wrong = by_kind.pop("ContainerConfig", [])
    if wrong and _still_told(wrong, now=now):
        return _obstacle_of("ContainerConfig", wrong, since=since)
    latest = {kind: max(_told_most(found), key=lambda event: event.last) for kind, found in by_kind.items()}
    if not latest:
        return None
    kind = max(latest, key=lambda kind: (not _TIMED_OUT.search(latest[kind].note), latest[kind].last))
    return _obstacle_of(kind, by_kind[kind], since=since)


def claim_obstacle(events: Iterable[StartEvent], wait: PodWait, unbound: Obstacle) -> Obstacle | None:
    """Read the Events about the claims of a pod that waits for a volume; None without one that tells why."""
    about = [event for event in events if event.name in wait.claims]
    latest = max(about, key=lambda event: (bool(_CLASS_MISSING.search(event.note)), event.last), default=None)
    if latest is None:
        return None
    kind = "VolumeMissing" if _CLASS_MISSING.search(latest.note) else unbound.kind
    message = _sentence(f"claim {latest.name!r} is not bound: {latest.note}")
    return Obstacle(kind=kind, message=message, since=unbound.since)


def last_event(events: Sequence[StartEvent]) -> str:
    """Return the latest Event about a pod whose start nothing explains, for people; "" without one."""
    latest = max(events, key=lambda event: event.last, default=None)
    return f"{latest.reason}: {latest.note}" if latest is not None else ""


def _scheduling_kind(reason: str, message: str) -> str:
    """Return why the scheduler gives the pod no node: its volumes, no node that matches, or no room."""
    if reason == "SchedulingGated":
        return reason
    about_claims = next((kind for words, kind in _SCHEDULER if words.search(message)), None)
    if about_claims is not None:
        return about_claims
    parts = _PART.split(message.partition(" nodes are available")[2])[1:]
    matches = [part for part in parts if not _NO_MATCH.search(part)]
    if parts and not matches:
        return "NodeMismatch"
    if matches and all(_NO_VOLUME.search(part) for part in matches):
        return "VolumeUnavailable"
    # A cordoned node is not compared with the selector, so it says nothing against the nodes that were.
    if _SELECTOR.search(message) and all(_CORDONED.search(part) for part in matches):
        return "NodeMismatch"
    return "Unschedulable"


def _waiting_message(name: str, specs: Mapping[str, Any], kind: str, waiting: Mapping[str, Any]) -> str:
    """Describe why a container waits, and name the container if the pod has others."""
    which = f" (container {name!r})" if len(specs) > 1 else ""
    if kind == "ImagePull":
        # The kubelet's message alternates between ErrImagePull and its back-off, and each change would be a write.
        return f"image {specs.get(name, {}).get('image', '?')!r} cannot be pulled{which}"
    message = waiting.get("message") or ""
    if kind == START_TIMEOUT:
        message = f"{waiting['reason']}: {message}" if message else waiting["reason"]
    return _sentence(message + which)


def _step_began(meta: Mapping[str, Any], status: Mapping[str, Any]) -> datetime:
    """Return when the step began that the pod waits for.

    The time of earlier steps is not held against it: volumes that were attached slowly, init containers that ran long.
    """
    scheduled = _condition(status, "PodScheduled")
    moments = [status.get("startTime"), meta["creationTimestamp"]]
    for condition in (scheduled, _condition(status, "PodReadyToStartContainers"), _condition(status, "Initialized")):
        if condition.get("status") == "True":
            moments.append(condition.get("lastTransitionTime"))
    for container in status.get("initContainerStatuses") or ():
        moments.append(((container.get("state") or {}).get("terminated") or {}).get("finishedAt"))
    return max(parse_time(moment) for moment in moments if moment)


def _claims(meta: Mapping[str, Any], spec: Mapping[str, Any]) -> Iterable[str]:
    for volume in spec.get("volumes") or ():
        if "persistentVolumeClaim" in volume:
            yield volume["persistentVolumeClaim"]["claimName"]
        elif "ephemeral" in volume:
            yield f"{meta['name']}-{volume['name']}"


def _creation_kind(note: str) -> str:
    """Return why a pod was not created.

    A quota may have room later, a webhook be back, and a server that has failed has refused nothing. Every other
    refusal (by a LimitRange, the namespace's pod security, a webhook that denies, or for a service account, priority or
    runtime class that does not exist) is repeated until the cluster or the run is changed.
    """
    if quota_exceeded(note):
        return "QuotaExceeded"
    if webhook_not_called(note):
        return "WebhookUnavailable"
    return SERVER_FAILED if server_failed(note.removeprefix(_NOT_CREATED)) else "PodRefused"


def _pod_event_kind(event: StartEvent) -> str | None:
    kind = _POD_EVENTS.get(event.reason)
    return "ContainerConfig" if kind == "VolumeUnavailable" and _WRONG_VOLUME.search(event.note) else kind


def _still_told(events: Sequence[StartEvent], *, now: datetime) -> bool:
    """Tell whether the kubelet still meets an obstacle that it has told.

    It tries anew after twice the time, up to two minutes (and tells a long series every five): what it has not told
    again by then is over, and the pod waits for something else.
    """
    first, last = min(event.first for event in events), max(event.last for event in events)
    return now <= last + min(_FRESH_FOR + 2 * (last - first), _FRESH_AT_MOST)


def _told_most(events: Sequence[StartEvent]) -> Sequence[StartEvent]:
    """Return the Events that say more than that something took long, or all of them if none does."""
    return [event for event in events if not _TIMED_OUT.search(event.note)] or events


def _obstacle_of(kind: str, events: Sequence[StartEvent], *, since: datetime) -> Obstacle:
    latest = max(_told_most(events), key=lambda event: event.last)
    began = min(event.first for event in events)
    return Obstacle(kind=kind, message=_sentence(f"{latest.reason}: {latest.note}"), since=max(since, began))


def _condition(status: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    return next((it for it in status.get("conditions") or () if it.get("type") == kind), {})


def _sentence(text: str) -> str:
    return truncate(_tidy(text), MESSAGE_CHARS)


def _tidy(text: str) -> str:
    """Remove what differs each time (each change would be a write), and what no status may show."""
    text = text.removeprefix(_AGGREGATED)
    return _PASSWORD.sub(r"\1***", _HEX_ID.sub("…", text))
