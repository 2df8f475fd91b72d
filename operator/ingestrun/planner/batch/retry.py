"""What comes of a failed attempt: its row of the table, held against what is left of the stage's budgets."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Final

from ingestrun.model.quantity import QuantityError, read_bytes, render_bytes
from ingestrun.model.spec import Backoff, OutOfMemory
from ingestrun.planner.batch.attempt import Attempt
from ingestrun.planner.batch.failure_policy import Failure, FailureAction, RetryBudget, rule_of

FREE_DISRUPTIONS: Final = 10
"""How many disruptions one stage of one batch survives without touching its `retries`.

Nobody's fault, so `retries: 0` survives them too; yet bounded, or a pod that a too full node evicts each time
would be started for ever.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How often one stage may be tried again, and how long is waited before."""

    retries: int
    out_of_memory: OutOfMemory | None
    backoff: Backoff


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetsUsed:
    """How many of a stage's attempts have failed so far, by what they were taken from."""

    retries: int = 0
    memory: int = 0
    disruptions: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryDecision:
    """What comes of one failed attempt."""

    action: FailureAction
    used: BudgetsUsed
    delay: timedelta = timedelta(0)
    memory: MemoryLimit | None = None
    explanation: str = ""
    """In words: which retry of how many comes when, or why none does."""

    @property
    def retried(self) -> bool:
        """Whether there is another attempt."""
        return self.action in (FailureAction.RETRY, FailureAction.RETRY_WITH_MORE_MEMORY)


def decide_retry(
    failure: Failure, *, allowance: RetryPolicy, spent: BudgetsUsed, had: int | None, identity: str
) -> RetryDecision:
    """Decide about one failed attempt.

    `spent` is without it; `had` is the memory limit it had, in bytes. `identity` names the stage of the batch.
    """
    rule = rule_of(failure.reason)
    settings = allowance.out_of_memory
    if rule.budget is None:
        return RetryDecision(action=rule.action, used=spent)
    if rule.budget is RetryBudget.MEMORY and settings is not None and had is not None:
        return _retry_with_more_memory(settings, had, allowance=allowance, spent=spent, identity=identity)
    if rule.budget is RetryBudget.DISRUPTIONS and spent.disruptions < FREE_DISRUPTIONS:
        delay = retry_delay(allowance.backoff, identity=identity, attempt=spent.disruptions)
        number = spent.disruptions + 1
        return RetryDecision(
            action=FailureAction.RETRY,
            used=replace(spent, disruptions=number),
            delay=delay,
            explanation=f"retry {number} of {FREE_DISRUPTIONS} for disruptions {_when(delay)}",
        )
    # Without a setting for memory, or without a limit to raise, being killed for memory is an error like others.
    used = replace(spent, retries=spent.retries + 1)
    if spent.retries >= allowance.retries:
        return RetryDecision(action=FailureAction.FAIL_BATCH, used=used)
    delay = retry_delay(allowance.backoff, identity=identity, attempt=spent.retries)
    said = f"retry {used.retries} of {allowance.retries} {_when(delay)}"
    return RetryDecision(action=FailureAction.RETRY, used=used, delay=delay, explanation=said)


def retry_delay(backoff: Backoff, *, identity: str, attempt: int) -> timedelta:
    """How long to wait after so many failures of the same budget and one more.

    Doubles from `initialSeconds` up to `maxSeconds`; then up to a fifth is taken off, by a hash of `identity`,
    so that many batches which failed together do not come back together, and a restart changes nothing.
    """
    seconds = min(backoff.max_seconds, backoff.initial_seconds * 2 ** min(attempt, 30))
    share = int.from_bytes(hashlib.sha256(f"{identity}/{attempt}".encode()).digest()[:4]) / 2**32
    return timedelta(seconds=seconds * (1 - share / 5))


def _retry_with_more_memory(
    settings: OutOfMemory, had: int, *, allowance: RetryPolicy, spent: BudgetsUsed, identity: str
) -> RetryDecision:
    number = spent.memory + 1
    used = replace(spent, memory=number)
    more = raise_limit(had, settings)
    if settings.retries == 0:
        return RetryDecision(action=FailureAction.FAIL_BATCH, used=used, explanation="outOfMemory.retries is 0")
    if more is None:
        cap = settings.max_memory
        said = f"it had {render_bytes(had)}, and outOfMemory.maxMemory of {cap} allows no more"
        return RetryDecision(action=FailureAction.FAIL_BATCH, used=used, explanation=said)
    if spent.memory >= settings.retries:
        said = f"it had {render_bytes(had)}, after {spent.memory} of {settings.retries} retries with more memory"
        return RetryDecision(action=FailureAction.FAIL_BATCH, used=used, explanation=said)
    delay = retry_delay(allowance.backoff, identity=identity, attempt=spent.memory)
    return RetryDecision(
        action=FailureAction.RETRY_WITH_MORE_MEMORY,
        used=used,
        delay=delay,
        memory=more,
        explanation=f"retry {number} of {settings.retries} with {more} {_when(delay)}",
    )


def _when(delay: timedelta) -> str:
    seconds = round(delay.total_seconds())
    return f"in {seconds} s" if seconds else "at once"


# More memory for a stage that was killed for want of it: how much, and the container's resources with it.

FACTOR: Final = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryLimit:
    """The memory limit of an attempt, where it is not simply the spec's."""

    limit: int
    """Bytes."""
    before: int | None = None
    """Bytes that the attempt before had; None where this one has no more than that."""

    def __str__(self) -> str:
        was = f" instead of {render_bytes(self.before)}" if self.before is not None else ""
        return f"{render_bytes(self.limit)}{was}"


def memory_limit_of(attempt: Attempt) -> int | None:
    """The memory limit that an attempt's container had, in bytes.

    The pod knows best: a LimitRange may have given it one that the Job does not name. None: it had none.
    """
    pod = attempt.pod.memory_limit if attempt.pod is not None else None
    return pod if pod is not None else attempt.job.memory_limit


def raise_limit(had: int, settings: OutOfMemory) -> MemoryLimit | None:
    """Twice as much, up to the cap; None where the cap allows no more than it had."""
    cap = read_bytes(settings.max_memory) if settings.max_memory is not None else had
    limit = min(had * FACTOR, cap)
    return MemoryLimit(limit=limit, before=had) if limit > had else None


def with_memory_limit(resources: Mapping[str, Any], limit: int) -> dict[str, Any]:
    """A container's resources with another memory limit; its request, if it has one, grows in proportion.

    In proportion, so that equal ones stay equal (the pod's QoS class does not change) and the scheduler still
    counts on what the stage really takes.
    """
    limits, requests = dict(resources.get("limits") or {}), dict(resources.get("requests") or {})
    before, asked = _bytes_of_quantity(limits.get("memory")), _bytes_of_quantity(requests.get("memory"))
    if before == limit:
        return dict(resources)
    limits["memory"] = render_bytes(limit)
    if before and asked:
        requests["memory"] = render_bytes(min(limit, asked * limit // before))
    return {**resources, "limits": limits, **({"requests": requests} if requests else {})}


def _bytes_of_quantity(quantity: str | int | None) -> int | None:
    if quantity is None:
        return None
    try:
        return read_bytes(quantity)
    except QuantityError:  # the API server will say so when it is given the Job
        return None
