"""From what is known of an ended Job to what it means: the stage is done, or it failed, and of which kind that is.

What comes of each kind is in the table of `verdicts`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from ingestrun.engine.facts import MESSAGE_CHARS, JobState, JobView, PodFacts
from ingestrun.engine.lastwords import clean, last_line, last_lines
from ingestrun.model.contract import EXIT_PERMANENT, Outcome, ResultError, StageResult, parse_result

_DISRUPTIONS: Final = {
    "PreemptionByScheduler": "Preempted",
    "EvictionByEvictionAPI": "Evicted",
    "TerminationByKubelet": "Evicted",
    "DeletionByTaintManager": "NodeLost",
    "DeletionByPodGC": "NodeLost",
}
"""The reasons of a pod's condition DisruptionTarget (Kubernetes' docs, "Disruptions"), as ours."""
_STATUS_UNKNOWN: Final = "ContainerStatusUnknown"
"""The reason of a container that the kubelet can't find: of one that was never begun, and of one that is lost."""
_DEADLINE: Final = "DeadlineExceeded"
"""The kubelet's reason of a pod, and the Job controller's of a Job, whose `activeDeadlineSeconds` are over."""
_NODE_LOST: Final = frozenset({"NodeLost", _STATUS_UNKNOWN})
"""Reasons of a pod or a container whose node has lost sight of it."""
_NODE_REFUSED: Final = frozenset({"NodeAffinity", "NodeShutdown", "UnexpectedAdmissionError", "AdmissionFailed"})
"""Why a kubelet would not take a pod that was bound to its node; also OutOfcpu, OutOfmemory, OutOfpods and the like."""
_KILLED: Final = (137, 143)
"""SIGKILL and SIGTERM."""

WORKER_CANCELLED: Final = "WorkerCancelled"
"""The reason of a container that says it stopped for a cancel, in a run that has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why an attempt is no success."""

    reason: str
    """A row of `verdicts.TABLE`, or a reason of Kubernetes' own that has none."""
    message: str
    log: str | None = None
    """The last lines of the container's log, where they are known."""


def judge(ended: JobView) -> StageResult | Failure:
    """What a finished Job has come to. Only exit code 0 with a valid result that says `done` is a success.

    So it is past the deadline as well: work that is done is not done again for its having ended a moment too late.
    """
    if ended.state is JobState.SUCCEEDED:
        result = _result(ended)
        if isinstance(result, Failure) and result.reason == "ResultInvalid" and _past_deadline(ended):
            return _deadline_exceeded(ended)  # the container takes SIGTERM for a reason to exit with 0
        return result
    failure = _why(ended)
    log = last_lines(ended.pod.message) if ended.pod is not None else None
    return Failure(reason=failure.reason, message=failure.message, log=log)


def _result(ended: JobView) -> StageResult | Failure:
    pod = ended.pod
    if pod is None or not pod.ended:
        return Failure(
            reason="ResultMissing",
            message=f"Job {ended.job.name} is complete, but its pod and with it the result is gone",
        )
    try:
        result = parse_result(pod.message)
    except ResultError as error:
        return Failure(reason="ResultInvalid", message=str(error))
    if result.outcome is Outcome.CANCELLED:
        # A run that is cancelled is past judging its attempts: whoever asks here has one that is not.
        words = f": {clean(result.message)}" if result.message else ""
        return Failure(
            reason=WORKER_CANCELLED,
            message=f"the container stopped for a cancel that this run does not have{words}"[:MESSAGE_CHARS],
        )
    if result.outcome is not Outcome.DONE:
        return Failure(
            reason="ResultInvalid",
            message=f"exit code 0, but the result's outcome is {result.outcome.value!r}",
        )
    return result


def _why(ended: JobView) -> Failure:
    """The first of these that fits: the deadline, the container's own word, then what was done to the pod.

    The deadline before an exit code: how a container ends that is told to says nothing about its work.
    """
    pod = ended.pod
    if _past_deadline(ended):
        return _deadline_exceeded(ended)
    if pod is None:
        return Failure(reason="PodLost", message="the pod ended without an exit code: it is gone")
    if pod.exit_code == EXIT_PERMANENT:
        return _exited("PermanentError", pod)
    if pod.reason == "OOMKilled":
        return Failure(reason="OOMKilled", message="the container used more memory than its limit")
    disrupted = _disruption(pod)
    if disrupted is not None:
        return disrupted
    if pod.pod_reason == "Evicted":
        # The kubelet marks a pod DisruptionTarget that it evicts for the node's sake, not one for its own use.
        return Failure(reason="StorageExceeded", message=_words(pod, "the kubelet evicted the pod for what it used"))
    if pod.exit_code is None:
        return Failure(reason=pod.reason or "PodLost", message=_words(pod, "the pod ended without an exit code"))
    return _exited("Error" if pod.reason in (None, "Error", "Completed") else str(pod.reason), pod)


def _past_deadline(ended: JobView) -> bool:
    """Whether the kubelet ended the pod for its deadline; or the Job controller the Job, of an operator before 0007.

    The kubelet says so of a pod that ends past its deadline whatever it ended for, so two causes that it knows of
    weigh more: a disruption, and memory (a stage may hang because one of its processes was killed for it).
    """
    if ended.job.reason == _DEADLINE:
        return True
    pod = ended.pod
    return pod is not None and pod.pod_reason == _DEADLINE and pod.disruption is None and pod.reason != "OOMKilled"


def _deadline_exceeded(ended: JobView) -> Failure:
    pod = ended.pod
    began = pod is None or (pod.started and pod.reason not in (_DEADLINE, _STATUS_UNKNOWN))
    did = "ran longer than" if began else "had not started at the end of"
    return Failure(reason=_DEADLINE, message=f"the stage {did} its activeDeadlineSeconds")


def _disruption(pod: PodFacts) -> Failure | None:
    """Whether the pod was ended, or never begun, through no fault of its own."""
    if pod.disruption is not None:
        reason = _DISRUPTIONS.get(pod.disruption, "Disrupted")
        return Failure(reason=reason, message=_words(pod, f"the pod was ended: {pod.disruption}"))
    if pod.reason in _NODE_LOST or pod.pod_reason in _NODE_LOST:
        return Failure(reason="NodeLost", message=_words(pod, "the node has lost the pod"))
    refused = pod.pod_reason or ""
    if pod.exit_code is None and (refused in _NODE_REFUSED or refused.startswith("OutOf")):
        return Failure(reason="NodeRefused", message=_words(pod, f"the node would not take the pod: {refused}"))
    if pod.deleting_until is not None and pod.exit_code in _KILLED:
        return Failure(reason="PodDeleted", message="somebody deleted the pod")
    return None


def _exited(reason: str, pod: PodFacts) -> Failure:
    words = _said(pod.message)
    return Failure(reason=reason, message=f"exit code {pod.exit_code}" + (f": {words}" if words else ""))


def _words(pod: PodFacts, ours: str) -> str:
    """Our sentence, and the kubelet's own where it left one."""
    theirs = last_line(pod.pod_message or "", chars=MESSAGE_CHARS - len(ours) - 2)
    return f"{ours}: {theirs}" if theirs else ours


def _said(message: str | None) -> str:
    """The container's own words: its result's message, or the last line of its log."""
    if not message:
        return ""
    try:
        words = " ".join(clean(parse_result(message).message or "").split())
    except ResultError:
        return last_line(message, chars=MESSAGE_CHARS)
    return words[:MESSAGE_CHARS]
