"""What each kind of failure leads to: the one table. docs/failures.md shows it to users; a test holds the two together.

Which kind a failure is, `failure` tells from a Job and its pod, `batches` from what a result says, and the API server
from why it would not take a Job.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final


class Verdict(StrEnum):
    """What comes of a failure."""

    RETRY = "Retry"
    RETRY_WITH_MORE_MEMORY = "RetryWithMoreMemory"
    FAIL_BATCH = "FailBatch"
    FAIL_RUN = "FailRun"
    HOLD = "Hold"
    """Nothing new is started, and one Job asks again every `backpressure.retrySeconds`."""


class Budget(StrEnum):
    """What a retry is taken from; each is counted apart, for each stage of each batch."""

    RETRIES = "retries"
    """`retries` of the stage or of the run."""
    MEMORY = "outOfMemory.retries"
    DISRUPTIONS = "disruptions"
    """`retrying.FREE_DISRUPTIONS`; more than those are taken from `retries`."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One row: the verdict while the budget lasts. Without one left, a retry turns into FailBatch."""

    verdict: Verdict
    budget: Budget | None = None


_RETRY: Final = Rule(Verdict.RETRY, Budget.RETRIES)
_NOBODYS_FAULT: Final = Rule(Verdict.RETRY, Budget.DISRUPTIONS)
_FAIL_BATCH: Final = Rule(Verdict.FAIL_BATCH)
_FAIL_RUN: Final = Rule(Verdict.FAIL_RUN)
_HOLD: Final = Rule(Verdict.HOLD)

TABLE: Final[Mapping[str, Rule]] = {
    # What the container did.
    "Error": _RETRY,
    "PermanentError": _FAIL_BATCH,
    "OOMKilled": Rule(Verdict.RETRY_WITH_MORE_MEMORY, Budget.MEMORY),
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
    "Evicted": _NOBODYS_FAULT,
    "Preempted": _NOBODYS_FAULT,
    "NodeLost": _NOBODYS_FAULT,
    "NodeRefused": _NOBODYS_FAULT,
    "PodDeleted": _NOBODYS_FAULT,
    "PodLost": _NOBODYS_FAULT,
    "Disrupted": _NOBODYS_FAULT,
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


def rule_of(reason: str) -> Rule:
    """The row of that reason. A reason that Kubernetes has and this table does not is retried like an error."""
    return TABLE.get(reason, _RETRY)
