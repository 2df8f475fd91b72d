"""From what is known of an ended Job to a verdict: the stage is done, or it failed, why, and whether to retry."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from ingestrun.engine.facts import MESSAGE_CHARS, JobState, JobView
from ingestrun.model.contract import EXIT_PERMANENT, Outcome, ResultError, StageResult, parse_result
from ingestrun.model.spec import Backoff

WORKER_CANCELLED: Final = "WorkerCancelled"
"""The reason of a container that says it stopped for a cancel, in a run that has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why an attempt is no success. A permanent one is not retried."""

    reason: str
    message: str
    permanent: bool = False


def judge(ended: JobView) -> StageResult | Failure:
    """The verdict on a finished Job. Only exit code 0 with a valid result that says `done` is a success."""
    pod = ended.pod
    if ended.state is JobState.SUCCEEDED:
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
            words = f": {result.message}" if result.message else ""
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

    if ended.job.reason == "DeadlineExceeded":
        return Failure(reason="DeadlineExceeded", message="the stage ran longer than its activeDeadlineSeconds")
    if pod is None or pod.exit_code is None:
        reason = (pod and pod.reason) or ended.job.reason or "PodLost"
        message = (pod and pod.message) or ended.job.message or "the pod ended without an exit code"
        return Failure(reason=reason, message=message)
    if pod.reason == "OOMKilled":
        return Failure(reason="OOMKilled", message="the container used more memory than its limit")
    reason = "Error" if pod.reason in (None, "Error", "Completed") else str(pod.reason)
    words = _said(pod.message)
    return Failure(
        reason="PermanentError" if pod.exit_code == EXIT_PERMANENT else reason,
        message=f"exit code {pod.exit_code}" + (f": {words}" if words else ""),
        permanent=pod.exit_code == EXIT_PERMANENT,
    )


def retry_delay(backoff: Backoff, *, identity: str, attempt: int) -> timedelta:
    """How long to wait before the attempt after `attempt`.

    Doubles from `initialSeconds` up to `maxSeconds`; then up to a fifth is taken off, by a hash of `identity`,
    so that many batches which failed together do not come back together, and a restart changes nothing.
    """
    seconds = min(backoff.max_seconds, backoff.initial_seconds * 2 ** min(attempt, 30))
    share = int.from_bytes(hashlib.sha256(f"{identity}/{attempt}".encode()).digest()[:4]) / 2**32
    return timedelta(seconds=seconds * (1 - share / 5))


def _said(message: str | None) -> str:
    """The container's own words: its result's message, or the last lines of its log."""
    if not message:
        return ""
    try:
        words = parse_result(message).message or ""
    except ResultError:
        words = " ".join(message.split())
        if len(words) > MESSAGE_CHARS:
            words = "…" + words[1 - MESSAGE_CHARS :]
    return words[:MESSAGE_CHARS]
