"""The failure policy: the outcome of an ended attempt (`outcome_of`), and the action for each kind of failure.

`FAILURE_POLICY` is the one table. docs/failures.md shows it to users, and a test holds the two together. Which kind a
failure is follows from the Job and its pod (here), from the content of a result (`batch.state`), and from the API
server's refusal to accept a Job (`controller.reconcile.execute`).
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from ingestrun.model.contract import (
    EXIT_DONE,
    EXIT_PERMANENT,
    MAX_VARIABLE_BYTES,
    PERMANENT_REASONS,
    Outcome,
    ResultError,
    StageResult,
    parse_result,
)
from ingestrun.model.size_budget import LOG_BYTES, MESSAGE_CHARS
from ingestrun.model.text import truncate
from ingestrun.planner.batch.attempt import JOB_DELETED, KILLED_CODES, Attempt, JobState, ObservedPod
from ingestrun.planner.batch.containers import STATUS_UNKNOWN, InitContainerEnd


class FailureAction(StrEnum):
    """Action that follows a failure."""

    RETRY = "Retry"
    RETRY_WITH_MORE_MEMORY = "RetryWithMoreMemory"
    FAIL_BATCH = "FailBatch"
    FAIL_RUN = "FailRun"
    HOLD = "Hold"
    """Nothing new is started until what prevents it is over."""


class RetryBudget(StrEnum):
    """Budget that a retry is counted against; each one is counted separately, for each stage of each batch."""

    RETRIES = "retries"
    """`retries` of the stage or of the run."""
    MEMORY = "outOfMemory.retries"
    DISRUPTIONS = "disruptions"
    """`retry.FREE_DISRUPTIONS`; more than those are counted against `retries`."""


@dataclass(frozen=True, slots=True)
class FailurePolicyRule:
    """One row: the action while the budget lasts. A retry whose budget is used up turns into FailBatch."""

    action: FailureAction
    budget: RetryBudget | None = None
    probed: bool = False
    """The sign that only another create can tell that it is over: one Job is tried every `backpressure.retrySeconds`.
    """


_RETRY: Final = FailurePolicyRule(FailureAction.RETRY, RetryBudget.RETRIES)
_RETRY_DISRUPTION: Final = FailurePolicyRule(FailureAction.RETRY, RetryBudget.DISRUPTIONS)
_FAIL_BATCH: Final = FailurePolicyRule(FailureAction.FAIL_BATCH)
_FAIL_RUN: Final = FailurePolicyRule(FailureAction.FAIL_RUN)
_HOLD: Final = FailurePolicyRule(FailureAction.HOLD)
_HOLD_AND_PROBE: Final = FailurePolicyRule(FailureAction.HOLD, probed=True)

FAILURE_POLICY: Final[Mapping[str, FailurePolicyRule]] = {
    # The container failed.
    "Error": _RETRY,
    "PermanentError": _FAIL_BATCH,
    "OOMKilled": FailurePolicyRule(FailureAction.RETRY_WITH_MORE_MEMORY, RetryBudget.MEMORY),
    "DeadlineExceeded": _RETRY,
    "StorageExceeded": _RETRY,
    "StartError": _RETRY,
    "InitContainerFailed": _RETRY,
    # Its result is missing or not valid.
    "ResultMissing": _RETRY,
    "ResultInvalid": _RETRY,
    "RowsMismatch": _RETRY,
    "WorkerCancelled": _RETRY,
    "LimitExceeded": _FAIL_BATCH,
    "NoProgress": _FAIL_BATCH,
    "SourceChanged": _FAIL_BATCH,
    # Its pod was ended from outside.
    "Evicted": _RETRY_DISRUPTION,
    "Preempted": _RETRY_DISRUPTION,
    "NodeLost": _RETRY_DISRUPTION,
    "NodeRefused": _RETRY_DISRUPTION,
    "PodDeleted": _RETRY_DISRUPTION,
    "PodLost": _RETRY_DISRUPTION,
    "Disrupted": _RETRY_DISRUPTION,
    "JobDeleted": _RETRY_DISRUPTION,
    "WorkerLost": _RETRY_DISRUPTION,
    "WorkerStopped": _RETRY_DISRUPTION,
    # Its pod could not start.
    "ImagePull": _FAIL_BATCH,
    "ContainerConfig": _FAIL_BATCH,
    "VolumeMissing": _FAIL_BATCH,
    "VolumeUnavailable": _FAIL_BATCH,
    "PodSandbox": _FAIL_BATCH,
    "StartTimeout": _FAIL_BATCH,
    "PodRefused": _FAIL_BATCH,
    "JobMissing": _FAIL_BATCH,
    # The API server did not accept the Job.
    "JobRefused": _FAIL_RUN,
    "AdmissionDenied": _FAIL_RUN,
    "JobChanged": _FAIL_RUN,
    "NameTaken": _FAIL_RUN,
    "Forbidden": _HOLD_AND_PROBE,
    "NamespaceTerminating": _HOLD_AND_PROBE,
    "WebhookUnavailable": _HOLD_AND_PROBE,
    "QuotaExceeded": _HOLD_AND_PROBE,
    # Nobody makes its pod, or no node takes it.
    "ServerFailed": _HOLD,
    "Unschedulable": _HOLD,
    "NodeMismatch": _HOLD,
    "SchedulingGated": _HOLD,
    "JobNotStarted": _HOLD,
}

WORKER_CANCELLED: Final = "WorkerCancelled"
"""The failure of a container that reports that it stopped for a cancel, in a run that has none."""

_DISRUPTIONS: Final = {
    "PreemptionByScheduler": "Preempted",
    "EvictionByEvictionAPI": "Evicted",
    "TerminationByKubelet": "Evicted",
    "DeletionByTaintManager": "NodeLost",
    "DeletionByPodGC": "NodeLost",
}
"""Reasons of a pod's condition DisruptionTarget (Kubernetes' docs, "Disruptions"), each with the table's reason."""
_DEADLINE: Final = "DeadlineExceeded"
"""The kubelet's reason of a pod, and the Job controller's of a Job, that exceeded its `activeDeadlineSeconds`."""
_NODE_LOST: Final = frozenset({"NodeLost", STATUS_UNKNOWN, "Unknown"})
"""Reasons of a pod or a container that its node has lost: "Unknown" (exit code 255) is containerd's for a container
that is not there any more when the node has restarted."""
_NODE_REFUSED: Final = frozenset({"NodeAffinity", "NodeShutdown", "UnexpectedAdmissionError", "AdmissionFailed"})
"""Reasons of a kubelet that rejects a pod bound to its node; also OutOfcpu, OutOfmemory, OutOfpods and the like."""
_NODE_CONDITION: Final = "The node had condition"
"""Words of a kubelet that takes no pod while its node is short of disk or memory. Its reason is Evicted, as of a pod
that used too much itself."""
_ENDED_BY_SIGTERM: Final = (*KILLED_CODES, EXIT_DONE)
"""The exit codes of a container that was told to end: those of the signals, and 0, as many handle SIGTERM."""
_TOO_LARGE: Final = "argument list too long"
"""The words of E2BIG, at the end of a container runtime's long sentence."""
_TOO_LARGE_MESSAGE: Final = (
    f"a variable or an argument is too large for a process ({_TOO_LARGE}): each may have {MAX_VARIABLE_BYTES - 1} "
    "bytes, also one that comes of a Secret or a ConfigMap"
)
_ESCAPE: Final = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")
"""Terminal sequences (ECMA-48): colours, cursor movements, titles."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Failure of an attempt: its reason and message."""

    reason: str
    """A row of `FAILURE_POLICY`, or a reason of Kubernetes' own that has none."""
    message: str
    log: str | None = None
    """The last lines of the container's log, if they are known."""


def rule_of(reason: str) -> FailurePolicyRule:
    """Return the row of a reason. Reasons of Kubernetes that the table lacks are retried like an error."""
    return FAILURE_POLICY.get(reason, _RETRY)


def outcome_of(ended: Attempt) -> StageResult | Failure:
    """Judge a finished attempt. Only exit code 0 with a valid result whose outcome is `done` is a success.

    This also holds past the deadline: completed work is never repeated because it finished slightly late.
    """
    if ended.state is JobState.SUCCEEDED:
        result = _result(ended)
        if isinstance(result, Failure) and result.reason == "ResultInvalid":
            return _sigterm_failure(ended) or result
        return result
    failure = _failure_of(ended)
    log = last_lines(_last_words(ended.pod)) if ended.pod is not None else None
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
        # Attempts of cancelled runs are not judged here, so this run is not cancelled.
        words = f": {strip_control(result.message)}" if result.message else ""
        return Failure(
            reason=WORKER_CANCELLED,
            message=truncate(f"the container stopped for a cancel that this run does not have{words}", MESSAGE_CHARS),
        )
    if result.outcome is not Outcome.DONE:
        return Failure(
            reason="ResultInvalid",
            message=f"exit code 0, but the result's outcome is {result.outcome.value!r}",
        )
    return result


def _sigterm_failure(ended: Attempt) -> Failure | None:
    """Return why a container without a result got the SIGTERM upon which it ended with 0; None if it got none."""
    if _past_deadline(ended):
        return _deadline_exceeded(ended)
    return _disruption_failure(ended.pod) if ended.pod is not None else None


def _failure_of(ended: Attempt) -> Failure:
    """Return the first failure that fits: the deadline, the container's own result, then a disruption of the pod.

    The deadline comes before an exit code, because the exit code after SIGTERM does not tell how the work went.
    """
    pod = ended.pod
    if _past_deadline(ended):
        return _deadline_exceeded(ended)
    if pod is None and ended.job.reason == JOB_DELETED:
        return Failure(reason=JOB_DELETED, message="somebody deleted the Job, and how its pod ended is not known")
    if pod is None:
        return Failure(reason="PodLost", message="the pod ended without an exit code: it is gone")
    if pod.exit_code == EXIT_PERMANENT:
        return _exit_failure(_permanent_reason(pod), pod)
    if pod.reason == "OOMKilled":
        return Failure(reason="OOMKilled", message="the container used more memory than its limit")
    disrupted = _disruption_failure(pod)
    if disrupted is not None:
        return disrupted
    if pod.pod_reason == "Evicted":
        # The kubelet marks a pod DisruptionTarget that it evicts for the node's sake, not one for its own use.
        message = _with_kubelet_message(pod, "the kubelet evicted the pod for what it used")
        return Failure(reason="StorageExceeded", message=message)
    if pod.failed_init is not None:
        return _init_failure(pod.failed_init)
    if pod.exit_code is None:
        message = _with_kubelet_message(pod, "the pod ended without an exit code")
        return Failure(reason=pod.reason or "PodLost", message=message)
    return _exit_failure("Error" if pod.reason in (None, "Error", "Completed") else str(pod.reason), pod)


def _past_deadline(ended: Attempt) -> bool:
    """Tell whether the pod (or, for Jobs created before decision 0007, the Job) exceeded its activeDeadlineSeconds.

    The kubelet reports this for any pod that ends past its deadline, for any cause, so two other causes have
    precedence: a disruption, and memory (a stage may hang because one of its processes was killed for it). Where other
    containers kept the pod going, or the operator has ended them, the time that the stage's own container took counts.
    """
    if ended.job.reason == _DEADLINE:
        return True
    pod = ended.pod
    if pod is None or pod.disruption is not None or pod.reason == "OOMKilled":
        return False
    if pod.ran_for is not None and ended.job.deadline is not None and (pod.left_running or pod.pod_reason == _DEADLINE):
        return pod.ran_for >= ended.job.deadline
    return pod.pod_reason == _DEADLINE


def _deadline_exceeded(ended: Attempt) -> Failure:
    pod = ended.pod
    began = pod is None or (pod.started and pod.reason not in (_DEADLINE, STATUS_UNKNOWN))
    if began:
        return Failure(reason=_DEADLINE, message="the stage ran longer than its activeDeadlineSeconds")
    message = "the stage had not started at the end of its activeDeadlineSeconds"
    if pod is not None and pod.failed_init:
        message = f"{message}: it waited for init container {pod.failed_init.name}"
    elif ended.last_obstacle is not None:
        message = f"{message}: {ended.last_obstacle.kind}: {ended.last_obstacle.message}"
    return Failure(reason=_DEADLINE, message=truncate(message, MESSAGE_CHARS))


def _disruption_failure(pod: ObservedPod) -> Failure | None:
    """Return a failure if the pod was ended, or never started, for a cause outside of it."""
    if pod.disruption is not None:
        reason = _DISRUPTIONS.get(pod.disruption, "Disrupted")
        return Failure(reason=reason, message=_with_kubelet_message(pod, f"the pod was ended: {pod.disruption}"))
    init_reason = pod.failed_init.reason if pod.failed_init is not None else None
    if not _NODE_LOST.isdisjoint((pod.reason, init_reason, pod.pod_reason)):
        return Failure(reason="NodeLost", message=_with_kubelet_message(pod, "the node has lost the pod"))
    refused = pod.pod_reason or ""
    pressed = _NODE_CONDITION in (pod.pod_message or "")
    if pod.exit_code is None and (refused in _NODE_REFUSED or refused.startswith("OutOf") or pressed):
        message = _with_kubelet_message(pod, f"the node would not take the pod: {refused}")
        return Failure(reason="NodeRefused", message=message)
    exit_code = pod.exit_code if pod.failed_init is None else pod.failed_init.exit_code
    if pod.deleting_until is not None and exit_code in _ENDED_BY_SIGTERM:
        return Failure(reason="PodDeleted", message="somebody deleted the pod")
    return None


def _init_failure(end: InitContainerEnd) -> Failure:
    times = f", {end.restarts + 1} times" if end.restarts else ""
    why = f" ({end.reason})" if end.reason not in (None, "Error", "Completed") else ""
    words = _container_message(end.message)
    message = f"init container {end.name}: exit code {end.exit_code}{why}{times}" + (f": {words}" if words else "")
    return Failure(reason="InitContainerFailed", message=message)


def _last_words(pod: ObservedPod) -> str | None:
    """Return the termination message of the container that has ended: the stage's own, or one that it waited for."""
    return pod.failed_init.message if pod.failed_init is not None else pod.message


def _permanent_reason(pod: ObservedPod) -> str:
    """Return the reason that the container's result gives for a failure for good, if it is one of the contract's."""
    try:
        reason = parse_result(pod.message).reason
    except ResultError:
        reason = None
    return reason if reason in PERMANENT_REASONS else "PermanentError"


def _exit_failure(reason: str, pod: ObservedPod) -> Failure:
    too_large = reason == "StartError" and _TOO_LARGE in (pod.message or "")
    words = _TOO_LARGE_MESSAGE if too_large else _container_message(pod.message)
    return Failure(reason=reason, message=f"exit code {pod.exit_code}" + (f": {words}" if words else ""))


def _with_kubelet_message(pod: ObservedPod, sentence: str) -> str:
    """Append the kubelet's message to a sentence, if it left one."""
    message = last_line(pod.pod_message or "", chars=MESSAGE_CHARS - len(sentence) - 2)
    return f"{sentence}: {message}" if message else sentence


def _container_message(message: str | None) -> str:
    """Return the message of the container's result or, without a result, the last line of its log."""
    if not message:
        return ""
    try:
        words = " ".join(strip_control(parse_result(message).message or "").split())
    except ResultError:
        return last_line(message, chars=MESSAGE_CHARS)
    return truncate(words, MESSAGE_CHARS)


def strip_control(text: str) -> str:
    """Remove terminal sequences, control and format characters; newlines stay, tabs become blanks."""
    text = _ESCAPE.sub("", text).replace("\r\n", "\n").replace("\t", " ")
    return "".join(char for char in text if char == "\n" or unicodedata.category(char) not in ("Cc", "Cf", "Cs"))


def last_lines(message: str | None) -> str | None:
    """Return the end of the log in a termination message; None if the message is empty or holds a result.

    The kubelet puts the log there (FallbackToLogsOnError: the last 2048 bytes or 80 lines) when a container fails
    and has left no message itself.
    """
    if not message or _is_result(message):
        return None
    lines = [line.rstrip() for line in strip_control(message).split("\n")]
    text = "\n".join(lines).strip("\n")
    while _json_bytes(text) > LOG_BYTES:
        # Drop the first line if there are several, else the beginning of the line.
        head, newline, rest = text.partition("\n")
        text = rest if newline else "…" + _end_of(head, LOG_BYTES - len("…".encode()))
    return text or None


def last_line(message: str, *, chars: int) -> str:
    """Return the last line that is not empty, cut at its beginning."""
    lines = [" ".join(line.split()) for line in strip_control(message).split("\n")]
    line = next((line for line in reversed(lines) if line), "")
    return line if len(line) <= chars else "…" + line[1 - chars :]


def _is_result(message: str) -> bool:
    try:
        parse_result(message)
    except ResultError:
        return False
    return True


def _json_bytes(text: str) -> int:
    return len(json.dumps(text, ensure_ascii=False).encode()) - 2


def _end_of(line: str, size: int) -> str:
    kept = line[-size:]
    while _json_bytes(kept) > size:
        kept = kept[1:]
    return kept
