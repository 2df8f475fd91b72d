"""From what is known of an ended Job to what it means: the stage is done, or it failed, and of which kind that is.

What comes of each kind is in the table of `verdicts`.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from ingestrun.model.contract import EXIT_PERMANENT, Outcome, ResultError, StageResult, parse_result
from ingestrun.planner.batch.attempt import MESSAGE_CHARS, Attempt, JobState, ObservedPod

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


def outcome_of(ended: Attempt) -> StageResult | Failure:
    """What a finished Job has come to. Only exit code 0 with a valid result that says `done` is a success.

    So it is past the deadline as well: work that is done is not done again for its having ended a moment too late.
    """
    if ended.state is JobState.SUCCEEDED:
        result = _result(ended)
        if isinstance(result, Failure) and result.reason == "ResultInvalid" and _past_deadline(ended):
            return _deadline_exceeded(ended)  # the container takes SIGTERM for a reason to exit with 0
        return result
    failure = _failure_of(ended)
    log = last_lines(ended.pod.message) if ended.pod is not None else None
    return Failure(reason=failure.reason, message=failure.message, log=log)


def _result(ended: Attempt) -> StageResult | Failure:
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
        words = f": {strip_control(result.message)}" if result.message else ""
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


def _failure_of(ended: Attempt) -> Failure:
    """The first of these that fits: the deadline, the container's own word, then what was done to the pod.

    The deadline before an exit code: how a container ends that is told to says nothing about its work.
    """
    pod = ended.pod
    if _past_deadline(ended):
        return _deadline_exceeded(ended)
    if pod is None:
        return Failure(reason="PodLost", message="the pod ended without an exit code: it is gone")
    if pod.exit_code == EXIT_PERMANENT:
        return _exit_failure("PermanentError", pod)
    if pod.reason == "OOMKilled":
        return Failure(reason="OOMKilled", message="the container used more memory than its limit")
    disrupted = _disruption_failure(pod)
    if disrupted is not None:
        return disrupted
    if pod.pod_reason == "Evicted":
        # The kubelet marks a pod DisruptionTarget that it evicts for the node's sake, not one for its own use.
        return Failure(
            reason="StorageExceeded", message=_with_kubelet_message(pod, "the kubelet evicted the pod for what it used")
        )
    if pod.exit_code is None:
        return Failure(
            reason=pod.reason or "PodLost", message=_with_kubelet_message(pod, "the pod ended without an exit code")
        )
    return _exit_failure("Error" if pod.reason in (None, "Error", "Completed") else str(pod.reason), pod)


def _past_deadline(ended: Attempt) -> bool:
    """Whether the kubelet ended the pod for its deadline; or the Job controller the Job, of an operator before 0007.

    The kubelet says so of a pod that ends past its deadline whatever it ended for, so two causes that it knows of
    weigh more: a disruption, and memory (a stage may hang because one of its processes was killed for it).
    """
    if ended.job.reason == _DEADLINE:
        return True
    pod = ended.pod
    return pod is not None and pod.pod_reason == _DEADLINE and pod.disruption is None and pod.reason != "OOMKilled"


def _deadline_exceeded(ended: Attempt) -> Failure:
    pod = ended.pod
    began = pod is None or (pod.started and pod.reason not in (_DEADLINE, _STATUS_UNKNOWN))
    did = "ran longer than" if began else "had not started at the end of"
    return Failure(reason=_DEADLINE, message=f"the stage {did} its activeDeadlineSeconds")


def _disruption_failure(pod: ObservedPod) -> Failure | None:
    """Whether the pod was ended, or never begun, through no fault of its own."""
    if pod.disruption is not None:
        reason = _DISRUPTIONS.get(pod.disruption, "Disrupted")
        return Failure(reason=reason, message=_with_kubelet_message(pod, f"the pod was ended: {pod.disruption}"))
    if pod.reason in _NODE_LOST or pod.pod_reason in _NODE_LOST:
        return Failure(reason="NodeLost", message=_with_kubelet_message(pod, "the node has lost the pod"))
    refused = pod.pod_reason or ""
    if pod.exit_code is None and (refused in _NODE_REFUSED or refused.startswith("OutOf")):
        return Failure(
            reason="NodeRefused", message=_with_kubelet_message(pod, f"the node would not take the pod: {refused}")
        )
    if pod.deleting_until is not None and pod.exit_code in _KILLED:
        return Failure(reason="PodDeleted", message="somebody deleted the pod")
    return None


def _exit_failure(reason: str, pod: ObservedPod) -> Failure:
    words = _container_message(pod.message)
    return Failure(reason=reason, message=f"exit code {pod.exit_code}" + (f": {words}" if words else ""))


def _with_kubelet_message(pod: ObservedPod, ours: str) -> str:
    """Our sentence, and the kubelet's own where it left one."""
    theirs = last_line(pod.pod_message or "", chars=MESSAGE_CHARS - len(ours) - 2)
    return f"{ours}: {theirs}" if theirs else ours


def _container_message(message: str | None) -> str:
    """The container's own words: its result's message, or the last line of its log."""
    if not message:
        return ""
    try:
        words = " ".join(strip_control(parse_result(message).message or "").split())
    except ResultError:
        return last_line(message, chars=MESSAGE_CHARS)
    return words[:MESSAGE_CHARS]


# What each kind of failure leads to: the one table. docs/failures.md shows it to users; a test holds the two together.
#
# Which kind a failure is, `failure` tells from a Job and its pod, `batches` from what a result says, and the API server
# from why it would not take a Job.
#


class FailureAction(StrEnum):
    """What comes of a failure."""

    RETRY = "Retry"
    RETRY_WITH_MORE_MEMORY = "RetryWithMoreMemory"
    FAIL_BATCH = "FailBatch"
    FAIL_RUN = "FailRun"
    HOLD = "Hold"
    """Nothing new is started, and one Job asks again every `backpressure.retrySeconds`."""


class RetryBudget(StrEnum):
    """What a retry is taken from; each is counted apart, for each stage of each batch."""

    RETRIES = "retries"
    """`retries` of the stage or of the run."""
    MEMORY = "outOfMemory.retries"
    DISRUPTIONS = "disruptions"
    """`retrying.FREE_DISRUPTIONS`; more than those are taken from `retries`."""


@dataclass(frozen=True, slots=True)
class FailurePolicyRule:
    """One row: the verdict while the budget lasts. Without one left, a retry turns into FailBatch."""

    action: FailureAction
    budget: RetryBudget | None = None


_RETRY: Final = FailurePolicyRule(FailureAction.RETRY, RetryBudget.RETRIES)
_RETRY_DISRUPTION: Final = FailurePolicyRule(FailureAction.RETRY, RetryBudget.DISRUPTIONS)
_FAIL_BATCH: Final = FailurePolicyRule(FailureAction.FAIL_BATCH)
_FAIL_RUN: Final = FailurePolicyRule(FailureAction.FAIL_RUN)
_HOLD: Final = FailurePolicyRule(FailureAction.HOLD)

FAILURE_POLICY: Final[Mapping[str, FailurePolicyRule]] = {
    # What the container did.
    "Error": _RETRY,
    "PermanentError": _FAIL_BATCH,
    "OOMKilled": FailurePolicyRule(FailureAction.RETRY_WITH_MORE_MEMORY, RetryBudget.MEMORY),
    "DeadlineExceeded": _RETRY,
    "StorageExceeded": _RETRY,
    "StartError": _RETRY,
    # What it left.
    "ResultMissing": _RETRY,
    "ResultInvalid": _RETRY,
    "RowsMismatch": _RETRY,
    "WorkerCancelled": _RETRY,
    "LimitExceeded": _FAIL_BATCH,
    "NoProgress": _FAIL_BATCH,
    "SourceChanged": _FAIL_BATCH,
    # What was done to its pod.
    "Evicted": _RETRY_DISRUPTION,
    "Preempted": _RETRY_DISRUPTION,
    "NodeLost": _RETRY_DISRUPTION,
    "NodeRefused": _RETRY_DISRUPTION,
    "PodDeleted": _RETRY_DISRUPTION,
    "PodLost": _RETRY_DISRUPTION,
    "Disrupted": _RETRY_DISRUPTION,
    # Why it never started.
    "ImagePull": _FAIL_BATCH,
    "ContainerConfig": _FAIL_BATCH,
    "PodRefused": _FAIL_BATCH,
    "JobMissing": _FAIL_BATCH,
    # Why the API server would not take the Job.
    "JobRefused": _FAIL_RUN,
    "AdmissionDenied": _FAIL_RUN,
    "NameTaken": _FAIL_RUN,
    "Forbidden": _HOLD,
    "NamespaceTerminating": _HOLD,
    "WebhookUnavailable": _HOLD,
    "QuotaExceeded": _HOLD,
}


def rule_of(reason: str) -> FailurePolicyRule:
    """The row of that reason. A reason that Kubernetes has and this table does not is retried like an error."""
    return FAILURE_POLICY.get(reason, _RETRY)


# The last words of a failed container, made fit to be shown: bounded, one text without control characters.

LOG_BYTES: Final = 350
"""How much of a log is kept: as JSON in UTF-8, so that the status keeps its size whatever the script."""

_ESCAPE: Final = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")
"""Terminal sequences (ECMA-48): colours, cursor movements, titles."""


def strip_control(text: str) -> str:
    """The text without terminal sequences, control and format characters; newlines stay, tabs become blanks."""
    text = _ESCAPE.sub("", text).replace("\r\n", "\n").replace("\t", " ")
    return "".join(char for char in text if char == "\n" or unicodedata.category(char) not in ("Cc", "Cf", "Cs"))


def last_lines(message: str | None) -> str | None:
    """The end of a log that stands in a termination message; None where a result stands there, or nothing.

    The kubelet puts it there (FallbackToLogsOnError: the last 2048 bytes or 80 lines) when a container fails
    and has left nothing itself.
    """
    if not message or _is_result(message):
        return None
    lines = [line.rstrip() for line in strip_control(message).split("\n")]
    text = "\n".join(lines).strip("\n")
    while _size(text) > LOG_BYTES:
        # A whole line where there are several, else the line's beginning.
        head, newline, rest = text.partition("\n")
        text = rest if newline else "…" + _end_of(head, LOG_BYTES - len("…".encode()))
    return text or None


def last_line(message: str, *, chars: int) -> str:
    """The last line with something in it, cut at its beginning."""
    lines = [" ".join(line.split()) for line in strip_control(message).split("\n")]
    line = next((line for line in reversed(lines) if line), "")
    return line if len(line) <= chars else "…" + line[1 - chars :]


def _is_result(message: str) -> bool:
    try:
        parse_result(message)
    except ResultError:
        return False
    return True


def _size(text: str) -> int:
    return len(json.dumps(text, ensure_ascii=False).encode()) - 2


def _end_of(line: str, size: int) -> str:
    kept = line[-size:]
    while _size(kept) > size:
        kept = kept[1:]
    return kept
