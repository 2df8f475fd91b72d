"""Jobs and pods as the API server, the job controller and the kubelet of Kubernetes 1.36 shape them. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeVar, cast

Json = dict[str, Any]
Object = Mapping[str, Any]
T = TypeVar("T")

TRACKING = "batch.kubernetes.io/job-tracking"


def copied(value: T) -> T:
    """A copy of a JSON value: what the server keeps, and what it sends, is nobody else's. Far quicker than deepcopy."""
    if isinstance(value, dict):
        return cast(T, {key: copied(part) for key, part in value.items()})
    if isinstance(value, list):
        return cast(T, [copied(part) for part in value])
    return value


def merge_patch(target: Any, patch: Any) -> Any:
    """RFC 7386: None removes, objects merge, all else (also lists) replaces. Returns a new value."""
    if not isinstance(patch, Mapping):
        return copied(patch)
    merged: Json = dict(target) if isinstance(target, Mapping) else {}
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = merge_patch(merged.get(key), value)
    return merged


def defaulted_job(job: Object, *, uid: str) -> Json:
    """What the API server stores for a Job as it was sent: defaults, the selector, the template's labels."""
    stored: Json = copied(dict(job))
    spec: Json = stored["spec"]
    for key, value in (
        ("parallelism", 1),
        ("completions", 1),
        ("backoffLimit", 6),
        ("completionMode", "NonIndexed"),
        ("suspend", False),
        ("podReplacementPolicy", "TerminatingOrFailed"),
        ("manualSelector", False),
    ):
        spec.setdefault(key, value)
    spec["selector"] = {"matchLabels": {"batch.kubernetes.io/controller-uid": uid}}
    name = stored["metadata"]["name"]
    meta = spec["template"].setdefault("metadata", {})
    meta["labels"] = {
        **meta.get("labels", {}),
        "batch.kubernetes.io/controller-uid": uid,
        "batch.kubernetes.io/job-name": name,
        "controller-uid": uid,
        "job-name": name,
    }
    pod = spec["template"]["spec"]
    pod.setdefault("terminationGracePeriodSeconds", 30)
    pod.setdefault("dnsPolicy", "ClusterFirst")
    pod.setdefault("securityContext", {})
    pod.setdefault("schedulerName", "default-scheduler")
    for container in pod["containers"]:
        container.setdefault("resources", {})
        container.setdefault("terminationMessagePath", "/dev/termination-log")
        container.setdefault("terminationMessagePolicy", "File")
        container.setdefault("imagePullPolicy", "IfNotPresent")
    stored["status"] = {}
    return stored


def active_status(now: str, *, ready: int = 0) -> Json:
    return {"startTime": now, "active": 1, "ready": ready, "terminating": 0, "uncountedTerminatedPods": {}}


def complete_status(status: Object, now: str) -> Json:
    why = "CompletionsReached", "Reached expected number of succeeded pods"
    return {
        "startTime": status.get("startTime", now),
        "completionTime": now,
        "succeeded": 1,
        "ready": 0,
        "terminating": 0,
        "uncountedTerminatedPods": {},
        "conditions": [_condition("SuccessCriteriaMet", *why, now), _condition("Complete", *why, now)],
    }


def failed_status(status: Object, now: str, *, reason: str, failed: int) -> Json:
    said = {
        "BackoffLimitExceeded": "Job has reached the specified backoff limit",
        "DeadlineExceeded": "Job was active longer than specified deadline",
    }.get(reason, reason)
    made: Json = {
        "startTime": status.get("startTime", now),
        "ready": 0,
        "terminating": 0,
        "uncountedTerminatedPods": {},
        "conditions": [
            _condition("FailureTarget", reason, said, now),
            _condition("Failed", reason, said, now),
        ],
    }
    if failed:
        made["failed"] = failed
    return made


def _condition(kind: str, reason: str, message: str, now: str) -> Json:
    return {
        "type": kind,
        "status": "True",
        "lastProbeTime": now,
        "lastTransitionTime": now,
        "reason": reason,
        "message": message,
    }


def is_finished(job: Object) -> bool:
    conditions = job.get("status", {}).get("conditions") or ()
    return any(c["type"] in ("Complete", "Failed") and c["status"] == "True" for c in conditions)


def pod_of(job: Object, *, suffix: str) -> Json:
    """The pod that the job controller creates: named and owned by the Job, labelled by its template."""
    template = job["spec"]["template"]
    meta = job["metadata"]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": f"{meta['name'][:57]}-{suffix}",
            "generateName": f"{meta['name'][:57]}-",
            "namespace": meta["namespace"],
            "labels": copied(template["metadata"]["labels"]),
            "annotations": copied(template["metadata"].get("annotations", {})),
            "finalizers": [TRACKING],
            "ownerReferences": [
                {
                    "apiVersion": "batch/v1",
                    "kind": "Job",
                    "name": meta["name"],
                    "uid": meta["uid"],
                    "controller": True,
                    "blockOwnerDeletion": True,
                }
            ],
        },
        "spec": copied(template["spec"]),
        "status": {"phase": "Pending", "qosClass": "BestEffort"},
    }


def unschedulable_status(now: str, message: str) -> Json:
    return {
        "phase": "Pending",
        "qosClass": "BestEffort",
        "conditions": [
            {
                "type": "PodScheduled",
                "status": "False",
                "reason": "Unschedulable",
                "message": message,
                "lastTransitionTime": now,
            }
        ],
    }


def own_name(pod: Object) -> str:
    """The name of the stage's own container: its stage, by the label that the Job's template gives the pod."""
    return str(pod["metadata"]["labels"].get("ingestrun.dev/stage", ""))


def init_waiting_status(pod: Object, now: str, name: str, told: Object, *, phase: str = "Pending") -> Json:
    """An init container of that name is like `told`, and the others wait for it."""
    status = _pod_status(
        pod, now, phase=phase, state={"waiting": {"reason": "PodInitializing"}}, ready=False, started=False
    )
    begun: Json = {"image": "", "imageID": "", "lastState": {}, "ready": False, "restartCount": 0, "started": False}
    return {**status, "initContainerStatuses": [{**begun, "name": name, **copied(dict(told))}]}


def waiting_status(pod: Object, now: str, *, reason: str = "ContainerCreating", message: str = "") -> Json:
    state: Json = {"waiting": {"reason": reason, **({"message": message} if message else {})}}
    status = _pod_status(pod, now, phase="Pending", state=state, ready=False, started=False)
    if reason == "ContainerCreating":
        del status["podIP"]  # its volumes are not mounted yet, and its sandbox is not up
    return status


def running_status(pod: Object, now: str) -> Json:
    state = {"running": {"startedAt": now}}
    return _pod_status(pod, now, phase="Running", state=state, ready=True, started=True)


def ended_status(
    pod: Object,
    now: str,
    *,
    exit_code: int,
    reason: str | None,
    pod_reason: str | None,
    result: Object | str | None,
) -> Json:
    message = json.dumps(result, separators=(",", ":")) if isinstance(result, Mapping) else result
    started = pod.get("status", {}).get("startTime", now)
    terminated: Json = {
        "exitCode": exit_code,
        "reason": reason or ("Completed" if exit_code == 0 else "Error"),
        "startedAt": started,
        "finishedAt": now,
        "containerID": "containerd://0000",
    }
    if message is not None:
        # The kubelet keeps 4096 bytes of the file, its last ones.
        terminated["message"] = message[-4096:]
    phase = "Succeeded" if exit_code == 0 and pod_reason is None else "Failed"
    state = {"terminated": terminated}
    status = _pod_status(pod, now, phase=phase, state=state, ready=False, started=False)
    status["containerStatuses"] = _with_earlier_ends(status, pod.get("status", {}))
    if pod_reason == "DeadlineExceeded":
        # No disruption: the kubelet does what the pod's own spec asks for.
        status |= {"reason": pod_reason, "message": "Pod was active on the node longer than the specified deadline"}
    elif pod_reason is not None:
        status["reason"] = pod_reason
        status["message"] = f"the pod was ended: {pod_reason}"
        status["conditions"].append(
            {
                "type": "DisruptionTarget",
                "status": "True",
                "reason": "TerminationByKubelet",
                "message": pod_reason,
                "lastTransitionTime": now,
            }
        )
    return status


def own_ended_status(pod: Object, ended: Object) -> Json:
    """The stage's own container has ended as in the status `ended` of a whole pod; all others go on as they were."""
    before = pod["status"]
    own = next(told for told in ended["containerStatuses"] if told["name"] == own_name(pod))
    told = [own if was["name"] == own["name"] else was for was in before["containerStatuses"]]
    return {**copied(before), "containerStatuses": copied(told)}


def _with_earlier_ends(status: Json, before: Object) -> list[Json]:
    """The states of containers, where those that had ended before have not ended once more."""
    earlier = {told["name"]: told for told in before.get("containerStatuses", ()) if "terminated" in told["state"]}
    return [copied(earlier.get(told["name"], told)) for told in status["containerStatuses"]]


def _pod_status(pod: Object, now: str, *, phase: str, state: Json, ready: bool, started: bool) -> Json:
    spec = pod["spec"]
    return {
        "phase": phase,
        "qosClass": "BestEffort",
        "hostIP": "10.0.0.1",
        "podIP": "10.244.0.9",
        "startTime": pod.get("status", {}).get("startTime", now),
        "conditions": [
            {"type": "PodScheduled", "status": "True", "lastTransitionTime": now},
            {"type": "Initialized", "status": "True", "lastTransitionTime": now},
            {"type": "Ready", "status": str(ready), "lastTransitionTime": now},
            {"type": "ContainersReady", "status": str(ready), "lastTransitionTime": now},
        ],
        "containerStatuses": [
            {
                "name": container["name"],
                "image": container["image"],
                "imageID": "",
                "ready": ready,
                "started": started,
                "restartCount": 0,
                "state": copied(state),
                "lastState": {},
            }
            for container in sorted(spec["containers"], key=lambda container: str(container["name"]))
        ],
    }
