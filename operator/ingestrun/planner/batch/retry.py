"""The decision after a failed attempt: its row of the failure policy, limited by the rest of the stage's budgets."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Final

from ingestrun.model.quantity import QuantityError, read_bytes, render_bytes
from ingestrun.model.spec import Backoff, OutOfMemory
from ingestrun.model.text import pluralize
from ingestrun.planner.batch.attempt import Attempt
from ingestrun.planner.batch.failure_policy import Failure, FailureAction, RetryBudget, rule_of

FREE_DISRUPTIONS: Final = 10
"""Number of disruptions that one stage of one batch survives without using its `retries`.

A disruption is not the stage's fault, so a stage with `retries: 0` survives it too. The number is bounded, because a
pod that a full node evicts each time would be started for ever.
"""
MEMORY_FACTOR: Final = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """Number of retries of one stage, and the delay before each."""

    retries: int
    out_of_memory: OutOfMemory | None
    backoff: Backoff


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetsUsed:
    """Number of a stage's attempts that have failed so far, by the budget that they used."""

    retries: int = 0
    memory: int = 0
    disruptions: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryLimit:
    """The memory limit of an attempt, if it is not the spec's."""

    limit: int
    """Bytes."""
    before: int | None = None
    """Memory limit of the attempt before in bytes; None if the limit was not raised for this attempt."""

    def __str__(self) -> str:
        was = f" instead of {render_bytes(self.before)}" if self.before is not None else ""
        return f"{render_bytes(self.limit)}{was}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryDecision:
    """Decision about one failed attempt."""

    action: FailureAction
    used: BudgetsUsed
    delay: timedelta = timedelta(0)
    memory: MemoryLimit | None = None
    explanation: str = ""
    """Text for people: the number of the retry, of the most allowed, and its time, or the reason why there is none."""

    @property
    def retried(self) -> bool:
        """Tell whether there is another attempt."""
        return self.action in (FailureAction.RETRY, FailureAction.RETRY_WITH_MORE_MEMORY)


def decide_retry(
    failure: Failure, *, policy: RetryPolicy, used: BudgetsUsed, memory_limit: int | None, identity: str
) -> RetryDecision:
    """Decide about one failed attempt.

    `used` does not count it; `memory_limit` is its limit in bytes. `identity` names the stage of the batch.
    """
    rule = rule_of(failure.reason)
    settings = policy.out_of_memory
    if rule.budget is None:
        return RetryDecision(action=rule.action, used=used)
    if rule.budget is RetryBudget.MEMORY and settings is not None and memory_limit is not None:
        return _retry_with_more_memory(settings, memory_limit, policy=policy, used=used, identity=identity)
    if rule.budget is RetryBudget.DISRUPTIONS and used.disruptions < FREE_DISRUPTIONS:
        delay = retry_delay(policy.backoff, identity=identity, attempt=used.disruptions)
        number = used.disruptions + 1
        return RetryDecision(
            action=FailureAction.RETRY,
            used=replace(used, disruptions=number),
            delay=delay,
            explanation=f"retry {number} of {FREE_DISRUPTIONS} for disruptions {_when(delay)}",
        )
    # Without a setting for memory, or without a limit to raise, being killed for memory is an error like others.
    after = replace(used, retries=used.retries + 1)
    if used.retries >= policy.retries:
        return RetryDecision(action=FailureAction.FAIL_BATCH, used=after)
    delay = retry_delay(policy.backoff, identity=identity, attempt=used.retries)
    explanation = f"retry {after.retries} of {policy.retries} {_when(delay)}"
    return RetryDecision(action=FailureAction.RETRY, used=after, delay=delay, explanation=explanation)


def retry_delay(backoff: Backoff, *, identity: str, attempt: int) -> timedelta:
    """Return how long to wait before the next try, after `attempt` earlier failures of the same budget.

    The delay doubles from `initialSeconds` up to `maxSeconds`; then a hash of `identity` takes up to a fifth off,
    so that batches which failed together are not retried together, and a restart changes nothing.
    """
    seconds = min(backoff.max_seconds, backoff.initial_seconds * 2 ** min(attempt, 30))
    share = int.from_bytes(hashlib.sha256(f"{identity}/{attempt}".encode()).digest()[:4]) / 2**32
    return timedelta(seconds=seconds * (1 - share / 5))


def memory_limit_of(attempt: Attempt) -> int | None:
    """Return the memory limit that an attempt's container had, in bytes; None if it had none.

    The pod has precedence: a LimitRange may have given it a limit that the Job does not name.
    """
    pod = attempt.pod.memory_limit if attempt.pod is not None else None
    return pod if pod is not None else attempt.job.memory_limit


def raise_limit(limit: int, settings: OutOfMemory) -> MemoryLimit | None:
    """Return twice the limit, up to the maximum; None if the maximum allows no more than the limit."""
    cap = read_bytes(settings.max_memory) if settings.max_memory is not None else limit
    raised = min(limit * MEMORY_FACTOR, cap)
    return MemoryLimit(limit=raised, before=limit) if raised > limit else None


def with_memory_limit(resources: Mapping[str, Any], limit: int) -> dict[str, Any]:
    """Return a container's resources with another memory limit; the request, if there is one, grows in proportion.

    In proportion, so that equal ones stay equal (the pod's QoS class does not change) and the scheduler still
    counts on the memory that the stage really takes.
    """
    limits, requests = dict(resources.get("limits") or {}), dict(resources.get("requests") or {})
    before, asked = _bytes_of_quantity(limits.get("memory")), _bytes_of_quantity(requests.get("memory"))
    if before == limit:
        return dict(resources)
    limits["memory"] = render_bytes(limit)
    if before and asked:
        requests["memory"] = render_bytes(min(limit, asked * limit // before))
    return {**resources, "limits": limits, **({"requests": requests} if requests else {})}


def _retry_with_more_memory(
    settings: OutOfMemory, memory_limit: int, *, policy: RetryPolicy, used: BudgetsUsed, identity: str
) -> RetryDecision:
    number = used.memory + 1
    after = replace(used, memory=number)
    more = raise_limit(memory_limit, settings)
    had = render_bytes(memory_limit)
    if settings.retries == 0:
        why_not = "outOfMemory.retries is 0"
    elif more is None:
        why_not = f"it had {had}, and outOfMemory.maxMemory of {settings.max_memory} allows no more"
    elif used.memory >= settings.retries:
        retries = pluralize(settings.retries, "retry", "retries")
        why_not = f"it had {had}, after {used.memory} of {retries} with more memory"
    else:
        delay = retry_delay(policy.backoff, identity=identity, attempt=used.memory)
        return RetryDecision(
            action=FailureAction.RETRY_WITH_MORE_MEMORY,
            used=after,
            delay=delay,
            memory=more,
            explanation=f"retry {number} of {settings.retries} with {more} {_when(delay)}",
        )
    return RetryDecision(action=FailureAction.FAIL_BATCH, used=after, explanation=why_not)


def _when(delay: timedelta) -> str:
    seconds = round(delay.total_seconds())
    return f"in {seconds} s" if seconds else "at once"


def _bytes_of_quantity(quantity: str | int | None) -> int | None:
    if quantity is None:
        return None
    try:
        return read_bytes(quantity)
    except QuantityError:  # the API server will refuse the Job for it
        return None
